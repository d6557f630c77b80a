"""LayerNorm and RMSNorm whose weights may differ from row to row of a batch: lanes as one batch."""

from based.ops.row_norm.operator import layer_norm, rms_norm

__all__ = ["layer_norm", "rms_norm"]
