"""Triton kernels, installed as ``topk_fast.triton_kernels``."""
