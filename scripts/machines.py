"""The GPUs that kernels are compiled for, with figures from the vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

from fastln.devices import DEVICES, Device

KB, MB = 1 << 10, 1 << 20


@dataclass(frozen=True, slots=True)
class Machine:
    """A GPU.

    Attributes:
        device: Bandwidth and rates, as `fastln plan` knows them.
        target: Triton's compilation target.
        sms: Streaming multiprocessors (compute units on AMD).
        clock: Cycles per second.
        l1: Bytes of L1 cache per SM. On NVIDIA, shared memory takes part of them.
        l2: Bytes of the last cache before memory, shared by all SMs. On AMD this is the Infinity Cache, with 17 TB/s.
        registers: 32-bit registers per SM.
        issue: Warp instructions per cycle and SM.
        max_warps: Maximum number of warps per SM.
        max_programs: Maximum number of programs per SM.
        shared: Bytes of shared memory per SM.
        has_int8: Whether Triton compiles products in 8 bits to the instructions of the data sheet's rate.
    """

    device: Device
    target: GPUTarget
    sms: int
    clock: float
    l1: int
    l2: int
    registers: int = 65536
    issue: int = 4
    max_warps: int = 64
    max_programs: int = 32
    shared: int = 228 * KB
    has_int8: bool = True

    @property
    def name(self) -> str:
        """Name of the product."""
        return self.device.name

    @property
    def bandwidth(self) -> float:
        """Memory bandwidth in bytes per second."""
        return self.device.bandwidth

    @property
    def int8(self) -> float | None:
        """Operations per second of dense products in 8 bits; None if Triton makes others than the data sheet's."""
        return self.device.rates["int8"] if self.has_int8 else None

    @property
    def bf16(self) -> float:
        """Operations per second of dense products in bfloat16."""
        return self.device.rates["bfloat16"]

    @property
    def lanes(self) -> int:
        """Lanes per warp."""
        return int(self.target.warp_size)

    @property
    def hopper(self) -> bool:
        """The value of `launch.is_hopper` on this machine."""
        return self.target.backend == "cuda" and self.target.arch == 90

    @property
    def tight(self) -> bool:
        """The value of `launch.is_tight` on this machine."""
        return self.target.backend == "hip" or self.target.arch >= 100

    def resident_programs(self, registers: int, shared: int, warps: int) -> int:
        """Return how many programs one SM holds at once.

        Args:
            registers: Registers per lane.
            shared: Bytes of shared memory per program.
            warps: Warps per program.
        """
        per_warp = -(-registers // 8) * 8 * self.lanes
        programs = min(self.max_programs, self.max_warps // warps, self.registers // (per_warp * warps))
        return min(programs, self.shared // (shared + KB)) if shared else programs

    def l1_left(self, shared: int) -> int:
        """Return the bytes of L1 that are left when an SM uses `shared` bytes of shared memory."""
        return self.l1 - (shared if self.target.backend == "cuda" else 0)


MACHINES = {
    "sm_80": Machine(
        *(DEVICES["A100 SXM 80 GB"], GPUTarget("cuda", 80, 32)),
        sms=108,
        clock=1.41e9,
        l1=192 * KB,
        l2=40 * MB,
        shared=164 * KB,
    ),
    "sm_90": Machine(
        *(DEVICES["H100 SXM"], GPUTarget("cuda", 90, 32)),
        sms=132,
        clock=1.755e9,
        l1=256 * KB,
        l2=50 * MB,
    ),
    "sm_100": Machine(
        *(DEVICES["B200"], GPUTarget("cuda", 100, 32)),
        sms=148,
        clock=1.85e9,
        l1=256 * KB,
        l2=126 * MB,
        has_int8=False,  # the data sheet's rate is that of tcgen05; Triton 3.7 compiles to mma.sync here
    ),
    # Each compute unit has four SIMDs. A SIMD has 512 registers for each of 64 lanes and holds 8 waves. An instruction
    # takes four cycles for its 64 lanes.
    "gfx942": Machine(
        *(DEVICES["MI300X"], GPUTarget("hip", "gfx942", 64)),
        sms=304,
        clock=2.1e9,
        l1=32 * KB,
        l2=256 * MB,
        registers=4 * 512 * 64,
        issue=1,
        max_warps=32,
        shared=64 * KB,
    ),
}
