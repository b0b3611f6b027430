"""model.py and kernels.py: five families against transformers, KV cache, files, matmuls."""

import copy
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from make_model_vectors import CASES, LENGTH, VECTORS, tokens, weights
from safetensors.torch import load_file, save_file

import kernels
import model as model_module
from model import GPT, GPTConfig, KVCache

STORED = json.loads((VECTORS / "cases.json").read_text())
LONGROPE = "phi-3.5, long"  # rope's long factors are for sequences of more than SWITCH tokens
SWITCH = STORED[LONGROPE]["config"]["original_max_position_embeddings"]
# Every architecture. Phi-3.5 under either choice of rope factors: without one, the tokens in a
# cache keep the factors that they were read with.
CHOICES = [(case, None) for case in STORED if not case.startswith("phi-3.5")]
CHOICES += [(LONGROPE, False), (LONGROPE, True)]
every_architecture = pytest.mark.parametrize("case, long_rope", CHOICES)
REAL = ("smollm2-135m", "qwen2.5-coder-0.5b", "gemma3-270m")


@pytest.fixture(autouse=True)
def fresh(rng):
    """Fresh random inputs; the seed is printed when a test fails."""


def write_folder(folder: Path, case: str) -> Path:
    """A model folder as transformers writes it, of a stored case."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(STORED[case]["config"]))
    save_file(
        weights(STORED[case]["shapes"], STORED[case]["seed"]),
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


def random_model(case: str, dtype=torch.float32, long_rope=None, **changes) -> GPT:
    """A stored case's architecture with fresh weights, norms and biases included."""
    model = GPT(GPTConfig.from_hf(STORED[case]["config"] | changes)).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm"):
                p += 0.3 * torch.randn_like(p)
            else:
                p.normal_(std=0.5 if p.dim() == 1 else 1.5 * p.shape[-1] ** -0.5)
    model.long_rope = long_rope
    return model


def share_of_range(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, as a share of the range of what should have come out."""
    difference = (ours.double() - theirs.double()).abs().max()
    return (difference / (theirs.max() - theirs.min())).item()


@torch.no_grad()
def logits(model: GPT, ids: torch.Tensor, cache=None) -> torch.Tensor:
    return model(ids, cache) @ model.unembedding.T


# Families against vectors that transformers computed --------------------------------------------


@pytest.mark.parametrize("case", STORED)
def test_stored_vectors(case, tmp_path):
    model = GPT.from_pretrained(write_folder(tmp_path, case))
    theirs = load_file(VECTORS / "logits.safetensors")[case]
    assert share_of_range(logits(model, tokens(STORED[case]["seed"])), theirs) < 1e-5


@pytest.mark.parametrize("case", STORED)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_saved_as_transformers_saves(case, dtype, tmp_path):
    model = GPT.from_pretrained(write_folder(tmp_path / "in", case), dtype=dtype)
    model.save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out/model.safetensors")
    given = load_file(tmp_path / "in/model.safetensors")
    assert saved.keys() == given.keys()
    assert all(torch.equal(saved[name], given[name].to(dtype)) for name in given)
    config = STORED[case]["config"] | {"dtype": str(dtype).removeprefix("torch.")}
    assert json.loads((tmp_path / "out/config.json").read_text()) == config


def test_older_spelling_of_config():
    """rope_theta, rope_scaling and rope_local_base_freq side by side, as before transformers 5."""

    def llama(rope):
        return {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}

    def phi(rope):
        scaling = {key: rope[key] for key in ("short_factor", "long_factor")}
        scaling["type"] = rope["rope_type"]
        return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}

    def gemma(rope):
        local = rope["sliding_attention"]["rope_theta"]
        return llama(rope["full_attention"]) | {"rope_local_base_freq": local}

    for case, old in (
        ("llama, scaled rope, untied", llama),
        (LONGROPE, phi),
        ("gemma 3, scaled rope", gemma),
    ):
        config = json.loads(json.dumps(STORED[case]["config"]))
        new = GPTConfig.from_hf(config)
        config |= old(config.pop("rope_parameters"))
        config["torch_dtype"] = config.pop("dtype")
        if case.startswith("gemma"):
            del config["layer_types"]
            config["sliding_window_pattern"] = 2
        read = GPTConfig.from_hf(config)
        assert read.hf == config
        read.hf = new.hf
        assert read == new


# KV cache against the full forward --------------------------------------------------------------


def full_forward(model, row):
    """One sequence (T,) without a cache: (T, D)."""
    return model(row[None])[0]


@every_architecture
@torch.no_grad()
def test_cache_equals_full_forward_at_every_position(case, long_rope):
    """Prompts of mixed lengths in one padded prefill, then a token at a time, in float64."""
    model = random_model(case, torch.float64, long_rope)
    lengths = torch.tensor([1, 7, 20, 13])  # Gemma's window is 12, Phi's switch 32
    steps = 50
    ids = torch.randint(0, model.config.vocab_size, (4, 20 + steps))
    want = [full_forward(model, row) for row in ids]
    cache = KVCache(model.config, 5, 80, dtype=torch.float64)
    prompts = torch.where(torch.arange(20) < lengths[:, None], ids[:, :20], 3)
    got = model(prompts, cache)  # (4, 20, D)
    assert cache.longest == 20 and cache.lengths.tolist() == [20] * 4 + [0]
    for row, n in enumerate(lengths):
        assert share_of_range(got[row, :n], want[row][:n]) < 1e-12
    cache.lengths[:4] = lengths
    for step in range(steps):
        at = lengths + step
        got = model(ids[torch.arange(4), at][:, None], cache)  # (4, 1, D)
        for row in range(4):
            assert share_of_range(got[row, 0], want[row][at[row]]) < 1e-12, (row, step)
    assert cache.longest == 20 + steps
    assert cache.lengths.tolist() == [*(lengths + steps).tolist(), 0]


@every_architecture
@torch.no_grad()
def test_cache_takes_several_tokens_and_copies(case, long_rope):
    """Chunks on rows of unequal length, copies between caches and within one, a smaller batch."""
    model = random_model(case, torch.float64, long_rope)
    ids = torch.randint(0, model.config.vocab_size, (3, 60))
    want = [full_forward(model, row) for row in ids]
    cache = KVCache(model.config, 3, 64, dtype=torch.float64)
    prefilled = KVCache(model.config, 1, 30, dtype=torch.float64)
    at = [5, 18, 26]
    for row in (2, 0, 1):
        prefilled.longest = 0
        prefilled.lengths.zero_()
        got = model(ids[row : row + 1, : at[row]], prefilled)[0]
        assert share_of_range(got, want[row][: at[row]]) < 1e-12
        cache.copy(slice(row, row + 1), prefilled, 0, at[row])
    cache.longest = max(at)
    for T in (3, 1, 4, 6):
        got = model(torch.stack([row[n : n + T] for row, n in zip(ids, at)]), cache)
        for row, n in enumerate(at):
            assert share_of_range(got[row], want[row][n : n + T]) < 1e-12, (row, T)
        at = [n + T for n in at]
    cache.copy(slice(0, 1), cache, 2, at[2])  # row 0 ended, the last one takes its place
    for step in range(at[2], 60):
        got = model(torch.stack([ids[2, step], ids[1, at[1]]])[:, None], cache)
        assert share_of_range(got[0, 0], want[2][step]) < 1e-12
        assert share_of_range(got[1, 0], want[1][at[1]]) < 1e-12
        at[1] += 1


@pytest.mark.parametrize("case", ("qwen3", "gemma 3", LONGROPE))
@torch.no_grad()
def test_cache_in_float32_ignores_what_lies_beyond_the_lengths(case):
    model = random_model(case)
    ids = torch.randint(0, model.config.vocab_size, (2, 30))
    clean, dirty = KVCache(model.config, 2, 64), KVCache(model.config, 2, 64)
    dirty.kv.normal_(std=100)
    for cache in (clean, dirty):
        model(ids[:, :20], cache)
        cache.lengths[:] = torch.tensor([20, 9])
    for t in range(20, 30):
        assert torch.equal(model(ids[:, t : t + 1], clean), model(ids[:, t : t + 1], dirty))


def test_cache_says_when_it_is_full():
    model = random_model("qwen3")
    cache = KVCache(model.config, 2, 8)
    model(torch.zeros(2, 8, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="room for 0 more tokens in each: 2 rows of 1 do not fit"):
        model(torch.zeros(2, 1, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="do not fit"):
        model(torch.zeros(3, 1, dtype=torch.int64), KVCache(model.config, 2, 8))
    assert cache.longest == 8 and cache.lengths.tolist() == [8, 8]


# Phi-3.5's rope factors ---------------------------------------------------------------------------


@torch.no_grad()
def test_rope_factors_are_chosen_once_by_the_longest_sequence(tmp_path):
    folder = write_folder(tmp_path, LONGROPE)
    short = GPT.from_pretrained(folder, length=SWITCH)
    long = GPT.from_pretrained(folder, length=SWITCH + 1)
    unchosen = GPT.from_pretrained(folder)
    assert (short.long_rope, long.long_rope, unchosen.long_rope) == (False, True, None)
    assert copy.deepcopy(long).long_rope is True
    ids = torch.randint(0, 40, (1, SWITCH + 8))
    # Nobody chose: each forward goes by its own length, and so would each of the models.
    assert torch.equal(short(ids[:, :SWITCH]), unchosen(ids[:, :SWITCH]))
    assert torch.equal(long(ids[:, : SWITCH + 1]), unchosen(ids[:, : SWITCH + 1]))
    # A model with a choice keeps to it at other lengths.
    assert share_of_range(long(ids[:, :9]), unchosen(ids)[:, :9]) < 1e-5
    assert share_of_range(short(ids)[:, :9], unchosen(ids[:, :9])) < 1e-5
    assert share_of_range(long(ids[:, :9]), short(ids[:, :9])) > 0.01
    # With a cache the length counts the tokens in it; their keys and values stay as they are.
    caches = [KVCache(short.config, 1, 64) for _ in range(2)]
    for cache in caches:
        short(ids[:, :SWITCH], cache)
    last = ids[:, SWITCH : SWITCH + 1]
    assert torch.equal(unchosen(last, caches[0]), long(last, caches[1]))
    # No other family has factors to choose between.
    other = GPT.from_pretrained(write_folder(tmp_path / "other", "llama"), length=10**6)
    assert other.long_rope is False


@torch.no_grad()
def test_rope_factors_equal_those_of_transformers(transformers, tmp_path):
    """On either side of the switch, and through it with a cache when nobody chose."""
    folder = random_folder(transformers, tmp_path, LONGROPE, 6, False)
    model, their_model = GPT.from_pretrained(folder), load_theirs(transformers, folder)
    ids = torch.randint(0, 40, (2, SWITCH + 8))
    for length in (SWITCH, SWITCH + 1):
        exact = their_model(ids[:, :length]).logits
        chosen = GPT.from_pretrained(folder, length=length)
        assert share_of_range(logits(chosen, ids[:, :length]), exact) < 2e-5
    long, exact = GPT.from_pretrained(folder, length=SWITCH + 8), their_model(ids).logits
    assert share_of_range(logits(long, ids[:, :5]), exact[:, :5]) < 2e-5
    cache, past = KVCache(model.config, 2, 64), None
    for start, stop in ((0, SWITCH - 2), *((t, t + 1) for t in range(SWITCH - 2, SWITCH + 8))):
        out = their_model(ids[:, start:stop], past_key_values=past, use_cache=True)
        past = out.past_key_values
        assert share_of_range(logits(model, ids[:, start:stop], cache), out.logits) < 2e-5, start


# The model itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", STORED)
@torch.no_grad()
def test_padding_on_the_right_changes_nothing(case):
    model = random_model(case, torch.float64)
    ids = torch.randint(0, 40, (3, 31))  # within Phi's switch: nobody chose, so T decides
    whole = model(ids)
    for row, length in enumerate((1, 14, 31)):
        assert share_of_range(whole[row, :length], model(ids[row : row + 1, :length])[0]) < 1e-12


@pytest.mark.parametrize("case", STORED)
def test_every_parameter_gets_its_gradient(case):
    """Against central differences along one random direction per parameter, in float64."""
    model = random_model(case, torch.float64)
    ids = torch.randint(0, model.config.vocab_size, (2, LENGTH))
    probe = torch.randn(2, LENGTH, model.config.vocab_size, dtype=torch.float64)

    def loss():
        return ((model(ids) @ model.unembedding.T).log_softmax(-1) * probe).sum()

    loss().backward()
    for name, p in model.named_parameters():
        direction = torch.randn_like(p)
        slope = (p.grad * direction).sum().item()
        with torch.no_grad():
            ends = []
            for step in (1e-6, -1e-6):
                p += step * direction
                ends.append(loss().item())
                p -= step * direction
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-3), name


@pytest.mark.parametrize("case", STORED)
@torch.no_grad()
def test_bfloat16_and_autocast(case):
    """bfloat16 weights, and float32 weights under autocast, stay near float32, in the cache too."""
    model = random_model(case)
    ids = torch.randint(0, model.config.vocab_size, (2, LENGTH))
    exact = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(ids)
        cache = KVCache(model.config, 2, LENGTH, dtype=torch.bfloat16)
        model(ids[:, :-1], cache)
        cached = model(ids[:, -1:], cache)
    scale = exact.std().item()
    assert mixed.dtype == torch.float32 and (mixed - exact).abs().mean().item() < 0.03 * scale
    assert (cached[:, 0] - exact[:, -1]).abs().mean().item() < 0.06 * scale
    frequencies = model.frequencies.clone()
    model.to(torch.bfloat16)
    low = model(ids)
    assert low.dtype == torch.bfloat16 and (low - exact).abs().mean().item() < 0.06 * scale
    assert torch.equal(model.frequencies, frequencies)  # not rounded along


@pytest.mark.parametrize("case", STORED)
@pytest.mark.parametrize("half", (False, True))
def test_recomputed_blocks_have_the_same_gradients(case, half):
    """In float32 and under autocast; with half of the rows' positions beyond their ends."""
    model, ids = random_model(case), torch.randint(0, STORED[case]["config"]["vocab_size"], (2, 40))
    pull, flat = torch.randn(2, 40, model.config.width), []
    for recompute in (False, True):
        kept = 0

        def count(tensor):
            nonlocal kept
            kept += tensor.nbytes
            return tensor
        for block in model.blocks:
            block.recompute = recompute
        hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16, enabled=half), hooks:
            hidden = model(ids)
        model.zero_grad()
        (hidden.float() * pull).sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        flat.append((torch.cat(gradients), kept))
    (plain, all_kept), (again, kept) = flat
    assert (plain - again).norm() <= 1e-6 * plain.norm() and plain.norm() > 0
    assert kept < 0.5 * all_kept


def test_random_weights_follow_the_global_generator():
    config = GPTConfig.from_hf(STORED["gemma 3"]["config"])
    torch.manual_seed(5)
    one = GPT(config)
    torch.manual_seed(5)
    two = GPT(config)
    for (name, a), b in zip(one.named_parameters(), two.parameters()):
        assert torch.equal(a, b)
        assert (a == 0).all() if name.endswith("norm") else 0.01 < a.std() < 0.03


# kernels.py ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_everything_works_without_onednn(monkeypatch):
    """A PyTorch without oneDNN, or without its private operators: slower, the same numbers."""
    model = random_model("qwen2.5")
    ids = torch.randint(0, 40, (2, 9))
    a, b = torch.randn(3, 70), torch.randn(5, 70)
    want, product = logits(model, ids), kernels.matmul(a, b)
    assert share_of_range(product, a.double() @ b.double().T) < 1e-5
    monkeypatch.setattr(kernels, "ONEDNN", False)
    assert kernels.pack(a) is None
    assert torch.equal(kernels.matmul(a, b), a @ b.T)
    with model.packed():
        assert model.packed_unembedding is None and model.blocks[0].qkv.packed is None
        assert torch.equal(logits(model, ids), want)


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError, TypeError])
def test_private_operators_that_are_gone_or_changed(error, monkeypatch):
    """Not there, named but not built in (an ARM Mac), or with other arguments."""
    def broken(*args):
        raise error
    ops = SimpleNamespace(_reorder_linear_weight=lambda weight: weight, _linear_pointwise=broken)
    if error is AttributeError:
        del ops._reorder_linear_weight
    monkeypatch.setattr(torch.ops, "mkldnn", ops)
    fresh = runpy.run_path(kernels.__file__)
    a, b = torch.randn(3, 70), torch.randn(5, 70)
    assert not fresh["ONEDNN"] and fresh["pack"](a) is None
    assert torch.equal(fresh["matmul"](a, b), a @ b.T)


def test_what_a_gpu_can_do(monkeypatch):
    """By its compute capability: bfloat16, and attention to fewer key heads than query heads."""
    cases = [((7, 5), 2, False), ((8, 0), 2, True), ((9, 0), 2, True), ((8, 0), 4, False),
             ((7, 0), 4, False)]
    for capability, itemsize, groups in cases:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert kernels.fast_bfloat16("cuda:0") == (capability >= (8, 0))
        q = SimpleNamespace(is_cuda=True, itemsize=itemsize, device=torch.device("cuda:1"))
        assert kernels.takes_groups(q) == groups
    assert not kernels.fast_bfloat16("cpu")
    assert kernels.takes_groups(torch.zeros(1)) and kernels.takes_groups(torch.zeros(1).bfloat16())


@torch.no_grad()
def test_keys_are_repeated_where_attention_takes_no_groups(monkeypatch):
    """With and without a cache: every query head gets its own keys, and the result is the same."""
    model, ids, seen = random_model("qwen2.5"), torch.randint(0, 40, (2, 9)), []
    heads = model.config.heads
    assert model.config.kv_heads < heads
    attention, want = F.scaled_dot_product_attention, logits(model, ids)

    def watch(q, k, v, **options):
        seen.append((k.shape[1], v.shape[1], options["enable_gqa"]))
        return attention(q, k, v, **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    monkeypatch.setattr(model_module, "takes_groups", lambda q: False)
    for cache in (None, KVCache(model.config, 2, 16)):
        assert share_of_range(logits(model, ids, cache), want) < 1e-5
    assert set(seen) == {(heads, heads, False)}


def test_pack_knows_where_there_is_no_layout():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert kernels.pack(torch.zeros(4, 4, dtype=dtype)) is None


@pytest.mark.skipif(not kernels.ONEDNN, reason="this PyTorch has no oneDNN")
@torch.no_grad()
def test_packed_weights_are_gone_afterwards_and_rows_do_not_depend_on_others():
    model = random_model("qwen2.5")
    linear, x = model.blocks[0].qkv, torch.randn(7, model.config.width)
    with pytest.raises(KeyError), model.packed():  # an error inside must not leave copies behind
        assert linear.packed is not None
        many = linear(x)
        assert all(torch.equal(linear(x[i : i + 1]), many[i : i + 1]) for i in range(7))
        raise KeyError
    assert linear.packed is None and model.packed_unembedding is None
    assert share_of_range(many, linear(x)) < 1e-5


@pytest.mark.parametrize("rows, heads", ((1, 1), (3, 1), (3, 2)))
def test_decode_attention(rows, heads):
    """Against PyTorch's attention, and one row alone against the same row beside others."""
    q, k, v = (torch.randn(rows, heads, n, 8) for n in (4, 32, 32))
    mask = torch.zeros(rows, 1, 1, 32).masked_fill_(torch.arange(32) > 20, -torch.inf)
    got = kernels.decode_attention(q, k, v, mask, 0.3)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    assert got.shape == q.shape and share_of_range(got, want) < 1e-5
    alone = kernels.decode_attention(q[:1], k[:1], v[:1], mask[:1], 0.3)
    assert torch.equal(alone, got[:1])
    half = [part.bfloat16() for part in (q, k, v, mask)]
    low = kernels.decode_attention(*half, 0.3)
    assert low.dtype == torch.bfloat16 and share_of_range(low, want) < 0.05


# Files ------------------------------------------------------------------------------------------


def shard(folder: Path):
    """Split model.safetensors in two, with an index, as transformers does with large models."""
    whole = load_file(folder / "model.safetensors")
    names = sorted(whole)
    parts = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, part in parts.items():
        save_file({name: whole[name] for name in part}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {
        "metadata": {},
        "weight_map": {name: file for file, part in parts.items() for name in part},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards(tmp_path):
    folder = write_folder(tmp_path, "qwen2.5")
    whole = GPT.from_pretrained(folder)
    shard(folder)
    for a, b in zip(whole.parameters(), GPT.from_pretrained(folder).parameters()):
        assert torch.equal(a, b)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors is missing"):
        GPT.from_pretrained(folder)
    for index in (
        {},
        {"weight_map": {}},
        {"weight_map": {"a": "../elsewhere.safetensors"}},
        {"weight_map": {"a": 1}},
    ):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="should have a weight_map"):
            GPT.from_pretrained(folder)


LLAMA_ROPE = {"rope_type": "linear", "rope_theta": 1e4}  # linear needs a factor
TWO = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1, 2], "long_factor": [1, 2]}


@pytest.mark.parametrize(
    "case, changes, says",
    (
        ("llama", {"model_type": "bert"}, "'bert' like this is not supported: known are llama"),
        ("llama", {"model_type": None}, "known are llama"),
        ("llama", {"model_type": "t5", "is_encoder_decoder": True}, "known are llama"),
        ("qwen3", {"model_type": "qwen3_moe"}, "known are llama"),
        ("gemma 3", {"model_type": "gemma3"}, "gemma3_text (Gemma 3 without images)"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder"),
        ("llama", {"num_local_experts": 8}, "num_local_experts"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("llama", {"architectures": ["LlamaForTokens"]}, "a LlamaForTokens, not a ...ForCausalLM"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("qwen2.5", {"use_sliding_window": True}, "use_sliding_window"),
        ("gemma 3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma 3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma 3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma 3", {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"hidden_size": None}, "hidden_size should be a positive int, not None"),
        ("llama", {"hidden_size": "64"}, "hidden_size should be a positive int, not '64'"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers should be"),
        ("llama", {"num_attention_heads": True}, "num_attention_heads should be"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps should be"),
        ("llama", {"num_key_value_heads": 4}, "6 heads cannot share 4 key/value heads"),
        ("llama", {"head_dim": 9}, "head_dim 9 is odd"),
        ("llama", {"rope_parameters": LLAMA_ROPE | {"rope_type": "yarn"}}, "type 'yarn'"),
        ("llama", {"rope_parameters": LLAMA_ROPE}, "linear needs factor: 1 positive"),
        ("llama", {"rope_parameters": LLAMA_ROPE | {"factor": [2.0]}}, "linear needs factor"),
        ("llama", {"rope_parameters": [1]}, "should be an object, not [1]"),
        ("llama", {"rope_parameters": None, "rope_theta": -1}, "needs rope_theta"),
        ("llama", {"max_position_embeddings": None}, "max_position_embeddings should be"),
        ("llama", {"max_position_embeddings": "512"}, "max_position_embeddings should be"),
        ("llama", {"vocab_size": 2**31}, "vocab_size should be"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"factor": 4}}, "4, but no rope_type"),
        ("llama", {"rope_parameters": 7}, "value of another kind"),
        ("llama", {"architectures": 7}, "value of another kind"),
        ("gemma 3", {"layer_types": [{}, {}]}, "value of another kind"),
        ("gemma 3", {"model_type": "gemma3", "text_config": {}}, "(Gemma 3 without images)"),
        (LONGROPE, {"partial_rotary_factor": 0.5, "rope_parameters": {}}, "rotary_factor 0.5"),
        (LONGROPE, {"rope_parameters": TWO}, "longrope needs short_factor: 4 positive"),
        ("gemma 3", {"layer_types": ["full_attention"]}, "layer_types should be 2 of"),
        ("gemma 3", {"sliding_window": -1}, "sliding_window should be"),
    ),
)
def test_unsupported_configs_say_so(case, changes, says, tmp_path):
    folder = write_folder(tmp_path, case)
    (folder / "config.json").write_text(json.dumps(STORED[case]["config"] | changes))
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(folder)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_bad_folders_say_so(tmp_path):
    def says(kind, words):
        with pytest.raises(kind) as error:
            GPT.from_pretrained(folder)
        assert words in str(error.value) and "\n" not in str(error.value), str(error.value)

    folder = tmp_path / "nowhere"
    says(FileNotFoundError, "config.json is missing")
    folder = write_folder(tmp_path / "model", "qwen3")
    file, config = folder / "model.safetensors", folder / "config.json"
    good, whole = load_file(file), file.read_bytes()
    some = "model.layers.1.mlp.up_proj.weight"
    missing = {name: w for name, w in good.items() if name != some}
    unknown = good | {"model.layers.0.mlp.gate_proj.qzeros": good[some].clone()}
    for tensors, words in (
        (missing, f"lack 1 tensors: {some}"),
        (unknown, "also hold 1 tensors: model.layers.0"),
        (good | {some: good[some][:-1].clone()}, "has shape (71, 48), config.json asks"),
        (good | {some: good[some].to(torch.int8)}, f"{some} is I8; quantised"),
        (good | {some: good[some].to(torch.float8_e4m3fn)}, "F8_E4M3; quantised"),
        (good | {some: torch.full_like(good[some], float("nan"))}, f"{some} holds NaN or infinity"),
        (good | {some: good[some] / 0}, f"{some} holds NaN or infinity"),
    ):
        save_file(tensors, file)
        says(ValueError, words)
    for broken in (whole[:-100], whole[:50], b"", b"\xff" * 64, b"version https://git-lfs\noid"):
        file.write_bytes(broken)
        says(ValueError, "is truncated or no safetensors file")
    file.unlink()
    says(FileNotFoundError, "model.safetensors is missing")
    for text, words in (
        ("{", "not JSON"),
        ("[]", "hold a JSON object, not a list"),
        ("[" * 100000, "not JSON"),
    ):
        config.write_text(text)
        says(ValueError, words)
    config.write_bytes(b"\xff\xfe")
    says(ValueError, "not JSON")


def test_a_repeated_tied_head_must_be_the_embedding(tmp_path):
    folder = write_folder(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"  # old files hold it; it is ignored
    tensors[old] = torch.ones(6)
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(GPT.from_pretrained(folder).unembedding, tensors["lm_head.weight"])
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight is not the embedding"):
        GPT.from_pretrained(folder)


def test_a_shard_reads_only_its_own_rows(tmp_path):
    """`shard` divides the model: fused parameters hold rows of several stored tensors."""
    folder = write_folder(tmp_path, "qwen2.5")
    whole = GPT.from_pretrained(folder)

    def own_rows(p):
        first, stop = len(p) // 3, len(p) // 3 * 2 + 1
        return p.detach()[first:stop], first

    def shard(model):
        assert all(p.is_meta for p in model.parameters())
        return own_rows

    part = GPT.from_pretrained(folder, shard=shard)
    for name, p in part.named_parameters():
        ours, first = own_rows(p)
        assert torch.equal(ours, whole.get_parameter(name)[first : first + len(ours)]), name


PEAK = """
import sys, torch
from model import GPT
def status(key):
    lines = [line for line in open("/proc/self/status") if line.startswith(key)]
    return int(lines[0].split()[1]) * 1024
try:
    open("/proc/self/clear_refs", "w").write("5")   # the peak starts anew
except OSError:
    sys.exit(77)                                    # not allowed here
before = status("VmRSS")
model = GPT.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print((status("VmHWM") - before) / weights, weights)
"""


def peak_of_loading(folder, dtype) -> float:
    """Peak memory of from_pretrained in a fresh process, as a multiple of the weights' bytes."""
    out = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), dtype],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
    )
    if out.returncode == 77:
        pytest.skip("the peak of memory cannot be reset here")
    assert out.returncode == 0, out.stderr[-2000:]
    return float(out.stdout.split()[0])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
def test_loading_is_frugal(tmp_path):
    sizes = dict(vocab_size=90000, hidden_size=256, intermediate_size=12288)
    config = STORED["qwen3"]["config"] | sizes
    with torch.device("meta"):
        model = GPT(GPTConfig.from_hf(config))
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, (parameter, rows) in model.hf_rows().items():
        shape = model.get_parameter(parameter)[rows].shape
        tensors[name] = torch.zeros(shape, dtype=torch.bfloat16, device="cpu")
    save_file(tensors, tmp_path / "model.safetensors")
    assert peak_of_loading(tmp_path, "float32") < 1.1  # 262 MB from 131


# Against transformers itself, where it is installed ---------------------------------------------


@pytest.fixture(scope="session")
def transformers():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load_theirs(transformers, folder, dtype=torch.float32, attention="eager"):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention
    )
    return model.eval()


def random_folder(transformers, folder, case, kv_heads, tied) -> Path:
    """A folder that transformers saved, in shards, with fresh weights in every tensor."""
    config = dict(CASES[case], num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config)
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights({name: list(p.shape)}, int(torch.randint(2**31, ())))[name])
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv_heads, tied", ((1, True), (2, False), (6, True)))
def test_parity_with_transformers(case, kv_heads, tied, transformers, tmp_path):
    """Our logits of their folder, theirs of ours; bfloat16 as near to float32 as theirs."""
    folder = random_folder(transformers, tmp_path / "theirs", case, kv_heads, tied)
    ids = torch.randint(0, CASES[case]["vocab_size"], (2, 100))
    model, their_model = GPT.from_pretrained(folder), load_theirs(transformers, folder)
    with torch.no_grad():
        exact = their_model(ids).logits
        share = share_of_range(logits(model, ids), exact)
        model.save_pretrained(tmp_path / "ours")
        assert torch.equal(load_theirs(transformers, tmp_path / "ours")(ids).logits, exact)
        low = load_theirs(transformers, folder, torch.bfloat16, "sdpa")(ids).logits
    low_ours = logits(GPT.from_pretrained(folder, dtype=torch.bfloat16), ids)
    what = f"{case}, {kv_heads} kv heads, {'tied' if tied else 'untied'}"
    check_parity(what, share, low_ours, low, exact)


def check_parity(what, share, low_ours, low_theirs, exact):
    """float32 within 2e-5 of the range of the logits; bfloat16 within 1.5 times their distance.

    bfloat16 goes by the mean and the 99th percentile: the single worst logit is luck, on both
    sides. Theirs attends by the same kernel as ours (sdpa); their eager attention rounds more. The
    line printed is a row of the parity table: pytest -rP -k parity tests/test_model.py
    """
    extent = exact.max() - exact.min()
    ours = (low_ours.float() - exact).abs() / extent
    theirs = (low_theirs.float() - exact).abs() / extent
    print(
        f"PARITY | {what} | float32 {share:.1e} | bfloat16 mean ours {ours.mean():.1e} "
        f"theirs {theirs.mean():.1e}, max ours {ours.max():.1e} theirs {theirs.max():.1e} "
        f"| of a range of {extent:.1f}"
    )
    assert share < 2e-5
    assert ours.mean() < 1.5 * theirs.mean()
    assert np.quantile(ours.numpy(), 0.99) < 1.5 * np.quantile(theirs.numpy(), 0.99)


TEXT = """A baker fills 6 trays with 24 rolls each. She sells 96 rolls before noon and a third of
the rest after it. How many rolls are left in the evening? First count all rolls: 6 times 24 is 144.
Before noon 96 are sold, which leaves 144 - 96 = 48. A third of 48 is 48 / 3 = 16, so in the evening
48 - 16 = 32 rolls are left.

The mean of five numbers is 12. Four of them are 3, 8, 15 and 20. Find the fifth. The sum is 60. The
four add up to 3 + 8 + 15 + 20 = 46, so the fifth number is $60 - 46 = \\boxed{14}$.
"""


@pytest.mark.skipif(
    "SA_MODELS" not in os.environ, reason="SA_MODELS names no folder with real checkpoints"
)
@pytest.mark.parametrize("name", REAL)
def test_parity_on_real_checkpoints(name, transformers, tmp_path):
    folder = Path(os.environ["SA_MODELS"], name)
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    their_model, model = load_theirs(transformers, folder), GPT.from_pretrained(folder)
    gemma = name.startswith("gemma")  # its window is 512
    ids = torch.randint(0, model.config.vocab_size, (1, 600 if gemma else 64))
    bos = [model.config.hf["bos_token_id"]] * gemma
    text = torch.tensor([bos + tokenizer.encode(TEXT)])
    with torch.no_grad():
        exact = their_model(ids).logits
        share = share_of_range(logits(model, ids), exact)
        cache = KVCache(model.config, 1, ids.shape[1])
        model(ids[:, :-4], cache)
        for t in range(ids.shape[1] - 4, ids.shape[1]):
            assert share_of_range(logits(model, ids[:, t : t + 1], cache)[0, 0], exact[0, t]) < 2e-5
        exact = their_model(text).logits
        del their_model
        low = load_theirs(transformers, folder, torch.bfloat16, "sdpa")(text).logits
        model = GPT.from_pretrained(folder, dtype=torch.bfloat16)
        check_parity(name, share, logits(model, text), low, exact)
        model.save_pretrained(tmp_path)
        shutil.copy(folder / "generation_config.json", tmp_path)
        again = load_theirs(transformers, tmp_path, torch.bfloat16, "sdpa")
        assert torch.equal(again(text).logits, low)
    for dtype in ("float32", "bfloat16"):
        peak = peak_of_loading(folder, dtype)
        print(f"LOADING | {name} | {dtype} | peak {peak:.3f} of the weights")
        assert peak < 1.1
