"""Images on several threads: the bits and the errors of one after the other, and no thread left over."""

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from fastln.data.dataset import Source, VQADataset
from fastln.data.images import read_image
from fastln.errors import FastLNError
from fastln.models import images, threads
from fastln.models.images import ImageInputs, ImagePixels
from fastln.models.threads import in_threads

KINDS = {  # one of each size relation to the model's images: larger, smaller, equal, odd
    "a.jpg": ((160, 130), {"format": "JPEG"}),
    "b.png": ((31, 57), {}),
    "c.png": ((48, 48), {}),
    "d.jpg": ((301, 45), {"format": "JPEG", "quality": 30}),
}


@pytest.fixture(autouse=True)
def three_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(threads, "usable_cpus", lambda: 3)


def dataset(folder, read=read_image, synthetic=False):
    rng = np.random.default_rng(0)
    for name, ((width, height), how) in KINDS.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / name, **how)
    source = Source("some", synthetic, {}, lambda key: read(folder / key), {})
    return VQADataset(source, "train", [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind",
    [
        ViTImageProcessorPil,
        BitImageProcessorPil,
        BlipImageProcessorPil,
        CLIPImageProcessorPil,
        SiglipImageProcessorPil,
        Qwen2VLImageProcessorPil,
    ],
)
def test_the_bits_of_the_processor_called_for_one_image_after_the_other(tmp_path, kind, dtype):
    used, together = Counter(), threading.Barrier(3)

    def read(path):
        used[threading.current_thread()] += 1
        if used[threading.current_thread()] == 1:
            together.wait(timeout=30)  # so that no thread is done before three have begun
        return read_image(path)

    data = dataset(tmp_path, read)
    processor = kind()
    made = ImageInputs(processor, dtype) if kind is Qwen2VLImageProcessorPil else ImagePixels(processor, 48, dtype)
    keys = [*KINDS, "b.png"]
    inputs = made.inputs(data, keys)
    assert threading.current_thread() not in used
    assert len(used) == 3
    assert used.total() == len(KINDS)
    for key, one in zip(keys, inputs, strict=True):
        expected = dict(processor(read_image(tmp_path / key), return_tensors="pt"))
        expected["pixel_values"] = expected["pixel_values"].to(dtype)
        assert one.keys() == expected.keys()
        for name, tensor in expected.items():
            assert tensor.dtype == one[name].dtype
            assert torch.equal(tensor, one[name]), (key, name)
    again = made.inputs(data, keys)
    assert all(one is other for one, other in zip(inputs, again, strict=True))
    assert used.total() == len(KINDS), "the others are cached"
    if kind is not Qwen2VLImageProcessorPil:
        assert images._resizes_first(processor)
        assert torch.equal(made(data, keys), torch.cat([one["pixel_values"] for one in inputs]))


def test_a_processor_that_does_something_before_it_resizes_gets_the_whole_image(tmp_path):
    class Cropping(ViTImageProcessorPil):
        def resize(self, image, size, resample=None, **kwargs):
            return super().resize(image[:, :20], size, resample, **kwargs)

    data, processor = dataset(tmp_path), Cropping()
    made = ImagePixels(processor, 48, torch.float32)(data, ["a.jpg"])
    assert torch.equal(made, processor(data.image("a.jpg"), return_tensors="pt")["pixel_values"])


def test_transparency_that_the_processor_would_blend_is_left_to_it(tmp_path):
    def read(path):
        image = read_image(path)
        image.info["transparency"] = (9, 9, 9)
        image.paste((9, 9, 9), (0, 0, 40, 40))
        return image

    data, processor = dataset(tmp_path, read), CLIPImageProcessorPil()
    made = ImagePixels(processor, 48, torch.float32)(data, ["a.jpg"])
    assert torch.equal(made, processor(data.image("a.jpg"), return_tensors="pt")["pixel_values"])


def test_of_several_unreadable_images_the_first_of_the_batch_is_named(tmp_path):
    def read(path):
        if path.name == "b.png":
            time.sleep(0.1)  # the error of a later one comes first
        return read_image(path)

    data = dataset(tmp_path, read)
    for name in ("b.png", "c.png"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    made = ImagePixels.plain(32, torch.float32)
    with pytest.raises(FastLNError) as alone:
        data.image("b.png")
    with pytest.raises(FastLNError) as caught:
        made(data, [*KINDS])
    assert str(caught.value) == str(alone.value)
    assert "b.png" in str(caught.value)
    assert made(data, ["a.jpg", "d.jpg"]).shape == (2, 3, 32, 32)


def test_what_a_program_draws_and_other_processors_stay_on_the_callers_thread(tmp_path):
    used = set()

    def read(path):
        used.add(threading.current_thread())
        return read_image(path)

    ImagePixels.plain(32, torch.float32)(dataset(tmp_path, read, synthetic=True), [*KINDS])
    plain = ViTImageProcessorPil()
    other = ImageInputs(lambda image, **kwargs: plain(image, **kwargs), torch.float32)
    other.inputs(dataset(tmp_path, read), [*KINDS])
    assert used == {threading.current_thread()}


def left_over():
    return [thread for thread in threading.enumerate() if thread.name.startswith("fastln")]


def test_an_interrupt_waits_only_for_what_has_begun():
    begun = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # processes in the background ignore it

    def work(item):
        begun.append(item)
        if item == 5:  # all threads run
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)

    try:
        with pytest.raises(KeyboardInterrupt):
            in_threads(work, range(100))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(begun) < 50
    assert not left_over()


def test_without_threads_the_caller_does_the_work(monkeypatch, caplog):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    def where(item):
        return item, threading.current_thread()

    here = threading.current_thread()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    threads._tell.cache_clear()
    for _ in range(2):
        assert in_threads(where, range(4)) == [(item, here) for item in range(4)]
    assert caplog.text.count("no thread can be started: can't start new thread") == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    threads._tell.cache_clear()
    caplog.clear()
    assert in_threads(where, range(4)) == [(item, here) for item in range(4)]
    assert not caplog.text


def test_a_forked_process_has_threads_of_its_own():
    assert in_threads(abs, range(-4, 0)) == [4, 3, 2, 1]
    assert not left_over()
    child = multiprocessing.get_context("fork").Process(target=in_threads, args=(abs, range(-4, 0)))
    child.start()
    child.join(30)
    assert child.exitcode == 0
