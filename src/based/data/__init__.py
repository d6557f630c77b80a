"""Text to tokens: the tokenizer, token shards, and the order in which training reads them."""

from based.data.batches import Windows
from based.data.mixture import Mixture
from based.data.shards import TokenDataset
from based.data.tokenizer import StreamDecoder, Tokenizer, train_tokenizer

__all__ = ["Mixture", "StreamDecoder", "TokenDataset", "Tokenizer", "Windows", "train_tokenizer"]
