"""A point's training: the recipe, its ends, and going on after an interruption."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from based.errors import BasedError
from based.recall.architectures import ARCHITECTURES, build_model, paper_bytes
from based.recall.config import Point, Recipe, recipe_from_dict
from based.recall.grids import named_grid, point_of_size, state_bytes
from based.recall.mqar import Task
from based.recall.plot import published
from based.recall.train import PointTrainer, hopeless

CPU = torch.device("cpu")
RECIPE = Recipe(
    vocab_size=16,
    train=(Task(16, 2, 96), Task(16, 4, 64)),
    test=(Task(16, 2, 40), Task(16, 4, 40)),
    learning_rates=(1e-3, 1e-2),
    epochs=3,
    batch_size=32,
)
POINT = Point("based", 32, {"feature_dim": 4})


def test_each_learning_rate_ends_as_it_would_alone() -> None:
    together = PointTrainer(POINT, RECIPE, CPU)
    rows = together.train()
    assert [row["status"] for row in rows] == ["done", "done"]
    for row in rows:
        rate = row["learning_rate"]
        alone = PointTrainer(POINT, replace(RECIPE, learning_rates=(rate,)), CPU)
        (only,) = alone.train()
        assert only["curve"] == row["curve"]
        assert only["loss"] == pytest.approx(row["loss"], rel=1e-5)


def test_a_row_says_what_it_measured() -> None:
    row = PointTrainer(POINT, RECIPE, CPU).train()[0]
    model = build_model(POINT, RECIPE)
    assert row["state_bytes"] == model.state_bytes(16) == state_bytes(POINT, RECIPE)
    assert row["paper_bytes"] == 4 * (33 * 15 + 3 * 32)
    assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert set(row["by_task"]) == {"16x2", "16x4"}
    assert row["accuracy"] == pytest.approx(sum(row["by_task"].values()) / 2)
    assert row["epochs"] == len(row["curve"]) == 3
    assert row["seconds"] > 0
    assert row["torch"] == torch.__version__
    assert row["device"]


def test_the_learning_rate_follows_a_cosine_by_epoch() -> None:
    trainer, rates = PointTrainer(POINT, RECIPE, CPU), []
    step = trainer._step

    def watched(lanes, batch):
        rates.append(lanes.rate[:, 0].tolist())
        step(lanes, batch)

    trainer._step = watched
    trainer.train()
    steps = 5
    assert len(rates) == 3 * steps
    for epoch, factor in enumerate((1.0, 0.75, 0.25)):
        for rate in rates[epoch * steps : (epoch + 1) * steps]:
            assert rate == pytest.approx([1e-3 * factor, 1e-2 * factor])


def test_a_solved_learning_rate_stops_and_the_others_go_on() -> None:
    recipe = replace(RECIPE, stop_above=0.2, epochs=12, learning_rates=(1e-5, 3e-2))
    slow, fast = PointTrainer(POINT, recipe, CPU).train()
    assert fast["status"] == "stopped"
    assert fast["epochs"] < 12
    assert fast["accuracy"] > 0.2
    assert all(accuracy <= 0.2 for accuracy in fast["curve"][:-1])
    assert slow["status"] == "done"
    assert slow["epochs"] == 12


def test_a_diverged_learning_rate_is_recorded_and_alone() -> None:
    recipe = replace(RECIPE, learning_rates=(1e-2, 1e30))
    good, bad = PointTrainer(POINT, recipe, CPU).train()
    assert bad["status"] == "diverged"
    assert bad["loss"] is None
    assert bad["epochs"] == 1
    assert good["status"] == "done"
    (alone,) = PointTrainer(POINT, replace(recipe, learning_rates=(1e-2,)), CPU).train()
    assert good["curve"] == alone["curve"]


def test_compiled_lanes_go_on_until_half_have_ended() -> None:
    """Ended ones are computed along and not looked at; the others end as ever."""
    recipe = replace(RECIPE, epochs=4, learning_rates=(1e-3, 1e30, 1e-2))
    alike = [PointTrainer(POINT, recipe, CPU) for _ in range(2)]
    alike[1].compile()
    rows = [trainer.train() for trainer in alike]
    assert [len(trainer.lanes.peaks) for trainer in alike] == [2, 3]
    assert [row["status"] for row in rows[1]] == ["done", "diverged", "done"]
    assert [row["epochs"] for row in rows[1]] == [4, 1, 4]
    for one, other in zip(*rows, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_steps_are_compiled_once_an_epoch_has_shown_that_it_pays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, compiled = replace(RECIPE, epochs=3), []
    monkeypatch.setattr(PointTrainer, "compile", lambda trainer: compiled.append(trainer.epoch))
    PointTrainer(POINT, recipe, CPU, fuse=True).train()
    assert compiled == []
    monkeypatch.setattr("based.recall.train.COMPILING_PAYS", 0.0)
    PointTrainer(POINT, recipe, CPU, fuse=True).train()
    assert compiled == [1, 2]
    PointTrainer(POINT, recipe, CPU).train()
    assert compiled == [1, 2]


def test_the_rule_for_hopeless_learning_rates() -> None:
    recipe = Recipe()
    assert hopeless([0.2, 0.9], 7, recipe) == [False, False]
    assert hopeless([0.2, 0.9, 0.76, 0.74], 8, recipe) == [True, False, False, True]
    assert hopeless([0.98, 0.995], 1, recipe) == [True, True]
    recipe = replace(RECIPE, drop_hopeless=True, epochs=12, learning_rates=(1e-5, 3e-2))
    slow, fast = PointTrainer(POINT, recipe, CPU).train()
    assert slow["status"] == "dropped"
    assert 3 <= slow["epochs"] < 12
    assert fast["status"] in ("done", "stopped")


@pytest.mark.parametrize("architecture", ["attention", "based"])
def test_put_aside_after_every_epoch_it_goes_on_bit_for_bit(
    tmp_path: Path, architecture: str
) -> None:
    point, epochs = Point(architecture, 32), 0
    whole = PointTrainer(point, RECIPE, CPU).train()
    while (rows := one_epoch(point, tmp_path / "running")) is None:
        epochs += 1
    assert epochs >= 2
    for one, other in zip(rows, whole, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def one_epoch(point: Point, folder: Path) -> list[dict] | None:
    """A process that has the time for one epoch."""
    trainer = PointTrainer(point, RECIPE, CPU, folder)
    # The deadline is looked at before an epoch: let it pass during the first.
    times = iter([0.0, 1.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("based.recall.train.time.time", lambda: next(times))
        return trainer.train(deadline=0.5)


def test_bfloat16_products_train() -> None:
    exact, rounded = (
        PointTrainer(POINT, replace(RECIPE, products=products), CPU).train()[1]
        for products in ("float32", "bf16")
    )
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.1)
    assert rounded["loss"] != exact["loss"]


@pytest.mark.parametrize(
    ("asked", "architecture", "taken"),
    [
        ("tf32", "based", "tf32"),
        ("tf32", "mamba", "float32"),
        ("tf32", "mamba2", "float32"),
        ("bf16", "mamba", "bf16"),
    ],
)
def test_tf32_only_where_it_changes_nothing(asked, architecture, taken) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        recipe = replace(RECIPE, products=asked, epochs=1)
        row = PointTrainer(Point(architecture, 32), recipe, CPU).train()[0]
        precision = torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)
    assert row["products"] == taken
    assert precision == ("highest" if taken == "float32" else "high")


def test_published_bytes_follow_from_the_formulas() -> None:
    """The digitised figure's exact sizes are those of the configurations it is of."""
    figure = published()
    want = {
        "based": [(d, {"feature_dim": k}) for d in (48, 64, 128) for k in (8, 16, 24)],
        "mamba": [(64, {"state_size": 8}), (128, {"state_size": 24}), (256, {"state_size": 16})],
        "sliding_window": [(128, {"window": 8}), (128, {"window": 512})],
        "gla": [(64, {}), (128, {}), (256, {})],
        "delta_net": [(64, {}), (128, {}), (256, {})],
        "gated_delta_net": [(64, {}), (128, {})],
        "rwkv7": [(64, {})],
        "h3": [(64, {}), (128, {}), (256, {})],
        "hyena": [(64, {}), (128, {}), (256, {})],
        "attention": [(64, {})],
    }
    for architecture, points in want.items():
        sizes = [size for size, _ in figure[architecture]]
        for d, dials in points:
            mine = paper_bytes(Point(architecture, d, dials), 1024)
            assert mine is not None
            assert any(abs(mine - size) <= 0.015 * mine for size in sizes), (architecture, d, mine)
    assert paper_bytes(Point("based", 48, {"feature_dim": 8}), 1024) == 9396


def test_the_grids_hold_what_they_promise() -> None:
    core, recipe = named_grid("core")
    assert recipe == Recipe()
    assert len(core) == 35
    counts = {name: sum(p.architecture == name for p in core) for name in ARCHITECTURES}
    assert (counts["based"], counts["sliding_window"], counts["mamba"]) == (9, 5, 4)
    together, recipe = named_grid("combination")
    for both, taylor, window in zip(*[iter(together)] * 3, strict=True):
        sizes = [state_bytes(point, recipe) for point in (both, taylor, window)]
        assert max(sizes) < 1.03 * min(sizes)
    maps, _ = named_grid("feature-maps")
    assert {"identity", "relu", "pos_elu", "square", "cosformer", "performer"} < {
        point.architecture for point in maps
    }


def test_what_cannot_be_is_one_line() -> None:
    with pytest.raises(BasedError, match="16 pairs do not fit 32 tokens"):
        Recipe(train=(Task(32, 16, 10),))
    with pytest.raises(BasedError, match="no architecture is named 'lstm'; there are attention"):
        build_model(Point("lstm", 64), RECIPE)
    with pytest.raises(BasedError, match="based has no dial window; its dials: feature_dim"):
        build_model(Point("based", 64, {"window": 3}), RECIPE)
    with pytest.raises(BasedError, match="no state near 100 bytes: the closest is"):
        point_of_size("based", 64, 100, RECIPE)
    with pytest.raises(BasedError, match="attention has not one dial"):
        point_of_size("attention", 64, 100, RECIPE)
    assert point_of_size("based", 64, 40_000, RECIPE).dials == {"feature_dim": 16}
    with pytest.raises(BasedError, match="no grid is named 'all'; there are core"):
        named_grid("all")


def test_a_recipe_survives_json() -> None:
    assert recipe_from_dict({**RECIPE.to_dict(), "key": RECIPE.key}) == RECIPE
    assert RECIPE.key == replace(RECIPE, learning_rates=(1.0,)).key
    assert RECIPE.key != replace(RECIPE, epochs=4).key
