"""GPT: one decoder whose config.json makes it Llama, Qwen2.5, Qwen3, Phi-3.5 or Gemma 3 (text).

All five read a token, add attention and a gated MLP to a residual stream layer after layer, and
normalise at the end. What sets them apart is named in GPTConfig and nowhere else:

                                  Llama    Qwen2.5   Qwen3    Phi-3.5    Gemma 3
    bias on q, k, v               -        yes       -        -          -
    q and k normed per head       -        -         yes      -          yes
    norm after each sublayer too  -        -         -        -          yes
    norm weight                   w        w         w        w          1 + w
    gate activation               SiLU     SiLU      SiLU     SiLU       GELU (tanh)
    embedding times               1        1         1        1          sqrt(D)
    scores times                  hd^-.5   hd^-.5    hd^-.5   hd^-.5     query_pre_attn_scalar^-.5
    rope                          plain, linear or llama3     longrope   local layers: another base
    sliding window                -        -         -        (4k only)  local layers
    q, k, v and gate, up stored   apart    apart     apart    fused      apart  (in memory: fused)

Letters: B rows, T tokens, S positions attended to, D width, H query heads, Hkv key/value heads,
hd head width, V vocabulary.
"""
import contextlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.files import open_tensors, read_json
from kernels import ATTENTION_STEP, decode_attention, pack, packed_linear, round_up, takes_groups

FAMILIES = ("llama", "qwen2", "qwen3", "phi3", "gemma3_text")  # model_type
UNSUPPORTED = (  # keys of a config.json that must be missing, null, false or 0
    "quantization_config", "num_experts", "num_local_experts", "n_routed_experts",
    "is_encoder_decoder", "mlp_bias", "use_sliding_window", "attn_logit_softcapping",
    "final_logit_softcapping", "use_bidirectional_attention")
LOCAL, GLOBAL = "sliding_attention", "full_attention"  # types of layers
ROPE_NEEDS = {  # by rope_type: what it needs beside rope_theta
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings")}
STORED = {  # by parameter (of a block): the tensors of the file that fill its rows, in this order
    "embedding": ("model.embed_tokens.weight",),
    "norm": ("model.norm.weight",), "head": ("lm_head.weight",),
    "qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "qkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "q_norm": ("self_attn.q_norm.weight",), "k_norm": ("self_attn.k_norm.weight",),
    "attention_out.weight": ("self_attn.o_proj.weight",),
    "gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down.weight": ("mlp.down_proj.weight",),
    "attention_norm": ("input_layernorm.weight",), "mlp_norm": ("post_attention_layernorm.weight",)}
STORED_FUSED = {
    "qkv.weight": ("self_attn.qkv_proj.weight",), "gate_up.weight": ("mlp.gate_up_proj.weight",)}
STORED_POST_NORM = {
    "attention_post_norm": ("post_attention_layernorm.weight",),
    "mlp_norm": ("pre_feedforward_layernorm.weight",),
    "mlp_post_norm": ("post_feedforward_layernorm.weight",)}
IGNORED = "rotary_emb.inv_freq"  # tensors that old files hold
PIECE = 2**22  # bytes of a weight file that are in memory at a time while loading


@dataclass
class GPTConfig:
    """What the decoder is built from. `hf` is the config.json as it was read, for saving."""
    vocab_size: int  # V
    width: int  # D, of the residual stream
    mlp_width: int
    layers: int
    heads: int  # H
    kv_heads: int  # Hkv: H / Hkv query heads share one key/value head
    head_dim: int  # hd: heads * head_dim need not be the width
    max_length: int  # positions the model was made for (not enforced here)
    norm_eps: float
    tied: bool  # the unembedding is the embedding
    rope: dict  # rope_type, rope_theta, attention_factor and what ROPE_NEEDS names
    windows: list[int | None]  # per layer: a query sees so many positions, its own the last
    local_rope: dict | None = None  # rope of the layers with a window, where it is another one
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norm: bool = False  # the outputs of attention and MLP are normed before they are added
    norm_offset: bool = False  # norm weights are stored as their distance from 1
    gelu: bool = False
    embedding_scale: float = 1.0
    attention_scale: float = 1.0
    fused: bool = False  # the file stores q, k, v as one tensor and gate, up as one
    hf: dict = field(default_factory=dict, repr=False)

    def takes_long_rope(self, length: int) -> bool:
        """Whether sequences of `length` tokens take the long rope factors, which Phi-3.5 has."""
        rope = self.rope
        return rope["rope_type"] == "longrope" and length > rope["original_max_position_embeddings"]

    @staticmethod
    def from_hf(config: dict) -> "GPTConfig":
        """Of a config.json of any transformers version; ValueError for what is not built here."""
        try:
            return GPTConfig._from_hf(config)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"config.json has a value of another kind than it should ({error})"
                             ) from error

    @staticmethod
    def _from_hf(config):
        kind = _check_family(config)
        gemma, phi = kind == "gemma3_text", kind == "phi3"

        def number(key, default=None, types=(int,)):
            value = default if config.get(key) is None else config[key]
            if not _is_positive(value, types):
                expected = f"a positive {types[-1].__name__}"
                raise ValueError(f"config.json: {key} should be {expected}, not {value!r}")
            return value

        width, layers = number("hidden_size"), number("num_hidden_layers")
        heads = number("num_attention_heads")
        kv_heads = number("num_key_value_heads", {"llama": heads, "phi3": heads}.get(kind))
        head_dim = number("head_dim", {"qwen3": 128, "gemma3_text": 256}.get(kind, width // heads))
        if heads % kv_heads:
            raise ValueError(f"config.json: {heads} heads cannot share {kv_heads} key/value heads")
        if head_dim % 2:
            raise ValueError(f"config.json: head_dim {head_dim} is odd; rope turns pairs")
        max_length, query_scalar = number("max_position_embeddings"), head_dim
        local_rope, embedding_scale, window = None, 1.0, None
        layer_types = [GLOBAL] * layers
        if gemma:
            embedding_scale = width ** 0.5
            query_scalar = number("query_pre_attn_scalar", 256, (int, float))
            local_rope = _rope(config, head_dim, local=True)
            local = [LOCAL] * (number("sliding_window_pattern", 6) - 1)
            default = [*local, GLOBAL] * layers  # by default every sixth layer is global
            layer_types = config.get("layer_types") or default[:layers]
        elif phi and config.get("sliding_window"):
            layer_types = [LOCAL] * layers
        if len(layer_types) != layers or not {*layer_types} <= {LOCAL, GLOBAL}:
            raise ValueError(f"config.json: layer_types should be {layers} of {LOCAL}, {GLOBAL}")
        if LOCAL in layer_types:
            window = number("sliding_window", 4096)
        return GPTConfig(
            vocab_size=number("vocab_size"), width=width, mlp_width=number("intermediate_size"),
            layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim, max_length=max_length,
            norm_eps=number("rms_norm_eps", types=(int, float)),
            tied=bool(config.get("tie_word_embeddings", gemma)),
            rope=_rope(config, head_dim), local_rope=local_rope,
            windows=[window if t == LOCAL else None for t in layer_types],
            qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3" or gemma,
            post_norm=gemma, norm_offset=gemma, gelu=gemma,
            embedding_scale=embedding_scale, attention_scale=query_scalar ** -0.5,
            fused=phi, hf=config)


def _check_family(config):
    """The model_type, if it is one of the five and has no feature that is not built here."""
    kind = config.get("model_type")
    why = [f"it has {key}" for key in UNSUPPORTED if config.get(key)]
    if kind not in FAMILIES:
        why = [f"known are {', '.join(FAMILIES)} (Gemma 3 without images)"]
    if config.get("attention_bias") and kind != "qwen2":
        why.append("it has attention_bias")
    architecture = str((config.get("architectures") or ["ForCausalLM"])[0])
    if not architecture.endswith("ForCausalLM"):
        why.append(f"it is a {architecture}, not a ...ForCausalLM")
    gelu = "hidden_activation", "gelu_pytorch_tanh"
    key, expected = gelu if kind == "gemma3_text" else ("hidden_act", "silu")
    if config.get(key, expected) != expected:
        why.append(f"its {key} is {config[key]!r}")
    if why:
        raise ValueError(f"config.json: model_type {kind!r} like this is not supported: {why[0]}")
    return kind


def _is_positive(value, types=(int, float)):
    return type(value) in types and 0 < value < 2**31


def _rope(config, head_dim, local=False):
    """GPTConfig.rope or local_rope. transformers 5 writes one dict rope_parameters (Gemma: one per
    layer type); before it were rope_theta, rope_scaling and for local layers rope_local_base_freq.
    """
    theta = config.get("rope_theta", 1e6 if config["model_type"] == "gemma3_text" else 1e4)
    if local:
        theta = config.get("rope_local_base_freq", 1e4)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if GLOBAL in rope or LOCAL in rope:
        rope = rope.get(LOCAL if local else GLOBAL) or {}
    elif local:
        rope = {}  # the scaling is for the global layers
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: rope_parameters should be an object, not {rope!r}")
    longest, switch = config["max_position_embeddings"], "original_max_position_embeddings"
    rope = {"rope_theta": theta, **rope}
    rope[switch] = config.get(switch) or rope.get(switch) or longest  # Phi-3.5 keeps it outside
    kind = rope.get("rope_type") or rope.get("type") or "default"
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if kind == "default" and rope.get("factor"):
        raise ValueError(f"config.json: rope has a factor, {rope['factor']!r}, but no rope_type")
    if kind not in ROPE_NEEDS or share not in (None, 1):
        raise ValueError(f"config.json: rope of type {kind!r} with partial_rotary_factor {share} "
                         f"is not supported; known types are {', '.join(ROPE_NEEDS)}")
    keys = ("rope_theta", *ROPE_NEEDS[kind])
    for key in keys:
        per_pair = key in ("short_factor", "long_factor")
        count = head_dim // 2 if per_pair else 1
        values = rope.get(key) if per_pair else [rope.get(key)]
        good = isinstance(values, list) and len(values) == count and all(map(_is_positive, values))
        if not good:
            raise ValueError(f"config.json: {kind} needs {key}: {count} positive number(s)")
    factor = 1.0
    if kind == "longrope":  # scores grow a little with the context
        stretch = rope.get("factor") or longest / rope[switch]
        factor = math.sqrt(1 + max(0, math.log(stretch)) / math.log(rope[switch]))
        factor = rope.get("attention_factor") or factor
    return {key: rope[key] for key in keys} | {"rope_type": kind, "attention_factor": factor}


def inverse_frequencies(rope: dict, head_dim: int) -> Tensor:
    """(1, hd / 2) float32: how far each pair of dimensions turns from a position to the next.

    longrope gives (2, hd / 2), for short and for long sequences (arXiv 2402.13753). llama3 divides
    the angles that take longer for a turn than the old context, and blends into those it keeps.
    """
    pairs = torch.arange(0, head_dim, 2, device="cpu").float()
    plain = rope["rope_theta"] ** (pairs / head_dim)  # 1 / angle
    if rope["rope_type"] == "longrope":
        factors = [rope["short_factor"], rope["long_factor"]]
        return 1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * plain)
    angle = 1.0 / plain
    if rope["rope_type"] == "linear":
        angle = angle / rope["factor"]
    elif rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * angle / (2 * math.pi)  # in old context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow, divided; 1: fast, kept
        angle = (1 - keep) * angle / rope["factor"] + keep * angle
    return angle[None]


class KVCache:
    """Keys and values, kv (layers, 2, slots, Hkv, max_length, hd), of `slots` rows of tokens.

    Allocated once, as zeros: a masked position is multiplied by weight 0, and 0 * NaN would be NaN.
    lengths (slots,) int64: the live tokens of each row. longest: a bound on the lengths of the rows
    in use, on the host to avoid a GPU sync.

    After a padded prefill, or when a row ends, the caller corrects `lengths` and `longest`. Entries
    beyond a row's length are never read and are overwritten later.
    """
    def __init__(self, config, slots, max_length, *, dtype=torch.float32, device="cpu"):
        shape = (config.layers, 2, slots, config.kv_heads, max_length, config.head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        flat = self.kv.view(config.layers, 2, -1, config.head_dim)  # where `Block` puts new k and v
        self.flat = [layer.unbind() for layer in flat.unbind()]
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self.longest, self.max_length = 0, max_length

    def copy(self, rows: slice, source: "KVCache", row: int, length: int):
        """Let `rows` hold the first `length` tokens of a row of `source`. longest stays."""
        self.kv[:, :, rows, :, :length] = source.kv[:, :, row:row + 1, :, :length]
        self.lengths[rows] = length


class Linear(nn.Linear):
    """nn.Linear. Within GPT.packed it multiplies by `packed`, a copy of its weight."""
    packed = None

    def forward(self, x):
        if self.packed is not None:
            return packed_linear(x, self.packed, self.bias)
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)  # it may be float32
        return F.linear(x, self.weight, bias)


class Block(nn.Module):
    """Attention and MLP, each: norm, sublayer, (Gemma: norm again,) add to the stream.

    recompute: keep only x for the backward, which then computes the rest again.
    """
    recompute = False

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        c, self.config, self.layer = config, config, layer
        self.attention_norm = nn.Parameter(torch.ones(c.width))
        self.qkv = Linear(c.width, (c.heads + 2 * c.kv_heads) * c.head_dim, bias=c.qkv_bias)
        if c.qk_norm:
            self.q_norm = nn.Parameter(torch.ones(c.head_dim))
            self.k_norm = nn.Parameter(torch.ones(c.head_dim))
        self.attention_out = Linear(c.heads * c.head_dim, c.width, bias=False)
        self.mlp_norm = nn.Parameter(torch.ones(c.width))
        self.gate_up = Linear(c.width, 2 * c.mlp_width, bias=False)
        self.down = Linear(c.mlp_width, c.width, bias=False)
        if c.post_norm:
            self.attention_post_norm = nn.Parameter(torch.ones(c.width))
            self.mlp_post_norm = nn.Parameter(torch.ones(c.width))

    def forward(self, *inputs):
        if self.recompute and torch.is_grad_enabled():  # nothing is random: no generator to restore
            return checkpoint(self.sublayers, *inputs, use_reentrant=False,
                              preserve_rng_state=False)
        return self.sublayers(*inputs)

    def sublayers(self, x, cos, sin, mask, cache, index, past):
        """x (B, T, D) -> (B, T, D).

        cos, sin: from rotation. mask: from attention_mask. index (B * T * Hkv,): where in
        cache.flat the new k and v go. past: per layer the k and v (B, Hkv, S, hd) to attend to,
        these tokens included; None: these tokens attend to one another only.
        """
        c = self.config
        normed = rms_norm(x, self.attention_norm, c)
        out = self.attention(normed, cos, sin, mask, cache, index, past)
        x = x + (rms_norm(out, self.attention_post_norm, c) if c.post_norm else out)
        normed = rms_norm(x, self.mlp_norm, c)
        gate, up = self.gate_up(normed).chunk(2, dim=-1)  # (B, T, mlp_width) each
        gate = F.gelu(gate, approximate="tanh") if c.gelu else F.silu(gate)
        out = self.down(gate * up)
        return x + (rms_norm(out, self.mlp_post_norm, c) if c.post_norm else out)

    def attention(self, x, cos, sin, mask, cache, index, past):
        c, (B, T, _) = self.config, x.shape
        H, Hkv, hd = c.heads, c.kv_heads, c.head_dim
        qkv = self.qkv(x).view(B, T, H + 2 * Hkv, hd)
        qk, v = qkv.split((H + Hkv, Hkv), dim=2)  # q and k go together: fewer operations
        if c.qk_norm:
            norms = torch.cat((self.q_norm.expand(H, hd), self.k_norm.expand(Hkv, hd)))
            qk = rms_norm(qk, norms, c)
        qk = torch.addcmul(qk * cos, qk.roll(hd // 2, -1), sin)
        q, k = qk.to(v.dtype).split((H, Hkv), dim=2)  # under autocast they were float32 so far
        if cache is not None:
            for flat, new in zip(cache.flat[self.layer], (k, v)):
                flat.index_copy_(0, index, new.reshape(-1, hd).to(flat.dtype))
        if past is None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, Hkv, T, hd)
        else:
            k, v = past[self.layer]  # (B, Hkv, S, hd)
        if T == 1 and mask is not None:
            q = q.reshape(B, Hkv, H // Hkv, hd).to(k.dtype)
            out = decode_attention(q, k, v, mask, c.attention_scale)
        else:
            q = q.transpose(1, 2).to(k.dtype)  # (B, H, T, hd)
            if H != Hkv and (mask is not None or not takes_groups(q)):
                k, v = (part.repeat_interleave(H // Hkv, 1) for part in (k, v))
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=c.attention_scale,
                enable_gqa=k.shape[1] != H).transpose(1, 2)  # (B, T, H, hd)
        return self.attention_out(out.reshape(B, T, H * hd).to(qkv.dtype))


def rms_norm(x: Tensor, weight: Tensor, config: GPTConfig) -> Tensor:
    """x / rms(x) * weight, over the last dimension of x. weight: (D,), or (heads, hd)."""
    shape, eps = x.shape[-1:], config.norm_eps
    if config.norm_offset:  # 1 + weight would lose bits in bfloat16
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = F.rms_norm(x.to(wide), shape, None, eps)
        return (normed * (1 + weight.to(wide))).to(x.dtype)
    weight = weight.to(x.dtype)  # they differ under autocast
    if weight.dim() == 1:
        return F.rms_norm(x, shape, weight, eps)
    return F.rms_norm(x, shape, None, eps) * weight


class GPT(nn.Module):
    """The decoder. GPT(config) has random weights from torch's global generator.

    long_rope: whether Phi-3.5 takes the long rope factors. They give every token other keys and
    values, so one choice should hold for all sampling, scoring and training of a run, as in vLLM:
    from_pretrained(length=...) makes it. None: nobody chose, and each forward goes by its own
    length, as transformers does. For a copy, copy.long_rope = model.long_rope.
    """
    long_rope: bool | None = None
    packed_unembedding = None  # set within `packed`

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.width))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.Parameter(torch.ones(config.width))
        if not config.tied:
            self.head = nn.Parameter(torch.empty(config.vocab_size, config.width))
        for name, p in self.named_parameters():
            if p.is_meta:  # from_pretrained has the weights
                break
            if not name.endswith(("norm", "bias")):
                nn.init.normal_(p, std=0.02)
            elif config.norm_offset or name.endswith("bias"):
                nn.init.zeros_(p)
        # (sets, hd / 2): one set for all, or for short and long sequences (Phi-3.5), or for global
        # and local layers (Gemma 3). Not a buffer: model.to(torch.bfloat16) must not round it.
        ropes = [config.rope, config.local_rope] if config.local_rope else [config.rope]
        self.frequencies = torch.cat([inverse_frequencies(r, config.head_dim) for r in ropes])

    @property
    def unembedding(self) -> Tensor:
        """(V, D): logits are hidden @ unembedding.T."""
        return self.embedding if self.config.tied else self.head

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (rows, D) -> (rows, V) float32, for sampling (the loss has sar.fused_logprob).

        In bfloat16 a logit of 20 would be off by 0.06, and unlike what the loss computes.
        """
        if self.packed_unembedding is not None:
            return packed_linear(hidden, self.packed_unembedding)
        if hidden.is_cuda and hidden.dtype != torch.float32:
            return torch.mm(hidden, self.unembedding.T, out_dtype=torch.float32)
        return (hidden @ self.unembedding.T).float()

    @contextlib.contextmanager
    def packed(self):
        """Inside, matmuls use copies of the weights that kernels.pack made, without gradient.

        For 16 to 64 rows that is two to five times as fast as F.linear, and a row's result does not
        depend on the others. Where `pack` has no layout (GPU, half precision) nothing changes.
        """
        linears = [module for module in self.modules() if isinstance(module, Linear)]
        try:
            self.packed_unembedding = pack(self.unembedding)
            for linear in linears:
                linear.packed = pack(linear.weight)
            yield
        finally:
            self.packed_unembedding = None
            for linear in linears:
                linear.packed = None

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) int64 -> hidden (B, T, D) after the last norm.

        Without a cache every row is a sequence from position 0, padded on the right with any token.
        With one, token t of row b continues row b of the cache at position lengths[b] + t, and
        lengths[:B] and longest grow by T, without gradient; ValueError when that does not fit.
        """
        if cache is None:
            return self._layers(tokens, None)
        B, T = tokens.shape
        slots, room = len(cache.lengths), cache.max_length - cache.longest
        if B > slots or T > room:
            raise ValueError(f"a KV cache of {slots} rows has room for {room} more tokens in each: "
                             f"{B} rows of {T} do not fit")
        with torch.no_grad():
            hidden = self._layers(tokens, cache)
        cache.lengths[:B] += T
        cache.longest += T
        return hidden

    def _layers(self, tokens, cache):
        """forward without the cache's bookkeeping. What layers share is made once."""
        c, (B, T), device = self.config, tokens.shape, tokens.device
        x = F.embedding(tokens, self.embedding)  # (B, T, D)
        if torch.is_autocast_enabled(device.type):  # then bfloat16 weights give the same numbers
            x = x.float()  # as float32 weights that are rounded for each matmul
        if c.embedding_scale != 1.0:  # rounded to x's dtype, as Gemma was trained
            x = x * torch.tensor(c.embedding_scale, dtype=x.dtype).item()
        positions = torch.arange(T, device=device)[None]  # (1, T)
        length, index, past, span, mask_dtype = T, None, None, None, x.dtype
        if cache is not None:
            length += cache.longest
            positions = cache.lengths[:B, None] + positions  # (B, T)
            heads = torch.arange(B * c.kv_heads, device=device).view(B, 1, c.kv_heads)
            index = (heads * cache.max_length + positions[:, :, None]).flatten()  # (B * T * Hkv,)
            if cache.longest > 0:
                # S, rounded up to a multiple of 16: attention rounds differently at other lengths.
                span = min(round_up(length, ATTENTION_STEP), cache.max_length)
                past = [layer.unbind() for layer in cache.kv[:, :, :B, :, :span].unbind()]
                mask_dtype = cache.kv.dtype
        self.frequencies = self.frequencies.to(device)
        long = c.takes_long_rope(length) if self.long_rope is None else self.long_rope
        shared = {}  # by window: what its layers have in common
        for window in set(c.windows):
            frequencies = self.frequencies[-1 if window and c.local_rope else int(long)]
            cos, sin = rotation(positions, frequencies, c.rope["attention_factor"], x.dtype)
            shared[window] = cos, sin, attention_mask(positions, span, window, mask_dtype)
        for block, window in zip(self.blocks, c.windows):
            x = block(x, *shared[window], cache, index, past)
        return rms_norm(x, self.norm, c)

    @staticmethod
    def from_pretrained(folder, *, dtype=torch.float32, device="cpu", shard=None, length=None):
        """The model in `folder` (config.json; model.safetensors, or shards and their index).

        length: the longest sequence of the run, prompt and answer; it sets long_rope.
        shard: divides the model, still without memory, among processes. It returns a function that
        gives this process's rows of a parameter and the number of the first; only they are read.

        Beside the weights about PIECE bytes are in memory. Raises FileNotFoundError, or ValueError
        for an unsupported config and weights missing, unknown, misshapen, quantised or not finite.
        """
        folder = Path(folder)
        config = GPTConfig.from_hf(read_json(folder / "config.json"))
        with torch.device("meta"):
            model = GPT(config)
        model.long_rope = None if length is None else config.takes_long_rope(length)
        tensors = _find_tensors(folder, model)
        if shard:
            own_rows = shard(model.to(dtype))
            model.to_empty(device=device)
        else:  # as to_empty does, but to_empty imports sympy: 0.5 s and 40 MB
            model._apply(lambda p: torch.empty(p.shape, dtype=dtype, device=device))
        for name, (file, parameter, rows) in tensors.items():
            p = model.get_parameter(parameter)
            ours, first = own_rows(p) if shard else (p.detach(), 0)
            _load(file, name, rows, ours, first, config.tied and name == "lm_head.weight")
        return model

    def save_pretrained(self, folder, gather=lambda p: p):
        """Write config.json, as it was read, and model.safetensors, both as transformers has them.

        gather: makes a sharded parameter whole (a collective). folder None: write nothing.
        """
        tensors = {}
        for name, (parameter, rows) in self.hf_rows().items():
            p = gather(self.get_parameter(parameter))
            if folder:
                tensors[name] = p[rows].detach().cpu().contiguous()
        if not folder:
            return
        if not self.config.hf:
            raise ValueError("this config did not come from GPTConfig.from_hf: no config.json")
        key = "dtype" if "dtype" in self.config.hf else "torch_dtype"  # before transformers 5
        hf = self.config.hf | {key: str(self.norm.dtype).removeprefix("torch.")}
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})

    def hf_rows(self) -> dict[str, tuple[str, slice]]:
        """{name of a tensor in the file: (parameter, the rows of it that the tensor fills)}."""
        c, places, stored = self.config, {}, dict(STORED)
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        if c.fused:
            stored |= STORED_FUSED
        if c.post_norm:
            stored |= STORED_POST_NORM
        for parameter, p in self.named_parameters():
            path = parameter.split(".", 2)  # ["norm"] or ["blocks", layer, "qkv.weight"]
            layer = f"model.layers.{path[1]}." if len(path) == 3 else ""
            names, start = stored[path[-1]], 0
            sizes = (q, kv, kv) if len(names) == 3 else [len(p) // len(names)] * len(names)
            for name, size in zip(names, sizes):
                places[layer + name] = parameter, slice(start, start + size)
                start += size
        return places


def rotation(positions, frequencies, scale, dtype):
    """(cos, sin), each (B or 1, T, 1, hd): two halves (a, b) turn to (a, b) * cos + (b, a) * sin.

    positions: (B or 1, T). frequencies: (hd / 2,). Angles are float32 whatever dtype is.
    """
    angles = positions[:, :, None, None] * frequencies  # (B or 1, T, 1, hd / 2)
    cos, sin = angles.cos(), angles.sin()
    cos, sin = cos * scale, sin * scale
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def attention_mask(positions, span, window, dtype):
    """What queries see, as (B or 1, 1, T, S) of 0 and -inf; None: these tokens up to themselves.
    span: S, where earlier tokens are seen too. window: only the last so many positions are."""
    T = positions.shape[1]
    if span is None and (window is None or T <= window):
        return None
    queries = positions[:, None, :, None]  # (B or 1, 1, T, 1)
    keys = torch.arange(span or T, device=positions.device)  # (S,)
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, -math.inf)


def _find_tensors(folder, model):
    """{name: (file, parameter, its rows)} of all stored tensors, which must fit the model."""
    index, files = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file() and not (folder / "model.safetensors").is_file():
        weight_map = read_json(index).get("weight_map")
        files = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        if not files or not all(isinstance(x, str) and Path(x).name == x for x in files):
            raise ValueError(f"{index} should have a weight_map from tensors to files beside it")
    found = {}
    for file in sorted(files):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing (only safetensors are read)")
        with open_tensors(folder / file) as opened:
            for name in opened.keys():
                stored = opened.get_slice(name)
                found[name] = folder / file, tuple(stored.get_shape()), stored.get_dtype()
    places = model.hf_rows()
    if "lm_head.weight" in found:  # some files repeat a tied embedding
        places.setdefault("lm_head.weight", places["model.embed_tokens.weight"])
    lacking = [name for name in places if name not in found]
    unknown = [name for name in found if name not in places and not name.endswith(IGNORED)]
    for what, names in (("lack", lacking), ("also hold", unknown)):
        if names:
            raise ValueError(f"{folder}: for its config.json the weights {what} {len(names)} "
                             f"tensors: {names[0]}")
    for name, (parameter, rows) in places.items():
        file, shape, dtype = found[name]
        expected = (rows.stop - rows.start, *model.get_parameter(parameter).shape[1:])
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{file}: {name} is {dtype}; quantised weights are not supported")
        if shape != expected:
            raise ValueError(f"{file}: {name} has shape {shape}, config.json asks for {expected}")
    return {name: (found[name][0], *place) for name, place in places.items()}


def _load(file, name, rows, ours, first, repeated):
    """Copy the part of a stored tensor (`rows` of a parameter) that lies in `ours` (the parameter's
    rows from `first` on), PIECE bytes at a time. repeated: `ours` are loaded; compare instead."""
    start, stop = max(first, rows.start), min(first + len(ours), rows.stop)
    step = max(1, PIECE // (8 * math.prod(ours.shape[1:])))
    for at in range(start, stop, step):
        end = min(at + step, stop)
        place = ours[at - first:end - first]
        with open_tensors(file) as mapped:  # anew: pages that were read stay while it is mapped
            piece = mapped.get_slice(name)[at - rows.start:end - rows.start].to(place)
        if repeated and not torch.equal(piece, place):
            raise ValueError(f"{file}: {name} is not the embedding, but config.json ties them")
        place.copy_(piece)
        if not place.isfinite().all():
            raise ValueError(f"{file}: {name} holds NaN or infinity (as {place.dtype})")
