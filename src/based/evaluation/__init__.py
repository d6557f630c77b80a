"""Evaluation: perplexity, split into what recall can predict and the rest."""

from based.evaluation.perplexity import (
    Difference,
    Perplexity,
    Share,
    evaluate,
    paired_difference,
    recall_hits,
)

__all__ = ["Difference", "Perplexity", "Share", "evaluate", "paired_difference", "recall_hits"]
