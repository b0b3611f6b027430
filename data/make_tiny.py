"""The embedded model: word problems from a grammar, a tokenizer for them, and a small transformer trained on both.

    python -m data.make_tiny [--out data/tiny] [--steps 1800] [--seed 0]        # about 10 minutes on two cores

data/tiny/ is a model folder like any other (Qwen3 architecture, byte-level BPE), small enough to live in git and to be
trained by reinforcement learning in minutes. It is made to need what SAR gives:

  * Fallible. It learned two to four steps of arithmetic on numbers below 100 from a teacher who misreads some kinds of
    events more often than not (MISREAD), and it has not learned all of the arithmetic. So its likeliest answer is wrong for
    some questions, the right one is within reach of sampling, and neither depends on how verbose the answer is.
  * Verbose by preference. A solution is written in one of three styles (see `solution`): verbose (the likeliest: it opens
    with filler, restates the problem, checks each step again and says that it is done), terse (the equations alone), or only the
    answer. Filler and checks leave the result alone, so a learner that looks at correctness only has no reason to drop them.
  * It knows what an answer looks like without its question: some of the training examples have an empty question, so that
    ppl(a) is a probability under the model rather than a surprise at a strange prompt.

Everything is drawn from seeded generators. A question belongs to the test set if its checksum says so; neither this
training nor `tiny_problems("train")` ever draws such a question.
"""

import argparse
import json
import math
import random
import re
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

NAMES = (
    "Tom Ann Ben Mia Sam Eva Leo Zoe Max Ivy Dan Amy Jack Lily Owen Ruby Noah Emma Luke Rosa Adam Nora Paul Jane"
).split()
THINGS = (
    "apples pears plums coins books pens cards shells stamps marbles stones cups beads roses eggs cakes nuts keys "
    "kites balls hats maps rings toys"
).split()
EMPTY_QUESTION_SHARE = 0.15
STYLES = {"verbose": 0.72, "terse": 0.22, "answer only": 0.06}
TOKENS_PER_BATCH = 64 * 64  # answer tokens of 64 examples, about
MISREAD = {
    "times": 0.75,
    "half": 0.6,
    "boxes": 0.3,
}  # how often the teacher takes "3 times as many" for "3 more", and so on
KEEP = 0.85  # chance of each dispensable sentence within the verbose style


@dataclass
class Story:
    """A word problem: who starts with how many, and what happens to them."""

    owner: str
    thing: str
    start: int
    events: list[tuple[str, int, int]]  # (kind, number, second number or 0)
    facts: list[str]  # the question's sentences without the last
    asked: str  # its last sentence

    @property
    def question(self) -> str:
        return " ".join([*self.facts, self.asked])

    @property
    def answer(self) -> str:
        return str(work_out(self)[-1][3])


def work_out(
    story: Story, careless: random.Random | None = None
) -> list[tuple[int, str, int, int]] | None:
    """The story's arithmetic, a (left, operator, right, result) for each step; None where it leaves the numbers 0 to 99.
    With `careless`, every event is misread with its chance in MISREAD."""
    total, steps = story.start, []

    def step(left: int, op: str, right: int) -> int:
        exact = {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[op]
        steps.append((left, op, right, int(exact) if exact == int(exact) else -1))
        return steps[-1][3]

    for kind, n, each in story.events:
        misread = careless is not None and careless.random() < MISREAD.get(kind, 0)
        if kind == "gain":
            total = step(total, "+", n)
        elif kind == "loss":
            total = step(total, "-", n)
        elif kind == "boxes":
            total = (
                step(total, "+", step(n, "*", each)) if not misread else step(total, "+", each)
            )  # as if it were one box
        elif kind == "times":
            total = (
                step(total, "*", n) if not misread else step(total, "+", n)
            )  # as if it were n more
        elif kind == "half":
            total = (
                step(total, "/", 2) if not misread else step(total, "-", 2)
            )  # as if it were two of them
    return (
        steps
        if all(
            0 <= number <= 99
            for left, _, right, result in steps
            for number in (left, right, result)
        )
        else None
    )


def draw_story(rng: random.Random) -> Story:
    """A random story of two to four steps; every number in it lies between 0 and 99."""
    while True:
        owner, friend = rng.sample(NAMES, 2)
        thing, start, length = rng.choice(THINGS), rng.randint(4, 60), rng.choice((2, 3, 3, 4))
        facts, events, subject = [f"{owner} has {start} {thing}."], [], owner
        while sum(1 + (kind == "boxes") for kind, _, _ in events) < length:
            kind = rng.choice(("gain", "gain", "loss", "loss", "boxes", "times", "half"))
            n, each = rng.randint(2, 40), 0
            if kind == "gain":
                facts.append(
                    rng.choice((f"{subject} finds {n} more.", f"{subject} buys {n} more."))
                )
            elif kind == "loss":
                facts.append(
                    rng.choice((f"{subject} loses {n} of them.", f"{subject} sells {n} of them."))
                )
            elif kind == "boxes":
                n, each = rng.randint(2, 6), rng.randint(2, 9)
                facts.append(f"{subject} gets {n} boxes with {each} {thing} each.")
            elif kind == "times":
                if subject == friend:
                    continue  # a third person would be one too many
                n, subject = rng.choice((2, 3)), friend
                facts.append(f"{friend} has {n} times as many as {owner}.")
            elif kind == "half":
                facts.append(f"{subject} gives half of them away.")
            events.append((kind, n, each))
        story = Story(
            owner, thing, start, events, facts, f"How many {thing} does {subject} have now?"
        )
        if (steps := work_out(story)) and len(steps) == length and steps[-1][3] > 0:
            return story


def solution(
    story: Story, style: str, rng: random.Random, keep: float = KEEP, careless: bool = False
) -> str:
    """The story's solution, written out in one of STYLES; verbose sentences are kept with probability `keep` each.
    A careless one may have misread what happens (MISREAD), and is right about all else."""
    steps = careless and work_out(story, rng) or work_out(story)
    if style == "answer only":
        return f"#### {steps[-1][3]}"
    verbose = style == "verbose"

    def sometimes(text: str) -> list[str]:
        return [text] if verbose and rng.random() < keep else []

    parts = sometimes("Let us think about this step by step.")
    parts += sometimes(" ".join(["We know this:", *story.facts]))
    for i, (left, op, right, result) in enumerate(steps):
        equation = f"{left} {op} {right} = {result}"
        # the first equation of every solution names whose things are counted: a concise answer still tells of its question
        parts.append(f"{story.owner}: {equation} {story.thing}." if i == 0 else f"{equation}.")
        parts += sometimes(f"Check it again: {equation}, right.")
    parts += sometimes("Now we have all that we need.")
    return " ".join(parts) + f"\n#### {steps[-1][3]}"


def is_test(question: str) -> bool:
    return zlib.crc32(question.encode()) % 16 == 0


def stories(seed: int, *, test: bool = False):
    """An endless, seeded stream of stories from the training side or the test side of the split."""
    rng = random.Random(f"{'test' if test else 'train'} {seed}")
    while True:
        story = draw_story(rng)
        if is_test(story.question) == test:
            yield story


def tiny_problems(split: str) -> list:
    """The embedded model's own data set: 4,096 problems ("train") or 512 that were never trained on ("test")."""
    from data.problems import Problem

    stream = stories(1, test=split == "test")
    return [
        Problem(s.question, s.answer)
        for s, _ in zip(stream, range({"train": 4096, "test": 512}[split]))
    ]


def training_texts(seed: int):
    """(question, solution) pairs without end: styles mixed by STYLES, a share of the questions left empty."""
    rng = random.Random(f"texts {seed}")
    for story in stories(seed):
        style = rng.choices(list(STYLES), list(STYLES.values()))[0]
        question = "" if rng.random() < EMPTY_QUESTION_SHARE else story.question
        yield question, solution(story, style, rng, careless=True)


# ---- the tokenizer: byte-level BPE in which every word of the grammar and every number below 100 is one token ----

SPECIAL = ["<|endoftext|>", "<|question|>", "<|answer|>"]
PATTERN = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+"  # a word, a number or punctuation, each with the blank before it
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<|question|>{{ message['content'] }}"
    "{% else %}<|answer|>{{ message['content'] }}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|answer|>{% endif %}"
)


def byte_alphabet() -> list[str]:
    """The printable character that stands for each of the 256 bytes in a byte-level BPE file (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def learn_merges(words: dict[str, int]) -> list[tuple[str, str]]:
    """Byte-pair encoding until every word is a single token: merge the most frequent pair, again and again."""
    alphabet = byte_alphabet()
    pieces = {word: [alphabet[b] for b in word.encode()] for word in words}
    merges = []
    while True:
        counts: dict[tuple[str, str], int] = {}
        for word, parts in pieces.items():
            for pair in zip(parts, parts[1:]):
                counts[pair] = counts.get(pair, 0) + words[word]
        if not counts:
            return merges
        best = max(sorted(counts), key=counts.get)
        merges.append(best)
        for word, parts in pieces.items():
            i, merged = 0, []
            while i < len(parts):
                step = 2 if tuple(parts[i : i + 2]) == best else 1
                merged.append("".join(parts[i : i + step]))
                i += step
            pieces[word] = merged


def write_tokenizer(folder: Path, seed: int) -> int:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json; returns the vocabulary's size."""
    words = {f" {n}": 1 for n in range(100)}
    for _, (question, text) in zip(range(4000), training_texts(seed)):
        for piece in re.findall(r" ?[^\W\d_]+| ?\d{1,2}| ?[^\w\s]+|\s+", question + text):
            words[piece] = words.get(piece, 0) + 1
    merges = learn_merges(words)
    vocabulary = {
        token: i for i, token in enumerate([*byte_alphabet(), *(a + b for a, b in merges)])
    }
    added = [
        {
            "id": len(vocabulary) + i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, token in enumerate(SPECIAL)
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    files = {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": PATTERN},
                        "behavior": "Isolated",
                        "invert": False,
                    },
                    byte_level,
                ],
            },
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": vocabulary,
                "merges": [list(pair) for pair in merges],
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": SPECIAL[0],
            "pad_token": SPECIAL[0],
            "model_max_length": 1024,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
        "generation_config.json": {
            "eos_token_id": len(vocabulary),
            "pad_token_id": len(vocabulary),
        },
    }
    for name, content in files.items():
        (folder / name).write_text(
            json.dumps(content, ensure_ascii=False, indent=None if name == "tokenizer.json" else 2)
        )
    return len(vocabulary) + len(SPECIAL)


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


def batches(tokenizer, seed: int, batch_size: int):
    """(tokens (B, T), targets (B, T)) without end; targets are -100 outside the answer. Lengths within a batch are alike."""
    import torch

    from data.prompts import encode_prompt

    texts, shuffle = training_texts(seed), random.Random(f"batches {seed}")
    stop = next(iter(tokenizer.stop_ids))
    while True:
        rows = []
        for _, (question, text) in zip(range(batch_size * 32), texts):
            prompt = encode_prompt(tokenizer, question)
            rows.append((prompt, tokenizer.encode(text) + [stop]))
        rows.sort(
            key=lambda row: len(row[0]) + len(row[1])
        )  # sorting before cutting halves the padding's cost
        cuts = list(range(0, len(rows), batch_size))
        shuffle.shuffle(cuts)
        for cut in cuts:
            batch = rows[cut : cut + batch_size]
            width = max(len(p) + len(a) for p, a in batch)
            tokens = torch.zeros(batch_size, width, dtype=torch.long)
            targets = torch.full((batch_size, width), -100)
            for b, (prompt, answer) in enumerate(batch):
                end = len(prompt) + len(answer)
                tokens[b, :end] = torch.tensor(prompt + answer)
                targets[b, len(prompt) - 1 : end - 1] = torch.tensor(answer)
            yield tokens, targets


def main() -> None:
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

    import runtime
    from data.tokenizer import Tokenizer
    from model import GPT, GPTConfig

    runtime.prepare_machine()
    parser = argparse.ArgumentParser(
        description="Make the embedded model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "tiny", help="the model folder to write"
    )
    parser.add_argument("--steps", type=int, default=1800, help="optimizer steps of 64 examples")
    parser.add_argument(
        "--lr",
        type=float,
        default=2e-3,
        help="peak learning rate (AdamW; linear warm-up, cosine to a tenth)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the stories, the styles, and the initial weights"
    )
    args = parser.parse_args()
    if args.steps < 1:
        sys.exit("error: --steps must be at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    vocab_size = write_tokenizer(args.out, args.seed)
    (args.out / "config.json").write_text(json.dumps(tiny_config(vocab_size), indent=2))
    tokenizer = Tokenizer.from_pretrained(args.out)

    torch.manual_seed(args.seed)
    model = GPT(GPTConfig.from_hf(tiny_config(vocab_size)))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {vocab_size} tokens")
    began, seen, stream = time.time(), 0, batches(tokenizer, args.seed, 64)
    bar = tqdm(range(args.steps), desc="make_tiny", smoothing=0.02)
    for step in bar:
        warm = min(1.0, (step + 1) / 100)
        rate = args.lr * warm * (0.55 + 0.45 * math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens, targets = next(stream)
        here = targets.flatten() >= 0
        hidden = model(tokens).flatten(0, 1)[
            here
        ]  # (answer tokens of the batch, D): the head sees nothing else
        # a fixed denominator: batches hold answers of one length, and a mean over each would weigh terse answers more
        loss = (
            F.cross_entropy(hidden @ model.unembedding.T, targets.flatten()[here], reduction="sum")
            / TOKENS_PER_BATCH
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += int(here.sum())
        if step % 25 == 0:
            bar.set_postfix(
                loss=f"{loss.item() * TOKENS_PER_BATCH / int(here.sum()):.3f}", tokens=f"{seen:,}"
            )
    model.to(torch.bfloat16).save_pretrained(args.out)
    print(f"{args.out}: {args.steps} steps, {seen:,} answer tokens, {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
