"""The batch sampler: every question once, images together, order from seed and epoch alone."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastln.data import GroupedBatches, Sample, VQADataset
from fastln.data.dataset import Source


def dataset(questions_of_image):
    samples = [
        Sample(f"{image}-{number}", str(image), "Q", "A", True)
        for image, count in enumerate(questions_of_image)
        for number in range(count)
    ]
    return VQADataset(Source("test", True, {}, lambda key: None, {}), "train", samples)


def texts(lengths):
    samples = [Sample(str(number), str(number), "", "a" * length, None) for number, length in enumerate(lengths)]
    return VQADataset(Source("test", True, {}, lambda key: None, {}), "train", samples)


COUNTS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@settings(deadline=None)
@given(COUNTS, st.integers(1, 7), st.integers(1, 5), st.integers(), st.integers(0, 3), st.booleans())
def test_each_question_once_in_full_batches(counts, batch_size, per_image, seed, epoch, drop_last):
    data = dataset(counts)
    batches = GroupedBatches(data, batch_size, seed=seed, questions_per_image=per_image, drop_last=drop_last)
    batches.set_epoch(epoch)
    got = list(batches)
    assert len(got) == len(batches)
    flat = [index for batch in got for index in batch]
    assert len(set(flat)) == len(flat)
    assert all(len(batch) == batch_size for batch in got[: None if drop_last else -1])
    assert len(flat) == (len(data) - len(data) % batch_size if drop_last else len(data))
    assert list(batches) == got


@settings(deadline=None)
@given(COUNTS, st.integers(2, 5), st.integers(0, 100))
def test_questions_of_an_image_come_in_groups(counts, per_image, seed):
    """With all in one batch, the images change no more often than there are groups."""
    data = dataset(counts)
    (batch,) = GroupedBatches(data, len(data), seed=seed, questions_per_image=per_image)
    images = [data[index].image for index in batch]
    runs = 1 + sum(a != b for a, b in pairwise(images))
    assert runs <= sum(-(-count // per_image) for count in counts)


@settings(deadline=None)
@given(st.lists(st.integers(0, 99), min_size=1, max_size=300), st.integers(1, 7), st.integers(0, 99), st.booleans())
def test_batches_of_like_length_hold_each_question_once(lengths, batch_size, seed, drop_last):
    data = texts(lengths)
    batches = GroupedBatches(data, batch_size, seed=seed, drop_last=drop_last, by_length=True)
    got = list(batches)
    assert len(got) == len(batches)
    flat = [index for batch in got for index in batch]
    assert len(set(flat)) == len(flat) == (len(data) - len(data) % batch_size if drop_last else len(data))
    assert all(len(batch) == batch_size for batch in got[: None if drop_last else -1])
    assert list(batches) == got


def test_batches_of_like_length_have_little_padding_and_no_order():
    lengths = [7 * number % 400 for number in range(3200)]

    def padded(by_length, epoch=0):
        batches = GroupedBatches(texts(lengths), 8, seed=0, by_length=by_length)
        batches.set_epoch(epoch)
        return [[lengths[index] for index in batch] for batch in batches]

    def share(batches):
        return 1 - sum(map(sum, batches)) / sum(len(batch) * max(batch) for batch in batches)

    assert share(padded(by_length=False)) > 0.4
    assert share(padded(by_length=True)) < 0.06
    longest = [max(batch) for batch in padded(by_length=True)]
    assert sum(a < b for a, b in pairwise(longest)) == pytest.approx(len(longest) / 2, rel=0.15)
    assert padded(by_length=True) != padded(by_length=True, epoch=1)


def test_grouping_saves_vision_passes():
    data = dataset([10] * 40)

    def images_in_batches(per_image):
        batches = GroupedBatches(data, 16, seed=0, questions_per_image=per_image)
        return sum(len({data[index].image for index in batch}) for batch in batches)

    assert images_in_batches(4) < 0.5 * images_in_batches(1)


def test_order_depends_on_seed_and_epoch_alone():
    data = dataset([3, 4, 5, 6])

    def order(seed, epoch, per_image=2):
        batches = GroupedBatches(data, 4, seed=seed, questions_per_image=per_image)
        batches.set_epoch(epoch)
        return list(batches)

    assert order(1, 2) == order(1, 2)
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_one_question_per_image_is_an_ordinary_shuffle():
    """Over many epochs each question comes first about equally often."""
    data = dataset([1, 7])
    batches = GroupedBatches(data, 8, seed=0)
    firsts = Counter()
    for epoch in range(800):
        batches.set_epoch(epoch)
        firsts[next(iter(batches))[0]] += 1
    assert all(70 < firsts[index] < 130 for index in range(8))


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_sizes_must_be_positive(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        GroupedBatches(dataset([2]), sizes[0], seed=0, questions_per_image=sizes[1])
