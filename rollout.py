"""The sampler: prompts in, answers with their log-probs out.

Each prompt is read once, whatever the number of its answers. Answers then decode together in the rows ("slots") of one KV
cache: a row whose answer has ended is handed to the next in the queue before the next token is drawn, and when the queue is
empty the batch shrinks to the rows that still run.

What is sampled depends on the seed, the prompt's tokens, the sample's number and the position, and on nothing else: one
uniform number per token comes from a counter hash of these (`uniforms`), and the token is where that number falls in the
cumulative distribution (`draw`). So the number of slots, the order of the prompts and the group size do not change a sample.
"""
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model import KVCache

PREFILL_TOKENS = 4096  # prompts are read in packs of about this many tokens: enough to keep the matmuls busy
MAX_SLOTS = 512  # more rows than this add memory and no speed
BLOCK = 256  # tokens per block of the two-level cumulative sum in `draw`


@dataclass
class Rollout:
    """One answer. `tokens` include the stop token if the answer reached one (`finished`)."""
    prompt: int  # index into generate's prompts
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # under the policy itself: temperature 1, nothing filtered
    finished: bool = False


@torch.no_grad()
def generate(model, prompts: list[list[int]], *, n: int = 1, max_new_tokens: int, stop: set[int], temperature: float = 1.0,
             top_p: float = 1.0, top_k: int = 0, seed: int = 0, slots: int | None = None,
             take: Callable[[], int] | None = None, at_once: int | None = None) -> list[Rollout]:
    """Sample n answers to every prompt; prompt i's answers are adjacent, at i * n ... i * n + n - 1.

    temperature 0 is greedy decoding. top_p and top_k (0: off) restrict what is drawn, never the log-probs that are returned.
    slots: answers that decode at once; by default as many as a part of the free memory holds, at most MAX_SLOTS.
    take: where several processes share the prompts: each call gives the next number of a counter that they share. A process
    takes one whenever it has a free slot and nothing to fill it with; answers to what others took stay empty. at_once: how
    many answers a process may hold at a time, so that the first one does not take them all.
    Raises ValueError for an empty prompt, for one that leaves no room for max_new_tokens within the model's positions, for
    slots that do not fit into memory, and for logits that are not finite.
    """
    if n < 1 or max_new_tokens < 1:
        raise ValueError(f"generate needs n >= 1 and max_new_tokens >= 1, got n = {n} and max_new_tokens = {max_new_tokens}")
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(f"generate needs temperature >= 0, 0 < top_p <= 1 and top_k >= 0, got {temperature}, {top_p}, {top_k}")
    if not prompts:
        return []
    positions = model.config.max_length
    for i, prompt in enumerate(prompts):
        if not prompt or len(prompt) + max_new_tokens > positions:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens: it must have at least one, and leave room for "
                             f"{max_new_tokens} new ones within the model's {positions} positions")
    device, dtype = model.unembedding.device, model.unembedding.dtype
    room = max(map(len, prompts)) + max_new_tokens
    slots = choose_slots(model.config, room, min(len(prompts) * n, at_once or len(prompts) * n), slots, dtype, device)

    answers = [Rollout(i) for i in range(len(prompts)) for _ in range(n)]
    keys = answer_keys(prompts, n, seed)  # (answers,) one hash stream each
    queue = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # read from the end: packs of like length, long first
    waiting, left = ([], True) if take else (queue, False)  # left: there may be more to take
    cache = KVCache(model.config, slots, room, dtype=dtype, device=device)
    pack, ready = None, []  # the prompts read last: (row in pack, prompt, its next sample), taken from the end
    hidden = torch.empty(slots, model.config.width, dtype=dtype, device=device)  # of each row's last token
    running: list[int] = []  # row -> answer
    lengths: list[int] = []  # row -> tokens in the cache: cache.lengths, known without asking the device
    scratch = torch.zeros(slots, -(-model.unembedding.shape[0] // BLOCK) * BLOCK, device=device)
    bar = tqdm(desc="rollout", unit="tok", delay=3, leave=False, smoothing=0.1)

    while running or ready or waiting or left:
        # 1. hand free rows to waiting answers: their prompt's keys and values are copied in, its last hidden state too
        while len(running) < slots and (ready or waiting or left):
            while left and not ready and len(waiting) * n < slots - len(running):
                k = take()
                left = k < len(queue)
                if left:
                    waiting.insert(0, queue[-1 - k])
            if not ready and not waiting:
                break
            if not ready:
                pack, last, ready = read_prompts(model, prompts, waiting, n)
            row, prompt, sample = ready.pop()
            count = min(n - sample, slots - len(running))
            start, length = len(running), len(prompts[prompt])
            cache.copy(slice(start, start + count), pack, row, length)
            hidden[start:start + count] = last[row]
            running += range(prompt * n + sample, prompt * n + sample + count)
            lengths += [length] * count
            if sample + count < n:
                ready.append((row, prompt, sample + count))
        rows = len(running)
        if not rows:
            break

        # 2. one token for every row
        logits = next_logits(hidden[:rows], model.unembedding)  # (rows, V)
        position = np.array([len(answers[a].tokens) for a in running], dtype=np.uint64)
        uniform = torch.from_numpy(uniforms(keys[running], position)).to(device)
        token, logprob = draw(logits, uniform, temperature, top_p, top_k, scratch[:rows])
        tokens, ended = token.tolist(), []
        for row, (a, t, lp) in enumerate(zip(running, tokens, logprob.tolist())):
            answer = answers[a]
            answer.tokens.append(t)
            answer.logprobs.append(lp)
            answer.finished = t in stop
            if answer.finished or len(answer.tokens) == max_new_tokens:
                ended.append(row)
        bar.update(rows)

        # 3. close the gaps: the last running row moves into each ended one
        for row in reversed(ended):
            end = len(running) - 1
            if row != end:
                cache.copy(slice(row, row + 1), cache, end, lengths[end])
                running[row], lengths[row], tokens[row] = running[end], lengths[end], tokens[end]
            del running[end], lengths[end], tokens[end]
        rows = len(running)
        if ended:
            bar.set_postfix(live=rows, queued=len(waiting) * n + sum(n - sample for _, _, sample in ready), refresh=False)

        # 4. read the new tokens
        if rows:
            cache.longest = max(lengths)
            hidden[:rows] = model(torch.tensor(tokens, device=device)[:, None], cache)[:, 0]
            lengths = [length + 1 for length in lengths]
    bar.close()
    return answers


def next_logits(hidden: Tensor, unembedding: Tensor) -> Tensor:
    """(rows, V) float32. On a GPU bfloat16 products are also kept in float32: rounded to bfloat16, a logit of size 20 would be
    off by 0.06, and the trainer's log-probs would disagree with the sampler's."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, unembedding.T, out_dtype=torch.float32)
    return (hidden @ unembedding.T).float()


def read_prompts(model, prompts: list[list[int]], waiting: list[int], n: int):
    """Prefill the next prompts of `waiting` (taken off its end) as one right-padded pack of about PREFILL_TOKENS.

    Returns the pack's cache, the hidden state of every prompt's last token (rows, D), and what is ready to be sampled:
    (row, prompt, 0) in reverse order."""
    device = model.unembedding.device
    width = len(prompts[waiting[-1]])  # waiting is sorted by length: the first one taken is the longest
    taken = [waiting.pop() for _ in range(min(len(waiting), max(1, PREFILL_TOKENS // width)))]
    lengths = torch.tensor([len(prompts[i]) for i in taken], device=device)
    tokens = torch.tensor([prompts[i] + [0] * (width - len(prompts[i])) for i in taken], device=device)  # (rows, width)
    pack = KVCache(model.config, len(taken), width, dtype=model.unembedding.dtype, device=device)
    hidden = model(tokens, pack)  # (rows, width, D)
    last = hidden[torch.arange(len(taken), device=device), lengths - 1]  # (rows, D)
    return pack, last, [(row, prompt, 0) for row, prompt in enumerate(taken)][::-1]


def choose_slots(config, room: int, wanted: int, slots: int | None, dtype: torch.dtype, device: torch.device) -> int:
    """How many answers of `room` tokens decode at once: what is asked for if it fits, else what half the free memory holds."""
    if slots is not None and slots < 1:
        raise ValueError(f"slots must be at least 1, got {slots}")
    per_slot = 2 * config.layers * config.kv_heads * config.head_dim * room * dtype.itemsize
    if device.type == "cuda":  # what PyTorch holds and does not use is free as well
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes share it
    asked = min(wanted, slots or 1)
    if asked * per_slot > free:
        raise ValueError(f"{asked} slots of {room} tokens need {asked * per_slot / 2**30:.1f} GiB of KV cache, but only "
                         f"{free / 2**30:.1f} GiB are free: ask for fewer slots or tokens")
    return int(min(wanted, slots or max(1, min(free // 2 // per_slot, MAX_SLOTS))))


def available_memory() -> int:
    """Bytes of memory that can be had without swapping; a terabyte where the system does not tell."""
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 2**40


def answer_keys(prompts: list[list[int]], n: int, seed: int) -> np.ndarray:
    """(len(prompts) * n,) uint64: where each answer's stream of uniforms starts. A prompt that comes again in the same call
    counts its occurrences, so that it gets other answers."""
    seen: dict[tuple[int, ...], int] = {}
    keys = []
    for prompt in map(tuple, prompts):
        occurrence = seen[prompt] = seen.get(prompt, -1) + 1
        head = hashlib.blake2b(repr((seed, occurrence, prompt)).encode(), digest_size=16)
        for sample in range(n):
            digest = head.copy()
            digest.update(b"%d" % sample)
            keys.append(int.from_bytes(digest.digest()[:8], "little"))
    return np.array(keys, dtype=np.uint64)


def uniforms(keys: np.ndarray, position: np.ndarray) -> np.ndarray:
    """(rows,) float64 in [0, 1): SplitMix64 (Steele et al. 2014) of each key at its position, 53 bits of it."""
    x = keys + (position + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # wraps around, as meant
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float, top_k: int, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which `uniform` falls in each row's cumulative distribution, and its log-prob under the plain softmax.

    logits (rows, V) float32, uniform (rows,) float64, scratch (rows, V rounded up to BLOCK) float32 whose columns beyond V
    are zero. Returns token (rows,) int64 and logprob (rows,) float32.
    The cumulative sum has two levels, blocks of BLOCK tokens and then tokens, both in float64: a running float32 sum over a
    vocabulary would lose tokens of probability 1e-6, and a full float64 one costs as much as the forward of a small model.
    """
    rows, V = logits.shape
    peak = logits.max(-1, keepdim=True).values  # (rows, 1)
    weights = scratch[:, :V]
    torch.sub(logits, peak, out=weights).exp_()
    blocks = scratch.view(rows, -1, BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64)  # (rows, blocks)
    logsumexp = peak[:, 0] + sums.sum(-1).log().float()
    if not torch.isfinite(logsumexp).all():
        raise ValueError("the model's logits are not finite: its weights hold NaN or infinity, or have diverged")
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        if temperature != 1 or top_p < 1 or top_k:
            scaled = filter_logits(logits / temperature, top_p, top_k)
            torch.sub(scaled, scaled.max(-1, keepdim=True).values, out=weights).exp_()
            sums = blocks.sum(-1, dtype=torch.float64)
        cumulative = sums.cumsum(-1)  # (rows, blocks)
        target = uniform[:, None] * cumulative[:, -1:]  # (rows, 1)
        block = first_above(cumulative, target)  # (rows, 1)
        target = target - (cumulative - sums).gather(1, block)
        inside = blocks[torch.arange(rows, device=logits.device), block[:, 0]].cumsum(-1, dtype=torch.float64)  # (rows, BLOCK)
        token = (block * BLOCK + first_above(inside, target))[:, 0]
    return token, logits.gather(1, token[:, None])[:, 0] - logsumexp


def first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """(rows, 1): the first index whose cumulative sum exceeds the target. Rounding can leave a target at or beyond the last
    sum; it is then the last entry that has any weight."""
    target = torch.minimum(target, cumulative[:, -1:] * (1 - 2.0**-52)).clamp_min(0)
    return (cumulative <= target).sum(-1, keepdim=True)


def filter_logits(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """-inf for all but the top_k likeliest tokens (0: all), then for what lies outside the smallest set with mass >= top_p."""
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    drop = torch.zeros_like(ranked, dtype=torch.bool)
    if top_k:
        drop[:, top_k:] = True
    if top_p < 1:
        probs = ranked.masked_fill(drop, -torch.inf).double().softmax(-1)
        drop |= probs.cumsum(-1) - probs >= top_p  # mass of the likelier ones already suffices
    return logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)
