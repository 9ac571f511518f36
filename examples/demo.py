"""Five guesses where one cannot be right, and what a last layer of tens of thousands of classes costs.

1. Kanji from its reading, as an input method does: cross-entropy on a linear head and on cosines, sampled
   cross-entropy, the balanced noised top-5 loss, and softplus links at K = 1 and 5, each with the settings that the
   study chose for it on validation rows. `--data species` names bacteria from their 16S rRNA gene instead, in fewer
   epochs than those in which the study chose.
2. A head over all named species: linear + cross-entropy against `LinearHead` with `SampledCrossEntropy`.

    python -m examples.demo
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import nn
from tqdm import tqdm

from examples import all_species
from examples.data_sets import kanji, species
from examples.data_sets.dataset import Dataset
from examples.evaluation import curve, ranks_of, summarize
from examples.losses import CROSS_ENTROPY, LOSSES, SOFTPLUS, chosen_settings
from examples.machine import ROOT, environment
from examples.report import table, write
from examples.style import COLOURS, MARKERS, save_svg
from examples.tasks import Task, load
from examples.training import fit_best_epoch

COLUMNS = ("top-1", "top-5", "top-20", "macro top-5")
HEAD = "--losses cross-entropy sampled --epochs 2".split()
BATCH = 512
SHOWN = 6  # inputs whose guesses are printed
# Readings of several words, and species with close relatives; those are shown of which a test row is at hand.
ASKED = {
    "kanji": "きかい こうせい しんこう かいせい きこう せいか ほうそう しこう かんせい いどう こうえん".split(),
    "species": [
        *("Escherichia coli", "Yersinia pestis", "Vibrio cholerae", "Helicobacter pylori"),
        *("Bacillus anthracis", "Staphylococcus aureus", "Mycobacterium tuberculosis", "Salmonella enterica"),
    ],
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(ASKED), default="kanji")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1, help="of the weights and batches; the split is fixed")
    parser.add_argument("--cache", type=Path, default=ROOT / "data", help="folder of downloaded and parsed data")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder of the JSON and the plot")
    return parser.parse_args()


def compare(task: Task, data: Dataset, args: argparse.Namespace) -> dict:
    """Trains under each loss, and measures on the test rows."""
    losses, guesses, shown = {}, {}, shown_inputs(task, data)
    for name, loss in tqdm(LOSSES.items(), task.name, unit="loss", disable=None):
        start = time.perf_counter()
        settings = chosen_settings(task.name, name)
        model, _ = fit_best_epoch(task, loss, settings, args.seed, args.epochs, BATCH, "top-5")
        losses[name] = {"settings": settings, "seconds": round(time.perf_counter() - start, 1)}
        rank = ranks_of(model, task, "test")
        losses[name] |= summarize(rank, task, "test") | {"curve": curve(rank)}
        guesses[name] = {asked: five_guesses(model, task, row) for asked, row in shown.items()}
        tqdm.write(f"{name}: {args.epochs} epochs in {losses[name]['seconds']:.0f} s")
    return {"losses": losses, "guesses": guesses}


def shown_inputs(task: Task, data: Dataset) -> dict[str, int]:
    """The inputs of test rows whose guesses are printed: those of ASKED, under their readings or species."""
    found: dict[str, int] = {}
    for row, label in zip(*(part.tolist() for part in task.parts["test"])):
        found.setdefault(kanji.decode(data.inputs[row]) if task.name == "kanji" else task.names[label], row)
    return {asked: found[asked] for asked in [name for name in ASKED[task.name] if name in found][:SHOWN]}


@torch.no_grad()
def five_guesses(model: nn.Module, task: Task, row: int) -> list[str]:
    """The five best classes of an input, the right ones in stars."""
    rows, target = task.parts["test"]
    right = target[rows == row].tolist()
    best = model(task.inputs[[row]])[0].topk(5).indices.tolist()
    return [f"*{task.names[i]}*" if i in right else task.names[i] for i in best]


def show(task: Task, result: dict) -> None:
    rows = len(task.parts["test"][1])
    print(f"\nAccuracy on the {rows:,} test rows, in percent (macro is the mean over classes):")
    print(table({name: {c: row[c] for c in COLUMNS} for name, row in result["losses"].items()}))
    print("\nFive guesses for some inputs of test rows, the right ones in stars:")
    for name in (CROSS_ENTROPY, SOFTPLUS):
        print(f"  {name}")
        for asked, five in result["guesses"][name].items():
            print(f"    {asked}: {', '.join(five)}")


def draw(result: dict, figure: Figure) -> None:
    """The top-k accuracy of the losses, and what a step of the head over all species takes under each."""
    left, *right = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    for (name, found), colour, marker in zip(result["losses"].items(), COLOURS, MARKERS):
        left.plot(range(1, 1 + len(found["curve"])), found["curve"], color=colour, marker=marker, label=name)
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    left.set(xlabel="number of guesses k", ylabel="top-k accuracy", title=result["data"], xticks=[1, 5, 10, 15, 20])
    left.legend(loc="lower right")
    losses = result["head"]["losses"]
    for axes, column in zip(right, ("ms a step", "MiB a step")):
        bars = axes.bar(list(losses), [row[column] for row in losses.values()], color=COLOURS[: len(losses)])
        axes.bar_label(bars, fmt="%.0f")
        axes.set(title=column)
    figure.suptitle(f"right: a head over {result['head']['classes']:,} species", x=1, ha="right")


def main() -> None:
    args = arguments()
    start = time.perf_counter()
    head_args = all_species.arguments([*HEAD, "--cache", str(args.cache), "--seed", str(args.seed)])
    data = (kanji if args.data == "kanji" else species).load(args.cache)
    task = load(args.data, args.cache)
    rows = len(task.parts["train"][1])
    print(
        f"{task.name}: {rows:,} training rows of {task.classes:,} classes; {data.ambiguous_share():.0%} of the rows "
        "share their input with another class"
    )
    result = {"environment": environment(), "data": task.name} | compare(task, data, args)
    show(task, result)
    print("\nA head over every named species:")
    result["head"] = all_species.compare(head_args)
    all_species.show(result["head"])
    result["seconds"] = round(time.perf_counter() - start, 1)
    path = args.out / f"demo{'' if args.data == 'kanji' else '_' + args.data}.json"
    write(path, result)
    save_svg(partial(draw, result), (9, 3.6), path.with_suffix(".svg"))
    print(f"\nplot: {path.with_suffix('.svg')}\nfigures: {path}, after {result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
