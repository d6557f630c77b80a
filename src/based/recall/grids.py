"""The grids of the lab: which points a sweep trains."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from based.errors import BasedError
from based.recall.architectures import FEATURE_MAPS, all_dials, build_model
from based.recall.config import Point, Recipe, small_recipe

# A budget that no value of a dial meets this closely is out of reach.
CLOSE = 0.1


def core(recipe: Recipe) -> list[Point]:
    """Figure 2 and what came after, at published sizes; what takes longest comes first."""
    sizes = ((256, 16), (128, 24), (64, 16))
    return [
        *(Point(name, d, {"state_size": n}) for d, n in sizes for name in ("mamba2", "mamba")),
        *(
            Point(name, d)
            for d in (128, 64)
            for name in ("rwkv7", "h3", "gated_delta_net", "hyena", "delta_net", "gla")
        ),
        # As large a state as d 64 with 16 has, of which the figures show the better.
        Point("mamba", 128, {"state_size": 8}),
        *(Point("sliding_window", 128, {"window": w}) for w in (512, 256, 128, 64, 16)),
        *(Point("based", d, {"feature_dim": k}) for d, k in product((128, 64, 48), (24, 16, 8))),
        *(Point("attention", d) for d in (128, 64)),
    ]


def combination(recipe: Recipe) -> list[Point]:
    """Convolution, Taylor and window together, as shipped, against each alone.

    At three budgets, half of the state in each; alone the one dial is raised
    until the true bytes are the same.
    """
    points = []
    for feature_dim, window in ((8, 23), (16, 78), (24, 165)):
        both = Point("shipped", 64, {"feature_dim": feature_dim, "window": window})
        budget = state_bytes(both, recipe)
        points.append(both)
        for alone in ("shipped_taylor", "shipped_window"):
            points.append(point_of_size(alone, 64, budget, recipe))
    return points


def feature_maps(recipe: Recipe) -> list[Point]:
    """Figure 3: linear attention by feature map, over the model's width."""
    widths = (64, 128, 256)
    return [
        *(Point("based", d, {"feature_dim": k}) for d in widths for k in (16, 24)),
        *(Point(name, d) for name in FEATURE_MAPS for d in widths),
    ]


def demo(recipe: Recipe) -> list[Point]:
    """A frontier that two CPU cores train in minutes; what takes longest comes first."""
    return [
        *(Point("mamba", 32, {"state_size": n}) for n in (8, 4)),
        Point("attention", 64),
        *(Point("sliding_window", 64, {"window": window}) for window in (8, 24)),
        *(Point("based", d, {"feature_dim": k}) for d, k in ((32, 4), (32, 8), (64, 16))),
    ]


GRIDS: dict[str, tuple[Callable[[Recipe], list[Point]], Callable[[], Recipe]]] = {
    "core": (core, Recipe),
    "combination": (combination, Recipe),
    "feature-maps": (feature_maps, Recipe),
    "demo": (demo, small_recipe),
}


def state_bytes(point: Point, recipe: Recipe) -> int:
    """Bytes that the point's state really occupies at the recipe's longest sequence, float32."""
    return build_model(point, recipe).state_bytes(recipe.length)


def point_of_size(
    architecture: str, hidden_size: int, budget: int, recipe: Recipe, seed: int = 123
) -> Point:
    """The point whose one dial brings its true state bytes closest to `budget`.

    Refuses, in one line, a budget that no value of the dial comes within 10 % of.
    """
    if len(dials := all_dials(Point(architecture, hidden_size))) != 1:
        names = ", ".join(dials) or "none"
        raise BasedError(f"{architecture} has not one dial to fit a state with; its dials: {names}")
    (dial,) = dials

    def at(value: int) -> tuple[Point, int]:
        point = Point(architecture, hidden_size, {dial: value}, seed)
        return point, state_bytes(point, recipe)

    low, high = 1, 2
    while at(high)[1] < budget and high < 1 << 16:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle)[1] <= budget else (low, middle)
    point, size = min((at(low), at(high)), key=lambda found: abs(found[1] - budget))
    if abs(size - budget) > CLOSE * budget:
        raise BasedError(
            f"{architecture} of width {hidden_size} has no state near {budget:,} bytes: the "
            f"closest is {size:,} ({dial} {point.dials[dial]}); change the width or the budget"
        )
    return point


def named_grid(name: str) -> tuple[list[Point], Recipe]:
    """A grid's points and the recipe it is trained with."""
    if name not in GRIDS:
        raise BasedError(f"no grid is named {name!r}; there are {', '.join(GRIDS)}")
    points, recipe = GRIDS[name]
    return points(recipe()), recipe()
