"""The points that a hyper-parameter search tries."""

from __future__ import annotations

import torch


def draw_points(space: dict[str, tuple[float, float]], trials: int, seed: int) -> list[dict[str, float]]:
    """`trials` points of a box of (low, high), log-uniform, from a scrambled Sobol sequence, rounded to two digits."""
    if not space:
        return [{} for _ in range(trials)]
    points = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=seed).draw(trials).tolist()

    def place(key: str, u: float) -> float:
        low, high = space[key]
        return float(f"{low * (high / low) ** u:.2g}")

    return [{key: place(key, u) for key, u in zip(space, point)} for point in points]
