"""Runs the study. A study that is interrupted resumes where it stopped, also from the committed result.

Each loss of a data set gets the same number of trials. The trial that is best on the validation rows is trained again
under other seeds and measured on the test rows.

    python -m benchmarks.study                                # all of it, which takes hours; records in out/study
    python -m benchmarks.study --workers 4 --data species     # four processes of one thread each; one data set only
    python -m benchmarks.study --collect                      # puts all that is on record into results/study.json
"""

import argparse
import json
import multiprocessing
import os
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import RESULTS, ROOT
from benchmarks.study.jobs import ABLATED, PLANS, ablation_jobs, collect, jobs, left_of, records, run
from examples.machine import stamp
from examples.tasks import load

RESULT = RESULTS / "study.json"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(PLANS), nargs="+", default=list(PLANS))
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--collect", action="store_true", help="run nothing; put the records into the result")
    parser.add_argument("--cache", type=Path, default=ROOT / "data", help="folder of downloaded and rendered data")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "study", help="folder of the records")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.collect:
        collect(args.out, args.cache, RESULT)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in args.data:
        load(name, args.cache)  # downloaded and rendered once, before there are several processes
    origin = {key: value for key, value in stamp().items() if key != "command"}
    # Each start of the program writes a file of its own: no half-written line is ever appended to.
    path = args.out / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.jsonl"
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.workers, torch.set_num_threads, (1,)) as pool, path.open("w", buffering=1) as file:
        stages = [(name, partial(jobs, name)) for name in args.data]
        stages += [("ablations", ablation_jobs)] * (ABLATED in args.data)
        for name, wanted in stages:
            while left := left_of(wanted(done := records(args.out, RESULT)), done):
                results = pool.imap_unordered(partial(run, cache=args.cache), left)
                for record in tqdm(results, name, total=len(left), unit="run"):
                    file.write(json.dumps(record | origin) + "\n")


if __name__ == "__main__":
    main()
