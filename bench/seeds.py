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
from concurrent.futures import ThreadPoolExecutor
from statistics import mean, stdev

from evaluate import aes
from runtime import HERE, RUNS

REWARDS = ("vr", "sar")


def run_one(algorithm: str, reward: str, seed: int, flags: list[str]) -> None:
    folder = RUNS / f"seeds-{algorithm}-{reward}-s{seed}"
    command = [sys.executable, f"train_sa_{algorithm}.py", "--run", folder.name]
    command += ["--resume"] if (folder / "config.json").exists() else ["--reward", reward, "--seed", str(seed), *flags]
    with open(RUNS / f"{folder.name}.log", "a") as log:
        subprocess.run(command, cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, check=True)


def results(algorithm: str, reward: str, seeds: int) -> tuple[list[dict], list[dict]]:
    """The first and the last evaluation of every run that is there."""
    paths = [RUNS / f"seeds-{algorithm}-{reward}-s{seed}" / "evals.jsonl" for seed in range(seeds)]
    evals = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths if path.exists()]
    return [e[0] for e in evals if e], [e[-1] for e in evals if e]


def spread(values: list[float], form: str) -> str:
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{mean(values):{form}} ± {error:{form}}"


def table(algorithm: str, seeds: int) -> str:
    lines = ["| | accuracy (%) | mean tokens | AES | seeds |", "|---|---|---|---|---|"]
    ends = {reward: results(algorithm, reward, seeds)[1] for reward in REWARDS}
    steps = {r["step"] for last in ends.values() for r in last}
    if len(steps) != 1 or not all(ends.values()):
        sys.exit(f"error: the runs end at different steps ({sorted(steps)}) or are not there: finish them without --table")
    base = results(algorithm, "sar", seeds)[0][0]
    lines.append(f"| base | {100 * base['accuracy']:.1f} | {base['length']:.1f} | | |")
    for reward, name in zip(REWARDS, (algorithm.upper(), f"SA-{algorithm.upper()}")):
        last = ends[reward]
        lines.append(f"| {name} | {spread([100 * r['accuracy'] for r in last], '.1f')} | {spread([r['length'] for r in last], '.1f')} | "
                     f"{spread([aes(r, base) for r in last], '.2f')} | {len(last)} |")
    return "\n".join(lines + [f"\nafter {last[0]['step']} steps; {base['problems']} held-out problems, greedy; mean ± standard error"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--algorithm", choices=("grpo", "ppo"), default="grpo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--table", action="store_true", help="train nothing")
    args, flags = parser.parse_known_args()
    RUNS.mkdir(exist_ok=True)
    if not args.table:
        jobs = [(args.algorithm, reward, seed, flags) for seed in range(args.seeds) for reward in REWARDS]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: run_one(*job), jobs))
    print(table(args.algorithm, args.seeds))


if __name__ == "__main__":
    main()
