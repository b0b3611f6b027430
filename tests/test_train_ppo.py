"""train_sa_ppo.py: GAE, whitening and losses by hand, and whole runs of the script."""

import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_train_grpo import KILL, ROOT, lines, metrics, runs  # noqa: F401  (runs is a fixture)

import runtime
import train_sa_ppo
from train_sa_ppo import gae, policy_loss, value_loss, whiten

SMALL = [
    "--prompts-per-step",
    "8",
    "--minibatch",
    "4",
    "--max-new-tokens",
    "48",
    "--eval-every",
    "0",
    "--save-every",
    "2",
    "--critic-warmup",
    "1",
]


def test_gae_by_hand():
    # gamma 0.5, lam 0.5: delta = [0 + .5*.4 - .2, 0 + .5*.6 - .4, 1 - .6] = [0, -.1, .4]; A = delta + .25 * next A
    rewards, values = (
        torch.tensor([[0.0, 0.0, 1.0]]).double(),
        torch.tensor([[0.2, 0.4, 0.6]]).double(),
    )
    advantages, returns = gae(rewards, values, 0.5, 0.5, torch.tensor([3]))
    assert advantages[0].tolist() == pytest.approx([0.0, 0.0, 0.4])
    assert returns[0].tolist() == pytest.approx([0.2, 0.4, 1.0])


@pytest.mark.parametrize("gamma", [1, 0.99, 0.95, 0])
@pytest.mark.parametrize("lam", [1, 0.99, 0.95, 0])
def test_gae_equals_the_double_sum(rng, gamma, lam):
    """A_t = sum over k >= t of (gamma lam)^(k-t) delta_k, written out, on ragged answers; beyond them stands NaN."""
    lengths = torch.tensor([1, 7, 20, 13])
    rewards, values = torch.randn(4, 20).double(), torch.randn(4, 20).double()
    for i, length in enumerate(lengths.tolist()):
        rewards[i, length:] = values[i, length:] = math.nan
    advantages, returns = gae(rewards, values, gamma, lam, lengths)
    for i, length in enumerate(lengths.tolist()):
        r, v = (
            rewards[i].tolist(),
            values[i].tolist()[:length] + [0.0],
        )  # also an answer that was cut ends with value zero
        delta = [r[k] + gamma * v[k + 1] - v[k] for k in range(length)]
        want = [
            sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
            for t in range(length)
        ]
        assert advantages[i, :length].tolist() == pytest.approx(want, abs=1e-12)
        assert returns[i, :length].tolist() == pytest.approx(
            [a + b for a, b in zip(want, v)], abs=1e-12
        )
        assert advantages[i, length:].tolist() == [0.0] * (20 - length)


def test_whitening_by_hand():
    one, two = whiten(
        [torch.tensor([1.0, 2.0]).double(), torch.tensor([6.0]).double()]
    )  # mean 3, variance (4 + 1 + 9) / 2
    assert [*one.tolist(), *two.tolist()] == pytest.approx([-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5])
    assert whiten([torch.ones(3)])[0].tolist() == [0, 0, 0]
    assert whiten([torch.ones(1)])[0].tolist() == [0]


def test_with_zero_critic_and_no_discount_the_advantage_is_the_whitened_return():
    lengths = torch.tensor([2, 4, 3])
    rewards = torch.zeros(3, 4).double()
    final = torch.tensor([1.0, 0.0, 1.2]).double()
    rewards[torch.arange(3), lengths - 1] = final
    advantages, returns = gae(rewards, torch.zeros(3, 4).double(), 1.0, 1.0, lengths)
    ragged = [final[i].expand(n) for i, n in enumerate(lengths.tolist())]
    assert all(torch.equal(returns[i, : len(r)], r) for i, r in enumerate(ragged))
    for ours, want in zip(
        whiten([advantages[i, : len(r)] for i, r in enumerate(ragged)]), whiten(ragged)
    ):
        assert torch.equal(ours, want)


def test_value_loss_by_hand():
    # value, old, return -> loss: free; held at old + 0.5 (further from the return, so it counts); held but nearer (free counts)
    table = [
        (1.0, 0.8, 2.0, 0.5),
        (2.0, 0.0, 2.0, 1.125),
        (2.0, 0.0, 0.0, 2.0),
        (-1.0, 0.0, 1.0, 2.0),
    ]
    value, old, returns, want = (torch.tensor(c).double() for c in zip(*table))
    value.requires_grad_()
    loss = value_loss(value, old, returns)
    assert loss.tolist() == pytest.approx(want.tolist())
    (grad,) = torch.autograd.grad(loss.sum(), value)
    assert grad.tolist() == pytest.approx([-1.0, 0.0, 2.0, -2.0])


def test_policy_loss_is_grpos(rng):
    from train_sa_grpo import policy_loss as grpo

    logprob, old, advantage = torch.randn(3, 200)
    for ours, theirs in zip(policy_loss(logprob, old, advantage), grpo(logprob, old, advantage)):
        assert torch.equal(ours, theirs)


def train(*argv):
    train_sa_ppo.main([*SMALL, *map(str, argv)])


def test_steps_end_to_end(runs):  # noqa: F811
    train("--run", "a", "--steps", 3, "--kl-coef", 0.01, "--kl-in-reward")
    rows = metrics(runs / "a")
    for key in (
        "reward",
        "accuracy",
        "r_sa_mean",
        "value_loss",
        "explained_variance",
        "value_mean",
        "value_std",
        "advantage_std",
        "length_mean",
        "kl",
        "entropy",
        "clip_fraction",
        "mismatch_max",
        "grad_norm",
        "critic_grad_norm",
    ):
        assert all(math.isfinite(r[key]) for r in rows), key
    assert (
        rows[0]["value_mean"] == 0
        and rows[0]["explained_variance"] == 0
        and rows[2]["value_mean"] != 0
    )
    answers = lines(runs / "a" / "completions.jsonl")
    assert len(answers) == 3 * 8
    assert all(a["reward"] == pytest.approx(a["r_vr"] + 0.2 * a["r_sa"]) for a in answers)
    before, after = (
        load_file(ROOT / "data/tiny/model.safetensors"),
        load_file(runs / "a" / "step_000003" / "model.safetensors"),
    )
    assert any((before[k].float() != after[k]).any() for k in before)


def test_critic_warmup_leaves_the_policy_alone(runs):  # noqa: F811
    train("--run", "w", "--steps", 2, "--critic-warmup", 2)
    before, after = (
        load_file(ROOT / "data/tiny/model.safetensors"),
        load_file(runs / "w" / "step_000002" / "model.safetensors"),
    )
    assert all(torch.equal(before[k].float(), after[k]) for k in before)
    assert load_file(runs / "w" / "step_000002" / "critic.safetensors")["head"].abs().sum() > 0
    train_sa_ppo.main(
        ["--run", "w", "--resume", "--steps", "3"]
    )  # from a checkpoint whose policy optimizer has no state yet
    train("--run", "v", "--steps", 3, "--critic-warmup", 2)
    assert metrics(runs / "w") == metrics(runs / "v")


def test_gradients_do_not_depend_on_micro_batches(runs, monkeypatch):  # noqa: F811
    seen = []

    def record(self, closure=None):
        seen.append(
            torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).double()
        )

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    load = train_sa_ppo.GPT.from_pretrained
    monkeypatch.setattr(
        train_sa_ppo.GPT, "from_pretrained", lambda *args, **kwargs: load(*args, **kwargs).double()
    )
    for budget in (1, 200, 10_000):
        train(
            "--run", f"micro{budget}", "--steps", 1, "--critic-warmup", 0, "--micro-tokens", budget
        )
    assert len(seen) == 12 and all(
        g.norm() > 0 for g in seen
    )  # two minibatches of policy and critic, three times
    for first, other in zip(seen[:4] * 2, seen[4:]):
        assert (first - other).norm() / first.norm() < 1e-9


def test_alpha_zero_is_plain_ppo_bit_for_bit(runs):  # noqa: F811
    train("--run", "zero", "--steps", 2, "--alpha", 0)
    train("--run", "vr", "--steps", 2, "--reward", "vr")
    assert metrics(runs / "zero") == metrics(runs / "vr")
    assert (runs / "zero" / "completions.jsonl").read_bytes() == (
        runs / "vr" / "completions.jsonl"
    ).read_bytes()
    for name in ("model", "optimizer", "critic", "critic_optimizer"):
        one, two = (
            load_file(runs / run / "step_000002" / f"{name}.safetensors") for run in ("zero", "vr")
        )
        assert all(torch.equal(one[k], two[k]) for k in one), name


def test_killed_and_resumed_equals_undisturbed(runs):  # noqa: F811
    """Policy, critic, both optimizers, logs; the kill falls between the files of the second checkpoint."""
    env = os.environ | {"SA_RUNS": str(runs), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    code = KILL.replace("train_sa_grpo", "train_sa_ppo")
    dead = subprocess.run(
        [sys.executable, "-c", code, "save_file", "5", *SMALL, "--run", "killed", "--steps", "4"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert (runs / "killed" / "step_000004.tmp").exists() and not (
        runs / "killed" / "step_000004"
    ).exists()
    train_sa_ppo.main(["--run", "killed", "--resume"])
    train("--run", "undisturbed", "--steps", 4)
    a, b = runs / "killed", runs / "undisturbed"
    assert (
        metrics(a) == metrics(b)
        and (a / "completions.jsonl").read_bytes() == (b / "completions.jsonl").read_bytes()
    )
    for name in ("model", "optimizer", "critic", "critic_optimizer"):
        one, two = (load_file(f / "step_000004" / f"{name}.safetensors") for f in (a, b))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one), name


def test_impossible_settings(runs, capsys):  # noqa: F811
    for argv, words in (
        (["--lam", "2"], "--lam must lie between"),
        (["--critic-lr", "0"], "--critic-lr must be positive"),
        (["--minibatch", "16"], "larger than --prompts-per-step"),
        (
            ["--reward", "o1"],
            "--reward o1 compares the answers to one question: it needs --n 2 or more",
        ),
        (["--kl-in-reward"], "--kl-in-reward needs a --kl-coef"),
    ):
        with pytest.raises(SystemExit) as stop, runtime.user_errors():
            train(*argv)
        assert stop.value.code == 2 and words in capsys.readouterr().err
