"""A language model of 42 837 words: cross-entropy of all logits against sampled cross-entropy, at equal steps.

Trains a small recurrent network on the text of a dictionary under `nn.Linear` with cross-entropy and under
`LinearHead` with `SampledCrossEntropy`, for several numbers of samples. Prints the test perplexity, which is exact for
both, and the time and memory of training.

    OMP_NUM_THREADS=1 python -m examples.language_model
    OMP_NUM_THREADS=1 python -m examples.language_model --losses cross-entropy --seeds 0      # one part of it
    OMP_NUM_THREADS=1 python -m examples.language_model --tune --steps 400                    # how LOSSES was chosen

Each run is added to the JSON as it ends. A run that the JSON has is not repeated, so an interrupted command goes on.
Steps are timed at the end of the first command, of all losses in turn. For the peak of memory, run each loss in a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from examples.data_sets import dictionary
from examples.data_sets.debian import PackageUnavailable
from examples.data_sets.dictionary import Text
from examples.language_training import LENGTH, SEQUENCES, WIDTH, Loss, Run, perplexity, time_steps, train
from examples.machine import PeakMemory, environment, stamp
from examples.report import table

ROOT = Path(__file__).resolve().parent.parent
# The learning rate and eps of each loss gave it the lowest validation perplexity of all pairs of the next two lines, in
# runs of 400 steps with seed 0 (--tune --steps 400). B = 5 and 64 were not tried: they take the pair of B = 1 and 16.
LEARNING_RATES = (3e-3, 1e-2, 3e-2)
EPS = (1e-8, 1e-4)
LOSSES = {
    "cross-entropy": Loss(None, lr=1e-2, eps=1e-4),
    "sampled, B = 1": Loss(1, lr=1e-2, eps=1e-4),
    "sampled, B = 5": Loss(5, lr=1e-2, eps=1e-4),
    "sampled, B = 16": Loss(16, lr=1e-2, eps=1e-4),
    "sampled, B = 64": Loss(64, lr=1e-2, eps=1e-4),
    "sampled, B = 16, sparse_grad": Loss(16, lr=1e-2, eps=1e-4, sparse=True),
}
KEYS = ("loss", "seed", "lr", "eps")  # of a run in the JSON
TIMED_ROUNDS = 40


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--losses", choices=LOSSES, nargs="+", default=list(LOSSES), metavar="LOSS", help="of: %(choices)s"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--evaluations", type=int, default=20, help="points of a learning curve")
    parser.add_argument("--tune", action="store_true", help="try all learning rates and eps, and use no test word")
    parser.add_argument("--cache", type=Path, default=ROOT / "data", help="folder of downloaded and parsed data")
    parser.add_argument(
        "--out", type=Path, help="default out/language_model.json, with --tune language_model_tuning.json"
    )
    args = parser.parse_args()
    args.out = args.out or ROOT / "out" / f"language_model{'_tuning' if args.tune else ''}.json"
    return args


def plan_runs(args: argparse.Namespace) -> Iterator[Run]:
    """The runs asked for: all losses with the first seed, then with the next."""
    for seed, name in product(args.seeds, args.losses):
        chosen = LOSSES[name]
        for lr, eps in product(LEARNING_RATES, EPS) if args.tune else [(chosen.lr, chosen.eps)]:
            yield Run(name, replace(chosen, lr=lr, eps=eps), seed, args.steps, args.evaluations)


def earlier_result(path: Path, settings: dict) -> dict:
    """The content of the file, whose runs must have the same settings."""
    if not path.exists():
        return {"settings": settings, "runs": []}
    found = json.loads(path.read_text())
    if found["settings"] != settings:
        sys.exit(
            f"error: {path} has runs with the settings\n  {found['settings']},\nthis command has\n  {settings}.\n"
            "Remedy: pass another --out, or delete the file."
        )
    return found


def summary(result: dict) -> dict[str, dict]:
    """Of each loss, the mean perplexity over seeds and its standard deviation, the times and the peak of memory."""
    rows = {}
    for name in LOSSES:
        runs = [run for run in result["runs"] if run["loss"] == name]
        if runs:
            found, peaks = ([run[key] for run in runs] for key in ("test perplexity", "peak MiB"))
            rows[name] = {"perplexity": mean(found), "±": stdev(found) if len(found) > 1 else None}
            rows[name] |= result["times"][name] | {"peak MiB": None if None in peaks else mean(peaks)}
    return rows


def trials(runs: list[dict]) -> dict[str, dict]:
    """The validation perplexity of each trial, the best of each loss first."""
    ordered = sorted(runs, key=lambda run: (list(LOSSES).index(run["loss"]), last_perplexity(run)))
    return {
        f"{run['loss']}, lr {run['lr']:g}, eps {run['eps']:g}": {"perplexity": last_perplexity(run)} for run in ordered
    }


def last_perplexity(run: dict) -> float:
    return run["curve"][-1]["validation perplexity"]


def run_all(args: argparse.Namespace, text: Text) -> dict:
    """Trains and times what the JSON lacks, and writes the JSON after each run."""
    settings = {"tune": args.tune, "steps": args.steps, "evaluations": args.evaluations}
    settings |= {"words a step": SEQUENCES * LENGTH, "width": WIDTH, "different words": len(text.words)}
    settings |= {"training words": len(text.train), "test words": len(text.test)}
    result = earlier_result(args.out, settings)
    done = [tuple(record[key] for key in KEYS) for record in result["runs"]]
    memory = PeakMemory()
    for run in plan_runs(args):
        key = (run.name, run.seed, run.loss.lr, run.loss.eps)
        if key in done:
            continue
        body, head, measured = train(run, text, memory)
        if not args.tune:
            measured["test perplexity"] = perplexity(body, head, text.test)
        del body, head  # before the next run's are made
        result["runs"].append(dict(zip(KEYS, key)) | measured | stamp())
        result["runs"].sort(key=lambda record: (list(LOSSES).index(record["loss"]), record["seed"]))
        write(args.out, result)
    if not args.tune and "times" not in result:
        result["times"] = time_steps(LOSSES, text, TIMED_ROUNDS)
        write(args.out, result)
    return result


def write(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result | {"environment": environment()}, indent=1) + "\n")


def main() -> None:
    args = arguments()
    try:
        text = dictionary.load(args.cache)
    except PackageUnavailable as error:
        sys.exit(f"error: {error}")
    print(f"{len(text.train):,} training words, {len(text.test):,} test words, {len(text.words):,} different ones")
    result = run_all(args, text)
    print(table(trials(result["runs"]) if args.tune else summary(result), unit=1))
    print(f"\nfigures: {args.out}")


if __name__ == "__main__":
    main()
