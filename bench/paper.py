"""The paper's table (arXiv 2509.05489): the commands that replicate it, our figures beside it.

    python -m bench.paper --dry-run               # print the commands of all models, check them
    python -m bench.paper --model qwen3-1.7b      # run them one after another, then the table
    python -m bench.paper --model qwen3-1.7b --launch "torchrun --standalone --nproc-per-node 8"

The same command goes on after a stop. --rows GRPO,SA-GRPO takes some of the rows; further flags go
to the training scripts. docs/results.md says what is known to differ from the authors' setting.
"""

import argparse
import importlib
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from statistics import mean
from unittest import mock

import train_sa_grpo
from bench.seeds import steps_of
from data.problems import NAMES
from runtime.errors import user_errors
from runtime.runs import HERE, RUNS
from runtime.settings import Parser

# The two texts of the authors' code, verl/utils/global_tools.py; their verifier is last-number.
SYSTEM = ("You are a reasoning expert assistant. Given a question, you will use your reasoning "
          "skills to solve the problem.")
INSTRUCTION = "Please explain your reasoning process before providing an answer."
PROMPT = ["--system", SYSTEM, "--instruction", INSTRUCTION]
MATH = ["gsm8k", "math", "openr1", "gsm-symbolic", "aime"]  # the paper's means are over these
LOGIC = ["logicbench-paper", "prontoqa-paper"]
ROWS = {  # of the table: the algorithm and --reward, whose default weight is that of its source
    "base": None,
    "GRPO": ("grpo", "vr"), "SA-GRPO": ("grpo", "sar"),
    "PPO": ("ppo", "vr"), "SA-PPO": ("ppo", "sar"),
    "O1": ("grpo", "o1"),
    "ER": ("grpo", "er"),
    "EM": ("grpo", "em"),
    "GRPO+EM": ("grpo", "vr+em"),
    "R_SA": ("grpo", "sar-only"),
}
PAPER = {  # mean accuracy (%) and mean tokens in the paper
    "qwen3-1.7b": {"GRPO": (53.37, 763), "O1": (52.64, 572), "SA-GRPO": (54.13, 602)},
    "qwen3-4b": {"GRPO": (69.07, 1031), "SA-GRPO": (71.41, 894), "EM": (55.46, 1229),
                 "R_SA": (20.96, 84), "GRPO+EM": (69.85, 936)},
    "phi-3.5-mini": {"GRPO": (45.91, 448), "SA-GRPO": (46.19, 368)},
    "gemma3-1b": {"GRPO": (31.78, 1866), "SA-GRPO": (32.24, 1017)},
}


def commands(model: str, row: str, flags: list[str]) -> Iterator[list[str]]:
    """The command that trains a row, if it needs one, then the one that evaluates it."""
    name, tested = f"paper-{model}-{row}", model
    if ROWS[row]:
        algorithm, reward = ROWS[row]
        train = [f"train_sa_{algorithm}.py", "--model", model, "--reward", reward, *PROMPT]
        train += ["--verifier", "last-number", "--name", name]
        if model == "gemma3-1b" and reward in ("o1", "er"):
            train += ["--alpha", "0.15"]  # the paper's, for this model
        yield train + flags
        steps = steps_of(name) or train_sa_grpo.PAPER["steps"]
        tested = str(RUNS / name / f"step_{steps:06d}")
    test = ["evaluate.py", "--model", tested, "--data", ",".join(MATH + LOGIC)]
    yield [*test, *PROMPT, "--name", f"{name}-eval"]


def mistakes(command: list[str]) -> list[str]:
    """What the script's own parser and the names of data say against a command. It does not run."""
    parsed = []

    def parse_and_stop(parser, argv):
        parsed.extend(parser.parse_known_args(argv))
        raise ValueError("that is all")

    with mock.patch.object(Parser, "parse_args", parse_and_stop):
        try:
            importlib.import_module(command[0].removesuffix(".py")).main(command[1:])
        except ValueError as error:
            if not parsed:
                return [f"{command[0]}: {error}"]
    args, unknown = parsed
    names = (args.data or train_sa_grpo.PAPER["data"]).split(",")
    found = [f"{command[0]} has no {word}" for word in unknown if word.startswith("--")]
    return found + [f"there is no data {data}" for data in names if data not in NAMES]


def run(command: list[str], launch: list[str]):
    """Run a command, or go on with it. A finished training is left alone."""
    name = command[command.index("--name") + 1]
    steps = steps_of(name)
    if command[0] == "evaluate.py":  # it goes on by itself, in one process
        launch = [sys.executable]
    elif steps and (RUNS / name / f"step_{steps:06d}" / "state.json").exists():
        return
    elif steps:
        command = [command[0], "--name", name, "--resume"]
    if subprocess.run([*launch, *command], cwd=HERE).returncode:
        raise ValueError(f"{shlex.join(command)} failed: the same command of bench.paper goes on")


def table(model: str, rows: list[str]) -> str:
    """Our accuracy by the paper's rule and our length beside the paper's, over five sets."""
    lines = [f"| {model} | accuracy (%) | paper | tokens | paper |", "|---|---|---|---|---|"]
    for row in rows:
        path = RUNS / f"paper-{model}-{row}-eval" / "results.json"
        accuracy = length = ""
        if path.exists():
            results = json.loads(path.read_text(encoding="utf-8"))
            accuracy = f"{100 * mean(results[data][0]['last_number'] for data in MATH):.2f}"
            length = f"{mean(results[data][0]['length'] for data in MATH):.0f}"
        theirs = PAPER[model].get(row, ("", ""))
        lines.append(f"| {row} | {accuracy} | {theirs[0]} | {length} | {theirs[1]} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PAPER, help="(default: all of them, for --dry-run)")
    parser.add_argument("--rows", default=",".join(ROWS), help="separated by commas (default: all)")
    parser.add_argument("--launch", default=sys.executable, help="what runs a training script")
    parser.add_argument("--dry-run", action="store_true", help="run nothing: print and check")
    args, flags = parser.parse_known_args(argv)
    rows = args.rows.split(",")
    if not set(rows) <= set(ROWS):
        raise ValueError(f"--rows {args.rows}: choose from {', '.join(ROWS)}")
    if not args.model and not args.dry_run:
        raise ValueError("which --model? Its rows take hours to days on GPUs; see --dry-run")
    found = {}
    for model in [args.model] if args.model else PAPER:
        for row in rows:
            for command in commands(model, row, flags):
                if args.dry_run:
                    print("python", shlex.join(command))
                    found |= dict.fromkeys(mistakes(command))
                else:
                    run(command, shlex.split(args.launch))
    if found:
        raise ValueError(f"not every command would run: {'; '.join(found)}")
    if not args.dry_run:
        print(table(args.model, rows))


if __name__ == "__main__":
    with user_errors():
        main()
