"""The decode kernels against float64 references: interpreted, or on a GPU if there is one."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from based.generation import Engine, EngineConfig, Sampling
from based.mixers.mamba import Mamba
from based.models import Decoder, DecoderConfig
from based.models.decoder import RMSNorm
from based.ops import elementwise, elementwise_decode, kernels
from based.ops.gated_short_convolution.decode import convolution_step_kernel
from based.ops.gated_short_convolution.reference import gated_short_convolution_reference
from based.ops.rotary import inverse_frequencies, rotate
from based.ops.sliding_window_attention import decode as attention
from based.ops.softmax_attention.reference import softmax_attention_reference
from based.ops.taylor_linear_attention import decode as taylor
from based.ops.taylor_linear_attention import fold, halves
from based.ops.taylor_linear_attention.decode import taylor_step_kernel
from based.ops.taylor_linear_attention.features import key_features
from based.ops.taylor_linear_attention.reference import taylor_linear_attention_reference
from based.ops.token_sampling import Outbox, SamplingRows, sample_tokens
from based.ops.token_sampling import decode as sampling
from based.ops.token_sampling.decode import sample_tokens_kernel
from based.ops.token_sampling.reference import sample_tokens_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Largest error relative to the largest value.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("based.ops.kernels.INTERPRETING", DEVICE.type == "cpu")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(device=DEVICE, dtype=dtype)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    error = (got.double() - want.double()).abs().max() / want.double().abs().max()
    assert error <= tolerance, f"differs by {error:.2e}"


def taylor_state(rows: int, heads: int, K: int, V: int) -> tuple[Tensor, Tensor]:
    """What twenty earlier tokens leave, float64."""
    phi = key_features(draw(rows, 20, heads, K, dtype=torch.float64))
    values = draw(rows, 20, heads, V, dtype=torch.float64)
    return torch.einsum("bthf,bthv->bhfv", phi, values), phi.sum(1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("K", "V"), [(16, 64), (16, 112), (5, 3), (8, 20)])
def test_taylor_step(K: int, V: int, dtype: torch.dtype) -> None:
    rows, heads = 2, 3
    numerator, denominator = taylor_state(rows, heads, K, V)
    state = numerator.float(), denominator.float()
    for _ in range(3):
        q, k, v = (draw(rows, heads, D, dtype=dtype) for D in (K, K, V))
        wide = (x.double()[:, None] for x in (q, k, v))
        want, numerator, denominator = taylor_linear_attention_reference(
            *wide, numerator, denominator
        )
        close(taylor_step_kernel(q, k, v, *state), want[:, 0], TOLERANCE[dtype])
    close(state[0], numerator, 1e-6)
    close(state[1], denominator, 1e-6)


def test_taylor_step_reads_slices_and_stores_bfloat16() -> None:
    q, k, v = draw(2, 3 * (16 + 16 + 64)).split([48, 48, 192], dim=1)
    q, k, v = (x.unflatten(1, (3, -1)) for x in (q, k, v))
    numerator, denominator = taylor_state(2, 3, 16, 64)
    numerator = numerator.bfloat16()
    want, after, _ = taylor_linear_attention_reference(
        *(x.double()[:, None] for x in (q, k, v)), numerator.double(), denominator
    )
    close(taylor_step_kernel(q, k, v, numerator, denominator.float()), want[:, 0], 2e-6)
    # The interpreter cuts where a GPU rounds: one unit in the last place.
    close(numerator, after, 2**-7)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("K", "V", "halved"),
    [(16, 64, False), (16, 112, False), (24, 20, False), (16, 112, True), (8, 20, True)],
)
@pytest.mark.parametrize("many", [True, False])
def test_deferred_taylor_step_at_every_phase(
    many: bool, K: int, V: int, halved: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows whose rings fill in different steps; slots not yet taken hold garbage."""
    monkeypatch.setattr(taylor, "MANY", 0 if many else 512)
    monkeypatch.setattr(fold, "PROGRAMS", 3)
    monkeypatch.setattr(fold, "MOST_ROWS", 2)
    rows, heads, R = 3, 2, 4
    numerator, denominator = taylor_state(rows, heads, K, V)
    state = numerator.float(), denominator.float()
    tolerance = TOLERANCE[dtype]
    if halved:
        state, tolerance = (halves.split(state[0]), state[1]), 1.2e-2
    ring = [draw(rows, R, heads, D, dtype=dtype) for D in (K, V)]
    seen = torch.tensor([0, 4, 8], device=DEVICE)
    for step in range(2 * R + 1):
        q, k, v = (draw(rows, heads, D, dtype=dtype) for D in (K, K, V))
        wide = (x.double()[:, None] for x in (q, k, v))
        want, numerator, denominator = taylor_linear_attention_reference(
            *wide, numerator, denominator
        )
        got = taylor_step_kernel(q, k, v, *state, *ring, seen)
        close(got, want[:, 0], tolerance)
        if step in (R - 1, 2 * R - 1):
            close(halves.join(state[0]) if halved else state[0], numerator, 1e-6)
            close(state[1], denominator, 1e-6)
        seen += 1


@pytest.mark.parametrize("many", [True, False])
def test_a_step_reads_upper_halves_as_the_reference_does(
    many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taylor, "MANY", 0 if many else 512)
    state = [x.float() for x in taylor_state(2, 3, 16, 20)]
    ring = [draw(2, 4, 3, D) for D in (16, 20)]
    inputs = [draw(2, 3, D) for D in (16, 16, 20)]
    seen = torch.tensor([1, 3], device=DEVICE)
    cut, norm = halves.split(state[0]), state[1].clone()

    def step(numerator: Tensor, denominator: Tensor) -> Tensor:
        return taylor_step_kernel(*inputs, numerator, denominator, *(x.clone() for x in ring), seen)

    want = step(halves.read(cut), state[1].clone())
    close(step(cut, norm), want, 2e-6)
    step(*state)
    # The fold sees all bits.
    assert torch.equal(halves.join(cut), state[0])
    assert torch.equal(norm, state[1])


def test_a_full_ring_folds_its_row_alone() -> None:
    state = [x.float() for x in taylor_state(2, 1, 16, 8)]
    before = [x.clone() for x in state]
    ring = [draw(2, 4, 1, D) for D in (16, 8)]
    inputs = [draw(2, 1, D) for D in (16, 16, 8)]
    taylor_step_kernel(*inputs, *state, *ring, torch.tensor([3, 2], device=DEVICE))
    for now, then in zip(state, before, strict=True):
        assert (now[0] != then[0]).any()
        assert torch.equal(now[1], then[1])


class OnGpu(Tensor):
    is_cuda = True


def test_state_is_read_before_the_wait_in_a_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    x = torch.zeros(1).as_subclass(OnGpu)
    assert kernels.overlap(x)["OVERLAP"]
    assert not kernels.overlap(x, reads_state=True)["OVERLAP"]
    with kernels.one_step():
        assert kernels.overlap(x, reads_state=True)["OVERLAP"]
    assert not kernels.overlap(x, reads_state=True)["OVERLAP"]


class FakeStream:
    """Writes down for whom it waits."""

    device = "cuda"

    def __init__(self, name: str, log: list[tuple[str, str]]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append((self.name, other.name))


def test_what_runs_aside_has_ended_when_the_step_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes after all before it, starts no earlier, and outside of a step takes its turn."""
    log: list[tuple[str, str]] = []
    main, side = FakeStream("main", log), FakeStream("side", log)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(kernels, "_side_stream", lambda device: side)
    x = torch.zeros(1).as_subclass(OnGpu)
    with kernels.one_step():
        with kernels.aside(x):
            assert log == [("side", "main")]
            assert not kernels.overlap(x)["OVERLAP"]
        assert kernels.overlap(x)["OVERLAP"]
        assert log == [("side", "main")]
        with kernels.aside(torch.zeros(1)):
            assert len(log) == 1
    assert log == [("side", "main"), ("main", "side")]
    with kernels.aside(x):
        assert kernels.overlap(x)["OVERLAP"]
    assert len(log) == 2


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("D", "R"), [(112, 56), (20, 3), (16, 0)])
@pytest.mark.parametrize(
    ("group", "tile"), [(1, None), (1, "WIDE"), (1, "THIN"), (1, "SLIM"), (2, None), (4, None)]
)
def test_attention_step_in_a_ring(
    D: int,
    R: int,
    group: int,
    tile: str | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole windows, and tiles of them, as few programs read them and as many do."""
    if tile is not None:
        monkeypatch.setattr(attention, "MOST_WHOLE", 0)
    if tile in ("THIN", "SLIM"):
        monkeypatch.setattr(attention, "FEW", 0)
        monkeypatch.setattr(attention, "_tile_of", lambda *_: getattr(attention, tile))
    rows, heads, slots = 2, 4, 3
    frequencies = inverse_frequencies(D, 2 * R / D).to(DEVICE)
    assert len(frequencies) == R
    # Garbage that a row has not filled yet must not be read.
    keys, values = (
        torch.full((rows, slots, heads // group, D), torch.nan, dtype=dtype, device=DEVICE)
        for _ in range(2)
    )
    seen, history = torch.zeros(rows, dtype=torch.long, device=DEVICE), []
    for step in range(5):
        q = draw(rows, heads, D, dtype=dtype)
        k, v = (draw(rows, heads // group, D, dtype=dtype) for _ in range(2))
        got = attention.attention_step_kernel(q, k, v, keys, values, seen, frequencies)
        turned = [rotate(x.double()[:, None], seen[:, None], frequencies) for x in (q, k)]
        history.append((turned[1].to(dtype).double(), v.double()[:, None]))
        past_keys, past_values = (
            torch.cat(x, dim=1).repeat_interleave(group, dim=2)
            for x in zip(*history[-slots:], strict=True)
        )
        last = torch.full((rows,), past_keys.shape[1] - 1, device=DEVICE)
        want = softmax_attention_reference(turned[0], past_keys, past_values, last)
        close(got, want[:, 0], TOLERANCE[dtype])
        close(keys[:, step % slots], history[-1][0][:, 0], TOLERANCE[dtype])
        seen += 1


def test_tiles_of_windows() -> None:
    """Slots of a tile, of based-360m and based-1.3b at 32 to 1,024 rows of 16 heads."""
    for rows, short, long in ((32, 32, 32), (64, 32, 16), (128, 16, 8), (256, 8, 8), (1024, 8, 4)):
        for width, size in ((64, short), (128, long)):
            assert attention._tile_of(16 * rows, 129, width)["BLOCK_S"] == size
            # A long cache's are the same for all.
            assert attention._tile_of(16 * rows, 4096, width) == attention.TILE


@pytest.mark.parametrize("group", [1, 3])
def test_attention_step_far_out_and_split(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that float32 cannot turn; rows of different lengths read in eight parts."""
    monkeypatch.setattr(attention, "SMALLEST", 4)
    rows, heads, slots, D = 3, 2, 40, 16
    assert attention.split_count(rows * heads, slots) == 8
    frequencies = inverse_frequencies(D).to(DEVICE)
    q, k, v = (draw(rows, heads * size, D) for size in (group, 1, 1))
    keys, values = (draw(rows, slots, heads, D) for _ in range(2))
    seen = torch.tensor([0, 17, 1_000_000_007], device=DEVICE)
    turned_q, turned_k = (rotate(x.double()[:, None], seen[:, None], frequencies) for x in (q, k))
    wide_keys, wide_values = keys.double(), values.double()
    for row in range(rows):
        wide_keys[row, seen[row] % slots], wide_values[row, seen[row] % slots] = (
            turned_k[row, 0],
            v[row].double(),
        )
    every = (x.repeat_interleave(group, dim=2) for x in (wide_keys, wide_values))
    want = softmax_attention_reference(turned_q, *every, seen.clamp(max=slots))
    got = attention.attention_step_kernel(q, k, v, keys, values, seen, frequencies)
    close(got, want[:, 0], 2e-6)
    close(keys, wide_keys, 2e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_convolution_step(width: int, dtype: torch.dtype) -> None:
    projected = draw(2, 3000, dtype=dtype)
    weight, past = draw(1500, width, dtype=dtype), draw(2, width - 1, 1500, dtype=dtype)
    wide = (t.double() for t in (projected[:, None], weight, past))
    want, after = gated_short_convolution_reference(*wide)
    close(
        convolution_step_kernel(*projected.chunk(2, dim=-1), weight, past),
        want[:, 0],
        TOLERANCE[dtype],
    )
    assert torch.equal(past.double(), after)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("parts", [None, (), (4,)])
def test_add_rms_norm(parts: tuple[int, ...] | None, dtype: torch.dtype) -> None:
    x, weight = draw(3, 1792), draw(1792, dtype=dtype)
    branch = None if parts is None else draw(*parts, 3, 1792, dtype=dtype)
    wide = None if branch is None else branch.double()
    want = elementwise.add_rms_norm(x.double(), wide, weight.double(), 1e-5)
    got = elementwise_decode.add_rms_norm_kernel(x, branch, weight, 1e-5)
    close(got[0], want[0], 1e-7)
    close(got[1], want[1], TOLERANCE[dtype])
    assert got[1].dtype == dtype


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("channels", "width"), [(1792, 64), (48, 16), (64, 64)])
def test_an_embedding_and_its_norm_undivided(channels: int, width: int, dtype) -> None:
    table, weight = draw(9, channels, dtype=dtype), draw(channels, dtype=dtype)
    # A column, as of a batch of prompts.
    tokens = torch.tensor([[8, 1], [0, 1], [3, 1], [3, 1]], device=DEVICE)[:, 0]
    want = elementwise.embed_with_squares(tokens, table.double(), weight.double(), width)
    got = elementwise_decode.embed_with_squares_kernel(tokens, table, weight, width)
    alone = elementwise_decode.embed_kernel(tokens, table)
    assert alone.dtype == got[0].dtype == torch.float32
    for x in (alone, got[0], elementwise.embed(tokens, table.double())):
        assert torch.equal(x.double(), table[tokens].double())
    assert torch.equal(want[0], table[tokens].double())
    close(got[1], want[1], TOLERANCE[dtype])
    close(got[2], want[2], 1e-6)
    assert got[1].dtype == dtype
    assert got[2].is_contiguous()
    for strange in (9, -1):
        x = elementwise_decode.embed_kernel(torch.tensor([strange, 8], device=DEVICE), table)
        assert x[0].isnan().all()
        assert torch.equal(x[1].double(), table[8].double())


@pytest.mark.parametrize("mixer", ["gated_convolution", "sliding_window_attention"])
def test_prompts_take_kernels_between_products_and_training_does_not(mixer, monkeypatch) -> None:
    """The parallel form without gradients, against float64, and how many kernels it is."""
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48}
    options = {"sliding_window_attention": {"num_heads": 2, "window": 5}}
    config = DecoderConfig(**sizes, mixers=(mixer,), mixer_options=options, initializer_range=0.3)
    model, wide = Decoder(config).to(DEVICE), Decoder(config).to(DEVICE, torch.float64)
    wide.load_state_dict(model.state_dict())
    calls = []
    for name in ("add_rms_norm_kernel", "swiglu_kernel"):
        kernel = getattr(elementwise_decode, name)
        monkeypatch.setattr(
            elementwise_decode, name, lambda *x, f=kernel, n=name: calls.append(n) or f(*x)
        )
    tokens = torch.randint(60, (2, 7), device=DEVICE)
    with torch.no_grad():
        got, want = model(tokens)[0], wide(tokens)[0]
    close(got, want, 1e-5)
    assert calls == ["add_rms_norm_kernel"] * 2 + ["swiglu_kernel", "add_rms_norm_kernel"]
    model(tokens)[0].square().sum().backward()
    wide(tokens)[0].square().sum().backward()
    assert len(calls) == 4
    for one, other in zip(model.parameters(), wide.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        close(one.grad, other.grad, 1e-4)


def test_a_norm_reads_rows_that_lie_apart() -> None:
    norm = RMSNorm(32, 1e-5).to(DEVICE)
    x, branch = (draw(2, 7, 64, dtype=torch.float32)[..., :32] for _ in range(2))
    with torch.no_grad():
        got = norm(x), *norm.added(x, branch)
        norm.double()
        want = norm(x.double()), *norm.added(x.double(), branch.double())
    for one, other in zip(got, want, strict=True):
        close(one, other, 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu(dtype: torch.dtype) -> None:
    x = draw(3, 2 * 1100, dtype=dtype)
    close(elementwise_decode.swiglu_kernel(x), elementwise.swiglu(x.double()), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("few", "scanned"), [(0, False), (16, False), (0, True)])
def test_sampling_draws_the_reference_s_tokens(
    few: int, scanned: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ties, cuts of every kind, rows that are not finite; the last rows are greedy."""
    monkeypatch.setattr(sampling, "FEW", few)
    rows, vocab = 16, 150
    logits = (3 * draw(rows, vocab)).to(dtype)
    logits[4:9] = logits[4:9].round()
    logits[2, 7], logits[3, 149], logits[5, 0] = torch.nan, torch.inf, -torch.inf
    temperature = torch.linspace(0.2, 2.5, rows)
    temperature[-3:] = 0
    top_k = torch.tensor([150, 1, 20, 150, 7, 5, 3, 40, 150, 11, 150, 150, 2, 150, 10, 150])
    top_p = torch.tensor(
        [1.0, 1.0, 0.5, 1.0, 0.7, 1.0, 0.99, 0.9, 0.6, 1e-9, 0.95, 1, 1, 1, 0.5, 1]
    )
    seed = torch.randint(-(2**62), 2**62, (rows,))
    position = torch.randint(0, 2**40, (rows,))
    options = [x.to(DEVICE) for x in (temperature, top_k, top_p, seed, position.clone())]
    want, want_logprobs = sample_tokens_reference(logits, *options)
    got, logprobs = torch.zeros_like(options[3]), torch.zeros(rows, device=DEVICE)
    peaks = peaks_of(logits, 50) if scanned else None
    sample_tokens_kernel(logits, *options, got, logprobs, peaks=peaks, block=64)
    assert torch.equal(options[-1].cpu(), position + 1)
    assert got.tolist() == want.tolist()
    assert logprobs.isnan().tolist() == [row in (2, 3, 5) for row in range(rows)]
    torch.testing.assert_close(logprobs, want_logprobs, equal_nan=True)


def peaks_of(logits: Tensor, width: int) -> Tensor:
    """What `sample_tokens` takes, of each `width` logits."""
    parts = logits.float().unflatten(1, (-1, width))
    finite = parts.isfinite()
    parts = parts.where(finite, 0)
    peak, place = parts.max(-1)
    total = (parts - peak[..., None]).exp().sum(-1)
    ids = place + width * torch.arange(parts.shape[1], device=logits.device)
    bits = ids.int().view(torch.float32)
    return torch.stack([peak, total, bits, (~finite).sum(-1).float()], dim=-1)


def test_what_is_drawn_waits_on_the_host_for_two_steps() -> None:
    """Whatever numbers of rows follow each other; an outbox that is gone leaves its memory."""
    outbox, vocab, before = Outbox(6, DEVICE), 40, None
    for number, size in enumerate((3, 6, 1, 6, 6, 2, 2, 5)):
        logits = draw(size, vocab, dtype=torch.float32)
        count = torch.full((size,), number, device=DEVICE)
        real, whole = torch.ones(size, device=DEVICE), torch.full_like(count, vocab)
        rows = SamplingRows(real, whole, real, count, count.clone())
        drawn = sample_tokens(logits, rows, outbox=outbox)
        outbox.count_step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        assert torch.equal(outbox.last().first(size).bits, drawn.bits.cpu())
        if before is not None:
            assert torch.equal(*before)
        before = outbox.last().first(size).bits, drawn.bits.cpu()
    kept = outbox.bits.data_ptr()
    del outbox, before
    assert Outbox(6, DEVICE).bits.data_ptr() == kept


def test_the_engine_on_kernels_draws_what_the_reference_draws() -> None:
    """The whole path, dispatch included; the start-up check runs on the kernels too."""
    linear, window = "taylor_linear_attention", "sliding_window_attention"
    config = DecoderConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        mixers=("gated_convolution", linear, window, "softmax_attention"),
        mixer_options={
            linear: {"num_heads": 1, "feature_dim": 8},
            window: {"num_heads": 1, "window": 3},
            "softmax_attention": {"num_heads": 2, "num_kv_heads": 1},
        },
        initializer_range=0.5,
    )
    model = Decoder(config).to(DEVICE)
    greedy = Sampling(temperature=0.0, max_new_tokens=6)
    sampled = Sampling(temperature=1.2, top_k=20, max_new_tokens=3, seed=3)

    def tokens(post: bool = False) -> list[list[int]]:
        engine = Engine(model, EngineConfig(slots=2, max_length=64, recent=3))
        if post:
            engine._decode._outbox = Outbox(2, DEVICE)
        requests = [engine.submit([1, 2, 3], sampled), engine.submit([4], greedy)]
        while engine.busy:
            engine.step()
        return [request.tokens for request in requests]

    got = tokens()
    if DEVICE.type == "cpu":  # on a GPU it was so already
        assert tokens(post=True) == got
    # float64 has no kernels.
    model.double()
    assert tokens() == got


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_mamba_s_step(dtype: torch.dtype) -> None:
    """The whole mixer, kernels against float64."""
    mixer = Mamba(24, state_size=5).to(DEVICE, dtype)
    wide = Mamba(24, state_size=5).to(DEVICE).double()
    wide.load_state_dict(mixer.state_dict())
    state, exact = mixer.init_state(3), wide.init_state(3)
    for _ in range(6):
        x = 3 * draw(3, 24, dtype=dtype)
        close(mixer.step(x, state), wide.step(x.double(), exact), 2 * TOLERANCE[dtype])
    close(state["h"], exact["h"], 2 * TOLERANCE[dtype])
    close(state["conv"], exact["conv"], TOLERANCE[dtype])
