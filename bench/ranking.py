"""Does R_SA rank answers as the paper says? Written answers to GSM8K problems, scored by pretrained weights; nothing is trained.

    python -m bench.ranking --model FOLDER --data gsm8k_test.jsonl      # GSM8K's published file; 40 problems by default

Every variant is made from the published solutions by the rules below, so that no wording is anybody's choice per problem. The table
says the mean R_SA of each, and how often the concise solution of a problem scores higher than that variant of it.
"""

import argparse
import json
import random
import re

from tqdm import tqdm

from bench.seeds import spread
from data.hub import find_model
from data.prompts import encode_prompt
from data.tokenizer import Tokenizer
from model import GPT
from runtime import prepare_machine, user_errors
from sar import answer_logprobs, self_aligned_reward

MARK = re.compile(r"<<[^<>]*=([^<>=]*)>>")  # 48/2 = <<48/2=24>>24
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def finish(steps: list[str], answer: str) -> str:
    return "\n".join([*steps, f"The final answer is \\boxed{{{answer}}}."])


def altered(number: str, rng: random.Random) -> str:
    value = float(number.replace(",", "")) + rng.randint(1, 9)
    return str(int(value)) if value == int(value) else f"{value:.2f}"


def wrong_solution(solution: str, answer: str, rng: random.Random) -> str:
    """The solution with the results of its last two calculations altered, wherever they occur from there on, and so its answer."""
    marks = list(MARK.finditer(solution))[-2:]
    wrong = {m[1].replace(",", ""): altered(m[1], rng) for m in marks if NUMBER.fullmatch(m[1])}
    wrong.setdefault(answer, altered(answer, rng))
    cut = marks[0].start() if marks else 0
    tail = NUMBER.sub(
        lambda m: wrong.get(m[0].replace(",", ""), m[0]), MARK.sub("", solution[cut:])
    )
    return finish((MARK.sub("", solution[:cut]) + tail).split("\n"), wrong[answer])


def variants(
    question: str, solution: str, answer: str, other: str, rng: random.Random
) -> dict[str, str]:
    """Answers to one problem by name; solution has calculator marks, `other` is another problem's concise solution."""
    steps = MARK.sub("", solution).split("\n")
    restated = [
        f"Let me first restate the problem. {question}",
        "Now I will solve it step by step.",
    ]
    checked = [
        line
        for step in steps
        for line in (
            step,
            f"Wait, let me double-check this step before I go on. {step} Yes, I checked it again and that is correct.",
        )
    ]
    return {
        "concise": finish(steps, answer),
        "restated and re-checked": finish(restated + checked, answer),
        "restated only": finish(restated + steps, answer),
        "re-checked only": finish(checked, answer),
        "answer only": finish([], answer),
        "wrong": wrong_solution(solution, answer, rng),
        "off-topic": other,
    }


def read_gsm8k(path: str, count: int) -> list[tuple[str, str, str]]:
    """(question, solution with calculator marks, answer) of the first problems solved in two steps or more."""
    chosen = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                solution, _, answer = row["answer"].partition("\n#### ")
                question = row["question"]
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f"{path}, line {number} is not GSM8K's published form: question, and answer with steps and ####"
                ) from None
            answer = answer.strip().replace(",", "")
            if NUMBER.fullmatch(answer) and "\n" in solution:
                chosen.append((question, solution, answer))
            if len(chosen) == count:
                return chosen
    raise ValueError(
        f"{path} holds {len(chosen)} problems of two steps or more, asked for {count}: choose a smaller --limit"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--data", required=True, help="gsm8k_train.jsonl or gsm8k_test.jsonl as published"
    )
    parser.add_argument("--limit", type=int, default=40, help="problems")
    args = parser.parse_args()
    if args.limit < 2:
        raise ValueError(
            f"--limit must be 2 or more, got {args.limit}: the off-topic answer is another problem's"
        )
    prepare_machine()
    problems = read_gsm8k(args.data, args.limit)
    folder = find_model(args.model)
    tokenizer, model, rng = (
        Tokenizer.from_pretrained(folder),
        GPT.from_pretrained(folder),
        random.Random(0),
    )
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    alone, rewards, tokens = encode_prompt(tokenizer, ""), {}, {}
    for i, (question, solution, answer) in enumerate(tqdm(problems, desc="problems")):
        _, other_solution, other_answer = problems[i - 1]
        texts = variants(
            question,
            solution,
            answer,
            finish(MARK.sub("", other_solution).split("\n"), other_answer),
            rng,
        )
        answers = [tokenizer.encode(text, at_start=False) + end for text in texts.values()]
        scored = [
            answer_logprobs(model, [context] * len(answers), answers, micro_tokens=2048)
            for context in (encode_prompt(tokenizer, question), alone)
        ]
        for name, r, ids in zip(texts, self_aligned_reward(*scored).tolist(), answers):
            rewards.setdefault(name, []).append(r)
            tokens.setdefault(name, []).append(len(ids))
    print("| answer | mean R_SA | concise scores higher | mean tokens |\n|---|---|---|---|")
    for name, r in rewards.items():
        wins = sum(best > other for best, other in zip(rewards["concise"], r))
        print(
            f"| {name} | {spread(r, '.3f')} | {'' if name == 'concise' else f'{wins} of {len(r)}'} | {sum(tokens[name]) / len(r):.0f} |"
        )
    five = ("concise", "restated and re-checked", "answer only", "wrong", "off-topic")
    first = sum(max(scores) == scores[0] for scores in zip(*[rewards[name] for name in five]))
    print(
        f"\n{len(problems)} problems; mean ± standard error. Among {', '.join(five)} the concise answer scores highest on {first}."
    )


if __name__ == "__main__":
    with user_errors():
        main()
