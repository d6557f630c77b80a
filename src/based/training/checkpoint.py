"""Checkpoints: torch.distributed.checkpoint directories, published by rename.

`checkpoints/step-00000200/` holds the distributed checkpoint and `manifest.json`,
which names every file with its size and checksum. A directory without a manifest
that fits is not a checkpoint, and the one before it is used.
"""

from __future__ import annotations

import json
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from based.errors import BasedError
from based.files import published

MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints of one run, of which the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first; damaged ones included."""
        found = self.folder.glob("step-*")
        return sorted(int(path.name.removeprefix("step-")) for path in found)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes the state after `step` steps, then removes checkpoints that are too old."""
        with published(self._path(step)) as folder, warnings.catch_warnings():
            # One process needs no process group; the library warns that there is none.
            warnings.simplefilter("ignore")
            try:
                dcp.save(state, checkpoint_id=folder, no_dist=True)
            except dcp.api.CheckpointException as error:
                raise _cause(error) from error
            (folder / MANIFEST).write_text(json.dumps({"step": step, "files": _files(folder)}))
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self._path(old))

    def load_newest(self, state: dict[str, Any], warn: Callable[[str], None]) -> int:
        """Reads the newest sound checkpoint into `state`'s tensors; returns its step, or 0.

        Damaged ones are passed over with a warning. Raises `BasedError` if there
        are checkpoints and all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            damage = self._damage(step)
            if damage is None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    dcp.load(state, checkpoint_id=self._path(step), no_dist=True)
                return step
            warn(f"checkpoint of step {step} is damaged ({damage}); trying the one before")
        if steps:
            raise BasedError(
                f"all checkpoints in {self.folder} are damaged; remove them to begin anew"
            )
        return 0

    def remove_unfinished(self) -> None:
        """Removes what a killed process left half written; nobody else may be writing."""
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint; None if all its files are as they were written."""
        path = self._path(step)
        try:
            wanted = json.loads((path / MANIFEST).read_text())["files"]
            for name, (size, checksum) in wanted.items():
                if (path / name).stat().st_size != size:
                    return f"{name} is not {size} bytes long"
                if _checksum(path / name) != checksum:
                    return f"{name} has another checksum"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return str(error)
        return None


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and checksum of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_size, _checksum(p)) for p in files}


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _cause(error: dcp.api.CheckpointException) -> BaseException:
    """The error of the first rank that failed: an OSError if the disk was the reason."""
    return next(iter(error.failures.values()))[0]
