"""Documents from a Hugging Face dataset, streamed or local."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from based.data.documents import Piece, cut
from based.errors import BasedError

# What `save_to_disk` leaves in a directory, for one split and for several.
SAVED = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class HubDataset:
    """A dataset by its name, a directory of its files, or one that `save_to_disk` wrote."""

    name: str
    subset: str | None = None
    split: str = "train"
    field: str = "text"
    streaming: bool = True

    def read(self) -> Iterator[Piece]:
        """Its documents, one a row. Raises `BasedError` where it cannot be read."""
        try:
            for row in self._rows():
                if not isinstance(row.get(self.field), str):
                    raise BasedError(
                        f"dataset {self.name} has no text column {self.field!r}; its columns "
                        f"are {', '.join(row)} (--field)"
                    )
                yield from cut(io.StringIO(row[self.field], newline=""))
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise BasedError(f"could not read dataset {self.name}: {reason}") from error

    def _rows(self) -> Iterator[Any]:
        try:
            import datasets
        except ImportError:
            raise BasedError(
                "Hugging Face datasets are not installed; `pip install 'based[data]'`"
            ) from None
        saved = any((Path(self.name) / name).exists() for name in SAVED)
        if saved:
            found = datasets.load_from_disk(self.name)
            rows: Any = found[self.split] if isinstance(found, datasets.DatasetDict) else found
            return iter(rows)
        return iter(
            datasets.load_dataset(
                self.name, self.subset, split=self.split, streaming=self.streaming
            )
        )
