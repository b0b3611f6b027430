"""The sampler: prompts in, answers with their log-probs out.

Each prompt is prefilled once. Its answers then decode, each in a row ("slot") of one KV cache. When
an answer ends, the next one takes its row at once. When none is left, the batch shrinks.

A sample depends on the seed, its prompt's tokens, its number among the answers to that prompt, and
the position. It does not depend on the slots, the other prompts or n: `uniforms` hashes these four
to a number, and `draw` looks up where that falls in the cumulative distribution. In float32 on a
CPU with oneDNN this is exact, because a row's logits do not depend on the other rows (kernels.py).
Elsewhere rounding may move a boundary across the number, and so change a token. Phi-3.5 needs its
rope factors chosen once for this (model.long_rope).
"""
import contextlib
import hashlib
import math
import os
import sys
import weakref
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.files import one_line
from kernels import ATTENTION_STEP, PROMPT_STEP, round_up
from model import KVCache

PREFILL_TOKENS = 4096  # tokens in a prefill batch (or one longer prompt): keeps the matmuls busy
MAX_SLOTS = 512  # more rows than this add memory and no speed
BLOCK = 256  # tokens per block of the two-level cumulative sum in `draw`
GRAPH_STEP = 128  # tokens: a CUDA graph attends to a multiple of this


@dataclass
class Rollout:
    """One answer. `finished`: it ends with a stop token, which is in `tokens`."""
    prompt: int  # index into generate's prompts
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # at the temperature, without a filter
    finished: bool = False


@torch.no_grad()
def generate(model, prompts: list[list[int]], *, n: int = 1, max_new_tokens: int, stop: set[int],
             temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0,
             slots: int | None = None) -> list[Rollout]:
    """Sample n answers to every prompt; those of prompt i are at i * n ... i * n + n - 1.

    temperature 0 is greedy decoding, with log-probs at temperature 1. top_p and top_k (0: off)
    restrict what is drawn, never the log-probs that are returned. slots: how many answers decode
    at once; by default as many as a part of the free memory holds, at most MAX_SLOTS.
    Raises ValueError for an empty prompt, for one that leaves no room for max_new_tokens within the
    model's positions, for slots that do not fit into memory, and for logits that are not finite.
    """
    sizes = n, max_new_tokens, 1 if slots is None else slots
    if min(sizes) < 1:
        raise ValueError(f"n, max_new_tokens and slots must be at least 1, not {sizes}")
    filters = temperature, top_p, top_k
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError("temperature, top_p and top_k must be in [0, inf), (0, 1] and [0, inf), "
                         f"not {filters}")
    longest = model.config.max_length - max_new_tokens
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= longest:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens: it must have 1 to {longest}, "
                             f"so that {max_new_tokens} new ones fit into the model's positions")
    if not prompts:
        return []
    row_length = max(map(len, prompts)) + max_new_tokens
    bar = tqdm(desc="rollout", unit="tok", delay=3, leave=False, smoothing=0.1)

    with bar, packed_if_it_fits(model):
        decoder, slots = decoder_for(model, row_length, len(prompts) * n, slots)
        cache = decoder.cache
        answers = Answers(prompts, n, max_new_tokens, stop, seed, bar)
        # Popped from the end, so long prompts are prefilled first, in batches of equal width.
        unread = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        startable = []  # [(row of `prefilled`, answer)]
        running = []  # row of `cache` -> answer
        while unread or startable or running:
            # 1. Fill the free rows. An answer's first token comes from its prompt's last logits.
            #    If it goes on, it gets a copy of the prompt's keys and values in a row of its own.
            while len(running) < slots and (unread or startable):
                if not startable:
                    prefilled, logits, startable = prefill(model, prompts, unread, n)
                free = slots - len(running)
                started, startable = startable[:free], startable[free:]
                rows, new = map(list, zip(*started))
                uniform = torch.from_numpy(uniforms(answers.keys[new], 0)).to(logits.device)
                answers.record(new, draw(logits[rows], uniform, *filters))
                for row, a in started:
                    if a not in answers.ended:
                        free_row = slice(len(running), len(running) + 1)
                        cache.copy(free_row, prefilled, row, answers.cached[a])
                        running.append(a)
            queued = len(startable) + n * len(unread)
            bar.set_postfix(live=len(running), queued=queued, refresh=False)
            if not running:
                break

            # 2. Draw one token for every row.
            answers.record(running, decoder(model, answers.inputs(running), filters))

            # 3. Close the gaps: the last row moves into each row whose answer has ended.
            for row in reversed(range(len(running))):
                if running[row] in answers.ended:
                    last = running.pop()
                    if row < len(running):
                        gap = slice(row, row + 1)
                        cache.copy(gap, cache, len(running), answers.cached[last])
                        running[row] = last
    return answers.rollouts


class Answers:
    """The rollouts of one call. Answer a is rollouts[a]; `some` is a list of such indices."""
    def __init__(self, prompts, n: int, max_new_tokens: int, stop: set[int], seed: int, bar: tqdm):
        self.max_new_tokens, self.stop, self.bar = max_new_tokens, stop, bar
        self.rollouts = [Rollout(i) for i in range(len(prompts)) for _ in range(n)]
        self.keys = answer_keys(prompts, n, seed)
        self.cached = np.repeat([len(p) - 1 for p in prompts], n)  # in the cache: not the newest
        self.ended = set()

    def inputs(self, some: list[int]) -> np.ndarray:
        """(rows, 3) float64: newest token, tokens in the cache, uniform number."""
        rollouts = [self.rollouts[a] for a in some]
        newest = [rollout.tokens[-1] for rollout in rollouts]
        positions = np.array([len(rollout.tokens) for rollout in rollouts], dtype=np.uint64)
        uniform = uniforms(self.keys[some], positions)
        return np.stack([newest, self.cached[some], uniform], 1)

    def record(self, some: list[int], drawn: Tensor):
        """Append to each what was drawn, (rows, 2): token and log-prob."""
        for a, (token, logprob) in zip(some, drawn.tolist()):
            if math.isnan(logprob):
                raise ValueError("logits are not finite: the weights hold NaN or have diverged")
            rollout = self.rollouts[a]
            rollout.tokens.append(int(token))
            rollout.logprobs.append(logprob)
            rollout.finished = token in self.stop
            if rollout.finished or len(rollout.tokens) == self.max_new_tokens:
                self.ended.add(a)
            self.cached[a] += 1
        self.bar.update(len(some))


def prefill(model, prompts: list[list[int]], unread: list[int], n: int):
    """Prefill the next prompts of `unread`, taken off its end, as one batch of equal width.

    Its width depends on the prompt alone, since attention rounds differently at other widths.
    Returns the cache, the logits after each prompt (rows, V), and the answers to start from them:
    [(row, answer)].
    """
    def width_of(i: int) -> int:
        return round_up(len(prompts[i]), PROMPT_STEP)

    batch = [unread.pop()]
    width = width_of(batch[0])
    while unread and width_of(unread[-1]) == width and (len(batch) + 1) * width <= PREFILL_TOKENS:
        batch.append(unread.pop())
    padded = [prompts[i] + [0] * (width - len(prompts[i])) for i in batch]
    weight = model.unembedding
    cache = KVCache(model.config, len(batch), width, dtype=weight.dtype, device=weight.device)
    hidden = model(torch.tensor(padded, device=weight.device), cache)  # (rows, width, D)
    rows, ends = list(range(len(batch))), [len(prompts[i]) - 1 for i in batch]
    startable = [(row, batch[row] * n + k) for row in rows for k in range(n)]
    return cache, model.logits(hidden[rows, ends]), startable


class Decoder:
    """Draws one token for every running row, over tensors that stay where they are.

    inputs (slots, 3): a row's newest token, the tokens in its cache before that, its uniform
    number. float64 holds all three exactly, so a step needs one transfer. Its result depends on
    inputs and cache alone: spare rows are not read, and a longer span is masked.

    On a GPU a step is about a thousand kernels of a few microseconds, more than Python can launch
    in time. So rows and span are rounded up to a few sizes (`step_size`). Each is captured as a
    CUDA graph when it first occurs, and replayed from then on.
    """
    def __init__(self, model, max_rows: int, slots: int, row_length: int, addresses: list):
        weight, device = model.unembedding, model.unembedding.device
        self.max_rows, self.use_graphs = max_rows, weight.is_cuda
        self.slots, length = step_size(slots, row_length, self.use_graphs)
        self.cache = KVCache(model.config, self.slots, length, dtype=weight.dtype, device=device)
        self.inputs = torch.zeros(self.slots, 3, dtype=torch.float64, device=device)
        self.addresses = addresses
        self.graphs = {}  # (rows, span, filters) -> CUDA graph, its result
        self.pool = torch.cuda.graph_pool_handle() if self.use_graphs else None

    def __call__(self, model, inputs, filters):
        """inputs (rows, 3) -> (rows, 2), as `draw`. filters: temperature, top_p, top_k."""
        running, longest = len(inputs), int(inputs[:, 1].max())
        rows, span = step_size(running, longest + 1, self.use_graphs)
        padded = np.pad(inputs, ((0, rows - running), (0, 0)))  # spare rows: token 0 at position 0
        self.inputs[:rows] = torch.from_numpy(padded)
        size = rows, span, filters
        if size in self.graphs:
            graph, drawn = self.graphs[size]
            graph.replay()
        else:
            drawn = self.step(model, *size)
            if self.use_graphs:
                self.capture(model, *size)
        return drawn[:running]

    def step(self, model, rows: int, span: int, filters: tuple) -> Tensor:
        """inputs[:rows] -> (rows, 2). A row masks the positions of `span` beyond its own."""
        token, length, uniform = self.inputs[:rows].unbind(1)
        self.cache.lengths[:rows] = length
        self.cache.longest = span - 1
        hidden = model(token.long()[:, None], self.cache)[:, 0]  # (rows, D)
        return draw(model.logits(hidden), uniform, *filters)

    def capture(self, model, rows: int, span: int, filters: tuple):
        """Record a step without running it. It must have run before, so that the libraries have
        chosen their kernels. On failure print a note; this decoder goes on without graphs."""
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self.inputs.device), torch.cuda.graph(graph, self.pool):
                drawn = self.step(model, rows, span, filters)
        except RuntimeError as error:
            print(f"note: no CUDA graphs, slower: {one_line(error)}", file=sys.stderr)
            self.use_graphs, self.graphs = False, {}
        else:
            self.graphs[rows, span, filters] = graph, drawn


def step_size(rows: int, length: int, use_graphs: bool) -> tuple[int, int]:
    """The rows and the span that a step computes. For graphs rows become 2^k or 3 * 2^k: spare rows
    cost little, because the weights are read once for all."""
    if not use_graphs:
        return rows, round_up(length, ATTENTION_STEP)
    power = 2 ** (rows - 1).bit_length()
    between = power * 3 // 4
    return between if rows <= between else power, round_up(length, GRAPH_STEP)


decoders = weakref.WeakKeyDictionary()  # model -> its Decoder


def decoder_for(model, row_length: int, rows: int, slots: int | None) -> tuple[Decoder, int]:
    """A decoder for `rows` answers of up to `row_length` tokens, and the slots of it to use.

    On a GPU the model keeps it, with its graphs, for the next call. Graphs hold addresses, those of
    the weights too. These stay valid while training writes in place, as optimizers do.
    """
    max_rows = min(rows, slots or MAX_SLOTS)
    addresses = [p.data_ptr() for p in model.parameters()]
    decoder = decoders.pop(model, None)
    fits = decoder and max_rows <= decoder.max_rows and row_length <= decoder.cache.max_length
    if not fits or decoder.addresses != addresses:
        decoder = None  # frees its memory before the next one is allocated
        count = choose_slots(model, row_length, max_rows, slots)
        decoder = Decoder(model, max_rows, count, row_length, addresses)
    if model.unembedding.is_cuda:
        decoders[model] = decoder
    return decoder, min(max_rows, decoder.slots)


def choose_slots(model, row_length: int, max_rows: int, slots: int | None) -> int:
    """How many rows decode at once: max_rows if `slots` were asked for, else what half of the free
    memory holds; a quarter on a GPU, where the decoder stays."""
    c, weight = model.config, model.unembedding
    cached = 2 * c.layers * c.kv_heads * c.head_dim * row_length * weight.itemsize
    row = cached + 16 * c.vocab_size  # bytes, with the logits and their temporaries
    free, part = available_memory(), 2
    if weight.is_cuda:
        torch.cuda.empty_cache()  # of what PyTorch holds and does not use
        free, part = torch.cuda.mem_get_info(weight.device)[0], 4
    needed = max_rows if slots else 1
    if needed * row > free:
        raise ValueError(f"the KV cache of {needed} slots of {row_length} tokens does not fit into "
                         f"{free / 2**30:.1f} GiB of free memory: ask for fewer slots or tokens")
    return max_rows if slots else max(1, min(max_rows, free // part // row))


def available_memory() -> int:
    """Bytes free without swapping, per process of this machine; where the system does not tell:
    half of its memory (macOS), or 4 GiB (Windows)."""
    fields, free = {}, 2**32
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":") for line in lines)
    if "MemAvailable" in fields:
        free = int(fields["MemAvailable"].split()[0]) * 1024
    elif hasattr(os, "sysconf"):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def packed_if_it_fits(model):
    """model.packed(), unless the copies would take more than half of the free memory."""
    copies = sum(p.nbytes for p in model.parameters())
    return model.packed() if copies < available_memory() // 2 else contextlib.nullcontext()


def answer_keys(prompts: list[list[int]], n: int, seed: int) -> np.ndarray:
    """(len(prompts) * n,) uint64: the key of each answer's stream of uniforms. It counts a prompt's
    occurrences in the call, so that a repeated one gets new answers."""
    seen, digests = Counter(), []
    for prompt in map(tuple, prompts):
        text = repr((seed, seen[prompt], prompt))
        seen[prompt] += 1
        for sample in range(n):
            digest = hashlib.blake2b(f"{text}{sample}".encode(), digest_size=16).digest()
            digests.append(digest[:8])
    return np.frombuffer(b"".join(digests), dtype="<u8")


def uniforms(keys: np.ndarray, position: np.ndarray | int) -> np.ndarray:
    """(rows,) float64 in [0, 1): 53 bits of SplitMix64 (Steele et al. 2014) of key and position."""
    x = keys + (position + 1) * 0x9E3779B97F4A7C15  # meant to overflow
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return ((x ^ (x >> 31)) >> 11).astype(np.float64) * 2.0**-53


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """The token at which `uniform` falls in each row's cumulative distribution, and its log-prob.

    logits (rows, V) float32, uniform (rows,) float64 -> (rows, 2) float32: token (exact: V is below
    2^24) and its log-prob under the softmax of logits / temperature, for temperature 0 of logits.
    The cumulative sum has two levels, blocks of BLOCK tokens, then tokens, both float64. A single
    one would in float32 lose tokens of probability 1e-6, and in float64 cost as much as a forward.
    """
    if temperature not in (0, 1):
        logits = logits / temperature
    peak = logits.amax(-1, True)  # (rows, 1)
    weights, sums = exp_in_blocks(logits, peak)
    logsumexp = peak + sums.sum(-1, True).log().float()  # (rows, 1)
    if temperature == 0:
        token = logits.argmax(-1, True)
    else:
        if top_p < 1 or top_k:
            weights, sums = exp_in_blocks(filter_logits(logits, top_p, top_k), peak)
        cumulative = sums.cumsum(-1)  # (rows, blocks)
        target = uniform[:, None] * cumulative[:, -1:]  # (rows, 1)
        block = first_above(cumulative, target)  # (rows, 1)
        target = target - (cumulative - sums).gather(1, block)
        inside = weights.take_along_dim(block[:, :, None], 1)[:, 0]  # (rows, BLOCK)
        inside = inside.cumsum(-1, dtype=torch.float64)
        token = block * BLOCK + first_above(inside, target)  # (rows, 1)
    return torch.cat([token, logits.gather(1, token) - logsumexp], 1)


def exp_in_blocks(logits: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logits - peak), (rows, V) -> (rows, blocks, BLOCK), and each block's sum in float64."""
    rows, V = logits.shape
    weights = logits.new_zeros(rows, round_up(V, BLOCK))
    torch.sub(logits, peak, out=weights[:, :V]).exp_()
    blocks = weights.view(rows, -1, BLOCK)
    return blocks, blocks.sum(-1, dtype=torch.float64)


def first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """(rows, 1): the first index whose cumulative sum exceeds the target, or the last one with any
    weight if rounding left the target at or beyond the last sum."""
    target = torch.minimum(target, cumulative[:, -1:] * (1 - 2.0**-52)).clamp_min(0)
    return (cumulative <= target).sum(-1, keepdim=True)


def filter_logits(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """-inf for all but the top_k likeliest tokens (0: all), then for all outside the smallest set
    with mass >= top_p."""
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ranked[:, top_k:] = -torch.inf
    if top_p < 1:
        probs = ranked.double().softmax(-1)
        enough = probs.cumsum(-1) - probs >= top_p  # the likelier tokens have this mass
        ranked.masked_fill_(enough, -torch.inf)
    return torch.empty_like(logits).scatter(1, order, ranked)
