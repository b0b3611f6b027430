"""train_sa_grpo.py: the algorithm's numbers by hand, and whole runs of the script."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import KILL, ROOT, TIMES, lines, metrics, recorded_gradients, slow
from safetensors.torch import load_file

import train_sa_grpo
import train_sa_ppo
from data.prompts import encode_prompt
from data.tokenizer import Tokenizer
from runtime import parallel, settings
from runtime import runs as runs_module
from runtime.errors import user_errors
from sar import REWARDS, answer_logprobs, self_aligned_reward, total_reward
from train_sa_grpo import group_advantages, kl_k3, policy_loss, shortest_advantages

SMALL = ("--prompts-per-step 4 --minibatch 2 --samples 4 --max-new-tokens 48 --eval-every 0 "
         "--save-every 2").split()


# ---- numbers ----


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.2], [0.1, 0.1, 0.1, 0.1], [0.3, 0.0, 0.0, 0.0]])
    rewards = rewards.double()
    assert group_advantages(rewards)[0].tolist() == pytest.approx([0.45, -0.55, -0.55, 0.65])
    assert group_advantages(rewards)[2].tolist() == pytest.approx([0.225, -0.075, -0.075, -0.075])
    assert group_advantages(rewards)[1].tolist() == [0.0] * 4
    equal = torch.full((50, 7), 1.1) * torch.rand(50, 1)  # exactly zero though the mean rounds
    assert (group_advantages(equal) == 0).all()


def test_gfpo_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 1.2, 0.0], [0.5, 0.25, 1.0, 0.0], [0.0] * 4]).double()
    lengths = torch.tensor([[9, 3, 5, 7], [4, 4, 4, 4], [1, 2, 3, 4]])  # ties: the first are kept
    two = shortest_advantages(rewards, lengths, 2)
    assert two[0].tolist() == pytest.approx([0, -0.6, 0.6, 0])
    assert two[1].tolist() == pytest.approx([0.125, -0.125, 0, 0])
    assert two[2].tolist() == [0] * 4
    three = shortest_advantages(rewards, lengths, 3)
    assert three[0].tolist() == pytest.approx([0, -0.4, 0.8, -0.4])
    for keep in (4, None):
        assert torch.equal(shortest_advantages(rewards, lengths, keep), group_advantages(rewards))


def test_policy_loss_by_hand():
    # ratio, advantage -> loss, is the gradient gone?
    table = [(1.0, 2.0, -2.0, False), (1.1, 2.0, -2.2, False), (1.5, 2.0, -2.4, True),
             (0.5, 2.0, -1.0, False), (1.1, -1.0, 1.1, False), (0.5, -1.0, 0.8, True),
             (1.5, -1.0, 1.5, False), (4.0, -1.0, 3.0, True), (1.0, 0.0, 0.0, False)]
    ratio, advantage, want, gone = (torch.tensor(column).double() for column in zip(*table))
    old = torch.full_like(ratio, -1.5)
    logprob = (old + ratio.log()).requires_grad_()
    loss, clipped = policy_loss(logprob, old, advantage)
    assert loss.tolist() == pytest.approx(want.tolist())
    assert clipped.tolist() == gone.bool().tolist()
    grad, = torch.autograd.grad(loss.sum(), logprob)
    assert grad.tolist() == pytest.approx([0.0 if g else -a * r for r, a, _, g in table])


@pytest.mark.parametrize("script", [train_sa_grpo, train_sa_ppo])
def test_log_ratios_are_held_and_k3_is_at_most_10(script):
    """A log-ratio above 88 overflows float32's exp, and infinity times 0 is NaN."""
    old = torch.zeros(4)
    logprob = torch.tensor([200.0, 200.0, 200.0, -200.0], requires_grad=True)
    loss, clipped = script.policy_loss(logprob, old, torch.tensor([1.0, -1.0, 0.0, 1.0]))
    assert loss.tolist() == pytest.approx([-1.2, 3, 0, -math.exp(-20)])
    assert clipped.tolist() == [True, True, False, False]
    loss.sum().backward()
    assert logprob.grad.tolist() == [0] * 4
    d = torch.tensor([2.0, 2.6, 30.0, 200.0, -10.0, -30.0], requires_grad=True)  # frozen - policy
    k3 = script.kl_k3(torch.zeros(6), d)
    want = [math.exp(2) - 3, math.exp(2.6) - 3.6, 10, 10, math.exp(-10) + 9, 10]
    assert k3.tolist() == pytest.approx(want)
    k3.sum().backward()
    assert d.grad.tolist() == pytest.approx([math.exp(2) - 1, math.exp(2.6) - 1, 0, 0,
                                             math.exp(-10) - 1, 0])


def test_k3_by_hand_and_as_an_estimate(rng):
    assert kl_k3(torch.tensor([-1.0]), torch.tensor([-1.0])).item() == 0
    by_hand = kl_k3(torch.tensor([0.5]).log(), torch.tensor([0.25]).log()).item()
    assert by_hand == pytest.approx(0.5 + math.log(2) - 1)
    # near each other: k3 stays below its bound of 10
    p, q = (0.3 * torch.randn(2, 6).double()).log_softmax(-1)
    k3 = kl_k3(p, q)
    assert (k3 >= 0).all()
    exact = (p.exp() * (p - q)).sum().item()
    assert (p.exp() * k3).sum().item() == pytest.approx(exact)  # its mean under p is the KL


# ---- whole runs ----


def train(*argv):
    train_sa_grpo.main([*SMALL, *map(str, argv)])


def assert_same_run(a, b, step="step_000004"):
    assert metrics(a) == metrics(b)
    assert (a / "completions.jsonl").read_bytes() == (b / "completions.jsonl").read_bytes()
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, two = load_file(a / step / name), load_file(b / step / name)
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_two_steps_end_to_end(runs, capsys):
    train("--name", "a", "--steps", 2, "--eval-every", 2)
    folder = runs / "a"
    rows = metrics(folder)
    assert [r["step"] for r in rows] == [1, 2]
    for key in ("reward accuracy r_sa_mean r_sa_std ppl_query ppl_alone advantage_std no_signal "
                "length_mean length_p50 length_p95 length_max unfinished share_no_answer "
                "share_unparsed kl entropy clip_fraction ratio_max mismatch_mean mismatch_max "
                "grad_norm lr tokens r_vr_group_std r_sa_group_std").split():
        assert all(math.isfinite(r[key]) for r in rows), key
    assert rows[0]["mismatch_max"] < 1e-4 and rows[0]["grad_norm"] > 0
    answers = lines(folder / "completions.jsonl")
    assert len(answers) == 2 * 4 * 4
    for a in answers:
        assert a["reward"] == pytest.approx(a["r_vr"] + 0.2 * a["r_sa"])
        gain = 1 - a["ppl_query"] / a["ppl_alone"]
        assert a["r_sa"] == pytest.approx(max(-1, min(1, gain)), abs=1e-9)
        assert a["r_vr"] == (a["status"] == "correct") and a["question"] and a["tokens"]
    for first in range(0, 32, 4):
        group = answers[first:first + 4]
        assert len({a["question"] for a in group}) == 1
        mean = sum(a["reward"] for a in group) / 4
        assert all(a["advantage"] == pytest.approx(a["reward"] - mean, abs=1e-12) for a in group)
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["lr"] == 8e-5 and config["git_commit"]
    assert config["versions"]["torch"] == torch.__version__
    assert TIMES <= lines(folder / "metrics.jsonl")[0].keys()
    before = load_file(ROOT / "data/tiny/model.safetensors")
    after = load_file(folder / "step_000002" / "model.safetensors")
    assert any((before[k].float() != after[k]).any() for k in before)  # it did train
    assert "| base |" in capsys.readouterr().out
    assert [e["step"] for e in lines(folder / "evals.jsonl")] == [0, 2]


def test_gradients_do_not_depend_on_micro_batches(runs, monkeypatch):
    """In micro-batches of 1, of 2 or so, and of all 8 answers; in float64, where rounding cannot
    hide a wrong denominator."""
    seen, load = recorded_gradients(monkeypatch), train_sa_grpo.GPT.from_pretrained
    monkeypatch.setattr(train_sa_grpo.GPT, "from_pretrained",
                        lambda *args, **kwargs: load(*args, **kwargs).double())
    for budget in (1, 200, 10_000):
        train("--name", f"micro{budget}", "--steps", 1, "--micro-tokens", budget)
    one, two, eight = seen[0:2], seen[2:4], seen[4:6]
    assert len(seen) == 6 and all(g.norm() > 0 for g in one)
    for first, other in zip(one * 2, two + eight):
        assert (first - other).norm() / first.norm() < 1e-9


def test_the_gradient_is_that_of_the_objective_written_out(runs, monkeypatch):
    """One optimizer step against autograd in float64 on the plain objective: no clipping (the
    policy is the one that sampled), all logits at once, an answer at a time, from what
    completions.jsonl says. The start is made another model, so that its KL has a gradient."""
    seen = recorded_gradients(monkeypatch)
    load, loaded = train_sa_grpo.GPT.from_pretrained, []

    def load_double(*args, **kwargs):
        model = load(*args, **kwargs).double()
        if loaded:
            with torch.no_grad():
                model.blocks[0].down.weight.mul_(1.1)
        loaded.append(model)
        return model
    monkeypatch.setattr(train_sa_grpo.GPT, "from_pretrained", load_double)
    train("--name", "plain", "--steps", 1, "--minibatch", 4, "--kl-coef", 0.5)
    policy, start = loaded
    policy.zero_grad()
    total = 0.0
    for row in lines(runs / "plain" / "completions.jsonl"):
        prompt = encode_prompt(Tokenizer.from_pretrained(ROOT / "data/tiny"), row["question"])
        tokens = torch.tensor([prompt + row["tokens"]])
        answer = torch.tensor(row["tokens"])[:, None]
        logprobs = []
        for model in (policy, start):
            logits = (model(tokens) @ model.unembedding.T)[0, len(prompt) - 1:-1]
            logprobs.append(logits.log_softmax(-1).gather(1, answer)[:, 0])
        logp, frozen = logprobs[0], logprobs[1].detach()
        kl = ((frozen - logp).exp() - (frozen - logp) - 1).clamp(max=10)
        loss = -row["advantage"] * (logp - logp.detach()).exp() + 0.5 * kl
        total = total + loss.sum() / 48 / 16  # max_new_tokens, answers
    total.backward()
    want = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert want.norm() < 1  # so that clipping at norm 1 changed nothing
    assert (seen[0] - want).norm() / want.norm() < 1e-6


def test_settings_that_change_the_run_do(runs):
    train("--name", "plain", "--steps", 2)
    for flag, value in (("--epochs", 2), ("--kl-coef", 0), ("--temperature", 0.7),
                        ("--dtype", "bfloat16")):
        train("--name", flag[2:], "--steps", 2, flag, value)
        assert metrics(runs / "plain")[1] != metrics(runs / flag[2:])[1], flag
        assert all(m["grad_norm"] > 0 for m in metrics(runs / flag[2:]))


@pytest.mark.parametrize("script", [train_sa_grpo, train_sa_ppo])
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_at_any_temperature_the_first_ratio_is_1(runs, script, temperature):
    """Sampler, scorer and update take the same distribution, in both scripts."""
    flags = [*SMALL, "--minibatch", 4, "--steps", 1, "--temperature", temperature, "--name", "t"]
    script.main(list(map(str, flags)))
    row, = metrics(runs / "t")
    assert row["mismatch_max"] < 1e-4
    assert row["ratio_max"] == pytest.approx(1, abs=1e-4) and row["clip_fraction"] == 0


def test_a_run_that_would_have_diverged_goes_on(runs):
    """A step of 1 in every weight: the log-ratio to the start is far above 88 afterwards."""
    train("--name", "far", "--steps", 1, "--lr", 1, "--epochs", 2)
    row, = metrics(runs / "far")
    assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) and 1 < row["kl"] <= 10


def test_the_frozen_start_may_score(runs, model):
    """R_SA is the start's in every step, without a KL too; what is logged is the policy's."""
    train("--name", "f", "--steps", 2, "--score-with", "frozen", "--lr", 0.01, "--kl-coef", 0)
    tokenizer = Tokenizer.from_pretrained(ROOT / "data/tiny")
    no_question = encode_prompt(tokenizer, "")
    moved = []
    for a in lines(runs / "f" / "completions.jsonl"):
        contexts = [encode_prompt(tokenizer, a["question"]), no_question]
        given, without = answer_logprobs(model, contexts, [a["tokens"]] * 2)
        assert a["r_sa"] == pytest.approx(self_aligned_reward([given], [without]).item(), abs=1e-4)
        assert a["reward"] == pytest.approx(a["r_vr"] + 0.2 * a["r_sa"])
        moved.append(abs(a["r_sa"] - max(-1, 1 - a["ppl_query"] / a["ppl_alone"])))
    assert max(moved[:16]) < 1e-6 and max(moved[16:]) > 1e-3


def test_the_verifier_is_the_one_asked_for(runs, monkeypatch):
    seen, judge = set(), settings.judge

    def spy(text, reference, verifier):
        seen.add(verifier)
        return judge(text, reference, verifier)
    monkeypatch.setattr(settings, "judge", spy)
    train("--name", "rule", "--steps", 1, "--verifier", "last-number", "--eval-every", 0)
    assert seen == {"last-number"}


def test_a_verifier_of_ones_own(runs, tmp_path, capsys):
    """Its reward counts; its exceptions are errors, the first with its traceback, never zeros."""
    task = tmp_path / "my_task.py"
    task.write_text("def judge(response, reference):\n    if reference == '9':\n        "
                    "raise KeyError('mine')\n    return len(response) % 2 / 4\n")
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"{n - 1} + 1?", "answer": n} for n in range(6, 10)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train("--name", "own", "--steps", 2, "--verifier", task, "--data", data, "--eval-every", 0,
          "--prompts-per-step", 4)
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("KeyError: 'mine'") == 1
    for answer in lines(runs / "own" / "completions.jsonl"):
        failed = answer["reference"] == "9"
        assert answer["status"] == "error" if failed else answer["status"] in ("correct", "wrong")
        assert answer["r_vr"] == (0 if failed else len(answer["text"]) % 2 / 4)
    assert lines(runs / "own" / "metrics.jsonl")[0]["share_error"] == 0.25
    for content in ("x = 1", "import nothing_of_the_kind", "def judge(:"):
        task.write_text(content)
        with pytest.raises(ValueError, match="gives no judge"):
            settings.judge_of(str(task))


def test_alpha_zero_is_plain_grpo_bit_for_bit(runs):
    train("--name", "zero", "--steps", 2, "--alpha", 0)
    train("--name", "vr", "--steps", 2, "--reward", "vr")
    assert_same_run(runs / "zero", runs / "vr", "step_000002")


def test_rivals_train_from_the_command_line(runs):
    """Answers were paid what sar.total_reward says; o1 is the one that needs every argument."""
    train("--name", "o1", "--steps", 1, "--reward", "o1", "--alpha", 0.3)
    answers = lines(runs / "o1" / "completions.jsonl")
    for first in range(0, 16, 4):
        group = answers[first:first + 4]
        mean = sum(len(a["tokens"]) for a in group) / 4
        for a in group:
            shorter = max(-1, min(1, mean / len(a["tokens"]) - 1))
            assert a["reward"] == pytest.approx(a["r_vr"] + 0.3 * shorter)
    for name in ("sar-only", "er", "cde", "kimi", "alp", "truncation"):
        train("--name", name, "--steps", 1, "--reward", name)
        answers = lines(runs / name / "completions.jsonl")
        table = [[a[key] for key in ("reward", "r_vr", "r_sa", "ppl_query")] for a in answers]
        r, vr, sa, ppl = torch.tensor(table, dtype=torch.float64).T
        lengths = torch.tensor([len(a["tokens"]) for a in answers])
        want = total_reward(name, vr, sa, list(-ppl.log()[:, None]), lengths, longest=48,
                            alpha=REWARDS[name], samples=4)  # its own weight
        assert r.tolist() == pytest.approx(want.tolist()), name


def test_gfpo_trains_the_shortest_and_curiosity_decays(runs):
    train("--name", "k", "--steps", 1, "--keep", 2)
    answers = lines(runs / "k" / "completions.jsonl")
    for first in range(0, 16, 4):
        group = sorted(answers[first:first + 4], key=lambda a: len(a["tokens"]))
        mean = (group[0]["reward"] + group[1]["reward"]) / 2
        want = [group[0]["reward"] - mean, group[1]["reward"] - mean, 0, 0]
        assert [a["advantage"] for a in group] == pytest.approx(want)
    train("--name", "c", "--steps", 3, "--reward", "cde")
    for a in lines(runs / "c" / "completions.jsonl"):
        weight = [0.2, 0.1, 0][a["step"] - 1]
        assert a["reward"] == pytest.approx(a["r_vr"] + weight * math.log(a["ppl_query"]))


@slow
def test_an_alpha_schedule_is_resumed_where_it_was(runs, monkeypatch):
    flags = ["--alpha", 0, "--alpha-end", 0.6]
    train("--name", "whole", "--steps", 4, *flags)
    for a in lines(runs / "whole" / "completions.jsonl"):
        assert a["reward"] == pytest.approx(a["r_vr"] + 0.2 * (a["step"] - 1) * a["r_sa"])
    with monkeypatch.context() as patch:
        real, calls = parallel.clip_gradients, []

        def broken_in_step_4(*args):
            calls.append(args)
            if len(calls) == 7:
                raise RuntimeError("a power cut")
            return real(*args)
        patch.setattr(parallel, "clip_gradients", broken_in_step_4)
        with pytest.raises(RuntimeError, match="a power cut"):
            train("--name", "broken", "--steps", 4, *flags)
    train_sa_grpo.main(["--name", "broken", "--resume"])
    assert_same_run(runs / "broken", runs / "whole")
    with pytest.raises(ValueError, match="--steps was 4, now 6"):  # that would be another slope
        train_sa_grpo.main(["--name", "whole", "--resume", "--steps", "6"])
    with pytest.raises(ValueError, match="--alpha-end was 0.6, now 0.5"):
        train_sa_grpo.main(["--name", "whole", "--resume", "--alpha-end", "0.5"])


def killed(runs, where, when, *argv):
    """A run that gets kill -9 at the when-th call of a function of the runtime."""
    env = os.environ | {"SA_RUNS": str(runs), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    flags = [*SMALL, "--name", "killed", "--steps", "4", *map(str, argv)]
    dead = subprocess.run([sys.executable, "-c", KILL, where, str(when), *flags], cwd=ROOT, env=env,
                          capture_output=True, text=True)
    assert dead.returncode == -signal.SIGKILL, dead.stderr


def test_killed_and_resumed_equals_undisturbed(runs):
    """kill -9 inside the write of a checkpoint; the run above breaks off within a step."""
    killed(runs, "save_file", 2)
    assert (runs / "killed" / "step_000002").exists()
    assert not (runs / "killed" / "step_000004").exists()
    assert (runs / "killed" / "step_000004.tmp").exists()
    train_sa_grpo.main(["--name", "killed", "--resume"])
    train("--name", "undisturbed", "--steps", 4)
    assert_same_run(runs / "killed", runs / "undisturbed")
    assert not list((runs / "killed").glob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=slow)])
def test_a_signal_finishes_the_step_and_saves(runs, number):
    command = [sys.executable, "train_sa_grpo.py", *SMALL, "--name", "t", "--steps", "1000"]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE,
                               env=os.environ | {"SA_RUNS": str(runs)})
    log = runs / "t" / "metrics.jsonl"
    deadline = time.time() + 60
    while time.time() < deadline and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    done = len(lines(log))
    assert (runs / "t" / f"step_{done:06d}" / "optimizer.safetensors").exists()
    assert "python train_sa_grpo.py --name t --resume" in errors and "Traceback" not in errors


def test_resume_refuses_to_change_the_run(runs):
    train("--name", "r", "--steps", 2)
    with pytest.raises(ValueError, match="--lr was 8e-05, now 0.1"):
        train_sa_grpo.main(["--name", "r", "--resume", "--lr", "0.1"])
    with pytest.raises(ValueError, match="already holds a run"):
        train("--name", "r")
    with pytest.raises(ValueError, match="a run of train_sa_grpo.py"):
        train_sa_ppo.main(["--name", "r", "--resume"])
    train_sa_grpo.main(["--name", "r", "--resume", "--steps", "3"])  # more steps are no change
    assert [m["step"] for m in metrics(runs / "r")] == [1, 2, 3]
    config = json.loads((runs / "r" / "config.json").read_text())
    assert [r["step"] for r in config["resumes"]] == [2]


def test_resume_before_the_first_checkpoint_starts_over(runs, capsys):
    train("--name", "early", "--steps", 2)
    (runs / "early" / "step_000002" / "optimizer.safetensors").rename(runs / "kept")
    with pytest.raises(ValueError, match="none that can be resumed"):  # its logs are not cut
        train_sa_grpo.main(["--name", "early", "--resume"])
    assert len(metrics(runs / "early")) == 2
    shutil.rmtree(runs / "early" / "step_000002")
    train_sa_grpo.main(["--name", "early", "--resume"])
    assert [m["step"] for m in metrics(runs / "early")] == [1, 2]
    assert "no checkpoint yet" in capsys.readouterr().err


# ---- bad input: one sentence, exit status 2 ----


def fails(capsys, *argv):
    with pytest.raises(SystemExit) as stop, user_errors():
        train_sa_grpo.main([*SMALL, *map(str, argv)])
    message = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and message[-1].startswith("error: "), message
    return message[-1]


def test_impossible_settings(runs, capsys):
    assert "at least 2" in fails(capsys, "--samples", 1)
    assert "at least 2" in fails(capsys, "--keep", 1)
    assert "no more than it has" in fails(capsys, "--keep", 5)
    assert "--score-with: invalid choice" in fails(capsys, "--score-with", "start")
    assert "no multiple of --minibatch 8" in fails(capsys, "--minibatch", 8)
    assert "no multiple" in fails(capsys, "--minibatch", 3)
    assert "--lr: must be positive" in fails(capsys, "--lr", 0)
    assert "--slots: must be positive" in fails(capsys, "--slots", 0)
    assert "--alpha: must be a number" in fails(capsys, "--alpha", "nan")
    assert "--alpha-end: must be a number" in fails(capsys, "--alpha-end", "inf")
    assert "--reward er compares" in fails(capsys, "--samples", 1, "--reward", "er")
    assert "--device nonsense is not here" in fails(capsys, "--device", "nonsense")
    assert "no room for --max-new-tokens 1024" in fails(capsys, "--max-new-tokens", 1024)
    assert "--resume needs --name" in fails(capsys, "--resume")
    assert "no such run" in fails(capsys, "--resume", "--name", "nowhere")
    assert not list(runs.glob("*/metrics.jsonl"))  # all of them before anything was written


def test_negative_alpha_is_allowed_and_said(runs, capsys):
    train("--steps", 1, "--alpha", -0.1, "--name", "negative")
    assert "--alpha -0.1 is negative" in capsys.readouterr().err


def test_bad_data(runs, capsys, tmp_path):
    data = tmp_path / "data.jsonl"

    def trouble(text, *argv):
        data.write_text(text)
        return fails(capsys, "--data", data, *argv)
    good = [f'{{"question": "Tom has {k} cups. How many?", "answer": "{k}"}}\n' for k in range(4)]
    message = trouble("".join(good) + "{broken\n")
    assert f"{data}, line 5" in message
    message = trouble('{"prompt": "x", "completion": "y"}\n')
    assert "question" in message and "problem" in message and "answer" in message
    assert str(data) in trouble("")
    message = trouble("".join(good), "--max-prompt-tokens", 2)
    assert "all 4 prompts are longer than --max-prompt-tokens 2" in message
    assert "more than the 3 problems" in trouble("".join(good[:3]))
    assert "missing.jsonl" in fails(capsys, "--data", tmp_path / "missing.jsonl")


def test_holding_out_after_the_fact_is_refused(runs, capsys, tmp_path):
    data = tmp_path / "data.jsonl"
    question = "Tom has 3 cups. Tom finds {} more. How many cups does Tom have now?"
    rows = [{"question": question.format(k), "answer": 3 + k} for k in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train("--data", data, "--steps", 1, "--name", "late")
    with pytest.raises(ValueError, match="--eval-every was 0, now 1"):
        train_sa_grpo.main(["--name", "late", "--resume", "--eval-every", "1"])
    train("--data", data, "--steps", 1, "--name", "held", "--eval-every", 1)
    assert [e["problems"] for e in lines(runs / "held" / "evals.jsonl")] == [4, 4]


def test_long_prompts_are_skipped_and_counted(runs, capsys, tmp_path):
    data = tmp_path / "data.jsonl"
    for k in (1, 2, 3, 4, 90):
        row = {"question": "Tom has 3 cups. " * k + "How many?", "answer": "3"}
        with open(data, "a") as file:
            file.write(json.dumps(row) + "\n")
    train("--data", data, "--steps", 1, "--name", "long")
    assert "1 of 5 prompts are longer than 128 tokens" in capsys.readouterr().err
    assert all(len(a["question"]) < 200 for a in lines(runs / "long" / "completions.jsonl"))


def copy_of_tiny(folder):
    folder.mkdir()
    for file in (ROOT / "data/tiny").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_bad_models(runs, capsys, tmp_path):
    assert "no-such-model" in fails(capsys, "--model", "no-such-model")
    folder = copy_of_tiny(tmp_path / "m")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    assert "model.safetensors" in fails(capsys, "--model", folder, "--data", "tiny")
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in fails(capsys, "--model", folder, "--data", "tiny")
    (folder / "model.safetensors").write_bytes(weights)
    for file, change, word in (("config.json", {"model_type": "mamba"}, "mamba"),
                               ("tokenizer.json", {"model": {"type": "Unigram"}}, "Unigram")):
        good = (folder / file).read_text()
        (folder / file).write_text(json.dumps(json.loads(good) | change))
        assert word in fails(capsys, "--model", folder, "--data", "tiny")
        (folder / file).write_text(good)


def test_unwritable_and_full_disks(runs, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(runs_module, "RUNS", tmp_path / "file")
    assert "Not a directory: " in fails(capsys)
    monkeypatch.setattr(runs_module, "RUNS", tmp_path / "full")
    usage = SimpleNamespace(free=10)
    monkeypatch.setattr(runs_module.shutil, "disk_usage", lambda path: usage)
    assert "a checkpoint takes" in fails(capsys)


@slow
def test_masters_on_the_host_are_masters_on_the_device(runs):
    """--offload and --recompute, stopped and resumed, bit for bit; what is saved is not rounded."""
    train("--name", "device", "--dtype", "bfloat16", "--steps", 4)
    flags = ["--dtype", "bfloat16", "--offload", "--recompute"]
    train("--name", "host", *flags, "--steps", 2)
    train_sa_grpo.main(["--name", "host", "--resume", "--steps", "3"])
    train_sa_grpo.main(["--name", "host", "--resume", "--steps", "4", "--no-offload"])
    assert_same_run(runs / "device", runs / "host")
    saved = load_file(runs / "host" / "step_000004" / "model.safetensors")
    assert all(p.dtype == torch.float32 for p in saved.values())
    assert any((p != p.bfloat16().float()).any() for p in saved.values())


def test_the_bfloat16_copy_is_within_rounding_of_autocast(model, prompts, rng):
    """Gradients of a bfloat16 copy, summed in float32, against float32 weights under autocast; and
    where AdamW leaves both after a step, the copy by way of its masters."""
    args = SimpleNamespace(dtype="bfloat16", device="cpu", recompute=None, temperature=1.0)
    policy = parallel.working_copy(model, args)
    matrices = {p.dtype for p in policy.parameters() if p.dim() > 1}
    vectors = {p.dtype for p in policy.parameters() if p.dim() == 1}
    assert matrices == {torch.bfloat16} and vectors == {torch.float32}
    micro = [SimpleNamespace(prompt=p, tokens=rng.choices(range(64), k=20)) for p in prompts]
    flat, logprobs = [], []
    for trained in (model, policy):
        for _ in range(2):  # micro-batches: the second is added
            logprob, entropy = parallel.score_with_gradient(trained, micro, args)
            (logprob + entropy).sum().backward()
        assert {p.grad.dtype for p in trained.parameters()} == {torch.float32}
        flat.append(torch.cat([p.grad.flatten() for p in trained.parameters()]))
        logprobs.append(logprob.detach())
    assert torch.equal(*logprobs)  # the same products
    head = policy.unembedding.grad  # of the fused log-prob: never rounded
    assert (head != head.bfloat16().float()).double().mean() > 0.5
    apart = ((flat[0] - flat[1]).norm() / flat[0].norm()).item()
    print(f"gradients apart {apart:.1e}")
    assert apart < 2**-8
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    before = [p.detach().clone() for p in model.parameters()]
    model.zero_grad()
    parallel.optimizer_step(optimizer, model, policy)
    assert all(p.grad is None for p in [*model.parameters(), *policy.parameters()])
    for old, master, p in zip(before, model.parameters(), policy.parameters()):
        assert (old != master).any() and torch.equal(master.to(p.dtype), p)


def test_out_of_memory_is_one_sentence(capsys):
    def sample():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    def backward():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
    for phase, function in (("sampling", sample), ("the update", backward)):
        with pytest.raises(SystemExit) as stop, user_errors():
            function()
        said = capsys.readouterr().err
        assert stop.value.code == 2 and len(said.splitlines()) == 1
        assert f"ended in {phase}, after a peak of 0.0 GB: turn on --recompute first" in said


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_stops_before_the_update(runs, capsys, monkeypatch, what):
    if what == "loss":
        monkeypatch.setattr(train_sa_grpo, "kl_k3", lambda logprob, start: logprob * math.nan)
    else:
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: torch.tensor(math.inf))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **k: pytest.fail("updated"))
    message = fails(capsys, "--name", "nan", "--steps", 2)
    assert f"the {what} of step 1 is not finite" in message
    batch, = (runs / "nan").glob("bad_batch_step_*.json")
    assert {"question", "tokens", "advantage"} <= json.loads(batch.read_text())[0].keys()


def test_a_large_model_on_a_cpu_is_announced_with_an_estimate(capsys):
    args = SimpleNamespace(device="cpu", prompts_per_step=128, samples=6, max_new_tokens=4096,
                           kl_coef=0.001)
    runs_module.warn_if_large(args, 1_540_000_000, models=1)
    said = capsys.readouterr().err
    assert "1.54B parameters on a CPU" in said
    assert "31 GB of memory" in said and "3,145,728 tokens" in said
