"""Self-aligned reward: fused log-probs, perplexities, and the reward made of them.

    R    = R_VR + alpha * R_SA
    R_SA = clip((ppl(a) - ppl(a|q)) / ppl(a), -1, 1)            (arXiv 2509.05489, ICLR 2026)

An answer that its question makes likelier than it is on its own scores high. Text that any answer
could hold (filler, repetition) is about as likely with the question as without it and pulls R_SA to
zero. With v(a_j) = log P(a_j | q, a_<j) - log P(a_j | a_<j), R_SA = 1 - exp(-mean_j v(a_j)), at
least -1 (python -m view.tokens shows v): 1 - IFD, the instruction-following difficulty of data
selection, in its perplexity form (Superfiltering, arXiv 2402.00530).
"""
import math
from bisect import bisect_left

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import matmul, matmul_dtype, round_up

# ---- log-probs without logits ----

LN2 = math.log(2)


class FusedLogprob(torch.autograd.Function):
    """The work of `fused_logprob`, on one tile (rows x columns) of the logits at a time.

    Forward. Logits are counted in bits, z = hidden @ unembedding.T / (temperature ln 2), so that
    p_j is proportional to 2^z_j. From tile to tile each row carries its largest z so far and two
    sums relative to it, restated whenever a tile raises the peak:

        mass = sum_j 2^(z_j - peak)        tilt = sum_j 2^(z_j - peak) (z_j - peak)

    Then log2 p_j = z_j - peak - log2 mass, and the entropy H, the mean of -log2 p_j under p, is
    log2 mass - tilt / mass.

    Backward. In nats, with scaled logits l and target t, d p_k / d l_j = p_k ([k = j] - p_j), so

        d log p_t / d l_j = [j = t] - p_j
        d H / d l_j = -sum_k (log p_k + 1) p_k ([k = j] - p_j) = -p_j (log p_j + H)

    and gradients a of log p_t and b of H make G_j = a [j = t] - p_j (a + b H + b log p_j), from
    which grad_hidden = G @ unembedding / temperature, grad_unembedding = G.T @ hidden /
    temperature. A tile of G takes the tile of logits, computed once more, with peak, mass and H of
    its rows: that is all the forward has to keep.

    Precision. A float32 logit of 80 that sums a thousand products is off by up to 6e-5. Therefore
    sums run over `block` products before they are added up: 256, or 64 in both passes where there
    is a backward, whose differences take more digits. The two logits that count most, the target's
    and the largest, enter the log-prob in float64; what is near the peak is exact relative to it.
    """

    @staticmethod
    def forward(ctx, hidden, unembedding, targets, temperature, rows, columns, block):
        N, work, scale = len(hidden), matmul_dtype(hidden), 1 / (temperature * LN2)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        peaks = torch.empty(N, dtype=exact, device=hidden.device)  # before the scale
        masses, logprob, entropy = torch.empty((3, N), dtype=torch.float64, device=hidden.device)
        for start in range(0, N, rows):
            part = slice(start, start + rows)
            h, t = blocks(hidden[part].to(work), block), targets[part]
            peak = torch.full_like(peaks[part], -1e37)
            mass = tilt = top = 0
            for first in range(0, len(unembedding), columns):
                W = blocks(unembedding[first:first + columns].to(work), block)
                z = logits(h, W)  # (rows, columns)
                highest, index = z.max(-1)
                top = torch.where(highest > peak, first + index, top)
                new_peak = torch.maximum(peak, highest)
                drop = (peak - new_peak).double() * scale
                below(z, new_peak, scale)
                e = z.exp2()  # exp is 4 times as slow on a CPU, and far slower where it underflows
                tilt = drop.exp2() * (tilt + drop * mass) + torch.linalg.vecdot(e, z)
                mass = drop.exp2() * mass + e.sum(-1)
                peak = new_peak
            peaks[part], masses[part] = peak, mass
            entropy[part] = (mass.log2() - tilt / mass) * LN2
            h = hidden[part].double()
            z_target, z_top = ((h * unembedding[index].to(work)).sum(-1) * scale
                               for index in (t, top))
            # the mass, restated relative to the float64 value of the largest logit
            mass = 1 + (mass - 1) * (peak * scale - z_top).clamp(-1, 1).exp2()
            logprob[part] = (z_target - z_top - mass.log2()) * LN2
        ctx.save_for_backward(hidden, unembedding, targets, peaks, masses, entropy)
        ctx.settings = scale, rows, columns, block
        ctx.set_materialize_grads(False)  # an output without gradient costs no pass over the tiles
        return logprob.to(exact), entropy.to(exact)

    @staticmethod
    @once_differentiable
    def backward(ctx, a, b):
        hidden, unembedding, targets, peaks, masses, entropy = ctx.saved_tensors
        scale, rows, columns, block = ctx.settings
        exact, work = peaks.dtype, matmul_dtype(hidden)
        # p_j (a + b H + b log p_j) = 2^(z_j - peak) (level + slope (z_j - peak))
        a = torch.zeros_like(masses) if a is None else a.double() * (scale * LN2)  # / temperature
        level, slope = a / masses, None  # (N,)
        if b is not None:
            b = b.double() * (scale * LN2)
            level = (a + b * (entropy - masses.log())) / masses
            slope = (b * LN2 / masses).to(exact)
        a, level = a.to(exact), level.to(exact)
        grad_hidden = torch.zeros_like(hidden, dtype=exact)
        dtype = unembedding.grad_dtype if unembedding.is_leaf else unembedding.dtype
        grad_unembedding = torch.empty_like(unembedding, dtype=dtype)
        for first in range(0, len(unembedding), columns):
            W = unembedding[first:first + columns].to(work)  # (columns, D)
            W_blocks = blocks(W, block)
            grad_W = torch.zeros_like(W, dtype=exact)
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                h = hidden[part].to(work)
                z = below(logits(blocks(h, block), W_blocks), peaks[part], scale)  # (rows, columns)
                G = z.exp2()
                if slope is None:
                    G.mul_(-level[part, None])
                else:
                    G.mul_(z.mul_(-slope[part, None]).sub_(level[part, None]))
                here = targets[part] - first
                inside = (here >= 0) & (here < len(W))
                G.scatter_add_(1, here.clamp(0, len(W) - 1)[:, None], (a[part] * inside)[:, None])
                G = G.to(work)
                grad_hidden[part] += matmul(G, W.T)
                grad_W += matmul(G.T, h.T)
            grad_unembedding[first:first + columns] = grad_W
        return grad_hidden.to(hidden.dtype), grad_unembedding, *[None] * 5


def blocks(x: Tensor, block: int) -> list[Tensor]:
    """x (n, D) in pieces (n, block): the products of one sum. Only a CPU's float32 is cut: a GPU
    would wait for so many small products."""
    if x.dtype != torch.float32 or x.is_cuda:
        return [x]
    return [piece.contiguous() for piece in x.split(block, 1)]


def logits(h: list[Tensor], W: list[Tensor]) -> Tensor:
    """Blocks of h (rows, D) and W (columns, D) -> h @ W.T (rows, columns) in float32 or float64."""
    z = matmul(h[0], W[0])
    for h_block, W_block in zip(h[1:], W[1:]):
        z += matmul(h_block, W_block)
    return z


def below(z: Tensor, peak: Tensor, scale: float) -> Tensor:
    """(z - peak[:, None]) scale, in place. Clamped: tilt multiplies 2^z by z; 0 * -inf is NaN."""
    return z.sub_(peak[:, None]).clamp_min_(-1e4).mul_(scale)


def fused_logprob(hidden: Tensor, unembedding: Tensor, targets: Tensor, *, temperature: float = 1.0,
                  chunk: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Log-prob of each target, and entropy, under softmax(hidden @ unembedding.T / temperature).

    hidden (N, D), unembedding (V, D), targets (N,) int64 -> logprob (N,), entropy (N,) in nats,
    float32 (float64 for float64). Differentiable in hidden and unembedding through both outputs;
    the (N, V) logits are never held. Raises ValueError for a target outside 0 ... V - 1.

    chunk: (rows, columns) of a tile. A CPU tile is 1024 columns wide (or V) and holds 2^19 logits:
    2 MB stay in the cache between the matmul that writes them and the passes that read them, and
    512 rows make good use of each weight. A GPU wants fewer, larger kernels: 8192 columns, 2^25.
    """
    V = len(unembedding)
    outside = targets[(targets < 0) | (targets >= V)]  # the one wait for a GPU
    if len(outside):
        raise ValueError(f"targets must lie in 0 ... {V - 1}, got {outside[0]}")
    columns = min(V, 8192 if hidden.is_cuda else 1024)
    rows, columns = chunk or ((2**25 if hidden.is_cuda else 2**19) // columns, columns)
    learning = torch.is_grad_enabled() and (hidden.requires_grad or unembedding.requires_grad)
    block = 64 if learning else 256
    with torch.autocast(hidden.device.type, enabled=False):  # it would round tiles to bfloat16
        return FusedLogprob.apply(hidden, unembedding, targets, temperature, rows, columns, block)


# ---- scoring answers ----


def micro_batches(lengths: list[int], budget: int, rank=0, world=1) -> list[list[int]]:
    """Batches of indices, longest sequences first, of at most `budget` tokens each, padding
    included. A sequence that is longer than the budget gets a batch of its own.

    With world > 1, only this rank's batches. Every rank gets the same number, the fewest possible;
    the budget is then lowered as far as that number allows, so that batches of the same round are
    about equal in tokens. A rank may get empty ones.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # stable: by lengths alone

    def batches_within(budget):
        batches = []
        for i in order:
            if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    batches = batches_within(budget)
    if world == 1:
        return batches
    total = round_up(len(batches), world)  # rounds * world
    budget = bisect_left(range(budget), True, 1, key=lambda b: len(batches_within(b)) <= total)
    batches = sorted(batches_within(budget), key=lambda batch: -len(batch) * lengths[batch[0]])
    batches += [[]] * (total - len(batches))
    return batches[rank::world]


def answer_hidden(model, contexts: list[list[int]], answers: list[list[int]]
                  ) -> tuple[Tensor, Tensor]:
    """One forward of right-padded context + answer rows. Returns what a head must see, and no more:
    the hidden states (L, D) that predict each answer token, row after row, and those tokens (L,).

    Positions follow from lengths, not token ids: a pad id may equal the stop id. With no answers,
    one dummy token goes through the model: a process without work must join FSDP's all-gathers.
    """
    device = next(model.parameters()).device
    rows = [(c + a)[:-1] for c, a in zip(contexts, answers)] or [[]]  # the last predicts nothing
    width = max(1, *map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)  # (B, T)
    positions, targets = [], []
    for b, (context, answer) in enumerate(zip(contexts, answers)):
        first = b * width + len(context) - 1
        positions += range(first, first + len(answer))
        targets += answer
    positions, targets = torch.tensor([positions, targets], dtype=torch.int64, device=device)
    hidden = model(tokens).flatten(0, 1).index_select(0, positions)
    if torch.is_autocast_enabled(device.type):  # the residual stream is float32; a head need not be
        hidden = hidden.to(torch.get_autocast_dtype(device.type))
    return hidden, targets


@torch.no_grad()
def score_answers(model, contexts: list[list[int]], answers: list[list[int]], head, *,
                  micro_tokens=16384, rank=0, world=1) -> list[Tensor]:
    """head(hidden (L, D), targets (L,)) -> (L,) for the tokens of every answer, without gradient:
    a (len(a),) tensor each. With world > 1 the answers of other ranks get empty tensors.

    Forwards run over micro-batches of at most micro_tokens tokens. Their answer positions wait
    until there are enough for the head, so that short answers do not make for small matmuls."""
    scores = [torch.empty(0)] * len(answers)
    lengths = [len(c) + len(a) for c, a in zip(contexts, answers)]
    batches = micro_batches(lengths, micro_tokens, rank, world)
    pending, hidden, targets = [], [], []  # indices of answers, and what the head is to see
    for number, batch in enumerate(batches, 1):
        h, t = answer_hidden(model, [contexts[i] for i in batch], [answers[i] for i in batch])
        pending += batch
        hidden.append(h)
        targets.append(t)
        if sum(map(len, targets)) >= 8192 or number == len(batches):
            flat = head(torch.cat(hidden), torch.cat(targets)).cpu()
            for i, piece in zip(pending, flat.split([len(answers[i]) for i in pending])):
                scores[i] = piece
            pending, hidden, targets = [], [], []
    return scores


def logprob_head(model, temperature: float = 1.0):
    """The head for `score_answers` that returns log P(a_j | context, a_<j) at a temperature."""
    return lambda hidden, targets: fused_logprob(hidden, model.unembedding, targets,
                                                 temperature=temperature)[0]


def answer_logprobs(model, contexts, answers, temperature=1.0, **options) -> list[Tensor]:
    """log P(a_j | context, a_<j) of every answer token; options as in `score_answers`."""
    return score_answers(model, contexts, answers, logprob_head(model, temperature), **options)


# ---- the reward ----


def perplexity(logprobs: Tensor) -> Tensor:
    """exp(-mean log-prob) of one answer, logprobs (L,) in nats. Raises ValueError for L = 0."""
    if len(logprobs) == 0:
        raise ValueError("an answer without tokens has no perplexity")
    return (-logprobs.double().mean()).exp()


def token_values(with_question: Tensor, without_question: Tensor) -> Tensor:
    """v(a_j) (L,) in nats: what the question says about each token of one answer."""
    return with_question.double() - without_question.double()


def self_aligned_reward(with_question: list[Tensor], without_question: list[Tensor]) -> Tensor:
    """R_SA = clip((ppl(a) - ppl(a|q)) / ppl(a), -1, 1) of each answer (arXiv 2509.05489, sec. 3).

    with_question, without_question: each answer's log-probs (len(a),) in nats, after the prompt
    with and without the question. Returns (answers,) float64, detached; an answer without tokens
    scores 0. Raises ValueError when an answer's two scorings differ in length.
    """
    rewards = torch.zeros(len(with_question), dtype=torch.float64)
    for i, (given, without) in enumerate(zip(with_question, without_question, strict=True)):
        if len(given) != len(without):
            raise ValueError(f"answer {i} has {len(given)} log-probs with its question and "
                             f"{len(without)} without")
        if len(given):
            # ppl(a|q) / ppl(a) as one exponential: neither perplexity need be a finite number
            rewards[i] = 1 - (without.double().mean() - given.double().mean()).exp()
    return rewards.clamp(-1, 1).detach()


# ---- the rewards it is compared with ----

REWARDS = {  # by name: the default --alpha, of its source (docs/usage.md says which are ours)
    "sar": 0.2, "sar-times": 0.2, "vr": 0.0, "sar-only": 0.0, "em": 0.0, "vr+em": 0.2, "cde": 0.2,
    "o1": 0.05, "er": 0.05, "kimi": 0.4, "alp": 0.2, "gr3": 0.33, "truncation": 0.25, "mo": 0.0}
GROUP_REWARDS = ("o1", "er", "kimi", "alp", "gr3", "mo")  # they compare answers to one question


def total_reward(name: str, r_vr: Tensor, r_sa: Tensor, with_question: list[Tensor],
                 lengths: Tensor, *, alpha: float, samples: int, longest: int) -> Tensor:
    """The reward R (N,) by its name for --reward. N = P * samples, a question's answers adjacent.

    r_vr (N,), 0 or 1, and r_sa (N,) are float64; with_question: each answer's log-probs (len(a),),
    at least one; lengths (N,) in tokens, at most `longest`. Beside R_VR a part has the weight
    alpha, alone 1 (as in the code of arXiv 2509.05489). Raises ValueError for an unknown name.
    Secondary sources: truncation, cde (in the paper also clipped), kimi, alp, gr3, mo.
    """
    if name == "vr":
        return r_vr
    if name == "sar":
        return r_vr + alpha * r_sa
    if name == "sar-times":  # the multiplicative form: no R_SA for a wrong answer
        return r_vr * (1 + alpha * r_sa)
    if name == "sar-only":
        return r_sa
    if name == "truncation":  # within L_T = alpha longest (DLER, arXiv 2510.15110; 2504.01296)
        return r_vr * (lengths <= alpha * longest)
    if name in ("em", "vr+em", "cde"):  # -log ppl(a|q) (2505.15134); cde: its opposite (2509.09675)
        r_em = -torch.stack([perplexity(logprobs) for logprobs in with_question]).log()
        return {"em": r_em, "vr+em": r_vr + alpha * r_em, "cde": r_vr - alpha * r_em}[name]
    length, correct = lengths.double().view(-1, samples), r_vr.view(-1, samples)  # (P, samples)
    if name == "o1":  # O1-Pruner (arXiv 2501.12570), with the group's mean length for the start's
        return r_vr + alpha * (length.mean(1, keepdim=True) / length - 1).clamp(-1, 1).flatten()
    if name == "er":  # the sigmoid s of length, standardised among right answers (arXiv 2502.04463)
        # By 2 s - 1 (2509.05489's code) the mean length costs nothing. Wrong answers earn 0.
        count = correct.sum(1, keepdim=True).clamp_min(1)  # (P, 1)
        mean = (correct * length).sum(1, keepdim=True) / count
        deviation = (correct * (length - mean) ** 2).sum(1, keepdim=True).div(count).sqrt()
        z = (length - mean) / deviation.clamp_min(1e-5)  # equal lengths, one correct answer: 0
        return r_vr * (1 - alpha * (2 * z.sigmoid() - 1).flatten())
    if name == "kimi":  # k1.5 (arXiv 2501.12599): from 1/2 for the shortest to -1/2 for the longest
        low, high = length.aminmax(dim=1, keepdim=True)  # (P, 1); equal lengths earn nothing
        place = (high > low) * (0.5 - (length - low) / (high - low).clamp_min(1))
        return r_vr + alpha * torch.where(correct > 0, place, place.clamp_max(0)).flatten()
    if name == "alp":  # arXiv 2506.05256: the easier the question, the dearer a token
        solved = correct.mean(1, keepdim=True).clamp_min(1 / samples)  # (P, 1)
        return r_vr - (alpha * length / longest * solved).flatten()
    if name == "gr3":  # arXiv 2603.10535
        return r_vr / (1 + alpha * length / length.mean(1, keepdim=True)).flatten()
    if name == "mo":  # MO-GRPO (arXiv 2509.22047): this is the advantage, its group mean being 0
        parts = torch.stack([r_vr, r_sa]).view(2, -1, samples)  # (2, P, samples)
        return torch.layer_norm(parts, [samples], eps=1e-10).sum(0).flatten()  # standardised
    raise ValueError(f"there is no reward {name!r}: choose one of {', '.join(REWARDS)}")


def alpha_at(step: int, steps: int, alpha: float, alpha_end: float | None) -> float:
    """The weight at step 0 ... steps - 1: alpha, or on a straight line from alpha to alpha_end."""
    return alpha if alpha_end is None else alpha + (alpha_end - alpha) * step / max(1, steps - 1)
