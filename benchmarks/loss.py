"""Forward + backward of the losses on logits: the noised top-K loss, the sampled cross-entropy, and those of peers.py.

python -m benchmarks.loss                                       # all cases; writes results/cpu.json
python -m benchmarks.loss --quick                               # a few cases, in a minute; prints only
python -m benchmarks.loss --device cuda                         # writes $OUT/gpu.json (out/ by default)
ncu ... python -m benchmarks.loss --device cuda --once          # a step of each shape, for a profiler
"""

from importlib.util import find_spec
from itertools import product
from pathlib import Path

import topk_fast
from benchmarks import harness
from benchmarks.cases import Case, list_own_backends, make_scores
from benchmarks.harness import Candidate, Effort, Entry
from benchmarks.peers import GPU_PEERS, PEERS

# The design's goals by L, as ratios of times: to cross-entropy at n_sample 5, to pytopk at n_sample 10.
GOALS = {100: (5, 1 / 8), 1000: (2, 1 / 40), 10_000: (0.6, 1 / 150), 100_000: (0.25, 1 / 300)}
GOAL_SHAPES = [(32, 100_000), (64, 10_000), (128, 1000), (128, 100)]
# N * L of 2**21 to 2**22, as far as a batch of at most 128 rows goes.
LENGTHS = [(4, 1_000_000), (8, 316_228), (32, 100_000)]
LENGTHS += [(128, length) for length in (31_623, 10_000, 3162, 1000, 316, 100)]
SPECIES = (64, 24_271)
GPU_SHAPES = [(1024, 1000), (1024, 10_000)]  # small batches, where launches count
GPU_SHAPES += [(262_144, 1000), (26_624, 10_000), (8192, 32_768), (2048, 131_072), (268, 1_000_000)]  # N * L: 2**28
OWN = ("topk_fast", "sampled cross-entropy")
BASIC = (*OWN, "cross-entropy", "pytopk")
CURVES = (*BASIC, "cross-entropy compiled", "smooth top-K SVM", "difftopk")
EQUAL = "sampled cross-entropy, equal B"
ALL = tuple(name for name in PEERS if name != EQUAL)
EFFORT = {"cpu": Effort(15, 0.7), "cuda": Effort(200, 0.1)}
NOISE = 2**30  # entries of pytopk's noise, of which it holds several copies


def list_entries(quick: bool, device: str) -> list[Entry]:
    """The cases, those with many classes first."""
    if device == "cuda":
        entries = []
        for b, (n, length), dtype in product((10,) if quick else (10, 5, 32), GPU_SHAPES, ("float32", "bfloat16")):
            names = (*list_own_backends("cuda"), *BASIC[1:3], "cross-entropy compiled")
            names += ("pytopk",) * (n * length * b <= NOISE) + ("Liger",) * bool(find_spec("liger_kernel"))
            entries.append(Entry("length", Case(n, length, n_sample=b, dtype=dtype), names))
        return entries
    if quick:
        goals = [Entry("goals", Case(n, length, n_sample=5), BASIC) for n, length in GOAL_SHAPES]
        return [*goals, Entry("peers", Case(128, 1000), ALL)]
    goals = [
        Entry("goals", Case(n, length, n_sample=b, epsilon=epsilon), BASIC)
        for n, length in GOAL_SHAPES
        for b in (5, 10)
        for epsilon in (1.0, 0.2)
    ]
    kinds = [
        Entry("scores", Case(*SPECIES, epsilon=epsilon, scores=kind), BASIC)
        for kind in ("species", "normal", "flat", "spiky")
        for epsilon in (1.0, 0.2)
    ]
    peers = [Entry("peers", Case(n, length), ALL) for n, length in ((32, 100_000), (128, 1000))]
    lengths = [Entry("length", Case(n, length), CURVES) for n, length in LENGTHS]
    names = ("topk_fast", EQUAL, "cross-entropy", "pytopk")
    samples = [Entry("samples", Case(64, 10_000, n_sample=b), names) for b in (1, 2, 5, 10, 20, 50, 100)]
    names = ("topk_fast", "pytopk", "smooth top-K SVM")
    ranks = [Entry("k", Case(64, 10_000, k=k), names[: 3 if k <= 20 else 2]) for k in (1, 3, 5, 10, 20, 50)]
    return [*goals, *kinds, *peers, *lengths, *samples, *ranks]


def list_candidates(device: str) -> dict[str, Candidate]:
    """The losses by name, among which each of our backends is one on a GPU."""
    if device == "cpu":
        return PEERS

    def on(backend: str) -> Candidate:
        return Candidate(lambda c: topk_fast.BalNoisedTopK(c.k, c.epsilon, c.n_sample, backend=backend), own=True)

    return PEERS | GPU_PEERS | {backend: on(backend) for backend in list_own_backends(device)}


def measure_instruction_sets(report: dict, path: Path | None) -> None:
    """The same steps under each instruction set of this machine: a group of cases for each."""
    names = topk_fast.build_info()["instruction_sets"]
    for name in names:
        topk_fast._C.use_isa(name)
        entries = [Entry(name, Case(n, length, n_sample=5), OWN) for n, length in GOAL_SHAPES[:3]]
        harness.measure(entries, PEERS, "cpu", EFFORT["cpu"], report, path)
    if names:
        topk_fast._C.use_isa(names[0])


def run_once(device: str) -> None:
    """Runs one step of our backends for each shape and dtype, for a profiler."""
    for n, length in GPU_SHAPES if device == "cuda" else GOAL_SHAPES:
        for dtype in ("float32", "bfloat16"):
            for name in list_own_backends(device) if device == "cuda" else OWN:
                case = Case(n, length, dtype=dtype)
                harness.Step(list_candidates(device)[name], case, case.make_batch(device), device).run()


def main(argv: list[str] | None = None) -> None:
    parser = harness.make_parser(__doc__)
    parser.add_argument("--once", action="store_true", help="one step of our backends a shape; no figures")
    args = parser.parse_args(argv)
    if args.once:
        return run_once(args.device)
    todo = list_entries(args.quick, args.device)
    if any(entry.case.scores == "species" for entry in todo):
        make_scores("species", *SPECIES, "float32", args.device)  # a missing file raises now, not halfway
    report, path = harness.begin(args)
    report["goals"] = GOALS
    harness.measure(todo, list_candidates(args.device), args.device, EFFORT[args.device], report, path)
    if args.device == "cpu":
        measure_instruction_sets(report, path)


if __name__ == "__main__":
    main()
