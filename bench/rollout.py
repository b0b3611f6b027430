"""The sampler against transformers' generate: the same weights, the same prompts, as many tokens; and against the machine's limits.

    python -m bench.rollout --model ./smollm2-135m,./qwen2.5-coder-0.5b      # CPU: float32
    python -m bench.rollout                                                  # GPU: bfloat16, random weights of qwen-1.5b's shape
    python -m bench.rollout --model ./smollm2-135m --cases 8x8x256r --no-peer      # prompts x answers each x tokens; r: ragged

Prompts are random tokens, 50 to 150 of them, that both sample from at temperature 1 without filters. Nothing stops an answer early,
except in the ragged rows: there our answers stop at random lengths (from some tokens that are declared stop tokens), and transformers'
at exactly the same ones (a stopping criterion). A run's time is that of the whole call, prompts included; the table has medians of
--repeats runs, ours and theirs in turn, after one of ours and 16 tokens of theirs to warm up.

The limits are measured first: the rate at which memory is read (GPU: copied) and that of a large matmul. "bandwidth" is the time in
which the bytes that a run cannot avoid (weights once a step, live keys and values) could be read, "matmul" that in which its
products could be made, each as a share of the time taken.
"""

import argparse
import os
import platform
import random
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from bench.memory import SIZES, config_of
from model import GPT, packed_linear
from rollout import generate
from runtime import prepare_machine, user_errors

CASES = {"cpu": "4x4x64,4x4x128,8x8x128,8x8x256r", "cuda": "16x4x256,64x4x256,128x6x1024r"}


def measured(f, repeats: int, device: torch.device) -> float:
    """Seconds, the median of `repeats` calls of f."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def limits(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes/s of memory and flop/s of a matmul, best of ten; on a CPU that of the faster library, MKL or oneDNN."""
    x = torch.ones(2**28, dtype=torch.float32, device=device)  # 1 GiB
    a = torch.randn(4096, 4096, device=device).to(dtype)
    products = [lambda: a @ a]
    if device.type == "cuda":
        y = torch.empty_like(x)
        bandwidth = 2 * x.nbytes / min(measured(lambda: y.copy_(x), 1, device) for _ in range(10))
    else:
        bandwidth = x.nbytes / min(measured(x.sum, 1, device) for _ in range(10))
        if torch.backends.mkldnn.is_available():
            packed = torch.ops.mkldnn._reorder_linear_weight(a)
            products.append(lambda: packed_linear(a, packed))
    return bandwidth, 2 * 4096**3 / min(
        measured(product, 1, device) for product in products for _ in range(10)
    )


def stops(model, prompts: list[list[int]], n: int, most: int) -> set[int]:
    """Stop tokens that end answers at random lengths between 16 and `most`: from each answer that nothing stops a token near a
    length drawn at random, the rarest there is, and none that comes within the first 15 of any answer."""
    texts = [r.tokens for r in generate(model, prompts, n=n, max_new_tokens=most, stop=set())]
    early = {t for text in texts for t in text[:15]}
    count: dict[int, int] = {}
    for t in (t for text in texts for t in text):
        count[t] = count.get(t, 0) + 1
    rng, found = random.Random(0), set()
    for text in texts:
        end = rng.randrange(15, most)
        near = [t for t in text[max(15, end - 8) : end + 8] if t not in early]
        found |= {min(near, key=count.__getitem__)} if near else set()
    return found


def peer(folder, config, device, dtype):
    """transformers' model, and a function that samples answers of given lengths from it."""
    import transformers

    transformers.logging.set_verbosity_error()
    if folder:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        kind = config.hf["model_type"]
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(
                kind, **{k: v for k, v in config.hf.items() if k != "model_type"}
            ),
            dtype=dtype,
        )
    model = model.to(device).eval()
    model.generation_config = transformers.GenerationConfig()  # nothing of the checkpoint's own

    def sample(prompts: list[list[int]], n: int, lengths: list[int]) -> None:
        width = max(map(len, prompts))
        tokens = torch.tensor(
            [[0] * (width - len(p)) + p for p in prompts], device=device
        )  # padded on the left
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        ends = torch.tensor(lengths, device=device) + width
        settings = transformers.GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max(lengths),
            num_return_sequences=n,
            pad_token_id=0,
        )
        done = transformers.StoppingCriteriaList([lambda ids, scores, **_: ids.shape[1] >= ends])
        out = model.generate(
            tokens,
            attention_mask=mask,
            generation_config=settings,
            stopping_criteria=done if min(lengths) < max(lengths) else None,
        )
        assert out.shape == (len(lengths), width + max(lengths)), out.shape

    return sample


def floor(model, prompts: list[list[int]], n: int, lengths: list[int]) -> tuple[float, float]:
    """Bytes and flop that no sampler without speculation avoids when all answers decode together."""
    c = model.config
    weights = sum(p.numel() for p in model.parameters()) - (
        0 if c.tied else model.embedding.numel()
    )
    token = 2 * c.layers * c.kv_heads * c.head_dim  # numbers in the cache
    starts = [len(p) for p in prompts for _ in range(n)]
    read = sum(
        (length - 1) * start + length * (length - 1) // 2 for start, length in zip(starts, lengths)
    )  # positions attended to
    size = model.unembedding.dtype.itemsize
    tokens = sum(map(len, prompts)) + sum(lengths)
    head = model.unembedding.numel()
    flop = (
        2 * (weights - head) * tokens
        + 2 * head * sum(lengths)
        + 4 * c.layers * c.heads * c.head_dim * read
    )
    return size * (max(lengths) * weights + token * read), flop


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="1.5b",
        help=f"folders, separated by commas, or random weights of {', '.join(SIZES)} (default: 1.5b)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--cases", help=f"default: {CASES['cpu']} on a CPU, {CASES['cuda']} on a GPU"
    )
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    prepare_machine()
    torch.manual_seed(0)
    device = torch.device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    bandwidth, matmul = limits(device, dtype)
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"
    )
    theirs = "" if args.no_peer else f", transformers {version('transformers')}"
    print(
        f"{where}, {dtype}, torch {torch.__version__}{theirs}; memory {bandwidth / 1e9:.0f} GB/s, matmul {matmul / 1e9:,.0f} GFLOP/s\n"
    )
    print(
        "| model | prompts x answers x tokens | tokens/s | transformers | ratio | bandwidth | matmul |\n|---|---|---|---|---|---|---|"
    )
    cases = (args.cases or CASES[device.type]).split(",")
    bar = tqdm(total=len(cases) * len(args.model.split(",")), leave=False)
    for name in args.model.split(","):
        folder = Path(name) if os.path.isdir(name) else None
        if folder:
            model = GPT.from_pretrained(folder, dtype=dtype, device=device)
        else:
            with torch.device(device):
                model = GPT(config_of(name)).to(dtype)
        sample = None if args.no_peer else peer(folder, model.config, device, dtype)
        rng = random.Random(0)
        for case in cases:
            P, n, most = map(int, case.removesuffix("r").split("x"))
            ragged = case.endswith("r")
            prompts = [
                [
                    rng.randrange(1000, min(40000, model.config.vocab_size))
                    for _ in range(rng.randrange(50, 151))
                ]
                for _ in range(P)
            ]
            stop = stops(model, prompts, n, most) if ragged else set()

            def ours():
                return [
                    len(r.tokens)
                    for r in generate(model, prompts, n=n, max_new_tokens=most, stop=stop)
                ]

            lengths = ours()
            if sample:
                sample(prompts, n, [min(length, 16) for length in lengths])
            times = [
                (
                    measured(ours, 1, device),
                    measured(lambda: sample(prompts, n, lengths), 1, device)
                    if sample
                    else float("nan"),
                )
                for _ in range(args.repeats)
            ]
            mine, other = (statistics.median(column) for column in zip(*times))
            read, flop = floor(model, prompts, n, lengths)
            size = (
                f"{most}"
                if not ragged
                else f"{min(lengths)} to {max(lengths)} (mean {statistics.mean(lengths):.0f})"
            )
            bar.clear()
            print(
                f"| {Path(name).name} | {P} x {n} x {size} | {sum(lengths) / mine:,.0f} | "
                + (f"{sum(lengths) / other:,.0f} | {other / mine:.1f} | " if sample else "– | – | ")
                + f"{read / bandwidth / mine:.0%} | {flop / matmul / mine:.0%} |",
                flush=True,
            )
            bar.update()
    bar.close()


if __name__ == "__main__":
    with user_errors():
        main()
