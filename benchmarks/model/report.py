"""Times of counts: what bounds each launch, and a table of its stages. Every figure here is the model's."""

import math
import re
from typing import NamedTuple

import numpy as np

from .cases import Case, Problem, share
from .gpus import PIPES, Gpu, blocks_at_once, lanes_of
from .launches import FIELDS, Calls, Device, Ran, Shape
from .stages import stage_of

COLUMNS = {name: i for i, name in enumerate(FIELDS)}
SECTOR = 32


def short_name(kernel: str) -> str:
    return kernel.replace("(anonymous namespace)::", "").replace("topk_fast::", "").removeprefix("void ")


def cycles_of(counts: np.ndarray) -> int:
    return counts[COLUMNS["stalled"]] + counts[COLUMNS["waited"]]


class Whole(NamedTuple):
    """What a launch of the whole case is, beside the share of it that ran."""

    shape: Shape
    n_rows: int
    ran_rows: int


def residency(gpu: Gpu, device: Device, shape: Shape) -> int:
    kernel = device.kernels[shape.kernel]
    system = kernel.shared if gpu.shared_at else kernel.shared + 1024
    return blocks_at_once(gpu, kernel.registers, shape.shared + system, shape.size)


def bounds(gpu: Gpu, device: Device, ran: Ran, whole: Whole) -> dict:
    """Seconds below which the launch cannot be, by what bounds it; `latency` has what the warps wait for each other."""
    total = dict(zip(FIELDS, ran.counts.sum(0)))
    lines, grid, blocks = device.kernels[ran.shape.kernel].lines, whole.shape.grid, len(ran.cycles)
    held = residency(gpu, device, whole.shape)
    at_once = held * gpu.processors
    busiest = math.ceil(grid / gpu.processors) if grid <= at_once else grid / gpu.processors
    cycles = lambda n: n / blocks * busiest / gpu.hertz  # noqa: E731
    scale = whole.n_rows / whole.ran_rows
    moved = (total["from_memory"] + ran.written_back) * SECTOR * scale
    through_l2 = (total["from_memory"] + total["from_l2"] + total["written"]) * SECTOR * scale
    issued = ran.counts[:, COLUMNS["issued"]]
    out = {
        "memory": moved / gpu.bandwidth,
        "L2": through_l2 / gpu.l2_bandwidth,
        "issue": cycles(total["issued"] / gpu.schedulers),
        "L1 and shared": cycles(total["wavefronts"]),
        "latency": math.ceil(grid / at_once) * float(ran.cycles.mean()) / gpu.hertz,
    }
    for pipe, (_, names) in PIPES.items():
        n = sum(int(issued[i]) for i, line in enumerate(lines) if line.name in names)
        out[f"{pipe} pipe"] = cycles(n * 32 / lanes_of(gpu, pipe))
    return out


def stages(device: Device, rans: list[Ran], n_rows: int, depth: int) -> list[dict]:
    """A stage each, per row of the scores; warps' cycles are added up, whichever of them ran side by side.

    Those with less than a hundredth of a kernel's cycles are put together.
    """
    found: dict[tuple[str, str], np.ndarray] = {}
    for ran in rans:
        kernel = re.search(r"(\w+)[<(]", short_name(ran.shape.kernel))[1]
        names = [stage_of(line, depth) for line in device.kernels[ran.shape.kernel].lines]
        own = {name: ran.counts[[n == name for n in names]].sum(0) for name in set(names)}
        least = sum(cycles_of(counts) for counts in own.values()) / 100
        for name, counts in own.items():
            key = (kernel, name if cycles_of(counts) >= least else "others")
            found[key] = found.get(key, 0) + counts
    out = []
    for (kernel, stage), counts in sorted(found.items(), key=lambda item: -cycles_of(item[1])):
        c = dict(zip(FIELDS, (float(x) / n_rows for x in counts)))
        if not c["issued"]:
            continue
        row = {"kernel": kernel, "stage": stage, "instructions": c["issued"], "lanes": c["lanes"] / c["issued"]}
        row |= {"warp_cycles": c["stalled"] + c["waited"], "waited": c["waited"]}
        row |= {name: c[name] for name in ("wavefronts", "read", "written", "from_l2", "from_memory")}
        out.append({name: round(x, 1) if isinstance(x, float) else x for name, x in row.items()})
    return out


def modelled(case: Case, calls: Calls, gpu: Gpu, device: Device, depth: int = 1) -> dict:
    """Runs a share of a case, compares its results, and makes times of its counts."""
    whole, n_rows, processors, same = share(case, calls, gpu)
    rans: list[Ran] = []
    side_by_side = [min(residency(gpu, device, shape), math.ceil(shape.grid / gpu.processors)) for shape in whole]
    cache = device.lib.model_cache(gpu.l2_bytes // (gpu.processors * max(side_by_side)))

    def take(shape, argument):
        blocks = side_by_side[min(len(rans), len(whole) - 1)]
        in_shared = blocks * (shape.shared + 1024)
        rans.append(device.run(shape, argument, cache, max(gpu.l1_bytes - in_shared, 16 << 10) // blocks))

    problem = Problem(case, n_rows)
    given = problem.call(calls, gpu, take, processors)
    device.lib.model_cache_free(cache)
    equal = all(a.equal(b) for a, b in zip(given, problem.results()))
    launches, seconds = [], 0.0
    for ran, shape in zip(rans, whole):
        found = bounds(gpu, device, ran, Whole(shape, case.n_rows, n_rows))
        by = max(found, key=found.get)
        held_here = residency(gpu, device, shape)
        seconds += found[by]
        launches.append(
            {
                "kernel": short_name(shape.kernel),
                "registers": device.kernels[shape.kernel].registers,
                "blocks": shape.grid,
                "shared_bytes": shape.shared,
                "warps_resident": held_here * -(-shape.size // 32),
                "waves": round(shape.grid / (held_here * gpu.processors), 2),
                "bound": by,
                "microseconds": {name: round(x * 1e6, 2) for name, x in found.items()},
            }
        )
    floor = case.bytes / gpu.bandwidth
    seconds += gpu.launch * len(whole)
    return {
        "gpu": gpu.name,
        **case._asdict(),
        "estimate_us": round(seconds * 1e6, 2),
        "byte_floor_us": round(floor * 1e6, 2),
        "ratio": round(seconds / floor, 2),
        "rows_run": n_rows,
        "same_layout": same,
        "bits_equal": equal,
        "launches": launches,
        "stages": stages(device, rans, n_rows, depth),
    }


def text(result: dict, case: Case) -> str:
    """A result as lines to read."""
    warnings = "" if result["bits_equal"] else "; ITS RESULTS ARE WRONG, so its counts may be"
    warnings += "" if result["same_layout"] else "; the share that ran has another layout than the case"
    rows = [
        f"model: {result['gpu']} {case}: {result['estimate_us']} us; bytes alone {result['byte_floor_us']} us, ratio "
        f"{result['ratio']}; from {result['rows_run']} rows{warnings}"
    ]
    for launch in result["launches"]:
        top = sorted(launch["microseconds"].items(), key=lambda item: -item[1])[:4]
        rows.append(
            f"  model: {launch['kernel']}: {launch['registers']} registers, {launch['blocks']} blocks, "
            f"{launch['warps_resident']} warps resident, {launch['waves']} waves; us by "
            + ", ".join(f"{name} {x}" for name, x in top)
        )
    head = list(result["stages"][0])
    table = [head, *([str(stage[name]) for name in head] for stage in result["stages"])]
    width = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, width)) for row in table]
    rows += ["  model, for a row of scores: " + lines[0], *(" " * 30 + line for line in lines[1:])]
    return "\n".join(rows)
