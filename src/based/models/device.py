"""Which device to compute on, and how data gets there."""

import torch
from torch import Tensor

from based.errors import BasedError


def pick_device(name: str) -> torch.device:
    """The named device; `auto` is a GPU if there is one. Raises `BasedError` if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BasedError(f"device {name!r} cannot be used here: {reason}") from error
    return device


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that does not wait for what the device is doing."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
