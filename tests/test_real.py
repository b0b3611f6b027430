"""Real weights and real data: SA_MODELS (folders of weights), SA_SHARED and transformers needed."""

import json
import os
from pathlib import Path

import pytest
import torch

from data.problems import load_problems
from data.prompts import encode_prompt
from data.tokenizer import Tokenizer
from model import GPT
from rollout import generate
from verify import judge

MODELS, SHARED = os.environ.get("SA_MODELS"), os.environ.get("SA_SHARED")
TRAINED = os.environ.get("SA_TRAINED")  # a checkpoint of a run on real data
SMOLLM = Path(MODELS or "") / "smollm2-135m"


@pytest.mark.skipif(not (MODELS and SMOLLM.is_dir() and SHARED),
                    reason="SA_MODELS with smollm2-135m, and SA_SHARED, are not set")
def test_greedy_continuation_equals_transformers():
    """The trained folder where there is one, else the published weights."""
    transformers = pytest.importorskip("transformers")
    folder = TRAINED or SMOLLM
    tokenizer = Tokenizer.from_pretrained(folder)
    problems = load_problems(Path(SHARED) / "data/raw/gsm8k_train.jsonl")[:3]
    prompts = [encode_prompt(tokenizer, p.question) for p in problems]
    rollouts = generate(GPT.from_pretrained(folder), prompts, max_new_tokens=48,
                        stop=tokenizer.stop_ids, temperature=0.0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt, rollout in zip(prompts, rollouts):
        row = theirs.generate(torch.tensor([prompt]), max_new_tokens=48, do_sample=False)[0]
        expected = row[len(prompt):].tolist()
        assert rollout.tokens == expected
        text = their_tokenizer.decode(expected, skip_special_tokens=True)
        assert tokenizer.decode(expected) == text


@pytest.mark.skipif(not TRAINED, reason="SA_TRAINED, a checkpoint of a run, is not set")
def test_completions_of_a_real_run_hold_what_they_promise():
    lines = (Path(TRAINED).parent / "completions.jsonl").read_bytes().splitlines()
    rows = [json.loads(line) for line in lines]
    tokenizer = Tokenizer.from_pretrained(TRAINED)
    assert rows
    for row in rows:
        text = tokenizer.decode(row["tokens"][:-1] if row["finished"] else row["tokens"])
        assert text == row["text"] and row["finished"] == (row["tokens"][-1] in tokenizer.stop_ids)
        verdict = judge(row["text"], row["reference"])
        assert verdict == (row["r_vr"], row["answer"], row["status"])
        assert row["reward"] == pytest.approx(row["r_vr"] + 0.2 * row["r_sa"])
    assert all(row["text"] for row in rows)
