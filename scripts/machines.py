"""The GPUs that kernels are compiled for, with figures from the vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

KB, MB = 1 << 10, 1 << 20


@dataclass(frozen=True, slots=True)
class Machine:
    """A GPU.

    Attributes:
        name: Name of the product.
        target: Triton's compilation target.
        sms: Streaming multiprocessors (compute units on AMD).
        bandwidth: Memory bandwidth in bytes per second.
        clock: Cycles per second.
        l1: Bytes of L1 cache per SM. On NVIDIA, shared memory takes part of them.
        l2: Bytes of the last cache before memory, shared by all SMs. On AMD this is the Infinity Cache, with 17 TB/s.
        registers: 32-bit registers per SM.
        issue: Warp instructions per cycle and SM.
        max_warps: Maximum number of warps per SM.
        max_programs: Maximum number of programs per SM.
        shared: Bytes of shared memory per SM.
        int8: Operations per second of dense products in 8 bits, by the instructions that Triton compiles to; None if
            the data sheet does not say.
        bf16: Operations per second of dense products in bfloat16.
    """

    name: str
    target: GPUTarget
    sms: int
    bandwidth: float
    clock: float
    l1: int
    l2: int
    registers: int = 65536
    issue: int = 4
    max_warps: int = 64
    max_programs: int = 32
    shared: int = 228 * KB
    int8: float | None = None
    bf16: float = 0.0

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
        *("A100 SXM 80 GB", GPUTarget("cuda", 80, 32)),
        sms=108,
        bandwidth=2.04e12,
        clock=1.41e9,
        l1=192 * KB,
        l2=40 * MB,
        shared=164 * KB,
        int8=624e12,
        bf16=312e12,
    ),
    "sm_90": Machine(
        *("H100 SXM", GPUTarget("cuda", 90, 32)),
        sms=132,
        bandwidth=3.35e12,
        clock=1.755e9,
        l1=256 * KB,
        l2=50 * MB,
        int8=1979e12,
        bf16=989e12,
    ),
    "sm_100": Machine(
        *("B200", GPUTarget("cuda", 100, 32)),
        sms=148,
        bandwidth=8.0e12,
        clock=1.85e9,
        l1=256 * KB,
        l2=126 * MB,
        # The data sheet's 4.5e15 in 8 bits are those of tcgen05. Triton 3.7 compiles to mma.sync here.
        bf16=2250e12,
    ),
    # Each compute unit has four SIMDs. A SIMD has 512 registers for each of 64 lanes and holds 8 waves. An instruction
    # takes four cycles for its 64 lanes.
    "gfx942": Machine(
        *("MI300X", GPUTarget("hip", "gfx942", 64)),
        sms=304,
        bandwidth=5.3e12,
        clock=2.1e9,
        l1=32 * KB,
        l2=256 * MB,
        registers=4 * 512 * 64,
        issue=1,
        max_warps=32,
        shared=64 * KB,
        int8=2615e12,
        bf16=1307e12,
    ),
}
