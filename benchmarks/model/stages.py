"""To which stage of csrc/cuda an instruction belongs, by the source lines that the compiler kept for it."""

import re
from functools import cache

from benchmarks import ROOT

from .sass import Line

FOLDER = ROOT / "csrc" / "cuda"
# Files whose functions call the stages or serve all of them; what is theirs alone bears their function's name.
CALLERS = ("kernels.cu", "search.h", "team.h", "layout.h", "launch.h")
BOUNDS = re.compile(r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)")


@cache
def functions(file: str) -> list[str]:
    """The function of each line of a file in csrc/cuda or csrc; "" before the first."""
    path = next((p for p in (FOLDER / file, FOLDER.parent / file) if p.exists()), None)
    out, current = [""], ""
    for line in path.read_text().splitlines() if path else ():
        marked = re.match(r"^(?: {2})?(?:static )?(?:__device__|__global__|TOPK_FAST_FN|TOPK_FAST_MEMBER)\b(.*)", line)
        if marked and (name := re.search(r"(\w+|operator\W+)\(", BOUNDS.sub("", marked[1]))):
            current = name[1]
        out.append(current)
    return out


def function_of(file: str, line: int) -> str:
    known = functions(file)
    return (known[line] if line < len(known) else "") or file


def stage_of(line: Line, depth: int = 1) -> str:
    """The name of the outermost function that is a stage, and of up to ``depth - 1`` that it calls."""
    if line.chain and not line.chain[0][1]:
        return line.chain[0][0]  # one of the compiler's own functions, such as a division's slow path
    frames = [frame for frame in reversed(line.chain) if (FOLDER / frame[0]).exists()]
    inside = [frame for frame in frames if frame[0] not in CALLERS]
    own = [frame for frame in frames if frame[0] in CALLERS[:2]]
    names = [function_of(*frame) for frame in inside[:depth] or own[-1:]]
    return " > ".join(dict.fromkeys(names)) or "elsewhere"
