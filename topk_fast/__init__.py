"""Noised top-K losses for classifiers with many classes, fast: same seed, same bits on every backend.

>>> import torch
>>> from topk_fast import BalNoisedTopK
>>> loss = BalNoisedTopK(k=5, epsilon=1.0)(torch.randn(8, 1000), torch.randint(1000, (8,)))
"""

from pathlib import Path

if not (Path(__file__).parent / "triton_kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))  # a checkout: its triton_kernels lie beside this folder

from . import functional
from .backends import available_backends, build_info
from .heads import LinearBalNoisedTopK, LinearImbalNoisedTopK
from .nn import BalNoisedTopK, ImbalNoisedTopK, NoisedTopK, NormedLinear

__version__ = "0.1.0"

__all__ = [
    "BalNoisedTopK",
    "ImbalNoisedTopK",
    "LinearBalNoisedTopK",
    "LinearImbalNoisedTopK",
    "NoisedTopK",
    "NormedLinear",
    "__version__",
    "available_backends",
    "build_info",
    "functional",
]
