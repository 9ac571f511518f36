"""The quality of the gradient: variance and bias against B, the time that they cost beside pytopk, gradcheck's errors.

The loss of one row is a random variable, and so is its gradient g. As B grows, g tends to [a > 0] (p - e_y), where
a = 1 + E v - s_y, and p_j is the probability that class j is the (K+1)-th; both are estimated here from a million
samples. For finite B, g is unbiased where the hinge is always active, and its variance, summed over the classes, is
(1 - sum_j p_j^2) / B. Near a = 0 the mean over B decides whether the hinge is active, which biases g. Repetitions are
equal rows with different noise.

    python -m benchmarks.gradient            # results/gradient.json
    python -m benchmarks.gradient --quick    # fewer samples; prints only
"""

import argparse
import itertools
import math

import pytopk
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import RESULTS, harness
from examples.machine import environment
from topk_fast import functional

K, EPSILON = 5, 1.0
SAMPLES = (1, 2, 5, 10, 20, 50, 100)
LENGTH = 100
ROWS = {"far": 4.0, "near": 0.3, "kink": 0.0}  # a of the three rows
TIMED = [(128, 1000), (64, 10_000), (32, 100_000)]
PYTOPK_ENTRIES = 2**28  # of noise; beyond them, a step of pytopk takes minutes and gigabytes
EXACT, REPETITIONS = 1_000_000, 40_000


def make_row(length: int, true: float) -> tuple[Tensor, Tensor]:
    """N(0, 1) scores [1, length], of which class 0 is the true class and has the score `true`."""
    scores = torch.randn(1, length, generator=torch.Generator().manual_seed(0))
    scores[0, 0] = true
    return scores, torch.zeros(1, dtype=torch.long)


def estimate_limit(scores: Tensor, samples: int, seed: int) -> tuple[Tensor, float, float]:
    """p [L], E v and the standard deviation of v, estimated from `samples` samples of a row's noised top-(K+1)."""
    rows, per_row = max(1, samples // 100), min(samples, 100)
    values, classes = functional.noised_topk_candidates(
        scores.expand(rows, -1), K + 1, EPSILON, per_row, seed=seed, sampler="dense"
    )
    v = values[..., -1].double().flatten()
    p = classes[..., -1].flatten().bincount(minlength=scores.shape[1]).double() / v.numel()
    return p, v.mean().item(), v.std().item()


def find_true_score(activation: float, samples: int) -> float:
    """The true class's score for which 1 + E v - s_y is `activation`.

    Fixed-point steps converge, since v depends little on s_y.
    """
    true = 2.0
    for _ in range(8):
        true = 1 - activation + estimate_limit(make_row(LENGTH, true)[0], samples, seed=0)[1]
    return true


def draw_gradients(scores: Tensor, target: Tensor, n_sample: int, repetitions: int, seed: int) -> tuple[Tensor, float]:
    """Gradients [repetitions, L] of one row's loss under independent noise, and the share of losses above 0."""
    leaf = scores.repeat(repetitions, 1).requires_grad_()
    loss = functional.bal_noised_topk_loss(
        leaf, target.expand(repetitions), K, EPSILON, n_sample, seed=seed, reduction="none"
    )
    share = (loss > 0).double().mean().item()
    return torch.autograd.grad(loss.sum(), leaf)[0].double(), share


def estimate_moments(g: Tensor, limit: Tensor, excess: float) -> dict:
    """Variance summed over classes; an unbiased estimate of the bias's squared length, with its standard error.

    excess: the share of that squared length which comes from the error of `limit` itself.
    """
    centred = g - g.mean(0)
    lengths = centred.square().sum(1)
    variance = lengths.sum().item() / (len(g) - 1)
    # On average, |mean g - limit|^2 exceeds the bias's square by variance / repetitions. The halves are independent, so
    # the product of their deviations does not.
    halves = [half.mean(0) - limit for half in g.chunk(2)]
    product = torch.dot(*halves).item() - excess
    covariance, bias = centred.T @ centred / (len(g) - 1), g.mean(0) - limit
    error = 4 * (covariance.square().sum() / len(g) ** 2 + bias @ covariance @ bias / len(g))
    return {"variance": variance, "bias_squared": product, "bias_squared_error": error.item() ** 0.5}


def measure_quality(samples: int, repetitions: int) -> list[dict]:
    """Variance and bias of the gradient for each row and B."""
    out = []
    for name, wanted in ROWS.items():
        scores, target = make_row(LENGTH, find_true_score(wanted, samples))
        p, value, deviation = estimate_limit(scores, samples, seed=1)
        activation, error = 1 + value - scores[0, 0].item(), deviation / samples**0.5
        # At the kink the activation has no sign; for large B the gradient tends to the mean of both sides.
        active = float(activation > 0) if wanted else 0.5
        side = p - torch.eye(LENGTH, dtype=torch.double)[0]
        unit = 1 - p.square().sum().item()
        case = {"row": name, "activation": activation, "activation_error": error, "unit_variance": unit}
        for seed, n_sample in enumerate(SAMPLES, 2):
            g, share = draw_gradients(scores, target, n_sample, repetitions, seed)
            found = estimate_moments(g, active * side, active**2 * unit / samples)
            # The error of a moves the share of active hinges; their argument is nearly normal.
            width = deviation / n_sample**0.5
            moved = error * math.exp(-0.5 * (activation / width) ** 2) / (width * (2 * math.pi) ** 0.5)
            found["bias_squared_error"] += moved**2 * side.square().sum().item()
            out.append(case | {"n_sample": n_sample, "open": share} | found)
    return out


def measure_steps(n: int, length: int, repeats: int, seconds: float) -> list[dict]:
    """The mean variance of a row's gradient and the time of a step for each B, with topk_fast and with pytopk."""
    scores, target = harness.make_scores("normal", n, length, "float32", "cpu")
    losses = {}
    for b in SAMPLES:
        losses["topk_fast", b] = lambda s, t, b=b: functional.bal_noised_topk_loss(s, t, K, EPSILON, b)
        if n * length * b <= PYTOPK_ENTRIES:
            losses["pytopk", b] = pytopk.BalNoisedTopK(K, EPSILON, b)
    for b in SAMPLES:
        harness.gate({name: f for (name, at), f in losses.items() if at == b}, scores, target, K, b, EPSILON)
    steps = {key: [lambda f=f: harness.take_step(f, scores, target)] for key, f in losses.items()}
    samples, _ = harness.sample_in_turn(steps, "cpu", repeats, seconds)
    out = []
    for (name, b), times in samples.items():
        variance = torch.stack([_take_gradients(losses[name, b], scores, target) for _ in range(8)]).var(0).sum(1)
        out.append(
            {"N": n, "L": length, "loss": name, "n_sample": b, "variance": variance.mean().item()}
            | {"ms": harness.compute_quartiles([t[0] for t in times])}
        )
    return out


def _take_gradients(loss, scores: Tensor, target: Tensor) -> Tensor:
    """The gradient of each row's own loss, from one step."""
    harness.take_step(loss, scores, target)
    return scores.grad.double() * len(target)


def compare_differences(length: int = 300, n: int = 12) -> list[dict]:
    """The largest differences of analytic and central-difference gradients in float64, with a fixed seed, by case."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(n, length, generator=generator, dtype=torch.double)
    target = torch.randint(length, (n,), generator=generator)
    margins = 0.3 * torch.rand(length, generator=generator)
    out = []
    options = itertools.product(("balanced", "imbalanced"), (1, 5), (3, 10), (0.0, 0.3, 3.0), ("thinned", "dense"))
    for kind, k, n_sample, epsilon, sampler in options:
        common = dict(epsilon=epsilon, n_sample=n_sample, seed=3, reduction="none", sampler=sampler)

        def loss(s, kind=kind, k=k, common=common):
            if kind == "balanced":
                return functional.bal_noised_topk_loss(s, target, k, **common)
            return functional.imbal_noised_topk_loss(s, target, k, margins, scale=10.0, **common)

        leaf = scores.clone().requires_grad_()
        analytic = torch.autograd.grad(loss(leaf).sum(), leaf)[0]
        h, numeric = 1e-6, torch.zeros_like(scores)
        for j in range(length):
            shift = torch.zeros(length, dtype=torch.double)
            shift[j] = h
            numeric[:, j] = (loss(scores + shift) - loss(scores - shift)) / (2 * h)
        out.append(
            {"loss": kind, "k": k, "n_sample": n_sample, "epsilon": epsilon, "sampler": sampler, "L": length, "h": h}
            | {"largest_entry": analytic.abs().max().item(), "largest_error": (analytic - numeric).abs().max().item()}
            | {"largest_row_sum": analytic.sum(1).abs().max().item(), "densest_row": int((analytic != 0).sum(1).max())}
        )
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the samples, the first shape; prints only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    share = 100 if arguments.quick else 1
    report = {"environment": environment("cpu"), "k": K, "epsilon": EPSILON, "L": LENGTH}
    report |= {"exact_samples": EXACT // share, "repetitions": REPETITIONS // share}
    report["gradcheck"] = compare_differences()
    report["quality"] = measure_quality(EXACT // share, REPETITIONS // share)
    report["second"] = []
    for shape in tqdm(TIMED[:1] if arguments.quick else TIMED, unit="shape"):
        report["second"] += measure_steps(*shape, *((3, 0.2) if arguments.quick else (15, 4.0)))
    if arguments.quick:
        for part in ("gradcheck", "quality", "second"):
            print(*report[part], sep="\n")
    else:
        harness.write(RESULTS / "gradient.json", report)


if __name__ == "__main__":
    main()
