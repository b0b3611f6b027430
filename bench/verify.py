"""verify.py against math-verify on the same labelled answer pairs: how often right, and how fast.

    python -m bench.verify [--pairs FILE] [--repeats 20] [--math-verify-repeats 3]

Both run in this process, one thread, one pair at a time, after one warm-up pass. A pair's time is
the shortest of its repeats (the machine is never quiet); the median and 99th percentile are over
the pairs. math-verify gets each answer in the form it understands best ($...$ and \\boxed{...} are
both tried, the better one counts), with its own time limits switched off, so that they cost it
nothing. The labels follow the rules of verify.py, which were not written for math-verify. Prints a
Markdown table.

Then, where the published files are beside the pairs: of how many of their reference solutions does
ours say that they end in the reference answer, and which are the others?
"""

import argparse
import datetime
import json
import logging
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

from verify import is_equivalent, judge

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("verifier", "right", "false yes", "false no", "exceptions", "median µs",
           "99th percentile µs", "slowest µs")


def measure(equivalent, pairs: list[dict], repeats: int) -> tuple[list[bool | None], list[float]]:
    """The verdict on every pair (None: an exception) and its shortest time in seconds."""
    verdicts, seconds = [None] * len(pairs), [float("inf")] * len(pairs)
    for repeat in range(repeats + 1):
        for k, pair in enumerate(pairs):
            start = time.perf_counter()
            try:
                verdicts[k] = equivalent(pair["prediction"], pair["reference"])
            except Exception:  # counted in the table
                verdicts[k] = None
            if repeat:  # the first pass warms up
                seconds[k] = min(seconds[k], time.perf_counter() - start)
    return verdicts, seconds


def count_right(pairs: list[dict], verdicts: list) -> int:
    return sum(verdict == pair["equal"] for verdict, pair in zip(verdicts, pairs))


def row(name: str, pairs: list[dict], verdicts: list, seconds: list[float]) -> str:
    right = count_right(pairs, verdicts)
    false_yes = sum(verdict is True and not pair["equal"] for verdict, pair in zip(verdicts, pairs))
    false_no = sum(verdict is not True and pair["equal"] for verdict, pair in zip(verdicts, pairs))
    ordered = sorted(seconds)
    late = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    times = (statistics.median(ordered), late, ordered[-1])
    cells = [name, f"{right} / {len(pairs)} ({right / len(pairs):.1%})", false_yes, false_no,
             verdicts.count(None), *(f"{t * 1e6:,.0f}" for t in times)]
    return f"| {' | '.join(map(str, cells))} |"


def math_verify_with(wrap: str):
    """math-verify's parse and verify with every answer put into `wrap`."""
    from math_verify import parse, verify

    def equivalent(prediction: str, reference: str) -> bool:
        gold = parse(wrap % reference, parsing_timeout=None)
        return verify(gold, parse(wrap % prediction, parsing_timeout=None), timeout_seconds=None)

    return equivalent


def gold_solutions(folder: Path) -> None:
    """Print the share of published reference solutions whose verdict is "correct", and the rest."""
    for name in ("gsm8k_train", "gsm8k_test", "math500_test"):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        missed = []
        for number, row in enumerate(map(json.loads, lines), 1):
            answer = row["answer"].rpartition("####")[2].strip()
            verdict = judge(row.get("solution", row["answer"]), answer)
            if verdict.reward != 1:
                missed.append(f"line {number}: {verdict.answer!r} ({verdict.status}) where the "
                              f"reference is {answer!r}")
        right = len(lines) - len(missed)
        print(f"{name}: {right} of {len(lines)} ({right / len(lines):.2%})", *missed, sep="\n    ")


def machine() -> str:
    cpu, details = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    for line in details.read_text().splitlines() if details.exists() else ():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}"


def main():
    shared = Path(os.environ.get("SA_SHARED", ROOT.parent / "shared"))
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--pairs", type=Path, default=shared / "verify" / "pairs.jsonl", help="JSONL "
                   "with prediction, reference, equal (default: $SA_SHARED/verify/pairs.jsonl)")
    p.add_argument("--repeats", type=int, default=20, help="timed passes of ours (default: 20)")
    p.add_argument("--math-verify-repeats", type=int, default=3, help="timed passes of math-verify "
                   "(default: 3)")
    args = p.parse_args()
    try:
        pairs = [json.loads(line) for line in args.pairs.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        print(f"error: cannot read the pairs ({error}): name a file with --pairs", file=sys.stderr)
        sys.exit(2)

    rows = [("ours", *measure(is_equivalent, pairs, args.repeats))]
    try:
        theirs = f"math-verify {version('math-verify')} (sympy {version('sympy')})"
    except ImportError:
        theirs = None
    if theirs:
        logging.disable(logging.CRITICAL)  # it logs every failed parse
        tries = [measure(math_verify_with(wrap), pairs, args.math_verify_repeats)
                 for wrap in ("$%s$", "\\boxed{%s}")]
        rows.append((theirs, *max(tries, key=lambda tried: count_right(pairs, tried[0]))))
    print(f"{datetime.date.today()}, {machine()}, one thread; {len(pairs)} pairs of "
          f"{args.pairs.name}\n")
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    for name, verdicts, seconds in rows:
        print(row(name, pairs, verdicts, seconds))
    if theirs:
        ratio = statistics.median(rows[1][2]) / statistics.median(rows[0][2])
        print(f"\nMedian verdict: {ratio:,.0f} times faster than math-verify.")
    if (raw := shared / "data" / "raw").is_dir():
        print("\nReference solutions that verify:")
        gold_solutions(raw)


if __name__ == "__main__":
    main()
