"""view/curves.py: the figure shows what the logs of the runs hold."""

import json
import sys

import pytest

from view import curves


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


def write_run(folder, rows: list[dict], cut: str = ""):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + cut)


def steps(accuracies: list[float], kl: float | None = 0.25) -> list[dict]:
    same = {"length_mean": 9.0, "r_sa_mean": -0.5, "entropy": 2.0, "kl": kl, "mismatch_mean": 1e-7}
    return [{"step": i + 1, "accuracy": a, **same} for i, a in enumerate(accuracies)]


@pytest.mark.parametrize("ending, start", [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_every_run_is_a_line_of_every_panel(runs, tmp_path, ending, start, capsys):
    plt = pytest.importorskip("matplotlib.pyplot")
    write_run(runs / "A", steps([0.25, 0.75, 0.5]), cut='{"step": 4, "accu')  # a kill cuts a line
    write_run(tmp_path / "B", steps([0.5], kl=None))  # PPO has no KL
    out = tmp_path / f"figure.{ending}"
    curves.main(["A", str(tmp_path / "B"), "--out", str(out)])
    assert out.read_bytes().startswith(start) and str(out) in capsys.readouterr().out
    panels = dict(zip(curves.PANELS, plt.gcf().axes))
    assert list(panels) == list(curves.PANELS) and len(plt.gcf().axes) == len(panels)
    drawn = {}
    for key, panel in panels.items():
        drawn[key] = [(list(line.get_xdata()), list(line.get_ydata())) for line in panel.lines]
    assert drawn["accuracy"] == [([1, 2, 3], [0.25, 0.75, 0.5]), ([1], [0.5])]
    assert drawn["kl"] == [([1, 2, 3], [0.25] * 3), ([], [])]
    assert drawn["mismatch_mean"][1] == ([1], [1e-7])
    looks = [(line.get_color(), line.get_linestyle()) for line in panels["kl"].lines]
    assert looks[0] != looks[1]
    texts = [text.get_text() for text in plt.gcf().legends[0].get_texts()]
    assert texts == ["A", str(tmp_path / "B")]
    before = out.read_bytes()
    curves.main(["A", str(tmp_path / "B"), "--out", str(out)])
    assert out.read_bytes() == before  # the same logs give the same file
    curves.main(["A", "--smooth", "2", "--out", str(out)])
    assert list(plt.gcf().axes[0].lines[0].get_ydata()) == [0.25, 0.5, 0.625]


def test_one_sentence_for_what_cannot_be_drawn(runs, tmp_path, monkeypatch):
    write_run(runs / "begun", [])
    (runs / "empty").mkdir()
    with pytest.raises(ValueError, match="begun has no step yet"):
        curves.main(["begun"])
    (runs / "begun" / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="begun has no step yet"):
        curves.main(["begun"])
    for name in ("empty", "nowhere"):
        with pytest.raises(ValueError, match=f"^{name} is no run: .*{name} has a config.json"):
            curves.main([name])
    write_run(runs / "A", steps([0.5]))
    with pytest.raises(ValueError, match="must end in .svg or .png"):
        curves.main(["A", "--out", "a.pdf"])
    with pytest.raises(ValueError, match="must be positive, got 0"):
        curves.main(["A", "--smooth", "0"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    with pytest.raises(ValueError, match="need matplotlib: pip install -r requirements-dev.txt"):
        curves.main(["A", "--out", str(tmp_path / "a.svg")])
    assert not (tmp_path / "a.svg").exists()
