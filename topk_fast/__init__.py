"""Fast losses for classifiers with many classes: noised top-K and sampled cross-entropy.

The same seed gives the same excesses and classes on every backend, bit for bit.

>>> import torch
>>> from topk_fast import LinearHead, SampledCrossEntropy
>>> head = LinearHead(64, 100_000, SampledCrossEntropy(16))
>>> loss = head(torch.randn(8, 64), torch.randint(100_000, (8,)))
"""

from pathlib import Path

if not (Path(__file__).parent / "triton_kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))  # a checkout: its triton_kernels lie beside this folder

from . import functional
from .backends import available_backends, build_info
from .clipping import clip_grad_norm_
from .heads import LinearHead
from .nn import BalNoisedTopK, ImbalNoisedTopK, NoisedTopK, NoisedTopKLoss, NormedLinear, SampledCrossEntropy

__version__ = "0.2.0"

__all__ = [
    "BalNoisedTopK",
    "ImbalNoisedTopK",
    "LinearHead",
    "NoisedTopK",
    "NoisedTopKLoss",
    "NormedLinear",
    "SampledCrossEntropy",
    "__version__",
    "available_backends",
    "build_info",
    "clip_grad_norm_",
    "functional",
]
