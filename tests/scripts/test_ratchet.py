"""What fails a compile report."""

import pytest
from ratchet import worse
from report_rows import Row

KERNEL = {
    "kernel": "forward_kernel",
    "registers": 50,
    "spills": 0,
    "loads": 4,
    "loads_128": 3,
    "stores": 3,
    "stores_128": 3,
    "specialises_on_rows": False,
    "truncations": 0,
    "nan_dropped": 0,
}


def row(width=768, library="fastln", case="layer_norm-forward", machine="sm_90", error=None, **changes):
    compiled = None if error else [KERNEL | changes]
    return Row(machine, "bf16", "fp32", width, 8192, case, library, "", 1, error=error, compiled=compiled)


def complaints(now, *before):
    return list(worse([now], before))


def test_the_same_and_the_better_pass():
    assert complaints(row(), row()) == []
    assert complaints(row(registers=40, loads_128=4), row()) == []
    assert complaints(row(loads=2, loads_128=1), row()) == [], "a tile of another shape takes fewer loads"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"registers": 51}, "51 registers, 50 before"),
        ({"loads_128": 2}, "2 loads that are not of 128 bits, 1 before"),
        ({"stores_128": 2}, "1 stores that are not of 128 bits, 0 before"),
        ({"spills": 2}, "2 instructions spill"),
        ({"specialises_on_rows": True}, "recompiles"),
        ({"truncations": 1}, "truncates to bfloat16"),
        ({"nan_dropped": 1}, "drops NaN"),
    ],
)
def test_the_worse_is_told(changes, words):
    (complaint,) = complaints(row(**changes), row())
    assert complaint == f"sm_90 bf16 768 layer_norm-forward forward_kernel: {words}" or words in complaint
    assert complaint.startswith("sm_90 bf16 768 layer_norm-forward forward_kernel: ")


def test_what_is_bad_in_itself_is_told_though_it_was_no_better_before():
    for bad in ({"spills": 2}, {"loads": 0, "loads_128": 0}, {"stores": 0, "stores_128": 0}):
        assert len(complaints(row(**bad), row(**bad))) == 1


def test_rows_are_not_written_where_only_sums_are_wanted_nor_in_128_bits_by_amds_compiler():
    sums = {"case": "layer_norm-dweight-dbias", "kernel": "backward_kernel", "stores": 2, "stores_128": 0}
    assert complaints(row(**sums), row(**sums)) == []
    rows = sums | {"case": "layer_norm-dx-dweight"}
    assert len(complaints(row(**rows), row(**rows))) == 1
    assert complaints(row(machine="gfx942", **rows), row(machine="gfx942", **rows)) == []


def test_a_product_in_8_bits_without_its_instructions_is_told_and_rows_in_8_bits_may_be_written_by_64():
    product = {"case": "int8-linear", "kernel": "product_kernel", "matrix": 4}
    assert complaints(row(**product), row(**product)) == []
    (complaint,) = complaints(row(**product | {"matrix": 0}), row(**product))
    assert "no matrix instructions in 8 bits" in complaint
    (complaint,) = complaints(row(**product | {"stores": 0, "stores_128": 0}), row(**product))
    assert "no 128-bit stores" in complaint
    rounding = {"case": "int8-quantise", "kernel": "quantise_kernel", "stores_128": 0}
    assert complaints(row(**rounding), row(**rounding)) == []


def test_codes_may_be_narrow_but_no_narrower_than_before_and_beside_them_rows_are_written_by_128():
    codes = {"case": "codes2-gelu-forward", "kernel": "forward_codes_kernel", "stores": 4, "stores_128": 2}
    assert complaints(row(**codes), row(**codes)) == []
    (complaint,) = complaints(row(**codes | {"stores": 10}), row(**codes))
    assert "8 stores that are not of 128 bits, 2 before" in complaint
    narrow = codes | {"stores_128": 0}
    assert len(complaints(row(**narrow), row(**narrow))) == 1


def test_missing_figures_are_told():
    others = [row(width=1024), row(case="rms_norm-forward"), row(kernel="forward_kernel 2"), row(library="liger")]
    (complaint,) = complaints(row(), *others)
    assert "no earlier figures to compare with" in complaint
    assert "--accept" in complaint


def test_what_does_not_compile_is_told():
    assert complaints(row(error="out of registers"), row()) == ["sm_90 bf16 768 layer_norm-forward: out of registers"]


def test_wide_rows_may_take_more_registers_but_not_spill_and_peers_may():
    assert complaints(row(width=16384, registers=51), row(width=16384)) == []
    (complaint,) = complaints(row(width=16384, spills=2))
    assert "2 instructions spill" in complaint
    assert complaints(row(library="liger", spills=2)) == []
