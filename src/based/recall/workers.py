"""Where jobs run: in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

from based.errors import BasedError
from based.recall.results import Row
from based.recall.sweep import Job, Submit, work

# Points side by side on one GPU: while one records, tests or waits for its host, another computes.
JOBS_PER_GPU = 2


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
    if devices[0].startswith("cuda"):
        return JOBS_PER_GPU * len(devices)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def local_workers(jobs: int) -> Iterator[Submit]:
    """Processes of this machine."""
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    try:
        yield lambda job: pool.submit(work, job)
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def ray_workers(address: str) -> Iterator[Submit]:
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
        needs = {"num_gpus": 1 / JOBS_PER_GPU} if job.device.startswith("cuda") else {"num_cpus": 1}
        return remote.options(**needs).remote(job).future()

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
