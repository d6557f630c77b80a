"""docs/training.md and the Slurm example name what exists."""

import re
from pathlib import Path

import tyro

from based.data.command import Data
from based.training import TrainConfig
from based.training.command import Train, expand
from based.training.recipes import RECIPES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text()
SLURM = ROOT / "examples" / "slurm" / "train.sbatch"


def test_commands_parse() -> None:
    lines = PAGE.replace("\\\n", " ").splitlines() + SLURM.read_text().splitlines()
    found = [m[1].split("#")[0] for m in (re.search(r"based train (.*)", x) for x in lines) if m]
    assert len(found) >= 4
    for line in found:
        arguments = expand([word.strip('"') for word in line.split() if word != "..."])
        tyro.cli(Train, args=arguments, use_underscores=False)


def test_options_and_recipes_exist() -> None:
    for name in RECIPES:
        assert f"`{name}`" in PAGE
    options = set(re.findall(r"`(--[a-z-]+)", PAGE))
    known = {"--" + name.replace("_", "-") for name in Train.__dataclass_fields__}
    for each in (TrainConfig, Data):
        known |= {"--" + name.replace("_", "-") for name in each.__dataclass_fields__}
    assert options - known <= {"--nnodes", "--signal"}
