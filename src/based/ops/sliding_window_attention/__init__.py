"""Exact softmax attention over a small sliding window (paper section 4.1).

`window` is the number of keys a query sees, itself included: query t sees the
keys t - window + 1 .. t. The other conventions in use:

    Hugging Face `sliding_window` W    ->  window = W
    flash-attn `window_size=(w, 0)`    ->  window = w + 1
    official Based `window_size` W     ->  window = W // 2 + 1   (`window_from_official`)
"""

from based.ops.sliding_window_attention.operator import sliding_window_attention
from based.ops.sliding_window_attention.step import attention_step


def window_from_official(window_size: int) -> int:
    """Keys a query sees under the official configs: window_size // 2 past ones and itself."""
    return window_size // 2 + 1


__all__ = ["attention_step", "sliding_window_attention", "window_from_official"]
