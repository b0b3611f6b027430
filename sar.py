"""Self-aligned reward: fused log-probs, perplexities, and the reward made of them.

    R    = R_VR + alpha * R_SA
    R_SA = clip((ppl(a) - ppl(a|q)) / ppl(a), -1, 1)                    (arXiv 2509.05489, ICLR 2026)

An answer that its question makes likelier than it is on its own scores high. Text that any answer could hold (filler,
repetition, re-checking) is about as likely with the question as without it and pulls R_SA towards zero; so does an answer
that the question does not lead to. With v(a_j) = log P(a_j | q, a_<j) - log P(a_j | a_<j), R_SA = 1 - exp(-mean_j v(a_j)).

    python sar.py --question "Tom has 3 cups. ..." --answer "3 + 4 = 7"      # v of every token, in colours; --html FILE for a page
    python sar.py --completions runs/NAME/completions.jsonl --line 7         # under the model that the run began with; --model for others
"""
import argparse
import html
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# ---- log-probs without logits ----

LN2 = math.log(2)
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class FusedLogprob(torch.autograd.Function):
    """The work of `fused_logprob`. Walks over tiles (rows x columns) of the logits, each of which is made, used and dropped.

    Forward. Logits are counted in bits, z = hidden @ unembedding.T / (temperature ln 2), so that p_j is proportional to 2^z_j. From
    tile to tile each row carries its largest z so far and two sums relative to it, restated whenever a tile raises the peak:

        mass = sum_j 2^(z_j - peak)        tilt = sum_j 2^(z_j - peak) (z_j - peak)

    Then log2 p_j = z_j - peak - log2 mass, and the entropy H, the mean of -log2 p_j under p, is log2 mass - tilt / mass.

    Backward. In nats, with l the scaled logits and t the target, p_k changes by p_k ([k = j] - p_j) with l_j, so

        d log p_t / d l_j = [j = t] - p_j
        d H / d l_j = -sum_k (log p_k + 1) p_k ([k = j] - p_j) = -p_j (log p_j + H)

    and gradients a of log p_t and b of H make G_j = a [j = t] - p_j (a + b H + b log p_j), from which
    grad_hidden = G @ unembedding / temperature and grad_unembedding = G.T @ hidden / temperature. A tile of G takes the tile of
    logits, computed once more, with peak, mass and H of its rows: that is all the forward has to keep.

    Precision. A float32 logit of 80 that sums a thousand products is off by up to 6e-5. Therefore sums run over `block` products
    before they are added up: 256, or 64 in both passes where there is a backward, whose differences take more digits. The two
    logits that count most, the target's and the largest, are in float64 where the log-prob is made of them (one dot product per
    row), and what is near the peak is exact relative to it.
    """

    @staticmethod
    def forward(ctx, hidden, unembedding, targets, temperature, rows, columns, block):
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        work, scale = matmul_dtype(hidden), 1 / (temperature * LN2)
        peaks = torch.empty(len(hidden), dtype=exact, device=hidden.device)  # before the scale
        masses, logprob, entropy = torch.empty((3, len(hidden)), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            h, t = blocks(hidden[part].to(work), block), targets[part]
            peak = torch.full_like(peaks[part], -1e37)
            mass, tilt, top = torch.zeros_like(masses[part]), torch.zeros_like(masses[part]), torch.zeros_like(t)
            for first in range(0, len(unembedding), columns):
                z = logits(h, blocks(unembedding[first:first + columns].to(work), block))  # (rows, columns)
                highest, index = z.max(-1)
                top = torch.where(highest > peak, first + index, top)
                new_peak = torch.maximum(peak, highest)
                drop = (peak - new_peak).double() * scale
                below(z, new_peak, scale)
                e = z.exp2()  # four times as fast as exp on a CPU, and never slow: exp takes 50 times as long where it underflows
                tilt = drop.exp2() * (tilt + drop * mass) + torch.linalg.vecdot(e, z)
                mass = drop.exp2() * mass + e.sum(-1)
                peak = new_peak
            peaks[part], masses[part] = peak, mass
            entropy[part] = (mass.log2() - tilt / mass) * LN2
            z_target, z_top = ((hidden[part].double() * unembedding[index].to(work)).sum(-1) * scale for index in (t, top))
            mass = 1 + (mass - 1) * (peak * scale - z_top).clamp(-1, 1).exp2()  # seen from the exact peak
            logprob[part] = (z_target - z_top - mass.log2()) * LN2
        ctx.save_for_backward(hidden, unembedding, targets, peaks, masses, entropy)
        ctx.scale, ctx.rows, ctx.columns, ctx.block = scale, rows, columns, block
        ctx.set_materialize_grads(False)  # an output that nobody differentiates costs no pass over the tiles
        return logprob.to(exact), entropy.to(exact)

    @staticmethod
    @once_differentiable
    def backward(ctx, a, b):
        hidden, unembedding, targets, peaks, masses, entropy = ctx.saved_tensors
        exact, work = peaks.dtype, matmul_dtype(hidden)
        a, b = (None if x is None else x.double() * (ctx.scale * LN2) for x in (a, b))  # scale ln 2 = 1 / temperature
        a = torch.zeros_like(masses) if a is None else a
        level, slope = a / masses, None  # p_j (a + b H + b log p_j) = 2^(z_j - peak) (level + slope (z_j - peak))
        if b is not None:
            level = (a + b * (entropy - masses.log())) / masses  # (N,)
            slope = (b * LN2 / masses).to(exact)
        a, level = a.to(exact), level.to(exact)
        grad_hidden = torch.zeros(hidden.shape, dtype=exact, device=hidden.device) if ctx.needs_input_grad[0] else None
        grad_unembedding = torch.empty_like(unembedding) if ctx.needs_input_grad[1] else None
        for first in range(0, len(unembedding), ctx.columns):
            W = unembedding[first:first + ctx.columns].to(work)  # (columns, D)
            W_blocks = blocks(W, ctx.block)
            grad_W = torch.zeros(W.shape, dtype=exact, device=W.device) if ctx.needs_input_grad[1] else None
            for start in range(0, len(hidden), ctx.rows):
                part = slice(start, start + ctx.rows)
                h = hidden[part].to(work)
                z = below(logits(blocks(h, ctx.block), W_blocks), peaks[part], ctx.scale)  # (rows, columns)
                G = z.exp2()
                if slope is None:
                    G.mul_(-level[part, None])
                else:
                    G.mul_(z.mul_(-slope[part, None]).sub_(level[part, None]))
                here = targets[part] - first
                inside = (here >= 0) & (here < len(W))
                G.scatter_add_(1, here.clamp(0, len(W) - 1)[:, None], (a[part] * inside)[:, None])
                G = G.to(work)
                if grad_hidden is not None:
                    grad_hidden[part] += matmul(G, W.T)
                if grad_W is not None:
                    grad_W += matmul(G.T, h.T)
            if grad_unembedding is not None:
                grad_unembedding[first:first + ctx.columns] = grad_W
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_unembedding, None, None, None, None, None


def blocks(x: Tensor, block: int) -> list[Tensor]:
    """x (n, D) in pieces (n, block): the products of one sum. bfloat16 (of a GPU) and float64 stay whole."""
    return [piece.contiguous() for piece in x.split(block, 1)] if x.dtype == torch.float32 else [x]


def logits(h: list[Tensor], W: list[Tensor]) -> Tensor:
    """Blocks of h (rows, D) and W (columns, D) -> h @ W.T (rows, columns) in float32 (float64 for float64)."""
    z = matmul(h[0], W[0])
    for h_block, W_block in zip(h[1:], W[1:]):
        z += matmul(h_block, W_block)
    return z


def below(z: Tensor, peak: Tensor, scale: float) -> Tensor:
    """(z - peak[:, None]) scale, in place; at least -1e4 before the scale, so that no 0 * -inf arises from it."""
    return z.sub_(peak[:, None]).clamp_min_(-1e4).mul_(scale)


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """What tiles are multiplied in: bfloat16 on a GPU, which sums its products in float32, else float32 (float64 for float64).
    Never float16: the gradients of a loss that is a mean over a batch may lie below its range."""
    return hidden.dtype if hidden.dtype == torch.float64 or (hidden.dtype == torch.bfloat16 and hidden.is_cuda) else torch.float32


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (n, k), b (m, k) -> a @ b.T (n, m), summed and returned in float32 (float64 for float64): rounded to bfloat16, a logit of
    size 20 would be off by 0.06."""
    if a.dtype == torch.bfloat16:
        return torch.mm(a, b.T, out_dtype=torch.float32)
    if a.dtype == torch.float32 and a.device.type == "cpu" and ONEDNN:
        # `@` goes to MKL, which uses half the vector width of AMD's cores; oneDNN uses all of it
        return torch.ops.mkldnn._linear_pointwise(filled(a), filled(b), None, "none", [], "")[:len(a), :len(b)]
    with torch.autocast(a.device.type, enabled=False):  # a backward may run within it
        return a @ b.T


def filled(x: Tensor) -> Tensor:
    """x (n, m) with zeros up to multiples of 64, because oneDNN keeps a compiled kernel (0.6 MB) of every size it has met; and
    without gaps in memory, which it handles at a snail's pace."""
    pad = (0, -x.shape[1] % 64, 0, -x.shape[0] % 64)
    if any(pad):
        return F.pad(x, pad)
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()


def fused_logprob(hidden: Tensor, unembedding: Tensor, targets: Tensor, *, temperature: float = 1.0,
                  chunk: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each distribution, softmax(hidden @ unembedding.T / temperature), in nats.

    hidden (N, D), unembedding (V, D), targets (N,) int64 -> logprob (N,), entropy (N,), both float32 (float64 for float64).
    Differentiable in hidden and unembedding through both outputs; the (N, V) logits are never held.

    chunk: (rows, columns) of a tile of logits. Besides inputs, outputs and gradients a few tiles are held, whatever N and V are. On a
    CPU a tile is 1024 columns wide (or V) and holds 2^19 logits, 512 rows then: 2 MB stay in the cache between the matmul that
    writes them and the passes that read them, and 512 rows make good use of each weight that is fetched. A GPU wants fewer and
    larger kernels: 8192 columns, 2^25 logits. Raises ValueError for a target outside 0 ... V - 1.
    """
    low, high = torch.stack(targets.aminmax()).tolist() if len(targets) else (0, 0)  # the one wait for a GPU
    if low < 0 or high >= len(unembedding):
        raise ValueError(f"targets must lie in 0 ... {len(unembedding) - 1}, got {low} ... {high}")
    columns = min(len(unembedding), 8192 if hidden.is_cuda else 1024)
    rows, columns = chunk or ((2**25 if hidden.is_cuda else 2**19) // columns, columns)
    learning = torch.is_grad_enabled() and (hidden.requires_grad or unembedding.requires_grad)
    with torch.autocast(hidden.device.type, enabled=False):  # it would round the tiles to bfloat16
        return FusedLogprob.apply(hidden, unembedding, targets, temperature, rows, columns, 64 if learning else 256)


# ---- scoring answers ----


def micro_batches(lengths: list[int], budget: int, share: tuple[int, int] = (0, 1), fence: int | None = None) -> list[list[int]]:
    """Cut indices into batches of at most `budget` tokens, padding included, from the longest to the shortest. A sequence that
    is longer than the budget gets a batch of its own.

    share: (k, K) for the k-th of K processes that work side by side. All of them get the same number of batches, the fewest
    that the budget allows, and the budget is lowered as far as that number allows: the batches that are worked on at the same
    time are then about equal in tokens, and empty ones are left only where there are fewer sequences than places.

    fence: the model's rope_switch. Phi-3.5 turns all positions of longer inputs by other angles, padding counted: sequences of
    either side must not meet in a batch, or what a row scores would depend on its neighbours."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # stable: the order depends on the lengths alone

    def beyond(i: int) -> bool:
        return fence is not None and lengths[i] - 1 > fence  # the last token is not read

    def cut(budget: int) -> list[list[int]]:
        cuts: list[list[int]] = []
        for i in order:
            if cuts and (len(cuts[-1]) + 1) * lengths[cuts[-1][0]] <= budget and beyond(i) == beyond(cuts[-1][0]):
                cuts[-1].append(i)
            else:
                cuts.append([i])
        return cuts

    k, K = share
    if K == 1:
        return cut(budget)
    places = -(-len(cut(budget)) // K) * K
    low = 1
    while low < budget:  # the smallest budget that needs no more places
        middle = (low + budget) // 2
        low, budget = (low, middle) if len(cut(middle)) <= places else (middle + 1, budget)
    cuts = sorted(cut(budget), key=lambda c: -len(c) * lengths[c[0]])
    return (cuts + [[]] * (places - len(cuts)))[k::K]


def answer_hidden(model, contexts: list[list[int]], answers: list[list[int]]) -> tuple[Tensor, Tensor]:
    """One forward of right-padded context + answer rows. Returns what the head must see, and no more: the hidden states
    (sum of answer lengths, D) that predict each answer token, row after row, and those tokens (sum of answer lengths,).

    Which positions these are follows from lengths, never from token ids: a pad id may well equal the stop id.
    Without answers one token is read and nothing taken: a process that has no work takes part in the model's collectives."""
    device = model.unembedding.device
    rows = [(c + a)[:-1] for c, a in zip(contexts, answers)] or [[0]]  # the last token predicts nothing
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)  # (rows, width)
    places = [b * width + len(c) - 1 + j for b, (c, a) in enumerate(zip(contexts, answers)) for j in range(len(a))]
    hidden = model(tokens).flatten(0, 1).index_select(0, torch.tensor(places, dtype=torch.int64, device=device))
    if torch.is_autocast_enabled(device.type):  # the residual stream stays in float32 there; the head's matmul need not
        hidden = hidden.to(torch.get_autocast_dtype(device.type))
    return hidden, torch.tensor([t for a in answers for t in a], dtype=torch.int64, device=device)


@torch.no_grad()
def answer_logprobs(model, contexts: list[list[int]], answers: list[list[int]], *, micro_tokens: int = 16384,
                    share: tuple[int, int] = (0, 1)) -> list[Tensor]:
    """log P(a_j | context, a_<j) at temperature 1 for every token of every answer: one float32 (len(a),) tensor each. With a
    share (see micro_batches) only the answers of this process are scored; the others' tensors are empty. Given an answer twice,
    with and without its question, both perplexities come out of one sweep.

    Forwards run over micro-batches of at most micro_tokens tokens, sorted by length. Their answer positions are gathered until
    a full load for the head has come together, so that short answers do not make for small matmuls."""
    result: list[Tensor] = [torch.empty(0)] * len(answers)
    filled = [i for i, a in enumerate(answers) if a]  # an answer without tokens has no log-probs
    cuts = micro_batches([len(contexts[i]) + len(answers[i]) for i in filled], micro_tokens, share, model.config.rope_switch)
    load: list[tuple[list[int], Tensor, Tensor]] = []

    def flush():
        logprob, _ = fused_logprob(torch.cat([h for _, h, _ in load]), model.unembedding, torch.cat([t for _, _, t in load]))
        order = [i for indices, _, _ in load for i in indices]
        for i, piece in zip(order, logprob.split([len(answers[i]) for i in order])):
            result[i] = piece.cpu()
        load.clear()

    for cut in cuts:
        indices = [filled[k] for k in cut]
        load.append((indices, *answer_hidden(model, [contexts[i] for i in indices], [answers[i] for i in indices])))
        if sum(len(t) for _, _, t in load) >= 8192:
            flush()
    if load:
        flush()
    return result


# ---- the reward ----


def perplexity(logprobs: Tensor) -> Tensor:
    """exp(-mean log-prob) of one answer, logprobs (L,) in nats with L >= 1; raises ValueError for an empty answer."""
    if len(logprobs) == 0:
        raise ValueError("an answer without tokens has no perplexity")
    return (-logprobs.double().mean()).exp()


def self_aligned_reward(given_query: list[Tensor], alone: list[Tensor]) -> Tensor:
    """R_SA = clip((ppl(a) - ppl(a|q)) / ppl(a), -1, 1) for each answer (arXiv 2509.05489, section 3).

    given_query, alone: per answer its log-probs (len(a),) in nats, after the prompt with and without the question.
    Returns (answers,) float64 in [-1, 1], detached; an answer without tokens scores 0. Raises ValueError when an answer's two
    scorings differ in length."""
    rewards = torch.zeros(len(given_query), dtype=torch.float64)
    for i, (with_query, without) in enumerate(zip(given_query, alone, strict=True)):
        if len(with_query) != len(without):
            raise ValueError(f"answer {i} has {len(with_query)} log-probs with its question and {len(without)} without")
        if len(with_query):
            # ppl(a|q) / ppl(a) as one exponential: neither perplexity alone need be a finite number
            rewards[i] = 1 - (without.double().mean() - with_query.double().mean()).exp()
    return rewards.clamp(-1, 1).detach()


# ---- the rewards it is compared with ----

REWARDS = ("sar", "vr", "sar-only", "em", "vr+em", "o1", "er")
GROUP_REWARDS = ("o1", "er")  # they compare the answers to one question


def total_reward(name: str, r_vr: Tensor, r_sa: Tensor, given_query: list[Tensor], lengths: Tensor, *, alpha: float, n: int) -> Tensor:
    """The reward R (N,) of every answer, N = P * n, a question's n answers adjacent, by the name that --reward gives it.

    r_vr (N,) float64, 0 or 1; r_sa (N,) float64 in [-1, 1]; given_query: per answer log P(a_j | q, a_<j) in nats, at least one;
    lengths (N,) in tokens. As in the comparison of arXiv 2509.05489 and its public code every part has the weight alpha beside
    R_VR and the weight 1 alone. Raises ValueError for an unknown name, and where o1 or er has no group to compare within."""
    if name in GROUP_REWARDS and n < 2:
        raise ValueError(f"--reward {name} compares the answers to one question: it needs --n 2 or more, got {n}")
    if name == "vr":
        return r_vr
    if name == "sar":
        return r_vr + alpha * r_sa
    if name == "sar-only":
        return r_sa
    if name in ("em", "vr+em"):  # entropy minimisation: R_EM = -log ppl(a|q), confidence (arXiv 2505.15134)
        r_em = -torch.stack([perplexity(logprobs) for logprobs in given_query]).log()
        return r_em if name == "em" else r_vr + alpha * r_em
    length, correct = lengths.double().view(-1, n), r_vr.view(-1, n)  # (P, n) each
    if name == "o1":  # mean length / length - 1 (O1-Pruner, arXiv 2501.12570), the group's mean for that of the start, clipped
        return r_vr + alpha * (length.mean(1, keepdim=True) / length - 1).clamp(-1, 1).flatten()
    if name == "er":  # sigmoid of the length, standardised among the correct answers; wrong ones earn 0 (arXiv 2502.04463)
        count = correct.sum(1, keepdim=True).clamp_min(1)  # (P, 1)
        mean = (correct * length).sum(1, keepdim=True) / count
        deviation = (correct * (length - mean) ** 2).sum(1, keepdim=True).div(count).sqrt()
        z = (length - mean) / deviation.clamp_min(1e-5)  # equal lengths, or one correct answer: 0
        return r_vr * (1 - alpha * (2 * z.sigmoid() - 1).flatten())  # 2 s - 1: the mean length costs nothing (2509.05489's code)
    raise ValueError(f"there is no reward {name!r}: choose one of {', '.join(REWARDS)}")


def alpha_at(step: int, steps: int, alpha: float, alpha_end: float | None) -> float:
    """The weight at step 0 ... steps - 1: alpha throughout, or on a straight line from alpha at the first to alpha_end at the last."""
    return alpha if alpha_end is None else alpha + (alpha_end - alpha) * step / max(1, steps - 1)


# ---- the token view ----


def token_values(given_query: Tensor, alone: Tensor) -> Tensor:
    """v(a_j) = log P(a_j | q, a_<j) - log P(a_j | a_<j), (L,) in nats: what the question says about each token of one answer.
    R_SA = 1 - exp(-mean_j v(a_j)), held at -1."""
    return given_query.double() - alone.double()


def shade(value: float) -> tuple[int, int, int]:
    """Red, green, blue: white at 0 nats, orange towards +6, blue towards -6 (which the colour-blind tell apart)."""
    end = (240, 130, 0) if value > 0 else (90, 160, 255)
    return tuple(round(255 + (e - 255) * min(1.0, abs(value) / 6)) for e in end)


def visible(piece: str) -> str:
    """Text that moves no cursor and sets no colour: what a model wrote is printed as it is only where it is printable."""
    return "".join("↵" if c == "\n" else c if c.isprintable() else f"\\x{ord(c):02x}" for c in piece)


def html_page(question: str, pieces: list[str], values: list[float], summary: str) -> str:
    """One page without scripts or outside files; v stands above a token where it is half a nat or more, and shows under the pointer."""
    tokens = "".join(f'<ruby style="background:rgb{shade(v)}" title="{v:+.2f}">{html.escape(visible(p))}'
                     f'<rt>{f"{v:+.1f}" if abs(v) >= 0.5 else ""}</rt></ruby>' + "<br>" * p.count("\n") for p, v in zip(pieces, values))
    style = "body {font: 16px monospace; max-width: 60em} p {line-height: 2; white-space: pre-wrap} rt {font-size: 55%; padding: 0 1px}"
    return (f'<!doctype html><meta charset="utf-8"><title>v(a_j)</title><style>{style}</style><body>\n<p>{html.escape(question)}</p>\n'
            f"<p>{tokens}</p>\n<p>{html.escape(summary)}</p>\n")


def main(argv: list[str] | None = None) -> None:
    from data.hub import find_model
    from data.prompts import bare_prompt, encode_prompt
    from data.tokenizer import Tokenizer
    from model import GPT
    parser = argparse.ArgumentParser(description="What the question says about each token of an answer, v(a_j) in nats, and "
                                     "the R_SA that these sum to.")
    parser.add_argument("--model", help="a model folder or name, see train_sa_grpo.py (default: tiny; for --completions what its run began with)")
    parser.add_argument("--question", help="with --answer")
    parser.add_argument("--answer", help="its tokens are scored together with an end-of-text token")
    parser.add_argument("--completions", help="a run's completions.jsonl, instead of --question and --answer")
    parser.add_argument("--line", type=int, default=1, help="which of its answers, from 1 (default: 1)")
    parser.add_argument("--alone", choices=("empty", "bare"), help="the context of ppl(a) (default: empty; for --completions the run's)")
    parser.add_argument("--html", help="also write a page to this file")
    args = parser.parse_args(argv)
    if [bool(x) for x in (args.completions, args.question, args.answer)] not in ([True, False, False], [False, True, True]):
        raise ValueError("give --question and --answer, or --completions (with --line)")
    settings, recorded = {}, ""
    if args.completions:
        question, answer, recorded = read_completion(args.completions, args.line)
        config = Path(args.completions).with_name("config.json")
        settings = json.loads(config.read_text()).get("settings", {}) if config.exists() else {}
    args.model, args.alone = args.model or settings.get("model", "tiny"), args.alone or settings.get("alone", "empty")
    folder = find_model(args.model)
    tokenizer = Tokenizer.from_pretrained(folder)
    if not args.completions:
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        question, answer = args.question, tokenizer.encode(args.answer, at_start=False) + end
    model = GPT.from_pretrained(folder)
    if not all(0 <= t < len(model.unembedding) for t in answer):
        raise ValueError(f"{args.completions}, line {args.line}: a token is outside the vocabulary of {args.model}: name the run's model")
    alone = bare_prompt(tokenizer) if args.alone == "bare" else encode_prompt(tokenizer, "")
    scored = answer_logprobs(model, [encode_prompt(tokenizer, question), alone], [answer] * 2)
    values = token_values(*scored).tolist()
    # a token that only begins a character has no text yet; special tokens have none at all
    texts = ["", *[tokenizer.decode(answer[:j + 1]).rstrip("\ufffd") for j in range(len(answer))]]
    pieces = [after[len(before):] or ("<end>" if t in tokenizer.stop_ids else "·") for before, after, t in zip(texts, texts[1:], answer)]
    summary = (f"R_SA = {self_aligned_reward(*[[s] for s in scored]).item():.3f}     mean v = {sum(values) / len(values):.3f} nats over "
               f"{len(answer)} tokens, ppl(a|q) = {perplexity(scored[0]):.2f}, ppl(a) = {perplexity(scored[1]):.2f}{recorded}")
    for piece, v, given, without in zip(pieces, values, *[s.tolist() for s in scored]):
        print(f"{v:+8.2f} = {given:7.2f} - {without:7.2f}   {visible(piece)}")
    print("\n" + visible(question))
    for piece, v in zip(pieces, values):
        coloured = "\x1b[38;2;0;0;0;48;2;{};{};{}m{}\x1b[0m".format(*shade(v), visible(piece)) if sys.stdout.isatty() else visible(piece)
        print(coloured, end="\n" if "\n" in piece else "")
    print("\n\n" + summary)
    if args.html:
        with open(args.html, "w", encoding="utf-8") as file:
            file.write(html_page(question, pieces, values, summary))


def read_completion(path: str, number: int) -> tuple[str, list[int], str]:
    """Question and tokens of the answer in line `number` (from 1) of a completions.jsonl, and what the run said of it under its policy of
    then; raises ValueError where there is none."""
    with open(path, encoding="utf-8") as file:
        line = next((line for i, line in enumerate(file, 1) if i == number), None)
    if line is None:
        raise ValueError(f"{path} has no line {number}")
    try:
        row = json.loads(line)
        question, tokens = row["question"], row["tokens"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{path}, line {number} is no line of a completions.jsonl: it needs question and tokens") from None
    if not isinstance(question, str) or not isinstance(tokens, list) or not tokens or not all(type(t) is int for t in tokens):
        raise ValueError(f"{path}, line {number}: question must be text and tokens a list of token ids")
    known = all(isinstance(row.get(key), (int, float)) for key in ("r_sa", "step"))
    return question, tokens, f"; R_SA was {row['r_sa']:.3f} in step {row['step']}" if known else ""


if __name__ == "__main__":
    from runtime import user_errors
    with user_errors():
        main()
