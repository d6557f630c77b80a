"""Reads a checkpoint, from a directory or the Hugging Face hub. Never runs pickled code."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from torch import Tensor

from based.errors import BasedError
from based.models.checkpoint import (
    CONFIG,
    INDEX,
    TOKENIZER,
    WEIGHTS,
    read_json,
    read_safetensors,
    shards,
)

PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# In the order in which they are looked for.
FORMS = (WEIGHTS, INDEX, PICKLED, PICKLED_INDEX)


class Source:
    """A checkpoint's files: `name` is a directory, or a repository of the hub at `revision`."""

    def __init__(self, name: str, revision: str | None = None) -> None:
        self.name, self.revision = name, revision
        self.is_local = Path(name).exists()
        self.where = "there" if self.is_local else "there, or the hub cannot be reached"

    def file(self, name: str) -> Path | None:
        """The file's path, downloaded if need be; None if the checkpoint has no such file."""
        if self.is_local:
            path = Path(self.name) / name
            return path if path.exists() else None
        try:
            return Path(hf_hub_download(self.name, name, revision=self.revision))
        except EntryNotFoundError:
            return None
        except HFValidationError:
            raise BasedError(
                f"there is no directory {self.name}, nor can the hub have it"
            ) from None
        except (HfHubHTTPError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise BasedError(f"could not get {name} of {self.name}: {reason}") from error

    def config(self) -> dict[str, Any]:
        """What `config.json` holds."""
        path = self.file(CONFIG)
        if path is None:
            raise BasedError(f"no checkpoint in {self.name}: {CONFIG} is missing {self.where}")
        return read_json(path)

    def tokenizer(self) -> Path | None:
        """Its `tokenizer.json`, if it has one."""
        return self.file(TOKENIZER)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the checkpoint, by the name it has there."""
        for form in FORMS:
            path = self.file(form)
            if path is not None:
                return dict(self._read(form, path))
        raise BasedError(f"no weights in {self.name}: none of {', '.join(FORMS)} is {self.where}")

    def _read(self, form: str, path: Path) -> Iterator[tuple[str, Tensor]]:
        for name in shards(read_json(path), path) if form.endswith(".json") else [form]:
            file = self.file(name)
            if file is None:
                raise BasedError(f"{self.name} lacks {name}, which {form} names")
            read = read_safetensors if name.endswith(".safetensors") else read_pickled
            yield from read(file)


def read_pickled(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file of `torch.save`; code in it is refused, not run."""
    try:
        # A plain zip archive can stay on the disk until a tensor is used.
        found = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise BasedError(
            f"{path} is no plain file of tensors, and code in it is not run; look for safetensors "
            "(--revision), or save its state dict alone"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise BasedError(f"{path} is damaged or truncated: {_first_line(error)}") from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise BasedError(f"{path} is not a state dict")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            raise BasedError(f"{path} is not a state dict: {name} is no tensor")
        yield str(name), tensor


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
