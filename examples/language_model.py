"""A language model of 42 837 words: cross-entropy of all logits against sampled cross-entropy, at equal steps.

Trains a small recurrent network on the text of a dictionary under `nn.Linear` with cross-entropy and under
`LinearHead` with `SampledCrossEntropy`, for several numbers of samples. Prints the test perplexity, which is exact for
both, and the time and memory of training.

    OMP_NUM_THREADS=1 python -m examples.language_model
    OMP_NUM_THREADS=1 python -m examples.language_model --losses cross-entropy --seeds 0      # one part of it
    OMP_NUM_THREADS=1 python -m examples.language_model --tune --steps 400                    # how CHOSEN was chosen

Each run is added to the JSON as it ends. A run that the JSON has is not repeated, so an interrupted command goes on.
Steps are timed at the end of the first command, of all losses in turn. For the peak of memory, run each loss in a
process of its own.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from examples.data_sets import dictionary
from examples.data_sets.dictionary import Text
from examples.language_training import LENGTH, LOSSES, SEQUENCES, WIDTH, Run, perplexity, time_steps, train
from examples.machine import ROOT, PeakMemory, environment, stamp
from examples.report import table, write

# Of all pairs of a learning rate and an eps, CHOSEN gave the lowest validation perplexity with every loss that was
# tried, in runs of 400 steps with seed 0 (--tune --steps 400). B = 5 and 64 were not tried.
LEARNING_RATES = (3e-3, 1e-2, 3e-2)
EPS = (1e-8, 1e-4)
CHOSEN = (1e-2, 1e-4)
TIMED_ROUNDS = 40


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", choices=LOSSES, nargs="+", default=LOSSES, metavar="LOSS", help="of: %(choices)s")
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
    pairs = [*product(LEARNING_RATES, EPS)] if args.tune else [CHOSEN]
    for seed, name, (lr, eps) in product(args.seeds, args.losses, pairs):
        yield Run(name, seed, lr, eps)


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
    found = {f"{run['loss']}, lr {run['lr']:g}, eps {run['eps']:g}": run for run in runs}
    last = {name: run["curve"][-1]["validation perplexity"] for name, run in found.items()}
    ordered = sorted(found, key=lambda name: (LOSSES.index(found[name]["loss"]), last[name]))
    return {name: {"perplexity": last[name]} for name in ordered}


def run_all(args: argparse.Namespace, text: Text) -> dict:
    """Trains and times what the JSON lacks, and writes the JSON after each run."""
    settings = {"tune": args.tune, "steps": args.steps, "evaluations": args.evaluations}
    settings |= {"words a step": SEQUENCES * LENGTH, "width": WIDTH, "different words": len(text.words)}
    settings |= {"training words": len(text.train), "test words": len(text.test)}
    result = earlier_result(args.out, settings)
    done = [{key: record[key] for key in Run.__dataclass_fields__} for record in result["runs"]]
    memory = PeakMemory()
    for run in plan_runs(args):
        if asdict(run) in done:
            continue
        training, measured = train(run, text, args.steps, args.evaluations, memory)
        if not args.tune:
            measured["test perplexity"] = perplexity(training.body, training.head, text.test)
        del training  # before the next one is made
        result["runs"].append(asdict(run) | measured | stamp())
        result["runs"].sort(key=lambda record: (LOSSES.index(record["loss"]), record["seed"]))
        write(args.out, result | {"environment": environment()})
    if not args.tune and "times" not in result:
        result["times"] = time_steps([Run(name, 0, *CHOSEN) for name in LOSSES], text, TIMED_ROUNDS)
        write(args.out, result | {"environment": environment()})
    return result


def main() -> None:
    args = arguments()
    text = dictionary.load(args.cache)
    print(f"{len(text.train):,} training words, {len(text.test):,} test words, {len(text.words):,} different ones")
    result = run_all(args, text)
    print(table(trials(result["runs"]) if args.tune else summary(result), unit=1))
    print(f"\nfigures: {args.out}")


if __name__ == "__main__":
    main()
