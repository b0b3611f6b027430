"""What several test files of whole runs share."""
import json
import os
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
slow = pytest.mark.skipif(not os.environ.get("SA_SLOW"), reason="SA_SLOW=1 runs it")
PIN = re.search(r"torch==(\S+)", (ROOT / "requirements.txt").read_text("utf-8"))[1]
PINNED = torch.__version__.split("+")[0] == PIN  # what is promised for this version alone
TIMES = {"seconds_sampling", "seconds_scoring", "seconds_update", "peak_memory_gb"}

KILL = """
import os, signal, sys, train_sa_grpo
from runtime import parallel, runs
calls = 0
def die_in(name, when):
    module = runs if hasattr(runs, name) else parallel
    real = getattr(module, name)
    def dying(*args, **kwargs):
        global calls
        calls += 1
        if calls == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(module, name, dying)
die_in(sys.argv[1], int(sys.argv[2]))
train_sa_grpo.main(sys.argv[3:])
"""


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(folder):
    """A run's metrics but for what it took."""
    return [{k: v for k, v in m.items() if k not in TIMES} for m in lines(folder / "metrics.jsonl")]


def recorded_gradients(monkeypatch):
    """A list to which every optimizer step adds its gradient, flat, instead of stepping."""
    seen = []

    def record(self, closure=None):
        grads = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        seen.append(torch.cat(grads).double())
    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    return seen
