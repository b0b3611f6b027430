"""Peak memory of a training script per process, from a formula.

    python -m bench.memory                                             # what fits where: the README's table
    python -m bench.memory --model 8b --gpus 8,64                      # part by part
    python -m bench.memory --model ./my-folder --gpus 4 --ppo --micro-tokens 2048
    torchrun --standalone --nproc-per-node 2 -m bench.memory --measure --model ./my-folder --micro-tokens 512       # the formula, checked here

With W parameters (B in the largest block, E outside the blocks: embeddings, head, last norm), R processes, b bytes for a number that
is multiplied (2: bfloat16, on GPUs; 4: float32), m tokens in a micro-batch, l layers of width D, q query, k key and MLP width M:

    shards       16 W / R            float32 weights and gradients, AdamW's two moments; PPO's critic: once more
    start        b W / R             the frozen start, where --kl-coef is not 0
    sampler      b W                 a whole copy for rollouts (none for one process in float32: the policy generates)
    gathered     R > 1: b (E + 2 B) weights, b (E + B) their gradients, 4 E the buffer in which these are summed
                 R = 1: in bfloat16 b (W - E), the rounded weights; 4 E, the embeddings' gradient before it is added
    activations  m l (8 D + b (2 D + 3 q + 3 k + 4 M)), with norms of q and k b (q + k) more: nothing is computed twice
    head         the tiles of the logits, and m D (b + 4)
    cache        2 l k b for each token of each answer that decodes at once: what is left; a CPU's is there only while gathered,
                 activations and head are not

These are the tensors that live at a time. What an allocator keeps of freed ones, and what CUDA and NCCL take for themselves, comes on top.
"""

import argparse
import ctypes
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist

import runtime
from data.hub import find_model
from model import GPT, GPTConfig
from sar import answer_hidden, answer_logprobs, fused_logprob

SIZES = {  # as published: Qwen2.5 0.5B and 1.5B, Qwen3 4B, 8B and 32B
    "0.5b": ("qwen2", 896, 4864, 24, 14, 2, 64, True),
    "1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 128, True),
    "4b": ("qwen3", 2560, 9728, 36, 32, 8, 128, True),
    "8b": ("qwen3", 4096, 12288, 36, 32, 8, 128, False),
    "32b": ("qwen3", 5120, 25600, 64, 64, 8, 128, False),
}
TILES = (
    3 * 4 * 2**25
)  # bytes: fused_logprob's tile of logits on a GPU, and two like it in its backward
ANSWERS = 8  # that must at least be able to decode at once


def config_of(name: str) -> GPTConfig:
    if name not in SIZES:
        return GPTConfig.from_hf(json.loads((Path(find_model(name)) / "config.json").read_text()))
    kind, width, mlp, layers, heads, kv_heads, head_dim, tied = SIZES[name]
    return GPTConfig.from_hf(
        {
            "model_type": kind,
            "vocab_size": 151936,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": tied,
        }
    )


def counts(config: GPTConfig) -> tuple[int, int, int]:
    """W, B, E."""
    with torch.device("meta"):
        model = GPT(config)
    W = sum(p.numel() for p in model.parameters())
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    return W, max(blocks), W - sum(blocks)


def per_token(c: GPTConfig, b: int) -> int:
    """Bytes that a block keeps for its backward, per token: the residual stream (float32) before each of the two norms (a CPU's
    rms_norm keeps what it made of it too), and what they give to the matmuls; q, k, v, then q and k turned, with q and k normed
    where that is done; what attention gives; gate, up, silu(gate) and its product with up."""
    q, k = c.heads * c.head_dim, c.kv_heads * c.head_dim
    attention = (q + 2 * k) + (q + k) * (2 if c.qk_norm else 1) + q
    return (4 if b == 4 else 2) * 4 * c.width + b * (2 * c.width + attention + 4 * c.mlp_width)


def memory(
    config: GPTConfig,
    processes: int,
    *,
    b: int = 2,
    micro_tokens: int = 8192,
    room: int = 5120,
    ppo: bool = False,
    start: bool = True,
) -> dict[str, float]:
    """Bytes per process, part by part, and their peak."""
    W, B, E = counts(config)
    R, m = processes, micro_tokens
    parts = {
        "shards": 16 * W / R * (2 if ppo else 1),
        "start": b * W / R if start else 0.0,
        "sampler": float(b * W) if R > 1 or b == 2 else 0.0,
        "gathered": float(
            b * (E + 2 * B) + b * (E + B) + 4 * E
            if R > 1
            else 4 * E + (b * (W - E) if b == 2 else 0)
        ),
        "activations": float(m * config.layers * per_token(config, b)),
        "head": (TILES if b == 2 else 0) + m * config.width * (b + 4.0),
        "cache": ANSWERS * room * 2.0 * b * config.layers * config.kv_heads * config.head_dim,
    }
    update = parts["gathered"] + parts["activations"] + parts["head"]
    parts["peak"] = (
        parts["shards"]
        + parts["start"]
        + parts["sampler"]
        + (update + parts["cache"] if b == 2 else max(update, parts["cache"]))
    )
    return parts


def measure(args) -> None:
    """Peak memory of SA-GRPO's update in every process, with all in place that training holds, beside the formula. On a GPU it is what
    PyTorch allocates; on a CPU resident memory beyond what imports took, with a C library that gives freed memory back at once."""
    runtime.join_processes()
    rank, R = runtime.processes()
    gpu = args.device.startswith("cuda")
    if gpu:
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(args.device)
    else:
        ctypes.CDLL(None).mallopt(
            -3, 65536
        )  # M_MMAP_THRESHOLD of glibc: larger blocks are mapped, and unmapped when freed
    args.dtype = "bfloat16" if gpu else "float32"
    folder = find_model(args.model)
    base = 0 if gpu else resident("VmRSS")
    shard = runtime.sharding(args)
    policy = GPT.from_pretrained(folder, device=args.device, shard=shard)
    start = GPT.from_pretrained(
        folder, dtype=getattr(torch, args.dtype), device=args.device, shard=shard
    ).requires_grad_(False)
    sampler = runtime.sampler_for(policy, args, GPT)
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
    length = args.micro_tokens // 4  # four rows
    contexts, answers = (
        [[0, 0]] * 4,
        [torch.randint(policy.config.vocab_size, (length - 1,)).tolist() for _ in range(4)],
    )
    runtime.score(answer_logprobs, start, contexts, answers, args.micro_tokens)
    for _ in range(2):  # two optimizer steps: in the second, moments are there
        runtime.refresh(sampler, policy)
        for _ in range(2):  # two micro-batches: in the second, gradients are there
            with runtime.autocast(args):
                hidden, targets = answer_hidden(policy, contexts, answers)
                logprob, _ = fused_logprob(hidden, policy.unembedding, targets)
            logprob.sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    peak = torch.tensor(
        float(torch.cuda.max_memory_allocated() if gpu else resident("VmHWM") - base)
    )
    if R > 1:
        dist.all_reduce(peak, dist.ReduceOp.MAX)
    if rank == 0:
        formula = memory(policy.config, R, b=2 if gpu else 4, micro_tokens=4 * length, room=0)[
            "peak"
        ]
        print(
            f"{R} process{'es' * (R > 1)}: measured {peak.item() / 1e9:.3f} GB, formula {formula / 1e9:.3f} GB, {peak.item() / formula:.3f} of it"
        )


def resident(key: str) -> int:
    """VmRSS: bytes of this process in memory now; VmHWM: at most so far."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help=f"{', '.join(SIZES)}, a folder or a name (default: a table of these sizes)"
    )
    parser.add_argument(
        "--gpus", default="1,8,64", help="numbers of processes, separated by commas"
    )
    parser.add_argument("--gpu-gb", type=float, default=80, help="memory of a GPU; GB")
    parser.add_argument(
        "--micro-tokens",
        type=int,
        default=5120,
        help="tokens (default: 5120, one answer of the longest kind)",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=5120, help="prompt and answer together; tokens"
    )
    parser.add_argument(
        "--ppo", action="store_true", help="train_sa_ppo.py: with a critic, without a frozen start"
    )
    parser.add_argument("--float32", action="store_true", help="as on a CPU")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure an update of --model (a folder or a name) in these processes",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="with --measure"
    )
    args = parser.parse_args(argv)
    if args.measure:
        return measure(args)
    gpus = [int(g) for g in args.gpus.split(",")]
    settings = dict(
        b=4 if args.float32 else 2,
        micro_tokens=args.micro_tokens,
        room=args.max_tokens,
        ppo=args.ppo,
        start=not args.ppo,
    )
    if args.model:
        config = config_of(args.model)
        W, B, E = counts(config)
        print(
            f"W = {W / 1e6:,.1f}M parameters, B = {B / 1e6:,.1f}M, E = {E / 1e6:,.1f}M; GB per process:\n"
        )
        columns = [memory(config, R, **settings) for R in gpus]
        print("| part | " + " | ".join(f"{R} process{'es' * (R > 1)}" for R in gpus) + " |")
        print("|---|" + "---|" * len(gpus))
        for part in columns[0]:
            print(f"| {part} | " + " | ".join(f"{c[part] / 1e9:.2f}" for c in columns) + " |")
        return
    print("| model | " + " | ".join(f"{R} GPU{'s' * (R > 1)}" for R in gpus) + " |")
    print("|---|" + "---|" * len(gpus))
    for name in SIZES:
        peaks = [memory(config_of(name), R, **settings)["peak"] / 1e9 for R in gpus]
        print(
            f"| {name.upper()} | "
            + " | ".join(
                f"{p:.0f} GB" if p <= args.gpu_gb else f"**no** ({p:.0f} GB)" for p in peaks
            )
            + " |"
        )


if __name__ == "__main__":
    main()
