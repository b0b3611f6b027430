"""train_sa_ppo.py: GAE, whitening and losses by hand, and whole runs of the script."""
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import KILL, ROOT, lines, metrics, recorded_gradients, slow
from safetensors.torch import load_file

import train_sa_grpo
import train_sa_ppo
from data.prompts import encode_prompt
from runtime.errors import user_errors
from sar import answer_logprobs
from train_sa_ppo import gae, policy_loss, value_loss, whiten

SMALL = ("--prompts-per-step 8 --minibatch 4 --max-new-tokens 48 --eval-every 0 --save-every 2 "
         "--critic-warmup 1").split()


def test_gae_by_hand():
    # gamma 0.5, lam 0.5: delta = [0 + .5*.4 - .2, 0 + .5*.6 - .4, 1 - .6] = [0, -.1, .4];
    # A = delta + .25 * next A
    rewards = torch.tensor([[0.0, 0.0, 1.0]]).double()
    values = torch.tensor([[0.2, 0.4, 0.6]]).double()
    advantages, returns = gae(rewards, values, 0.5, 0.5, torch.tensor([3]))
    assert advantages[0].tolist() == pytest.approx([0.0, 0.0, 0.4])
    assert returns[0].tolist() == pytest.approx([0.2, 0.4, 1.0])


@pytest.mark.parametrize("gamma", [1, 0.99, 0.95, 0])
@pytest.mark.parametrize("lam", [1, 0.99, 0.95, 0])
def test_gae_equals_the_double_sum(rng, gamma, lam):
    """A_t = sum over k >= t of (gamma lam)^(k-t) delta_k, on ragged answers; beyond them is NaN."""
    lengths = torch.tensor([1, 7, 20, 13])
    rewards, values = torch.randn(4, 20).double(), torch.randn(4, 20).double()
    for i, length in enumerate(lengths.tolist()):
        rewards[i, length:] = values[i, length:] = math.nan
    advantages, returns = gae(rewards, values, gamma, lam, lengths)
    for i, length in enumerate(lengths.tolist()):
        r, v = rewards[i].tolist(), values[i].tolist()[:length] + [0.0]  # cut answers too
        delta = [r[k] + gamma * v[k + 1] - v[k] for k in range(length)]
        want = []
        for t in range(length):
            want.append(sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length)))
        assert advantages[i, :length].tolist() == pytest.approx(want, abs=1e-12)
        both = [a + b for a, b in zip(want, v)]
        assert returns[i, :length].tolist() == pytest.approx(both, abs=1e-12)
        assert advantages[i, length:].tolist() == [0.0] * (20 - length)


def test_whitening_by_hand():
    three = whiten(torch.tensor([1.0, 2.0, 6.0]).double())  # mean 3, variance (4 + 1 + 9) / 2
    assert three.tolist() == pytest.approx([-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5])
    assert whiten(torch.ones(3)).tolist() == [0, 0, 0]
    assert whiten(torch.ones(1)).tolist() == [0]
    for dtype in (torch.float32, torch.float64):  # their mean and deviation round
        for value in (0.1, 1.1, -1234.5678, 1e9 / 3):
            assert whiten(torch.full((1000,), value, dtype=dtype)).tolist() == [0] * 1000
    sums = torch.full((1000,), 0.7).double() + torch.rand(1000).double() * 1e-15  # GAE's rounding
    assert whiten(sums).tolist() == [0] * 1000
    small = whiten(torch.tensor([1.0, 1.001]).double())  # a difference is a difference
    assert small.tolist() == pytest.approx([-1 / 2**0.5, 1 / 2**0.5], rel=1e-4)


def test_with_zero_critic_and_no_discount_the_advantage_is_the_return():
    lengths = torch.tensor([2, 4, 3])
    rewards = torch.zeros(3, 4).double()
    final = torch.tensor([1.0, 0.0, 1.2]).double()
    rewards[torch.arange(3), lengths - 1] = final
    advantages, returns = gae(rewards, torch.zeros(3, 4).double(), 1.0, 1.0, lengths)
    for i, n in enumerate(lengths.tolist()):
        assert torch.equal(returns[i, :n], final[i].expand(n))
        assert torch.equal(advantages[i, :n], final[i].expand(n))


def test_value_loss_by_hand():
    # value, old, return -> loss: free; held at old + 0.5 (further from the return, so it counts);
    # held but nearer (free counts)
    table = [(1.0, 0.8, 2.0, 0.5), (2.0, 0.0, 2.0, 1.125), (2.0, 0.0, 0.0, 2.0),
             (-1.0, 0.0, 1.0, 2.0)]
    value, old, returns, want = (torch.tensor(c).double() for c in zip(*table))
    value.requires_grad_()
    loss = value_loss(value, old, returns)
    assert loss.tolist() == pytest.approx(want.tolist())
    grad, = torch.autograd.grad(loss.sum(), value)
    assert grad.tolist() == pytest.approx([-1.0, 0.0, 2.0, -2.0])


def test_policy_loss_is_grpos(rng):
    logprob, old, advantage = torch.randn(3, 200)
    ours = policy_loss(logprob, old, advantage)
    theirs = train_sa_grpo.policy_loss(logprob, old, advantage)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def train(*argv):
    train_sa_ppo.main([*SMALL, *map(str, argv)])


def test_steps_end_to_end(runs):
    train("--name", "a", "--steps", 3, "--kl-coef", 0.01, "--kl-in-reward")
    rows = metrics(runs / "a")
    for key in ("reward accuracy r_sa_mean value_loss explained_variance value_mean value_std "
                "advantage_std length_mean kl entropy clip_fraction mismatch_max grad_norm "
                "critic_grad_norm").split():
        assert all(math.isfinite(r[key]) for r in rows), key
    assert rows[0]["value_mean"] == 0 and rows[0]["explained_variance"] == 0
    assert rows[2]["value_mean"] != 0
    answers = lines(runs / "a" / "completions.jsonl")
    assert len(answers) == 3 * 8
    assert all(a["reward"] == pytest.approx(a["r_vr"] + 0.2 * a["r_sa"]) for a in answers)
    before = load_file(ROOT / "data/tiny/model.safetensors")
    after = load_file(runs / "a" / "step_000003" / "model.safetensors")
    assert any((before[k].float() != after[k]).any() for k in before)


def test_critic_warmup_leaves_the_policy_alone(runs):
    train("--name", "w", "--steps", 2, "--critic-warmup", 2)
    before = load_file(ROOT / "data/tiny/model.safetensors")
    after = load_file(runs / "w" / "step_000002" / "model.safetensors")
    assert all(torch.equal(before[k].float(), after[k]) for k in before)
    assert load_file(runs / "w" / "step_000002" / "critic.safetensors")["head"].abs().sum() > 0
    train_sa_ppo.main(["--name", "w", "--resume", "--steps", "3"])  # the optimizer has no state yet
    train("--name", "v", "--steps", 3, "--critic-warmup", 2)
    assert metrics(runs / "w") == metrics(runs / "v")


def test_gradients_do_not_depend_on_micro_batches(runs, monkeypatch):
    seen, load = recorded_gradients(monkeypatch), train_sa_ppo.GPT.from_pretrained
    monkeypatch.setattr(train_sa_ppo.GPT, "from_pretrained",
                        lambda *args, **kwargs: load(*args, **kwargs).double())
    for budget in (1, 200, 10_000):
        train("--name", f"micro{budget}", "--steps", 1, "--critic-warmup", 0, "--micro-tokens",
              budget)
    assert len(seen) == 12  # two minibatches of policy and critic, three times
    assert all(g.norm() > 0 for g in seen)
    for first, other in zip(seen[:4] * 2, seen[4:]):
        assert (first - other).norm() / first.norm() < 1e-9


def test_credit_by_token(runs, monkeypatch, model, tokenizer):
    """Token j is paid alpha v_j / L, the last one also R_VR; nothing beyond the answer."""
    paid, real = [], train_sa_ppo.gae

    def spy(rewards, *rest):
        paid.extend(rewards.clone())
        return real(rewards, *rest)
    monkeypatch.setattr(train_sa_ppo, "gae", spy)
    train("--name", "t", "--steps", 1, "--credit", "token", "--alpha", 0.3)
    answers, no_question = lines(runs / "t" / "completions.jsonl"), encode_prompt(tokenizer, "")
    for a, rewards in zip(answers, paid, strict=True):
        contexts, length = [encode_prompt(tokenizer, a["question"]), no_question], len(a["tokens"])
        given, without = answer_logprobs(model, contexts, [a["tokens"]] * 2)
        want = 0.3 * (given - without).double() / length
        want[-1] += a["r_vr"]
        assert rewards[:length].tolist() == pytest.approx(want.tolist(), abs=1e-5)
        assert not rewards[length:].any()
        assert a["reward"] == pytest.approx(rewards.sum().item())
    train("--name", "whole", "--steps", 1, "--alpha", 0.3)
    for a, rewards in zip(lines(runs / "whole" / "completions.jsonl"), paid[8:], strict=True):
        length = len(a["tokens"])
        assert rewards[length - 1] == a["r_vr"] + 0.3 * a["r_sa"] and rewards.count_nonzero() <= 1


def test_the_frozen_start_may_score(runs, model, tokenizer):
    train("--name", "f", "--steps", 2, "--critic-warmup", 0, "--lr", 0.01, "--score-with", "frozen")
    for a in lines(runs / "f" / "completions.jsonl")[8:]:
        contexts = [encode_prompt(tokenizer, a["question"]), encode_prompt(tokenizer, "")]
        given, without = answer_logprobs(model, contexts, [a["tokens"]] * 2)
        want = max(-1, 1 - math.exp((without - given).double().mean()))
        assert a["r_sa"] == pytest.approx(want, abs=1e-4)


def test_alpha_zero_is_plain_ppo_bit_for_bit(runs):
    train("--name", "zero", "--steps", 2, "--alpha", 0)
    train("--name", "vr", "--steps", 2, "--reward", "vr")
    assert_same_run(runs / "zero", runs / "vr", "step_000002")


def assert_same_run(a, b, step):
    assert metrics(a) == metrics(b)
    assert (a / "completions.jsonl").read_bytes() == (b / "completions.jsonl").read_bytes()
    for name in ("model", "optimizer", "critic", "critic_optimizer"):
        one, two = (load_file(run / step / f"{name}.safetensors") for run in (a, b))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one), name


@slow
def test_killed_and_resumed_equals_undisturbed(runs):
    """Policy, critic, both optimizers, logs; killed between files of the second checkpoint."""
    env = os.environ | {"SA_RUNS": str(runs), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    code = KILL.replace("train_sa_grpo", "train_sa_ppo")
    flags = [*SMALL, "--name", "killed", "--steps", "4"]
    dead = subprocess.run([sys.executable, "-c", code, "save_file", "5", *flags], cwd=ROOT, env=env,
                          capture_output=True, text=True)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert (runs / "killed" / "step_000004.tmp").exists()
    assert not (runs / "killed" / "step_000004").exists()
    train_sa_ppo.main(["--name", "killed", "--resume"])
    train("--name", "undisturbed", "--steps", 4)
    assert_same_run(runs / "killed", runs / "undisturbed", "step_000004")


@slow
def test_masters_on_the_host_are_masters_on_the_device(runs):
    """Policy and critic; the start on the host is scored; stopped and resumed."""
    flags = ["--dtype", "bfloat16", "--kl-coef", 0.01, "--critic-warmup", 1]
    train("--name", "device", *flags, "--steps", 4)
    train("--name", "host", *flags, "--offload", "--recompute", "--steps", 2)
    train_sa_ppo.main(["--name", "host", "--resume", "--steps", "4"])
    assert_same_run(runs / "device", runs / "host", "step_000004")


def test_impossible_settings(runs, capsys):
    o1 = "--reward o1 compares the answers to one question: it needs --samples 2 or more"
    for argv, words in ((["--lam", "2"], "--lam: must be between 0 and 1"),
                        (["--critic-lr", "0"], "--critic-lr: must be positive"),
                        (["--minibatch", "16"], "no multiple of --minibatch 16"),
                        (["--reward", "o1"], o1),
                        (["--credit", "token", "--reward", "vr"], "--credit token is for"),
                        (["--offload"], "--offload is for one process with --dtype bfloat16"),
                        (["--kl-in-reward"], "--kl-in-reward needs a --kl-coef")):
        with pytest.raises(SystemExit) as stop, user_errors():
            train(*argv)
        assert stop.value.code == 2 and words in capsys.readouterr().err
