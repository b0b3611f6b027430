"""Log-probs without logits: sar.fused_logprob against the plain computation, its peers, and the bare matmul.

    python -m bench.logprob                                       # every table; on a GPU where there is one; hours on two cores
    python -m bench.logprob --quick                               # the same with small sizes, half a minute
    python -m bench.logprob --shapes 576x49152 --rows 512 --only "ours;naive" --save r.jsonl      # a piece; then, of all pieces:
    python -m bench.logprob --table --save r.jsonl
    python -m bench.logprob --model FOLDER --data FILE            # scoring answers, and the share of SAR in a training step

Times: every method once a round, `--repeats` rounds, medians, after a warm-up at a few rows. Memory: the highest resident
memory (on a GPU: allocated memory) of a fresh process less what it had with its inputs, and less outputs and gradients. All run
with the malloc settings of the training scripts. The bare matmul writes into memory that is there already; "forward +
backward" of it are the four products that recomputation needs. linear_cross_entropy has no entropy, the others compute it only
where it comes with the log-probs (ours, trl).
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

import runtime
from data.hub import find_model
from data.prompts import encode_prompt
from data.tokenizer import Tokenizer
from model import GPT
from sar import answer_logprobs, fused_logprob

try:
    from trl.kernels import ChunkedLogProbFunction
except ImportError:
    ChunkedLogProbFunction = None

SHAPES = [(576, 49_152), (896, 151_936), (1536, 151_936), (640, 262_144)]  # (D, V)
ROWS = [512, 4096]
GPU_SHAPES, GPU_ROWS = [(1536, 151_936)], [16_384]


def naive(h, W, t):
    return (h @ W.T).float().log_softmax(-1).gather(1, t[:, None])[:, 0]


def chunked_cross_entropy(h, W, t):
    """Chunks of 2^22 logits, with which it takes about the memory that ours does."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=max(1, 2**22 // len(W)))
    return -F.linear_cross_entropy(h, W, t, reduction="none", options=options)


METHODS = {
    "ours": lambda h, W, t: fused_logprob(h, W, t)[0],
    "naive": naive,
    "linear_cross_entropy": lambda h, W, t: -F.linear_cross_entropy(h, W, t, reduction="none"),
    "linear_cross_entropy, auto chunks": lambda h, W, t: (
        -F.linear_cross_entropy(
            h, W, t, reduction="none", options=torch.nn.LinearCrossEntropyOptions()
        )
    ),
    "linear_cross_entropy, small chunks": chunked_cross_entropy,
    "trl": lambda h, W, t: ChunkedLogProbFunction.apply(
        h, W, None, t, 1.0, 32768, None, 1.0, ("entropy",)
    )[0],
}


def inputs(N: int, D: int, V: int, device: str):
    """hidden (N, D), unembedding (V, D), targets (N,), made in place: no freed memory may hide what a method takes."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    h, W = (torch.empty(size, dtype=dtype, device=device) for size in ((N, D), (V, D)))
    return (
        h.normal_().requires_grad_(),
        W.normal_(std=3 / D**0.5).requires_grad_(),
        torch.randint(V, (N,), device=device),
    )


def run(method: str, h, W, t, backward: bool):
    with torch.set_grad_enabled(backward):
        logprob = METHODS[method](h, W, t)
        if backward:
            return torch.autograd.grad(logprob, (h, W), torch.ones_like(logprob))
    return logprob


def bare_matmul(h, W, buffer, backward: bool):
    with torch.no_grad():
        torch.mm(h, W.T, out=buffer)
        if backward:
            torch.mm(h, W.T, out=buffer)
            return buffer @ W, buffer.T @ h


def timed(f, device: str) -> float:
    began = time.perf_counter()
    f()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


def times(N: int, D: int, V: int, methods: list[str], passes: list[str], repeats: int, device: str):
    h, W, t = inputs(N, D, V, device)
    buffer = torch.zeros(N, V, dtype=h.dtype, device=device)
    for method in methods:  # kernels are compiled and libraries loaded
        run(method, h[:8], W, t[:8], False)
        run(method, h[:8], W, t[:8], True)
    for backward in [name == "both" for name in passes]:
        for _ in range(repeats):
            row = {"matmul": timed(lambda: bare_matmul(h, W, buffer, backward), device)}
            for method in methods:
                row[method] = timed(lambda: run(method, h, W, t, backward), device)
            for method, seconds in row.items():
                yield {
                    "N": N,
                    "D": D,
                    "V": V,
                    "method": method,
                    "backward": backward,
                    "seconds": seconds,
                    "of_matmul": seconds / row["matmul"],
                }


def memory(N: int, D: int, V: int, methods: list[str]):
    for method in methods:
        for backward in (False, True):
            command = [
                sys.executable,
                "-m",
                "bench.logprob",
                "--memory-of",
                str(N),
                str(D),
                str(V),
                method,
                str(backward),
            ]
            answer = subprocess.run(command, capture_output=True, text=True)
            mb = float(answer.stdout) if answer.returncode == 0 else math.inf  # it did not fit
            yield {"N": N, "D": D, "V": V, "method": method, "backward": backward, "mb": mb}


def resident_bytes(what: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {what} in /proc/self/status: memory is measured on Linux only")


def extra_memory(N: int, D: int, V: int, method: str, backward: bool, device: str) -> float:
    """MB that the method takes at its worst beyond inputs, outputs and gradients. Call it in a fresh process."""
    h, W, t = inputs(N, D, V, device)
    run(method, *inputs(8, 64, 128, device), True)  # libraries are loaded
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
        before = resident_bytes("VmRSS")
    kept = run(method, h, W, t, backward)
    after = (
        torch.cuda.max_memory_allocated() if device.startswith("cuda") else resident_bytes("VmHWM")
    )
    own = sum(x.nbytes for x in kept) if backward else 2 * kept.nbytes
    return (after - before - own) / 1e6


def table(results: list[dict]) -> None:
    print(
        "| N | D | V | | forward s | of matmul | forward + backward s | of four matmuls | extra MB forward | extra MB with backward |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for D, V, N in sorted({(r["D"], r["V"], r["N"]) for r in results}):
        for method in ("matmul", *METHODS):
            cells = []
            for backward in (False, True):
                own = [
                    r
                    for r in results
                    if (r["D"], r["V"], r["N"], r["method"], r["backward"])
                    == (D, V, N, method, backward)
                ]
                seconds = [r["seconds"] for r in own if "seconds" in r]
                cells += (
                    [
                        f"{statistics.median(seconds):.3f}",
                        f"{statistics.median(r['of_matmul'] for r in own if 'seconds' in r):.2f}",
                    ]
                    if seconds
                    else ["", ""]
                )
            for backward in (False, True):
                cells.append(
                    "".join(
                        f"{r['mb']:,.0f}"
                        for r in results
                        if "mb" in r
                        and (r["D"], r["V"], r["N"], r["method"], r["backward"])
                        == (D, V, N, method, backward)
                    )
                )
            if any(cells):
                print(f"| {N} | {D} | {V:,} | {method} | {' | '.join(cells)} |")


def exactness(V: int, device: str) -> None:
    """Largest errors over 1024 rows against float64. A third of the targets is the likeliest token, a third is drawn."""
    print(
        "\n| D | largest logit | ours: log-prob | ours: entropy | naive float32: log-prob | ours, bfloat16 inputs: log-prob |"
    )
    print("|---|---|---|---|---|---|")
    for D in (64, 576, 896, 1536):
        for largest in (30, 80):
            h, W = torch.randn(1024, D, device=device), torch.randn(V, D, device=device)
            h *= largest / (h @ W.T).abs().max()
            errors = []
            for a, b in ((h, W), (h.bfloat16(), W.bfloat16())):
                logp = (a.double() @ b.double().T).log_softmax(-1)
                t = torch.randint(V, (1024,), device=device)
                t[::3], t[1::3] = logp[::3].argmax(-1), torch.multinomial(logp[1::3].exp(), 1)[:, 0]
                want = logp.gather(1, t[:, None])[:, 0]
                ours, entropy = fused_logprob(a, b, t)
                errors += [
                    (ours - want).abs().max(),
                    (entropy + (logp.exp() * logp).sum(-1)).abs().max(),
                    (naive(a, b, t) - want).abs().max(),
                ]
            print(
                f"| {D} | {largest} | "
                + " | ".join(f"{errors[k]:.1e}" for k in (0, 1, 2, 3))
                + " |"
            )


def scoring(args) -> None:
    """Two steps of SA-GRPO on a real model, then the scorings of the second step's answers on their own."""
    import train_sa_grpo

    with tempfile.TemporaryDirectory() as folder:
        runtime.RUNS = Path(folder)
        train_sa_grpo.main(
            [
                "--model",
                args.model,
                "--data",
                args.data,
                "--run",
                "bench",
                "--steps",
                "2",
                "--prompts-per-step",
                "4",
                "--n",
                "4",
                "--max-new-tokens",
                "160",
                "--device",
                args.device,
            ]
        )
        metrics = json.loads(
            (Path(folder) / "bench" / "metrics.jsonl").read_text().splitlines()[-1]
        )
        lines = [
            json.loads(line)
            for line in (Path(folder) / "bench" / "completions.jsonl").read_text().splitlines()
        ]
    tokenizer, policy = (
        Tokenizer.from_pretrained(find_model(args.model)),
        GPT.from_pretrained(find_model(args.model), device=args.device),
    )
    lines = [line for line in lines if line["step"] == 2]
    answers = [line["tokens"] for line in lines]
    contexts = [encode_prompt(tokenizer, line["question"]) for line in lines]
    alone = [encode_prompt(tokenizer, "")] * len(answers)
    micro = (
        8192 if args.device.startswith("cuda") else 512
    )  # as the scripts choose it for a large model
    ways = {
        "ppl(a given q)": (contexts, answers),
        "ppl(a)": (alone, answers),
        "both in one call": (contexts + alone, answers * 2),
    }
    seconds = {way: [] for way in ways}
    for _ in range(args.repeats):
        for way, (c, a) in ways.items():
            seconds[way].append(
                timed(lambda: answer_logprobs(policy, c, a, micro_tokens=micro), args.device)
            )
    median = {way: statistics.median(s) for way, s in seconds.items()}
    step = metrics["seconds_sampling"] + metrics["seconds_scoring"] + metrics["seconds_update"]
    tokens = {way: sum(map(len, c)) + sum(map(len, a)) for way, (c, a) in ways.items()}
    print(
        f"\n{len(answers)} answers, {sum(map(len, answers))} answer tokens; a step takes {step:.1f} s: sampling {metrics['seconds_sampling']:.1f}, "
        f"scoring {metrics['seconds_scoring']:.1f}, update {metrics['seconds_update']:.1f}\n"
    )
    print("| scoring | tokens | s | of ppl(a given q) | of the step |\n|---|---|---|---|---|")
    for way in ways:
        print(
            f"| {way} | {tokens[way]:,} | {median[way]:.2f} | {median[way] / median['ppl(a given q)']:.2f} | {median[way] / step:.1%} |"
        )
    second = median["both in one call"] - median["ppl(a given q)"]
    print(
        f"\nppl(a), SAR's own, costs {second:.2f} s in one call with ppl(a given q): {second / step:.1%} of the step"
    )


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: a GPU if there is one)",
    )
    p.add_argument("--quick", action="store_true", help="one small size")
    p.add_argument(
        "--shapes",
        help="DxV, separated by commas (default: those of four models; on a GPU 1536x151936)",
    )
    p.add_argument("--rows", help="N, separated by commas (default: 512,4096; on a GPU 16384)")
    p.add_argument(
        "--only", help="methods beside the bare matmul, separated by semicolons (default: all)"
    )
    p.add_argument(
        "--passes",
        default="forward,both",
        help="forward alone, forward and backward, or both of these (default: forward,both)",
    )
    p.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    p.add_argument(
        "--parts",
        default="times,memory,exactness",
        help="which tables (default: times,memory,exactness)",
    )
    p.add_argument(
        "--save",
        type=Path,
        help="append what is measured to this file, and print the table of all it holds",
    )
    p.add_argument(
        "--table", action="store_true", help="measure nothing: print the table of --save"
    )
    p.add_argument("--model", help="instead: measure scoring within a training step of this model")
    p.add_argument("--data", help="problems for --model, e.g. gsm8k_train.jsonl")
    p.add_argument(
        "--memory-of", nargs=5, help=argparse.SUPPRESS
    )  # what a fresh process is started with
    args = p.parse_args()
    gpu = args.device.startswith("cuda")
    runtime.prepare_machine()
    if args.memory_of:
        N, D, V, method, backward = args.memory_of
        print(extra_memory(int(N), int(D), int(V), method, backward == "True", args.device))
        return
    if args.model:
        scoring(args)
        return

    shapes = (
        [tuple(map(int, s.split("x"))) for s in args.shapes.split(",")]
        if args.shapes
        else GPU_SHAPES
        if gpu
        else SHAPES
    )
    rows = [int(n) for n in args.rows.split(",")] if args.rows else GPU_ROWS if gpu else ROWS
    if args.quick:
        shapes, rows = [(128, 8192)], [256]
    methods = [m for m in METHODS if m != "trl" or ChunkedLogProbFunction]
    if args.only is not None:
        methods = [m for m in methods if m in args.only.split(";")]
    results = (
        [json.loads(line) for line in args.save.read_text().splitlines()]
        if args.save and args.save.exists()
        else []
    )
    bar = tqdm(unit="measurement")
    for D, V in shapes if not args.table else ():
        for N in rows:
            parts = (
                [times(N, D, V, methods, args.passes.split(","), args.repeats, args.device)]
                if "times" in args.parts
                else []
            )
            parts += [memory(N, D, V, methods)] if "memory" in args.parts else []
            for result in itertools.chain(*parts):
                results.append(result)
                if args.save:
                    with open(args.save, "a") as file:
                        file.write(json.dumps(result) + "\n")
                bar.update()
    bar.close()
    try:
        trl = f"trl {version('trl')}"
    except PackageNotFoundError:
        trl = "trl is not installed (it brings a dozen packages; pip install trl==1.16.0): no rows of it"
    name = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} threads"
    print(f"{time.strftime('%Y-%m-%d')}, {name}, torch {torch.__version__}, {trl}\n")
    table(results)
    if "exactness" in args.parts and not args.table:
        exactness(8192 if args.quick else 50_000, args.device)


if __name__ == "__main__":
    main()
