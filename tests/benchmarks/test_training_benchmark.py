"""The training benchmark, with shapes for a CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from based.models.accounting import skeleton, training_flops
from benchmarks import pieces, training
from benchmarks.profile import by_kind, kind_of, moved_on
from benchmarks.training import Case, Options


@pytest.fixture
def options(tmp_path: Path, monkeypatch) -> Options:
    monkeypatch.setitem(training.TWINS, "hf-llama-tiny", "attn-tiny")
    return Options(
        models=("based-tiny", "hf-llama-tiny", "mamba-huge"),
        lengths=(16, 32),
        step_tokens=64,
        steps=2,
        compile=False,
        device="cpu",
        out=tmp_path,
        worker=True,
    )


def test_each_piece_is_measured_once(options, capsys, monkeypatch) -> None:
    training.main(options)
    assert "mamba-huge: not registered here" in capsys.readouterr().out
    rows = pieces.read(options.out, "training")
    assert [(row["model"], row["length"]) for row in rows] == [
        *(("based-tiny", 16), ("based-tiny", 32)),
        *(("hf-llama-tiny", 16), ("hf-llama-tiny", 32)),
    ]
    for row in rows:
        assert 0 < row["slowest"] <= row["tokens_per_second"] <= row["fastest"]
        assert (row["step_tokens"], row["recompute"]) == (64, False)
        assert row["token_flops"] == training_flops(
            skeleton(training.shape_of(row["model"])), row["length"]
        )
    training.main(options)
    assert pieces.read(options.out, "training") == rows
    training.show(Console(width=120), [{**rows[0], "by_kind": {"matrix products": 0.0}}])
    out = capsys.readouterr().out
    assert "based-tiny at 16: matrix products 0%, idle 100%" in out
    training.plot(rows, options.out / "training.png")
    assert (options.out / "training.png").stat().st_size > 5000


def test_what_will_not_fit_is_not_tried(options, monkeypatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(training, "memory_of", lambda device: 80 * 2**30)
    options = replace(options, compile=True, step_tokens=65536)

    def first(model: str, length: int) -> tuple[int, bool]:
        tried = []
        monkeypatch.setattr(training, "timed", lambda *a: tried.append(a[1][2:]) or {"a": 1})
        training.first_that_fits(options, model, length, gpu)
        return tried[0]

    assert first("based-1.3b", 2048) == (8, False)
    assert first("based-360m", 2048) == (16, False)
    assert first("based-1.3b", 32768) == (1, True)
    cases = [Case("based-1.3b", 2048, n, False) for n in (8, 16)]
    plans = [training.needed(options, case, gpu) for case in cases]
    assert 60e9 < plans[0] < plans[1] < 140e9


def test_memory_that_does_not_suffice_makes_the_step_smaller(options, monkeypatch) -> None:
    tried = []

    def timed(options, case, device):
        tried.append(case[2:])
        if case.sequences > 1 or not case.recompute:
            raise torch.OutOfMemoryError
        return {"tokens_per_second": 1.0}

    monkeypatch.setattr(training, "timed", timed)
    monkeypatch.setattr(training, "PLANS", ((64, False), (16, False), (64, True), (16, True)))
    found = training.first_that_fits(options, "based-tiny", 16, torch.device("cpu"))
    assert found == {"tokens_per_second": 1.0}
    assert tried == [(4, False), (1, False), (4, True), (1, True)]


def test_the_llama_is_the_transformer_it_is_held_to(options) -> None:
    case = Case("hf-llama-tiny", 16, sequences=2, recompute=True)
    training.llama_step(options, case, torch.device("cpu"))()
    names = ("hf-llama-1.3b", "hf-llama-360m")
    sizes = [skeleton(training.shape_of(name)).num_parameters() for name in names]
    assert sizes == [pytest.approx(1.3e9, rel=0.05), pytest.approx(0.36e9, rel=0.01)]


def test_kernels_that_overlap_are_counted_once() -> None:
    kernels = [("long", 3.0, 7.0), ("first", 0.0, 5.0), ("hidden", 4.0, 4.5), ("later", 9.0, 10.0)]
    assert dict(moved_on(kernels)) == {"hidden": 0.5, "first": 0.5, "long": 2.0, "later": 1.0}


def test_kernels_by_kind() -> None:
    for name, kind in (
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "matrix products"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "attention"),
        ("product_gated", "matrix products"),
        ("carry_states", "Taylor linear attention"),
        ("triton_poi_fused_add_mul_silu_3", "elementwise and norms"),
        ("triton_red_fused__to_copy_convolution_mean_1", "elementwise and norms"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimiser"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("something_else", "other"),
    ):
        assert kind_of(name) == kind, name
    assert by_kind([("sum_states", 1.0), ("nvjet_a", 5.0), ("nvjet_b", 2.0)]) == {
        "matrix products": 7.0,
        "Taylor linear attention": 1.0,
    }
