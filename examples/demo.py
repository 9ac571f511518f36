"""Five guesses for the species of a bacterium: top-K losses against cross-entropy on long-tailed, ambiguous data.

Trains one small network under each loss with settings chosen beforehand on validation rows (`--tune` repeats that
choice), and measures each once on the test rows. The losses are those of Garcin et al., "Stochastic smoothing of the
top-K calibrated hinge loss for deep imbalanced classification", ICML 2022.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import tuning
from data_sets import glyphs, species
from data_sets.dataset import Dataset, Split, split_rows
from data_sets.debian import PackageUnavailable
from defaults import DEFAULTS, EPOCHS, WELL_KNOWN
from evaluation import accuracies, by_frequency, curve, look_up, loss_step_ms, ranks
from machine import environment
from plot import draw
from report import guesses_text, table
from training import BALANCED, BATCH, CROSS_ENTROPY, K, Rows, Settings, fit, make_loss, scores_of

try:
    import pytopk
except ImportError:
    pytopk = None

ROOT = Path(__file__).resolve().parent.parent
SPLIT_SEED = 0  # fixed, so that no row on which settings were chosen is ever a test row


def main() -> None:
    args = arguments()
    start = time.perf_counter()
    try:
        data = (species if args.data == "species" else glyphs).load(args.cache)
    except PackageUnavailable as error:
        sys.exit(f"error: {error}")
    split = split_rows(data.target, SPLIT_SEED)
    described = describe(data, split)
    print(
        f"{data.name}: {len(data.target):,} rows of {len(data.classes):,} classes; {described['few_share']:.0%} of the "
        f"classes have fewer than 20 rows; {described['ambiguous_share']:.0%} of the rows share their input with "
        "another class"
    )
    suffix = "" if args.data == "species" else f"_{args.data}"
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"environment": environment()} | described
    result |= {"split_seed": SPLIT_SEED, "seed": args.seed, "epochs": args.epochs}
    if args.tune:
        result |= tune(data, split, args)
        path = args.out / f"demo_tuning{suffix}.json"
    else:
        result |= compare(data, split, args)
        path = args.out / f"demo{suffix}.json"
        draw(result, path.with_suffix(".png"))
        print(f"plot: {path.with_suffix('.png')}")
    result["seconds"] = round(time.perf_counter() - start, 1)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"figures: {path}, after {result['seconds']:.0f} s")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(DEFAULTS), default="species", help="glyphs needs no download")
    parser.add_argument("--epochs", type=int, help=f"default: {EPOCHS}")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and batches; the split is fixed")
    parser.add_argument(
        "--tune", action="store_true", help="choose the settings on validation rows; no test row is used"
    )
    parser.add_argument("--trials", type=int, default=16, help="of each loss, with --tune")
    parser.add_argument("--cache", type=Path, default=ROOT / "data", help="folder of downloaded and parsed data")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder of the JSON and the plot")
    args = parser.parse_args()
    args.epochs = args.epochs or EPOCHS[args.data]
    args.cache, args.out = args.cache.resolve(), args.out.resolve()
    return args


def describe(data: Dataset, split: Split) -> dict:
    count = torch.from_numpy(data.target).bincount()
    return {
        "data": data.name,
        "classes": len(data.classes),
        "rows": {part: len(getattr(split, part)) for part in ("train", "val", "test")},
        "distinct_inputs": len(data.inputs),
        "few_share": round(float((count < 20).float().mean()), 4),
        "ambiguous_share": round(data.ambiguous_share(), 4),
    }


def labelled_rows(data: Dataset) -> Rows:
    target = torch.from_numpy(data.target)
    return Rows(data.features(), torch.from_numpy(data.group), target, len(data.classes))


def compare(data: Dataset, split: Split, args: argparse.Namespace) -> dict:
    """Trains under each loss on the training and validation rows, measures on the test rows and prints the figures."""
    rows = labelled_rows(data)
    train = rows.take(torch.from_numpy(np.concatenate([split.train, split.val])))
    test, count = rows.take(torch.from_numpy(split.test)), train.count()
    unseen = ~torch.isin(test.group, train.group)

    def measure(scores: Tensor) -> dict:
        target = test.target
        return _measure(scores, target, count) | {"unseen": _measure(scores[unseen], target[unseen], count)}

    losses, guesses = {}, {}
    for name, settings in DEFAULTS[data.name].items():
        start = time.perf_counter()
        model = fit(name, settings, train, args.epochs, args.seed)
        seconds = round(time.perf_counter() - start, 1)
        scores = scores_of(model, test)
        step = step_times(name, settings, count, scores[:BATCH], test.target[:BATCH])
        losses[name] = {"settings": asdict(settings), "train_seconds": seconds, "step_ms": step, **measure(scores)}
        guesses[name] = well_known(data, split.test, scores)
    learned_nothing = measure(look_up(test.group, train.group, train.target, train.n_classes))
    show(losses | {"look-up": learned_nothing}, losses, guesses, len(unseen), int(unseen.sum()))
    return {"unseen_rows": int(unseen.sum()), "losses": losses, "look_up": learned_nothing, "guesses": guesses}


def _measure(scores: Tensor, target: Tensor, count: Tensor) -> dict:
    rank = ranks(scores, target)
    return {
        "accuracy": accuracies(scores, target, count),
        "curve": curve(rank),
        "by_frequency": by_frequency(rank, count[target], K),
    }


def step_times(name: str, settings: Settings, count: Tensor, scores: Tensor, target: Tensor) -> dict[str, float | None]:
    """Milliseconds of the loss on the trained scores of one batch, and of pytopk's loss where it is installed."""
    theirs = pytopk is not None and name != CROSS_ENTROPY
    return {
        "loss ms": loss_step_ms(make_loss(name, settings, count), scores, target),
        "pytopk's loss ms": loss_step_ms(make_loss(name, settings, count, pytopk), scores, target) if theirs else None,
    }


def well_known(data: Dataset, test: np.ndarray, scores: Tensor) -> dict[str, list[str]]:
    """The five guesses for the first test row of each well-known class."""
    guesses = {}
    for name in WELL_KNOWN[data.name]:
        row = np.flatnonzero(data.target[test] == data.classes.index(name))[0]
        guesses[name] = [data.classes[i] for i in scores[row].topk(5).indices]
    return guesses


def show(rows: dict, losses: dict, guesses: dict, n_test: int, n_unseen: int) -> None:
    print(f"\nAccuracy on the {n_test:,} test rows, in percent (trained on the training and validation rows):")
    print(table({name: row["accuracy"] for name, row in rows.items()}))
    print(f"\nThe same on the {n_unseen:,} test rows whose input does not occur in training:")
    print(table({name: row["unseen"]["accuracy"] for name, row in rows.items()}))
    share = losses[CROSS_ENTROPY]["accuracy"]["top-5"]
    error = 100 * (share * (1 - share) / n_test) ** 0.5
    print("\nLook-up: no network, only the classes of the same input in training.")
    print("<20 rows: only the rows of classes with fewer than 20 training rows. Macro: the mean over classes.")
    print(f"One standard error of cross-entropy's top-5 over all rows: {error:.1f} points.")
    threads = torch.get_num_threads()
    print(f"\nTime of the loss without the network ({BATCH} rows, both passes) and of training, {threads} threads:")
    times = {name: row["step_ms"] | {"training s": row["train_seconds"]} for name, row in losses.items()}
    print(table(times, unit=1, digits=2))
    print(f"\nFive guesses for one test row of some well-known classes ({BALANCED}; the right one in stars):")
    print(guesses_text(guesses[BALANCED]), end="\n\n")


def tune(data: Dataset, split: Split, args: argparse.Namespace) -> dict:
    """Searches for the best settings on the validation rows, without any test row, and prints them."""
    found = tuning.run_trials(labelled_rows(data), split, args.trials, args.epochs, args.seed)
    print(f"\nValidation accuracy, in percent; best {tuning.CRITERION} of each loss first:")
    names = [" ".join(f"{k}={v}" for k, v in trial["settings"].items() if v is not None) for trial in found]
    print(table({f"{t['loss']}: {n}": t["accuracy"] for t, n in zip(found, names)}))
    return {"criterion": tuning.CRITERION, "space": tuning.SPACE, "trials": found}


if __name__ == "__main__":
    main()
