"""The claim, in small: SA-GRPO against plain GRPO on the embedded model, same base, same seeds, equal steps.

    python -m bench.seeds                      # three seeds of both, about half an hour on two cores
    python -m bench.seeds --table              # only the table of what is there

Runs are runs/seeds-grpo-{vr,sar}-s{0,1,2}, one thread each and as many at a time as there are cores; finished ones are kept
and unfinished ones resumed. Any further flags go to the training script.
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

NAMES = {"vr": "GRPO", "sar": "SA-GRPO"}


def run_one(reward: str, seed: int, flags: list[str]) -> None:
    folder = RUNS / f"seeds-grpo-{reward}-s{seed}"
    command = [sys.executable, "train_sa_grpo.py", "--run", folder.name]
    command += ["--resume"] if any(folder.glob("step_*/state.json")) else ["--reward", reward, "--seed", str(seed), *flags]
    with open(RUNS / f"{folder.name}.log", "a") as log:
        subprocess.run(command, cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, check=True)


def results(reward: str, seeds: int) -> tuple[list[dict], list[dict]]:
    """The first and the last evaluation of every run that is there."""
    paths = [RUNS / f"seeds-grpo-{reward}-s{seed}" / "evals.jsonl" for seed in range(seeds)]
    evals = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths if path.exists()]
    return [e[0] for e in evals if e], [e[-1] for e in evals if e]


def spread(values: list[float], form: str) -> str:
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{mean(values):{form}} ± {error:{form}}"


def table(seeds: int) -> str:
    lines = ["| | accuracy (%) | mean tokens | AES | seeds |", "|---|---|---|---|---|"]
    base = results("sar", seeds)[0][0]
    lines.append(f"| base | {100 * base['accuracy']:.1f} | {base['length']:.1f} | | |")
    for reward, name in NAMES.items():
        last = results(reward, seeds)[1]
        if last:
            lines.append(f"| {name} | {spread([100 * r['accuracy'] for r in last], '.1f')} | {spread([r['length'] for r in last], '.1f')} | "
                         f"{spread([aes(r, base) for r in last], '.2f')} | {len(last)} |")
    return "\n".join(lines + [f"\nafter {last[0]['step']} steps; {base['problems']} held-out problems, greedy; mean ± standard error"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--table", action="store_true", help="train nothing")
    args, flags = parser.parse_known_args()
    RUNS.mkdir(exist_ok=True)
    if not args.table:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: run_one(*job, flags), [(reward, seed) for seed in range(args.seeds) for reward in NAMES]))
    print(table(args.seeds))


if __name__ == "__main__":
    main()
