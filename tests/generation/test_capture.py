"""What a GPU captures of a decode step, seen without one: launches on tensors without data.

See `launches.py`.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launches import Launches

from based.generation import EngineConfig
from based.generation.step import DecodeStep
from based.mixers.taylor_linear_attention import TaylorLinearAttention
from based.models import Decoder, preset
from based.models.presets import PRESETS
from based.ops.few_rows_linear import hopper

PAGE = Path(__file__).parents[2] / "docs" / "generation.md"


def step_nodes(
    name: str, rows: int, launches: Launches, recent: int = EngineConfig.recent
) -> Counter[str]:
    with torch.device("meta"):
        model = Decoder(preset(name)).bfloat16()
    state = model.init_state(rows, 1024, recent)
    for layer in state:
        layer.room = float("inf")
    step = DecodeStep(model, state, [rows], graphs=False)
    step.run(rows)  # fills caches, as the warm-up before a capture does
    launches.nodes.clear()
    with launches:
        step.run(rows)
    return launches.nodes


@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize("name", PRESETS)
def test_no_step_looks_at_data(name: str, rows: int, launches: Launches) -> None:
    nodes = step_nodes(name, rows, launches)
    assert nodes.total() > 0
    assert nodes["_sample_kernel"] == 1


def test_a_step_that_waits_is_found(launches: Launches) -> None:
    """The reference path of the deferred step asks whether any ring is full."""
    mixer = TaylorLinearAttention(16, num_heads=1).to("meta", torch.float64)
    state = mixer.init_state(2, recent=3)
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta tensors"):
        mixer.step(torch.zeros(2, 16, device="meta", dtype=torch.float64), state)


def test_a_step_of_one_row_is_few_launches(launches: Launches) -> None:
    """Two a convolution layer and two an MLP, three an attention layer, four around them."""
    nodes = step_nodes("based-1.3b", 1, launches)
    assert nodes.total() == 22 * 2 + 14 * 3 + 36 * 2 + 4, nodes
    assert nodes["_linear_kernel"] == 22 * 2 + 14 * 2 + 36 * 2 + 1
    assert f"{nodes.total()} kernels a token" in PAGE.read_text()


def test_a_step_of_many_rows_fuses_what_stands_between_products(launches: Launches) -> None:
    nodes = step_nodes("based-1.3b", 128, launches)
    products = nodes["mm"] + nodes["addmm"] + nodes["_tile_kernel"]
    assert products == 22 * 2 + 7 * 2 + 7 * 2 + 36 * 2 + 1
    # With SwiGLU, with a convolution, in parts, of q, k and v.
    assert nodes["_tile_kernel"] == 36 + 22 + 72 + 7
    # Norms, kernels of attentions, folds, embedding, sampling.
    assert nodes.total() - products == 73 + 14 + 7 + 2, nodes
    assert f"a step of many rows has {nodes.total()}." in PAGE.read_text()


def test_on_hopper_norms_are_in_the_products(launches: Launches, monkeypatch) -> None:
    def kernel(name: str, *_: object, **__: object) -> Callable[..., None]:
        return lambda *_, **__: launches.nodes.update([name])

    monkeypatch.setattr(hopper, "runs", lambda device: True)
    monkeypatch.setattr(hopper, "_kernel", kernel)
    monkeypatch.setattr(hopper, "_logits_kernel", lambda *_: kernel("product_logits"))
    monkeypatch.setattr(hopper.cuda, "tensor_map", lambda *_: 0)
    nodes = step_nodes("based-1.3b", 128, launches)
    assert nodes["product_back"] == 36 + 22 + 14
    assert nodes["product_gated"] == 36 + 22
    assert nodes["product_side_by_side"] == 14
    assert nodes["product_logits"] == nodes["_embed_kernel"] == nodes["_sample_kernel"] == 1
    assert nodes.total() == 36 + 22 + 14 + 36 + 22 + 14 + 14 + 7 + 3
    page = " ".join(PAGE.read_text().split())
    assert f"So a step of many rows has {nodes.total()} kernels there." in page
