"""Every kernel compiles for Ampere and Hopper on this machine, whatever it has itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")
GROUPS = (
    *(
        "around",
        "decode",
        "gated-norm",
        "recurrence",
        "rows",
        "window",
        "taylor-16-64",
        "taylor-16-112",
        "taylor-32-64",
    ),
    *("taylor-24-112", "taylor-16-64-float32", "taylor-16-128-float32"),
)


# These take longest: `make soak` compiles them for Ampere.
LONGEST = ("decode", "window", "recurrence", "taylor-16-128-float32", "taylor-16-64-float32")
CASES = [
    pytest.param(group, capability, marks=[pytest.mark.soak] if long else [])
    for group in GROUPS
    for capability in (80, 90)
    for long in [group in LONGEST and capability == 80]
]


@pytest.mark.parametrize(("group", "capability"), CASES)
def test_kernels_compile(group: str, capability: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), group, str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    count = int(done.stdout.split()[0])
    # What an Ampere GPU has no room for is not compiled, and there is one such group.
    assert (count > 0) == ((group, capability) != ("taylor-24-112", 80))
