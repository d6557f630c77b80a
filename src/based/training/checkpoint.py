"""Checkpoints: torch.distributed.checkpoint directories, published by rename.

`checkpoints/step-00000200/` holds the distributed checkpoint, a part from every
rank, and `manifest.json`, which names every file with its size and checksum. A
directory without a manifest that fits is not a checkpoint, and the one before it is
used. Writing goes on beside the next steps; weights are copied before they change.
"""

from __future__ import annotations

import json
import shutil
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from based.errors import BasedError
from based.files import not_saved, published
from based.training.parallel import Ranks

MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints of one run, of which the newest `keep` stay.

    All ranks of the job call the same methods; rank 0 publishes, and the folder is
    one that all ranks see.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks) -> None:
        self.folder, self.keep, self.ranks = folder, keep, ranks
        self._publisher = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None
        # One process needs no process group; the library warns, in its thread, of there being none.
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first; damaged ones included."""
        found = self.folder.glob("step-*")
        return sorted(int(path.name.removeprefix("step-")) for path in found)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begins to write the state after `step` steps; `wait` says how it went.

        Waits for the save before it. Then removes checkpoints that are too old.
        """
        self.wait()
        stack, folder = ExitStack(), self._path(step)
        if self.ranks.rank == 0:
            folder = stack.enter_context(published(folder))
        folder = self.ranks.from_first(folder)
        written = dcp.async_save(
            state,
            checkpoint_id=folder,
            process_group=self.ranks.checkpoint_group,
            no_dist=self.ranks.size == 1,
        )
        assert isinstance(written, Future)
        self._pending = self._publisher.submit(self._publish, step, folder, stack, written)

    def wait(self) -> None:
        """Returns once the last save is on the disk; raises `BasedError` if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def newest(self, warn: Callable[[str], None]) -> int:
        """Step of the newest sound checkpoint, or 0; damaged ones are passed over with a warning.

        Raises `BasedError` if there are checkpoints and all are damaged.
        """
        step = self.ranks.from_first(self._newest(warn) if self.ranks.rank == 0 else 0)
        if step < 0:
            raise BasedError(
                f"all checkpoints in {self.folder} are damaged; remove them to begin anew"
            )
        return step

    def load(self, step: int, state: dict[str, Any]) -> None:
        """Reads the checkpoint into `state`'s tensors."""
        dcp.load(
            state,
            checkpoint_id=self._path(step),
            process_group=self.ranks.checkpoint_group,
            no_dist=self.ranks.size == 1,
        )

    def remove_unfinished(self) -> None:
        """Removes what a killed process left half written; nobody else may be writing."""
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _publish(self, step: int, folder: Path, stack: ExitStack, written: Future[Any]) -> None:
        """Once all ranks have written: manifest, rename, and the oldest checkpoint goes."""
        with stack:
            try:
                written.result()
            except dcp.api.CheckpointException as error:
                if self.ranks.rank == 0:
                    raise _cause(error) from error
                raise not_saved(self._path(step), _cause(error)) from error
            if self.ranks.rank == 0:
                manifest = json.dumps({"step": step, "files": _files(folder)})
                (folder / MANIFEST).write_text(manifest)
        if self.ranks.rank == 0:
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self._path(old))

    def _newest(self, warn: Callable[[str], None]) -> int:
        """The newest sound checkpoint's step; 0 if there are none, -1 if all are damaged."""
        steps = self.steps()
        for step in reversed(steps):
            damage = self._damage(step)
            if damage is None:
                return step
            warn(f"checkpoint of step {step} is damaged ({damage}); trying the one before")
        return -1 if steps else 0

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
