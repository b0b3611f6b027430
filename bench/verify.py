"""verify.py against math-verify on the same labelled answer pairs: how often right, and how long a verdict takes.

    python -m bench.verify [--pairs FILE] [--repeats 20] [--peer-repeats 3]

Both run in this process, one thread, one pair at a time, after one warm-up pass. A pair's time is the shortest of its
repeats (the machine is never quiet); the median and 99th percentile are over the pairs. math-verify gets each answer in
the form it understands best ($...$ and \\boxed{...} are both tried, the better one counts), with its own time limits
switched off, so that they cost it nothing. The labels follow the policy in verify.py, which was not written for
math-verify. Prints a Markdown table.

Then, where the published files are beside the pairs: of how many of their reference solutions does ours say that they end in
the reference answer, and which are the others?
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


def measure(equivalent, pairs: list[dict], repeats: int) -> tuple[list[bool | None], list[float]]:
    """The verdict on every pair (None: an exception) and its shortest time in seconds, after a warm-up pass."""
    verdicts, seconds = [None] * len(pairs), [float("inf")] * len(pairs)
    for repeat in range(repeats + 1):
        for k, pair in enumerate(pairs):
            start = time.perf_counter()
            try:
                verdicts[k] = equivalent(pair["prediction"], pair["reference"])
            except Exception:  # counted in the table
                verdicts[k] = None
            if repeat:
                seconds[k] = min(seconds[k], time.perf_counter() - start)
    return verdicts, seconds


def row(name: str, pairs: list[dict], verdicts: list, seconds: list[float]) -> str:
    right = sum(verdict == pair["equal"] for verdict, pair in zip(verdicts, pairs))
    false_yes = sum(verdict is True and not pair["equal"] for verdict, pair in zip(verdicts, pairs))
    false_no = sum(verdict is not True and pair["equal"] for verdict, pair in zip(verdicts, pairs))
    ordered = sorted(seconds)
    middle, late = (
        statistics.median(ordered),
        ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
    )
    return (
        f"| {name} | {right} / {len(pairs)} ({right / len(pairs):.1%}) | {false_yes} | {false_no} "
        f"| {verdicts.count(None)} | {middle * 1e6:,.0f} | {late * 1e6:,.0f} | {ordered[-1] * 1e6:,.0f} |"
    )


def math_verify_with(wrap: str):
    """math-verify's parse and verify with every answer put into `wrap`."""
    from math_verify import parse, verify

    def equivalent(prediction: str, reference: str) -> bool:
        gold, answer = (
            parse(wrap % text, parsing_timeout=None) for text in (reference, prediction)
        )
        return verify(gold, answer, timeout_seconds=None)

    return equivalent


def gold_solutions(folder: Path) -> None:
    """Print the share of published reference solutions whose verdict is "correct", and the rest."""
    for name in ("gsm8k_train", "gsm8k_test", "math500_test"):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        missed = []
        for number, row in enumerate(map(json.loads, lines), 1):
            solution, answer = (
                row.get("solution", row["answer"]),
                row["answer"].rpartition("####")[2].strip(),
            )
            verdict = judge(solution, answer)
            if verdict.reward != 1:
                missed.append(
                    f"line {number}: {verdict.answer!r} ({verdict.status}) where the reference is {answer!r}"
                )
        print(
            f"{name}: {len(lines) - len(missed)} of {len(lines)} ({1 - len(missed) / len(lines):.2%})",
            *missed,
            sep="\n    ",
        )


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ()
    ):
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}"


def main():
    shared = Path(os.environ.get("SA_SHARED", ROOT.parent / "shared"))
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--pairs",
        type=Path,
        default=shared / "verify" / "pairs.jsonl",
        help="JSONL with prediction, reference, equal (default: $SA_SHARED/verify/pairs.jsonl)",
    )
    p.add_argument("--repeats", type=int, default=20, help="timed passes of ours (default: 20)")
    p.add_argument(
        "--peer-repeats", type=int, default=3, help="timed passes of math-verify (default: 3)"
    )
    args = p.parse_args()
    try:
        pairs = [json.loads(line) for line in args.pairs.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        print(f"error: cannot read the pairs ({error}): name a file with --pairs", file=sys.stderr)
        sys.exit(2)

    rows = [("ours", *measure(is_equivalent, pairs, args.repeats))]
    try:
        peer = f"math-verify {version('math-verify')} (sympy {version('sympy')})"
    except ImportError:
        peer = None
    if peer:
        logging.disable(logging.CRITICAL)  # it logs every failed parse
        tries = [
            measure(math_verify_with(wrap), pairs, args.peer_repeats)
            for wrap in ("$%s$", "\\boxed{%s}")
        ]
        rows.append(
            (
                peer,
                *max(tries, key=lambda t: sum(v == pair["equal"] for v, pair in zip(t[0], pairs))),
            )
        )
    print(
        f"{datetime.date.today()}, {machine()}, one thread; {len(pairs)} pairs of {args.pairs.name}\n"
    )
    print(
        "| verifier | right | false yes | false no | exceptions | median µs | 99th percentile µs | slowest µs |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, verdicts, seconds in rows:
        print(row(name, pairs, verdicts, seconds))
    if peer:
        ratio = statistics.median(rows[1][2]) / statistics.median(rows[0][2])
        print(f"\nMedian verdict: {ratio:,.0f} times faster than math-verify.")
    if (raw := shared / "data" / "raw").is_dir():
        print("\nReference solutions that verify:")
        gold_solutions(raw)


if __name__ == "__main__":
    main()
