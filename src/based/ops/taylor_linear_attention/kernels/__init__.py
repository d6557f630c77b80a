"""Triton kernels: three passes, each parallel over the sequence.

`states.py` sums what each segment of 256 tokens adds to the state, `outputs.py`
reads the state before a segment and attends exactly inside it, `gradients.py`
goes the same way back. Features are made on chip and never written to memory.
"""
