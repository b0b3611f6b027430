"""Accuracy against length: SA-GRPO at several alpha and the rewards it is compared with, one base.

    python -m bench.pareto                # three seeds of nineteen rewards: over 3 h on two cores
    python -m bench.pareto --draw         # table and figures of what is there; trains nothing
    python -m bench.pareto --quick        # one seed, a few small steps: shows that everything runs

Runs are runs/pareto-{reward}-s{0,1,2}, one thread each, as many at a time as there are cores.
Finished ones are kept and unfinished ones resumed. Table and figures go to --out: pareto.md,
pareto.svg (accuracy against length) and pareto-curves.svg (training curves, means over seeds and
then over five steps). --quick begins anew each time and writes quick-pareto.md and so on. Further
flags go to the training script of runs that are begun.
"""

import shutil
from pathlib import Path
from statistics import mean

from bench.seeds import collect, lines, run_all, standard_error, study_parser, table
from runtime.errors import user_errors
from runtime.runs import RUNS
from view import curves

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
    "O1": ["--reward", "o1"],  # from here on with each reward's own weight, sar.REWARDS
    "ER": ["--reward", "er"],
    "SAR times": ["--reward", "sar-times"],
    "MO-GRPO": ["--reward", "mo"],
    "CDE": ["--reward", "cde"],
    "Kimi": ["--reward", "kimi"],
    "ALP": ["--reward", "alp"],
    "GR3": ["--reward", "gr3"],
    "Truncation": ["--reward", "truncation"],
    "GFPO": ["--reward", "vr", "--samples", "16", "--keep", "8"],
}
SIZE = "--steps 100 --eval-every 100".split()
QUICK = "--steps 3 --eval-every 3 --prompts-per-step 4 --samples 4 --max-new-tokens 40".split()
# Okabe and Ito's colours, which the colour-blind can tell apart: name: colour, marker, dashes
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
    "SAR times": ("#56B4E9", "p", "-"),
    "MO-GRPO": ("#CC79A7", "h", "-"),
    "CDE": ("#E69F00", "8", "-"),
    "Kimi": ("#009E73", "<", "-"),
    "ALP": ("#009E73", ">", ":"),
    "GR3": ("#D55E00", "D", "-"),
    "Truncation": ("0.5", "X", ":"),
    "GFPO": ("0.5", "s", "--"),
}


def run_names(seeds: int, quick: bool) -> dict[str, list[str]]:
    names = {}
    for row in STUDY:
        slug = row.lower().replace(" + ", "+").replace(" ", "-")
        slug = f"quick-{slug}" if quick else slug
        names[row] = [f"pareto-{slug}-s{seed}" for seed in range(seeds)]
    return names


def pareto_front(points: dict[str, tuple[float, float]]) -> list[tuple[float, float]]:
    """The (length, accuracy) that no other point beats in both, from the shortest on."""
    front: list[tuple[float, float]] = []
    for length, accuracy in sorted(points.values(), key=lambda p: (p[0], -p[1])):
        if not front or accuracy > front[-1][1]:
            front.append((length, accuracy))
    return front


def sweep_of(points: dict) -> list[str]:
    """The names of SAR at a constant alpha."""
    return [name for name in points if name.removeprefix("SAR ").replace(".", "").isdigit()]


def draw_pareto(base: dict, ends: dict[str, list[dict]], path: Path) -> None:
    """Accuracy against length: everything on the left, the accurate ones close up on the right."""
    points, errors = {}, {}
    for name, last in {"base": [base], **ends}.items():
        lengths = [end["length"] for end in last]
        accuracies = [100 * end["accuracy"] for end in last]
        points[name] = (mean(lengths), mean(accuracies))
        errors[name] = (standard_error(lengths), standard_error(accuracies))
    best = max(accuracy for _, accuracy in points.values())
    near = [name for name, (_, accuracy) in points.items() if accuracy >= best - 6]
    figure, (left, right) = curves.pyplot().subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    draw_points(left, points, errors, list(points))
    draw_points(right, points, errors, near)
    label_sweep(right, points, near)
    lowest = min(points[name][1] - errors[name][1] for name in near)
    left.set_ylim(None, 104)
    right.set_ylim(lowest - 0.4, best + 0.9)
    right.set_title("close up", fontsize=10)
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def draw_points(panel, points: dict, errors: dict, shown: list[str]) -> None:
    """The Pareto front and the sweep over alpha, and the points of the rewards in `shown`."""
    front, sweep = pareto_front(points), sweep_of(points)
    longest = max(length for length, _ in points.values())
    front = [(front[0][0], 0), *front, (longest + 5, front[-1][1])]
    panel.step(*zip(*front), where="post", color="0.8", lw=5, zorder=0, label="Pareto front")
    panel.plot(*zip(*[points[name] for name in sweep]), color=LOOK["SAR"][0], lw=1, zorder=1)
    for name in shown:
        label = name
        if name in sweep:  # one legend entry for all of them
            label = "SAR, by its alpha" if name == sweep[0] else None
        colour, marker, _ = LOOK["SAR" if name in sweep else name]
        panel.errorbar(
            *points[name],
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
    panel.set(xlabel="mean answer length (tokens)")
    panel.set(ylabel="accuracy (%), greedy, held-out problems")
    panel.grid(color="0.92")


def label_sweep(panel, points: dict, shown: list[str]) -> None:
    """Write alpha at its points: above and below in turn and towards the middle, for neighbours
    may coincide."""
    middle = mean(length for length, _ in points.values())
    for number, name in enumerate(sweep_of(points)):
        if name in shown:
            side, align = (6, "left") if points[name][0] < middle else (-6, "right")
            panel.annotate(
                name.removeprefix("SAR "),
                points[name],
                xytext=(side, 6 if number % 2 else -13),
                textcoords="offset points",
                ha=align,
                color=LOOK["SAR"][0],
                fontsize=9,
            )


def mean_log(runs: list[str]) -> list[dict]:
    """metrics.jsonl, step by step the mean over the finished runs."""
    logs = [lines(RUNS / name / "metrics.jsonl") for name in runs]
    longest = max(map(len, logs))
    logs = [log for log in logs if len(log) == longest]
    rows = []
    for step in zip(*logs):
        row = {}
        for key in ("step", *curves.PANELS):
            values = [record[key] for record in step]
            row[key] = None if None in values else mean(values)
        rows.append(row)
    return rows


def main() -> None:
    parser = study_parser(__doc__)
    out = "where table and figures go (default: the folder of the runs)"
    parser.add_argument("--out", type=Path, default=RUNS, help=out)
    parser.add_argument("--draw", action="store_true", help="train nothing")
    parser.add_argument("--quick", action="store_true", help="a few small steps")
    args, flags = parser.parse_known_args()
    curves.pyplot()  # is matplotlib there? before an hour of training
    seeds, size, kind = args.seeds, SIZE, ""
    if args.quick:
        seeds, size, kind = 1, QUICK, "quick-"
    names = run_names(seeds, args.quick)
    if args.quick and not args.draw:
        for runs in names.values():
            shutil.rmtree(RUNS / runs[0], ignore_errors=True)
    if not args.draw:
        runs = []
        for seed in range(seeds):  # all rewards of a seed before the next seed
            for row, own in STUDY.items():
                runs.append(("grpo", names[row][seed], [*size, "--seed", str(seed), *flags, *own]))
        run_all(runs, args.jobs)
    base, ends = collect(names)
    args.out.mkdir(parents=True, exist_ok=True)
    files = [f"{kind}{file}" for file in ("pareto.md", "pareto.svg", "pareto-curves.svg")]
    text, figure, training = [args.out / file for file in files]
    text.write_text(table(base, ends) + "\n")
    draw_pareto(base, ends, figure)
    drawn = [row for row in ends if row in LOOK or row == "SAR 0.2"]
    looks = {row: LOOK["SAR" if row == "SAR 0.2" else row] for row in drawn}
    styles = {row: {"color": colour, "ls": dashes} for row, (colour, _, dashes) in looks.items()}
    curves.draw({row: mean_log(names[row]) for row in drawn}, training, 5, styles)
    print(f"{table(base, ends)}\n\n{args.out}: {', '.join(files)}")


if __name__ == "__main__":
    with user_errors():
        main()
