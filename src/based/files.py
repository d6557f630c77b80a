"""Directories that appear whole or not at all, and that one process holds at a time."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from based.errors import BasedError


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """A new directory to write in, put in the place of `path` only when all went well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _sync(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        _sync_one(path.parent)
    except OSError as error:
        if old.exists() and not path.exists():
            old.rename(path)
        raise not_saved(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def held(folder: Path, use: str) -> Iterator[None]:
    """Holds `folder`; a process that finds it held gets one line, of what the other's `use` is."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BasedError(f"another process is {use} {folder}") from None
        yield


def not_saved(path: Path, error: BaseException) -> BasedError:
    """What to tell the user if `error` kept `path` from being written."""
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    reason = "the disk is full" if full else str(error)
    return BasedError(f"could not save {path}: {reason}; what was there is kept")


def _sync(folder: Path) -> None:
    """Forces the directory's files to the disk, before a rename makes them count."""
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
