"""What is read off listings of machine code."""

import pytest
from assembly import (
    GCN,
    SASS,
    access_bytes,
    common_figures,
    gcn_lines,
    longest_loop,
    read_gcn,
    read_sass,
    sass_bytes_before_first_use,
)

SASS_LOOP = [
    ".L_x_1:",
    "LDG.E.128 R4, [R2];",
    "LDG.E R8, [R2];",
    "FADD R9, R7, R1;",
    "LDG.E R10, [R2];",
    "@P0 BRA `(.L_x_1);",
]


def test_sass_loop_and_what_it_asks_for():
    code = ["S2R R0, SR_TID.X;", *SASS_LOOP, "EXIT;", ".L_x_2:", "BRA `(.L_x_2);"]
    assert longest_loop(code, SASS) == SASS_LOOP
    assert longest_loop(["LDG.E R4, [R2];", "EXIT;"], SASS) == []
    assert sass_bytes_before_first_use(SASS_LOOP) == 20
    assert sass_bytes_before_first_use(["EXIT;"]) == 0


def test_sass_figures():
    instructions = [
        "STL.64 [R1+0x8], R2;",
        *SASS_LOOP[:2],
        "LDL.128 R12, [R1];",
        "STG.E.128 [R2], R4;",
        "BAR.SYNC.DEFER_BLOCKING 0x0;",
        "F2F.BF16.F32.RZ R3, R4;",
        SASS_LOOP[-1],
        "EXIT;",
    ]
    listing = "\n".join(
        f"{line}" if line.endswith(":") else f"        /*{16 * i:04x}*/                   {line}"
        for i, line in enumerate(instructions)
    )
    figures = read_sass(listing, " Function f:\n  REG:40 STACK:24 SHARED:0", "max.f32 %f1;\nmax.NaN.f32 %f2;")
    assert figures == {
        "registers": 40,
        "stack": 24,
        "spills": 2,
        "loads": 1,
        "loads_128": 1,
        "stores": 1,
        "stores_128": 1,
        "matrix": 0,
        "barriers": 1,
        "loop_barriers": 1,
        "instructions": 8,
        "loop_instructions": 6,
        "spill_bytes": 24,
        "loop_spill_bytes": 16,
        "in_flight": 32 * 16,
        "matrix_of_groups": 0,
        "truncations": 1,
        "nan_dropped": 1,
    }


GCN_LISTING = """
kernel:                                 ; @kernel
; %bb.0:
	s_load_dwordx4 s[0:3], s[4:5], 0x0
	global_load_dword v9, v0, s[0:1]
	s_waitcnt vmcnt(0)
	s_cbranch_execz .LBB0_3
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	s_waitcnt lgkmcnt(0)
	buffer_load_dwordx4 v[0:3], v8, s[0:3], 0 offen
	global_load_ushort v4, v0, s[0:1]
	s_waitcnt vmcnt(1)
	global_load_dwordx2 v[4:5], v0, s[0:1]
	scratch_store_dwordx2 off, v[4:5], s32
	s_barrier
	ds_read_b32 v1, v2
	buffer_store_dwordx4 v[0:3], v8, s[0:3], 0 offen
	s_cbranch_scc1 .LBB0_2
.LBB0_3:
	s_endpgm
    .private_segment_fixed_size: 12
    .vgpr_count:     37
    .vgpr_spill_count: 2
"""


def test_gcn_figures_are_those_of_the_loop():
    loop = longest_loop(gcn_lines(GCN_LISTING), GCN)
    assert (loop[0], loop[-1]) == (".LBB0_2:", "s_cbranch_scc1 .LBB0_2")
    assert read_gcn(GCN_LISTING) == {
        "registers": 37,
        "stack": 12,
        "spills": 2,
        "loads": 4,
        "loads_128": 1,
        "stores": 1,
        "stores_128": 1,
        "matrix": 0,
        "barriers": 1,
        "loop_barriers": 1,
        "instructions": 15,
        "loop_instructions": 10,
        "spill_bytes": 8,
        "loop_spill_bytes": 8,
        "in_flight": 64 * (16 + 2),
    }


def test_without_a_loop_the_whole_gcn_kernel_counts():
    listing = GCN_LISTING.replace("s_cbranch_scc1 .LBB0_2", "s_nop 0")
    assert read_gcn(listing)["in_flight"] == 64 * 4
    assert read_gcn(listing)["loop_instructions"] == 0


def test_matrix_instructions_and_copies_to_shared_memory_are_counted():
    sass = [
        ".L_x_1:",
        "LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64];",
        "LDGSTS.E.LTC128B [R1], [R2.64];",
        "IMMA.16832.S8.S8.SAT R8, R4.ROW, R5.COL, R8;",
        "IGMMA.64x128x32.S8.S8 R24, gdesc[UR4], R24;",
        "HMMA.16816.F32.BF16 R8, R4, R5, R8;",
        "@P0 BRA `(.L_x_1);",
    ]
    found = common_figures(sass, SASS, r"\S*\.128\b")
    assert (found["loads"], found["loads_128"], found["matrix"], found["loop_instructions"]) == (2, 1, 2, 6)
    assert common_figures(["v_mfma_i32_32x32x16_i8 v[0:15], v[16:17], v[18:19], 0"], GCN, "_dwordx4")["matrix"] == 1


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("@!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64];", 16),
        ("LDG.E.64 R4, [R2];", 8),
        ("LDG.E.U16 R4, [R2];", 2),
        ("STL [R1], R2;", 4),
        ("global_load_short_d16_hi v1, v2, s[0:1]", 2),
        ("buffer_load_ubyte v1, v2, s[0:3], 0 offen", 1),
        ("scratch_load_dwordx3 v[1:3], off, s32", 12),
    ],
)
def test_bytes_of_an_access(line, size):
    assert access_bytes(line) == size
