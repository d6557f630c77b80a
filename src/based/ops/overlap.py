"""The device's half of programmatic dependent launch; the host's is `kernels.overlap`."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):
    """For a kernel that reads before it waits: what is asked for first delays the next kernel."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def only_wait(OVERLAP: tl.constexpr):
    """Where a kernel that has read ahead goes on, or one that lets the next start later waits."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Lets the next kernel start, then waits until the one before has ended and is visible.

    Every kernel launched with `overlap` calls this, or waits by `only_wait`, so that "the one
    before" implies all before it. Only what no kernel of a step writes may be read earlier.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
