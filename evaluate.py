"""Benchmarks: how often a model is right, how long its answers are, and the trade between the two.

    python evaluate.py --model qwen-1.5b --data gsm8k,math500,aime24                     # greedy, as the paper evaluates
    python evaluate.py --model runs/NAME/step_000500 --against qwen-1.5b --data gsm8k    # AES against the untrained model
    python evaluate.py --model tiny --n 8 --temperature 1 --run sampled                  # mean@8, pass@2, pass@4, pass@8
    python evaluate.py ... --run NAME                                                    # once more after a kill: goes on

AES, the accuracy-efficiency score, rewards shorter answers and five times as strongly more accurate ones (arXiv 2509.05489):

    AES = (len_ref - len) / len_ref + 5 * (acc - acc_ref) / acc_ref

In runs/NAME: evaluation.json (the settings), BENCHMARK.jsonl (a line an answer; against-BENCHMARK.jsonl for the other model),
results.json and table.md. An answer depends on the seed, its prompt and its number alone, so a question that a benchmark asks
twice gets the same answers twice, and neither a kill nor other problems beside it change an answer (in float32 on a CPU; the bfloat16 of
a GPU may round otherwise in another batch).
"""
import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from statistics import NormalDist, fmean

import numpy as np
import torch
from tqdm import tqdm

import runtime
from data.hub import file_sha256, find_model
from data.problems import NAMES, load_problems
from data.prompts import encode_prompt
from data.tokenizer import Tokenizer
from model import GPT
from rollout import generate
from verify import VERIFIERS, judge

BLOCK = {"cpu": 32, "cuda": 1024}  # answers that are written down together: all that a kill can cost


def answer(model, tokenizer, problems: list, *, max_new_tokens: int, n: int = 1, temperature: float = 0.0, seed: int = 0,
           slots: int | None = None) -> list[dict]:
    """n answers to every problem, adjacent: what the jsonl files say of each. `answer` and `status` are the verdict of verify.py's
    policy, `last_number` and `last_number_status` that of the paper's rule."""
    prompts = [tuple(encode_prompt(tokenizer, p.question)) for p in problems]
    first = {prompt: i * n for i, prompt in enumerate(dict.fromkeys(prompts))}  # a prompt that comes twice is answered once
    rollouts = runtime.sample(generate, model, [list(prompt) for prompt in first], n=n, max_new_tokens=max_new_tokens,
                              stop=tokenizer.stop_ids, temperature=temperature, seed=seed, slots=slots)
    rows = []
    for problem, prompt in zip(problems, prompts):
        for r in rollouts[first[prompt]:first[prompt] + n]:
            text = tokenizer.decode(r.tokens[:-1] if r.finished else r.tokens)
            ours, papers = (judge(text, problem.answer, verifier) for verifier in VERIFIERS)
            rows.append({"question": problem.question, "text": text, "tokens": r.tokens, "reference": problem.answer,
                         "finished": r.finished, "answer": ours.answer, "status": ours.status,
                         "last_number": papers.answer, "last_number_status": papers.status})
    return rows


def summarise(rows: list[dict], n: int = 1, verifier: str = "policy") -> dict:
    """Figures of the answers to a benchmark, n adjacent ones to each problem. Lengths are in tokens, stop token included; shares are
    of all answers; accuracy is by `verifier` (for n > 1 it is mean@n), with both ends of its 95 % interval; *_last_number is by the
    paper's rule; wrong are the answers that were read and are not right, without unparsed ones. What does not exist, as the mean length
    of no answers, is NaN."""
    verdicts = np.array([r["last_number_status" if verifier == "last-number" else "status"] for r in rows])
    right, wrong = verdicts == "correct", verdicts == "wrong"
    right_last = np.array([r["last_number_status"] == "correct" for r in rows])
    lengths = np.array([len(r["tokens"]) for r in rows])
    problems = len(rows) // n
    result = {"problems": problems, "accuracy": right.mean().item()}
    result["accuracy_low"], result["accuracy_high"] = wilson(right.mean(), problems)
    result["last_number"] = right_last.mean().item()
    result["last_number_low"], result["last_number_high"] = wilson(right_last.mean(), problems)
    result |= {"length": lengths.mean().item(), "length_median": np.median(lengths).item(),
               "length_p95": np.percentile(lengths, 95).item(),
               "length_correct": lengths[right].mean().item() if right.any() else math.nan,
               "length_wrong": lengths[wrong].mean().item() if wrong.any() else math.nan,
               "unfinished": fmean(not r["finished"] for r in rows),
               "unparsed": fmean(r["status"] not in ("correct", "wrong") for r in rows),
               "errors": sum(r["status"] == "error" for r in rows)}
    counts = right.reshape(problems, n).sum(1).tolist()  # right answers to each problem
    sizes = [k for k in (2, 4, 8, 16, 32, 64, 128, 256, 512) if k < n] + [n] * (n > 1)
    return result | {f"pass@{k}": fmean(pass_at_k(n, c, k) for c in counts) for k in sizes}


def evaluate(model, tokenizer, problems: list, *, max_new_tokens: int, verifier: str = "policy", slots: int | None = None) -> dict:
    """Greedy answers to every problem, summarised."""
    if not problems:
        raise ValueError("there are no problems to evaluate on")
    return summarise(answer(model, tokenizer, problems, max_new_tokens=max_new_tokens, slots=slots), verifier=verifier)


def wilson(share: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (E. B. Wilson, 1927). With n answers to a problem the problems are the trials, not the
    answers: those to one problem are not independent, so the interval is rather too wide than too narrow."""
    z2 = NormalDist().inv_cdf(0.975) ** 2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = math.sqrt(z2 * share * (1 - share) / trials + z2**2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate, from n answers, of the probability that one of k is right: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def aes(result: dict, reference: dict) -> float:
    """Accuracy-efficiency score of one evaluation against another; NaN against a reference that solves nothing."""
    if not reference["accuracy"] or not reference["length"]:
        return float("nan")
    return ((reference["length"] - result["length"]) / reference["length"]
            + 5 * (result["accuracy"] - reference["accuracy"]) / reference["accuracy"])


def comparison_table(rows: dict[str, dict]) -> str:
    """A Markdown table of evaluations by name; the first row is the one that AES compares with."""
    reference = next(iter(rows.values()))
    lines = ["| model | accuracy | mean tokens | unfinished | AES |", "|---|---|---|---|---|"]
    for name, r in rows.items():
        score = "" if r is reference else f"{aes(r, reference):+.2f}"
        lines.append(f"| {name} | {r['accuracy']:.1%} | {r['length']:.1f} | {r['unfinished']:.1%} | {score} |")
    return "\n".join(lines + [f"\n({reference['problems']} held-out problems, greedy)"])


def benchmark_table(results: dict[str, list[dict]], args: argparse.Namespace) -> str:
    """A Markdown table of the summaries of each benchmark's models; with --against the first is the one that AES compares with."""
    def shown(value: float, form: str) -> str:
        return "–" if math.isnan(value) else format(value, form)

    extra = [key for key in next(iter(results.values()))[0] if key.startswith("pass@")]
    columns = ["benchmark", "model", "problems", "accuracy (%)" if args.n == 1 else f"mean@{args.n} (%)", "by last number (%)",
               "tokens: mean / median / p95", "if right / wrong", "unfinished (%)", "unparsed (%)", *(f"{key} (%)" for key in extra)]
    columns += ["AES"] if args.against else []
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for benchmark, models in results.items():
        for r in models:
            cells = [benchmark, "/".join(Path(r["model"]).parts[-2:]),
                     f"{r['problems']}" + (f" ({r['skipped']} skipped)" if r["skipped"] else ""),
                     *(f"{100 * r[k]:.1f} [{100 * r[k + '_low']:.1f}, {100 * r[k + '_high']:.1f}]" for k in ("accuracy", "last_number")),
                     f"{r['length']:.1f} / {r['length_median']:.0f} / {r['length_p95']:.0f}",
                     f"{shown(r['length_correct'], '.1f')} / {shown(r['length_wrong'], '.1f')}",
                     *(f"{100 * r[key]:.1f}" for key in ("unfinished", "unparsed", *extra))]
            if args.against:
                cells.append("" if r is models[0] else shown(r["aes"], "+.2f"))
            lines.append(f"| {' | '.join(cells)} |")
    how = "greedy" if args.temperature == 0 else f"{args.n} answers to each at temperature {args.temperature:g}, seed {args.seed}"
    return "\n".join(lines + [f"\n[95 % Wilson intervals]; {how}, at most {args.max_new_tokens} tokens"]) + "\n"


def saved_rows(path: Path, problems: list, n: int, block: int) -> list[dict]:
    """The rows of the blocks that `path` holds whole; what a kill left behind them is cut off the file. ValueError where they
    answer other problems."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = sum(line.endswith(b"\n") for line in lines)
    if whole < len(problems) * n:
        whole -= whole % (block * n)
    try:
        rows = [json.loads(line) for line in lines[:whole]]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to have its answers made again") from None
    asked = [(p.question, p.answer) for p in problems for _ in range(n)]
    if [(r["question"], r["reference"]) for r in rows] != asked[:whole]:
        raise ValueError(f"{path} answers other problems than these: choose another --run")
    if len(lines) > whole:
        os.truncate(path, sum(map(len, lines[:whole])))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a model folder or name (see train_sa_grpo.py)")
    parser.add_argument("--against", help="the model that AES compares with")
    parser.add_argument("--data", default="tiny", help=f"benchmarks, separated by commas: JSONL files, or the test "
                        f"split of {', '.join(NAMES)}")
    parser.add_argument("--limit", type=int, help="only so many problems of each, evenly spaced: neighbours in a file are often alike "
                        "(default: all)")
    parser.add_argument("--n", type=int, default=1, help="answers to each problem; more than one need a --temperature (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0 is greedy, as in the paper (default: 0)")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer, stop token included (default: the paper's 4096; half of the "
                        "model's positions where that is less)")
    parser.add_argument("--seed", type=int, default=0, help="of every sample (default: 0)")
    parser.add_argument("--run", help="results go to runs/RUN; with the same settings, goes on there (default: made of model and time)")
    parser.add_argument("--slots", type=int, help="answers that decode at once (default: what the free memory holds)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="bfloat16 on a GPU, float32 on a CPU "
                        "(default: a GPU if there is one)")
    args = runtime.absolute_paths(parser.parse_args(argv))
    runtime.check_device(args.device)
    for name in ("limit", "n", "max_new_tokens", "slots"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature must be 0 or a positive number, got {args.temperature}")
    if args.n > 1 and args.temperature == 0:
        raise ValueError(f"--n {args.n} at --temperature 0 would be the same answer {args.n} times: give a --temperature, or --n 1")
    benchmarks = {Path(name).stem if Path(name).is_file() else name: name for name in args.data.split(",")}
    if len(benchmarks) < len(args.data.split(",")):
        raise ValueError(f"--data names two benchmarks that are called alike: {args.data}")
    runtime.prepare_machine()

    folders = {role: find_model(name) for role, name in (("against-", args.against), ("", args.model)) if name}
    positions = min(runtime.read_json(folder / "config.json")["max_position_embeddings"] for folder in folders.values())
    args.max_new_tokens = args.max_new_tokens or min(4096, positions // 2)
    kind = args.device.split(":")[0]
    tokenizers = {role: Tokenizer.from_pretrained(folder) for role, folder in folders.items()}
    problems = {}
    for benchmark, name in benchmarks.items():
        found = load_problems(name, split="test")
        count = min(len(found), args.limit or len(found))
        problems[benchmark] = [found[i * len(found) // count] for i in range(count)]
    skipped = {benchmark: 0 for benchmark in benchmarks}
    for benchmark, found in problems.items():
        problems[benchmark] = [p for p in found if args.max_new_tokens <= positions - max(
            len(encode_prompt(tokenizer, p.question)) for tokenizer in tokenizers.values())]
        skipped[benchmark] = len(found) - len(problems[benchmark])
        if skipped[benchmark]:
            print(f"note: {skipped[benchmark]} of {len(found)} prompts of {benchmark} leave no room for {args.max_new_tokens} new tokens "
                  f"within {positions} positions and are skipped", file=sys.stderr)
        if not problems[benchmark]:
            raise ValueError(f"no prompt of {benchmark} leaves room for an answer: choose a lower --max-new-tokens")
    weights = {role + path.name: file_sha256(path)[:16]
               for role, folder in folders.items() for path in sorted(folder.glob("model*.safetensors"))}
    settings = {"model": args.model, "against": args.against, "data": args.data, "weights": weights, "limit": args.limit, "n": args.n,
                "temperature": args.temperature, "max_new_tokens": args.max_new_tokens, "seed": args.seed, "device": kind}
    run = open_run(args.run or f"eval-{Path(args.model).name}-{time.strftime('%m%d-%H%M%S')}", settings)

    results = {benchmark: [] for benchmark in benchmarks}
    for role, folder in folders.items():  # one model in memory at a time
        name = args.against if role else args.model
        model = GPT.from_pretrained(folder, dtype=torch.float32 if kind == "cpu" else torch.bfloat16, device=args.device)
        for benchmark, found in problems.items():
            path, block = run / f"{role}{benchmark}.jsonl", max(1, BLOCK[kind] // args.n)
            rows = saved_rows(path, found, args.n, block)
            bar = tqdm(total=len(found), initial=len(rows) // args.n, desc=f"{Path(name).name} {benchmark}", unit="problem")
            with open(path, "a", encoding="utf-8") as file:
                for start in range(len(rows) // args.n, len(found), block):
                    new = answer(model, tokenizers[role], found[start:start + block], max_new_tokens=args.max_new_tokens, n=args.n,
                                 temperature=args.temperature, seed=args.seed, slots=args.slots)
                    file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in new))
                    file.flush()
                    rows += new
                    bar.update(len(new) // args.n)
            result = {"model": name, "skipped": skipped[benchmark]} | summarise(rows, args.n)
            if results[benchmark]:  # the other model's
                result["aes"] = aes(result, results[benchmark][0])
            results[benchmark].append(result)
            bar.set_postfix(accuracy=f"{result['accuracy']:.3f}", tokens=f"{result['length']:.0f}")
            bar.close()
            if result["errors"]:
                print(f"note: verify.py failed on {result['errors']} answers to {benchmark}; they count as unparsed", file=sys.stderr)
        del model
    table = benchmark_table(results, args)
    clean = {benchmark: [{k: None if v != v else v for k, v in r.items()} for r in models] for benchmark, models in results.items()}
    runtime.write_atomically(run / "results.json", json.dumps(clean, indent=2))  # NaN is not JSON
    runtime.write_atomically(run / "table.md", table)
    print(f"{table}\n{run}: results.json, table.md, and every answer in *.jsonl")


def open_run(name: str, settings: dict) -> Path:
    """runs/NAME for these settings; ValueError where it holds a training run or an evaluation with others."""
    run = runtime.RUNS / name
    if (run / "config.json").exists():
        raise ValueError(f"{run} holds a training run: choose another --run")
    path = run / "evaluation.json"
    before = runtime.read_json(path)["settings"] if path.exists() else settings
    changed = [f"{key} was {before.get(key)}, now {value}" for key, value in settings.items() if before.get(key) != value]
    if changed:
        raise ValueError(f"{run} holds an evaluation with other settings ({'; '.join(changed)}): choose another --run")
    if path.exists():
        print(f"note: going on in {run}", file=sys.stderr)
    else:
        run.mkdir(parents=True, exist_ok=True)
        runtime.write_atomically(path, json.dumps({"settings": settings, **runtime.provenance(settings["device"])}, indent=2))
        print(f"note: if this stops early, the same command with --run {name} goes on", file=sys.stderr)
    return run


if __name__ == "__main__":
    with runtime.user_errors():
        main()
