"""Text to token ids, in this process or in several, in the order it came."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from based.data.documents import Piece
from based.data.tokenizer import Tokenizer
from based.processes import end_with_parent

Batch = tuple[Piece, ...]
# Batches under way for each process: enough that none waits, few enough for memory.
AHEAD = 4

_tokenizer: Tokenizer | None = None


def encode(
    batches: Iterator[Batch], tokenizer: Tokenizer, processes: int
) -> Iterator[tuple[Batch, list[np.ndarray]]]:
    """Each batch with the token ids of its pieces."""
    if processes == 1:
        for batch in batches:
            yield batch, _ids(tokenizer, [piece.text for piece in batch])
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _start, (tokenizer,)) as pool:
        under_way: deque[tuple[Batch, Future[list[np.ndarray]]]] = deque()
        try:
            for batch in batches:
                under_way.append((batch, pool.submit(_encode, [piece.text for piece in batch])))
                if len(under_way) > AHEAD * processes:
                    first, future = under_way.popleft()
                    yield first, future.result()
            for batch, future in under_way:
                yield batch, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    return [np.array(ids, dtype=np.uint32) for ids in tokenizer.encode_batch(texts)]


def _start(tokenizer: Tokenizer) -> None:
    """In a worker: the tokenizer stays, and keeps to one core; a killed command ends it."""
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = tokenizer
    end_with_parent()


def _encode(texts: list[str]) -> list[np.ndarray]:
    assert _tokenizer is not None
    return _ids(_tokenizer, texts)
