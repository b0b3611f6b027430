"""Benchmarks: how often a model is right, how long its answers are, and the trade between the two.

    python evaluate.py --model qwen-1.5b --data gsm8k,math500,aime24      # greedy, as in the paper
    python evaluate.py --model runs/NAME/step_000500 --against qwen-1.5b --data gsm8k    # with AES
    python evaluate.py --model tiny --samples 8 --temperature 1           # mean@8, pass@2, 4 and 8

AES, the accuracy-efficiency score, compares a model with another one (--against). It rewards
shorter answers and, W times as strongly, more accurate ones:

    AES = (len_ref - len) / len_ref + W * (acc - acc_ref) / acc_ref

AES 5/5 has W = 5 (arXiv 2509.05489), AES 3/5 has 3 for a gain and 5 for a loss (2501.12570).

In runs/NAME: evaluation.json (settings), BENCHMARK.jsonl (a line an answer; of the other model
against-BENCHMARK.jsonl), results.json and table.md. A benchmark's answers are written when all are
there. After a kill the same command with --name NAME goes on with the missing benchmarks. An answer
depends on the seed, its prompt and its number alone (but for a GPU's rounding in bfloat16).
"""
import json
import math
import time
from argparse import Namespace
from pathlib import Path
from statistics import NormalDist, fmean

import numpy as np
import torch

from data.files import file_sha256, read_json, write_atomically
from data.problems import NAMES, load_problems
from data.prompts import encode_prompt
from data.tokenizer import Tokenizer
from kernels import fast_bfloat16, keep_freed_memory
from model import GPT
from runtime import errors, parallel, runs, settings
from verify import VERIFIERS

COLUMNS = {  # of a table: the head, and how a cell is written
    "model": "{name}", "problems": "{problems}",
    "accuracy": "{accuracy:.1%} [{accuracy_low:.1%}, {accuracy_high:.1%}]",
    "by last number": "{last_number:.1%} [{last_number_low:.1%}, {last_number_high:.1%}]",
    "tokens: mean / median / p95": "{length:.1f} / {length_median:.0f} / {length_p95:.0f}",
    "if right / wrong": "{length_correct!s:.6} / {length_wrong!s:.6}",  # may be NaN, in a log None
    "unfinished": "{unfinished:.1%}", "unparsed": "{unparsed:.1%}",
    "AES 5/5": "{scores[0]}", "AES 3/5": "{scores[1]}"}


def answer(model, tokenizer, problems: list, args) -> list[dict]:
    """--samples answers to each problem, adjacent, as BENCHMARK.jsonl has them."""
    judge, last_number = map(settings.judge_of, (
        "strict" if args.verifier in VERIFIERS else args.verifier, "last-number"))
    different = {p.question: p for p in problems}  # a question asked twice gets the same answers
    drawn = parallel.sample(model, tokenizer, list(different.values()), args, args.seed)
    first = {question: i * args.samples for i, question in enumerate(different)}
    rows = []
    for problem in problems:
        start = first[problem.question]
        for a in drawn[start:start + args.samples]:
            strict, last = (rule(a.text, problem.answer) for rule in (judge, last_number))
            rows.append({"question": problem.question, "text": a.text, "tokens": a.tokens,
                         "reference": problem.answer, "finished": a.finished,
                         "answer": strict.answer, "status": strict.status,
                         "last_number": last.answer, "last_number_status": last.status})
    return rows


def evaluate(model, tokenizer, problems: list, args) -> dict:
    """A greedy answer to each of at least one problem, summarised."""
    greedy = Namespace(**vars(args) | {"samples": 1, "temperature": 0.0})
    return summarise(answer(model, tokenizer, problems, greedy), verifier=args.verifier)


def summarise(rows: list[dict], samples: int = 1, verifier: str = "strict") -> dict:
    """The figures of a benchmark, from `samples` adjacent answers to each problem.

    Lengths are in tokens, the stop token included; shares are of all answers. `accuracy` (mean@n)
    is by `verifier`, `last_number` by the paper's rule. The mean length of no answers is NaN."""
    key = "last_number_status" if verifier == "last-number" else "status"
    verdicts = np.array([r[key] for r in rows])
    right, wrong = verdicts == "correct", verdicts == "wrong"
    lengths = np.array([len(r["tokens"]) for r in rows])
    result = {"problems": len(rows) // samples, "accuracy": right.mean().item(),
              "last_number": fmean(r["last_number_status"] == "correct" for r in rows),
              "length": lengths.mean().item(), "length_median": np.median(lengths).item(),
              "length_p95": np.percentile(lengths, 95).item(),
              "unfinished": fmean(not r["finished"] for r in rows),
              "unparsed": fmean(r["status"] not in ("correct", "wrong") for r in rows),
              "errors": sum(r["status"] == "error" for r in rows)}
    result["length_correct"] = lengths[right].mean().item() if right.any() else math.nan
    result["length_wrong"] = lengths[wrong].mean().item() if wrong.any() else math.nan
    for name in ("accuracy", "last_number"):
        low, high = wilson(result[name], result["problems"])
        result |= {f"{name}_low": low, f"{name}_high": high}
    counts = right.reshape(-1, samples).sum(1).tolist()  # right answers to each problem
    for k in (2, 4, 8, 16, 32, 64, 128, 256, 512, samples):
        if 1 < k <= samples:
            result[f"pass@{k}"] = fmean(pass_at_k(samples, count, k) for count in counts)
    return result


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n trials (E. B. Wilson, 1927)."""
    z2 = NormalDist().inv_cdf(0.975) ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * share * (1 - share) / n + z2**2 / (4 * n**2)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The probability that one of k answers is right, from n answers (arXiv 2107.03374, eq. 1)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def aes(result: dict, reference: dict, gain: int = 5) -> float:
    """The AES of an evaluation; NaN if the reference solves nothing. gain: W of higher accuracy."""
    if not reference["accuracy"] or not reference["length"]:
        return math.nan
    shorter = (reference["length"] - result["length"]) / reference["length"]
    better = (result["accuracy"] - reference["accuracy"]) / reference["accuracy"]
    return shorter + (gain if better > 0 else 5) * better


def comparison_table(*groups: dict[str, dict]) -> str:
    """A Markdown table of evaluations by name; AES compares with the first of a group."""
    figures = next(iter(groups[0].values()))
    columns = COLUMNS | {key: f"{{{key}:.1%}}" for key in figures if key.startswith("pass@")}
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for group in groups:
        reference = next(iter(group.values()))
        for name, result in group.items():
            scores = "", ""
            if result is not reference:
                scores = [f"{aes(result, reference, gain):+.2f}" for gain in (5, 3)]
            cells = [form.format(**result, name=name, scores=scores) for form in columns.values()]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n[95 % Wilson intervals]"


def main(argv: list[str] | None = None):
    parser = settings.Parser(__doc__)
    flag, positive = parser.add_argument, settings.positive_int
    flag("--model", type=settings.model_name, default="tiny", help="see train_sa_grpo.py --help")
    flag("--against", type=settings.model_name, help="the model that AES compares with")
    flag("--data", type=settings.data_names, default="tiny", help=f"JSONL files, {','.join(NAMES)}")
    flag("--question-field", help="as in training")
    flag("--answer-field", help="as in training")
    flag("--verifier", type=settings.verifier_name, default="strict", help="as in training; the "
         "last number is counted beside it")
    flag("--limit", type=positive, help="problems of each benchmark, evenly spaced (default: all)")
    flag("--samples", type=positive, default=1, help="answers to each problem (default: 1)")
    flag("--temperature", type=settings.not_negative, default=0.0, help="default: 0, greedy")
    flag("--max-new-tokens", type=positive, help="default: 4096 (paper), or half of the positions")
    flag("--seed", type=int, default=0, help="of every sample (default: 0)")
    settings.prompt_flags(parser)
    flag("--name", help="folder in runs/; what is there is not run again (default: model and time)")
    flag("--slots", type=positive, help="answers decoded at once (default: what memory holds)")
    flag("--device", help="float32 on a CPU and on GPUs before Ampere (default: a GPU if any)")
    args = parser.parse_args(argv)
    args.device = settings.choose_device(args.device)
    args.name = args.name or f"eval-{Path(args.model).name}-{time.strftime('%m%d-%H%M%S')}"
    if args.samples > 1 and args.temperature == 0:
        raise ValueError("--samples at --temperature 0 are all the same: give a --temperature")
    keep_freed_memory()
    names = {"against-": args.against, "": args.model}  # {what file names begin with: the model}
    folders, tokenizers = {}, {}
    for prefix, name in names.items():
        if name:
            folders[prefix], tokenizers[prefix] = settings.open_model(name, args)
    room = min(read_json(f / "config.json")["max_position_embeddings"] for f in folders.values())
    args.max_new_tokens = args.max_new_tokens or min(4096, room // 2)
    problems, skipped, longest = load_benchmarks(args, list(tokenizers.values()), room)
    run = open_run(args, folders)
    dtype = torch.bfloat16 if fast_bfloat16(args.device) else torch.float32
    tables, results = {benchmark: {} for benchmark in problems}, {}  # figures, by benchmark
    for prefix, folder in folders.items():
        model = None  # one in memory at a time
        for benchmark, found in problems.items():
            path = run / f"{prefix}{benchmark}.jsonl"
            if not path.exists():
                model = model or GPT.from_pretrained(folder, dtype=dtype, device=args.device,
                                                     length=longest + args.max_new_tokens)
                rows = answer(model, tokenizers[prefix], found, args)
                lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
                write_atomically(path, "".join(lines))
            rows = [json.loads(line) for line in path.read_bytes().splitlines()]
            if [r["question"] for r in rows[::args.samples]] != [p.question for p in found]:
                raise ValueError(f"{path} answers other problems: choose another --name")
            result = {"model": names[prefix], "skipped": skipped[benchmark]}
            result |= summarise(rows, args.samples, args.verifier)
            if result["errors"]:
                runs.say(f"{result['errors']} answers to {benchmark} ended in a verifier's error")
            for other in tables[benchmark].values():
                result |= {"aes": aes(result, other), "aes_3": aes(result, other, gain=3)}
            short = "/".join(Path(names[prefix]).parts[-2:])
            tables[benchmark][f"{benchmark}: {prefix}{short}"] = result
            results.setdefault(benchmark, []).append(runs.plain(result))
    table = comparison_table(*tables.values())
    table += f"; temperature {args.temperature:g}, at most {args.max_new_tokens} tokens\n"
    write_atomically(run / "results.json", json.dumps(results, indent=2))
    write_atomically(run / "table.md", table)
    print(f"{table}\n{run}: results.json, table.md, and every answer in *.jsonl")


def load_benchmarks(args, tokenizers: list[Tokenizer], room: int) -> tuple[dict, dict, int]:
    """({benchmark: problems}, {benchmark: prompts that leave no room}, tokens of the longest)."""
    problems, skipped, longest = {}, {}, 0
    for name in args.data.split(","):
        benchmark = Path(name).stem if Path(name).is_file() else name
        if benchmark in problems:
            raise ValueError(f"--data names two benchmarks that are called alike: {args.data}")
        found = load_problems(name, "test", args.question_field, args.answer_field)
        count = min(len(found), args.limit or len(found))
        kept = problems[benchmark] = []
        for i in range(count):
            problem = found[i * len(found) // count]
            width = max(len(encode_prompt(t, problem.question)) for t in tokenizers)
            if width + args.max_new_tokens <= room:
                kept.append(problem)
                longest = max(longest, width)
        skipped[benchmark] = count - len(kept)
        note = (f"{skipped[benchmark]} of {count} prompts of {benchmark} leave no room for "
                f"{args.max_new_tokens} new tokens within {room} positions")
        if not kept:
            raise ValueError(f"{note}: choose a lower --max-new-tokens")
        if skipped[benchmark]:
            runs.say(f"{note} and are skipped")
    return problems, skipped, longest


def open_run(args, folders: dict[str, Path]) -> Path:
    """runs/NAME for these settings. Raises ValueError where it holds others."""
    run = runs.RUNS / args.name
    path = run / "evaluation.json"
    if (run / "config.json").exists():
        raise ValueError(f"{run} holds a training run: choose another --name")
    weights = {prefix + file.name: file_sha256(file)[:16] for prefix, folder in folders.items()
               for file in sorted(folder.glob("model*.safetensors"))}
    chosen = vars(args) | {"weights": weights, "slots": None}  # slots change no answer
    if not path.exists():
        run.mkdir(parents=True, exist_ok=True)
        record = {"settings": chosen, **runs.provenance(args.device)}
        write_atomically(path, json.dumps(record, indent=2))
    for key, was in read_json(path)["settings"].items():
        if chosen.get(key) != was:
            raise ValueError(f"{run} holds an evaluation with other settings ({key} was {was}, "
                             f"now {chosen.get(key)}): choose another --name")
    return run


if __name__ == "__main__":
    with errors.user_errors():
        main()
