"""The GPUs that kernels are compiled for, none of which is here, and the limits of a program on each."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

from hf_paged_kernels.triton.launch_plan import Device


@dataclass(frozen=True)
class Target:
    """A GPU, from its maker's data sheets.

    Attributes
    ----------
    arch, name : str
    processors : int
        Streaming multiprocessors or compute units.
    bandwidth : float
        Of its memory, bytes per second.
    registers : int
        32-bit registers per processor, for all its threads.
    shared, shared_program : int
        Bytes of shared memory per processor, and the most that one program may have.
    warp : int
        Threads per warp.
    warps : int
        That a processor can hold.
    """

    arch: str
    name: str
    processors: int
    bandwidth: float
    registers: int
    shared: int
    shared_program: int
    warp: int
    warps: int

    @property
    def is_hip(self) -> bool:
        return self.arch.startswith("gfx")

    @property
    def device(self) -> Device:
        return Device(self.arch, self.processors)

    @property
    def gpu_target(self) -> GPUTarget:
        return GPUTarget("hip", self.arch, 64) if self.is_hip else GPUTarget("cuda", int(self.arch[2:]), 32)

    def programs(self, registers: int, shared: int, num_warps: int) -> int:
        """The number of programs with these needs that a processor holds at once."""
        # Registers are given out by 8 per thread, and CUDA keeps 1 KiB of shared memory per program to itself.
        a_thread = -(-registers // 8) * 8
        by_registers = self.registers // (a_thread * self.warp * num_warps) if registers else self.warps
        by_shared = self.shared // (shared + (0 if self.is_hip else 1024)) if shared else self.warps
        return min(by_registers, by_shared, self.warps // num_warps, 32)


TARGETS = {
    target.arch: target
    for target in (
        Target("sm80", "A100 80GB", 108, 2.039e12, 65536, 164 << 10, 163 << 10, 32, 64),
        Target("sm90", "H100 SXM", 132, 3.35e12, 65536, 228 << 10, 227 << 10, 32, 64),
        Target("sm100", "B200", 148, 8.0e12, 65536, 228 << 10, 227 << 10, 32, 64),
        Target("gfx942", "MI300X", 304, 5.3e12, 131072, 64 << 10, 64 << 10, 64, 32),
    )
}
