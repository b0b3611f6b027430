"""Accuracy and length of a model on problems, decoded greedily; AES against another model.

    python evaluate.py --model runs/NAME/step_000140 --against tiny --data tiny

AES, the accuracy-efficiency score, rewards shorter answers and five times as strongly more accurate ones (arXiv 2509.05489):

    AES = (len_ref - len) / len_ref + 5 * (acc - acc_ref) / acc_ref
"""
import argparse

import torch

import runtime
from data.hub import find_model
from data.problems import load_problems
from data.prompts import encode_prompt
from data.tokenizer import Tokenizer
from model import GPT
from rollout import generate
from verify import judge


def evaluate(model, tokenizer, problems: list, *, max_new_tokens: int, verifier: str = "policy", slots: int | None = None) -> dict:
    """Greedy answers to every problem: {"problems", "accuracy", "length", "unfinished", "unparsed"}; lengths are mean tokens,
    stop token included, the rest are shares of the problems."""
    if not problems:
        raise ValueError("there are no problems to evaluate on")
    rollouts = generate(model, [encode_prompt(tokenizer, p.question) for p in problems], max_new_tokens=max_new_tokens,
                        stop=tokenizer.stop_ids, temperature=0.0, slots=slots)
    texts = [tokenizer.decode(r.tokens[:-1] if r.finished else r.tokens) for r in rollouts]
    verdicts = [judge(text, p.answer, verifier) for text, p in zip(texts, problems)]
    count = len(problems)
    return {"problems": count, "accuracy": sum(v.reward for v in verdicts) / count,
            "length": sum(len(r.tokens) for r in rollouts) / count,
            "unfinished": sum(not r.finished for r in rollouts) / count,
            "unparsed": sum(v.status not in ("correct", "wrong") for v in verdicts) / count}


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a model folder or name (see train_sa_grpo.py)")
    parser.add_argument("--against", help="the model that AES compares with")
    parser.add_argument("--data", default="tiny", help="problems: a name (its test split) or a JSONL file")
    parser.add_argument("--limit", type=int, help="only the first so many problems")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer in tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    runtime.prepare_machine()
    problems = load_problems(args.data, split="test")[:args.limit]
    rows = {}
    for name in filter(None, (args.against, args.model)):
        folder = find_model(name)
        model = GPT.from_pretrained(folder, dtype=torch.bfloat16 if args.device.startswith("cuda") else torch.float32, device=args.device)
        rows[name] = evaluate(model, Tokenizer.from_pretrained(folder), problems, max_new_tokens=args.max_new_tokens)
    print(comparison_table(rows))


if __name__ == "__main__":
    with runtime.user_errors():
        main()
