"""Writes tests/model_vectors/ for test_model.py: what transformers computes on small models.

    python tests/make_model_vectors.py    # from the repository's root; see requirements-dev.txt

Each case is a config.json (as transformers writes it) with the shapes of its tensors, in
cases.json, and the float32 logits, computed with eager attention, in logits.safetensors. Weights
and tokens are not stored: `weights` and `tokens` make them from numpy's frozen RandomState streams.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

VECTORS = Path(__file__).resolve().parent / "model_vectors"
LENGTH = 40  # tokens: beyond Gemma's window (12) and Phi's rope switch (32)

SMALL = dict(
    vocab_size=40,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
PHI = dict(SMALL, model_type="phi3", num_key_value_heads=6, tie_word_embeddings=False)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=1e4,
    short_factor=[1.0, 1.1, 1.3, 1.6],
    long_factor=[1.2, 2.0, 5.0, 11.0],
)
GEMMA = dict(
    SMALL,
    model_type="gemma3_text",
    num_key_value_heads=1,
    head_dim=16,
    sliding_window=12,
    query_pre_attn_scalar=24,
    sliding_window_pattern=2,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)

CASES = {  # what is asked of transformers' config classes; cases.json holds what they make of it
    "llama": dict(SMALL, model_type="llama", head_dim=12),  # not width / heads
    "llama, scaled rope, untied": dict(
        SMALL,
        model_type="llama",
        num_key_value_heads=6,
        tie_word_embeddings=False,
        rope_parameters=LLAMA3,
    ),
    "qwen2.5": dict(SMALL, model_type="qwen2", num_key_value_heads=1),
    "qwen3": dict(SMALL, model_type="qwen3", head_dim=16, tie_word_embeddings=False),
    "phi-3.5, short": dict(PHI, original_max_position_embeddings=64, rope_parameters=LONGROPE),
    "phi-3.5, long": dict(PHI, original_max_position_embeddings=32, rope_parameters=LONGROPE),
    "phi-3, sliding window": dict(PHI, num_key_value_heads=2, sliding_window=12),
    "gemma 3": GEMMA,
    "gemma 3, scaled rope": dict(
        GEMMA,
        num_key_value_heads=3,
        rope_parameters={
            "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
            "sliding_attention": dict(rope_type="default", rope_theta=1e4),
        },
    ),
}


def weights(shapes: dict[str, list[int]], seed: int) -> dict[str, torch.Tensor]:
    """{name: float32 tensor}, of a size at which every part of the model moves the logits."""
    random, out = np.random.RandomState(seed), {}
    for name in sorted(shapes):
        w = random.standard_normal(shapes[name])
        if name.endswith("bias"):
            w *= 0.5
        elif name.endswith("norm.weight"):
            w = 0.3 * w + 1
        else:
            w *= 1.5 * shapes[name][-1] ** -0.5
        out[name] = torch.from_numpy(w.astype(np.float32))
    return out


def tokens(seed: int) -> torch.Tensor:
    """(1, LENGTH) int64"""
    return torch.from_numpy(
        np.random.RandomState(seed).randint(0, SMALL["vocab_size"], (1, LENGTH))
    )


def main():
    from transformers import AutoConfig, AutoModelForCausalLM

    cases, logits = {}, {}
    for seed, (name, config) in enumerate(CASES.items()):
        config = AutoConfig.for_model(**config)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            shapes = {
                key: list(w.shape)
                for key, w in load_file(Path(folder, "model.safetensors")).items()
            }
            saved = json.loads(Path(folder, "config.json").read_text())
        cases[name] = {"config": saved, "shapes": shapes, "seed": seed}
        missing, unknown = model.load_state_dict(weights(shapes, seed), strict=False)
        assert not unknown and set(missing) <= {"lm_head.weight"}  # a tied head is not stored
        with torch.no_grad():
            logits[name] = model(tokens(seed)).logits.contiguous()  # (1, LENGTH, V)
    VECTORS.mkdir(exist_ok=True)
    (VECTORS / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")
    save_file(logits, VECTORS / "logits.safetensors")


if __name__ == "__main__":
    main()
