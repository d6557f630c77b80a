"""What tests of captured code share."""

import pytest
from launches import Launches, is_tensor

from based.ops.token_sampling.decode import _sample_kernel


@pytest.fixture
def launches(monkeypatch) -> Launches:
    """The kernels' path, each kernel a count."""
    counted = Launches()

    def launch(kernel, grid):
        def called(*arguments, **options) -> None:
            assert all(x.is_meta for x in arguments if is_tensor(x))
            counted.nodes[kernel.fn.__name__] += 1

        return called

    monkeypatch.setattr("based.ops.kernels.INTERPRETING", True)
    monkeypatch.setattr(type(_sample_kernel), "__getitem__", launch)
    return counted
