"""Figures of the GPUs that the model is of, and of their instructions.

Sources: sizes, rates and the throughputs of pipes are NVIDIA's (data sheets; CUDA C++ Programming Guide, arithmetic
instructions by compute capability); the bandwidths are about 90 % of the data sheets', as copies reach. Latencies are
assumed: of the order that published microbenchmarks of these generations give, not measured here.
"""

from typing import NamedTuple

from .sass import Line


class Gpu(NamedTuple):
    name: str
    target: str
    processors: int
    hertz: float
    bandwidth: float  # bytes a second of memory that copies reach
    l2_bandwidth: float  # assumed
    l2_bytes: int
    l1_bytes: int  # with shared memory
    shared_bytes: int  # of a multiprocessor, at most
    shared_steps: tuple[int, ...]  # the KiB of it that a multiprocessor can be set to
    warps: int
    blocks: int
    registers: int
    parameters_at: int  # of a kernel, in bank 0
    shared_at: int  # where a block's shared memory starts
    double_lanes: int  # of float64 arithmetic, a cycle
    has_slow_memory: bool  # as the launchers call it: a narrow bus for so many multiprocessors
    launch: float = 2.0e-6  # seconds of a launch that nothing hides, assumed
    schedulers: int = 4


KIB = 1 << 10
GPUS = {
    "H100": Gpu(
        name="H100",
        target="sm_90",
        processors=132,
        hertz=1.755e9,
        bandwidth=3.0e12,
        l2_bandwidth=5.5e12,
        l2_bytes=50 * KIB**2,
        l1_bytes=256 * KIB,
        shared_bytes=228 * KIB,
        shared_steps=(0, 8, 16, 32, 64, 100, 132, 164, 196, 228),
        warps=64,
        blocks=32,
        registers=65536,
        parameters_at=0x210,
        shared_at=0x400,
        double_lanes=64,
        has_slow_memory=False,
    ),
    "L4": Gpu(
        name="L4",
        target="sm_89",
        processors=58,
        hertz=2.04e9,
        bandwidth=0.27e12,
        l2_bandwidth=1.5e12,
        l2_bytes=48 * KIB**2,
        l1_bytes=128 * KIB,
        shared_bytes=100 * KIB,
        shared_steps=(0, 8, 16, 32, 64, 100),
        warps=48,
        blocks=24,
        registers=65536,
        parameters_at=0x160,
        shared_at=0,
        double_lanes=2,
        has_slow_memory=True,
    ),
}

# Cycles from issue to result where that is not the stall count; all assumed.
MEMORY = {"l1": 38, "l2": 265, "memory": 600, "shared": 29, "barrier": 24, "read": 14}
LATENCIES = {
    "MUFU": 22,
    "F2I": 18,
    "I2F": 18,
    "F2F": 18,
    "POPC": 16,
    "FLO": 16,
    "BREV": 16,
    "SHFL": 24,
    "REDUX": 34,
    "MATCH": 30,
    "VOTEU": 12,
    "R2UR": 12,
    "S2R": 24,
    "S2UR": 24,
    "CS2R": 12,
    "LDC": 30,
    "ULDC": 12,
    "FCHK": 18,
    "DADD": 24,
    "DMUL": 24,
    "DFMA": 24,
    "DSETP": 24,
}
OTHER = 12

# Lanes a cycle of a multiprocessor, and what its pipes execute. Float32 reaches 128, as the issue itself does.
PIPES = {
    "integer": (64, set("IADD3 VIADD ISETP LOP3 SHF LEA SEL FSEL PRMT IMNMX VIMNMX VIMNMX3 VIADDMNMX PLOP3".split())),
    "multiply": (64, {"IMAD"}),
    "compare": (64, set("FSETP FMNMX FCHK VOTE HSET2 HSETP2 HMNMX2 VHMNMX".split())),
    "special": (16, set("MUFU F2I I2F F2F POPC FLO BREV REDUX".split())),
    "shuffle": (32, {"SHFL"}),
    "double": (None, set("DADD DMUL DFMA DSETP".split())),
}


def latency_of(line: Line) -> int:
    return LATENCIES.get(line.name, OTHER)


def lanes_of(gpu: Gpu, pipe: str) -> int:
    return PIPES[pipe][0] or gpu.double_lanes


def blocks_at_once(gpu: Gpu, registers: int, shared: int, size: int) -> int:
    """Blocks of ``size`` threads that a multiprocessor holds; ``shared`` has the 1 KiB that the system takes."""
    warps = -(-size // 32)
    each = -(-registers * 32 // 256) * 256
    by_registers = gpu.registers // gpu.schedulers // each * gpu.schedulers // warps
    return max(1, min(by_registers, gpu.shared_bytes // (-(-shared // 128) * 128), gpu.warps // warps, gpu.blocks))
