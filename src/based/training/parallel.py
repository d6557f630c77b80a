"""The processes of one job: torchrun's ranks, or this process alone.

A rank is one of data_ranks x context_parallel: ranks of a row share the tokens of
their sequences, and rows have sequences of their own. Weights, gradients and the
optimiser's state are sharded over all ranks (FSDP2).
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from based.errors import BasedError
from based.models import Decoder
from based.models.device import pick_device

T = TypeVar("T")


def job_ranks() -> int:
    """How many ranks the launcher (torchrun, or Slurm as in docs/training.md) started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_job(device: str) -> torch.device:
    """Meets the other ranks if a launcher started several; returns this rank's device."""
    here = pick_device(device)
    if job_ranks() == 1:
        return here
    if here.type == "cuda":
        here = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(here)
    dist.init_process_group(_backend(here))
    return here


def lost_contact(error: BaseException) -> str | None:
    """What the network said if the error means that another rank is gone."""
    text = str(error)
    signs = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
    known = isinstance(error, dist.DistError) or any(sign in text for sign in signs)
    # Without the library's own source line before, and its advice behind.
    line = next(iter(text.splitlines()), "")
    reason = line[line.find("] ") + 2 if line.startswith("[") else 0 :].split(". ")[0]
    return reason if known and job_ranks() > 1 else None


class Ranks:
    """This rank's place among all, and what all do together."""

    def __init__(
        self, device: torch.device, context_parallel: int = 1, shards: int | None = None
    ) -> None:
        self.device = device
        joined = dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        for name, count in (("context_parallel", context_parallel), ("shards", shards or 1)):
            if self.size % count:
                raise BasedError(
                    f"{name} is {count}, which does not divide the job's {self.size} ranks"
                )
        self.data_rank, self.data_ranks = (
            self.rank // context_parallel,
            self.size // context_parallel,
        )
        self._shards = shards or self.size
        self.context_group: dist.ProcessGroup | None = None
        if context_parallel > 1:
            mesh = self._mesh(self.data_ranks, context_parallel)
            self.context_group = mesh.get_group(1)
        # Collectives of a checkpoint run beside those of the steps.
        group: Any = dist.new_group(backend="gloo") if self.size > 1 else None
        self.checkpoint_group: dist.ProcessGroup | None = group

    def sum(self, *values: torch.Tensor | float) -> list[float]:
        """Each value summed over all ranks."""
        wide = [torch.as_tensor(value, dtype=torch.float64) for value in values]
        total = torch.stack([value.to(self.device) for value in wide])
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all ranks, in place; does not wait for one that is on the device."""
        if self.size > 1:
            on_device = tensor.to(self.device)
            dist.all_reduce(on_device)
            tensor.copy_(on_device)
        return tensor

    def from_first(self, value: T) -> T:
        """Rank 0's value, on every rank, once all have asked."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.checkpoint_group)
        return box[0]

    def shard_weights(self, model: Decoder, dtype: torch.dtype) -> None:
        """Shards float32 weights over the ranks, gathered block by block in `dtype`.

        One rank computing in float32 keeps the plain model. Gradients are summed, not
        averaged, in float32. Once gathered, weights stay until the step's last backward.
        """
        if self.size == 1 and dtype == torch.float32:
            return
        if not dist.is_initialized():
            dist.init_process_group(
                _backend(self.device), store=dist.HashStore(), rank=0, world_size=1
            )
        mesh = self._mesh(self.size // self._shards, self._shards)
        mesh = mesh if self._shards < self.size else mesh["inner"]
        policy = MixedPrecisionPolicy(
            param_dtype=dtype if dtype != torch.float32 else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # the residual stream is float32
        )
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
            assert isinstance(module, FSDPModule)
            if self.size > 1:
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        register_fsdp_forward_method(model, "loss")

    def _mesh(self, outer: int, inner: int) -> DeviceMesh:
        return init_device_mesh(self.device.type, (outer, inner), mesh_dim_names=("outer", "inner"))


def _backend(device: torch.device) -> str:
    # Checkpoints and objects travel over gloo.
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
