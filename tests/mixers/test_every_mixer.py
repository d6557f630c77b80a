"""One suite over every registered mixer: all its forms are the same function."""

import pytest
import torch
from torch import Tensor, nn

from based.errors import BasedError
from based.mixers import MIXERS, Mixer, State, build_mixer
from based.mixers.packing import Packing

SIZE, BATCH, LENGTH = 24, 2, 45

# Small dials, so that 45 tokens go round the window and past a page of the cache.
OPTIONS: dict[str, list[dict[str, int | float | str]]] = {
    "taylor_linear_attention": [
        {"num_heads": 3, "feature_dim": 4},
        {"num_heads": 2, "feature_dim": 5},
    ],
    "sliding_window_attention": [
        {"num_heads": 2, "window": 7},
        {"num_heads": 3, "window": 1, "rotary_fraction": 0.0, "bias": True},
    ],
    "base_convolution": [{}, {"kernel_size": 1}],
    "hyena": [{"max_length": 320, "filter_size": 4}],
    "h3": [{"state_size": 4, "head_dim": 2}, {"state_size": 2, "head_dim": 1}],
    "gated_convolution": [{}, {"kernel_size": 1}, {"kernel_size": 4, "expand": 1}],
    "linear_attention": [
        # Its denominators can come near zero; with these sizes and seed none does.
        {"num_heads": 2, "feature_dim": 5, "feature_map": "identity"},
        {"num_heads": 3, "feature_dim": 4, "feature_map": "relu"},
        {"num_heads": 2, "feature_dim": 5, "feature_map": "pos_elu"},
        {"num_heads": 1, "feature_dim": 5, "feature_map": "square"},
        {"num_heads": 1, "feature_dim": 5, "feature_map": "all_poly"},
        {"num_heads": 2, "feature_dim": 3, "feature_map": "cosformer", "max_length": 320},
        {"num_heads": 2, "feature_dim": 3, "feature_map": "performer", "num_features": 7},
    ],
    "softmax_attention": [
        {"num_heads": 2},
        {"num_heads": 4, "num_kv_heads": 2, "rotary_fraction": 0.5},
    ],
    "mamba": [{"state_size": 3}],
    "mamba2": [{"state_size": 5, "head_dim": 12}, {"state_size": 8, "head_dim": 8}],
    "rwkv5": [{"head_dim": 4}],
    "rwkv7": [{"head_dim": 4, "decay_rank": 2, "rate_rank": 3, "gate_rank": 4}],
    "gated_linear_attention": [{"num_heads": 3, "decay_rank": 2}],
    "delta_net": [{"num_heads": 6, "conv_size": 3}],
    "gated_delta_net": [
        {"num_heads": 6, "conv_size": 2},
        {"num_heads": 2, "head_dim": 5, "expand_v": 1, "output_gate": False},
    ],
}
CASES = [(name, options) for name in MIXERS for options in OPTIONS.get(name, [{}])]
every_mixer = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{n}-{o}" for n, o in CASES]
)

# Largest difference between two forms, relative to the largest output.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 4e-2}


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("based.mixers.paging.PAGE", 16)


def make(
    name: str, options: dict[str, int | float | str], dtype: torch.dtype = torch.float64
) -> Mixer:
    """A mixer whose weights are large enough that every term matters."""
    mixer = build_mixer(name, SIZE, **options)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=SIZE**-0.5 if parameter.dim() > 1 else 0.3)
    return mixer.to(dtype)


def inputs(dtype: torch.dtype = torch.float64, batch: int = BATCH, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, SIZE, dtype=torch.float64).to(dtype)


def assert_same(got: Tensor, want: Tensor, tolerance: float = 1e-9) -> None:
    assert got.shape == want.shape
    if want.numel():
        error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1)
        assert error <= tolerance, f"differs by {error:.2e}"


def assert_same_state(got: State | None, want: State | None, tolerance: float = 1e-9) -> None:
    assert got is not None
    assert want is not None
    assert got.keys() == want.keys()
    for tensor in want:
        assert_same(got[tensor], want[tensor], tolerance)


def by_steps(mixer: Mixer, x: Tensor, state: State) -> Tensor:
    with torch.no_grad():
        return torch.stack([mixer.step(x[:, t], state) for t in range(x.shape[1])], dim=1)


@every_mixer
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_parallel_is_chunked_prefill_is_token_by_token(name, options, dtype) -> None:
    mixer, x = make(name, options, dtype), inputs(dtype)
    tolerance = TOLERANCE[dtype]
    whole, none = mixer(x)
    assert none is None
    one_go, after = mixer(x, mixer.init_state(BATCH))
    assert_same(one_go, whole, tolerance)

    state, pieces = mixer.init_state(BATCH), []
    for piece in x.split([1, 20, 2, 5, 17], dim=1):
        y, state = mixer(piece, state)
        pieces.append(y)
    assert_same(torch.cat(pieces, dim=1), whole, tolerance)
    assert_same_state(state, after, tolerance)

    state = mixer.init_state(BATCH)
    assert_same(by_steps(mixer, x, state), whole, tolerance)
    assert_same_state(state, after, tolerance)


@every_mixer
@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 65])
def test_odd_lengths_and_steps_after_prefill(name, options, length) -> None:
    mixer, x = make(name, options), inputs(batch=1, length=length + 9)
    whole, _ = mixer(x)
    y, state = mixer(x[:, :length], mixer.init_state(1))
    assert_same(y, whole[:, :length])
    assert_same(by_steps(mixer, x[:, length:], state), whole[:, length:])


@every_mixer
def test_a_state_is_not_changed_by_the_parallel_form(name, options) -> None:
    mixer = make(name, options)
    _, state = mixer(inputs(), mixer.init_state(BATCH))
    before = state.clone()
    mixer(inputs(), state)
    assert_same_state(state, before, 0.0)


@every_mixer
def test_causal(name, options) -> None:
    mixer, x = make(name, options), inputs()
    other = x.clone()
    other[:, 30:] = torch.randn_like(other[:, 30:])
    y, z = mixer(x)[0], mixer(other)[0]
    torch.testing.assert_close(y[:, :30], z[:, :30], rtol=0, atol=1e-12)
    assert (y[:, 30:] - z[:, 30:]).abs().amax(dim=-1).min() > 1e-6


@every_mixer
def test_gradients(name, options) -> None:
    mixer = make(name, options)
    x = inputs(batch=1, length=9).requires_grad_()
    start = State(
        {
            key: torch.randn_like(tensor).abs().requires_grad_()
            if tensor.is_floating_point()
            else tensor
            for key, tensor in mixer.init_state(1, length=9).items()
        }
    )
    names = [key for key, tensor in start.items() if tensor.is_floating_point()]

    def function(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        y, after = mixer(x, State({**start, **dict(zip(names, tensors, strict=True))}))
        return y, *(after[key] for key in names)

    assert torch.autograd.gradcheck(function, (x, *(start[key] for key in names)))


@every_mixer
def test_gradients_of_parameters_agree_between_one_go_and_chunks(name, options) -> None:
    mixer, x = make(name, options), inputs()
    weight = torch.randn_like(x)
    mixer(x)[0].mul(weight).sum().backward()
    whole = [p.grad.clone() for p in mixer.parameters() if p.grad is not None]
    mixer.zero_grad()
    state, outs = mixer.init_state(BATCH), []
    for piece in x.split([11, 23, 11], dim=1):
        y, state = mixer(piece, state)
        outs.append(y)
    torch.cat(outs, dim=1).mul(weight).sum().backward()
    for got, want in zip(mixer.parameters(), whole, strict=True):
        assert_same(got.grad, want)


@every_mixer
@pytest.mark.parametrize("continued", [False, True])
def test_packed_is_separate(name, options, continued) -> None:
    mixer = make(name, options)
    lengths = [13, 1, 0, 2, 29, 13]
    x = inputs(batch=1, length=sum(lengths))
    edges = torch.tensor([0, *lengths]).cumsum(0)
    starts = [mixer.init_state(1) for _ in lengths]
    if continued:
        starts = [mixer(inputs(batch=1, length=i + 3), s)[1] for i, s in enumerate(starts)]
    packed, after = mixer(x, mixer.join_states(starts) if continued else None, edges)
    if not continued:
        assert after is None
    for i, (piece, start) in enumerate(zip(x.split(lengths, dim=1), starts, strict=True)):
        got = packed[:, edges[i] : edges[i + 1]]
        if piece.shape[1] == 0:
            want, state = got, start
        else:
            want, state = mixer(piece, start)
        assert_same(got, want)
        if continued:
            row = after.select(torch.tensor([i]))
            y = inputs(batch=1, length=4)
            assert_same(by_steps(mixer, y, row), by_steps(mixer, y, state))


@every_mixer
def test_packed_gradients_do_not_leak(name, options) -> None:
    mixer = make(name, options)
    x = inputs(batch=1, length=30).requires_grad_()
    y, _ = mixer(x, None, torch.tensor([0, 11, 30]))
    y[:, 11:].square().sum().backward()
    assert (x.grad[:, :11] == 0).all()
    assert (x.grad[:, 11:].abs().sum(-1) > 0).all()


@every_mixer
def test_padded_is_unpadded(name, options) -> None:
    mixer, lengths = make(name, options), [9, 16, 1]
    x = inputs(batch=3, length=16)
    slot = torch.arange(16)
    lefts = [slot >= 16 - n for n in lengths]
    holes = torch.stack([lefts[0], lefts[1], slot == 4])
    packing = Packing.of(holes)
    packed, state = mixer(packing.pack(x), mixer.init_state(3), packing.cu_seqlens)
    y = packing.unpack(packed)
    assert (y[~holes] == 0).all()
    follow = inputs(batch=3, length=5)
    after = by_steps(mixer, follow, state)
    for row in range(3):
        alone, state = mixer(x[row : row + 1, holes[row]], mixer.init_state(1))
        assert_same(y[row : row + 1, holes[row]], alone)
        assert_same(after[row : row + 1], by_steps(mixer, follow[row : row + 1], state))


@every_mixer
def test_what_begins_packed_is_what_goes_on_from_nothing(name, options) -> None:
    """Sequences without tokens, of one, and longer than windows and convolutions."""
    mixer, edges = make(name, options), torch.tensor([0, 0, 1, 20, 20, 23, 40, 40])
    x = inputs(batch=1, length=40)
    got, state = mixer.begin_packed(x, edges)
    want, after = mixer(x, mixer.init_state(7), edges)
    assert_same(got, want)
    assert state.keys() == after.keys()
    follow = inputs(batch=7, length=9)
    assert_same(by_steps(mixer, follow, state), by_steps(mixer, follow, after))


@every_mixer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_state_bytes_are_the_declared_ones(name, options, dtype) -> None:
    mixer = make(name, options, dtype)
    declared = []
    for length in (1, 40, 300):
        _, state = mixer(inputs(dtype, length=length), mixer.init_state(BATCH))
        assert state.nbytes == BATCH * mixer.state_bytes(length, dtype)
        by_steps(mixer, inputs(dtype, length=1), state)
        assert state.nbytes == BATCH * mixer.state_bytes(length + 1, dtype)
        declared.append(mixer.state_bytes(length, dtype))
    assert (len(set(declared)) == 1) == mixer.fixed_state


@every_mixer
def test_deferred_updates_make_the_same_state(name, options) -> None:
    """Rows begin a step apart, so that what is deferred falls due at different times."""
    mixer, x = make(name, options), inputs(length=11)
    want, state = mixer.init_state(BATCH, 16), mixer.init_state(BATCH, 16, recent=4)
    for t in range(11):
        rows = 1 if t == 0 else BATCH
        expected, got = (
            by_steps(mixer, x[:rows, t : t + 1], stored.narrow(0, rows)) for stored in (want, state)
        )
        assert_same(got, expected)
        settled = state.clone()
        mixer.settle(settled)
        assert_same_state(State({key: settled[key] for key in want}), want)


@every_mixer
def test_rows_of_a_state_are_sequences(name, options) -> None:
    mixer = make(name, options)
    _, state = mixer(inputs(batch=3), mixer.init_state(3))
    want = state.select(torch.tensor([2, 0, 2]))
    x = inputs(batch=3, length=1)
    moved = by_steps(mixer, x[[2, 0, 2]], want)
    assert_same(moved, by_steps(mixer, x, state)[[2, 0, 2]])
    state.assign(torch.tensor([1]), want.select(torch.tensor([0])))
    state.reset(torch.tensor([0]))
    y = inputs(batch=3, length=1)
    outs = by_steps(mixer, y, state.clone())
    fresh = mixer(y[:1])[0]
    assert_same(outs[:1], fresh)
    assert_same(outs[1:2], by_steps(mixer, y[1:2], want.select(torch.tensor([0]))))


@every_mixer
@pytest.mark.parametrize("lengths", [[20, 23], [1, 2, 5, 1, 34], [43]])
def test_segments_join_into_the_state_of_the_whole(name, options, lengths) -> None:
    mixer = make(name, options)
    if type(mixer).join_segments is Mixer.join_segments:
        with pytest.raises(BasedError, match="no rule to join segments"):
            mixer.join_segments(mixer.init_state(1), mixer.init_state(1), 0, 1)
        return
    x, state, position = inputs(length=sum(lengths)), mixer.init_state(BATCH), 0
    for piece in x.split(lengths, dim=1):
        own = mixer.segment_state(piece, position)
        floats = State({k: t for k, t in own.items() if t.is_floating_point()})
        state = mixer.join_segments(state, floats, position, piece.shape[1])
        position += piece.shape[1]
    _, whole = mixer(x, mixer.init_state(BATCH))
    assert_same_state(state, whole)
    assert mixer.mixing_flops(64) <= mixer.mixing_flops(128)
