"""The benchmarks. These modules are programs, started as ``python -m benchmarks.loss``:

* `loss`, `linear` and `gradient` measure by `harness.measure`, and write JSON to results; `study` trains under seven
  losses;
* `gpu` runs everything that needs a GPU; `cuda_static` and `triton_static` inspect compiled kernels without one, and
  `model` runs the CUDA kernels' machine code on a CPU, and says what it would cost on a GPU;
* `tables` writes the tables and plots of README.md and docs/.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
