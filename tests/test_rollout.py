"""rollout.py: a sample depends on seed, prompt, number and position alone, and is drawn rightly."""

import copy
import math
import os

import numpy as np
import pytest
import torch
from helpers import PINNED
from test_model import random_model
from tqdm import tqdm

import rollout
from kernels import PROMPT_STEP, round_up
from rollout import answer_keys, draw, generate, uniforms
from sar import answer_logprobs


@pytest.fixture
def stop(tokenizer):
    return tokenizer.stop_ids


def tokens(rollouts):
    return [r.tokens for r in rollouts]


def largest_difference(rollouts, others):
    """Of the log-probs of the same tokens."""
    a = torch.tensor([x for r in rollouts for x in r.logprobs])
    b = torch.tensor([x for r in others for x in r.logprobs])
    return (a - b).abs().max().item()


def test_samples_do_not_depend_on_slots_order_or_group_size(model, prompts, stop, rng):
    kw = dict(max_new_tokens=40, stop=stop, seed=rng.randrange(1000))
    base = tokens(generate(model, prompts, n=4, **kw))
    for slots in (7, 64):
        assert tokens(generate(model, prompts, n=4, slots=slots, **kw)) == base
    assert tokens(generate(model, prompts[:2], n=4, slots=1, **kw)) == base[:8]
    eight = tokens(generate(model, prompts, n=8, **kw))
    assert [eight[i * 8 + k] for i in range(len(prompts)) for k in range(4)] == base
    order = list(range(len(prompts)))
    rng.shuffle(order)
    mixed = tokens(generate(model, [prompts[i] for i in order], n=4, **kw))
    for place, i in enumerate(order):
        assert mixed[place * 4 : place * 4 + 4] == base[i * 4 : i * 4 + 4]
    alone = tokens(generate(model, prompts[2:3], n=4, **kw))  # neighbours do not matter
    assert alone == base[8:12]
    assert tokens(generate(model, prompts, n=4, **kw | {"seed": kw["seed"] + 1})) != base


def test_a_prompt_given_twice_gets_two_sets(model, prompts, stop):
    twice = tokens(
        generate(model, [prompts[0], prompts[1], prompts[0]], n=4, max_new_tokens=60, stop=stop)
    )
    assert twice[:4] != twice[8:]
    assert twice[:8] == tokens(generate(model, prompts[:2], n=4, max_new_tokens=60, stop=stop))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_sampler_and_trainer_logprobs_agree(model, prompts, stop, temperature):
    kw = dict(temperature=temperature, top_k=50, slots=5)
    rollouts = generate(model, prompts, n=3, max_new_tokens=80, stop=stop, **kw)
    contexts = [prompts[r.prompt] for r in rollouts]
    scored = answer_logprobs(model, contexts, tokens(rollouts), temperature=temperature)
    sampled = torch.tensor([x for r in rollouts for x in r.logprobs])
    assert (sampled - torch.cat(scored)).abs().max() < 1e-4
    assert [r.prompt for r in rollouts] == [i for i in range(len(prompts)) for _ in range(3)]


def test_greedy_is_the_argmax_of_the_full_forward(model, prompts, stop):
    for r in generate(model, prompts, max_new_tokens=40, stop=stop, temperature=0.0):
        prompt = prompts[r.prompt]
        logits = model(torch.tensor([prompt + r.tokens])) @ model.unembedding.T
        assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == r.tokens


def test_nothing_follows_the_stop_token(model, prompts, stop):
    rollouts = generate(model, prompts, n=8, max_new_tokens=200, stop=stop)
    assert any(r.finished for r in rollouts)
    for r in rollouts:
        assert r.finished == (r.tokens[-1] in stop)
        assert not set(r.tokens[:-1]) & stop
        assert len(r.tokens) == len(r.logprobs) <= 200 and (r.finished or len(r.tokens) == 200)


def test_stop_token_first_and_several_stop_ids(model, prompts, stop):
    kw = dict(max_new_tokens=5, temperature=0.0)
    firsts = {r.tokens[0] for r in generate(model, prompts, stop=set(), **kw)}
    for r in generate(model, prompts, stop=firsts | stop, **kw):
        assert r.finished and len(r.tokens) == 1
    for r in generate(model, prompts, n=2, max_new_tokens=1, stop=set()):
        assert len(r.tokens) == 1


def test_edges_and_bad_input(model, prompts, stop):
    kw = dict(max_new_tokens=8, stop=stop)
    assert generate(model, [], **kw) == []
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        generate(model, [prompts[0], []], **kw)
    with pytest.raises(ValueError, match="prompt 1 has 1020 tokens"):
        generate(model, [prompts[0], [5] * 1020], **kw)
    with pytest.raises(ValueError, match="KV cache"):
        generate(model, prompts * 1000, n=1000, max_new_tokens=900, stop=stop, slots=10**7)
    for wrong in (dict(n=0), dict(max_new_tokens=0), dict(slots=0)):
        with pytest.raises(ValueError, match="at least 1"):
            generate(model, prompts, **kw | wrong)
    for wrong in (dict(temperature=-1.0), dict(top_p=0.0), dict(top_p=1.1), dict(top_k=-1)):
        with pytest.raises(ValueError, match="temperature, top_p and top_k"):
            generate(model, prompts, **kw | wrong)
    with torch.no_grad():
        model.norm.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        generate(model, prompts, **kw)


@pytest.mark.parametrize(
    "case, long_rope",
    (
        ("llama, scaled rope, untied", None),
        ("qwen2.5", None),
        ("qwen3", None),
        ("phi-3.5, long", False),
        ("phi-3.5, long", True),
        ("phi-3, sliding window", None),
        ("gemma 3", None),
    ),
)
def test_every_family_past_its_window_and_rope_switch(case, long_rope, rng):
    """Against the full forward in float64. Gemma's and Phi's window is 12 tokens here; Phi-3.5's
    short factors are made for 32."""
    model = random_model(case, torch.float64)
    model.long_rope = long_rope
    prompts = [[rng.randrange(40) for _ in range(length)] for length in (1, 11, 13, 31, 32, 33, 50)]
    for kw in ({"temperature": 0.0}, {"seed": rng.randrange(1000), "slots": 3}):
        for r in generate(model, prompts, n=2, max_new_tokens=24, stop={7}, **kw):
            text = torch.tensor(prompts[r.prompt] + r.tokens)
            with torch.no_grad():
                logits = model(text[None])[0] @ model.unembedding.T
            logits = logits[len(prompts[r.prompt]) - 1 : -1]
            if "slots" not in kw:
                assert logits.argmax(-1).tolist() == r.tokens
            want = logits.log_softmax(-1).gather(1, torch.tensor(r.tokens)[:, None])[:, 0]
            assert (torch.tensor(r.logprobs) - want).abs().max() < 1e-5


@pytest.mark.parametrize("case", ("qwen2.5", "gemma 3"))
def test_float32_samples_are_the_same_to_the_last_bit(case, rng):
    model = random_model(case)
    prompts = [[rng.randrange(40) for _ in range(length)] for length in (31, 5, 70, 32, 1, 33, 64)]
    kw = dict(max_new_tokens=24, stop={5, 7}, seed=rng.randrange(1000))
    every = generate(model, prompts, n=3, **kw)
    for slots in (1, 7):
        assert generate(model, prompts, n=3, slots=slots, **kw) == every
    for i, prompt in enumerate(prompts):
        for a, b in zip(generate(model, [prompt], n=3, **kw), every[3 * i : 3 * i + 3]):
            assert (a.tokens, a.logprobs) == (b.tokens, b.logprobs)


def test_prompts_are_read_once_and_no_row_idles(model, prompts, stop, monkeypatch):
    """What the model computes: every prompt once, padded; then only rows that run."""
    asked, forward = [], model.forward

    def watch(tokens, cache=None):
        hidden = forward(tokens, cache)
        asked.append(tuple(tokens.shape))
        return hidden

    monkeypatch.setattr(model, "forward", watch)
    answers = generate(model, prompts, n=6, max_new_tokens=120, stop=stop, slots=20)
    reads = [B * T for B, T in asked if T > 1]
    rows = [B for B, T in asked if T == 1]
    assert sum(reads) == sum(round_up(len(p), PROMPT_STEP) for p in prompts)
    assert sum(rows) == sum(len(a.tokens) - 1 for a in answers)  # the first: from the prefill
    assert rows[0] == 20
    assert rows == sorted(rows, reverse=True)  # full until the queue is empty, then shrinking


def test_weights_in_onednn_layout(model, prompts, stop, rng):
    """Rows do not depend on each other (to the last bit with the pinned PyTorch; 2.11 rounds some),
    the results are those of the plain weights, and a change of these is seen."""
    same = torch.equal if PINNED else lambda a, b: (a - b).abs().max() < 1e-4
    hidden = torch.randn(70, model.config.width)
    tokens = torch.randint(0, model.config.vocab_size, (70, 12))
    with torch.no_grad():
        plain = model(tokens)
        with model.packed():
            logits, packed = model.logits(hidden), model(tokens)
            for rows in (1, 2, 3, 17, 64):
                assert same(model.logits(hidden[:rows]), logits[:rows])
                assert same(model(tokens[:rows]), packed[:rows])
        assert torch.equal(model(tokens), plain)
    assert (logits - hidden.double() @ model.unembedding.double().T).abs().max() < 1e-4
    assert (packed - plain).abs().max() < 1e-4
    before = generate(model, prompts, max_new_tokens=30, stop=stop, seed=3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.1 * rng.random())
    assert generate(model, prompts, max_new_tokens=30, stop=stop, seed=3) != before


def test_available_memory_of_other_systems(monkeypatch, tmp_path):
    """Linux tells what is free; macOS only what there is; Windows nothing."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    asked = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 16384}
    monkeypatch.setattr(os, "sysconf", asked.get, raising=False)
    real, answer = open, "MemTotal: 99 kB\nMemAvailable:   50 kB\n"
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/proc/meminfo" and bool(answer))
    (tmp_path / "meminfo").write_text(answer)
    monkeypatch.setattr("builtins.open", lambda path, **kw: real(tmp_path / "meminfo", **kw))
    assert rollout.available_memory() == 50 * 1024
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert rollout.available_memory() == 25 * 1024
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\n")  # as in WSL 1
    assert rollout.available_memory() == 1000 * 16384 // 4
    answer = ""
    assert rollout.available_memory() == 1000 * 16384 // 4
    monkeypatch.delattr(os, "sysconf")
    assert rollout.available_memory() == 2**31


def test_steps_of_rounded_sizes(model, prompts, stop, monkeypatch):
    """The sizes of CUDA graphs, here on a CPU: more rows and a longer span change nothing."""
    kw = dict(n=3, max_new_tokens=150, stop=stop, seed=5)
    want = generate(model, prompts, **kw)
    asked, step_size = [], rollout.step_size

    def rounded(rows, length, use_graphs):
        asked.append((rows, length))
        return step_size(rows, length, True)

    monkeypatch.setattr(rollout, "step_size", rounded)
    for slots in (5, None):
        got = generate(model, prompts, slots=slots, **kw)
        assert tokens(got) == tokens(want)
        assert largest_difference(got, want) < 1e-4
    assert len(asked) > 150
    sizes = [step_size(rows, 129, True) for rows in range(1, 14)]
    assert sizes == [(r, 256) for r in (1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16)]


@pytest.mark.parametrize("works", (True, False))
def test_replay_and_failure_of_graphs(works, model, prompts, stop, monkeypatch, capsys):
    """On a CPU: `capture` is given a graph that computes its step, or fails as it does there."""
    kw = dict(n=3, max_new_tokens=40, stop=stop, seed=5)
    want = generate(model, prompts, **kw)
    decoders, replays = [], []

    class Graph:
        def __init__(self, decoder, size):
            self.step = lambda: decoder.step(model, *size)
            self.drawn = torch.zeros(size[0], 2)

        def replay(self):
            replays.append(1)
            self.drawn.copy_(self.step())

    def decoder_with_graphs(*args):
        decoders.append(Decoder(*args))
        decoders[-1].use_graphs = True
        return decoders[-1]

    def capture(decoder, model, *size):
        graph = Graph(decoder, size)
        decoder.graphs[size] = graph, graph.drawn

    def fail(*args):
        raise RuntimeError("cannot capture")

    Decoder, step_size = rollout.Decoder, rollout.step_size
    monkeypatch.setattr(rollout, "step_size", lambda rows, length, _: step_size(rows, length, True))
    monkeypatch.setattr(rollout, "Decoder", decoder_with_graphs)
    if works:
        monkeypatch.setattr(Decoder, "capture", capture)
    else:
        monkeypatch.setattr(torch.cuda, "CUDAGraph", fail)
    got = generate(model, prompts, **kw)
    assert tokens(got) == tokens(want)
    assert largest_difference(got, want) < 1e-4
    assert bool(replays) == bool(decoders[0].graphs) == works
    assert ("no CUDA graphs, slower: cannot capture" in capsys.readouterr().err) != works


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs(model, prompts, stop, capsys):
    """As on the CPU, also after the weights have changed in place; float32 for exact tokens."""
    on_gpu = copy.deepcopy(model).cuda()
    kw = dict(n=3, max_new_tokens=150, stop=stop, seed=5)
    for change in (1.0, 1.02):
        with torch.no_grad():
            for p in [*model.parameters(), *on_gpu.parameters()]:
                p.mul_(change)
        got = generate(on_gpu, prompts, **kw)
        assert rollout.decoders[on_gpu].graphs
        want = generate(model, prompts, **kw)
        same = sum(g.tokens == w.tokens for g, w in zip(got, want))
        assert same >= 0.9 * len(want)  # other matmul kernels round differently
    assert "no CUDA graphs" not in capsys.readouterr().err


def test_prompts_of_very_different_lengths(model, stop, rng):
    prompts = [[rng.randrange(60) for _ in range(length)] for length in (700, 1, 90, 2, 350)]
    kw = dict(n=2, max_new_tokens=20, stop=stop)
    together = tokens(generate(model, prompts, **kw))
    for i, prompt in enumerate(prompts):
        assert tokens(generate(model, [prompt], **kw)) == together[2 * i : 2 * i + 2]


def test_bar_shows_live_slots_and_speed(model, prompts, stop, monkeypatch, capsys):
    monkeypatch.setattr(rollout, "tqdm", lambda **kw: tqdm(**kw | {"delay": 0, "mininterval": 0}))
    generate(model, prompts, n=2, max_new_tokens=30, stop=stop, slots=6)
    shown = capsys.readouterr().err
    assert "tok/s" in shown and "live=6" in shown and "queued=" in shown


# ---- the draw ----


def test_uniforms_reach_the_draw_in_float64(monkeypatch):
    """All logits are 0, so token k is drawn between k / 40 and (k + 1) / 40. A uniform just below
    1 / 2 would round to 1 / 2 in float32 and draw the next token. An answer's first token and all
    others take different ways to `draw`."""
    model = random_model("qwen2.5")
    assert model.config.vocab_size == 40
    with torch.no_grad():
        model.norm.zero_()
    ways = []

    def half(keys, position):
        ways.append("first" if np.isscalar(position) else "later")
        below = (keys + position) % 2
        return 0.5 - below * 2.0**-40

    monkeypatch.setattr(rollout, "uniforms", half)
    keys = answer_keys([[1], [2]], 4, seed=3)
    assert len(set((keys % 2).tolist())) == 2
    for r, key in zip(generate(model, [[1], [2]], n=4, max_new_tokens=6, stop=set(), seed=3), keys):
        assert r.tokens == [20 - (int(key) + position) % 2 for position in range(6)]
    assert set(ways) == {"first", "later"}


def drawn(logits, count, **filters):
    """Token counts of `count` draws from one row of logits, with the sampler's own uniforms."""
    settings = dict(temperature=1.0, top_p=1.0, top_k=0) | filters
    keys = answer_keys([[1, 2, 3]], 1, seed=7).repeat(count)
    uniform = torch.from_numpy(uniforms(keys, np.arange(count, dtype=np.uint64)))
    token, logprob = draw(logits.expand(count, -1), uniform, **settings).unbind(1)
    token = token.long()
    scaled = logits.double() / settings["temperature"]
    want = scaled.log_softmax(-1)[token].float()  # never of the filtered distribution
    torch.testing.assert_close(logprob, want, rtol=0, atol=2e-6)
    return torch.bincount(token, minlength=len(logits))


def assert_follows(counts, probs):
    """Pearson's chi-square: a right sampler stays within five deviations of its mean."""
    assert counts[probs == 0].sum() == 0
    counts, probs = counts[probs > 0].double(), probs[probs > 0]
    expected = probs * counts.sum()
    freedom = len(probs) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.0},
        {"top_k": 5},
        {"top_p": 0.8},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9},
    ],
)
def test_draws_follow_the_distribution(filters):
    logits = torch.randn(300, generator=torch.Generator().manual_seed(3)) * 1.5
    p = (logits.double() / filters.get("temperature", 1.0)).softmax(-1)
    ranked, order = p.sort(descending=True)
    if "top_k" in filters:
        ranked[filters["top_k"] :] = 0
        ranked /= ranked.sum()
    if "top_p" in filters:
        ranked[int((ranked.cumsum(0) < filters["top_p"]).sum()) + 1 :] = 0
    p = torch.zeros_like(p).scatter(0, order, ranked / ranked.sum())
    assert_follows(drawn(logits, 100_000, **filters), p)


def test_tokens_of_probability_one_in_a_million_are_drawn():
    """1,000 rare tokens of 1e-6 each behind four common ones: about a thousandth of the draws,
    spread evenly."""
    logits = torch.cat([torch.full((4,), 0.999 / 4), torch.full((1000,), 1e-6)]).log()
    counts = drawn(logits, 100_000)
    assert abs(counts[4:].sum().item() - 100) < 5 * 10
    assert counts[4:].max() <= 3
    last = torch.tensor([0.9999995], dtype=torch.float64)  # the far end is reached
    assert draw(logits[None], last, 1.0, 1.0, 0)[0, 0] >= 1000


def test_a_zero_weight_is_never_drawn():
    """Whatever the uniform, also where it falls on a boundary or rounds beyond the end."""
    logits = torch.full((6, 600), -torch.inf)
    logits[:, [0, 255, 257, 599]] = 0.0
    logits[3:, [0, 599]] = -torch.inf
    uniform = torch.tensor([0.0, 0.5, 1 - 2.0**-53] * 2, dtype=torch.float64)
    token = draw(logits, uniform, 1.0, 1.0, 0)[:, 0]
    assert token.tolist() == [0, 257, 599, 255, 257, 257]


def test_uniforms_are_uniform_and_independent_of_their_neighbours():
    keys = answer_keys([[1], [2], [1]], 3, seed=0)
    assert len(set(keys.tolist())) == 9
    assert answer_keys([[2]], 3, seed=0).tolist() == keys[3:6].tolist()
    u = uniforms(np.repeat(keys, 20000), np.tile(np.arange(20000, dtype=np.uint64), 9))
    assert 0 <= u.min() and u.max() < 1
    assert (u != u.astype(np.float32)).mean() > 0.99  # more than 24 bits
    counts = np.histogram(u, 100, (0, 1))[0]
    assert ((counts - 1800) ** 2 / 1800).sum() < 99 + 5 * math.sqrt(198)
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.02
