"""The contract's functions as csrc/testing.cpp exposes them, on NumPy arrays; the binary is the one that runs the ops."""

import ctypes

import numpy as np

from topk_fast import _C

_LIBRARY = ctypes.CDLL(_C.__file__)
_REACH_AND_EPSILON = [ctypes.c_float, ctypes.c_double]


def _mapped(name, takes, returns, more=()):
    """The hook of a function of one array, and of the numbers whose ctypes are in ``more``."""
    hook = _LIBRARY[f"topk_fast_{name}"]
    hook.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, *more]
    hook.restype = None

    def call(x, *numbers):
        x = np.ascontiguousarray(x, takes)
        out = np.empty(x.shape, returns)
        hook(x.ctypes.data, x.size, out.ctypes.data, *numbers)
        return out

    return call


normal = _mapped("normal", np.uint32, np.float32)
gap = _mapped("gap", np.uint32, np.int32)
ln = _mapped("ln", np.float32, np.float32)
upper_quantile = _mapped("upper_quantile", np.float32, np.float32)
hazard_quantile = _mapped("hazard_quantile", np.float32, np.float32)
word_bound = _mapped("word_bound", np.float32, np.int32, _REACH_AND_EPSILON)
time_bound = _mapped("time_bound", np.float32, np.float32, _REACH_AND_EPSILON)


def philox(*counter_and_key):
    out = (ctypes.c_uint32 * 4)()
    _LIBRARY.topk_fast_philox((ctypes.c_uint32 * 6)(*counter_and_key), out)
    return tuple(out)


def plan(n_classes, k):
    out = (ctypes.c_int64 * 4)()
    _LIBRARY.topk_fast_plan(ctypes.c_int64(n_classes), ctypes.c_int64(k), out)
    every_class, *numbers = out
    return None if every_class else tuple(numbers)
