"""Operators: one folder each, with the mathematics in `reference.py` and fast paths beside it.

Shape legend, used in every annotation below `based.ops`:

    B  batch            T  time (tokens)       H  heads
    K  feature_dim      F  packed features     V  value head_dim
    D  head_dim         P  past keys           C  channels
    N  sequences in a packed batch          E  their N + 1 boundaries

A packed batch holds several sequences end to end in one row, `[1, T, ...]`;
`cu_seqlens [E]` are their boundaries, and state tensors have N rows.
"""
