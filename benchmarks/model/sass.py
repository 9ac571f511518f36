"""Machine code of CUDA kernels (SASS): compiled by nvcc, read from NVIDIA's disassembler, with its control bits.

Each 128-bit instruction carries what the compiler knows of its timing: cycles until the next may issue, the scoreboard
that it sets when it has read its sources or written its result, and the scoreboards that it waits for first.
"""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from benchmarks import ROOT

FLAGS = ["-O3", "-std=c++17", "--fmad=false", "-lineinfo"]
SOURCE = ROOT / "csrc" / "cuda" / "kernels.cu"
FIRST = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T\d]+) )?([A-Z]\w*)((?:\.\w+)*)\s*(.*?)\s*;\s+/\* 0x(\w+) \*/"
)
SECOND = re.compile(r"^\s+/\* 0x(\w+) \*/")
PLACE = re.compile(r'File "([^"]*)", line (\d+)')
NONE = 7  # no scoreboard
SIZES = {"byte": 1, "short": 2, "word": 4, "dword": 8}


class Control(NamedTuple):
    stall: int  # cycles until the warp's next instruction may issue
    write_barrier: int  # scoreboard that counts down when the result is written; NONE: the stall covers it
    read_barrier: int  # likewise, when the sources are read
    wait_mask: int  # scoreboards that must be at zero before this instruction issues


class Line(NamedTuple):
    """An instruction; ``chain`` has the source's file and line, then those that it was inlined into."""

    address: int
    guard: str
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    immediate: int  # bits 32 to 63, where most forms have theirs
    control: Control
    chain: tuple[tuple[str, int], ...]

    def __str__(self):
        guard = f"@{self.guard} " if self.guard else ""
        return f"{self.address:#06x} {guard}{'.'.join((self.name, *self.modifiers))} {', '.join(self.operands)}"


class Kernel(NamedTuple):
    lines: list[Line]
    labels: dict[str, int]  # indices of instructions
    registers: int
    shared: int  # bytes that it has besides what the launch asks for
    constants: bytes = b""  # bank 2, the compiler's own


def control_of(high: int) -> Control:
    """The control bits in the upper 64 bits of an instruction."""
    return Control(high >> 41 & 15, high >> 46 & 7, high >> 49 & 7, high >> 52 & 63)


def tool(name: str) -> Path:
    """One of NVIDIA's tools, which come with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def run(*command) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
    return done.stdout


def readable(names: list[str]) -> list[str]:
    """Demangled names."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[: len(names)]


def usage_of(cubin: Path) -> dict[str, dict[str, int]]:
    """Registers ("REG"), bytes of stack ("STACK") and the like, by the kernels' mangled names."""
    lines = re.findall(r"Function (\S+):\s+(REG:.*)", run(tool("cuobjdump"), "-res-usage", cubin))
    return {name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)} for name, line in lines}


def compiled(target: str, folder: Path, source: Path = SOURCE) -> dict[str, Kernel]:
    """The kernels of a source for one architecture, by their readable names."""
    cubin = folder / f"{target}.cubin"
    run("nvcc", f"-arch={target}", *FLAGS, f"-I{ROOT / 'csrc'}", "-cubin", "-o", cubin, source)
    text = run(tool("nvdisasm"), "-gi", "-hex", cubin)
    usage = usage_of(cubin)
    constants = {}
    for part in re.split(r"^//-+ \.nv\.constant2\.", text, flags=re.M)[1:]:
        rows = re.findall(r"\.(byte|short|word|dword)\s+(0x.*)", part.split("\n//--")[0])
        numbers = [(int(x, 16), SIZES[kind]) for kind, row in rows for x in row.split(", ")]
        constants[part.split(None, 1)[0]] = b"".join(x.to_bytes(size, "little") for x, size in numbers)
    kernels = {}
    for part in re.split(r"^//-+ \.text\.", text, flags=re.M)[1:]:
        mangled = part.split(None, 1)[0]
        used = usage[mangled]
        kernels[mangled] = Kernel(*parsed(part), used["REG"], used["SHARED"], constants.get(mangled, b""))
    return dict(zip(readable(list(kernels)), kernels.values()))


def parsed(text: str) -> tuple[list[Line], dict[str, int]]:
    """The instructions and labels of a kernel's section, as nvdisasm prints them with -gi and -hex."""
    lines, labels, chain, fresh, waiting = [], {}, (), True, None
    for row in text.split("\n//--")[0].split("\n"):
        if waiting and (second := SECOND.match(row)):
            lines.append(waiting._replace(control=control_of(int(second[1], 16))))
            waiting = None
        elif first := FIRST.match(row):
            address, guard, name, modifiers, operands, low = first.groups()
            words, fields = tuple(modifiers.split(".")[1:]), tuple(filter(None, re.split(r",\s*| (?=`)", operands)))
            waiting = Line(int(address, 16), guard or "", name, words, fields, int(low, 16) >> 32, None, chain)
            fresh = True
        elif "//## File" in row:
            if fresh:
                chain, fresh = (), False
            (place, *_) = PLACE.findall(row)
            chain += ((place[0].rsplit("/", 1)[-1], int(place[1])),)
        elif label := re.match(r"^([.$\w]+):\s*$", row):
            labels[label[1]] = len(lines)
            if label[1].startswith("$"):  # one of the compiler's own functions
                chain = ((label[1].rsplit("$", 1)[-1], 0),)
    return lines, labels
