"""Triton kernels of the operators: a module of its name for each, imported when it first runs."""
