"""The claim, in small: SA-GRPO against plain GRPO on the embedded model, same base, same seeds, equal steps; PPO likewise.

    python -m bench.seeds                      # three seeds of both, about half an hour on two cores
    python -m bench.seeds --algorithm ppo      # the same for SA-PPO and PPO, about 20 minutes
    python -m bench.seeds --table              # only the table of what is there

Runs are runs/seeds-{grpo,ppo}-{vr,sar}-s{0,1,2}, one thread each and as many at a time as there are cores; finished ones are kept
and unfinished ones resumed. Any further flags go to the training script of runs that are begun.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from statistics import mean, stdev
from threading import Event

from tqdm import tqdm

from evaluate import aes
from runtime import HERE, RUNS, user_errors


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps_of(run: str) -> int | None:
    """How many steps runs/RUN is to have; None where it is not begun."""
    path = RUNS / run / "config.json"
    return json.loads(path.read_text())["settings"]["steps"] if path.exists() else None


def run_one(algorithm: str, name: str, flags: list[str]) -> None:
    """runs/NAME, begun, or resumed, or left alone where it is finished."""
    command = [sys.executable, f"train_sa_{algorithm}.py", "--run", name]
    if steps := steps_of(name):
        if (RUNS / name / f"step_{steps:06d}" / "state.json").exists():
            return
        command.append("--resume")
    else:
        command += flags
    with open(RUNS / f"{name}.log", "a") as log:
        code = subprocess.run(
            command, cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
        ).returncode
    if code:
        raise ValueError(f"run {name} ended with status {code}: see {RUNS / f'{name}.log'}")


def run_all(runs: list[tuple[str, str, list[str]]], jobs: int) -> None:
    """Every (algorithm, name, flags), `jobs` at a time. After a failure or Ctrl-C none is begun any more."""
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
    """The base's evaluation, and for each row of a table those at the end of its finished runs; names: {row: names of runs}."""
    base, ends = None, {}
    for row, runs in names.items():
        for run in runs:
            evals = lines(RUNS / run / "evals.jsonl")
            base = base or next(iter(evals), None)
            if evals and evals[-1]["step"] == steps_of(run):
                ends.setdefault(row, []).append(evals[-1])
    steps = {e["step"] for last in ends.values() for e in last}
    if len(steps) != 1:
        raise ValueError(
            f"the runs end at different steps ({sorted(steps)}), or none of them is finished"
        )
    return base, ends


def standard_error(values: list[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def spread(values: list[float], form: str) -> str:
    return f"{mean(values):{form}}" + (
        f" ± {standard_error(values):{form}}" if len(values) > 1 else ""
    )


def table(base: dict, ends: dict[str, list[dict]]) -> str:
    rows = [
        "| | accuracy (%) | mean tokens | AES | seeds |",
        "|---|---|---|---|---|",
        f"| base | {100 * base['accuracy']:.1f} | {base['length']:.1f} | | |",
    ]
    for name, last in ends.items():
        rows.append(
            f"| {name} | {spread([100 * e['accuracy'] for e in last], '.1f')} | {spread([e['length'] for e in last], '.1f')} | "
            f"{spread([aes(e, base) for e in last], '.2f')} | {len(last)} |"
        )
    step = next(iter(ends.values()))[0]["step"]
    return "\n".join(
        [
            *rows,
            f"\nAfter {step} steps; {base['problems']} held-out problems, greedy; mean ± standard error.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--algorithm", choices=("grpo", "ppo"), default="grpo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each"
    )
    parser.add_argument("--table", action="store_true", help="train nothing")
    args, flags = parser.parse_known_args()
    names = {
        reward: [f"seeds-{args.algorithm}-{reward}-s{seed}" for seed in range(args.seeds)]
        for reward in ("vr", "sar")
    }
    if not args.table:
        run_all(
            [
                (
                    args.algorithm,
                    names[reward][seed],
                    ["--reward", reward, "--seed", str(seed), *flags],
                )
                for seed in range(args.seeds)
                for reward in names
            ],
            args.jobs,
        )
    title = args.algorithm.upper()
    print(table(*collect({title: names["vr"], f"SA-{title}": names["sar"]})))


if __name__ == "__main__":
    with user_errors():
        main()
