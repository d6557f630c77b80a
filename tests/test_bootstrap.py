import ast
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "bootstrap.py"


@pytest.fixture
def bootstrap(tmp_path, monkeypatch):
    """The script as a module, with an environment of its own and no installation."""
    spec = importlib.util.spec_from_file_location("bootstrap", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", str(tmp_path))
    monkeypatch.setattr(module, "PYTHON", sys.executable)
    module.called = []
    monkeypatch.setattr(module, "make_venv", lambda: module.called.append("venv"))
    monkeypatch.setattr(module, "install", lambda group: module.called.append(group))
    return module


def broken_python(change: str) -> subprocess.CompletedProcess[str]:
    """Runs the script in a Python that lacks something."""
    script = f"import runpy, sys; {change}; sys.argv = ['bootstrap.py', 'core']; "
    script += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("sys.version_info = (3, 8, 10)", "needs Python 3.11 or newer and this is 3.8"),
        ("sys.modules['venv'] = None", "has no venv module"),
        ("sys.modules['ensurepip'] = None", "has no venv module"),
    ],
)
def test_a_python_that_will_not_do_gets_one_line_with_the_remedy(change, says) -> None:
    done = broken_python(change)
    assert done.returncode == 1
    assert says in done.stderr
    assert "make PYTHON=" in done.stderr
    assert done.stderr.count("\n") == 1


def test_old_pythons_can_read_it() -> None:
    ast.parse(SCRIPT.read_text(), feature_version=(3, 5))


def test_what_is_ready_costs_nothing_and_what_is_half_made_is_completed(
    bootstrap, monkeypatch
) -> None:
    bootstrap.main("core")
    bootstrap.main("core")
    assert bootstrap.called == ["core"]
    bootstrap.main("dev")
    assert bootstrap.called == ["core", "dev"]

    def fail(group) -> None:
        raise SystemExit(1)

    stamp = Path(bootstrap.VENV) / ".ready-core"
    stamp.write_text("of older requirements")
    monkeypatch.setattr(bootstrap, "install", fail)
    with pytest.raises(SystemExit):
        bootstrap.main("core")
    assert stamp.read_text() == "of older requirements"
    monkeypatch.setattr(bootstrap, "PYTHON", "/nowhere/python")
    with pytest.raises(SystemExit):
        bootstrap.main("core")
    assert bootstrap.called[-1] == "venv"


@pytest.mark.parametrize(
    ("version", "brings_triton", "want"),
    [
        ("2.12.1+cu130", True, "torch==2.12.1+cu130\n"),
        ("2.11.0+cpu", False, "torch==2.11.0+cpu\n{triton}"),
        ("2.10.1", True, "{torch}{triton}"),
        (None, False, "{torch}{triton}"),
    ],
)
def test_a_torch_in_range_is_kept(bootstrap, monkeypatch, version, brings_triton, want) -> None:
    monkeypatch.setattr(bootstrap, "torch_version", lambda python: version)
    monkeypatch.setattr(bootstrap, "brings_triton", lambda python: brings_triton)
    torch, triton = (SCRIPT.parents[1] / "constraints.txt").read_text().splitlines(keepends=True)
    assert bootstrap.pins() == want.format(torch=torch, triton=triton)


def test_what_this_python_has_and_one_that_does_not_run(bootstrap) -> None:
    assert bootstrap.torch_version(sys.executable) == importlib.metadata.version("torch")
    requirements = importlib.metadata.requires("torch") or []
    named = any(line.startswith("triton") for line in requirements)
    assert bootstrap.brings_triton(sys.executable) == named
    assert bootstrap.torch_version("/nowhere/python") is None
    assert not bootstrap.brings_triton("/nowhere/python")
