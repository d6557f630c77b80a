"""What the device can do at best, what a run makes of it, and how it tells."""

import torch
from torch import Tensor

# Dense bfloat16 operations a second by the vendors' data sheets, in the order they are looked for.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "MI300X": 1307e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Bfloat16 operations a second of the device; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes allocated on a GPU so far; None on other devices."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


class OnItsWay:
    """Numbers on a device whose copy to the host is under way; the host need not wait."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._arrived = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def collect(self) -> list[float]:
        """The numbers, once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()
