"""The phantom data: the same everywhere, and its answers are what the pictures show."""

import hashlib
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from fastln.data import load_dataset, phantom
from fastln.errors import FastLNError

FINGERPRINT = """
import hashlib
from fastln.data import load_dataset
data = load_dataset("phantom", "test")
digest = hashlib.sha256(repr(data.samples).encode())
for sample in data.samples[:60:6]:
    digest.update(data.image(sample.image).tobytes())
fingerprint = digest.hexdigest()
"""


def scenes():
    return phantom.source().image.args[0]


def test_labelled_synthetic():
    data = load_dataset("phantom", "train")
    assert (data.name, data.synthetic) == ("phantom (synthetic)", True)
    with pytest.raises(FastLNError, match="no image 'x'"):
        data.image("x")


def test_the_same_in_every_process_and_every_time():
    here = {}
    exec(FINGERPRINT, here)
    run = subprocess.run([sys.executable, "-c", f"{FINGERPRINT}print(fingerprint)"], capture_output=True, text=True)
    assert run.stdout.strip() == here["fingerprint"], run.stderr


def test_the_questions_of_this_version():
    """Python's own generator chooses them, so they are the same on every platform; results elsewhere rest on them."""
    rows = [(s.id, s.image, s.question, s.answer, s.closed) for s in load_dataset("phantom", "test").samples]
    assert hashlib.sha256(repr(rows).encode()).hexdigest()[:16] == "cc48be0a682e8b22"


class WholeCanvasPen(phantom._Pen):
    """Adds every shape on a layer as large as the canvas, one after the other: the definition of the pictures."""

    def specks(self, x, y, rx, ry, count, grey):
        for _ in range(count):
            dot = self.random.randint(1, 3)
            self.glow(x + self.random.randint(-rx, rx), y + self.random.randint(-ry, ry), dot, dot, grey)

    def _add(self, box, shape, grey):
        super()._add((0, 0, *self.image.size), shape, grey)


def test_shapes_are_added_inside_their_boxes_as_on_the_whole_canvas(monkeypatch):
    some = list(scenes().values())[::4]
    assert {(scene.modality, scene.organ) for scene in some} == {*phantom._VIEWS}
    pictures = [phantom.draw(scene).tobytes() for scene in some]
    monkeypatch.setattr(phantom, "_Pen", WholeCanvasPen)
    assert [phantom.draw(scene).tobytes() for scene in some] == pictures


def test_sizes_and_images():
    train, test = (load_dataset("phantom", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (160 * 6, 40 * 6)
    assert len({sample.id for sample in train.samples + test.samples}) == 200 * 6
    assert not {sample.image for sample in train.samples} & {sample.image for sample in test.samples}
    image = test.image(test[0].image)
    assert (image.mode, image.size) == ("RGB", (128, 128))
    assert np.asarray(image).std() > 20


def test_every_answer_and_wording_occurs_in_training():
    train, test = (load_dataset("phantom", split).samples for split in ("train", "test"))
    answers = Counter(sample.answer for sample in train)
    assert set(answers) == {*"0123", "yes", "no", "left", "right", "none", "ct", "x-ray"} | {
        "head",
        "chest",
        "abdomen",
        "knee",
    }
    assert min(answers.values()) >= 15
    assert {sample.question for sample in test} <= {sample.question for sample in train}
    assert all(sample.closed == (sample.answer in {"yes", "no", "left", "right", "none"}) for sample in train)


def test_lesions_stand_apart_on_the_side_that_is_answered():
    """The picture with lesions differs from that without in as many spots as are counted, in the half that is named."""
    samples = {s.id: s for split in ("train", "test") for s in load_dataset("phantom", split).samples}
    for key, scene in list(scenes().items())[::3]:
        assert samples[f"{key}-count"].answer == str(len(scene.lesions))
        assert samples[f"{key}-side"].answer == scene.side
        assert samples[f"{key}-present"].answer == ("yes" if scene.lesions else "no")
        on_side = samples[f"{key}-on-side"]
        asked = "left" if "left" in on_side.question else "right"
        assert on_side.answer == ("yes" if asked == scene.side else "no")
        drawn, bare = (np.asarray(phantom.draw(s))[..., 0].astype(int) for s in (scene, replace(scene, lesions=())))
        changed = np.abs(drawn - bare) > 20
        _, columns = changed.nonzero()
        # The patient's left is on the right of the image.
        assert (columns > 64).all() if scene.side == "left" else (columns < 64).all()
        assert spots(changed) == len(scene.lesions), key


def spots(mask):
    """Count connected areas of at least ten pixels."""
    left = {tuple(p) for p in np.argwhere(mask)}
    count = 0
    while left:
        edge, size = [left.pop()], 0
        while edge:
            y, x = edge.pop()
            size += 1
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge += near
        count += size >= 10
    return count


def test_worker_processes_can_have_it():
    data = load_dataset("phantom", "test")
    copy = pickle.loads(pickle.dumps(data))
    assert copy.image(copy[7].image).tobytes() == data.image(data[7].image).tobytes()
