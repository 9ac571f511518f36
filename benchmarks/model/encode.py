"""Instructions as records that run.cpp takes; the structures here are those of isa.h."""

import ctypes
import re
from ctypes import c_char_p, c_double, c_int32, c_int64, c_uint32, c_uint64, c_void_p

from .sass import Kernel, Line

UNIFORM, ZERO, UNIFORM_ZERO = 256, 255, 256 + 63
NONE, REGISTER, IMMEDIATE, CONSTANT = range(4)
# They run once for the warp, on uniform registers.
ON_UNIFORM = {f"U{name}" for name in "MOV IADD3 IMAD LEA SHF LOP3 PLOP3 SEL ISETP PRMT POPC FLO BREV LDC".split()}
SAME = {"S2UR": "S2R", "VOTEU": "VOTE"}  # they write a uniform register, but lanes take part
# Without a register as the first operand.
NO_RESULT = set("ISETP FSETP DSETP HSETP2 FCHK PLOP3 ST STG STS RED BAR BRA EXIT CALL RET".split())
NO_RESULT |= set("STL BSSY BSYNC BREAK WARPSYNC R2P NOP YIELD ENDCOLLECTIVE".split())
MEMORY = set("LD LDG LDS LDL ST STL STG STS ATOMS ATOMG RED".split())
# Registers by their numbers in opcodes.h.
SPECIALS = (
    "SR_TID.X SR_CTAID.X SR_LANEID SR_SWINHI SR_LTMASK SRZ SR_TID.Y SR_TID.Z SR_CTAID.Y SR_CTAID.Z SR_CgaCtaId".split()
)
PREDICATE = re.compile(r"^(!?)(U?)P([T\d])$")
NUMBER = re.compile(r"^-?0x[0-9a-f]+$")
REAL = re.compile(r"^[-+]?(\d.*|INF|[QS]NAN)$")
VALUE = re.compile(r"^([-~]?)(\|?)(R\d+|RZ|UR\d+|URZ|c\[0x[02]\]\[[^\]]*\])\|?((?:\.\w+)*)$")
BANK = 1 << 16  # bytes of a bank of constants; run.cpp has bank 2 behind bank 0
ADDRESS = re.compile(r"^(?:desc\[UR\d+\])?\[(?:(R\w+|UR\w+)((?:\.\w+)*))?(?:\+?(UR\w+))?(?:\+?(-?0x[0-9a-f]+))?\]$")


class Operand(ctypes.Structure):
    _fields_ = [("kind", c_int32), ("reg", c_int32), ("value", c_uint32)] + [
        (name, c_int32) for name in ("negative", "absolute", "inverted", "half")
    ]


class Predicate(ctypes.Structure):
    _fields_ = [("index", c_int32), ("inverted", c_int32)]


class Address(ctypes.Structure):
    _fields_ = [(name, c_int32) for name in ("base", "uniform", "wide", "scale")] + [("offset", c_int64)]


class Encoded(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("is_uniform", "target", "stall", "write_barrier", "read_barrier", "wait_mask")),
        *((name, c_int32) for name in ("latency", "dst", "n_src", "n_pd", "n_ps", "barrier", "special")),
        ("guard", Predicate),
        ("pd", Predicate * 2),
        ("ps", Predicate * 3),
        ("src", Operand * 5),
        ("address", Address),
    ]


class Counts(ctypes.Structure):
    _fields_ = [
        (name, c_int64)
        for name in "issued lanes stalled waited requests wavefronts read written from_l2 from_memory".split()
    ]


class Machine(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("parameters_at", "shared_at", "is_generic_in_constants", "pad")),
        *((f"{name}_latency", c_int64) for name in ("l1", "l2", "memory", "shared", "barrier", "read")),
        ("l1_bytes", c_int64),
    ]


class Launch(ctypes.Structure):
    _fields_ = [
        *((name, c_uint32) for name in ("grid", "size")),
        *((name, c_int64) for name in ("shared", "bytes", "constant_bytes")),
        *((name, c_char_p) for name in ("arguments", "constants")),
    ]


def library(path) -> ctypes.CDLL:
    """run.cpp's functions."""
    out = ctypes.CDLL(str(path))
    out.model_program.restype = out.model_cache.restype = c_void_p
    out.model_error.restype, out.model_written_back.restype = c_char_p, c_int64
    for function in (out.model_free, out.model_error, out.model_cache_free, out.model_forget_memory):
        function.argtypes = [c_void_p]
    out.model_written_back.argtypes, out.model_cache.argtypes = [c_void_p], [c_int64]
    out.model_start_launch.argtypes, out.model_start_launch.restype = [c_void_p, c_double, c_double], None
    out.model_add.argtypes = [c_void_p, c_char_p, c_char_p, ctypes.POINTER(Encoded)]
    out.model_memory.argtypes = [c_void_p, c_uint64, c_uint64]
    out.model_run.argtypes = [c_void_p, ctypes.POINTER(Machine), c_void_p, ctypes.POINTER(Launch)] + [c_void_p] * 2
    return out


def register(text: str) -> int:
    if text in ("RZ", "URZ"):
        return ZERO if text == "RZ" else UNIFORM_ZERO
    return UNIFORM + int(text[2:]) if text.startswith("U") else int(text[1:])


def predicate(match) -> Predicate:
    inverted, uniform, which = match.groups()
    return Predicate((8 if uniform else 0) + (7 if which == "T" else int(which)), bool(inverted))


def operand(text: str, immediate: int) -> Operand:
    if NUMBER.match(text):
        return Operand(IMMEDIATE, ZERO, int(text, 0) & 0xFFFFFFFF)
    if REAL.match(text):  # the instruction's bits are exact
        return Operand(IMMEDIATE, ZERO, immediate)
    match = VALUE.match(text)
    if not match:
        raise ValueError(f"an operand of an unknown form, {text}")
    sign, bar, name, suffixes = match.groups()
    half = 1 if ".H0_H0" in suffixes else 2 if ".H1_H1" in suffixes else 0
    flags = (sign == "-", bar == "|", sign == "~", half)
    if not name.startswith("c"):
        return Operand(REGISTER, register(name), 0, *flags)
    bank, index, offset = re.match(r"c\[0x([02])\]\[(?:(U?R\w+)\+?)?(-?0x[0-9a-f]+)?\]", name).groups()
    at = (BANK if bank == "2" else 0) + int(offset or "0", 0)
    return Operand(CONSTANT, register(index or "RZ"), at & 0xFFFFFFFF, *flags)


def address(text: str) -> Address:
    match = ADDRESS.match(text)
    if not match:
        raise ValueError(f"an address of an unknown form, {text}")
    base, suffixes, uniform, offset = match.groups()
    scale = int((re.search(r"\.X(\d+)", suffixes or "") or [0, 1])[1])
    return Address(
        register(base or "RZ"), register(uniform or "URZ"), ".64" in (suffixes or ""), scale, int(offset or "0", 0)
    )


def encoded(line: Line, labels: dict[str, int]) -> tuple[str, Encoded]:
    """The opcode's name in run.cpp, and the record."""
    name = line.name[1:] if line.name in ON_UNIFORM else SAME.get(line.name, line.name)
    out = Encoded(is_uniform=line.name in ON_UNIFORM, target=-1, dst=ZERO, special=-1)
    out.stall, out.write_barrier, out.read_barrier, out.wait_mask = line.control
    out.guard = predicate(PREDICATE.match(line.guard or "PT"))
    has_result, values, predicates = name not in NO_RESULT, 0, []
    for text in line.operands:
        text = text.replace(".reuse", "").strip()
        if text.startswith("`("):
            out.target = labels.get(text[2:-1], -1)
        elif match := PREDICATE.match(text):
            predicates.append((values, predicate(match)))
        elif match := re.match(r"^B(\d+)$", text):
            out.barrier = int(match[1])
            if name == "BMOV":
                out.special, has_result = int(has_result), False  # whether the barrier is the result
        elif text.startswith("SR"):
            if text not in SPECIALS:
                raise ValueError(f"an unknown register, {text}")
            out.special = SPECIALS.index(text)
        elif name in MEMORY and "[" in text and not text.startswith("c["):
            out.address = address(text)
        elif text == "PR":
            has_result = name == "P2R" and has_result
        elif has_result and VALUE.match(text):
            out.dst, has_result = register(VALUE.match(text)[3]), False
        elif out.n_src < 5:
            out.src[out.n_src] = operand(text, line.immediate)
            out.n_src, values = out.n_src + 1, values + 1
    if name == "F2F" and line.modifiers[:1] == ("F64",):
        out.src[0].half = 64
    results = [p for at, p in predicates if at == 0]
    sources = [p for at, p in predicates if at > 0]
    if name == "PLOP3":
        results, sources = results[:2], results[2:]
    elif name in ("VOTE", "BRA", "EXIT", "BREAK"):
        results, sources = results[:-1], results[-1:]
    for k, p in enumerate(results[:2]):
        out.pd[k] = p
    for k, p in enumerate(sources[:3]):
        out.ps[k] = p
    out.n_pd, out.n_ps = len(results[:2]), len(sources[:3])
    return name, out


def modifiers(line: Line) -> str:
    return " ".join(f"B{word}" if word[0].isdigit() else word for word in line.modifiers)


def program(lib, kernel: Kernel, latency_of) -> tuple[int, list[str]]:
    """The handle of a program, and its instructions that run.cpp does not know.

    ``latency_of(line)`` has the cycles from issue to result of instructions that set a scoreboard.
    """
    handle, strange = lib.model_program(), []
    for line in kernel.lines:
        words = modifiers(line).encode()
        try:
            name, record = encoded(line, kernel.labels)
        except ValueError:  # run.cpp stops where a warp comes to it
            name, record = "unknown", Encoded(guard=Predicate(7, 0), write_barrier=7, read_barrier=7)
        record.latency = latency_of(line)
        if lib.model_add(handle, name.encode(), words, ctypes.byref(record)):
            strange.append(str(line))
    return handle, strange
