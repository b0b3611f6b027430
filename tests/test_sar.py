"""sar.py: fused log-probs against the plain computation in float64, scoring, perplexity, the reward, its rivals, the token view."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sar
from sar import (
    REWARDS,
    alpha_at,
    answer_hidden,
    answer_logprobs,
    fused_logprob,
    micro_batches,
    perplexity,
    self_aligned_reward,
    token_values,
    total_reward,
)


def naive(hidden, unembedding, targets, temperature):
    """float64, with all the logits."""
    logp = (hidden.double() @ unembedding.double().T / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.fixture(params=[True, False], ids=["onednn", "plain matmul"])
def matmuls(request, monkeypatch):
    """With oneDNN's products where this build of torch has them, and without."""
    monkeypatch.setattr(sar, "ONEDNN", sar.ONEDNN and request.param)


# largest: of the scaled logits; at 80 one token has nearly all the mass of most rows
@pytest.mark.parametrize("largest, temperature", [(5.0, 0.6), (80.0, 1.0), (80.0, 2.0)])
@pytest.mark.parametrize(
    "N, D, V, chunk",
    [
        (37, 16, 1000, None),
        (600, 8, 5000, None),
        (37, 16, 1000, (5, 64)),
        (3, 4, 7, (2, 3)),
        (9, 24, 262_144, None),
        (100, 600, 3000, None),
        (200, 1536, 2048, None),
    ],
)
def test_fused_logprob_equals_naive(rng, matmuls, temperature, largest, N, D, V, chunk):
    hidden, unembedding = torch.randn(N, D), torch.randn(V, D)
    hidden *= largest * temperature / (hidden @ unembedding.T).abs().max()
    targets = torch.randint(V, (N,))
    targets[::3] = (hidden @ unembedding.T).argmax(-1)[::3]
    # half precision: against the float64 result of the same rounded inputs
    for h, W in (
        (hidden, unembedding),
        (hidden.bfloat16(), unembedding.bfloat16()),
        (hidden.half(), unembedding.half()),
    ):
        logprob, entropy = fused_logprob(h, W, targets, temperature=temperature, chunk=chunk)
        want_logprob, want_entropy = naive(h, W, targets, temperature)
        assert logprob.dtype == entropy.dtype == torch.float32
        assert (logprob - want_logprob).abs().max() < 2e-5
        assert (entropy - want_entropy).abs().max() < 1e-4


def gradients(f, hidden, unembedding, targets, outputs):
    """Of a random mix of both outputs, or of one: outputs are the weights of log-prob and entropy."""
    hidden, unembedding = hidden.clone().requires_grad_(), unembedding.clone().requires_grad_()
    logprob, entropy = f(hidden, unembedding, targets)
    a, b = torch.linspace(-1, 1, len(targets)), torch.linspace(2, -1, len(targets))
    return torch.autograd.grad(
        outputs[0] * (a * logprob).sum() + outputs[1] * (b * entropy).sum(), (hidden, unembedding)
    )


@pytest.mark.parametrize("outputs", [(1, 0), (0, 1), (1, 1)])
def test_fused_logprob_gradients_equal_naive(rng, matmuls, outputs):
    targets = torch.randint(101, (23,))
    for D, dtype, tolerance in (
        (8, torch.float64, 1e-11),
        (8, torch.float32, 1e-5),
        (300, torch.float32, 1e-5),
        (64, torch.bfloat16, 1e-2),
    ):
        hidden, unembedding = (
            (torch.randn(23, D) * 5 / D**0.5).to(dtype),
            torch.randn(101, D).to(dtype),
        )
        for chunk in (None, (5, 16)):
            ours = gradients(
                lambda *x: fused_logprob(*x, temperature=0.7, chunk=chunk),
                hidden,
                unembedding,
                targets,
                outputs,
            )
            theirs = gradients(
                lambda *x: naive(*x, 0.7), hidden.double(), unembedding.double(), targets, outputs
            )
            for mine, want in zip(ours, theirs):
                assert mine.dtype == dtype and mine.shape == want.shape
                assert (mine - want).abs().max() < tolerance * want.abs().max()


def test_fused_logprob_gradcheck(rng):
    hidden, unembedding = (
        torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (4, 19)
    )
    targets = torch.randint(19, (4,))
    assert torch.autograd.gradcheck(
        lambda h, w: fused_logprob(h, w, targets, temperature=1.3, chunk=(3, 8)),
        (hidden, unembedding),
    )
    for alone in (0, 1):  # only one of the two is differentiated
        inputs = [hidden.detach(), unembedding.detach()]
        inputs[alone].requires_grad_()
        assert torch.autograd.gradcheck(
            lambda h, w: fused_logprob(h, w, targets, chunk=(3, 8)), inputs
        )
        inputs[alone].requires_grad_(False)
    with pytest.raises(
        RuntimeError, match="once_differentiable"
    ):  # rather than a wrong second derivative
        (gradient,) = torch.autograd.grad(
            fused_logprob(hidden, unembedding, targets)[0].square().sum(), hidden, create_graph=True
        )
        gradient.sum().backward()


def test_fused_logprob_of_inputs_with_gaps_in_memory(rng, matmuls):
    hidden, unembedding = torch.randn(100, 2, 40)[:, 1, 3:36], torch.randn(50, 300).T[::2, 10:43]
    targets = torch.randint(150, (100,))
    logprob, entropy = fused_logprob(hidden, unembedding, targets)
    for ours, want in zip((logprob, entropy), naive(hidden, unembedding, targets, 1.0)):
        assert (ours - want).abs().max() < 2e-5


def test_autocast_leaves_fused_logprob_alone(rng, matmuls):
    hidden, unembedding, targets = (
        torch.randn(20, 30, requires_grad=True),
        torch.randn(50, 30, requires_grad=True),
        torch.randint(50, (20,)),
    )
    plain = gradients(fused_logprob, hidden, unembedding, targets, (1, 1))
    with torch.autocast("cpu", torch.bfloat16):  # the backward too runs within
        under = gradients(fused_logprob, hidden, unembedding, targets, (1, 1))
    assert all(torch.equal(a, b) for a, b in zip(plain, under))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned, in elements."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # a view of what was there already takes no memory
        if isinstance(result, torch.Tensor) and not any(
            isinstance(x, torch.Tensor) and x.data_ptr() == result.data_ptr() for x in args
        ):
            self.elements = max(self.elements, result.numel())
        return result


def test_fused_logprob_holds_tiles_only():
    N, D, V = 2000, 4, 2000
    hidden, unembedding = (
        torch.randn(N, D, requires_grad=True),
        torch.randn(V, D, requires_grad=True),
    )
    with Largest() as largest:
        logprob, entropy = fused_logprob(hidden, unembedding, torch.zeros(N, dtype=torch.long))
        (logprob + entropy).sum().backward()
    assert 2**19 <= largest.elements < 1.2 * 2**19 < N * V / 6


def test_fused_logprob_edges():
    hidden, unembedding = (
        torch.ones(2, 1),
        torch.tensor([[1e30], [-1e30], [0.0]]),
    )  # -inf-like logits
    hidden.requires_grad_()
    logprob, entropy = fused_logprob(hidden, unembedding, torch.tensor([0, 0]))
    assert logprob.tolist() == [0, 0] and entropy.tolist() == [0, 0]
    (logprob.sum() + entropy.sum()).backward()
    assert torch.isfinite(hidden.grad).all()
    for bad in (-1, 3):
        with pytest.raises(ValueError, match="0 ... 2"):
            fused_logprob(hidden, unembedding, torch.tensor([0, bad]))
    assert fused_logprob(torch.empty(0, 1), unembedding, torch.empty(0, dtype=torch.long))[
        0
    ].shape == (0,)


def test_micro_batches_hold_every_index_once_within_the_budget(rng):
    lengths = [rng.randrange(1, 60) for _ in range(100)]
    cuts = micro_batches(lengths, 64)
    assert sorted(i for cut in cuts for i in cut) == list(range(100))
    assert all(len(cut) * max(lengths[i] for i in cut) <= 64 for cut in cuts)
    assert micro_batches([100, 1], 64) == [[0], [1]]  # too long for the budget: alone, not lost


def plain_logprobs(model, context, answer):
    """One sequence at a time, no padding, float64."""
    logits = model.double()(torch.tensor([context + answer])) @ model.unembedding.T
    return (
        logits[0, len(context) - 1 : -1]
        .log_softmax(-1)
        .gather(1, torch.tensor(answer)[:, None])[:, 0]
    )


@pytest.mark.parametrize("budget", [1, 100, 10_000])
def test_answer_logprobs_of_mixed_lengths(model, prompts, rng, budget):
    answers = [[rng.randrange(600) for _ in range(rng.randrange(1, 40))] for _ in prompts]
    answers[3] = []  # an answer without tokens has no log-probs, and is no reason to stop
    scored = answer_logprobs(model, prompts, answers, micro_tokens=budget)
    for context, answer, ours in zip(prompts, answers, scored):
        assert ours.shape == (len(answer),)
        if answer:
            assert (ours - plain_logprobs(model.float(), context, answer)).abs().max() < 1e-4
            model.float()


@torch.no_grad()
def test_scores_beside_the_rope_switch_do_not_depend_on_neighbours(rng):
    """Phi-3.5 takes its long factors where the padded width passes rope_switch: rows on both sides of it, whatever the budget."""
    from test_model import random_model

    model = random_model("phi-3.5, long", torch.float64)
    switch, ids = model.config.rope_switch, range(model.config.vocab_size)
    lengths = [
        switch - 3,
        switch,
        switch + 1,
        switch + 2,
        switch + 9,
        switch // 2,
    ] * 2  # with the last token, which is not read
    contexts = [rng.choices(ids, k=5) for _ in lengths]
    answers = [rng.choices(ids, k=length - 5) for length in lengths]
    alone = [answer_logprobs(model, [c], [a])[0] for c, a in zip(contexts, answers)]
    for budget in (1, 3 * switch, 10_000):
        for ours, want in zip(
            answer_logprobs(model, contexts, answers, micro_tokens=budget), alone
        ):
            assert (ours - want).abs().max() < 1e-9


def test_answer_positions_follow_from_lengths_even_where_pad_and_stop_ids_are_equal(model, prompts):
    """Answers made of token 0, which also fills the padding: each of them is scored, and nothing else."""
    answers = [[0] * (1 + i) for i in range(len(prompts))]
    hidden, targets = answer_hidden(model, prompts, answers)
    assert len(hidden) == len(targets) == sum(map(len, answers))
    for context, answer, ours in zip(prompts, answers, answer_logprobs(model, prompts, answers)):
        assert (ours - plain_logprobs(model.float(), context, answer)).abs().max() < 1e-4
        model.float()


def test_under_autocast_a_bfloat16_start_equals_the_float32_policy(model, prompts):
    """The frozen start is kept in bfloat16; it must score like the float32 weights it is a rounding of, or KL never is zero."""
    from conftest import TINY

    from model import GPT

    answers = [[5, 6, 7], [600], *([[9, 10]] * 6)]
    with torch.autocast("cpu", torch.bfloat16):
        policy = answer_logprobs(model, prompts, answers)
        start = answer_logprobs(GPT.from_pretrained(TINY, dtype=torch.bfloat16), prompts, answers)
    assert all(torch.equal(a, b) for a, b in zip(policy, start))


def test_perplexity_and_reward_by_hand():
    # ppl(a|q) = 2 and ppl(a) = 8 over four tokens: R_SA = (8 - 2) / 8
    given, alone = (
        torch.tensor([0.5, 0.5, 0.25, 1.0]).log(),
        torch.tensor([1 / 8, 1 / 16, 1 / 8, 1 / 4]).log(),
    )
    assert perplexity(given).item() == pytest.approx(2)
    assert perplexity(alone).item() == pytest.approx(8)
    assert self_aligned_reward([given], [alone]).tolist() == pytest.approx([0.75])
    # the question makes the answer less likely: (2 - 8) / 2 = -3, clipped
    assert self_aligned_reward([alone, given[:0]], [given, given[:0]]).tolist() == [
        -1,
        0,
    ]  # and no tokens: 0
    assert self_aligned_reward([given], [given]).tolist() == [0]
    with pytest.raises(ValueError, match="4 log-probs with its question and 3 without"):
        self_aligned_reward([given], [alone[:3]])
    with pytest.raises(ValueError):
        perplexity(given[:0])


def test_reward_equals_float64_naive(rng):
    given = [-torch.rand(rng.randrange(1, 300)) * 12 for _ in range(50)]
    alone = [-torch.rand(len(g)) * 14 for g in given]
    for ours, g, a in zip(self_aligned_reward(given, alone).tolist(), given, alone):
        q, p = (math.exp(-math.fsum(x.double().tolist()) / len(x)) for x in (g, a))
        assert ours == pytest.approx(max(-1.0, min(1.0, (p - q) / p)), abs=1e-12)


def test_no_gradient_flows_through_the_reward(model, prompts):
    lp = answer_logprobs(model, prompts[:2], [[5, 6], [7]])
    assert not self_aligned_reward(lp, lp).requires_grad and not lp[0].requires_grad
    with_grad = [x.clone().requires_grad_() for x in lp]
    assert not self_aligned_reward(with_grad, with_grad).requires_grad


# ---- the rivals, by hand ----

VR = torch.tensor(
    [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
).double()  # two questions of four answers, three and none of them right
SA = torch.tensor([0.5, -0.5, 0.25, 0.0, 1.0, -1.0, 0.0, 0.125]).double()
LENGTHS = torch.tensor([10, 20, 30, 20, 5, 5, 5, 25])
LOGPROBS = [
    torch.tensor([1.0, 1 / 4]).log(),
    torch.tensor([1 / 8]).log(),
    *[torch.tensor([1 / 2] * 3).log()] * 6,
]  # ppl 2, 8, 2, ...


def reward(name, vr=VR, lengths=LENGTHS, alpha=0.2, n=4):
    sa, logprobs = SA[: len(vr)], LOGPROBS[: len(vr)]
    return total_reward(name, vr, sa, logprobs, lengths, alpha=alpha, n=n).tolist()


def test_rewards_without_a_group_by_hand():
    assert reward("vr") == VR.tolist()
    assert reward("sar") == pytest.approx([1.1, -0.1, 1.05, 1.0, 0.2, -0.2, 0.0, 0.025])
    assert reward("sar-only") == SA.tolist()
    em = [-math.log(2), -math.log(8), *[-math.log(2)] * 6]
    assert reward("em") == pytest.approx(em)
    assert reward("vr+em") == pytest.approx([v + 0.2 * e for v, e in zip(VR.tolist(), em)])
    assert reward("sar", alpha=0) == reward("vr")


def test_o1_by_hand():
    # mean 20: 20/10 - 1 = 1, 0, 20/30 - 1 = -1/3, 0; mean 10: 1, 1, 1, 10/25 - 1 = -0.6; right or wrong alike
    assert reward("o1") == pytest.approx([1.2, 0.0, 1 - 0.2 / 3, 1.0, 0.2, 0.2, 0.2, -0.12])
    # mean 26: 26/2 - 1 = 12 is held at 1, 26/50 - 1 = -0.48
    assert reward("o1", vr=VR[:2], lengths=torch.tensor([2, 50]), alpha=1.0, n=2) == pytest.approx(
        [2.0, -0.48]
    )
    assert reward("o1", lengths=torch.full((8,), 7)) == VR.tolist()  # ties


def test_er_by_hand():
    # the right ones of the first question are 10, 30, 20 long: mean 20, variance 200 / 3, z = -+10 / sqrt(200 / 3)
    s = 1 / (1 + math.exp(-10 / math.sqrt(200 / 3)))
    assert reward("er") == pytest.approx(
        [1 + 0.2 * (2 * s - 1), 0.0, 1 - 0.2 * (2 * s - 1), 1.0, 0.0, 0.0, 0.0, 0.0]
    )
    assert reward("er", lengths=torch.full((8,), 7)) == VR.tolist()  # ties
    assert (
        reward("er", lengths=torch.tensor([9, 1, 9, 9, 1, 2, 3, 4])) == VR.tolist()
    )  # ties among the right, others beside them
    alone = torch.tensor([0.0, 1.0, 0.0, 0.0]).double()
    assert (
        reward("er", vr=alone, lengths=LENGTHS[:4]) == alone.tolist()
    )  # one right answer has nothing to be compared with
    assert reward("er", vr=torch.zeros(8).double()) == [0.0] * 8


@pytest.mark.parametrize("name", ["o1", "er"])
def test_group_rewards_equal_a_plain_loop(rng, name):
    P, n, alpha = 6, 5, rng.random()
    vr, lengths = torch.randint(2, (P * n,)).double(), torch.randint(1, 300, (P * n,))
    want = []
    for first in range(0, P * n, n):
        group, right = lengths[first : first + n].tolist(), vr[first : first + n].tolist()
        for length, correct in zip(group, right):
            among = [x for x, c in zip(group, right) if c] if name == "er" else group
            mean = sum(among) / max(1, len(among))
            spread = math.sqrt(sum((x - mean) ** 2 for x in among) / max(1, len(among)))
            if name == "o1":
                want.append(correct + alpha * max(-1, min(1, (mean - length) / length)))
            else:
                want.append(
                    correct and 1 - alpha * math.tanh((length - mean) / spread / 2 if spread else 0)
                )
    got = total_reward(
        name, vr, torch.zeros(P * n), [torch.zeros(1)] * (P * n), lengths, alpha=alpha, n=n
    )
    assert got.tolist() == pytest.approx(want, abs=1e-12)


def test_rewards_that_cannot_be():
    for name in ("o1", "er"):
        with pytest.raises(
            ValueError, match=f"--reward {name} compares .* needs --n 2 or more, got 1"
        ):
            reward(name, n=1)
    with pytest.raises(
        ValueError,
        match="no reward 'best': choose one of " + ", ".join(REWARDS).replace("+", r"\+"),
    ):
        reward("best")
    with pytest.raises(
        ValueError
    ):  # an answer without tokens has no ppl(a|q): no best reward for saying nothing
        total_reward("em", VR[:1], SA[:1], [torch.empty(0)], LENGTHS[:1], alpha=0.2, n=1)


def test_alpha_schedule_by_hand():
    assert [alpha_at(step, 5, 0.1, 0.5) for step in range(5)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5]
    )
    assert [alpha_at(step, 3, 0.4, 0.0) for step in range(3)] == pytest.approx([0.4, 0.2, 0.0])
    assert alpha_at(7, 10, 0.2, None) == 0.2 and alpha_at(0, 1, 0.3, 0.1) == 0.3


# ---- the token view ----


def test_token_values_sum_to_the_reward(rng):
    for _ in range(20):
        given, alone = -torch.rand(rng.randrange(1, 50)) * 5, -torch.rand(1) * 5
        alone = alone.expand(len(given))
        (reward,) = self_aligned_reward([given], [alone]).tolist()
        assert max(-1, 1 - math.exp(-token_values(given, alone).mean().item())) == pytest.approx(
            reward, abs=1e-12
        )


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.values, self.above = [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.values += [float(value) for name, value in attributes if name == "title"]

    def handle_data(self, data):
        if self.tags[-1] == "rt" and re.fullmatch(r"[+-]\d+\.\d", data):
            self.above.append(data)
        else:
            self.text += data


def test_the_view_shows_every_token_and_is_taken_in_by_none(tmp_path, capsys, monkeypatch):
    question = 'Tom has 3 cups. <script>alert("1")</script> & \x1b[2J How many?'
    answer = 'Tom é </span><img src=x onerror="y">\n\x1b[31m\r3 + 4 = 7'
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    sar.main(["--question", question, "--answer", answer, "--html", str(tmp_path / "v.html")])
    shown = capsys.readouterr().out
    table, _, _ = shown.partition("\n\n")
    codes = set(re.findall("\x1b.[0-9;]*.", shown))
    assert "\x1b[0m" in codes and all(
        code == "\x1b[0m" or code.startswith("\x1b[38;2;0;0;0;48;2;") for code in codes
    )
    assert "\r" not in shown and "\\x1b[2J" in shown and "\\x1b" in table
    rows = [
        re.match(r" *([+-][0-9.]+) = *(-[0-9.]+) - *(-[0-9.]+)   ", line)
        for line in table.splitlines()
    ]
    assert all(float(r[1]) == pytest.approx(float(r[2]) - float(r[3]), abs=0.011) for r in rows)
    page = Page((tmp_path / "v.html").read_text())
    assert (
        set(page.tags) == {"meta", "title", "style", "body", "p", "ruby", "rt", "br"}
        and "http" not in (tmp_path / "v.html").read_text()
    )
    assert [float(v) for v in page.above] == pytest.approx(
        [v for v in page.values if abs(v) >= 0.5], abs=0.056
    )  # both are rounded
    assert page.tags.count("ruby") == len(rows) and page.values == [float(r[1]) for r in rows]
    assert question in page.text
    # é is two tokens, the first of which is no text yet
    assert 'Tom ·é </span><img src=x onerror="y">↵\\x1b[31m\\x0d3 + 4 = 7<end>' in page.text
    reward = float(re.search(r"R_SA = (-?[0-9.]+)", page.text)[1])
    assert reward == pytest.approx(max(-1, 1 - math.exp(-sum(page.values) / len(rows))), abs=0.01)


def test_the_view_of_a_rollout(tmp_path, capsys, tokenizer):
    path = tmp_path / "completions.jsonl"
    tokens = [*tokenizer.encode("3 + 4 = 7"), *tokenizer.stop_ids]
    rows = [
        {},
        {"question": "Tom has 3 cups.", "tokens": tokens},
        {"question": "x", "tokens": [9**9]},
        {"question": "x", "tokens": [[1]]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sar.main(["--completions", str(path), "--line", "2"])
    shown = capsys.readouterr().out
    assert (
        "3 + 4 = 7<end>" in shown
        and f"{len(tokens)} tokens" in shown
        and " R_SA was" not in shown
        and "\x1b" not in shown
    )  # not a terminal: no colours
    for argv, words in (
        (["--line", "1"], "needs question and tokens"),
        (["--line", "5"], "has no line 5"),
        (["--line", "0"], "no line 0"),
        (["--line", "3"], "outside the vocabulary"),
        (["--line", "4"], "a list of token ids"),
        (["--question", "x", "--answer", "y"], "give --question and --answer, or"),
        (["--question", "x"], "give --question and --answer, or"),
    ):
        with pytest.raises(ValueError, match=words):
            sar.main(["--completions", str(path), *argv])
    with pytest.raises(ValueError, match="give --question and --answer, or"):
        sar.main(["--question", "x"])
    # beside a run's config.json its model and context are taken, and what it recorded is shown
    (tmp_path / "config.json").write_text(
        json.dumps({"settings": {"model": "tiny", "alone": "bare"}})
    )
    path.write_text(json.dumps(rows[1] | {"r_sa": 0.125, "step": 9}) + "\n")
    sar.main(["--completions", str(path)])
    beside = capsys.readouterr().out
    sar.main(["--completions", str(path), "--alone", "bare", "--model", "tiny"])
    assert (
        beside == capsys.readouterr().out
        and "R_SA was 0.125 in step 9" in beside
        and beside.split("\n\n")[0] not in shown
    )
    (tmp_path / "config.json").write_text(json.dumps({"settings": {"model": "no-such-model"}}))
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        sar.main(["--completions", str(path)])
