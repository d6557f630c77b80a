"""The kernels in CUDA C++ for Hopper: against float64 on a CPU, emulated, and on such a GPU."""

import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from based.ops import cuda, kernels
from based.ops.taylor_linear_attention import chunked
from based.ops.taylor_linear_attention.kernels import hopper, launch
from tests.ops.emulation import COMPILER, emulate
from tests.ops.test_taylor_kernels import LIMITS, compare, draw, error, initial_state

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")
emulated = pytest.mark.skipif(
    COMPILER is None or torch.cuda.is_available(), reason="needs g++, and no GPU"
)
with_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
NAMES = ("attend", "query_gradients", "key_gradients")


@with_nvcc
@pytest.mark.parametrize("name", [*NAMES, "sum_states"])
@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("V", [64, 112])
def test_sources_compile_and_keep_their_products_in_flight(name, V, strips, tmp_path) -> None:
    """ptxas says when it waits for every single product, which costs most of the speed."""
    source = tmp_path / "kernel.cu"
    text = hopper.states_source(V, strips)
    source.write_text(text if name == "sum_states" else hopper.segment_source(name, V, strips))
    flags = ["-cubin", "-arch=sm_90a", "-std=c++17", "-Xptxas", "-v", "-o", tmp_path / "out"]
    done = subprocess.run(["nvcc", *flags, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "are serialized" not in done.stderr


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"dtype": torch.float16}, False),
        ({"K": 8}, False),
        ({"V": 24}, False),
        ({"V": 144}, False),
        ({"skip": 4}, False),
    ],
)
def test_what_the_kernels_take(change, taken: bool, monkeypatch) -> None:
    monkeypatch.setattr(hopper.cuda, "is_hopper", lambda device: True)
    choice = {"dtype": torch.bfloat16, "K": 16, "V": 112, "skip": 0} | change
    rows = torch.zeros(1, 5, 2, 16 + 256, dtype=choice["dtype"])
    x = rows[..., choice["skip"] : choice["skip"] + choice["K"]]
    y = torch.zeros(1, 5, 2, choice["V"], dtype=choice["dtype"])
    assert hopper.takes(x, y) is taken
    monkeypatch.setattr(kernels, "HOPPER", False)
    assert not hopper.takes(x, y)


def test_what_was_compiled_is_kept(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    made = iter((b"one", b"two", b"three"))
    assert cuda.kept("a", lambda: next(made)) == b"one"
    assert cuda.kept("a", lambda: next(made)) == b"one"
    assert cuda.kept("b", lambda: next(made)) == b"two"
    # Where nothing can be kept, it is made each time.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cuda.kept("b", lambda: next(made)) == b"three"


@pytest.fixture
def few_programs(monkeypatch) -> None:
    """So that a few segments are already several strips."""
    monkeypatch.setattr(launch, "PROGRAMS", 2)


@pytest.fixture
def on_this_machine(monkeypatch, tmp_path_factory) -> Iterator[Callable[[bool], None]]:
    """Emulates Hopper. What was not written is NaN, in shared memory and in new tensors."""
    folder = tmp_path_factory.getbasetemp() / "emulated"  # compiled once a worker
    folder.mkdir(exist_ok=True)
    monkeypatch.setitem(LIMITS, torch.bfloat16, (4e-3, 1e-2, 2e-3))
    torch.use_deterministic_algorithms(True)
    yield lambda late: emulate(monkeypatch, folder, late)
    torch.use_deterministic_algorithms(False)
    for kept in (hopper._segment_kernel, hopper._states_kernel):
        kept.cache_clear()


@emulated
@pytest.mark.parametrize("late", [False, True])
def test_one_strip_a_sequence_emulated(late, on_this_machine) -> None:
    """Whether asynchronous copies and products happen at once or when they are waited for."""
    on_this_machine(late)
    q, k = 4 * draw(1, 333, 2, 16), draw(1, 333, 2, 16)
    compare(q, k, draw(1, 333, 2, 64) + 0.5, torch.bfloat16)


@emulated
@pytest.mark.parametrize("length", [1, 63, 256, 600])
def test_lengths_emulated(length, on_this_machine, few_programs) -> None:
    """With an initial state, and several strips."""
    on_this_machine(False)
    q, k = draw(1, length, 1, 16), draw(1, length, 1, 16)
    state = initial_state(1, 1, 16, 112)
    compare(q, k, draw(1, length, 1, 112) + 0.5, torch.bfloat16, state)


@emulated
@pytest.mark.parametrize("head_dim", [24, 144])
def test_other_head_dims_stay_in_triton(head_dim, on_this_machine, monkeypatch) -> None:
    on_this_machine(False)
    monkeypatch.setattr(cuda, "compile_kernel", None)
    # Triton's interpreter truncates where the hardware rounds to nearest.
    monkeypatch.setitem(LIMITS, torch.bfloat16, (2e-2, 4e-2, 2e-2))
    q, k = draw(1, 70, 1, 16), draw(1, 70, 1, 16)
    compare(q, k, draw(1, 70, 1, head_dim), torch.bfloat16)


@emulated
def test_packed_sequences_emulated(on_this_machine, few_programs) -> None:
    on_this_machine(False)
    edges = torch.tensor([0, 30, 30, 31, 600])
    q, k, v = draw(1, 600, 2, 16), draw(1, 600, 2, 16), draw(1, 600, 2, 48)
    compare(q, k, v, torch.bfloat16, None, edges)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 127, 255, 256, 257, 1000])
@pytest.mark.parametrize("head_dim", [64, 112])
def test_lengths(length, head_dim) -> None:
    q, k = draw(2, length, 3, 16), draw(2, length, 3, 16)
    compare(q, k, draw(2, length, 3, head_dim) + 0.5, torch.bfloat16)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("head_dim", list(range(16, 129, 16)))
@pytest.mark.parametrize("use", [True, False])
def test_head_dims_beside_the_triton_kernels(head_dim, use, monkeypatch, few_programs) -> None:
    """With an initial state, several strips, scores |s| up to about 20."""
    monkeypatch.setattr(kernels, "HOPPER", use)
    q, k = 4 * draw(2, 1100, 3, 16), draw(2, 1100, 3, 16)
    compare(
        q, k, draw(2, 1100, 3, head_dim) + 0.5, torch.bfloat16, initial_state(2, 3, 16, head_dim)
    )


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_sequences(with_state, few_programs) -> None:
    edges = torch.tensor([0, 30, 30, 31, 1000, 1256, 1700], device="cuda")
    q, k, v = draw(1, 1700, 2, 16), draw(1, 1700, 2, 16), draw(1, 1700, 2, 80)
    state = initial_state(6, 2, 16, 80) if with_state else None
    compare(q, k, v, torch.bfloat16, state, edges)


def _strided() -> list[Tensor]:
    q, k = draw(2, 300, 3, 2, 16).bfloat16().unbind(3)
    return [q, k, draw(2, 3, 300, 64).bfloat16().transpose(1, 2)]


@pytest.mark.gpu
@on_hopper
def test_strided_inputs_are_read_in_place() -> None:
    q, k, v = _strided()
    assert hopper.takes(q, v, k)
    out, *_ = launch.forward(q, k, v, None, None, None, want_state=False)
    want = chunked.taylor_linear_attention_outputs(q.double(), k.double(), v.double())
    assert error(out, want) < 4e-3


@pytest.mark.gpu
@on_hopper
def test_a_nan_stays_in_its_sequence() -> None:
    """Its neighbours share segments of memory, and no more."""
    q, k, v = (draw(1, 900, 2, d).bfloat16() for d in (16, 16, 64))
    v[0, 400] = float("nan")
    edges = torch.tensor([0, 300, 600, 900], device="cuda")
    out, final, _, inverse, states = launch.forward(q, k, v, None, None, edges, want_state=True)
    gradients = launch.backward(q, k, v, edges, out, inverse, states, out, None, None)
    assert out[0, 400:600].isnan().all()
    for x in (out, *gradients[:3]):
        assert not x[0, :300].isnan().any()
        assert not x[0, 600:].isnan().any()
    assert not final[[0, 2]].isnan().any()


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("head_dim", [64, 112])
def test_what_nobody_wrote_does_not_count(head_dim, few_programs) -> None:
    """New tensors are NaN, and so is what the run before left in shared memory."""
    nothing = torch.full((8, 1000, 8, 16), float("nan"), device="cuda").bfloat16()
    values = nothing.repeat(1, 1, 1, head_dim // 16)
    out, *_, inverse, states = launch.forward(nothing, nothing, values, None, None, None, True)
    launch.backward(nothing, nothing, values, None, out, inverse, states, out, None, None)
    q, k = draw(2, 333, 3, 16), draw(2, 333, 3, 16)
    state = initial_state(2, 3, 16, head_dim)
    torch.use_deterministic_algorithms(True)
    try:
        compare(q, k, draw(2, 333, 3, head_dim) + 0.5, torch.bfloat16, state)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@on_hopper
def test_results_are_the_same_every_time() -> None:
    q, k, v = (draw(4, 3000, 4, d).bfloat16() for d in (16, 16, 112))
    runs = []
    for _ in range(4):
        out, *rest, inverse, states = launch.forward(q, k, v, None, None, None, want_state=True)
        gradients = launch.backward(q, k, v, None, out, inverse, states, v, None, None)
        runs.append([out, *rest, *gradients[:3]])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.gpu
@on_hopper
def test_a_capture_holds_the_kernels() -> None:
    q, k, v = (draw(1, 600, 2, d).bfloat16() for d in (16, 16, 64))
    want = launch.forward(q, k, v, None, None, None, want_state=True)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch.forward(q, k, v, None, None, None, want_state=True)[0]
    graph.replay()
    assert torch.equal(out, want)
