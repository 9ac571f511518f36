"""Contract under test: the floors of a step in Triton, which never ran, count the bytes that it must move and its
instructions.

Each floor is computed in a new process without TRITON_INTERPRET, under which the kernels' inspection restarts Python.
"""

import json
import os
import subprocess
import sys

import pytest

from testing import ROOT

pytest.importorskip("triton", reason="the inspection of compiled kernels imports Triton, which is not installed")
COSTS = ("stream", "words", "normal", "level", "gap")
CASE = {"n": 64, "length": 2000, "k": 6, "n_sample": 5, "epsilon": 1.0}


def predict(itemsize, cost):
    """The prediction for stages that take ``cost`` instructions each."""
    code = (
        "import json; from benchmarks.triton_static import prediction\n"
        f"costs = dict.fromkeys({COSTS}, {cost})\n"
        f"print(json.dumps(prediction(costs, **{CASE}, itemsize={itemsize})))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("itemsize", [4, 2], ids=["float32", "bfloat16"])
def test_floors_of_a_step(itemsize):
    floors, tripled = (predict(itemsize, cost) for cost in (1, 3))
    scores = CASE["n"] * CASE["length"] * itemsize
    assert floors["floor_copy_ms"] == pytest.approx(2 * scores / 3.0e12 * 1e3)
    arrivals = 32 * CASE["n"] * CASE["n_sample"] * floors["arrivals"]  # the prediction rounds their number to a tenth
    assert floors["floor_bytes_ms"] == pytest.approx((2 * scores + arrivals) / 3.0e12 * 1e3, rel=1e-3)
    assert floors["warp_instructions_a_row"] > CASE["length"] / 32  # one for each score of the row, and the draws
    assert tripled["floor_instructions_ms"] == pytest.approx(3 * floors["floor_instructions_ms"])
