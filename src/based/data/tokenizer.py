"""Byte-level BPE: any text goes in and comes out again, byte for byte."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from based.errors import BasedError

END_OF_TEXT = "<|endoftext|>"
# The 256 bytes and the end-of-text token.
SMALLEST_VOCABULARY = 257


class Tokenizer:
    """A tokenizer file (`tokenizer.json`) with an end-of-text token."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        eos_id = inner.token_to_id(END_OF_TEXT)
        if eos_id is None:
            raise BasedError(f"the tokenizer has no {END_OF_TEXT} token; it cannot end a document")
        self._inner, self.eos_id = inner, eos_id

    @staticmethod
    def load(path: str | Path) -> Tokenizer:
        """Reads a tokenizer file, or the one in a directory."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.exists():
            raise BasedError(f"there is no tokenizer {path}")
        try:
            return Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
        except BasedError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise BasedError(f"{path} is not a tokenizer file: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer file."""
        self._inner.save(str(path))

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens in the text are read as plain text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on all cores."""
        self._inner.encode_special_tokens = True
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for; a special token's are its name."""
        piece = self._inner.id_to_token(token)
        if piece is None or token == self.eos_id:
            return (piece or "").encode()
        return bytes(_BYTE_OF[character] for character in piece)


class StreamDecoder:
    """Turns tokens into text as they come; a character is emitted once it is complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character."""
        return self._decoder.decode(b"", final=True)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns a byte-level BPE vocabulary of exactly `vocab_size`, or fewer if the text is small."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise BasedError(
            f"vocab_size is {vocab_size}; the 256 bytes and {END_OF_TEXT} "
            f"need at least {SMALLEST_VOCABULARY}"
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(_BYTE_OF),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner)


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's character for each byte: printable Latin-1 stands for itself."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
