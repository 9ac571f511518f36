"""The quality of the gradient under both laws of noise: variance and bias against B, and what they cost in time.

**Top-K losses.** The gradient g of a row's loss is random. As B grows, it tends to [a > 0] (p - e_y), where p_j is the
probability that class j is the (K+1)-th, and a = 1 + E v - s_y; both are estimated here from a million samples. For
finite B, g is unbiased where the hinge is always active, and its variance, summed over the classes, is
(1 - sum_j p_j^2) / B. Near a = 0 the mean over B decides whether the hinge is active, which biases g.

**Sampled cross-entropy.** With p = softmax(s), g is unbiased and has the variance (1 - sum_j p_j^2) / B. The label of a
calibrated model is a draw from p as well: it gives p - e_y, the gradient of cross-entropy, B times this variance. The
samples then add 1 / B of the label's own variance; with labels of data that is the mean of |p - e_y|^2.

    python -m benchmarks.gradient                       # results/gradient.json, and times in gradient_cpu.json
    python -m benchmarks.gradient --logits a.pt b.pt    # measures sampling on the logits of your models; prints only
    python -m benchmarks.gradient --quick               # fewer samples; prints only
"""

import itertools
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from benchmarks import RESULTS, harness
from benchmarks.cases import SPECIES, SPECIES_COMMAND, Case
from benchmarks.harness import Effort, Entry
from benchmarks.loss import EQUAL, list_candidates
from examples.report import write
from topk_fast import functional

K, EPSILON = 5, 1.0
SAMPLES, SAMPLED = (1, 2, 5, 10, 20, 50, 100), (1, 5, 16, 64)  # B of the top-K loss, and of the sampled cross-entropy
LENGTH = 100
TRUE_SCORES = {"far": -0.67, "near": 3.1}  # of the two rows; their a is 4 and 0.3
TIMED = [(32, 100_000), (64, 10_000), (128, 1000)]
PYTOPK_ENTRIES = 2**28  # of noise; beyond them, a step of pytopk takes minutes and gigabytes
EXACT, REPETITIONS = 1_000_000, 40_000
CALIBRATED, DRAWS = 2048, 32  # rows with labels from the softmax; gradients of each row


def make_row(true: float) -> Tensor:
    """N(0, 1) scores [1, LENGTH], of which class 0 is the true class and has the score `true`."""
    scores = torch.randn(1, LENGTH, generator=torch.Generator().manual_seed(0))
    scores[0, 0] = true
    return scores


def estimate_limit(scores: Tensor, samples: int) -> tuple[Tensor, float]:
    """p [L] and a, estimated from `samples` samples of a row's noised top-(K+1)."""
    rows, per_row = max(1, samples // 100), min(samples, 100)
    values, classes = functional.noised_topk_candidates(
        scores.expand(rows, -1), K + 1, EPSILON, per_row, seed=1, sampler="dense"
    )
    p = classes[..., -1].flatten().bincount(minlength=LENGTH).double() / (rows * per_row)
    return p, 1 + values[..., -1].double().mean().item() - scores[0, 0].item()


def estimate_moments(g: Tensor, limit: Tensor, excess: float) -> dict:
    """Variance summed over classes; an unbiased estimate of the bias's squared length, with its standard error.

    excess: the share of that squared length which comes from the error of `limit` itself.
    """
    centred = g - g.mean(0)
    # On average, |mean g - limit|^2 exceeds the bias's square by variance / repetitions. The halves are independent, so
    # the product of their deviations does not.
    halves = [half.mean(0) - limit for half in g.chunk(2)]
    covariance, bias = centred.T @ centred / (len(g) - 1), g.mean(0) - limit
    error = 4 * (covariance.square().sum() / len(g) ** 2 + bias @ covariance @ bias / len(g))
    found = {"variance": covariance.trace().item(), "bias_squared": torch.dot(*halves).item() - excess}
    return found | {"bias_squared_error": error.item() ** 0.5}


def measure_quality(samples: int, repetitions: int) -> list[dict]:
    """Variance and bias of the top-K loss's gradient for each row and B; repetitions are equal rows."""
    out = []
    for name, true in TRUE_SCORES.items():
        scores = make_row(true)
        p, activation = estimate_limit(scores, samples)
        limit, unit = p - torch.eye(LENGTH, dtype=torch.double)[0], 1 - p.square().sum().item()
        for seed, n_sample in enumerate(SAMPLES, 2):
            leaf, target = scores.repeat(repetitions, 1).requires_grad_(), torch.zeros(repetitions, dtype=torch.long)
            loss = functional.bal_noised_topk_loss(leaf, target, K, EPSILON, n_sample, seed=seed, reduction="none")
            g = torch.autograd.grad(loss.sum(), leaf)[0].double()
            case = {"row": name, "activation": activation, "unit_variance": unit, "n_sample": n_sample}
            out.append(case | estimate_moments(g, limit, unit / samples))
    return out


def measure_sampling(name: str, logits: Tensor, target: Tensor, draws: int) -> dict:
    """The variance of cross-entropy's gradient in a row that its label has, and what B samples add, by B.

    `model_variance` is that of a label from the model, `label_variance` that of the labels given.
    """
    p = logits.double().softmax(1)
    exact = p - one_hot(target, logits.shape[1])
    out = {"logits": name, "rows": len(logits), "L": logits.shape[1]}
    out |= summarize("model_variance", 1 - p.square().sum(1)) | summarize("label_variance", exact.square().sum(1))
    out["samples"] = []
    for n_sample in SAMPLED:
        variance, bias = [], []
        for rows in torch.arange(len(logits)).split(max(1, 2**20 // logits.shape[1])):
            g = torch.stack([draw_gradient(logits[rows], target[rows], n_sample) for _ in range(draws)])
            variance.append(g.var(0).sum(1))
            halves = [half.mean(0) - exact[rows] for half in g.chunk(2)]
            bias.append((halves[0] * halves[1]).sum(1))  # The halves are independent: there is no variance in it.
        found = summarize("variance", torch.cat(variance)) | summarize("bias_squared", torch.cat(bias))
        out["samples"].append({"n_sample": n_sample} | found)
    return out


def draw_gradient(logits: Tensor, target: Tensor, n_sample: int) -> Tensor:
    leaf = logits.float().requires_grad_()
    functional.sampled_cross_entropy(leaf, target, n_sample, reduction="sum").backward()
    return leaf.grad


def summarize(name: str, values: Tensor) -> dict[str, float]:
    """The mean over rows, and its standard error."""
    return {name: values.mean().item(), f"{name}_error": (values.std() / len(values) ** 0.5).item()}


def measure_models(files: list[Path], rows: int, draws: int) -> list[dict]:
    """Sampling on logits whose labels are drawn from the softmax, and on saved logits with labels of data.

    A file is a .pt with a dictionary: "logits" [N, L], of a floating-point dtype, and "target" [N], int64.
    """
    torch.manual_seed(0)
    logits = torch.randn(rows, LENGTH)
    labels = logits.softmax(1).multinomial(1)[:, 0]
    found = [measure_sampling("N(0, 1), labels from the softmax", logits, labels, draws)]
    for file in files:
        saved = torch.load(file, weights_only=True)
        found.append(measure_sampling(file.stem, saved["logits"], saved["target"], draws))
    return found


def list_entries(quick: bool) -> list[Entry]:
    """Steps whose times and variances are compared."""
    out = []
    for (n, length), b in itertools.product(TIMED[-1:] if quick else TIMED, SAMPLES):
        names = ("topk_fast", EQUAL, *["pytopk"] * (n * length * b <= PYTOPK_ENTRIES))
        out.append(Entry("gradient", Case(n, length, K, b, EPSILON), names))
    return out


def measure_variance(name: str, case: Case, device: str) -> float:
    """The variance of the gradient of a row's own loss, summed over the classes; the mean over rows."""
    batch = case.make_batch(device)
    step, gradients = harness.Step(list_candidates(device)[name], case, batch, device), []
    for _ in range(8):
        step.run()
        gradients.append(batch.leaves[0].grad.double() * case.N)
    return torch.stack(gradients).var(0).sum(1).mean().item()


def main(argv: list[str] | None = None) -> None:
    parser = harness.make_parser(__doc__)
    parser.add_argument("--logits", type=Path, nargs="+", help="measure sampling on saved logits, and nothing else")
    args = parser.parse_args(argv)
    if missing := [str(file) for file in args.logits or [SPECIES] if not file.exists()]:
        parser.error(f"{', '.join(missing)} is missing; {SPECIES.name} is made with: {SPECIES_COMMAND}")
    if args.logits:
        if args.quick or args.device == "cuda" or args.out:
            parser.error("--logits goes with no other option")
        print(json.dumps(measure_models(args.logits, CALIBRATED, DRAWS), indent=1))
        return
    times, path = harness.begin(args, "gradient_")
    share = 100 if args.quick else 1
    report = {"environment": times["environment"], "k": K, "epsilon": EPSILON, "L": LENGTH}
    report |= {"exact_samples": EXACT // share, "repetitions": REPETITIONS // share}
    report["quality"] = measure_quality(EXACT // share, REPETITIONS // share)
    report["draws"] = DRAWS // 8 if args.quick else DRAWS
    report["sampling"] = measure_models([SPECIES], CALIBRATED // share, report["draws"])
    if args.quick:
        print(json.dumps(report, indent=1))
    else:
        write(RESULTS / "gradient.json", report)
    effort = Effort(3, 0.2) if args.quick else Effort(15, 2.0)
    harness.measure(list_entries(args.quick), list_candidates(args.device), args.device, effort, times, path)
    for entry, result in zip(list_entries(args.quick), times["cases"]):
        result["variance"] = {name: measure_variance(name, entry.case, args.device) for name in result["ms"]}
    if path is not None:
        write(path, times)


if __name__ == "__main__":
    main()
