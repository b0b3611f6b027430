"""The layout: who imports whom, and the core's size beside its budgets."""

import ast
import graphlib
from pathlib import Path

import pytest

from bench import size

FOLDERS = (".", "runtime", "data", "view", "bench")
ROOMS = ("model", "sar", "rollout", "verify", "kernels", "data")


def imports(root: Path) -> dict[str, set[str]]:
    """{module: the repository's modules that it imports}, those inside functions included."""
    files = [file for folder in FOLDERS for file in (root / folder).glob("*.py")]
    names = {file: ".".join(file.relative_to(root).with_suffix("").parts) for file in files}
    names = {file: name.removesuffix(".__init__") for file, name in names.items()}
    found = {}
    for file, name in names.items():
        asked = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                asked |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} has a relative import: write the whole name"
                asked |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        found[name] = asked & set(names.values())
    return found


def test_no_circle_and_no_room_imports_runtime():
    graph = imports(size.ROOT)
    assert {"train_sa_grpo", "sar", "data.prompts", "runtime.runs", "view.curves"} <= set(graph)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError
    for name, asked in graph.items():
        if name.split(".")[0] in ROOMS:
            above = {module for module in asked if module.split(".")[0] not in ROOMS}
            assert not above, f"{name} imports {above}"


def test_imports_by_hand(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("")
    (tmp_path / "data" / "files.py").write_text("import os, a.b, sar\n")
    (tmp_path / "sar.py").write_text("def f():\n    from data import files\n")
    graph = imports(tmp_path)
    assert graph == {"data": set(), "data.files": {"sar"}, "sar": {"data", "data.files"}}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()


def test_every_bound_of_the_core_is_kept(capsys):
    assert size.main() == 0, capsys.readouterr().out


def test_the_bounds_by_hand(tmp_path, monkeypatch, capsys):
    dense = "a = [[x for x in y] for y in z]\nb = (1 if c else 2) + (3 if d else 4)\n"
    plain = "a = [f(x) for x in y]\nif (1 if c else 2):\n    b = 3 if d else f'{e}'\n"
    for name, text in (("one.py", dense), ("free.py", dense), ("room/two.py", plain)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(size, "BUDGETS", {"one.py": 2, "free.py": 2, "room": 3})
    monkeypatch.setattr(size, "MAY_BE_DENSE", ("free.py",))
    assert size.main(tmp_path) == 1
    *_, totals, first, second = capsys.readouterr().out.splitlines()
    assert totals == f"7 of 7 lines, 92 of {size.MAX_TOKENS} tokens"
    assert (first[:18], second[:18]) == ("one.py:1 is dense:", "one.py:2 is dense:")
    (tmp_path / "one.py").write_text("a = 1  # a comment is no token\n")
    assert size.main(tmp_path) == 0
    for bound, value, words in (
        ("MAX_TOKENS", 40, "the core has 63 tokens, at most 40"),
        ("MAX_COLUMNS", 36, "free.py has a line of 37 columns, at most 36"),
        ("BUDGETS", {"room": 2}, "room has 3 lines, at most 2"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(size, bound, value)
            assert size.main(tmp_path) == 1 and words in capsys.readouterr().out
