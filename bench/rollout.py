"""The sampler against transformers' generate, and against the machine's limits.

    python -m bench.rollout --model ./smollm2-135m,./qwen2.5-coder-0.5b   # CPU: float32
    python -m bench.rollout           # GPU: bfloat16, random weights of qwen2.5-1.5b's shape
    python -m bench.rollout --model ./smollm2-135m --cases 8x8x256r --no-transformers

A case is prompts x answers each x tokens, with r for ragged. Both libraries have the same weights
and prompts and make as many tokens. Prompts are 50 to 150 random tokens; sampling is at temperature
1 without filters. Nothing stops an answer early, except in ragged cases. There ours stops at random
lengths, because some tokens are declared stop tokens, and transformers is stopped at the same
lengths. A run's time is that of the whole call, prompts included. The table has medians of
--repeats runs of the two in turn, after a run of ours and 16 tokens of theirs to warm up.

The limits are measured first: the rate at which memory is read (GPU: copied), and that of a large
matmul. "bandwidth" is the time to read the bytes that a run cannot avoid (the weights once a step,
the keys and values attended to), "matmul" the time of its products, each as a share of the time
taken.
"""

import argparse
import os
import platform
import random
import statistics
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from bench.memory import SIZES, config_of
from kernels import keep_freed_memory, pack, packed_linear
from model import GPT
from rollout import generate
from runtime.errors import user_errors

CASES = {"cpu": "4x4x64,4x4x128,8x8x128,8x8x256r", "cuda": "16x4x256,64x4x256,128x6x1024r"}
COLUMNS = ("model", "prompts x answers x tokens", "tokens/s", "transformers", "ratio", "bandwidth",
           "matmul")


def seconds(f, device: torch.device) -> float:
    """The time of one call of f."""
    began = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def limits(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes/s of memory and flop/s of a matmul, best of ten; on a CPU of MKL's or oneDNN's."""
    def fastest(f) -> float:
        return min(seconds(f, device) for _ in range(10))

    x = torch.ones(2**28, dtype=torch.float32, device=device)  # 1 GiB
    a = torch.randn(4096, 4096, device=device).to(dtype)
    matmul = fastest(lambda: a @ a)
    if device.type == "cuda":
        y = torch.empty_like(x)
        bandwidth = 2 * x.nbytes / fastest(lambda: y.copy_(x))
    else:
        bandwidth = x.nbytes / fastest(x.sum)
        packed = pack(a)
        if packed is not None:
            matmul = min(matmul, fastest(lambda: packed_linear(a, packed)))
    return bandwidth, 2 * 4096**3 / matmul


def stop_tokens(model, prompts: list[list[int]], n: int, longest: int) -> set[int]:
    """Stop tokens that end answers at random lengths between 16 and `longest`.

    From each answer that nothing stops, the rarest token near a random place, except those among
    the first 15 of any answer.
    """
    answers = [r.tokens for r in generate(model, prompts, n=n, max_new_tokens=longest, stop=set())]
    early = {token for answer in answers for token in answer[:15]}
    count = Counter(token for answer in answers for token in answer)
    rng, found = random.Random(0), set()
    for answer in answers:
        end = rng.randrange(15, longest)
        near = [token for token in answer[max(15, end - 8) : end + 8] if token not in early]
        if near:
            found.add(min(near, key=count.__getitem__))
    return found


def transformers_sampler(folder, config, device, dtype):
    """A function that samples answers of given lengths with transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    if folder:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        hf = dict(config.hf)
        hf_config = transformers.AutoConfig.for_model(hf.pop("model_type"), **hf)
        model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    model = model.to(device).eval()
    model.generation_config = transformers.GenerationConfig()  # not the checkpoint's own

    def sample(prompts: list[list[int]], n: int, lengths: list[int]) -> None:
        width = max(map(len, prompts))
        pads = [width - len(p) for p in prompts]  # on the left
        tokens = torch.tensor([[0] * pad + p for pad, p in zip(pads, prompts)], device=device)
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=device)
        ends = torch.tensor(lengths, device=device) + width
        settings = transformers.GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max(lengths),
            num_return_sequences=n, pad_token_id=0,
        )

        def ended(ids, scores, **_):
            return ids.shape[1] >= ends

        stopping = None
        if min(lengths) < max(lengths):
            stopping = transformers.StoppingCriteriaList([ended])
        out = model.generate(
            tokens, attention_mask=mask, generation_config=settings, stopping_criteria=stopping
        )
        assert out.shape == (len(lengths), width + max(lengths)), out.shape

    return sample


def least_work(model, prompts, n: int, lengths: list[int]) -> tuple[float, float]:
    """Bytes and flop that no sampler avoids without speculation, all answers decoding together."""
    c, head = model.config, model.unembedding.numel()
    weights = sum(p.numel() for p in model.parameters())
    if not c.tied:
        weights -= model.embedding.numel()
    starts = [len(p) for p in prompts for _ in range(n)]
    attended = 0  # positions, over all steps
    for start, length in zip(starts, lengths):
        attended += (length - 1) * start + length * (length - 1) // 2
    cached = 2 * c.layers * c.kv_heads * c.head_dim  # numbers per position
    read = model.unembedding.itemsize * (max(lengths) * weights + cached * attended)
    tokens = sum(map(len, prompts)) + sum(lengths)
    flop = 2 * (weights - head) * tokens + 2 * head * sum(lengths)
    flop += 4 * c.layers * c.heads * c.head_dim * attended
    return read, flop


def random_prompts(rng: random.Random, count: int, vocab_size: int) -> list[list[int]]:
    highest = min(40000, vocab_size)
    prompts = []
    for _ in range(count):
        length = rng.randrange(50, 151)
        prompts.append([rng.randrange(1000, highest) for _ in range(length)])
    return prompts


def table_row(model, case: str, rng, sample, args, bandwidth: float, matmul: float) -> list[str]:
    """Measure one case. sample: of transformers_sampler, or None. -> COLUMNS without the model."""
    device = model.unembedding.device
    count, n, longest = map(int, case.removesuffix("r").split("x"))
    prompts = random_prompts(rng, count, model.config.vocab_size)
    stop = stop_tokens(model, prompts, n, longest) if case.endswith("r") else set()

    def ours() -> list[int]:
        answers = generate(model, prompts, n=n, max_new_tokens=longest, stop=stop)
        return [len(answer.tokens) for answer in answers]

    lengths = ours()
    if sample:
        sample(prompts, n, [min(length, 16) for length in lengths])
    our_times, their_times = [], []
    for _ in range(args.repeats):
        our_times.append(seconds(ours, device))
        if sample:
            their_times.append(seconds(lambda: sample(prompts, n, lengths), device))
    our_time = statistics.median(our_times)
    theirs = ["–", "–"]
    if sample:
        their_time = statistics.median(their_times)
        theirs = [f"{sum(lengths) / their_time:,.0f}", f"{their_time / our_time:.1f}"]
    size = str(longest)
    if stop:
        mean = statistics.mean(lengths)
        size = f"{min(lengths)} to {max(lengths)} (mean {mean:.0f})"
    read, flop = least_work(model, prompts, n, lengths)
    return [
        f"{count} x {n} x {size}", f"{sum(lengths) / our_time:,.0f}", *theirs,
        f"{read / bandwidth / our_time:.0%}", f"{flop / matmul / our_time:.0%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="1.5b", help="folders, separated by commas, or random "
                        f"weights of {', '.join(SIZES)} (default: 1.5b)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    defaults = f"default: {CASES['cpu']} on a CPU, {CASES['cuda']} on a GPU"
    parser.add_argument("--cases", help=defaults)
    parser.add_argument("--no-transformers", action="store_true", help="measure ours only")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    device = torch.device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    bandwidth, matmul = limits(device, dtype)
    machine = f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    libraries = f"torch {torch.__version__}"
    if not args.no_transformers:
        libraries += f", transformers {version('transformers')}"
    print(f"{machine}, {dtype}, {libraries}; "
          f"memory {bandwidth / 1e9:.0f} GB/s, matmul {matmul / 1e9:,.0f} GFLOP/s\n")
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    cases, names = (args.cases or CASES[device.type]).split(","), args.model.split(",")
    bar = tqdm(total=len(cases) * len(names), leave=False)
    for name in names:
        folder = Path(name) if os.path.isdir(name) else None
        if folder:
            model = GPT.from_pretrained(folder, dtype=dtype, device=device)
        else:
            with torch.device(device):
                model = GPT(config_of(name)).to(dtype)
        sample = None
        if not args.no_transformers:
            sample = transformers_sampler(folder, model.config, device, dtype)
        rng = random.Random(0)
        for case in cases:
            row = table_row(model, case, rng, sample, args, bandwidth, matmul)
            bar.clear()
            print(f"| {Path(name).name} | {' | '.join(row)} |", flush=True)
            bar.update()
    bar.close()


if __name__ == "__main__":
    with user_errors():
        main()
