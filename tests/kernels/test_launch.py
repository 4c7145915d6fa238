"""Launch choices that must hold whatever a GPU would say of them."""

import itertools

import pytest
import torch

from fastln_kernels import launch

CPU = torch.device("cpu")


def forward_tile(n_cols, itemsize, *, prologue=False):
    return launch.forward_tile(n_cols, itemsize, CPU, prologue=prologue)


def wide_tile(n_cols, itemsize, n_sums, *, n_inputs=2, prologue=False):
    return launch.wide_tile(n_cols, itemsize, n_inputs=n_inputs, n_sums=n_sums, prologue=prologue)


def backward_tile(n_cols, itemsize, n_sums, *, n_inputs=2, need_rows=True, prologue=False):
    return launch.backward_tile(
        n_cols,
        itemsize,
        CPU,
        n_inputs=n_inputs,
        n_sums=n_sums,
        need_rows=need_rows,
        prologue=prologue,
    )


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("n_cols", [1, 384, 768, 1000, 1152, 1280, 2048, 8192])
def test_a_tile_holds_its_rows_and_every_lane_loads_16_bytes(n_cols, itemsize):
    tiles = [forward_tile(n_cols, itemsize), *(backward_tile(n_cols, itemsize, n_sums) for n_sums in range(3))]
    for tile in tiles:
        assert tile.piece * tile.pieces >= n_cols > tile.piece * (tile.pieces - 1)
        assert tile.rows * tile.piece * itemsize >= tile.warps * 32 * 16


def test_up_to_1280_columns_no_row_is_shared_by_warps():
    for itemsize, n_cols in itertools.product((2, 4), (384, 768, 1024, 1152, 1280)):
        for tile in (forward_tile(n_cols, itemsize), backward_tile(n_cols, itemsize, 0)):
            assert tile.rows >= tile.warps


def test_what_the_registers_hold():
    assert forward_tile(32768, 2)
    assert not forward_tile(32768, 2, prologue=True)
    assert not forward_tile(65536, 2)
    assert backward_tile(16384, 2, 0)
    assert not backward_tile(16384, 2, 2)
    assert backward_tile(16384, 2, 2, need_rows=False)
    assert not backward_tile(16384, 2, 1)
    assert not backward_tile(16384, 4, 1, need_rows=False)


def test_which_sums_are_kept_on_the_way_through_wide_rows(monkeypatch):
    def kept(n_cols, **options):
        return [wide_tile(n_cols, itemsize, 2, **options).sums for itemsize in (2, 4)]

    assert kept(16384) == [2, 2]
    assert kept(16384, prologue=True) == [1, 1]
    assert kept(16385) == kept(32768) == [1, 1]
    assert kept(32769) == kept(16385, prologue=True) == [0, 0]
    assert wide_tile(16384, 2, 1).sums == 1
    monkeypatch.setattr(launch, "LANES", 64)
    assert kept(16384) == [2, 2]
    assert kept(16384, prologue=True) == kept(32768) == [1, 1]
    assert kept(32769) == kept(16385, prologue=True) == [0, 0]


def test_a_group_of_blocks_is_no_more_than_a_row():
    for itemsize, n_cols, n_inputs in itertools.product((2, 4), (8193, 16384, 20480, 65536), (1, 2)):
        tile = wide_tile(n_cols, itemsize, 0, n_inputs=n_inputs)
        assert tile.cols * itemsize == tile.warps * 32 * 16
        assert tile.cols * (tile.group - 1) < n_cols
    assert [wide_tile(16384, itemsize, 2).group for itemsize in (2, 4)] == [4, 8]
    assert [wide_tile(16384, itemsize, 2, prologue=True).group for itemsize in (2, 4)] == [4, 4]
    assert [wide_tile(16384, itemsize, 0).group for itemsize in (2, 4)] == [8, 8], "no sums take registers"


def test_the_next_tile_is_asked_for_early_where_the_registers_have_room():
    assert all(backward_tile(n_cols, 2, 2).prefetch for n_cols in (384, 768, 1024, 1152, 1280, 2048))
    assert backward_tile(768, 2, 2, n_inputs=3, prologue=True).prefetch
    assert not backward_tile(8192, 2, 2, n_inputs=3, prologue=True).prefetch
    assert not backward_tile(8192, 4, 2).prefetch
    assert not backward_tile(768, 2, 0).prefetch, "its programs have one tile each"


def test_compilers_that_take_more_registers_get_fewer_elements_a_lane(monkeypatch):
    def elements(n_cols):
        return backward_tile(n_cols, 2, 2).pieces * 8

    assert elements(1280) == 40
    monkeypatch.setattr(launch, "is_tight", lambda device: True)
    assert elements(1280) == 24
    assert elements(8192) == 32, "what 8 warps hold of it; more must not share a row"


def test_a_programs_registers_fit_into_an_sm():
    for itemsize, n_cols in itertools.product((2, 4), (384, 768, 1280, 4096, 10240, 16384, 32768)):
        tiles = [forward_tile(n_cols, itemsize), *(backward_tile(n_cols, itemsize, n_sums) for n_sums in (1, 2))]
        for tile in tiles:
            assert not tile or not tile.max_registers or tile.max_registers * tile.warps * 32 <= 65536
