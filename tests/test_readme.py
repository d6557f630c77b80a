import re
from pathlib import Path

from benchmarks.tables import PAGES, README, TABLES, fill

TEXT = README.read_text()


def test_the_python_example_runs(capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    exec(code, {})
    assert "bytes, now and a million tokens on" in capsys.readouterr().out


def test_the_tables_are_those_of_the_results() -> None:
    pages = [page.read_text() for page in PAGES]
    assert [fill(text) for text in pages] == pages
    assert all(f"<!-- table {name} -->" in "".join(pages) for name in TABLES)


def test_the_tree_and_links_name_what_exists() -> None:
    root = README.parent
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXT):
        assert (root / link).exists(), link
    (tree,) = re.findall(r"```\n(src/based/.*?)```", TEXT, flags=re.DOTALL)
    folder = root
    for line in tree.splitlines():
        name, indent = line.split()[0], len(line) - len(line.lstrip())
        parents = {0: root, 2: root / "src/based", 4: root / "src/based/ops"}
        folder = parents[indent]
        assert (folder / name).exists(), name


def test_every_verb_is_shown() -> None:
    from based.cli import VERBS

    assert all(f"based {verb} " in TEXT for verb in VERBS)


def test_nothing_names_this_machine() -> None:
    for path in README.parent.rglob("*.md"):
        if ".venv" not in path.parts:
            assert str(Path.home()) not in path.read_text()
