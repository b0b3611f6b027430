import os
import random
import signal
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network

TINY = Path(__file__).resolve().parent.parent / "data" / "tiny"


@pytest.fixture(scope="session")
def tokenizer():
    from data.tokenizer import Tokenizer

    return Tokenizer.from_pretrained(TINY)


@pytest.fixture
def model():
    """The embedded model, float32, a fresh copy for each test."""
    from model import GPT

    return GPT.from_pretrained(TINY)


@pytest.fixture
def prompts(tokenizer):
    """Eight real prompts of mixed lengths."""
    from data.prompts import encode_prompt
    from data.tiny_world import tiny_problems

    return [encode_prompt(tokenizer, question) for question, _ in tiny_problems("test")[:8]]


@pytest.fixture
def rng():
    """Fresh inputs in every run; the seed is in the output of a test that fails."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The folder that takes the place of runs/; signal handlers are put back."""
    from runtime import runs as module

    monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path / "runs"
    for number, handler in handlers.items():
        signal.signal(number, handler)
