"""Training curves of any runs: accuracy, length, R_SA, entropy, KL and mismatch against the step.

    python -m view.curves runs/A runs/B                    # writes curves.svg
    python -m view.curves A B --out two.png --smooth 5     # A is runs/A
"""

import json
from pathlib import Path
from statistics import mean

from runtime.errors import user_errors
from runtime.runs import RUNS
from runtime.settings import Parser, positive_int

PANELS = {  # key in metrics.jsonl: title, scale of the axis
    "accuracy": ("accuracy (sampled)", "linear"),
    "length_mean": ("mean tokens (sampled)", "linear"),
    "r_sa_mean": ("R_SA", "linear"),
    "entropy": ("entropy (nats)", "log"),
    "kl": ("KL to the base (nats)", "log"),
    "mismatch_mean": ("mismatch (nats)", "log"),
}
# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = ("black", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")


def pyplot():
    """matplotlib's pyplot, set up to make the same file of the same curves. Raises ValueError."""
    try:
        from matplotlib import cycler, rcParams, use
    except ModuleNotFoundError:
        what = "the figures need matplotlib: pip install -r requirements-dev.txt"
        raise ValueError(what) from None
    use("svg")
    rcParams.update({"svg.hashsalt": "curves", "svg.fonttype": "none"})  # text stays text
    rcParams["axes.prop_cycle"] = cycler(ls=("-", "--", ":")) * cycler(color=COLOURS)
    from matplotlib import pyplot

    return pyplot


def read_metrics(name: str) -> list[dict]:
    """The steps that a run has logged; name: a folder, or one in runs/. Raises ValueError."""
    folder = Path(name).expanduser()
    if not (folder / "config.json").exists():
        folder = RUNS / name
    if not (folder / "config.json").exists():
        raise ValueError(f"{name} is no run: neither it nor {folder} has a config.json")
    log = folder / "metrics.jsonl"
    lines = log.read_text("utf-8").splitlines(keepends=True) if log.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may cut the last
    if not rows:
        raise ValueError(f"{folder} has no step yet: metrics.jsonl holds no line")
    return rows


def draw(curves: dict[str, list[dict]], path: Path, smooth: int = 1, styles=None) -> None:
    """Write a figure with a panel per quantity and a line per {label: rows of metrics.jsonl}.

    A point is the mean of the last `smooth` values. styles: {label: options of its lines}.
    """
    figure, axes = pyplot().subplots(2, 3, figsize=(10, 6), layout="constrained")
    for panel, (key, (title, scale)) in zip(axes.flat, PANELS.items()):
        for label, rows in curves.items():
            known = [row for row in rows if row.get(key) is not None]  # no KL with --kl-coef 0
            values = [row[key] for row in known]
            means = [mean(values[max(0, k + 1 - smooth) : k + 1]) for k in range(len(values))]
            style = styles[label] if styles else {}
            panel.plot([row["step"] for row in known], means, lw=1.4, label=label, **style)
        panel.set(title=title, xlabel="step", yscale=scale)
        panel.grid(color="0.92")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, metadata={"Date": None})


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", help="folders of runs, or their names in runs/")
    parser.add_argument("--out", type=Path, default="curves.svg", help="FILE.svg or FILE.png")
    parser.add_argument("--smooth", type=positive_int, default=1, help="steps a point averages")
    args = parser.parse_args(argv)
    if args.out.suffix not in (".svg", ".png"):
        raise ValueError(f"--out must end in .svg or .png, got {args.out}")
    draw({name: read_metrics(name) for name in args.runs}, args.out, args.smooth)
    print(args.out)


if __name__ == "__main__":
    with user_errors():
        main()
