"""The fused projections against float64: interpreted, or on a GPU if there is one."""

import pytest
import torch
from test_decode_kernels import DEVICE, TOLERANCE, close, draw
from torch import Tensor, nn
from torch.nn import functional as F

from based.generation.quantization import quantize_step, quantize_weights
from based.models import Decoder, DecoderConfig, DecoderState
from based.ops import few_rows_linear, kernels
from based.ops.elementwise import add_rms_norm
from based.ops.few_rows_linear import Projected, Residual, decode
from based.ops.few_rows_linear import residual as residual_module
from based.ops.few_rows_linear.tiles import divide, whole_tile
from based.ops.gated_short_convolution.reference import gated_short_convolution_reference


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("based.ops.kernels.INTERPRETING", DEVICE.type == "cpu")


def residual(rows: int, C: int, dtype: torch.dtype, with_branch: bool = True) -> Residual:
    branch = draw(rows, C, dtype=dtype) if with_branch else None
    return Residual(draw(rows, C), branch, draw(C, dtype=dtype), 1e-5)


def layer_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)
    return layer


def product_of(x: Tensor, layer: nn.Linear, counter: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a norm would make of the layer's output, and the bias that is left to it."""
    branch = few_rows_linear.linear(x, layer, counter)
    assert isinstance(branch, Projected)
    return residual_module.product(branch)


def exact(given: Residual) -> tuple[Tensor, Tensor]:
    """The sum and its norm in float64."""
    branch = given.branch.double() if isinstance(given.branch, Tensor) else None
    return add_rms_norm(given.x.double(), branch, given.weight.double(), given.eps)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize(("C", "sizes"), [(16, (5,)), (200, (8, 24, 33)), (1792, (16, 16, 112))])
def test_projections_of_a_norm(rows: int, C: int, sizes: tuple, dtype: torch.dtype) -> None:
    given, weights = residual(rows, C, dtype), [draw(n, C, dtype=dtype) for n in sizes]
    bias = draw(sum(sizes), dtype=dtype)
    want, normed = exact(given)
    total, got = few_rows_linear.norm_linear(given, weights, bias)
    close(total, want, 1e-6)
    close(got, F.linear(normed, torch.cat(weights).double(), bias.double()), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 4])
def test_swiglu_of_a_norm(rows: int, dtype: torch.dtype) -> None:
    given, weight = residual(rows, 96, dtype, with_branch=False), draw(2 * 37, 96, dtype=dtype)
    total, got = few_rows_linear.norm_linear_swiglu(given, layer_of(weight))
    assert total is given.x
    value, gate = F.linear(exact(given)[1], weight.double()).chunk(2, dim=-1)
    close(got, value * F.silu(gate), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_convolution_of_a_norm(width: int, dtype: torch.dtype) -> None:
    rows, C, N = 3, 64, 21
    weight, bias = draw(2 * N, C, dtype=dtype), draw(2 * N, dtype=dtype)
    taps, past = draw(N, width, dtype=dtype), draw(rows, width - 1, N, dtype=dtype)
    wide = past.double()
    for _ in range(2):
        given = residual(rows, C, dtype)
        y = F.linear(exact(given)[1], weight.double(), bias.double())
        want, wide = gated_short_convolution_reference(y[:, None], taps.double(), wide)
        layer = layer_of(weight, bias)
        got = few_rows_linear.norm_linear_convolution(given, layer, taps, past)[1]
        close(got, want[:, 0], 2 * TOLERANCE[dtype])
        if width > 1:
            close(past, wide, TOLERANCE[dtype])


def test_a_plain_product_counts_the_token() -> None:
    layer, x = nn.Linear(48, 30).to(DEVICE), draw(3, 48)
    counter = torch.tensor([5, 0, 2**40], device=DEVICE)
    got = few_rows_linear.linear(x, layer, counter)
    close(got, F.linear(x.double(), layer.weight.double(), layer.bias.double()), 2e-6)
    assert counter.tolist() == [6, 1, 2**40 + 1]


@pytest.mark.parametrize("rows", [1, 2])
def test_weights_larger_than_a_program_s_registers(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "MOST", 8)
    monkeypatch.setattr(decode, "MOST_OF_SEVERAL", 8)
    layer, x = nn.Linear(48, 5, bias=False).to(DEVICE), draw(rows, 48)
    close(few_rows_linear.linear(x, layer), F.linear(x.double(), layer.weight.double()), 2e-6)


def eight_bits(*shape: int, precision: str, bias: bool = False) -> tuple[nn.Linear, Tensor]:
    """A quantised layer, and the weight that it stands for."""
    layer = nn.Linear(shape[1], shape[0], bias=bias).to(DEVICE, torch.bfloat16)
    quantize_weights(nn.ModuleList([layer]), precision)
    assert few_rows_linear.readable(layer)
    return layer, layer.weight.qdata.double() * layer.weight.scale.double()


@pytest.mark.parametrize("precision", ["int8", "float8"])
@pytest.mark.parametrize("rows", [1, 3])
def test_eight_bit_weights(rows: int, precision: str) -> None:
    given = residual(rows, 96, torch.bfloat16)
    layers, weights = zip(
        *(eight_bits(n, 96, precision=precision) for n in (16, 8, 33)), strict=True
    )
    _, normed = exact(given)
    for got, weight in zip(few_rows_linear.norm_linears(given, layers)[1], weights, strict=True):
        close(got, F.linear(normed, weight), TOLERANCE[torch.bfloat16])
    layer, weight = eight_bits(2 * 37, 96, precision=precision, bias=True)
    value, gate = F.linear(normed, weight, layer.bias.double()).chunk(2, dim=-1)
    got = few_rows_linear.norm_linear_swiglu(given, layer)[1]
    close(got, value * F.silu(gate), TOLERANCE[torch.bfloat16])
    x = draw(rows, 96, dtype=torch.bfloat16)
    want = F.linear(x.double(), weight, layer.bias.double())
    close(few_rows_linear.linear(x, layer), want, TOLERANCE[torch.bfloat16])
    plain = nn.Linear(96, 16, bias=False).to(DEVICE, torch.bfloat16)
    assert not few_rows_linear.fuses(given, plain, layers[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [5, 16, 33, 100, 128])
def test_a_product_in_parts(rows: int, dtype: torch.dtype) -> None:
    layer, x = nn.Linear(512, 128).to(DEVICE, dtype), draw(rows, 512, dtype=dtype)
    counter = torch.arange(rows, device=DEVICE)
    got, bias = product_of(x, layer, counter)
    assert bias is None
    assert got.shape == (8, rows, 128)
    assert got.dtype == torch.float32
    bias = layer.bias.double()
    close(got.double().sum(0), F.linear(x.double(), layer.weight.double(), bias), 2e-6)
    assert torch.equal(counter, torch.arange(1, rows + 1, device=DEVICE))


@pytest.mark.parametrize(
    ("outputs", "channels", "want"),
    [
        (1792, 3584, (64, 4)),
        (1792, 1792, (64, 4)),
        (1024, 2048, (32, 4)),
        (1664, 1664, (32, 2)),
        (100, 512, None),
        (1024, 72, None),
        (50264, 1792, None),
    ],
)
def test_parts_fill_a_gpu(outputs: int, channels: int, want: tuple[int, int] | None) -> None:
    assert divide(outputs, channels) == want


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [5, 33, 128])
@pytest.mark.parametrize("bias", [False, True])
def test_swiglu_in_tiles(bias: bool, rows: int, dtype: torch.dtype) -> None:
    layer, x = nn.Linear(192, 2 * 48, bias=bias).to(DEVICE, dtype), draw(rows, 192, dtype=dtype)
    value, gate = nn.Linear.forward(layer.double(), x.double()).chunk(2, dim=-1)
    got = few_rows_linear.linear_swiglu(x, layer.to(dtype))
    close(got, value * F.silu(gate), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(5, 3), (33, 1), (128, 2), (17, 4)])
def test_a_convolution_in_tiles(rows: int, width: int, dtype: torch.dtype) -> None:
    N, layer = 64, nn.Linear(128, 128).to(DEVICE, dtype)
    taps, past = draw(N, width, dtype=dtype), draw(rows, width - 1, N, dtype=dtype)
    wide = past.double()
    for _ in range(width + 1):
        x = draw(rows, 128, dtype=dtype)
        y = F.linear(x.double(), layer.weight.double(), layer.bias.double())
        want, wide = gated_short_convolution_reference(y[:, None], taps.double(), wide)
        got = few_rows_linear.linear_convolution(x, layer, taps, past)
        close(got, want[:, 0], 2 * TOLERANCE[torch.bfloat16])
        if width > 1:
            close(past, wide, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("sizes", [(32, 32, 96), (64, 32), (64,)])
@pytest.mark.parametrize("rows", [5, 100])
def test_layers_side_by_side(rows: int, sizes: tuple[int, ...]) -> None:
    dtype = torch.bfloat16
    x = draw(rows, 128, dtype=dtype)
    layers = [nn.Linear(128, size, bias=False).to(DEVICE, dtype) for size in sizes]
    got = few_rows_linear.linears(x, layers)
    # Views of one tensor: it was one launch.
    assert {y.untyped_storage().data_ptr() for y in got} == {got[0].data_ptr()}
    for y, layer in zip(got, layers, strict=True):
        close(y, F.linear(x.double(), layer.weight.double()), TOLERANCE[dtype])


def test_whole_tiles() -> None:
    assert whole_tile(1792, 7168) == 64
    assert whole_tile(1024, 4096) == 32
    assert whole_tile(4096, 22016) == 64
    assert whole_tile(1792, 256, 256, 1792) == 32
    assert whole_tile(192, 96) == 32
    assert whole_tile(192, 64, 100) is None
    assert whole_tile(72, 128) is None


@pytest.mark.parametrize(("rows", "dtype"), [(129, torch.bfloat16), (5, torch.float32)])
def test_other_products_are_whole(rows: int, dtype: torch.dtype) -> None:
    layer, x = nn.Linear(512, 128).to(DEVICE, dtype), draw(rows, 512, dtype=dtype)
    counter = torch.zeros(rows, dtype=torch.long, device=DEVICE)
    got, bias = product_of(x, layer, counter)
    assert bias is layer.bias
    assert torch.equal(got, F.linear(x, layer.weight))
    assert bool((counter == 1).all())
    given = residual(rows, 128, dtype, with_branch=False)
    total, y = few_rows_linear.normed(given._replace(branch=few_rows_linear.linear(x, layer)))
    want = given.x.double() + F.linear(x.double(), layer.weight.double(), layer.bias.double())
    close(total, want, TOLERANCE[dtype])
    close(y, exact(given._replace(x=want))[1], TOLERANCE[dtype])


def test_only_few_rows_and_plain_layers_are_fused() -> None:
    class Adapted(nn.Module):
        """As peft wraps a layer, whose weight it shows as its own."""

        weight = nn.Linear(8, 8).weight

    few, many = residual(4, 8, torch.float32), residual(5, 8, torch.float32)
    assert few_rows_linear.fuses(few, nn.Linear(8, 8))
    assert not few_rows_linear.fuses(many, nn.Linear(8, 8))
    assert not few_rows_linear.fuses(few, nn.Linear(8, 8), Adapted())
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised))
    assert not few_rows_linear.fuses(few, layer)


@pytest.mark.parametrize(
    ("rows", "dtype", "few"),
    [(2, torch.bfloat16, True), (3, torch.bfloat16, False), (4, torch.float32, True)],
)
def test_a_wide_stream_takes_tensor_cores_from_three_rows(
    rows: int, dtype: torch.dtype, few: bool, monkeypatch
) -> None:
    """Where Hopper's products, which take two, are not at hand."""
    monkeypatch.setattr(kernels, "HOPPER", False)
    with DEVICE:
        layers = [nn.Linear(1792, size, bias=False, dtype=dtype) for size in (256, 1792)]
        given = Residual(torch.empty(rows, 1792), None, torch.empty(1792, dtype=dtype), 1e-5)
    assert few_rows_linear.fuses(given, *layers) == few


class Quantised(Tensor):
    """As torchao's weights: a tensor that is more than its numbers."""


def model() -> Decoder:
    linear, window, softmax = (
        "taylor_linear_attention",
        "sliding_window_attention",
        "softmax_attention",
    )
    config = DecoderConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        mixers=("gated_convolution", linear, window, softmax, "gated_linear_attention"),
        mixer_options={
            linear: {"num_heads": 2, "feature_dim": 4},
            window: {"num_heads": 2, "window": 3, "bias": True},
            softmax: {"num_heads": 2, "num_kv_heads": 1},
        },
        initializer_range=0.3,
    )
    return Decoder(config).to(DEVICE)


@pytest.mark.parametrize("recent", [0, 3])
def test_a_step_of_few_rows_is_the_step_of_many(recent: int, monkeypatch) -> None:
    """Logits and every tensor of the state, fused and not, and in float64."""
    given = model()
    states = [given.init_state(2, 8, recent) for _ in range(2)]
    wide = model().double()
    wide.load_state_dict(given.state_dict())
    states.append(wide.init_state(2, 8, recent))
    for step in range(4):
        tokens = torch.tensor([step, 7 * step + 1], device=DEVICE)
        got = []
        for most, of, state in zip((4, 0, 4), (given, given, wide), states, strict=True):
            monkeypatch.setattr("based.ops.few_rows_linear.projections.MOST_ROWS", most)
            got.append(of.step(tokens, state))
        close(got[0], got[2], 1e-5)
        close(got[1], got[2], 1e-5)
        for other in (states[1], states[2]):
            same(states[0], other)


def test_a_wide_step_is_the_step_of_plain_layers(monkeypatch) -> None:
    """Few rows in tiles, whose parts reach the head."""
    rows = 3
    choices = "based.ops.few_rows_linear.projections."
    monkeypatch.setattr(choices + "WIDE", 256)
    linear, window = "taylor_linear_attention", "sliding_window_attention"
    config = DecoderConfig(
        vocab_size=50,
        hidden_size=256,
        intermediate_size=128,
        mixers=("gated_convolution", linear, window),
        mixer_options={linear: {"num_heads": 4}, window: {"num_heads": 4, "window": 3}},
        initializer_range=0.1,
    )
    given = Decoder(config).to(DEVICE, torch.bfloat16)
    states = [given.init_state(rows, 8, 3) for _ in range(2)]
    for step in range(2):
        tokens = torch.arange(rows, device=DEVICE) + 7 * step
        got = []
        for most, tiles, state in ((4, 128, states[0]), (0, 0, states[1])):
            monkeypatch.setattr(choices + "MOST_ROWS", most)
            monkeypatch.setattr("based.ops.few_rows_linear.residual.MOST_ROWS_IN_TILES", tiles)
            got.append(given.step(tokens, state))
        close(got[0], got[1], 3e-2)


@pytest.mark.parametrize("precision", ["int8", "float8"])
def test_a_step_with_eight_bit_weights(precision: str, monkeypatch) -> None:
    """Few rows by our kernels, uncompiled, against float64 with the weights that they stand for."""

    def never(*_: object) -> None:
        raise AssertionError("compiled code ran")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: never)
    given, wide = model(), model().double()
    quantize_step(given, precision)
    wide.load_state_dict({name: dequantised(x) for name, x in given.state_dict().items()})
    states = given.init_state(2, 8), wide.init_state(2, 8)
    for token in range(3):
        tokens = torch.tensor([token, 7 * token + 1], device=DEVICE)
        close(given.step(tokens, states[0]), wide.step(tokens, states[1]), 1e-5)
    with pytest.raises(AssertionError, match="compiled code ran"):
        given.step(torch.zeros(5, dtype=torch.long, device=DEVICE), given.init_state(5, 8))


def dequantised(x: Tensor) -> Tensor:
    return x.qdata.double() * x.scale.double() if hasattr(x, "qdata") else x.double()


def same(got: DecoderState, want: DecoderState) -> None:
    for a, b in zip(got, want, strict=True):
        for name in b:
            torch.testing.assert_close(a[name].to(b[name].dtype), b[name], rtol=1e-4, atol=1e-4)
