"""The embedded world and its model: right grammar, clean split, and a model that is as meant."""

import random
import re
from itertools import islice

import pytest
import torch
from conftest import TINY

from data import make_tiny
from data.prompts import encode_prompt
from data.tiny_world import (
    NAMES,
    STYLES,
    THINGS,
    is_test,
    solution,
    stories,
    tiny_problems,
    training_texts,
    work_out,
)
from verify import judge


def test_every_solution_is_right_in_every_style():
    rng = random.Random(5)
    for story in islice(stories(5), 400):
        assert 2 <= len(work_out(story)) <= 4
        for style in STYLES:
            text = solution(story, style, rng)
            assert judge(text, story.answer).reward == 1
            for left, op, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", text):
                assert eval_step(int(left), op, int(right)) == int(result)
        # what makes an answer verbose can be left out without touching the result
        terse, full = solution(story, "terse", rng), solution(story, "verbose", rng, keep=1.0)
        assert solution(story, "verbose", rng, keep=0.0) == terse and len(full) > 2 * len(terse)


def test_a_careless_solution_misreads_and_is_consistent_all_the_same():
    """Its arithmetic is right, and its last line repeats its last result."""
    rng, wrong = random.Random(6), 0
    for story in islice(stories(6), 1000):
        text = solution(story, "verbose", rng, careless=True)
        for left, op, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", text):
            assert eval_step(int(left), op, int(right)) == int(result)
        assert text.endswith("#### " + re.findall(r"= (\d+)", text)[-1])
        wrong += judge(text, story.answer).reward == 0
    assert 0.3 < wrong / 1000 < 0.5


def eval_step(a, op, b):
    return {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[op]


def test_the_test_set_is_held_out():
    train, test = tiny_problems("train"), tiny_problems("test")
    assert len(test) == 512 and len(train) == 4096
    assert all(is_test(question) for question, _ in test)
    assert not any(is_test(question) for question, _ in train)
    assert tiny_problems("test") == test
    questions = [q for q, _ in islice(training_texts(0), 5000)]
    assert not any(is_test(q) for q in questions if q)
    assert 0.10 <= sum(not q for q in questions) / 5000 <= 0.20


def test_words_and_numbers_are_single_tokens(tokenizer):
    for word in [*NAMES, *THINGS, *map(str, range(100)), "Check", "right"]:
        assert len(tokenizer.encode(" " + word)) == 1, word
    text = "Tom: 12 + 30 = 42 cups.\n#### 42 <|endoftext|> été 日本"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.special["<|endoftext|>"] not in tokenizer.encode(text)
    assert tokenizer.stop_ids == {tokenizer.special["<|endoftext|>"]}


def test_its_tokenizer_is_made_by_make_tiny(tmp_path):
    make_tiny.write_tokenizer(tmp_path, seed=0)
    for made in tmp_path.iterdir():
        assert made.read_bytes() == (TINY / made.name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_batch_holds_prompts_and_answers_and_learns_the_answers_only(tokenizer):
    tokens, targets = next(make_tiny.batches(tokenizer, seed=3, batch_size=8))
    stop = tokenizer.special["<|endoftext|>"]
    start = tokenizer.special["<|answer|>"]
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        first, last = row.index(start), row.index(stop)
        assert wanted[first:last] == row[first + 1:last + 1]
        assert set(wanted[:first] + wanted[last:]) == {-100}


def test_it_is_small():
    assert sum(f.stat().st_size for f in TINY.iterdir()) <= 4 * 2**20


@pytest.fixture(scope="module")
def greedy(tokenizer):
    from data.problems import load_problems
    from model import GPT
    from rollout import generate

    problems = load_problems("tiny-test")
    rollouts = generate(
        GPT.from_pretrained(TINY),
        [encode_prompt(tokenizer, p.question) for p in problems],
        max_new_tokens=256,
        stop=tokenizer.stop_ids,
        temperature=0.0,
    )
    return problems, [tokenizer.decode(r.tokens[:-1]) for r in rollouts], rollouts


def test_the_base_is_fallible_and_verbose(greedy, tokenizer):
    problems, texts, rollouts = greedy
    accuracy = sum(judge(t, p.answer).reward for t, p in zip(texts, problems)) / len(problems)
    assert 0.60 <= accuracy <= 0.85
    assert all(r.finished for r in rollouts)
    # The terse solutions of the same problems need less than half of the tokens.
    terse = 0
    for story in islice(stories(1, test=True), 512):
        terse += len(tokenizer.encode(solution(story, "terse", random.Random(0)))) + 1
    assert terse < 0.5 * sum(len(r.tokens) for r in rollouts)


def test_transformers_loads_it_and_agrees(greedy, tokenizer, model):
    transformers = pytest.importorskip("transformers")
    their_model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    problems, texts, rollouts = greedy
    for problem, text, rollout in list(zip(problems, texts, rollouts))[:3]:
        prompt = encode_prompt(tokenizer, problem.question)
        message = [{"role": "user", "content": problem.question}]
        options = dict(add_generation_prompt=True, return_dict=False)
        assert their_tokenizer.apply_chat_template(message, **options) == prompt
        assert their_tokenizer.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        tokens = torch.tensor([prompt + rollout.tokens])
        with torch.no_grad():
            ours, theirs = model(tokens) @ model.unembedding.T, their_model(tokens).logits
        assert (ours - theirs).abs().max() < 2e-4 * (theirs.max() - theirs.min())
        options = dict(max_new_tokens=256, do_sample=False)
        sampled = their_model.generate(torch.tensor([prompt]), **options)
        assert sampled[0, len(prompt):].tolist() == rollout.tokens
