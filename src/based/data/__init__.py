"""Text to tokens: the tokenizer, token shards, and the order in which training reads them."""

from based.data.batches import Windows
from based.data.shards import TokenDataset
from based.data.tokenizer import StreamDecoder, Tokenizer, train_tokenizer

__all__ = ["StreamDecoder", "TokenDataset", "Tokenizer", "Windows", "train_tokenizer"]
