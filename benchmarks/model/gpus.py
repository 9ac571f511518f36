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
    shared_bytes: int  # of a multiprocessor
    warps: int
    blocks: int
    registers: int
    parameters_at: int  # of a kernel, in bank 0
    shared_at: int  # where a block's shared memory starts
    wide_integers: bool = False  # 64 lanes of integers on a multiprocessor in place of 128
    launch: float = 2.0e-6  # seconds of a launch that nothing hides, assumed
    schedulers: int = 4


GPUS = {
    "H100": Gpu(
        *("H100", "sm_90", 132, 1.755e9, 3.0e12, 5.5e12, 50 << 20, 256 << 10, 228 << 10, 64, 32, 65536, 0x210, 0x400)
    ),
    "L4": Gpu(*("L4", "sm_89", 58, 2.04e9, 0.27e12, 1.5e12, 48 << 20, 128 << 10, 100 << 10, 48, 24, 65536, 0x160, 0)),
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
    "B2R": 24,
    "FCHK": 18,
    "DADD": 24,
    "DMUL": 24,
    "DFMA": 24,
    "DSETP": 24,
}
OTHER = 12

# Lanes a cycle of a multiprocessor, by its pipe. Float32 and the issue itself reach 128.
PIPES = {
    "integer": (64, set("IADD3 VIADD ISETP LOP3 SHF LEA SEL FSEL PRMT IMNMX VIMNMX VIMNMX3 VIADDMNMX PLOP3".split())),
    "multiply": (64, {"IMAD"}),
    "compare": (64, set("FSETP FMNMX FCHK VOTE".split())),
    "special": (16, set("MUFU F2I I2F F2F POPC FLO BREV REDUX".split())),
    "shuffle": (32, {"SHFL"}),
    "double": (64, set("DADD DMUL DFMA DSETP".split())),
}


def latency_of(line: Line) -> int:
    return LATENCIES.get(line.name, OTHER)


def pipe_of(line: Line) -> str | None:
    return next((pipe for pipe, (_, names) in PIPES.items() if line.name in names), None)
