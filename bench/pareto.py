"""The third claim, in small: accuracy against length of SA-GRPO at several alpha and of its rivals, from the same base.

    python -m bench.pareto                # three seeds of eleven rewards, 100 steps each: 1 h 50 min on two cores
    python -m bench.pareto --draw         # table and figures of what is there; trains nothing
    python -m bench.pareto --quick        # one seed, a few small steps: shows that everything runs, and nothing else

Runs are runs/pareto-{reward}-s{0,1,2}, one thread each and as many at a time as there are cores; finished ones are kept and
unfinished ones resumed. Table and figures go to --out: pareto.md, pareto.svg (accuracy against length) and pareto-curves.svg
(accuracy, length, R_SA, entropy and KL against the step); those of --quick, which begins anew each time, to quick-pareto.md and so on.
Further flags go to the training script of runs that are begun.
"""

import argparse
import os
import shutil
from pathlib import Path
from statistics import mean

from bench.seeds import collect, lines, run_all, standard_error, table
from runtime import RUNS, user_errors

STUDY = {  # name: flags of train_sa_grpo.py
    "GRPO": ["--reward", "vr"],
    "SAR 0.05": ["--reward", "sar", "--alpha", "0.05"],
    "SAR 0.1": ["--reward", "sar", "--alpha", "0.1"],
    "SAR 0.2": ["--reward", "sar", "--alpha", "0.2"],
    "SAR 0.3": ["--reward", "sar", "--alpha", "0.3"],
    "SAR 0 to 0.4": ["--reward", "sar", "--alpha", "0", "--alpha-end", "0.4"],  # 0.2 on average
    "SAR alone": ["--reward", "sar-only"],
    "EM": ["--reward", "em"],
    "GRPO + EM": ["--reward", "vr+em"],
    "O1": ["--reward", "o1"],
    "ER": ["--reward", "er"],
}
SIZE = ["--steps", "100", "--eval-every", "100"]
QUICK = [
    "--steps",
    "3",
    "--eval-every",
    "3",
    "--prompts-per-step",
    "4",
    "--n",
    "4",
    "--max-new-tokens",
    "40",
]
# Okabe and Ito's colours, which the colour-blind tell apart; marker and dashes say the same in black and white
LOOK = {
    "base": ("black", "*", "-"),
    "GRPO": ("black", "s", "-"),
    "SAR": ("#0072B2", "o", "-"),
    "SAR 0 to 0.4": ("#56B4E9", "D", "--"),
    "SAR alone": ("#CC79A7", "v", ":"),
    "EM": ("#E69F00", "^", ":"),
    "GRPO + EM": ("#E69F00", "P", "-."),
    "O1": ("#009E73", "X", "--"),
    "ER": ("#D55E00", "d", "-."),
}


def run_names(seeds: int, quick: bool) -> dict[str, list[str]]:
    slugs = {
        name: ("quick-" if quick else "") + name.lower().replace(" + ", "+").replace(" ", "-")
        for name in STUDY
    }
    return {
        name: [f"pareto-{slug}-s{seed}" for seed in range(seeds)] for name, slug in slugs.items()
    }


def pareto_front(points: dict[str, tuple[float, float]]) -> list[tuple[float, float]]:
    """The (length, accuracy) points that no other one beats in both, from the shortest to the most accurate."""
    front: list[tuple[float, float]] = []
    for length, accuracy in sorted(points.values(), key=lambda p: (p[0], -p[1])):
        if not front or accuracy > front[-1][1]:
            front.append((length, accuracy))
    return front


def draw_pareto(plt, base: dict, ends: dict[str, list[dict]], path: Path) -> None:
    """Accuracy against length: everything on the left, the accurate ones close up on the right."""
    points, errors = {}, {}
    for name, last in {"base": [base], **ends}.items():
        lengths, accuracies = [e["length"] for e in last], [100 * e["accuracy"] for e in last]
        points[name], errors[name] = (
            (mean(lengths), mean(accuracies)),
            (standard_error(lengths), standard_error(accuracies)),
        )
    front = pareto_front(points)
    front = [(front[0][0], 0), *front, (max(x for x, _ in points.values()) + 5, front[-1][1])]
    sweep = [name for name in points if name.removeprefix("SAR ").replace(".", "").isdigit()]
    best = max(y for _, y in points.values())
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for panel, lowest in zip(panels, (None, best - 6)):
        panel.step(*zip(*front), where="post", color="0.8", lw=5, zorder=0, label="Pareto front")
        panel.plot(*zip(*[points[name] for name in sweep]), color=LOOK["SAR"][0], lw=1, zorder=1)
        for name, (x, y) in points.items():
            if lowest and y < lowest:
                continue
            colour, marker, _ = LOOK["SAR" if name in sweep else name]
            label = name if name not in sweep else "SAR, by its alpha" if name == sweep[0] else None
            panel.errorbar(
                x,
                y,
                xerr=errors[name][0],
                yerr=errors[name][1],
                color=colour,
                marker=marker,
                ms=11 if marker == "*" else 7,
                mfc="white" if marker in "osv^" else colour,
                capsize=3,
                lw=1,
                ls="none",
                label=label,
            )
            if (
                lowest and name in sweep
            ):  # labels below and above in turn, towards the middle: neighbours may coincide
                left = x < mean(length for length, _ in points.values())
                panel.annotate(
                    name.removeprefix("SAR "),
                    (x, y),
                    xytext=(6 if left else -6, 6 if sweep.index(name) % 2 else -13),
                    textcoords="offset points",
                    ha="left" if left else "right",
                    color=colour,
                    fontsize=9,
                )
        panel.set(
            xlabel="mean answer length (tokens)", ylabel="accuracy (%), greedy, held-out problems"
        )
        shown = [y - errors[name][1] for name, (_, y) in points.items() if lowest and y >= lowest]
        panel.set_ylim(*((min(shown) - 0.4, best + 0.9) if lowest else (None, 104)))
        panel.grid(color="0.92")
    panels[1].set_title("close up", fontsize=10)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        fontsize=9,
        frameon=False,
    )
    figure.savefig(path, metadata={"Date": None})


def draw_curves(plt, names: dict[str, list[str]], path: Path) -> None:
    """A panel per quantity, a line per reward: the mean over its seeds, then over five steps."""
    panels = {
        "accuracy": "accuracy (sampled)",
        "length_mean": "mean tokens (sampled)",
        "r_sa_mean": "R_SA",
        "entropy": "entropy (nats)",
        "kl": "KL to the base (nats)",
    }
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.6), layout="constrained")
    for panel, (key, title) in zip(axes.flat, panels.items()):
        for name, runs in names.items():
            logs = [lines(RUNS / run / "metrics.jsonl") for run in runs]
            logs = [log for log in logs if len(log) == max(map(len, logs))]  # finished runs
            if any(rows[key] is None for rows in logs[0]):  # no KL is measured with --kl-coef 0
                continue
            average = [mean(rows[key] for rows in step) for step in zip(*logs)]
            smooth = [mean(average[max(0, i - 4) : i + 1]) for i in range(len(average))]
            colour, _, dashes = LOOK["SAR" if name == "SAR 0.2" else name]
            panel.plot(
                range(1, len(smooth) + 1), smooth, color=colour, ls=dashes, lw=1.4, label=name
            )
        panel.set(
            title=title, xlabel="step", yscale="log" if key in ("entropy", "kl") else "linear"
        )
        panel.grid(color="0.92")
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), loc="center", frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=RUNS,
        help="where table and figures go (default: the folder of the runs)",
    )
    parser.add_argument("--draw", action="store_true", help="train nothing")
    parser.add_argument("--quick", action="store_true")
    args, flags = parser.parse_known_args()
    try:  # before an hour of training
        import matplotlib
    except ModuleNotFoundError:
        raise ValueError(
            "the figures need matplotlib: pip install -r requirements-dev.txt"
        ) from None
    matplotlib.use("svg")
    matplotlib.rcParams |= {
        "svg.hashsalt": "pareto",
        "svg.fonttype": "none",
    }  # the same runs give the same file; letters stay letters
    import matplotlib.pyplot as plt

    seeds, size = (1, QUICK) if args.quick else (args.seeds, SIZE)
    names, kind = run_names(seeds, args.quick), "quick-" if args.quick else ""
    if args.quick and not args.draw:
        for runs in names.values():
            shutil.rmtree(RUNS / runs[0], ignore_errors=True)
    if not args.draw:
        run_all(
            [
                ("grpo", names[row][seed], [*STUDY[row], *size, "--seed", str(seed), *flags])
                for seed in range(seeds)
                for row in STUDY
            ],
            args.jobs,
        )  # all rewards of a seed before the next seed
    base, ends = collect(names)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{kind}pareto.md").write_text(table(base, ends) + "\n")
    draw_pareto(plt, base, ends, args.out / f"{kind}pareto.svg")
    draw_curves(
        plt,
        {row: names[row] for row in ends if row in LOOK or row == "SAR 0.2"},
        args.out / f"{kind}pareto-curves.svg",
    )
    print(
        table(base, ends)
        + f"\n\n{args.out}: {kind}pareto.md, {kind}pareto.svg, {kind}pareto-curves.svg"
    )


if __name__ == "__main__":
    with user_errors():
        main()
