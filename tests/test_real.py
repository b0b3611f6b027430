"""Real weights and real data, where SA_MODELS (folders made by real_models.py), SA_SHARED and transformers are at hand."""

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

MODELS, SHARED, TRAINED = (
    os.environ.get(name) for name in ("SA_MODELS", "SA_SHARED", "SA_TRAINED")
)
smollm = pytest.mark.skipif(
    not MODELS or not (Path(MODELS or "") / "smollm2-135m").is_dir() or not SHARED,
    reason="SA_MODELS with smollm2-135m, and SA_SHARED, are not set",
)


@smollm
def test_greedy_continuation_equals_transformers():
    """The trained folder where there is one (SA_TRAINED, a checkpoint of a run), else the published weights."""
    transformers = pytest.importorskip("transformers")
    folder = TRAINED or Path(MODELS) / "smollm2-135m"
    tokenizer = Tokenizer.from_pretrained(folder)
    problems = load_problems(Path(SHARED) / "data/raw/gsm8k_train.jsonl")[:3]
    prompts = [encode_prompt(tokenizer, p.question) for p in problems]
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peer_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt, rollout in zip(
        prompts,
        generate(
            GPT.from_pretrained(folder),
            prompts,
            max_new_tokens=48,
            stop=tokenizer.stop_ids,
            temperature=0.0,
        ),
    ):
        theirs = peer.generate(torch.tensor([prompt]), max_new_tokens=48, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        assert rollout.tokens == theirs
        assert peer_tokenizer.decode(theirs, skip_special_tokens=True) == tokenizer.decode(theirs)


@pytest.mark.skipif(
    not TRAINED, reason="SA_TRAINED, a checkpoint of a run on real data, is not set"
)
def test_completions_of_a_real_run_hold_what_they_promise():
    rows = [
        json.loads(line)
        for line in (Path(TRAINED).parent / "completions.jsonl").read_text().splitlines()
    ]
    tokenizer = Tokenizer.from_pretrained(TRAINED)
    assert rows
    for row in rows:
        text = tokenizer.decode(row["tokens"][:-1] if row["finished"] else row["tokens"])
        assert text == row["text"] and row["finished"] == (row["tokens"][-1] in tokenizer.stop_ids)
        verdict = judge(row["text"], row["reference"])
        assert (verdict.reward, verdict.answer, verdict.status) == (
            row["r_vr"],
            row["answer"],
            row["status"],
        )
        assert row["reward"] == pytest.approx(row["r_vr"] + 0.2 * row["r_sa"])
    assert any(row["answer"] for row in rows)
