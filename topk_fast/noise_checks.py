"""Checks of the arguments of the noise, which make the request for it."""

import sys
from typing import Any

import torch
from torch import Tensor

from . import checks, noise
from .request import Noise, Options

LARGEST_EPSILON = 1e36  # beyond it, epsilon times noise.LARGEST_LEVEL would overflow float32


def check_noise(options: Options, ranks: tuple[int, ...], device: torch.device) -> Noise:
    """The request for the noise, with a seed on ``device``."""
    epsilon, schedule = check_epsilon(options.epsilon, device)
    n_sample, law = check_n_sample(options.n_sample), check_law(options.noise)
    dense = check_sampler(options.sampler)
    return Noise(make_seed(options, device), ranks, epsilon, schedule, n_sample, law, dense)


def check_epsilon(epsilon, device: torch.device | None) -> tuple[float, Tensor | None]:
    """A number and None, or 0 and the tensor that replaces it; ``device`` is None where it is not known yet."""
    if isinstance(epsilon, Tensor):
        return 0.0, _check_schedule(epsilon, device)
    epsilon = checks.check_real("epsilon", epsilon)
    if epsilon < 0:
        raise ValueError(f"epsilon must be at least 0, got {epsilon}")
    if epsilon > LARGEST_EPSILON:
        raise ValueError(f"epsilon must be at most {LARGEST_EPSILON:g}, got {epsilon}: noise would overflow float32")
    return epsilon, None


def _check_schedule(epsilon, device):
    if epsilon.dim() != 0 or not epsilon.dtype.is_floating_point:
        raise TypeError(
            "epsilon must be a number or a floating-point tensor without dimensions, got "
            f"{epsilon.dtype} {list(epsilon.shape)}"
        )
    if device is None:
        return epsilon
    if epsilon.device != device:
        raise ValueError(f"epsilon must be on input's device {device}, got {epsilon.device}")
    # The derivative in a learned one divides by it, so it must not be 0.
    known = (epsilon > 0 if epsilon.requires_grad else epsilon >= 0) & (epsilon <= LARGEST_EPSILON)
    span = f"{'(' if epsilon.requires_grad else '['}0, {LARGEST_EPSILON:g}]"
    try:
        if not epsilon.is_meta:
            torch._assert_async(known, f"epsilon must be in {span}")
    except RuntimeError:  # at once on the CPU; a GPU, for which nothing waits, stops by itself
        raise ValueError(f"epsilon must be in {span}, got {epsilon.item()}") from None
    return epsilon.to(torch.float64)


def check_n_sample(n_sample):
    return checks.check_integer("n_sample", n_sample, 1, 2**31 - 1)


def check_law(noise_: str) -> int:
    """The number of a law of the noise."""
    for number, law in enumerate(noise.LAWS):
        if noise_ == law.name:
            return number
    raise ValueError(f"noise must be {' or '.join(repr(law.name) for law in noise.LAWS)}, got {noise_!r}")


def check_sampler(sampler):
    if sampler not in ("auto", "thinned", "dense"):
        raise ValueError(f"sampler must be 'auto', 'thinned' or 'dense', got {sampler!r}")
    return sampler == "dense"


def check_source(seed, generator):
    """Where seeds come from, without their device."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if seed is None:
        return
    if generator is not None:
        raise ValueError("seed and generator exclude each other, got both")
    if not isinstance(seed, Tensor):
        checks.check_integer("seed", seed, -(2**63), 2**64 - 1)
    elif seed.dtype != torch.int64 or seed.dim() != 0:
        raise TypeError(f"a seed tensor must be int64 without dimensions, got {seed.dtype} {list(seed.shape)}")


def make_seed(options: Options, device: torch.device) -> Tensor:
    """The key of the noise as an int64 tensor on ``device``, so that no step waits for the device."""
    seed, generator = options.seed, options.generator
    check_source(seed, generator)
    if seed is None:
        low, high = -(2**63), 2**63 - 1
        if generator is None:  # AOTInductor would look for an op that takes one, also where it is None
            return torch.randint(low, high, (), dtype=torch.int64, device=device)
        check_recomputable(generator, device)
        return torch.randint(low, high, (), dtype=torch.int64, device=device, generator=generator)
    if isinstance(seed, Tensor):
        if seed.device != device:
            raise ValueError(f"seed must be on input's device {device}, got {seed.device}")
        return seed
    number: Any = seed if isinstance(seed, torch.SymInt) else int(seed)
    return torch.full((), number - 2**64 if number >= 2**63 else number, dtype=torch.int64, device=device)


def check_recomputable(generator, device):
    """Refuses a generator on another device, and inside of torch.utils.checkpoint.

    A checkpoint runs the forward again for the backward. It restores the state of torch's default generators for that,
    and of no other one: the gradient would belong to another noise than the loss that was returned.
    """
    if generator.device.type != device.type:
        raise ValueError(f"generator must be on input's device {device}, got {generator.device}")
    frame = None if torch.compiler.is_compiling() else sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            raise RuntimeError(
                "a generator inside of torch.utils.checkpoint would draw other noise for the backward than for the "
                "loss: pass a seed drawn outside of the checkpoint, or generator=None, for torch restores its default "
                "generator"
            )
        frame = frame.f_back
