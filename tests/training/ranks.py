"""Runs a function on several gloo ranks of this machine, as torchrun would."""

import os
import queue
import socket
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import Any

CONTEXT = get_context("forkserver")
# The server imports once; a rank is a fork of it.
CONTEXT.set_forkserver_preload(["torch", "based.training.trainer", "based.data.prepare"])


def start(
    size: int, function: Callable[..., Any], *arguments: Any
) -> tuple[list[BaseProcess], Any]:
    """The ranks' processes, running, and the queue of (rank, result, error)."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    results = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=_rank, args=(rank, size, port, results, function, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes, results


def run(
    size: int, function: Callable[..., Any], *arguments: Any, seconds: float = 100
) -> list[Any]:
    """What the function returned on each rank; a rank's error fails the caller."""
    processes, results = start(size, function, *arguments)
    found: dict[int, Any] = {}
    try:
        while len(found) < size:
            rank, result, error = results.get(timeout=seconds)
            assert error is None, f"rank {rank}: {error}"
            found[rank] = result
    except queue.Empty:
        raise AssertionError(f"no answer from ranks {set(range(size)) - set(found)}") from None
    finally:
        for process in processes:
            process.join(0 if len(found) < size else 20)
            process.kill()
    return [found[rank] for rank in range(size)]


def _rank(
    rank: int, size: int, port: int, results: Any, function: Callable[..., Any], arguments: Any
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        results.put((rank, function(*arguments), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
