"""The selective scan of Mamba (arXiv 2312.00752, section 3), a diagonal state for each channel.

    h_t = exp(delta_t A) h_(t-1) + delta_t x_t B_t^T        y_t = h_t C_t

h_t is [D, N]: every channel has N decay rates of its own, so that, unlike in
linear attention, no product of matrices stands for a chunk: it is a scan.
"""

from based.ops.selective_scan.chunked import selective_scan
from based.ops.selective_scan.step import selective_scan_step

__all__ = ["selective_scan", "selective_scan_step"]
