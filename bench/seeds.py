"""SA-GRPO against plain GRPO on the embedded model: same base, same seeds, equal steps.

    python -m bench.seeds                      # three seeds of both: half an hour on two cores
    python -m bench.seeds --algorithm ppo      # SA-PPO and PPO: about 20 minutes
    python -m bench.seeds --table              # only the table of what is there

Runs are runs/seeds-{grpo,ppo}-{vr,sar}-s{0,1,2}, one thread each, as many at a time as there are
cores. Finished ones are kept and unfinished ones resumed. Further flags go to the training script
of runs that are begun.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev
from threading import Event

from tqdm import tqdm

from data.files import read_json
from evaluate import aes
from runtime.errors import user_errors
from runtime.runs import HERE, RUNS


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps_of(name: str) -> int | None:
    """How many steps runs/NAME is to have; None where it is not begun."""
    path = RUNS / name / "config.json"
    return read_json(path)["settings"]["steps"] if path.exists() else None


def run_one(algorithm: str, name: str, flags: list[str]) -> None:
    """runs/NAME, begun, or resumed, or left alone where it is finished."""
    command = [sys.executable, f"train_sa_{algorithm}.py", "--name", name]
    steps = steps_of(name)
    if steps and (RUNS / name / f"step_{steps:06d}" / "state.json").exists():
        return
    command += ["--resume"] if steps else flags
    path, one_thread = RUNS / f"{name}.log", os.environ | {"OMP_NUM_THREADS": "1"}
    with open(path, "a") as log:
        done = subprocess.run(command, cwd=HERE, env=one_thread, stdout=log, stderr=log)
    if done.returncode:
        raise ValueError(f"run {name} ended with status {done.returncode}: see {path}")


def run_all(runs: list[tuple[str, str, list[str]]], jobs: int) -> None:
    """Every (algorithm, name, flags), `jobs` at a time. A failure or Ctrl-C begins no more."""
    RUNS.mkdir(exist_ok=True)
    stopped = Event()

    def run_unless_stopped(*run) -> None:
        try:
            if not stopped.is_set():
                run_one(*run)
        except BaseException:
            stopped.set()  # before this thread takes the next one
            raise

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run_unless_stopped, *run) for run in runs]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc="runs", smoothing=0):
                future.result()
        except BaseException:
            stopped.set()
            raise


def collect(names: dict[str, list[str]]) -> tuple[dict, dict[str, list[dict]]]:
    """The base's evaluation, and those at the end of the finished runs of each row of a table.

    names: {row: names of runs}. Raises ValueError where the runs cannot be compared.
    """
    base, ends = None, {}
    for row, runs in names.items():
        for name in runs:
            evals = lines(RUNS / name / "evals.jsonl")
            base = base or next(iter(evals), None)
            if evals and evals[-1]["step"] == steps_of(name):
                ends.setdefault(row, []).append(evals[-1])
    steps = {end["step"] for row in ends.values() for end in row}
    if not steps:
        raise ValueError("none of the runs is finished")
    if len(steps) > 1:
        raise ValueError(f"the runs end at different steps: {sorted(steps)}")
    return base, ends


def standard_error(values: list[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def spread(values: list[float], form: str) -> str:
    """mean ± standard error, or the only value."""
    error = f" ± {standard_error(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{error}"


def table(base: dict, ends: dict[str, list[dict]]) -> str:
    rows = [
        "| | accuracy (%) | mean tokens | AES 5/5 | AES 3/5 | seeds |",
        "|---|---|---|---|---|---|",
        f"| base | {100 * base['accuracy']:.1f} | {base['length']:.1f} | | | |",
    ]
    for name, last in ends.items():
        accuracy = spread([100 * end["accuracy"] for end in last], ".1f")
        length = spread([end["length"] for end in last], ".1f")
        scores = [spread([aes(end, base, gain) for end in last], ".2f") for gain in (5, 3)]
        rows.append(f"| {name} | {accuracy} | {length} | {' | '.join(scores)} | {len(last)} |")
    step = next(iter(ends.values()))[0]["step"]
    what = f"{base['problems']} held-out problems, greedy; mean ± standard error."
    return "\n".join([*rows, f"\nAfter {step} steps; {what}"])


def study_parser(description: str) -> argparse.ArgumentParser:
    """The flags of every study that trains; it does not take a prefix of one for the flag."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=description, formatter_class=layout, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, default=3)
    jobs = "runs at a time, one thread each (default: one per core)"
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help=jobs)
    return parser


def main() -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--algorithm", choices=("grpo", "ppo"), default="grpo")
    parser.add_argument("--table", action="store_true", help="train nothing")
    args, flags = parser.parse_known_args()
    names, runs = {"vr": [], "sar": []}, []
    for seed in range(args.seeds):
        for reward in names:
            name = f"seeds-{args.algorithm}-{reward}-s{seed}"
            names[reward].append(name)
            own = ["--reward", reward, "--seed", str(seed), *flags]
            runs.append((args.algorithm, name, own))
    if not args.table:
        run_all(runs, args.jobs)
    title = args.algorithm.upper()
    print(table(*collect({title: names["vr"], f"SA-{title}": names["sar"]})))


if __name__ == "__main__":
    with user_errors():
        main()
