"""Log-probs without logits: sar.fused_logprob against other libraries and the bare matmul.

    python -m bench.logprob                            # every table; hours on two cores
    python -m bench.logprob --quick                    # the same with small sizes: half a minute
    python -m bench.logprob --shapes 576x49152 --rows 512 --only "ours;naive" --save r.jsonl
    python -m bench.logprob --table --save r.jsonl     # the table of all such pieces
    python -m bench.logprob --model FOLDER --data FILE # the share of SAR in a training step

Times: every method once a round, `--repeats` rounds, medians, after a warm-up at a few rows.
Memory: the highest resident memory (on a GPU: allocated memory) of a fresh process, less what it
had with its inputs, and less outputs and gradients. All run with the malloc settings of the
training scripts. The bare matmul writes into memory that is there already; its "forward + backward"
are the four products that recomputation needs. Only ours and trl compute the entropy too.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.hub import find_model
from data.prompts import encode_prompt
from data.tokenizer import Tokenizer
from kernels import keep_freed_memory
from model import GPT
from runtime import runs
from runtime.errors import user_errors
from sar import answer_logprobs, fused_logprob

try:
    from trl.kernels import ChunkedLogProbFunction
except ImportError:
    ChunkedLogProbFunction = None

SHAPES = [(576, 49_152), (896, 151_936), (1536, 151_936), (640, 262_144)]  # (D, V)
ROWS = [512, 4096]
GPU_SHAPES, GPU_ROWS = [(1536, 151_936)], [16_384]
TIMES_HEAD = ("forward s", "of matmul", "forward + backward s", "of four matmuls")
MEMORY_HEAD = ("extra MB forward", "extra MB with backward")

# ---- the methods: hidden (N, D), W (V, D), targets (N,) -> log-probs (N,) ----


def ours(h, W, t):
    return fused_logprob(h, W, t)[0]


def naive(h, W, t):
    return (h @ W.T).float().log_softmax(-1).gather(1, t[:, None])[:, 0]


def cross_entropy(h, W, t):
    return -F.linear_cross_entropy(h, W, t, reduction="none")


def auto_chunks(h, W, t):
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(h, W, t, reduction="none", options=options)


def small_chunks(h, W, t):
    """Chunks of 2^22 logits, with which it takes about the memory that ours does."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=max(1, 2**22 // len(W)))
    return -F.linear_cross_entropy(h, W, t, reduction="none", options=options)


def trl(h, W, t):
    return ChunkedLogProbFunction.apply(h, W, None, t, 1.0, 32768, None, 1.0, ("entropy",))[0]


METHODS = {
    "ours": ours,
    "naive": naive,
    "linear_cross_entropy": cross_entropy,
    "linear_cross_entropy, auto chunks": auto_chunks,
    "linear_cross_entropy, small chunks": small_chunks,
    "trl": trl,
}


def run(method: str, h, W, t, backward: bool):
    with torch.set_grad_enabled(backward):
        logprob = METHODS[method](h, W, t)
        if backward:
            return torch.autograd.grad(logprob, (h, W), torch.ones_like(logprob))
    return logprob


@torch.no_grad()
def bare_matmul(h, W, buffer, backward: bool):
    torch.mm(h, W.T, out=buffer)
    if backward:
        torch.mm(h, W.T, out=buffer)
        return buffer @ W, buffer.T @ h


def inputs(N: int, D: int, V: int, device: str):
    """hidden (N, D), W (V, D), targets (N,), made in place: no freed memory may hide what a method
    takes."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    h, W = (torch.empty(size, dtype=dtype, device=device) for size in ((N, D), (V, D)))
    h.normal_().requires_grad_()
    W.normal_(std=3 / D**0.5).requires_grad_()
    return h, W, torch.randint(V, (N,), device=device)


# ---- measurements ----


def timed(f, device: str) -> float:
    began = time.perf_counter()
    f()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


def times(N: int, D: int, V: int, methods: list[str], args):
    h, W, t = inputs(N, D, V, args.device)
    buffer = torch.zeros(N, V, dtype=h.dtype, device=args.device)
    for method in methods:  # kernels are compiled and libraries loaded
        run(method, h[:8], W, t[:8], False)
        run(method, h[:8], W, t[:8], True)
    size = {"N": N, "D": D, "V": V}
    for name, _ in itertools.product(args.passes.split(","), range(args.repeats)):
        backward = name == "both"
        matmul = timed(lambda b=backward: bare_matmul(h, W, buffer, b), args.device)
        seconds = {"matmul": matmul}
        for method in methods:
            seconds[method] = timed(lambda m=method, b=backward: run(m, h, W, t, b), args.device)
        for method, s in seconds.items():
            result = {"method": method, "backward": backward, "seconds": s}
            yield size | result | {"of_matmul": s / matmul}


def memory(N: int, D: int, V: int, methods: list[str]):
    for method, backward in itertools.product(methods, (False, True)):
        case = [str(x) for x in (N, D, V, method, backward)]
        command = [sys.executable, "-m", "bench.logprob", "--memory-of", *case]
        answer = subprocess.run(command, capture_output=True, text=True)
        mb = float(answer.stdout) if answer.returncode == 0 else math.inf  # it did not fit
        yield {"N": N, "D": D, "V": V, "method": method, "backward": backward, "mb": mb}


def resident_bytes(what: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {what} in /proc/self/status: memory is measured on Linux only")


def extra_memory(N: int, D: int, V: int, method: str, backward: bool, device: str) -> float:
    """MB that the method takes at its worst beyond inputs, outputs and gradients. Call it in a
    fresh process."""
    on_gpu = device.startswith("cuda")
    h, W, t = inputs(N, D, V, device)
    run(method, *inputs(8, 64, 128, device), True)  # libraries are loaded
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
        before = resident_bytes("VmRSS")
    kept = run(method, h, W, t, backward)
    after = torch.cuda.max_memory_allocated() if on_gpu else resident_bytes("VmHWM")
    own = sum(x.nbytes for x in kept) if backward else 2 * kept.nbytes
    return (after - before - own) / 1e6


def read_results(path: Path | None) -> list[dict]:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def measure(shapes: list[tuple], rows: list[int], args) -> list[dict]:
    """What --save holds already, and what is measured now."""
    methods = [m for m in METHODS if m != "trl" or ChunkedLogProbFunction]
    if args.only is not None:
        methods = [m for m in methods if m in args.only.split(";")]
    results = read_results(args.save)
    bar = tqdm(unit="measurement")
    for (D, V), N in itertools.product(shapes, rows):
        parts = []
        if "times" in args.parts:
            parts.append(times(N, D, V, methods, args))
        if "memory" in args.parts:
            parts.append(memory(N, D, V, methods))
        for result in itertools.chain(*parts):
            results.append(result)
            if args.save:
                with open(args.save, "a") as file:
                    file.write(json.dumps(result) + "\n")
            bar.update()
    bar.close()
    return results


# ---- tables ----


def print_head(*columns: str) -> None:
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


def table(results: list[dict]) -> None:
    def values(case: tuple, key: str) -> list[float]:
        """All that was measured of one size, method and pass."""
        return [
            r[key]
            for r in results
            if key in r and (r["D"], r["V"], r["N"], r["method"], r["backward"]) == case
        ]

    print_head("N", "D", "V", "", *TIMES_HEAD, *MEMORY_HEAD)
    sizes = sorted({(r["D"], r["V"], r["N"]) for r in results})
    for (D, V, N), method in itertools.product(sizes, ("matmul", *METHODS)):
        cases = [(D, V, N, method, backward) for backward in (False, True)]
        cells = []
        for case, (key, digits) in itertools.product(cases, (("seconds", 3), ("of_matmul", 2))):
            found = values(case, key)
            cells.append(f"{statistics.median(found):.{digits}f}" if found else "")
        for case in cases:
            cells.append("".join(f"{mb:,.0f}" for mb in values(case, "mb")[-1:]))
        if any(cells):
            print(f"| {N} | {D} | {V:,} | {method} | {' | '.join(cells)} |")


def exactness(V: int, device: str) -> None:
    """Largest errors over 1024 rows against float64. A third of the targets is the likeliest token,
    a third is drawn."""
    print()
    print_head("D", "largest logit", "ours: log-prob", "ours: entropy", "naive float32: log-prob",
               "ours, bfloat16 inputs: log-prob")
    for D, largest in itertools.product((64, 576, 896, 1536), (30, 80)):
        h, W = torch.randn(1024, D, device=device), torch.randn(V, D, device=device)
        h *= largest / (h @ W.T).abs().max()
        errors = []
        for a, b in ((h, W), (h.bfloat16(), W.bfloat16())):
            logp = (a.double() @ b.double().T).log_softmax(-1)
            t = torch.randint(V, (1024,), device=device)
            t[::3] = logp[::3].argmax(-1)
            t[1::3] = torch.multinomial(logp[1::3].exp(), 1)[:, 0]
            want = logp.gather(1, t[:, None])[:, 0]
            logprob, entropy = fused_logprob(a, b, t)
            want_entropy = -(logp.exp() * logp).sum(-1)
            differences = logprob - want, entropy - want_entropy, naive(a, b, t) - want
            errors += [d.abs().max() for d in differences]
        print(f"| {D} | {largest} | {' | '.join(f'{e:.1e}' for e in errors[:4])} |")


# ---- within a training step ----


def scoring(args) -> None:
    """Two steps of SA-GRPO on a real model, then the second step's answers scored on their own."""
    import train_sa_grpo

    with tempfile.TemporaryDirectory() as folder:
        runs.RUNS = Path(folder)
        flags = ["--steps", "2", "--prompts-per-step", "4", "--samples", "4",
                 "--max-new-tokens", "160", "--device", args.device]
        train_sa_grpo.main(
            ["--model", args.model, "--data", args.data, "--name", "bench", *flags]
        )
        metrics = read_results(runs.RUNS / "bench" / "metrics.jsonl")[-1]
        rows = read_results(runs.RUNS / "bench" / "completions.jsonl")
    folder = find_model(args.model)
    tokenizer = Tokenizer.from_pretrained(folder)
    policy = GPT.from_pretrained(folder, device=args.device)
    rows = [row for row in rows if row["step"] == 2]
    answers = [row["tokens"] for row in rows]
    with_question = [encode_prompt(tokenizer, row["question"]) for row in rows]
    without_question = [encode_prompt(tokenizer, "")] * len(rows)
    # as the scripts choose it for a large model
    micro_tokens = 8192 if args.device.startswith("cuda") else 512
    ways = {
        "ppl(a given q)": (with_question, answers),
        "ppl(a)": (without_question, answers),
        "both in one call": (with_question + without_question, answers * 2),
    }
    seconds = {way: [] for way in ways}
    for _, (way, texts) in itertools.product(range(args.repeats), ways.items()):

        def score(texts=texts):
            answer_logprobs(policy, *texts, micro_tokens=micro_tokens)

        seconds[way].append(timed(score, args.device))

    median = {way: statistics.median(s) for way, s in seconds.items()}
    parts = {part: metrics[f"seconds_{part}"] for part in ("sampling", "scoring", "update")}
    step = sum(parts.values())
    print(f"\n{len(answers)} answers, {sum(map(len, answers))} answer tokens; a step takes "
          f"{step:.1f} s: {', '.join(f'{part} {s:.1f}' for part, s in parts.items())}\n")
    print_head("scoring", "tokens", "s", "of ppl(a given q)", "of the step")
    for way, (contexts, texts) in ways.items():
        tokens = sum(map(len, contexts)) + sum(map(len, texts))
        m = median[way]
        of_first, of_step = m / median["ppl(a given q)"], m / step
        print(f"| {way} | {tokens:,} | {m:.2f} | {of_first:.2f} | {of_step:.1%} |")
    second = median["both in one call"] - median["ppl(a given q)"]
    print(f"\nppl(a), SAR's own, costs {second:.2f} s in one call with ppl(a given q): "
          f"{second / step:.1%} of the step")


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="(default: a GPU if there is one)")
    p.add_argument("--quick", action="store_true", help="one small size")
    p.add_argument("--shapes", help="DxV, separated by commas (default: those of four models; on a "
                   "GPU 1536x151936)")
    p.add_argument("--rows", help="N, separated by commas (default: 512,4096; on a GPU 16384)")
    p.add_argument("--only", help="methods beside the bare matmul, separated by semicolons "
                   "(default: all)")
    p.add_argument("--passes", default="forward,both", help="forward alone, forward and backward, "
                   "or both of these (default: forward,both)")
    p.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    p.add_argument("--parts", default="times,memory,exactness",
                   help="which tables (default: times,memory,exactness)")
    p.add_argument("--save", type=Path, help="append what is measured to this file, and print the "
                   "table of all it holds")
    p.add_argument("--table", action="store_true", help="measure nothing: the table of --save")
    p.add_argument("--model", help="instead: scoring within a training step of this model")
    p.add_argument("--data", help="problems for --model, e.g. gsm8k_train.jsonl")
    p.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)  # for the fresh process
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    keep_freed_memory()
    if args.memory_of:
        *size, method, backward = args.memory_of
        print(extra_memory(*map(int, size), method, backward == "True", args.device))
        return
    if args.model:
        scoring(args)
        return

    on_gpu = args.device.startswith("cuda")
    shapes, rows = (GPU_SHAPES, GPU_ROWS) if on_gpu else (SHAPES, ROWS)
    if args.quick:
        shapes, rows = [(128, 8192)], [256]
    if args.shapes:
        shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    if args.rows:
        rows = [int(n) for n in args.rows.split(",")]
    results = read_results(args.save) if args.table else measure(shapes, rows, args)
    try:
        library = f"trl {version('trl')}"
    except PackageNotFoundError:
        library = "trl is not installed (it brings a dozen packages): no rows of it"
    device = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
    print(f"{time.strftime('%Y-%m-%d')}, {device}, torch {torch.__version__}, {library}\n")
    table(results)
    if "exactness" in args.parts and not args.table:
        exactness(8192 if args.quick else 50_000, args.device)


if __name__ == "__main__":
    with user_errors():
        main()
