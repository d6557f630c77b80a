"""Triton kernels of sliding-window attention over whole sequences, forward and backward."""
