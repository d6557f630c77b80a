"""What a GPU would launch, counted on tensors without data.

Tensors of the meta device have shapes alone: what looks at data, waits for the device or copies
from the host is an error there, as it would be while a graph is captured.
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NO_LAUNCH = {
    *("alias", "as_strided", "detach", "empty", "empty_like", "expand", "new_empty", "permute"),
    *("select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind"),
    *("unsqueeze", "view", "_unsafe_view", "_reshape_alias", "lift_fresh"),
}


class Launches(TorchDispatchMode):
    """Counts what would be nodes of a graph, and refuses tensors that are not on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if is_tensor(x)]
        assert all(x.is_meta for x in tensors), f"{func} reads the host's memory"
        name = func._schema.name.removeprefix("aten::")
        if name not in NO_LAUNCH:
            self.nodes[name] += 1
        return func(*args, **(kwargs or {}))


def is_tensor(x: object) -> bool:
    return isinstance(x, torch.Tensor)
