"""The arithmetic from compiled figures to a predicted share of the memory's bandwidth."""

import dataclasses

import pytest
from machines import MACHINES
from prediction import LATENCY, predict, predict_product, seconds, traffic

H100, MI300 = MACHINES["sm_90"], MACHINES["gfx942"]
KERNEL = {
    "moved": 1 << 26,
    "read_twice": 0,
    "row_tiles": 8192,
    "turns": 8192,
    "warps": 4,
    "programs": 132,
    "resident_warps": 4,
    "in_flight": 1 << 20,
    "stack": 0,
    "shared": 0,
    "spill_bytes": 0,
    "loop_spill_bytes": 0,
    "instructions": 100,
    "loop_instructions": 60,
}


def test_a_kernel_that_keeps_memory_busy_takes_the_time_of_its_bytes():
    assert seconds(KERNEL, H100) == pytest.approx((1 << 26) / 3.35e12)
    assert predict([KERNEL, KERNEL], 1 << 26, 1 << 25, H100) == {
        "share": 0.5,
        "seconds": pytest.approx(2 * (1 << 26) / 3.35e12, rel=1e-3),
        "bytes_per_element": 4.0,
    }


def test_a_program_that_no_sm_holds_has_no_time():
    with pytest.raises(ValueError, match="32 warps does not fit on an SM"):
        predict([KERNEL | {"kernel": "big", "warps": 32, "resident_warps": 0}], 1, 1, MI300)


def test_little_in_flight_is_waited_for():
    one = KERNEL | {"in_flight": 1024}
    assert seconds(one, H100) == pytest.approx((1 << 26) * LATENCY / (4 * 1024 * 132))


def test_a_launch_waits_once_at_least_and_for_no_more_programs_than_there_are():
    assert seconds(KERNEL | {"moved": 1, "turns": 0}, H100) == LATENCY
    few = KERNEL | {"in_flight": 1024, "programs": 24}
    assert seconds(few, H100) == pytest.approx((1 << 26) * LATENCY / (24 * 4 * 1024))


def test_instructions_are_issued_in_every_turn_of_the_loop_and_once_outside():
    one = KERNEL | {"instructions": 3040, "loop_instructions": 3000}
    issued = 4 * (132 * 40 + 8192 * 3000)
    assert seconds(one, H100) == pytest.approx(issued / (4 * 1.755e9 * 132))
    assert seconds(one, MI300) == pytest.approx(issued / (1 * 2.1e9 * 304))


def test_issue_is_left_out_where_a_row_takes_several_turns():
    one = KERNEL | {"loop_instructions": 100_000, "turns": 4 * 8192}
    assert seconds(one, H100) == pytest.approx((1 << 26) / 3.35e12)


@pytest.mark.parametrize(("row_bytes", "again"), [(190_000, False), (200_000, True)])
def test_a_second_read_costs_where_the_rows_at_work_exceed_half_the_l2(row_bytes, again):
    """132 rows at once, against 25 MB."""
    twice = 8192 * row_bytes
    assert traffic(KERNEL | {"read_twice": twice}, H100) == (1 << 26) + again * twice
    slow = KERNEL | {"in_flight": 64}
    waits = seconds(slow | {"read_twice": twice}, H100) / seconds(slow, H100)
    assert waits == pytest.approx(1 + twice / (1 << 26))  # it is waited for all the same


@pytest.mark.parametrize(
    ("machine", "stack", "shared", "beyond"),
    [
        (H100, 256, 0, 0.0),  # all of an L1 of 256 KB
        (H100, 260, 0, 0.0),  # more than that, but in all of 132 SMs 33.5 MB of an L2 of 50
        (H100, 400, 0, 1 - 50 / (132 * 400 / 1024)),
        (H100, 400, 64 << 10, 1 - 50 / (132 * 400 / 1024)),
        (MI300, 16, 64 << 10, 0.0),  # all of an L1 of 32 KB, which no shared memory is cut out of
        (MI300, 640, 0, 1 - 256 / (304 * 1280 / 1024)),
    ],
)
def test_spills_move_what_no_cache_holds_of_the_stacks(machine, stack, shared, beyond):
    """Of 1,024 lanes an SM, 2,048 at AMD."""
    one = KERNEL | {"resident_warps": 32, "warps": 32, "stack": stack, "shared": shared}
    one |= {"spill_bytes": 50, "loop_spill_bytes": 40}
    spilled = machine.lanes * 32 * (132 * 10 + 8192 * 40)
    assert traffic(one, machine) == (1 << 26) + int(beyond * spilled)


def test_shared_memory_takes_l1_away_from_stacks():
    big = KERNEL | {"resident_warps": 64, "warps": 32, "stack": 120, "loop_spill_bytes": 40, "spill_bytes": 40}
    small_l2 = dataclasses.replace(H100, l2=1 << 20)
    assert traffic(big, small_l2) == 1 << 26  # 240 KB
    assert traffic(big | {"shared": 9 << 10}, small_l2) > 1 << 26


@pytest.mark.parametrize(
    ("machine", "registers", "shared", "warps", "programs"),
    [
        (H100, 32, 0, 4, 16),
        (H100, 33, 0, 4, 12),
        (H100, 255, 0, 8, 1),
        (H100, 32, 56 << 10, 4, 4),
        (MI300, 64, 0, 4, 8),
        (MI300, 512, 0, 4, 1),
    ],
)
def test_programs_of_an_sm(machine, registers, shared, warps, programs):
    assert machine.resident_programs(registers, shared, warps) == programs


def test_a_product_takes_the_longest_of_traffic_operations_and_issue():
    one = KERNEL | {"kernel": "product", "instructions": 1060, "loop_instructions": 60, "moved": 4096}
    found = predict_product(one, 10**12, 10, 1024, H100)
    assert found["seconds"] == pytest.approx(10**12 / 1979e12, rel=1e-3)
    assert (found["share"], found["over_bf16"], found["bytes_per_element"]) == (1.0, 2.0, 4.0)
    few = predict_product(one, 10**6, 10, 1024, H100)
    assert few["seconds"] == pytest.approx(132 * 4 * (1000 + 10 * 60) / (4 * 1.755e9 * 132), rel=1e-3)
    assert few["share"] < 0.01
    slow = predict_product(one | {"moved": 1 << 33}, 10**12, 10, 1024, H100)
    assert slow["seconds"] == pytest.approx((1 << 33) / 3.35e12, rel=1e-3)


def test_a_product_whose_rate_no_data_sheet_has_is_not_predicted_nor_one_that_does_not_fit():
    assert predict_product(KERNEL, 1, 1, 1, MACHINES["sm_100"]) is None
    with pytest.raises(ValueError, match="does not fit on an SM"):
        predict_product(KERNEL | {"kernel": "big", "resident_warps": 0}, 1, 1, 1, H100)
