"""Does R_SA rank answers as the paper says? Pretrained weights score written answers to GSM8K.

    python -m bench.ranking --model FOLDER --data gsm8k_test.jsonl      # as published; 40 problems

Every variant is made from the published solutions by the rules below, so that no wording is
anybody's choice per problem. A table for each prompt says the mean R_SA of each variant, and how
often the concise solution of a problem scores higher than that variant of it. The last prompt is a
trap: it asks for a box in ppl(a|q) only, so the box itself is rewarded.
"""

import argparse
import json
import random
import re

from tqdm import tqdm

from bench import paper
from bench.seeds import spread
from data.hub import find_model
from data.prompts import SYSTEM, encode_prompt
from data.tokenizer import Tokenizer
from kernels import keep_freed_memory
from model import GPT
from runtime.errors import user_errors
from sar import answer_logprobs, self_aligned_reward

MARK = re.compile(r"<<[^<>]*=([^<>=]*)>>")  # 48/2 = <<48/2=24>>24
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
PROMPTS = {"default": (SYSTEM, ""), "the authors'": (paper.SYSTEM, paper.INSTRUCTION),
           "trap, a box asked for with the question only": ("", SYSTEM)}
FIVE = ("concise", "restated and re-checked", "answer only", "wrong", "off-topic")


def finish(steps: list[str], answer: str) -> str:
    return "\n".join([*steps, f"The final answer is \\boxed{{{answer}}}."])


def altered(number: str, rng: random.Random) -> str:
    value = float(number.replace(",", "")) + rng.randint(1, 9)
    return str(int(value)) if value == int(value) else f"{value:.2f}"


def wrong_solution(solution: str, answer: str, rng: random.Random) -> str:
    """The solution with the results of its last two calculations altered, wherever they occur from
    there on, and so its answer."""
    marks = list(MARK.finditer(solution))[-2:]
    wrong = {m[1].replace(",", ""): altered(m[1], rng) for m in marks if NUMBER.fullmatch(m[1])}
    wrong.setdefault(answer, altered(answer, rng))
    first = marks[0].start() if marks else 0
    head, tail = MARK.sub("", solution[:first]), MARK.sub("", solution[first:])
    tail = NUMBER.sub(lambda m: wrong.get(m[0].replace(",", ""), m[0]), tail)
    return finish((head + tail).split("\n"), wrong[answer])


def variants(question: str, solution: str, answer: str, other: str, rng: random.Random
             ) -> dict[str, str]:
    """Answers to one problem by name; solution has calculator marks, `other` is another problem's
    concise solution."""
    steps = MARK.sub("", solution).split("\n")
    restated = [f"Let me first restate the problem. {question}",
                "Now I will solve it step by step."]
    checked = []
    for step in steps:
        checked += [step, f"Wait, let me double-check this step before I go on. {step} Yes, I "
                    "checked it again and that is correct."]
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
    """(question, solution with calculator marks, answer) of the first problems that are solved in
    two steps or more."""
    chosen = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                solution, _, answer = row["answer"].partition("\n#### ")
                question = row["question"]
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{path}, line {number} is not GSM8K's published form: question, "
                                 "and answer with steps and ####") from None
            answer = answer.strip().replace(",", "")
            if NUMBER.fullmatch(answer) and "\n" in solution:
                chosen.append((question, solution, answer))
            if len(chosen) == count:
                return chosen
    raise ValueError(f"{path} holds {len(chosen)} problems of two steps or more, asked for "
                     f"{count}: choose a smaller --limit")


def print_table(rewards: dict[str, list[float]], tokens: dict[str, list[int]]) -> None:
    print("| answer | mean R_SA | concise scores higher | mean tokens |\n|---|---|---|---|")
    for name, r in rewards.items():
        wins = sum(best > other for best, other in zip(rewards["concise"], r))
        higher = "" if name == "concise" else f"{wins} of {len(r)}"
        length = sum(tokens[name]) / len(r)
        print(f"| {name} | {spread(r, '.3f')} | {higher} | {length:.0f} |")
    scores = list(zip(*[rewards[name] for name in FIVE]))  # of each problem
    first = sum(max(five) == five[0] for five in scores)
    print(f"\n{len(scores)} problems; mean ± standard error. Among {', '.join(FIVE)} the concise "
          f"answer scores highest on {first}.")


def score(tokenizer, model, problems, texts_of) -> tuple[dict, dict]:
    """({variant: R_SA of each problem's}, {variant: tokens of each problem's})."""
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    no_question = encode_prompt(tokenizer, "")
    rewards, tokens = {}, {}
    for (question, _, _), texts in zip(tqdm(problems, desc="problems"), texts_of):
        answers = [tokenizer.encode(text, at_start=False) + end for text in texts.values()]
        with_question, without_question = (
            answer_logprobs(model, [context] * len(answers), answers, micro_tokens=2048)
            for context in (encode_prompt(tokenizer, question), no_question)
        )
        scores = self_aligned_reward(with_question, without_question).tolist()
        for name, r_sa, ids in zip(texts, scores, answers):
            rewards.setdefault(name, []).append(r_sa)
            tokens.setdefault(name, []).append(len(ids))
    return rewards, tokens


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True,
                        help="gsm8k_train.jsonl or gsm8k_test.jsonl as published")
    parser.add_argument("--limit", type=int, default=40, help="problems")
    args = parser.parse_args(argv)
    if args.limit < 2:
        raise ValueError(f"--limit must be 2 or more, got {args.limit}: the off-topic answer is "
                         "another problem's")
    keep_freed_memory()
    problems = read_gsm8k(args.data, args.limit)
    folder = find_model(args.model)
    tokenizer, model = Tokenizer.from_pretrained(folder), GPT.from_pretrained(folder)
    rng = random.Random(0)
    texts_of = []  # of each problem: its variants by name
    for i, (question, solution, answer) in enumerate(problems):
        _, other_solution, other_answer = problems[i - 1]
        other = finish(MARK.sub("", other_solution).split("\n"), other_answer)
        texts_of.append(variants(question, solution, answer, other, rng))
    for name, (tokenizer.system, tokenizer.instruction) in PROMPTS.items():
        print(f"\nPrompt: {name}\n")
        print_table(*score(tokenizer, model, problems, texts_of))


if __name__ == "__main__":
    with user_errors():
        main()
