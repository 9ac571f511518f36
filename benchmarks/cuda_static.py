"""Inspects the compiled CUDA kernels without a GPU, and computes times below which no step can be.

The budget of a kernel is 128 registers a thread, so that a multiprocessor has at least four blocks of 128 threads, no
spills, no fused or approximate step in PTX, 16-byte loads of scores and 16-byte stores of gradients.

    python -m benchmarks.cuda_static            # prints a table, writes results/cuda_static.json; needs nvcc
    python -m benchmarks.cuda_static --quick    # prints the kernels' facts as JSON, which the tests read
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmarks import RESULTS, ROOT
from examples.machine import stamp

SOURCE, RESULT = ROOT / "csrc" / "cuda" / "kernels.cu", RESULTS / "cuda_static.json"
FLAGS = ["-O3", "-std=c++17", "--fmad=false", f"-I{ROOT / 'csrc'}"]
TARGETS = ("sm_80", "sm_90")
REGISTERS = 128

# Each probe runs one stage for EACH elements of a thread; the growth of its instructions with EACH is the stage's cost.
PROBES = """
#include "cuda/kernels.cu"
using namespace topk_fast;
template <class T, int EACH>
__global__ void probe_stream(const uint4* x, float cut, int* out) {
  T v[EACH][16 / sizeof(T)];
  for (int i = 0; i < EACH; ++i) { const uint4 u = x[i * blockDim.x + threadIdx.x]; memcpy(v[i], &u, 16); }
  for (int i = 0; i < EACH; ++i) if (__ballot_sync(kFull, above<T, float>(v[i], cut) != 0)) out[i] = i;
}
template <int EACH>
__global__ void probe_words(const uint32_t* x, const int* bound, unsigned* out, uint32_t k0, uint32_t k1) {
  unsigned passed = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const Words w = philox(x[i * blockDim.x + threadIdx.x], blockIdx.x, 7, 0, k0, k1);
    const int b = bound[i * blockDim.x + threadIdx.x];
    passed ^= __ballot_sync(kFull, (int32_t)(w.w0 >> 8) <= b) ^ __ballot_sync(kFull, (int32_t)(w.w1 >> 8) <= b);
    passed ^= __ballot_sync(kFull, (int32_t)(w.w2 >> 8) <= b) ^ __ballot_sync(kFull, (int32_t)(w.w3 >> 8) <= b);
  }
  out[threadIdx.x] = passed;
}
template <class L, int EACH>
__global__ void probe_draw(const int32_t* x, float* out) {
#pragma unroll
  for (int i = 0; i < EACH; ++i) out[i * blockDim.x] = L::template draw<Scalar>(x[i * blockDim.x]);
}
template <class L, int EACH>
__global__ void probe_arrival(const int64_t* x, const int32_t* w, float inverse, float* out, int32_t* gaps) {
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    out[i] = L::template level<Scalar>(arrival_time(x[i], inverse));
    gaps[i] = gap<Scalar>(w[i]);
  }
}
template __global__ void probe_stream<float, 2>(const uint4*, float, int*);
template __global__ void probe_stream<float, 4>(const uint4*, float, int*);
template __global__ void probe_stream<BFloat16, 2>(const uint4*, float, int*);
template __global__ void probe_stream<BFloat16, 4>(const uint4*, float, int*);
template __global__ void probe_words<2>(const uint32_t*, const int*, unsigned*, uint32_t, uint32_t);
template __global__ void probe_words<4>(const uint32_t*, const int*, unsigned*, uint32_t, uint32_t);
template __global__ void probe_draw<NormalLaw, 2>(const int32_t*, float*);
template __global__ void probe_draw<NormalLaw, 4>(const int32_t*, float*);
template __global__ void probe_draw<GumbelLaw, 2>(const int32_t*, float*);
template __global__ void probe_draw<GumbelLaw, 4>(const int32_t*, float*);
template __global__ void probe_arrival<NormalLaw, 2>(const int64_t*, const int32_t*, float, float*, int32_t*);
template __global__ void probe_arrival<NormalLaw, 4>(const int64_t*, const int32_t*, float, float*, int32_t*);
template __global__ void probe_arrival<GumbelLaw, 2>(const int64_t*, const int32_t*, float, float*, int32_t*);
template __global__ void probe_arrival<GumbelLaw, 4>(const int64_t*, const int32_t*, float, float*, int32_t*);
"""


def tools() -> Path:
    """The folder of NVIDIA's disassembler, which comes with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def run(*command) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
    return done.stdout + done.stderr


def machine_code(cubin: Path) -> dict[str, list[str]]:
    """Instructions of each kernel, by its readable name."""
    out = {}
    for part in re.split(
        r"^\s*\.section\s+\.text\.|^//-+ \.text\.", run(tools() / "nvdisasm", "-c", cubin), flags=re.M
    )[1:]:
        mangled = re.match(r"[\w$]+", part).group(0)
        ops = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+ )?([A-Z][\w.]+)", part, re.M)
        if ops:
            out[readable(mangled)] = ops
    return out


def readable(mangled: str) -> str:
    """`search_kernel BFloat16 NormalLaw 128` for a mangled name."""
    name = re.search(r"(search_kernel|collect_kernel|gradient_kernel|probe_[a-z]+)I(\w*?)E?E[vE]", mangled)
    found = re.findall(r"BFloat16|Half|NormalLaw|GumbelLaw|(?<=Li)\d+", name.group(2))
    number = {"f": "float", "d": "double"}.get(name.group(2)[0])
    return " ".join(filter(None, [name.group(1), number, *found]))


def kernels(target: str, folder: Path) -> list[dict]:
    """Facts of every kernel of the source on one architecture."""
    cubin, ptx = folder / f"{target}.cubin", folder / f"{target}.ptx"
    log = run("nvcc", f"-arch={target}", *FLAGS, "-Xptxas", "-v", "-cubin", "-o", cubin, SOURCE)
    run("nvcc", f"-arch={target}", *FLAGS, "-ptx", "-o", ptx, SOURCE)
    text = ptx.read_text()
    forbidden = set(re.findall(r"\b(?:fma|mad\.(?:rn|rz)|[\w.]+\.approx|div\.full|sqrt\.approx)[\w.]*", text))
    code, out = machine_code(cubin), []
    for part in re.split(r"Compiling entry function '", log)[1:]:
        number = lambda pattern, part=part: int(re.search(pattern, part).group(1))  # noqa: E731
        name = readable(part.split("'")[0])
        ops = code[name]
        out.append(
            {
                "target": target,
                "kernel": name,
                "registers": number(r"Used (\d+) registers"),
                "stack_bytes": number(r"(\d+) bytes stack frame"),
                "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
                "instructions": len(ops),
                "loads_of_16_bytes": sum(bool(re.match(r"LDG?\.E.*\.128", op)) for op in ops),
                "stores_of_16_bytes": sum(bool(re.match(r"STG?\.E.*\.128", op)) for op in ops),
                "forbidden": sorted(forbidden),
            }
        )
    return out


def stage_costs(folder: Path) -> dict[str, float]:
    """Instructions of a thread on sm_90 for one element of a stage; of `stream`, for one score."""
    (folder / "probes.cu").write_text(PROBES)
    run("nvcc", "-arch=sm_90", *FLAGS, "-cubin", "-o", folder / "probes.cubin", folder / "probes.cu")
    size = {name: len(ops) for name, ops in machine_code(folder / "probes.cubin").items()}

    def growth(name):
        cost = (size[f"{name} 4"] - size[f"{name} 2"]) / 2
        if cost <= 0:
            raise SystemExit(f"{name} did not grow with its elements: the compiler kept a loop, nothing was counted")
        return cost

    return {
        "stream_float32": growth("probe_stream float") / 4,
        "stream_bfloat16": growth("probe_stream BFloat16") / 8,
        "words": growth("probe_words"),  # four draws
        "normal": growth("probe_draw NormalLaw"),
        "gumbel": growth("probe_draw GumbelLaw"),
        "arrival": growth("probe_arrival NormalLaw"),  # level and gap, without its word
        "gumbel_arrival": growth("probe_arrival GumbelLaw"),
    }


def prediction(costs: dict, n, length, k, n_sample, epsilon, itemsize) -> dict:
    """Floors of a step on an H100: bytes at 3.0e12 a second, counted instructions at one a cycle and scheduler.

    The count has stream, words, normals and arrivals; it lacks bounds, lists, selection, the cut, and waiting.
    """
    from benchmarks.triton_static import floors, work

    counts = work(length, k, n_sample, epsilon)
    per_row = (
        length * costs["stream_float32" if itemsize == 4 else "stream_bfloat16"]
        + counts["contenders"] * -(-n_sample // 4) * costs["words"]
        + counts["passed"] * n_sample * costs["normal"]
        + -(-counts["arrivals"] // 32) * 32 * n_sample * (costs["words"] + costs["arrival"])
    ) / 32
    return floors(counts, per_row, n, length, k, n_sample, epsilon, itemsize)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="print only the kernels' facts, as JSON")
    arguments = parser.parse_args()
    if shutil.which("nvcc") is None:
        raise SystemExit("benchmarks.cuda_static needs nvcc on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        facts = [row for target in TARGETS for row in kernels(target, Path(folder))]
        if arguments.quick:
            print(json.dumps(facts, indent=1))
            return
        costs = stage_costs(Path(folder))
    from benchmarks.triton_static import PREDICTED

    floors = [prediction(costs, *case) for case in PREDICTED]
    columns = [c for c in facts[0] if c != "forbidden"]
    width = {c: max(len(c), *(len(str(row[c])) for row in facts)) for c in columns}
    for row in [dict(zip(columns, columns)), *facts]:
        print("  ".join(str(row[c]).rjust(width[c]) for c in columns))
    print("instructions of a thread:", costs)
    for row in floors:
        print({name: round(value, 3) for name, value in row.items()})
    environment = {
        "nvcc": re.search(r"release ([\d.]+)", run("nvcc", "--version")).group(1),
        **stamp(),
        "note": "compiled and counted, not run: no GPU took part",
    }
    result = {"environment": environment, "instructions_of_a_thread": costs, "floors": floors, "kernels": facts}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
