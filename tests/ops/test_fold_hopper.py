"""Full rings folded in CUDA C++: against float64, emulated on a CPU and on such a GPU."""

import subprocess
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from based.ops import kernels
from based.ops.taylor_linear_attention import fold, fold_hopper, halves
from based.ops.taylor_linear_attention.features import key_features
from tests.ops.emulation import COMPILER, emulate
from tests.ops.test_taylor_hopper import IS_HOPPER, with_nvcc

DEVICE = torch.device("cuda" if IS_HOPPER else "cpu")
somewhere = pytest.mark.skipif(
    not IS_HOPPER and (COMPILER is None or torch.cuda.is_available()),
    reason="needs a GPU of compute capability 9.0, or g++ and no GPU",
)
R = K = 16


@pytest.fixture
def on_hopper(monkeypatch, tmp_path_factory) -> Iterator[Callable[[bool], None]]:
    folder = tmp_path_factory.getbasetemp() / "emulated"
    folder.mkdir(exist_ok=True)

    def begin(late: bool = False) -> None:
        fold_hopper._kernel.cache_clear()
        if not IS_HOPPER:
            emulate(monkeypatch, folder, late)

    yield begin
    fold_hopper._kernel.cache_clear()


def drawn(rows: int, heads: int, V: int) -> tuple[Tensor, ...]:
    """Numerator in halves, denominator, recent keys and values."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE)

    state = halves.split(8 * draw(rows, heads, 153, V)), draw(rows, heads, 153)
    return *state, draw(rows, R, heads, K).bfloat16(), draw(rows, R, heads, V).bfloat16()


def folds_as_float64_does(rows: int, heads: int, V: int, seen: Tensor) -> None:
    numerator, denominator, keys, values = drawn(rows, heads, V)
    phi = key_features(keys.double())
    full = seen % R == R - 1
    sums = torch.einsum("brhf,brhv->bhfv", phi, values.double())
    want = halves.join(numerator).double() + sums * full[:, None, None, None]
    norm = denominator.double() + phi.sum(1) * full[:, None, None]
    before = numerator.clone()
    assert fold_hopper.takes(numerator, keys, values)
    fold.fold_full_rings(numerator, denominator, keys, values, seen)
    torch.testing.assert_close(halves.join(numerator).double(), want, rtol=3e-7, atol=1e-5)
    torch.testing.assert_close(denominator.double(), norm, rtol=1e-6, atol=1e-5)
    assert torch.equal(numerator[~full], before[~full])
    assert bool((numerator[full] != before[full]).any())


@somewhere
@pytest.mark.parametrize(
    ("rows", "heads", "V", "late"),
    [(5, 2, 112, False), (5, 2, 112, True), (3, 1, 64, True), (2, 3, 16, False), (1, 1, 128, True)],
)
def test_full_rings_are_added_and_others_left(rows, heads, V, late, on_hopper, monkeypatch) -> None:
    """Rows are looked through two at a time, and programs take many tiles each."""
    on_hopper(late)
    monkeypatch.setattr(fold_hopper, "ROOM", 2)
    monkeypatch.setattr(fold_hopper, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(fold_hopper, "MOST_PROGRAMS", 2)
    seen = torch.tensor([31, 14, 16, 1_000_015, 15], device=DEVICE)[:rows]
    folds_as_float64_does(rows, heads, V, seen)


@somewhere
def test_programs_share_the_tiles_of_many_rows(on_hopper) -> None:
    """All of them list the same rows in the same order."""
    on_hopper()
    rows, heads = (1200, 16) if IS_HOPPER else (40, 1)
    folds_as_float64_does(rows, heads, 64, torch.randint(14, 16, (rows,), device=DEVICE))


@somewhere
def test_nothing_is_full(on_hopper) -> None:
    on_hopper()
    numerator, denominator, keys, values = drawn(2, 2, 32)
    before = numerator.clone(), denominator.clone()
    seen = torch.tensor([0, 30], device=DEVICE)
    fold.fold_full_rings(numerator, denominator, keys, values, seen)
    assert torch.equal(numerator, before[0])
    assert torch.equal(denominator, before[1])


def test_what_the_kernel_takes(monkeypatch) -> None:
    monkeypatch.setattr(fold_hopper.cuda, "is_hopper", lambda device: True)
    made = {"K": 16, "V": 112, "R": 16, "state": torch.int16, "values": torch.bfloat16}

    def taken(**change: object) -> bool:
        size = made | change
        numerator = torch.zeros(1, 1, 2, 3, 4, dtype=size["state"])
        keys = torch.zeros(1, size["R"], 1, size["K"], dtype=size["values"])
        values = torch.zeros(1, size["R"], 1, size["V"], dtype=size["values"])
        return fold_hopper.takes(numerator, keys, values)

    assert taken()
    for change in ({"K": 8}, {"V": 24}, {"V": 144}, {"R": 8}, {"state": torch.float32}):
        assert not taken(**change)
    assert not taken(values=torch.float32)
    monkeypatch.setattr(kernels, "HOPPER", False)
    assert not taken()


@with_nvcc
@pytest.mark.parametrize("V", [16, 112, 128])
def test_the_source_compiles(V: int, tmp_path) -> None:
    source = tmp_path / "kernel.cu"
    source.write_text(fold_hopper.source(16, 153, V))
    flags = ["-cubin", "-arch=sm_90a", "-std=c++17", "-Xptxas", "-v", "-o", tmp_path / "out"]
    done = subprocess.run(["nvcc", *flags, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert " 0 bytes spill stores" in done.stderr
