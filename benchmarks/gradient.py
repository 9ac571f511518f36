"""How good the gradient is: its variance and bias against B, what a second buys against pytopk, and gradcheck's figures.

The loss of one row is a random variable, and so is its gradient g. As B grows g tends to [a > 0] (p - e_y), with
a = 1 + E v - s_y and p_j the probability that class j is the (K+1)-th; both are found here from a million samples. For
finite B, g is unbiased where the hinge is never shut, with variance (1 - sum_j p_j^2) / B (summed over classes); near a = 0
the mean over B decides whether the hinge is open, which biases g. Repetitions are equal rows, whose noise differs.

    python benchmarks/gradient.py            # results/gradient.json
    python benchmarks/gradient.py --quick    # fewer samples; prints only
"""

import argparse
import itertools
import math

import pytopk
import torch
from torch import Tensor
from tqdm import tqdm

import harness
from topk_fast import functional

K, EPSILON = 5, 1.0
SAMPLES = (1, 2, 5, 10, 20, 50, 100)
LENGTH = 100
ROWS = {"far": 4.0, "near": 0.3, "kink": 0.0}  # a of the three rows
TIMED = [(128, 1000), (64, 10_000), (32, 100_000)]
PYTOPK_ENTRIES = 2**28  # of noise, beyond which a step of pytopk takes minutes and gigabytes
EXACT, REPETITIONS = 1_000_000, 40_000


def row(length: int, true: float) -> tuple[Tensor, Tensor]:
    """N(0, 1) scores [1, length] whose class 0 is the true one and scores `true`."""
    scores = torch.randn(1, length, generator=torch.Generator().manual_seed(0))
    scores[0, 0] = true
    return scores, torch.zeros(1, dtype=torch.long)


def exact(scores: Tensor, samples: int, seed: int) -> tuple[Tensor, float, float]:
    """p [L], E v and the standard deviation of v, from `samples` samples of a row's noised top-(K+1)."""
    rows, per_row = max(1, samples // 100), min(samples, 100)
    values, classes = functional.noised_topk_candidates(
        scores.expand(rows, -1), K + 1, EPSILON, per_row, seed=seed, sampler="dense"
    )
    v = values[..., -1].double().flatten()
    p = classes[..., -1].flatten().bincount(minlength=scores.shape[1]).double() / v.numel()
    return p, v.mean().item(), v.std().item()


def true_score(activation: float, samples: int) -> float:
    """The true class's score that makes 1 + E v - s_y what is asked for, by fixed-point steps: v depends little on s_y."""
    true = 2.0
    for _ in range(8):
        true = 1 - activation + exact(row(LENGTH, true)[0], samples, seed=0)[1]
    return true


def gradients(scores: Tensor, target: Tensor, n_sample: int, repetitions: int, seed: int) -> tuple[Tensor, float]:
    """Gradients of as many losses of one row with noises of their own, [repetitions, L], and the share that is not 0."""
    leaf = scores.repeat(repetitions, 1).requires_grad_()
    loss = functional.bal_noised_topk_loss(
        leaf, target.expand(repetitions), K, EPSILON, n_sample, seed=seed, reduction="none"
    )
    share = (loss > 0).double().mean().item()
    return torch.autograd.grad(loss.sum(), leaf)[0].double(), share


def moments(g: Tensor, limit: Tensor, excess: float) -> dict:
    """Variance summed over classes; squared length of the bias, less what chance adds to it, with its standard error.

    excess: what the error of `limit` itself adds.
    """
    centred = g - g.mean(0)
    lengths = centred.square().sum(1)
    variance = lengths.sum().item() / (len(g) - 1)
    # |mean g - limit|^2 exceeds the bias's square by variance / repetitions on average; the halves are independent, so
    # the product of their deviations is free of that excess.
    halves = [half.mean(0) - limit for half in g.chunk(2)]
    product = torch.dot(*halves).item() - excess
    covariance, bias = centred.T @ centred / (len(g) - 1), g.mean(0) - limit
    error = 4 * (covariance.square().sum() / len(g) ** 2 + bias @ covariance @ bias / len(g))
    return {"variance": variance, "bias_squared": product, "bias_squared_error": error.item() ** 0.5}


def quality(samples: int, repetitions: int) -> list[dict]:
    """Variance and bias of the gradient for each row and B."""
    out = []
    for name, wanted in ROWS.items():
        scores, target = row(LENGTH, true_score(wanted, samples))
        p, value, deviation = exact(scores, samples, seed=1)
        activation, error = 1 + value - scores[0, 0].item(), deviation / samples**0.5
        # At the kink the limit has no sign to follow: the mean of both sides is what large B tends to.
        gate = float(activation > 0) if wanted else 0.5
        side = p - torch.eye(LENGTH, dtype=torch.double)[0]
        unit = 1 - p.square().sum().item()
        case = {"row": name, "activation": activation, "activation_error": error, "unit_variance": unit}
        for seed, n_sample in enumerate(SAMPLES, 2):
            g, share = gradients(scores, target, n_sample, repetitions, seed)
            found = moments(g, gate * side, gate**2 * unit / samples)
            # How far the error of a moves the share of open hinges, whose argument is nearly normal.
            width = deviation / n_sample**0.5
            moved = error * math.exp(-0.5 * (activation / width) ** 2) / (width * (2 * math.pi) ** 0.5)
            found["bias_squared_error"] += moved**2 * side.square().sum().item()
            out.append(case | {"n_sample": n_sample, "open": share} | found)
    return out


def second_of_variance(n: int, length: int, repeats: int, seconds: float) -> list[dict]:
    """For each B: the mean variance of a row's gradient, and the time of a step, with topk_fast and with pytopk."""
    scores, target = harness.scores_of("normal", n, length, "float32", "cpu")
    losses = {}
    for b in SAMPLES:
        losses["topk_fast", b] = lambda s, t, b=b: functional.bal_noised_topk_loss(s, t, K, EPSILON, b)
        if n * length * b <= PYTOPK_ENTRIES:
            losses["pytopk", b] = pytopk.BalNoisedTopK(K, EPSILON, b)
    for b in SAMPLES:
        harness.gate({name: f for (name, at), f in losses.items() if at == b}, scores, target, K, b, EPSILON)
    steps = {key: [lambda f=f: harness.step(f, scores, target)] for key, f in losses.items()}
    samples, _ = harness.interleaved(steps, "cpu", repeats, seconds)
    out = []
    for (name, b), times in samples.items():
        variance = torch.stack([_gradient(losses[name, b], scores, target) for _ in range(8)]).var(0).sum(1)
        out.append(
            {"N": n, "L": length, "loss": name, "n_sample": b, "variance": variance.mean().item()}
            | {"ms": harness.quartiles([t[0] for t in times])}
        )
    return out


def _gradient(loss, scores: Tensor, target: Tensor) -> Tensor:
    """A step's gradient, of each row's own loss."""
    harness.step(loss, scores, target)
    return scores.grad.double() * len(target)


def differences(length: int = 300, n: int = 12) -> list[dict]:
    """Largest difference of analytic and central-difference gradients in float64, at a fixed seed; largest row sum."""
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
    report = {"environment": harness.environment("cpu"), "k": K, "epsilon": EPSILON, "L": LENGTH}
    report |= {"exact_samples": EXACT // share, "repetitions": REPETITIONS // share}
    report["gradcheck"] = differences()
    report["quality"] = quality(EXACT // share, REPETITIONS // share)
    report["second"] = []
    for shape in tqdm(TIMED[:1] if arguments.quick else TIMED, unit="shape"):
        report["second"] += second_of_variance(*shape, *((3, 0.2) if arguments.quick else (15, 4.0)))
    if arguments.quick:
        for part in ("gradcheck", "quality", "second"):
            print(*report[part], sep="\n")
    else:
        harness.write(harness.RESULTS / "gradient.json", report)


if __name__ == "__main__":
    main()
