"""Inspects the compiled CUDA kernels without a GPU: registers, spills, wide loads and stores, forbidden instructions.

The budget of a kernel is 64 registers a thread, so that eight blocks of 128 threads fit on a multiprocessor, or 72 and
seven for float64, no spills, no fused or approximate step in PTX, 16-byte loads of scores and 16-byte stores of
gradients. The link's softplus has CUDA's own exp and log1p, whose steps are fused. These are facts of the code and no
times; benchmarks.model counts what runs.

    python -m benchmarks.cuda_static            # prints a table, writes results/cuda_static.json; needs nvcc
    python -m benchmarks.cuda_static --quick    # prints the same as JSON, which the tests read
"""

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path

from benchmarks import RESULTS, ROOT
from benchmarks.model.sass import FLAGS, SOURCE, readable, run, tool, usage_of
from examples.machine import stamp
from examples.report import table, write

RESULT = RESULTS / "cuda_static.json"
TARGETS = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")  # the last two where nvcc is 12.8 or later


def forbidden_in(ptx: str) -> list[str]:
    """The fused and approximate instructions of some PTX."""
    pattern = r"\b(?:fma|mad\.(?:rn|rz)|[\w.]+\.approx|[\w.]+\.ftz|div\.full|sqrt\.approx)[\w.]*"
    return sorted(set(re.findall(pattern, ptx)))


def facts_of(cubin: Path, ptx: str) -> dict[str, dict]:
    """What was compiled, by the kernels' names in it."""
    usage = usage_of(cubin)
    forbidden = {part.split("(")[0]: forbidden_in(part) for part in ptx.split(".entry ")[1:]}
    instruction = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+ )?([A-Z][\w.]+)", re.M)
    found = {}
    for part in re.split(r"^//-+ \.text\.", run(tool("nvdisasm"), "-c", cubin), flags=re.M)[1:]:
        name, ops = part.split(None, 1)[0], instruction.findall(part)
        count = lambda pattern, ops=ops: sum(bool(re.match(pattern, op)) for op in ops)  # noqa: E731
        found[name] = {
            "registers": usage[name]["REG"],
            "stack_bytes": usage[name]["STACK"],
            "spill_loads_and_stores": count(r"LDL|STL"),
            "instructions": len(ops),
            "loads_of_16_bytes": count(r"LDG?\.E.*\.128"),
            "stores_of_16_bytes": count(r"STG?\.E.*\.128"),
            "forbidden": forbidden[name],
        }
    return found


def short(name: str) -> str:
    """`search_kernel BFloat16 NormalLaw 128` of a readable name."""
    text = name.replace("(anonymous namespace)::", "").replace("topk_fast::", "").removeprefix("void ")
    return " ".join(re.findall(r"\w+", text.split("(")[0]))


def kernels(target: str, folder: Path) -> list[dict]:
    """Facts of every kernel of the source on one architecture."""
    cubin, ptx = folder / f"{target}.cubin", folder / f"{target}.ptx"
    run("nvcc", f"-arch={target}", *FLAGS, f"-I{ROOT / 'csrc'}", "-ptx", "-o", ptx, SOURCE)
    run("nvcc", f"-arch={target}", "-O3", "-cubin", "-o", cubin, ptx)
    found = facts_of(cubin, ptx.read_text())
    names = map(short, readable(list(found)))
    return [{"target": target, "kernel": name} | facts for name, facts in zip(names, found.values())]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="print the facts as JSON and write nothing")
    arguments = parser.parse_args()
    if shutil.which("nvcc") is None:
        raise SystemExit("benchmarks.cuda_static needs nvcc on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        known = run("nvcc", "--list-gpu-code").split()
        facts = [row for target in TARGETS if target in known for row in kernels(target, Path(folder))]
    if arguments.quick:
        print(json.dumps(facts, indent=1))
        return
    columns = [name for name, value in facts[0].items() if isinstance(value, int)]
    print(table({f"{row['target']} {row['kernel']}": {c: row[c] for c in columns} for row in facts}, unit=1, digits=0))
    environment = {
        "nvcc": re.search(r"release ([\d.]+)", run("nvcc", "--version")).group(1),
        **stamp(),
        "note": "compiled and counted, not run: no GPU took part",
    }
    write(RESULT, {"environment": environment, "kernels": facts})


if __name__ == "__main__":
    main()
