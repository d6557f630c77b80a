"""Products of up to 128 rows in CUDA C++: against float64, emulated on a CPU and on such a GPU."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from based.models import Decoder, DecoderConfig
from based.ops import kernels
from based.ops.few_rows_linear import (
    Projected,
    Residual,
    fuses,
    hopper,
    normed,
    projections,
    residual,
)
from based.ops.few_rows_linear import linear as project
from based.ops.gated_short_convolution.reference import gated_short_convolution_reference
from tests.ops.emulation import COMPILER, emulate
from tests.ops.test_taylor_hopper import IS_HOPPER, with_nvcc

DEVICE = torch.device("cuda" if IS_HOPPER else "cpu")
BF16 = torch.bfloat16
somewhere = pytest.mark.skipif(
    not IS_HOPPER and (COMPILER is None or torch.cuda.is_available()),
    reason="needs a GPU of compute capability 9.0, or g++ and no GPU",
)
EPS = 1e-5


@pytest.fixture
def on_hopper(monkeypatch, tmp_path_factory) -> Iterator[Callable[[bool], None]]:
    """Runs Hopper's kernels there, or emulates it. What was not written is NaN."""
    folder = tmp_path_factory.getbasetemp() / "emulated"
    folder.mkdir(exist_ok=True)
    torch.use_deterministic_algorithms(True, warn_only=True)

    def forget() -> None:
        hopper._kernel.cache_clear()
        hopper._logits_kernel.cache_clear()

    def begin(late: bool = False) -> None:
        forget()
        if not IS_HOPPER:
            emulate(monkeypatch, folder, late)

    yield begin
    torch.use_deterministic_algorithms(False)
    forget()


def draw(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape)).to(DEVICE, dtype)


def layer_of(channels: int, outputs: int, bias: bool) -> nn.Linear:
    return nn.Linear(channels, outputs, bias=bias).to(DEVICE, BF16)


def exact(layer: nn.Linear, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x.double(), layer.weight.double(), bias)


def close(got: Tensor, want: Tensor, limit: float) -> None:
    error = (got.double() - want).norm() / want.norm()
    assert error <= limit, f"{error:.1e} > {limit:.1e}"


def scaled_of(rows: int, channels: int) -> tuple[hopper.Scaled, Tensor]:
    """A norm's output but for the division, and with it."""
    x, gain = draw(rows, channels, dtype=torch.float32), draw(channels)
    scaled = (x * gain).to(BF16)
    squares = x.square().unflatten(1, (channels // 64, 64)).sum(2).T.contiguous()
    rms = (x.double().square().mean(1, keepdim=True) + EPS).sqrt()
    return hopper.Scaled(scaled, squares, EPS), scaled.double() / rms


@somewhere
@pytest.mark.parametrize(
    ("rows", "outputs", "channels", "late"),
    [
        (2, 64, 256, False),
        (5, 128, 512, False),
        (33, 64, 192, True),
        (70, 64, 640, False),
        (128, 128, 256, True),
        (32, 64, 2560, True),
        (32, 64, 2560, False),
    ],
)
def test_back_to_the_residual_stream(rows, outputs, channels, late, on_hopper) -> None:
    """Four parts, two or one; more steps than are in flight; with and without bias and counter."""
    on_hopper(late)
    layer, x = layer_of(channels, outputs, bias=rows != 33), draw(rows, channels)
    stream, gain = draw(rows, outputs, dtype=torch.float32), draw(outputs)
    counter = torch.arange(rows, device=DEVICE) if rows != 70 else None
    projection = x, layer.weight, layer.bias, counter
    total, (scaled, squares, eps) = hopper.project_back(*projection, stream, gain, EPS)
    want = stream.double() + exact(layer, x)
    close(total, want, 1e-6)
    close(scaled, want * gain.double(), 3e-3)
    assert squares.shape == (outputs // 64, rows)
    close(squares, want.square().unflatten(1, (-1, 64)).sum(2).T, 1e-6)
    assert eps == EPS
    if counter is not None:
        assert torch.equal(counter, torch.arange(1, rows + 1, device=DEVICE))


@somewhere
def test_a_row_s_bits_depend_on_no_other_row(on_hopper) -> None:
    """Nor on its place, whichever program finishes it."""
    on_hopper()
    layer, x, gain = layer_of(512, 64, bias=True), draw(128, 512), draw(64)
    stream, order = draw(128, 64, dtype=torch.float32), torch.randperm(128, device=DEVICE)
    runs = [
        hopper.project_back(given, layer.weight, layer.bias, None, residual, gain, EPS)
        for given, residual in ((x, stream), (x[order], stream[order]))
    ]
    (first, one), (second, other) = runs
    assert torch.equal(first[order], second)
    assert torch.equal(one.x[order], other.x)
    assert torch.equal(one.squares[:, order], other.squares)


@somewhere
@pytest.mark.parametrize(
    ("rows", "bias", "late"), [(5, True, True), (33, False, False), (128, True, True)]
)
def test_swiglu_of_a_norm(rows: int, bias: bool, late: bool, on_hopper) -> None:
    on_hopper(late)
    scaled, normed = scaled_of(rows, 192)
    layer = layer_of(192, 128, bias)
    value, gate = exact(layer, normed).chunk(2, dim=-1)
    got = hopper.project_gated(scaled, layer.weight, layer.bias)
    close(got, value * F.silu(gate), 4e-3)


@somewhere
@pytest.mark.parametrize(("rows", "width"), [(5, 3), (33, 1), (128, 2), (17, 4), (70, 3)])
def test_a_convolution_of_a_norm(rows: int, width: int, on_hopper) -> None:
    """In two parts, of 48 rows too, where a program's last 32 are not all its own."""
    on_hopper()
    layer = layer_of(128, 128, bias=True)
    taps, past = draw(64, width), draw(rows, width - 1, 64)
    wide = past.double()
    for _ in range(width + 1):
        scaled, normed = scaled_of(rows, 128)
        y = exact(layer, normed)
        want, wide = gated_short_convolution_reference(y[:, None], taps.double(), wide)
        got = hopper.project_gated(scaled, layer.weight, layer.bias, taps, past)
        close(got, want[:, 0], 1e-2)
        if width > 1:
            close(past, wide, 4e-3)


@somewhere
@pytest.mark.parametrize(
    ("rows", "sizes"), [(5, (64, 128, 192)), (100, (128, 64)), (5, (64,)), (100, (64, 64, 64))]
)
def test_layers_side_by_side(rows: int, sizes: tuple[int, ...], on_hopper) -> None:
    on_hopper()
    scaled, normed = scaled_of(rows, 256)
    layers = [layer_of(256, size, bias=len(sizes) == 1) for size in sizes]
    got = hopper.project_side_by_side(scaled, [y.weight for y in layers], layers[0].bias)
    close(got, torch.cat([exact(layer, normed) for layer in layers], dim=1), 4e-3)


@somewhere
@pytest.mark.parametrize(
    ("rows", "outputs", "channels", "late"),
    [
        *((2, 128, 64, True), (3, 640, 64, True), (70, 136, 128, False)),
        *((64, 384, 640, True), (128, 392, 192, True)),
    ],
)
def test_logits_and_what_sampling_looks_for(rows, outputs, channels, late, on_hopper) -> None:
    """Tiles in turn where programs are few; the last one ends with the outputs."""
    on_hopper(late)
    scaled, normed = scaled_of(rows, channels)
    weight = draw(outputs, channels)
    # A row of ties, one that is not finite in two tiles, and one so only there where they overlap.
    scaled.x[0] = 0
    normed[0] = 0
    weight[1, 0] = weight[-1, 0] = torch.inf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper, "SEATS", {1: 2})
        logits, peaks = hopper.project_logits(scaled, weight)
    finite = torch.ones(outputs, dtype=torch.bool)
    finite[[1, -1]] = False
    want = normed @ weight.double().T
    close(logits[1:, finite], want[1:, finite], 4e-3)
    assert not logits[1:, ~finite].isfinite().any()
    assert peaks.shape == (rows, -(-outputs // 128), 4)
    for tile, part in enumerate(logits.float().split(128, dim=1)):
        peak, total, best, strange = peaks[:, tile].unbind(-1)
        assert torch.equal(strange, (~part.isfinite()).sum(-1).float())
        part = part.where(part.isfinite(), 0)
        assert torch.equal(peak, part.amax(-1))
        torch.testing.assert_close(total, (part - peak[:, None]).exp().sum(-1))
        assert torch.equal(best.view(torch.int32), 128 * tile + part.argmax(-1).int())


def test_which_heads_have_logits_of_ours() -> None:
    for vocab, channels, dtype in ((136, 100, BF16), (100, 64, BF16), (130, 64, BF16)):
        assert not hopper.reads_logits(torch.zeros(vocab, channels, dtype=dtype))
    assert not hopper.reads_logits(torch.zeros(136, 64))
    assert hopper.reads_logits(torch.zeros(136, 64, dtype=BF16))


@somewhere
def test_a_step_shares_its_norms(on_hopper, monkeypatch) -> None:
    """A model's steps through these kernels, and without, against float64."""
    on_hopper()
    # On a CPU nothing else is interpreted, but for what is fused beside these kernels.
    for module in (projections, residual):
        monkeypatch.setattr(module, "use_kernels", lambda x: x.element_size() <= 4)
    taylor, window = "taylor_linear_attention", "sliding_window_attention"
    config = DecoderConfig(
        vocab_size=136,
        hidden_size=64,
        intermediate_size=64,
        mixers=("gated_convolution", taylor, window, "gated_linear_attention"),
        mixer_options={
            taylor: {"num_heads": 4, "feature_dim": 16},
            window: {"num_heads": 4, "window": 3, "bias": True},
        },
        initializer_range=0.1,
    )
    with DEVICE:
        model = Decoder(config).to(BF16)
        wide = Decoder(config).double()
    wide.load_state_dict(model.state_dict())
    names = "project_back", "project_gated", "project_side_by_side", "project_logits"
    calls: dict[str, int] = dict.fromkeys(names, 0)
    for name in calls:
        monkeypatch.setattr(hopper, name, counted(getattr(hopper, name), calls, name))
    states = [model.init_state(3, 8, 3), model.init_state(3, 8, 3), wide.init_state(3, 8)]
    for step in range(2):
        tokens = torch.arange(3, device=DEVICE) + 7 * step
        monkeypatch.setattr(kernels, "HOPPER", True)
        with_them = model.step(tokens, states[0])
        before = dict(calls)
        monkeypatch.setattr(kernels, "HOPPER", False)
        without = model.step(tokens, states[1])
        assert calls == before
        want = wide.step(tokens, states[2])
        close(with_them, want, 4e-2)
        close(without, want, 4e-2)
    # Of eight projections back one is a mixer's that projects by itself.
    assert calls == dict(zip(names, (14, 8, 4, 2), strict=True))
    for name in ("seen", "length"):
        for got, kept in zip(*states[:2], strict=True):
            assert name not in kept or torch.equal(got[name], kept[name])


def counted(function: Callable, calls: dict[str, int], name: str) -> Callable:
    def call(*arguments: object, **options: object) -> object:
        calls[name] += 1
        return function(*arguments, **options)

    return call


def test_what_the_kernels_take(monkeypatch) -> None:
    monkeypatch.setattr(hopper.cuda, "is_hopper", lambda device: True)
    x = torch.zeros(5, 128, dtype=BF16)
    with torch.device("cpu"):
        plain = nn.Linear(128, 64, dtype=BF16)
        assert hopper.takes(x, plain)
        assert not hopper.takes(x.half(), plain)
        for layer in (
            nn.Linear(96, 64, dtype=BF16),
            nn.Linear(128, 96, dtype=BF16),
            nn.Linear(128, 64, dtype=torch.float16),
        ):
            assert not hopper.takes(x, plain, layer)
        plain.bias = nn.Parameter(torch.zeros(64))
        assert not hopper.takes(x, plain)
        plain = nn.Linear(128, 64, dtype=BF16)
        plain.weight = nn.Parameter(torch.zeros(64 * 128 + 4, dtype=BF16)[4:].view(64, 128))
        assert not hopper.takes(x, plain)
        monkeypatch.setattr(kernels, "HOPPER", False)
        assert not hopper.takes(x, nn.Linear(128, 64, dtype=BF16))


def test_a_single_row_is_for_other_kernels(monkeypatch) -> None:
    monkeypatch.setattr(projections, "use_kernels", lambda x: True)
    for hoppers in (True, False):
        monkeypatch.setattr(hopper, "runs", lambda device, found=hoppers: found)
        layers = [nn.Linear(64, 64, dtype=BF16), nn.Linear(64, 96, dtype=BF16)]
        for rows, layer, few in ((1, 0, True), (2, 0, not hoppers), (2, 1, True), (5, 1, False)):
            stream = torch.zeros(rows, 64)
            given = Residual(stream, None, torch.ones(64, dtype=BF16), EPS)
            assert fuses(given, layers[layer]) == few


def test_what_nothing_shares_is_projected_by_itself(monkeypatch) -> None:
    """A norm for whoever asks adds up what the projection would have, and counts the token once."""
    monkeypatch.setattr(projections, "use_kernels", lambda x: True)
    layer, x, stream = nn.Linear(36, 20), torch.randn(5, 36), torch.randn(5, 20)
    counter = torch.zeros(5, dtype=torch.long)
    branch = project(x, layer, counter)
    assert isinstance(branch, Projected)
    assert not bool(counter.any())
    total, _ = normed(Residual(stream, branch, torch.ones(20), EPS))
    torch.testing.assert_close(total, stream + layer(x))
    assert bool((counter == 1).all())


@pytest.mark.parametrize(
    ("tiles", "channels", "want"),
    [
        *((28, 3584, 4), (28, 1792, 4), (16, 1024, 4), (31, 1792, 2), (80, 1024, 1)),
        *((112, 1792, 1), (64, 1024, 2), (36, 1792, 2), (36, 960, 1)),
    ],
)
def test_parts_fill_a_gpu_and_no_more(tiles: int, channels: int, want: int) -> None:
    assert hopper._parts(tiles, channels) == want


@pytest.mark.parametrize("block", [32, 64, 96, 128])
@pytest.mark.parametrize("steps", [1, 8, 9, 56])
def test_first_weights_leave_room_for_others(block: int, steps: int) -> None:
    stages, first = hopper._stages(block, steps)
    assert 0 < first < stages


@with_nvcc
@pytest.mark.parametrize("rows", [64, 128])
def test_the_source_of_logits_compiles(rows: int, tmp_path) -> None:
    compile_source(hopper.logits_source(rows, 1792, 50264), tmp_path)


@with_nvcc
@pytest.mark.parametrize("rows", [32, 96, 128])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("name", ["product_back", "product_gated", "product_side_by_side"])
def test_sources_compile_and_keep_their_products_in_flight(name, parts, rows, tmp_path) -> None:
    """Without a register spilled, which would be a stack that no tool has room for."""
    own = {"product_gated": {"WIDTH": 3}, "product_side_by_side": {"SECOND": 256, "THIRD": 512}}
    constants = {"N": 1792, **own.get(name, {})}
    compile_source(hopper.source(name, rows, 1792, parts, 512, **constants), tmp_path)


def compile_source(text: str, folder: Path) -> None:
    source = folder / "kernel.cu"
    source.write_text(text)
    flags = ["-cubin", "-arch=sm_90a", "-std=c++17", "-Xptxas", "-v", "-o", folder / "out"]
    done = subprocess.run(["nvcc", *flags, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "are serialized" not in done.stderr
    assert " 0 bytes spill stores" in done.stderr
