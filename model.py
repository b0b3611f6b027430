"""GPT: one decoder that its config.json makes Llama / SmolLM2, Qwen2.5, Qwen3, Phi-3.5-mini or Gemma 3 (text).

All five read a token, add attention and a gated MLP to a residual stream layer after layer, and normalise at the end.
What sets them apart is named in GPTConfig and nowhere else:

                                  Llama    Qwen2.5   Qwen3    Phi-3.5    Gemma 3
    bias on q, k, v               -        yes       -        -          -
    q and k normed per head       -        -         yes      -          yes
    norm after each sublayer too  -        -         -        -          yes
    norm weight                   w        w         w        w          1 + w
    gate activation               SiLU     SiLU      SiLU     SiLU       GELU (tanh)
    embedding times               1        1         1        1          sqrt(D)
    scores times                  hd^-.5   hd^-.5    hd^-.5   hd^-.5     query_pre_attn_scalar^-.5
    rope                          plain or scaled ('linear', 'llama3')   one base for local, one for global layers
                                                              Phi-3.5: 'longrope', short or long factors by length
    sliding window                -        -         -        (4k only)  local layers
    q, k, v and gate, up stored   apart    apart     apart    fused      apart      (in memory: always fused)

Letters: B rows, T tokens, S positions attended to, D width, H query heads, Hkv key/value heads, hd head width, V vocabulary.
"""
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

FAMILIES = {"llama": "Llama / SmolLM2", "qwen2": "Qwen2.5", "qwen3": "Qwen3", "phi3": "Phi-3.5", "gemma3_text": "Gemma 3"}
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}


@dataclass
class GPTConfig:
    """What the decoder is built from. Made by from_hf; `hf` keeps the config.json as it was read, for save_pretrained."""
    vocab_size: int
    width: int                                  # D, the residual stream
    mlp_width: int
    layers: int
    heads: int                                  # H
    kv_heads: int                               # Hkv; H / Hkv query heads share one key/value head
    head_dim: int                               # hd; heads * head_dim need not be the width
    max_length: int                             # positions the model was made for (not enforced here)
    norm_eps: float
    tied: bool                                  # the unembedding is the embedding
    rope: dict                                  # rope_type, rope_theta and what that type needs
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norm: bool = False                     # normalise what attention and MLP return, before it is added
    norm_offset: bool = False                   # norm weights are stored as their distance from 1
    gelu: bool = False
    embedding_scale: float = 1.0
    attention_scale: float = 1.0
    windows: list[int | None] = field(default_factory=list)   # per layer: how many positions it sees, its own included
    local_rope: dict | None = None              # rope of the layers with a window, where it differs
    fused: bool = False                         # only how the file stores the projections
    hf: dict = field(default_factory=dict, repr=False)

    @staticmethod
    def from_hf(config: dict) -> "GPTConfig":
        """A Hugging Face config.json (any transformers version's spelling) as a GPTConfig. Raises ValueError in one sentence."""
        kind = config.get("model_type")
        if kind not in FAMILIES:
            raise ValueError(f"model_type {kind!r} is not supported; supported are {', '.join(FAMILIES)}")
        gemma, phi = kind == "gemma3_text", kind == "phi3"
        heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        windows = [None] * layers
        if gemma:
            pattern = config.get("sliding_window_pattern") or 6           # every sixth layer is global
            types = config.get("layer_types") or ["sliding_attention" if (i + 1) % pattern else "full_attention"
                                                  for i in range(layers)]
            windows = [config["sliding_window"] if t == "sliding_attention" else None for t in types]
        elif phi:
            windows = [config.get("sliding_window")] * layers
        return GPTConfig(
            vocab_size=config["vocab_size"], width=config["hidden_size"], mlp_width=config["intermediate_size"],
            layers=layers, heads=heads, kv_heads=config.get("num_key_value_heads") or heads, head_dim=head_dim,
            max_length=config["max_position_embeddings"], norm_eps=config["rms_norm_eps"],
            tied=config.get("tie_word_embeddings", gemma),
            rope=_rope_parameters(config, "full_attention"),
            qkv_bias=kind == "qwen2", qk_norm=kind in ("qwen3", "gemma3_text"), post_norm=gemma, norm_offset=gemma, gelu=gemma,
            embedding_scale=config["hidden_size"] ** 0.5 if gemma else 1.0,
            attention_scale=(config.get("query_pre_attn_scalar", 256) if gemma else head_dim) ** -0.5,
            windows=windows, local_rope=_rope_parameters(config, "sliding_attention") if gemma else None,
            fused=phi, hf=dict(config))


def _rope_parameters(config: dict, layer_type: str) -> dict:
    """{"rope_type", "rope_theta", ...} of global or local layers, from either spelling of config.json.

    transformers 5 writes one dict rope_parameters (Gemma: one per layer type); before that rope_theta, rope_scaling and,
    for Gemma, rope_local_base_freq stood side by side.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    local = layer_type == "sliding_attention"
    if "full_attention" in rope or "sliding_attention" in rope:
        rope = rope.get(layer_type) or {}
    elif local:
        rope = {}                                                         # scaling is for the global layers
    theta = config.get("rope_local_base_freq", 1e4) if local else config.get("rope_theta", 1e4)
    rope = {"rope_theta": theta, **rope}
    return {**rope, "rope_type": rope.get("rope_type") or rope.get("type") or "default"}


def inverse_frequencies(rope: dict, head_dim: int) -> torch.Tensor:
    """(hd / 2,) float32 angles per position for one rope dict."""
    return 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)


class KVCache:
    """Keys and values of `slots` rows of up to `max_length` tokens, allocated once; zeros, so that masked junk is finite.

    keys[layer], values[layer]: (slots, Hkv, max_length, hd). lengths: (slots,) int64 on the device, live tokens per row.
    longest: an int that bounds lengths over the rows in use, so that nobody has to ask the device. Who knows better than
    forward (padding in a prefill, a row that ended) sets both: what lies beyond a row's length is never read.
    """
    def __init__(self, config: GPTConfig, slots: int, max_length: int, *, dtype=torch.float32, device="cpu"):
        shape = (slots, config.kv_heads, max_length, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self.longest = 0
        self.max_length = max_length

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, index: torch.Tensor | None):
        """Store k, v (B, T, Hkv, hd): at `index` (B * T * Hkv,) of the flattened layer, or from position 0 on without one."""
        B, T, _, hd = k.shape
        for store, new in ((self.keys[layer], k), (self.values[layer], v)):
            if index is None:
                store[:B, :, :T] = new.transpose(1, 2)
            else:
                store.view(-1, hd).index_copy_(0, index, new.reshape(-1, hd).to(store.dtype))


class Block(nn.Module):
    """Attention and MLP, each: norm, sublayer, (Gemma: norm again,) add to the stream."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        c, self.config, self.layer = config, config, layer
        self.attention_norm = nn.Parameter(torch.ones(c.width))
        self.qkv = nn.Linear(c.width, (c.heads + 2 * c.kv_heads) * c.head_dim, bias=c.qkv_bias)
        if c.qk_norm:
            self.q_norm = nn.Parameter(torch.ones(c.head_dim))
            self.k_norm = nn.Parameter(torch.ones(c.head_dim))
        self.attention_out = nn.Linear(c.heads * c.head_dim, c.width, bias=False)
        self.mlp_norm = nn.Parameter(torch.ones(c.width))
        self.gate_up = nn.Linear(c.width, 2 * c.mlp_width, bias=False)
        self.down = nn.Linear(c.mlp_width, c.width, bias=False)
        if c.post_norm:
            self.attention_post_norm = nn.Parameter(torch.ones(c.width))
            self.mlp_post_norm = nn.Parameter(torch.ones(c.width))

    def forward(self, x, rotation, mask, cache, index, span):
        """x (B, T, D) -> (B, T, D). rotation: (cos, sin); mask None: causal over x alone; else over cache[:, :span]."""
        c = self.config
        out = self.attention(rms_norm(x, self.attention_norm, c), rotation, mask, cache, index, span)
        x = x + (rms_norm(out, self.attention_post_norm, c) if c.post_norm else out)
        gate, up = self.gate_up(rms_norm(x, self.mlp_norm, c)).chunk(2, dim=-1)   # (B, T, mlp) each
        out = self.down((F.gelu(gate, approximate="tanh") if c.gelu else F.silu(gate)) * up)
        return x + (rms_norm(out, self.mlp_post_norm, c) if c.post_norm else out)

    def attention(self, x, rotation, mask, cache, index, span):
        c, (B, T, _) = self.config, x.shape
        H, Hkv = c.heads, c.kv_heads
        qkv = self.qkv(x).view(B, T, H + 2 * Hkv, c.head_dim)
        qk, v = qkv[:, :, :H + Hkv], qkv[:, :, H + Hkv:]
        if c.qk_norm:                                                     # q and k share one call: fewer, larger ops
            weight = torch.cat((self.q_norm.expand(H, -1), self.k_norm.expand(Hkv, -1)))   # (H + Hkv, hd)
            qk = rms_norm(qk, weight, c)
        cos, sin = rotation
        qk = torch.addcmul(qk * cos, qk.roll(c.head_dim // 2, -1), sin).to(v.dtype)
        q, k = qk[:, :, :H], qk[:, :, H:]
        if cache is not None:
            cache.write(self.layer, k, v, index)
        if span is None:                                                  # nothing but these tokens to attend to
            k, v = k.transpose(1, 2), v.transpose(1, 2)                   # (B, Hkv, T, hd)
        else:
            k, v = cache.keys[self.layer][:B, :, :span], cache.values[self.layer][:B, :, :span]
            q = q.to(k.dtype)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None,
                                             scale=c.attention_scale, enable_gqa=H != Hkv)   # (B, H, T, hd)
        return self.attention_out(out.transpose(1, 2).reshape(B, T, H * c.head_dim).to(x.dtype))


def rms_norm(x, weight, config):
    """x / rms(x) * weight (Gemma: 1 + weight) over the last dimension, in at least float32, in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = weight.to(wide) + 1 if config.norm_offset else weight.to(wide)
    if weight.dim() == 1:
        return F.rms_norm(x.to(wide), weight.shape, weight, config.norm_eps).to(x.dtype)
    return (F.rms_norm(x.to(wide), weight.shape[-1:], None, config.norm_eps) * weight).to(x.dtype)


class GPT(nn.Module):
    """The decoder. GPT(config) has random weights (normal, deviation 0.02, from torch's global generator)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.Parameter(torch.ones(config.width))
        if not config.tied:
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if name.endswith("norm"):
                nn.init.constant_(p, 0.0 if config.norm_offset else 1.0)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            else:
                nn.init.normal_(p, std=0.02)
        # Not a buffer: model.to(bfloat16) must not round the frequencies.
        ropes = [config.rope] + ([config.local_rope] if config.local_rope else [])
        self.frequencies = torch.stack([inverse_frequencies(rope, config.head_dim) for rope in ropes])   # (1 or 2, hd / 2)

    @property
    def unembedding(self) -> torch.Tensor:
        """(V, D): logits are hidden @ unembedding.T."""
        return self.embedding.weight if self.config.tied else self.head.weight

    def forward(self, tokens: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """tokens (B, T) int64 -> hidden (B, T, D) after the last norm.

        Without a cache a row is a sequence from position 0, padded on the right with anything. With one, token t of row b
        continues row b of the cache at position lengths[b] + t, and lengths[:B] and longest grow by T (no gradient).
        Raises ValueError when the cache has no room.
        """
        if cache is not None and torch.is_grad_enabled():
            with torch.no_grad():
                return self.forward(tokens, cache)
        c, (B, T), device = self.config, tokens.shape, tokens.device
        if cache is not None and cache.longest + T > cache.max_length:
            raise ValueError(f"the KV cache holds {cache.max_length} tokens a row; {cache.longest} are there and {T} more "
                             "do not fit: ask for a larger max_length")
        x = self.embedding(tokens)
        if c.embedding_scale != 1.0:
            x = x * torch.tensor(c.embedding_scale, dtype=x.dtype).item()   # rounded to x's dtype, as Gemma was trained
        positions = torch.arange(T, device=device)[None]                  # (1, T)
        index = span = None
        if cache is not None and cache.longest > 0:
            positions = cache.lengths[:B, None] + positions               # (B, T)
            span = min(-(-(cache.longest + T) // 64) * 64, cache.max_length)
            row_heads = torch.arange(B * c.kv_heads, device=device).view(B, 1, c.kv_heads) * cache.max_length
            index = (row_heads + positions[:, :, None]).flatten()         # where k and v go, cache layer seen as (-1, hd)
        rotations = self.rotations(positions, x.dtype)
        mask_dtype = x.dtype if cache is None else cache.keys[0].dtype
        masks = {window: _mask(positions, span, window, mask_dtype) for window in set(c.windows)}
        for block, window in zip(self.blocks, c.windows):
            x = block(x, rotations[-1 if window else 0], masks[window], cache, index, span)
        if cache is not None:
            cache.lengths[:B] += T
            cache.longest += T
        return rms_norm(x, self.norm, c)

    def rotations(self, positions, dtype):
        """Per set of frequencies the (cos, sin), each (B or 1, T, 1, hd), so that a turned x is x * cos + roll(x) * sin."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        out = []
        for frequencies in self.frequencies:
            angles = positions[:, :, None, None] * frequencies            # (B or 1, T, 1, hd / 2) float32
            cos, sin = angles.cos(), angles.sin()
            out.append((torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)))
        return out

    @staticmethod
    def from_pretrained(folder, *, dtype=torch.float32, device="cpu") -> "GPT":
        """The model in `folder` (config.json and model.safetensors), its weights in `dtype` on `device`."""
        folder = Path(folder)
        config = GPTConfig.from_hf(json.loads((folder / "config.json").read_text()))
        with torch.device("meta"):
            model = GPT(config)
        model = model.to(dtype).to_empty(device=device)
        places = hf_places(model)
        with safe_open(folder / "model.safetensors", framework="pt") as file, torch.no_grad():
            for name, place in places.items():
                place.copy_(file.get_tensor(name))
        return model

    def save_pretrained(self, folder) -> None:
        """Write config.json and model.safetensors with Hugging Face names, in the parameters' dtype."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        hf = dict(self.config.hf)
        hf["dtype" if "dtype" in hf else "torch_dtype"] = DTYPES[self.norm.dtype]
        (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
        tensors = {name: place.detach().cpu().contiguous() for name, place in hf_places(self).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _mask(positions, span, window, dtype):
    """What a query may see as an additive mask (B or 1, 1, T, S) of 0 and -inf; None where plain causality says it all."""
    T = positions.shape[1]
    if span is None and (window is None or T <= window):
        return None
    keys = torch.arange(span or T, device=positions.device)               # (S,)
    seen = keys <= positions[:, :, None]                                  # (B or 1, T, S)
    if window is not None:
        seen &= keys > positions[:, :, None] - window
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)[:, None]


def hf_places(model: GPT) -> dict[str, torch.Tensor]:
    """{name in the file: the parameter, or the rows of a fused parameter, that it fills}, in the file's order."""
    c = model.config
    places = {"model.embed_tokens.weight": model.embedding.weight}
    for i, block in enumerate(model.blocks):
        at = f"model.layers.{i}."
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        if c.fused:
            places[at + "self_attn.qkv_proj.weight"] = block.qkv.weight
            places[at + "mlp.gate_up_proj.weight"] = block.gate_up.weight
        else:
            for kind in ("weight", "bias") if c.qkv_bias else ("weight",):
                rows = getattr(block.qkv, kind).split((q, kv, kv))
                for name, part in zip(("q_proj", "k_proj", "v_proj"), rows):
                    places[f"{at}self_attn.{name}.{kind}"] = part
            gate, up = block.gate_up.weight.chunk(2)
            places[at + "mlp.gate_proj.weight"], places[at + "mlp.up_proj.weight"] = gate, up
        places[at + "self_attn.o_proj.weight"] = block.attention_out.weight
        places[at + "mlp.down_proj.weight"] = block.down.weight
        places[at + "input_layernorm.weight"] = block.attention_norm
        if c.post_norm:
            places[at + "post_attention_layernorm.weight"] = block.attention_post_norm
            places[at + "pre_feedforward_layernorm.weight"] = block.mlp_norm
            places[at + "post_feedforward_layernorm.weight"] = block.mlp_post_norm
        else:
            places[at + "post_attention_layernorm.weight"] = block.mlp_norm
        if c.qk_norm:
            places[at + "self_attn.q_norm.weight"] = block.q_norm
            places[at + "self_attn.k_norm.weight"] = block.k_norm
    places["model.norm.weight"] = model.norm
    if not c.tied:
        places["lm_head.weight"] = model.head.weight
    return places
