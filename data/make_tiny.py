"""Make the embedded model: a tokenizer and a small transformer for data/tiny_world.py.

    python -m data.make_tiny [--out data/tiny] [--steps 1800] [--seed 0]    # 10 minutes, two cores

data/tiny/ is a model folder like any other (Qwen3 architecture, byte-level BPE), small enough to
live in git and to be trained by reinforcement learning in minutes.
"""
import argparse
import json
import math
import random
import re
import time
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data.hub import TINY
from data.prompts import encode_prompt
from data.tiny_world import training_texts
from data.tokenizer import Tokenizer, byte_alphabet
from kernels import keep_freed_memory
from model import GPT, GPTConfig

BATCH = 64  # examples in an optimizer step
TOKENS_PER_BATCH = 64 * BATCH  # answer tokens of a batch, about

# ---- the tokenizer: every word of the grammar and every number below 100 is one token ----

SPECIAL = ["<|endoftext|>", "<|question|>", "<|answer|>"]
# A piece is a word, a number of at most two digits, or punctuation, each with the blank before it.
PATTERN = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+"
PIECE = re.compile(r" ?[^\W\d_]+| ?\d{1,2}| ?[^\w\s]+|\s+")  # the same, for Python's re
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|question|>{{ message['content'] }}"
    "{% else %}<|answer|>{{ message['content'] }}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|answer|>{% endif %}"
)


def learn_merges(words: dict[str, int]) -> list[tuple[str, str]]:
    """Byte-pair encoding: merge the most frequent pair until every word is a single token."""
    alphabet = byte_alphabet()
    pieces = {word: [alphabet[b] for b in word.encode()] for word in words}
    merges = []
    while True:
        counts: dict[tuple[str, str], int] = {}
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                counts[pair] = counts.get(pair, 0) + words[word]
        if not counts:
            return merges
        best = max(sorted(counts), key=counts.get)
        merges.append(best)
        for word, parts in pieces.items():
            pieces[word] = merge(parts, best)


def merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """`parts` with every occurrence of `pair` joined, from left to right."""
    i, merged = 0, []
    while i < len(parts):
        step = 2 if tuple(parts[i:i + 2]) == pair else 1
        merged.append("".join(parts[i:i + step]))
        i += step
    return merged


def write_tokenizer(folder: Path, seed: int) -> int:
    """Write the files that make up a tokenizer and return the size of its vocabulary.

    They are tokenizer.json, tokenizer_config.json and generation_config.json.
    """
    words = {f" {n}": 1 for n in range(100)}
    for question, text in islice(training_texts(seed), 4000):
        for piece in PIECE.findall(question + text):
            words[piece] = words.get(piece, 0) + 1
    merges = learn_merges(words)
    tokens = byte_alphabet() + [left + right for left, right in merges]
    added = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    bpe = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [list(pair) for pair in merges],
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": len(tokens) + i, "content": token, **added} for i, token in enumerate(SPECIAL)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": bpe,
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[0],
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {"eos_token_id": len(tokens), "pad_token_id": len(tokens)}
    write_json(folder / "tokenizer.json", tokenizer, indent=None)
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "generation_config.json", generation)
    return len(tokens) + len(SPECIAL)


def write_json(path: Path, content: dict, indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent), encoding="utf-8")


# ---- the model ----


def tiny_config(vocab_size: int) -> dict:
    """config.json of the embedded model: Qwen3's architecture, three layers of width 128."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "eos_token_id": vocab_size - len(SPECIAL),
        "pad_token_id": vocab_size - len(SPECIAL),
    }


def batches(tokenizer: Tokenizer, seed: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """An endless stream of (tokens (B, T), targets (B, T)); targets are -100 outside the answer."""
    texts, shuffle = training_texts(seed), random.Random(f"batches {seed}")
    stop = next(iter(tokenizer.stop_ids))
    while True:
        rows = []
        for question, text in islice(texts, batch_size * 32):
            rows.append((encode_prompt(tokenizer, question), tokenizer.encode(text) + [stop]))
        # Batches of rows of like length need half as much padding.
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        starts = list(range(0, len(rows), batch_size))
        shuffle.shuffle(starts)
        for start in starts:
            batch = rows[start:start + batch_size]
            width = max(len(prompt) + len(answer) for prompt, answer in batch)
            tokens = torch.zeros(batch_size, width, dtype=torch.long)
            targets = torch.full((batch_size, width), -100)
            for b, (prompt, answer) in enumerate(batch):
                end = len(prompt) + len(answer)
                tokens[b, :end] = torch.tensor(prompt + answer)
                targets[b, len(prompt) - 1:end - 1] = torch.tensor(answer)
            yield tokens, targets


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(
        description="Make the embedded model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=TINY, help="the model folder to write")
    add("--steps", type=int, default=1800, help=f"optimizer steps of {BATCH} examples")
    add("--lr", type=float, default=2e-3,
        help="peak learning rate (AdamW; linear warm-up, cosine to a tenth)")
    add("--seed", type=int, default=0, help="of the stories, the styles, and the initial weights")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    vocab_size = write_tokenizer(args.out, args.seed)
    write_json(args.out / "config.json", tiny_config(vocab_size))
    tokenizer = Tokenizer.from_pretrained(args.out)

    torch.manual_seed(args.seed)
    model = GPT(GPTConfig.from_hf(tiny_config(vocab_size)))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {vocab_size} tokens")
    began, seen, stream = time.time(), 0, batches(tokenizer, args.seed, BATCH)
    bar = tqdm(range(args.steps), desc="make_tiny", smoothing=0.02)
    for step in bar:
        warm = min(1.0, (step + 1) / 100)
        rate = args.lr * warm * (0.55 + 0.45 * math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens, targets = next(stream)
        is_answer = targets.flatten() >= 0
        count = int(is_answer.sum())
        hidden = model(tokens).flatten(0, 1)[is_answer]  # (count, D)
        logits = hidden @ model.unembedding.T  # (count, V)
        # The denominator is fixed: a batch holds answers of one length, and a mean over each batch
        # would weigh the tokens of terse answers more.
        total = F.cross_entropy(logits, targets.flatten()[is_answer], reduction="sum")
        (total / TOKENS_PER_BATCH).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += count
        if step % 25 == 0:
            bar.set_postfix(loss=f"{total.item() / count:.3f}", tokens=f"{seen:,}")
    model.to(torch.bfloat16).save_pretrained(args.out)
    print(f"{args.out}: {args.steps} steps, {seen:,} answer tokens, {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
