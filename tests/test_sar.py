"""sar.py: fused log-probs against the plain computation in float64; scoring; the rewards."""

import math

import pytest
import torch
from conftest import TINY
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from model import GPT
from sar import (
    GROUP_REWARDS,
    REWARDS,
    alpha_at,
    answer_hidden,
    answer_logprobs,
    blocks,
    fused_logprob,
    micro_batches,
    perplexity,
    score_answers,
    self_aligned_reward,
    token_values,
    total_reward,
)

# ---- log-probs without logits ----


def naive(hidden, unembedding, targets, temperature):
    """float64, with all the logits."""
    logp = (hidden.double() @ unembedding.double().T / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.fixture(params=[True, False], ids=["onednn", "plain matmul"])
def matmuls(request, monkeypatch):
    """With oneDNN's products where this build of torch has them, and without."""
    monkeypatch.setattr(kernels, "ONEDNN", kernels.ONEDNN and request.param)


SHAPES = [  # N, D, V, chunk
    (37, 16, 1000, None),
    (600, 8, 5000, None),
    (37, 16, 1000, (5, 64)),
    (3, 4, 7, (2, 3)),
    (9, 24, 262_144, None),
    (100, 600, 3000, None),
    (200, 1536, 2048, None),
]


# largest: of the scaled logits; at 80 one token has nearly all the mass of most rows
@pytest.mark.parametrize("largest, temperature", [(5.0, 0.6), (80.0, 1.0), (80.0, 2.0)])
@pytest.mark.parametrize("N, D, V, chunk", SHAPES)
def test_fused_logprob_equals_naive(rng, matmuls, temperature, largest, N, D, V, chunk):
    hidden, unembedding = torch.randn(N, D), torch.randn(V, D)
    hidden *= largest * temperature / (hidden @ unembedding.T).abs().max()
    targets = torch.randint(V, (N,))
    targets[::3] = (hidden @ unembedding.T).argmax(-1)[::3]
    # half precision: against the float64 result of the same rounded inputs
    for dtype in (torch.float32, torch.bfloat16, torch.half):
        h, W = hidden.to(dtype), unembedding.to(dtype)
        logprob, entropy = fused_logprob(h, W, targets, temperature=temperature, chunk=chunk)
        want_logprob, want_entropy = naive(h, W, targets, temperature)
        assert logprob.dtype == entropy.dtype == torch.float32
        assert (logprob - want_logprob).abs().max() < 2e-5
        assert (entropy - want_entropy).abs().max() < 1e-4


def gradients(f, hidden, unembedding, targets, outputs):
    """Of a random mix of both outputs, or of one: outputs weighs log-prob and entropy."""
    hidden, unembedding = hidden.clone().requires_grad_(), unembedding.clone().requires_grad_()
    logprob, entropy = f(hidden, unembedding, targets)
    loss = outputs[0] * (torch.linspace(-1, 1, len(targets)) * logprob).sum()
    loss = loss + outputs[1] * (torch.linspace(2, -1, len(targets)) * entropy).sum()
    return torch.autograd.grad(loss, (hidden, unembedding))


@pytest.mark.parametrize("outputs", [(1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize(
    "D, dtype, tolerance",
    [
        (8, torch.float64, 1e-11),
        (8, torch.float32, 1e-5),
        (300, torch.float32, 1e-5),
        (64, torch.bfloat16, 1e-2),
    ],
)
def test_fused_logprob_gradients_equal_naive(rng, matmuls, outputs, D, dtype, tolerance):
    targets = torch.randint(101, (23,))
    h, W = (torch.randn(23, D) * 5 / D**0.5).to(dtype), torch.randn(101, D).to(dtype)
    theirs = gradients(lambda *x: naive(*x, 0.7), h.double(), W.double(), targets, outputs)
    for chunk in (None, (5, 16)):

        def fused(*inputs, chunk=chunk):
            return fused_logprob(*inputs, temperature=0.7, chunk=chunk)

        for mine, want in zip(gradients(fused, h, W, targets, outputs), theirs):
            assert mine.dtype == dtype and mine.shape == want.shape
            assert (mine - want).abs().max() < tolerance * want.abs().max()


@pytest.mark.parametrize("unused", [0, 1])
def test_gradients_of_one_output_alone(rng, unused):
    """An output that nothing uses is skipped: as if its gradient were zero."""
    h, W, targets = torch.randn(20, 8), torch.randn(50, 8), torch.randint(50, (20,))
    one = [a.clone().requires_grad_() for a in (h, W)]
    fused_logprob(*one, targets)[1 - unused].sum().backward()
    both = [a.clone().requires_grad_() for a in (h, W)]
    outputs = fused_logprob(*both, targets)
    (outputs[1 - unused].sum() + 0 * outputs[unused].sum()).backward()
    for a, b in zip(one, both):
        assert (a.grad - b.grad).abs().max() < 1e-6


def test_fused_logprob_gradcheck(rng):
    hidden, unembedding = torch.randn(4, 5).double(), torch.randn(11, 5).double()
    targets = torch.randint(11, (4,))

    def fused(h, W):
        return fused_logprob(h, W, targets, temperature=1.3, chunk=(3, 4))

    for wanted in ((True, True), (True, False), (False, True)):
        hidden.requires_grad_(wanted[0])
        unembedding.requires_grad_(wanted[1])
        assert torch.autograd.gradcheck(fused, (hidden, unembedding))
    hidden.requires_grad_()
    squares = fused(hidden, unembedding)[0].square().sum()
    (gradient,) = torch.autograd.grad(squares, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # no wrong second derivative
        gradient.sum().backward()


def test_fused_logprob_of_inputs_with_gaps_in_memory(rng, matmuls):
    hidden, unembedding = torch.randn(100, 2, 40)[:, 1, 3:36], torch.randn(50, 300).T[::2, 10:43]
    targets = torch.randint(150, (100,))
    logprob, entropy = fused_logprob(hidden, unembedding, targets)
    for ours, want in zip((logprob, entropy), naive(hidden, unembedding, targets, 1.0)):
        assert (ours - want).abs().max() < 2e-5
    ours = gradients(fused_logprob, hidden, unembedding, targets, (1, 1))
    dense = hidden.contiguous(), unembedding.contiguous()
    for mine, want in zip(ours, gradients(fused_logprob, *dense, targets, (1, 1))):
        assert (mine - want).abs().max() < 1e-5 * want.abs().max()


def test_autocast_leaves_fused_logprob_alone(rng, matmuls):
    hidden, unembedding = torch.randn(20, 30), torch.randn(50, 30)
    targets = torch.randint(50, (20,))
    plain = gradients(fused_logprob, hidden, unembedding, targets, (1, 1))
    with torch.autocast("cpu", torch.bfloat16):  # the backward too runs within
        under = gradients(fused_logprob, hidden, unembedding, targets, (1, 1))
    assert all(torch.equal(a, b) for a, b in zip(plain, under))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned, in elements."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            inputs = [x.data_ptr() for x in args if isinstance(x, torch.Tensor)]
            if result.data_ptr() not in inputs:  # a view takes no memory
                self.elements = max(self.elements, result.numel())
        return result


def test_fused_logprob_holds_tiles_only():
    N, D, V = 2000, 4, 2000
    hidden, unembedding = torch.randn(N, D).requires_grad_(), torch.randn(V, D).requires_grad_()
    with Largest() as largest:
        logprob, entropy = fused_logprob(hidden, unembedding, torch.zeros(N, dtype=torch.long))
        (logprob + entropy).sum().backward()
    assert 2**19 <= largest.elements < 1.2 * 2**19 < N * V / 6


def test_sums_are_cut_in_float32_on_a_cpu_alone():
    class OnGPU(torch.Tensor):
        is_cuda = True
    x = torch.randn(3, 200)
    assert [piece.shape[1] for piece in blocks(x, 64)] == [64, 64, 64, 8]
    for whole in (x.double(), x.bfloat16(), x.as_subclass(OnGPU)):
        assert len(blocks(whole, 64)) == 1


def test_fused_logprob_edges():
    hidden = torch.ones(2, 1, requires_grad=True)
    unembedding = torch.tensor([[1e30], [-1e30], [0.0]])  # logits like -inf
    logprob, entropy = fused_logprob(hidden, unembedding, torch.tensor([0, 0]))
    assert logprob.tolist() == [0, 0] and entropy.tolist() == [0, 0]
    (logprob.sum() + entropy.sum()).backward()
    assert torch.isfinite(hidden.grad).all()
    for bad in (-1, 3):
        with pytest.raises(ValueError, match=rf"0 \.\.\. 2, got {bad}"):
            fused_logprob(hidden, unembedding, torch.tensor([0, bad]))
    none = fused_logprob(torch.empty(0, 1), unembedding, torch.empty(0, dtype=torch.long))
    assert none[0].shape == none[1].shape == (0,)


# ---- scoring answers ----


def test_micro_batches_hold_every_index_once_within_the_budget(rng):
    lengths = [rng.randrange(1, 60) for _ in range(100)]
    batches = micro_batches(lengths, 64)
    assert sorted(i for batch in batches for i in batch) == list(range(100))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 64 for batch in batches)
    assert micro_batches([100, 1], 64) == [[0], [1]]  # too long for the budget: alone, not lost


def plain_logprobs(model, context, answer):
    """One sequence, no padding, all the logits."""
    logits = model(torch.tensor([context + answer])) @ model.unembedding.T
    logp = logits[0, len(context) - 1:-1].log_softmax(-1)
    return logp.gather(1, torch.tensor(answer)[:, None])[:, 0]


@torch.no_grad()
@pytest.mark.parametrize("budget", [1, 100, 10_000])
def test_answer_logprobs_of_mixed_lengths(model, prompts, rng, budget):
    answers = [[rng.randrange(600) for _ in range(rng.randrange(1, 40))] for _ in prompts]
    answers[3] = []  # an answer without tokens has no log-probs, and is no reason to stop
    scored = answer_logprobs(model, prompts, answers, micro_tokens=budget)
    exact = GPT.from_pretrained(TINY, dtype=torch.float64)
    for context, answer, ours in zip(prompts, answers, scored):
        assert ours.shape == (len(answer),) and ours.dtype == torch.float32
        if answer:
            assert (ours - plain_logprobs(exact, context, answer)).abs().max() < 1e-4
    ranks = [answer_logprobs(model, prompts, answers, micro_tokens=budget, rank=rank, world=3)
             for rank in range(3)]
    for ours, pieces in zip(scored, zip(*ranks)):
        assert sorted(map(len, pieces)) == [0, 0, len(ours)]  # one rank has them, the others none
        assert (torch.cat(pieces) - ours).abs().max() < 1e-4 if len(ours) else True


def test_score_answers_gives_every_answer_what_the_head_makes_of_its_tokens(model, rng):
    contexts = [[1] * rng.randrange(1, 9) for _ in range(400)]
    answers = [[rng.randrange(600) for _ in range(rng.randrange(1, 60))] for _ in contexts]
    loads = []

    def head(hidden, targets):
        assert hidden.shape == (len(targets), model.config.width) and not hidden.requires_grad
        loads.append(len(targets))
        return targets.double()

    scores = score_answers(model, contexts, answers, head, micro_tokens=500)
    assert [score.tolist() for score in scores] == answers
    assert sum(loads) == sum(map(len, answers))
    assert all(8192 <= load < 8192 + 500 for load in loads[:-1])  # full, but for the last
    assert score_answers(model, [], [], head) == []


@torch.no_grad()
@pytest.mark.parametrize("long_rope", [False, True])
def test_scores_beside_the_rope_switch_do_not_depend_on_neighbours(rng, long_rope):
    """Phi-3.5's short or long factors are the model's, whatever the lengths of a batch."""
    from test_model import random_model

    model = random_model("phi-3.5, long", torch.float64, long_rope=long_rope)
    ids, switch = range(model.config.vocab_size), 16
    while not model.config.takes_long_rope(switch + 1):
        switch += 1
    lengths = [switch - 3, switch, switch + 1, switch + 2, switch + 9, switch // 2] * 2
    contexts = [rng.choices(ids, k=5) for _ in lengths]
    answers = [rng.choices(ids, k=length - 5) for length in lengths]
    alone = [answer_logprobs(model, [c], [a])[0] for c, a in zip(contexts, answers)]
    for budget in (1, 3 * switch, 10_000):
        scored = answer_logprobs(model, contexts, answers, micro_tokens=budget)
        for ours, want in zip(scored, alone):
            assert (ours - want).abs().max() < 1e-9


@torch.no_grad()
def test_positions_follow_from_lengths_even_where_pad_and_stop_ids_are_equal(model, prompts):
    """Answers of token 0, which also fills the padding: each is scored, and nothing else."""
    answers = [[0] * (1 + i) for i in range(len(prompts))]
    hidden, targets = answer_hidden(model, prompts, answers)
    assert len(hidden) == len(targets) == sum(map(len, answers))
    for context, answer, ours in zip(prompts, answers, answer_logprobs(model, prompts, answers)):
        assert (ours - plain_logprobs(model, context, answer)).abs().max() < 1e-4


def test_without_answers_one_token_goes_through_the_model(model):
    """A rank without work joins the collectives of the forward, and of the backward."""
    seen = []
    model.register_forward_hook(lambda _, tokens, __: seen.append(tokens[0].shape))
    hidden, targets = answer_hidden(model, [], [])
    assert seen == [(1, 1)] and hidden.shape == (0, model.config.width) and targets.shape == (0,)
    fused_logprob(hidden, model.unembedding, targets)[0].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_under_autocast_a_frozen_bfloat16_model_equals_the_float32_policy(model, prompts):
    """The frozen model is kept in bfloat16, and must score like the float32 weights that it is a
    rounding of: the KL would never be zero otherwise."""
    answers = [[5, 6, 7], [600], *([[9, 10]] * 6)]
    with torch.autocast("cpu", torch.bfloat16):
        policy = answer_logprobs(model, prompts, answers)
        frozen = answer_logprobs(GPT.from_pretrained(TINY, dtype=torch.bfloat16), prompts, answers)
    assert all(torch.equal(a, b) for a, b in zip(policy, frozen))


# ---- the reward ----


def test_perplexity_and_reward_by_hand():
    # ppl(a|q) = 2 and ppl(a) = 8 over four tokens: R_SA = (8 - 2) / 8
    given = torch.tensor([1 / 2, 1 / 2, 1 / 4, 1]).log()
    without = torch.tensor([1 / 8, 1 / 16, 1 / 8, 1 / 4]).log()
    assert perplexity(given).item() == pytest.approx(2)
    assert perplexity(without).item() == pytest.approx(8)
    assert self_aligned_reward([given], [without]).tolist() == pytest.approx([0.75])
    # the question makes the answer less likely: (2 - 8) / 2 = -3, clipped; no tokens: 0
    none = given[:0]
    assert self_aligned_reward([without, none], [given, none]).tolist() == [-1, 0]
    assert self_aligned_reward([given], [given]).tolist() == [0]
    with pytest.raises(ValueError, match="4 log-probs with its question and 3 without"):
        self_aligned_reward([given], [without[:3]])
    with pytest.raises(ValueError):
        perplexity(none)


def test_reward_and_token_values_equal_a_plain_loop(rng):
    given = [-torch.rand(rng.randrange(1, 300)) * 12 for _ in range(50)]
    without = [-torch.rand(len(g)) * 14 for g in given]
    for ours, g, w in zip(self_aligned_reward(given, without).tolist(), given, without):
        ppl_q, ppl = (math.exp(-math.fsum(x.tolist()) / len(x)) for x in (g, w))
        assert ours == pytest.approx(max(-1.0, min(1.0, (ppl - ppl_q) / ppl)), abs=1e-12)
        from_values = 1 - math.exp(-token_values(g, w).mean().item())
        assert ours == pytest.approx(max(-1, from_values), abs=1e-12)


def test_no_gradient_flows_through_the_reward(model, prompts):
    lp = answer_logprobs(model, prompts[:2], [[5, 6], [7]])
    assert not self_aligned_reward(lp, lp).requires_grad and not lp[0].requires_grad
    with_grad = [x.clone().requires_grad_() for x in lp]
    assert not self_aligned_reward(with_grad, with_grad).requires_grad


# ---- the rewards it is compared with, by hand ----

# two questions of four answers, three and none of them right
VR = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]).double()
SA = torch.tensor([0.5, -0.5, 0.25, 0.0, 1.0, -1.0, 0.0, 0.125]).double()
LENGTHS = torch.tensor([10, 20, 30, 20, 5, 5, 5, 25])
PROBS = [[1.0, 1 / 4], [1 / 8], *[[1 / 2] * 3] * 6]  # ppl 2, 8, 2, ...
LOGPROBS = [torch.tensor(p).log() for p in PROBS]


def reward(name, vr=VR, lengths=LENGTHS, alpha=0.2, samples=4, sa=SA):
    n = len(vr)
    return total_reward(name, vr, sa[:n], LOGPROBS[:n], lengths, alpha=alpha, samples=samples,
                        longest=40).tolist()


def test_rewards_without_a_group_by_hand():
    assert reward("vr") == VR.tolist()
    assert reward("sar") == pytest.approx([1.1, -0.1, 1.05, 1.0, 0.2, -0.2, 0.0, 0.025])
    assert reward("sar-only") == SA.tolist()
    assert reward("sar-times") == pytest.approx([1.1, 0, 1.05, 1, 0, 0, 0, 0])
    em = [-math.log(2), -math.log(8), *[-math.log(2)] * 6]
    assert reward("em") == pytest.approx(em)
    assert reward("vr+em") == pytest.approx([v + 0.2 * e for v, e in zip(VR.tolist(), em)])
    curious = [v - 0.2 * e for v, e in zip(VR.tolist(), em)]
    assert reward("cde") == pytest.approx(curious) and curious[1] > 0  # wrong, but unsure
    for name in ("sar", "sar-times", "vr+em", "cde"):
        assert reward(name, alpha=0) == reward("vr")


def test_truncation_by_hand():
    assert reward("truncation", alpha=0.5) == [1, 0, 0, 1, 0, 0, 0, 0]  # at most 20 of 40 tokens
    assert reward("truncation", alpha=0.75) == VR.tolist()  # a right answer of 30 just fits
    assert reward("truncation", alpha=0.1) == [0] * 8


def test_o1_by_hand():
    # mean 20: 20/10 - 1 = 1, 0, 20/30 - 1 = -1/3, 0; mean 10: 1, 1, 1, 10/25 - 1 = -0.6
    assert reward("o1") == pytest.approx([1.2, 0.0, 1 - 0.2 / 3, 1.0, 0.2, 0.2, 0.2, -0.12])
    # mean 26: 26/2 - 1 = 12 is held at 1, 26/50 - 1 = -0.48
    two = reward("o1", vr=VR[:2], lengths=torch.tensor([2, 50]), alpha=1.0, samples=2)
    assert two == pytest.approx([2.0, -0.48])
    assert reward("o1", lengths=torch.full((8,), 7)) == VR.tolist()  # ties


def test_er_by_hand():
    # the right ones of the first question: 10, 30, 20; mean 20, variance 200 / 3
    s = 1 / (1 + math.exp(-10 / math.sqrt(200 / 3)))
    want = [1 + 0.2 * (2 * s - 1), 0, 1 - 0.2 * (2 * s - 1), 1, 0, 0, 0, 0]
    assert reward("er") == pytest.approx(want)
    assert reward("er", lengths=torch.full((8,), 7)) == VR.tolist()  # ties
    ties_among_the_right = torch.tensor([9, 1, 9, 9, 1, 2, 3, 4])
    assert reward("er", lengths=ties_among_the_right) == VR.tolist()
    one_right = torch.tensor([0.0, 1.0, 0.0, 0.0]).double()  # nothing to compare it with
    assert reward("er", vr=one_right, lengths=LENGTHS[:4]) == one_right.tolist()
    assert reward("er", vr=torch.zeros(8).double()) == [0.0] * 8


def test_kimi_by_hand():
    # 10, 20, 30, 20: 1/2, 0, -1/2, 0; all wrong, 5, 5, 5, 25: min(0, 1/2), ..., -1/2
    assert reward("kimi", alpha=0.4) == pytest.approx([1.2, 0, 0.8, 1.0, 0, 0, 0, -0.2])
    swapped = 1 - VR  # the wrong answers of 10 and 30 tokens: min(0, 1/2) and -1/2
    assert reward("kimi", vr=swapped, alpha=0.4)[:4] == pytest.approx([0, 1.0, -0.2, 0])
    assert reward("kimi", lengths=torch.full((8,), 7)) == VR.tolist()  # ties


def test_alp_by_hand():
    # alpha L / 40 times the share of right answers: 3/4; none right: 1/4, one of four
    want = [1 - 0.2 * 0.25 * 0.75, -0.2 * 0.5 * 0.75, 1 - 0.2 * 0.75 * 0.75, 1 - 0.2 * 0.5 * 0.75]
    want += [-0.2 * 0.125 * 0.25] * 3 + [-0.2 * 0.625 * 0.25]
    assert reward("alp") == pytest.approx(want)
    ties = reward("alp", vr=torch.ones(8).double(), lengths=torch.full((8,), 20))
    assert ties == pytest.approx([0.9] * 8)


def test_gr3_by_hand():
    # mean 20: 1 / (1 + 0.33 / 2), 0, 1 / (1 + 0.33 * 3 / 2), 1 / 1.33
    want = [1 / 1.165, 0, 1 / 1.495, 1 / 1.33, 0, 0, 0, 0]
    assert reward("gr3", alpha=0.33) == pytest.approx(want)
    ties = reward("gr3", alpha=0.33, lengths=torch.full((8,), 7))
    assert ties == pytest.approx([v / 1.33 for v in VR.tolist()])


def test_mo_grpo_by_hand():
    # R_VR 1, 0, 1, 1: mean 3/4, deviation sqrt(3)/4; R_SA 1, 1, 0, 0: mean and deviation 1/2
    sa, root = torch.tensor([1.0, 1, 0, 0, 3, 3, 3, 3]).double(), 3**0.5
    want = [1 / root + 1, -root + 1, 1 / root - 1, 1 / root - 1]
    assert reward("mo", sa=sa) == pytest.approx([*want, 0, 0, 0, 0], abs=1e-6)  # all wrong, ties
    assert reward("mo", sa=sa * 1e-3)[:4] == pytest.approx(want, abs=1e-3)  # whatever its size
    groups = torch.tensor(reward("mo"), dtype=torch.float64).view(2, 4)
    assert groups.sum(1).tolist() == pytest.approx([0, 0])  # so it is the advantage


@pytest.mark.parametrize("name", ["o1", "er"])
def test_group_rewards_equal_a_plain_loop(rng, name):
    P, samples, alpha = 6, 5, rng.random()
    N = P * samples
    vr, lengths = torch.randint(2, (N,)).double(), torch.randint(1, 300, (N,))
    want = []
    for first in range(0, N, samples):
        group = lengths[first:first + samples].tolist()
        right = vr[first:first + samples].tolist()
        among = [x for x, c in zip(group, right) if c] if name == "er" else group
        mean = sum(among) / max(1, len(among))
        spread = math.sqrt(sum((x - mean) ** 2 for x in among) / max(1, len(among)))
        for length, correct in zip(group, right):
            if name == "o1":
                want.append(correct + alpha * max(-1, min(1, (mean - length) / length)))
            else:
                z = (length - mean) / spread if spread else 0
                want.append(correct and 1 - alpha * math.tanh(z / 2))
    logprobs = [torch.zeros(1)] * N
    got = total_reward(name, vr, torch.zeros(N), logprobs, lengths, alpha=alpha, samples=samples,
                       longest=300)
    assert got.tolist() == pytest.approx(want, abs=1e-12)


def test_rewards_that_cannot_be():
    names = ", ".join(REWARDS).replace("+", r"\+")
    with pytest.raises(ValueError, match=f"no reward 'best': choose one of {names}"):
        reward("best")
    assert {*GROUP_REWARDS} < {*REWARDS}
    for name in REWARDS:  # each has a formula
        assert len(reward(name)) == 8
    # an answer without tokens has no ppl(a|q): no best reward for saying nothing
    with pytest.raises(ValueError, match="no perplexity"):
        total_reward("em", VR[:1], SA[:1], [torch.empty(0)], LENGTHS[:1], alpha=0.2, samples=1,
                     longest=40)


def test_alpha_schedule_by_hand():
    rising = [alpha_at(step, 5, 0.1, 0.5) for step in range(5)]
    assert rising == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert [alpha_at(step, 3, 0.4, 0.0) for step in range(3)] == pytest.approx([0.4, 0.2, 0.0])
    assert alpha_at(7, 10, 0.2, None) == 0.2 and alpha_at(0, 1, 0.3, 0.1) == 0.3
