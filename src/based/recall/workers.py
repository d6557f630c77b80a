"""Where jobs run: in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue

from based.errors import BasedError
from based.processes import end_with_parent
from based.recall.results import Row
from based.recall.sweep import Job, Submit, work

# Points side by side on one GPU: while one records or waits for its host, another computes.
# More fill it no better, and all end later.
JOBS_PER_GPU = 3
# The device of a worker process.
_own_device = "cpu"


def local_devices(device: str) -> list[str]:
    """Every GPU of the machine for `cuda`, otherwise the one device."""
    import torch

    from based.models.device import pick_device

    picked = pick_device(device)
    if picked.type != "cuda" or picked.index is not None:
        return [str(picked)]
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def default_jobs(devices: list[str]) -> int:
    """Enough jobs to fill the GPUs, or the cores."""
    return JOBS_PER_GPU * len(devices) if devices[0].startswith("cuda") else cores()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def local_workers(jobs: int, devices: Sequence[str] = ("cpu",)) -> Iterator[Submit]:
    """Processes of this machine, as many on each device; one that is free takes the next job."""
    context = get_context("spawn")
    free = context.SimpleQueue()
    for number in range(jobs):
        free.put(devices[number % len(devices)])
    pool = ProcessPoolExecutor(jobs, context, _take_device, (free,))
    try:
        yield lambda job: pool.submit(_work_on_own_device, job)
    finally:
        pool.shutdown(cancel_futures=True)


def _take_device(free: SimpleQueue[str]) -> None:
    global _own_device
    _own_device = free.get()
    # A sweep that is killed takes its workers along: the next one trains their points.
    end_with_parent()


def _work_on_own_device(job: Job) -> list[Row] | None:
    return work(job, _own_device)


@contextmanager
def ray_workers(address: str, device: str = "cpu") -> Iterator[Submit]:
    """Workers of a Ray cluster (`auto`, `local`, or host:port); needs the extra `ray`.

    Running points are put aside in the sweep's directory, which all nodes must see.
    """
    try:
        import ray
    except ImportError as error:
        raise BasedError("--ray needs the package ray: pip install 'based[ray]'") from error
    _check_reachable(address)
    try:
        ray.init(address, log_to_driver=False, configure_logging=False, include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BasedError(f"no Ray cluster at {address!r}: {error}") from error
    remote = ray.remote(work)

    def submit(job: Job) -> Future[list[Row] | None]:
        needs = {"num_gpus": 1 / JOBS_PER_GPU} if device == "cuda" else {"num_cpus": 1}
        return remote.options(**needs).remote(job, device).future()

    try:
        yield submit
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Refuses a host:port where nobody listens; Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise BasedError(f"no Ray cluster at {address!r}: {error}") from error
