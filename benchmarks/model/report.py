"""Times of counts: what bounds each launch, and a table of its stages. Every figure here is the model's."""

import math
import re
from typing import NamedTuple

import numpy as np

from .cases import Case, Problem, share
from .gpus import KIB, PIPES, Gpu, blocks_at_once, lanes_of
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


def moved(ran: Ran, whole: Whole) -> float:
    """Bytes that the launch moves from and to memory."""
    sectors = ran.counts[:, COLUMNS["from_memory"]].sum() + ran.written_back
    return float(sectors) * SECTOR * whole.n_rows / whole.ran_rows


def waves(gpu: Gpu, device: Device, shape: Shape) -> int:
    return math.ceil(shape.grid / (residency(gpu, device, shape) * gpu.processors))


def bounds(gpu: Gpu, device: Device, ran: Ran, whole: Whole) -> dict:
    """Seconds below which the launch cannot be, by what bounds it; `latency` has what the warps wait for each other."""
    total = dict(zip(FIELDS, ran.counts.sum(0)))
    lines, grid, blocks = device.kernels[ran.shape.kernel].lines, whole.shape.grid, len(ran.cycles)
    at_once = residency(gpu, device, whole.shape) * gpu.processors
    busiest = math.ceil(grid / gpu.processors) if grid <= at_once else grid / gpu.processors
    cycles = lambda n: n / blocks * busiest / gpu.hertz  # noqa: E731
    scale = whole.n_rows / whole.ran_rows
    through_l2 = (total["from_memory"] + total["from_l2"] + total["written"]) * SECTOR * scale
    issued = ran.counts[:, COLUMNS["issued"]]
    out = {
        "memory": moved(ran, whole) / gpu.bandwidth,
        "L2": through_l2 / gpu.l2_bandwidth,
        "issue": cycles(total["issued"] / gpu.schedulers),
        "L1 and shared": cycles(total["wavefronts"]),
        "latency": waves(gpu, device, whole.shape) * float(ran.cycles.mean()) / gpu.hertz,
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


def run(case: Case, calls: Calls, device: Device, wholes: list[Whole], processors: int, rates: list[float]):
    """Runs a share of a case: its launches, and whether the results are right.

    ``rates`` has the bytes that a whole launch brings into L2 in a cycle of a block, for each launch.
    """
    gpu = device.gpu
    cache = device.lib.model_cache(gpu.l2_bytes)
    rans: list[Ran] = []

    def take(shape, argument):
        at = min(len(rans), len(wholes) - 1)
        whole, before = wholes[at], moved(rans[-1], wholes[at - 1]) if rans else 0.0
        device.lib.model_start_launch(cache, before, rates[at])
        blocks = min(residency(gpu, device, whole.shape), math.ceil(whole.shape.grid / gpu.processors))
        in_shared = next(step * KIB for step in gpu.shared_steps if step * KIB >= blocks * (shape.shared + KIB))
        rans.append(device.run(shape, argument, cache, (gpu.l1_bytes - in_shared) // blocks))

    problem = Problem(case, wholes[0].ran_rows)
    given = problem.call(calls, gpu, take, processors)
    device.lib.model_cache_free(cache)
    return rans, all(a.equal(b) for a, b in zip(given, problem.results()))


def modelled(case: Case, calls: Calls, gpu: Gpu, device: Device, depth: int = 1) -> dict:
    """Runs a share of a case, compares its results, and makes times of its counts.

    It runs twice: what a launch brings into L2, and how soon, is known after the first time.
    """
    shapes, n_rows, processors, same = share(case, calls, gpu)
    wholes = [Whole(shape, case.n_rows, n_rows) for shape in shapes]
    rans, equal = run(case, calls, device, wholes, processors, [0.0] * len(wholes))
    if case.bytes > gpu.l2_bytes:
        rates = [moved(r, w) / (waves(gpu, device, w.shape) * r.cycles.mean()) for r, w in zip(rans, wholes)]
        rans, equal = run(case, calls, device, wholes, processors, rates)
    launches, seconds = [], 0.0
    for ran, whole in zip(rans, wholes):
        found, shape = bounds(gpu, device, ran, whole), whole.shape
        by, held = max(found, key=found.get), residency(gpu, device, shape)
        seconds += found[by]
        launches.append(
            {
                "kernel": short_name(shape.kernel),
                "registers": device.kernels[shape.kernel].registers,
                "blocks": shape.grid,
                "shared_bytes": shape.shared,
                "warps_resident": held * -(-shape.size // 32),
                "waves": round(shape.grid / (held * gpu.processors), 2),
                "bound": by,
                "microseconds": {name: round(x * 1e6, 2) for name, x in found.items()},
            }
        )
    floor = case.bytes / gpu.bandwidth
    seconds += gpu.launch * len(wholes)
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
