import os
import random
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
    from data.make_tiny import tiny_problems
    from data.prompts import encode_prompt

    return [encode_prompt(tokenizer, p.question) for p in tiny_problems("test")[:8]]


@pytest.fixture
def rng():
    """Fresh inputs in every run; the seed is in the output of a test that fails."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)
