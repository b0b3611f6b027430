"""Peak memory of a training script per process, from a formula.

    python -m bench.memory                                # what fits where
    python -m bench.memory --model 8b --gpus 8,64         # part by part
    python -m bench.memory --model ./my-folder --gpus 4 --ppo --micro-tokens 2048
    torchrun --standalone --nproc-per-node 2 -m bench.memory --measure \\
        --model ./my-folder --micro-tokens 512            # the formula against this machine

W parameters (B in the largest block, E outside the blocks: embeddings, head, last norm),
R processes, b bytes for a number that is multiplied (2: bfloat16, on GPUs; 4: float32),
m tokens in a micro-batch, l layers of width D, query width q, key width k, MLP width M:

    shards       16 W / R      float32 weights and gradients, AdamW's two moments;
                               PPO's critic takes as much again
    frozen       b W / R       the frozen start, where --kl-coef is not 0
    sampler      b W           a whole copy that samples (none for one process in float32, where
                               the policy samples)
    gathered     R > 1: b (E + 2 B) weights, b (E + B) their gradients, and 4 E, the buffer in
                        which these are summed
                 R = 1: in bfloat16 b (W - E), the rounded weights; 4 E, the embeddings' gradient
                        before it is added
    activations  m l (8 D + b (2 D + 3 q + 3 k + 4 M)), with norms of q and k b (q + k) more:
                 nothing is computed twice
    head         the tiles of the logits, and m D (b + 4)
    cache        2 l k b for each token of each answer that decodes at once: it takes what is
                 left. On a CPU it is freed before gathered, activations and head are allocated.

These tensors live at the same time. What an allocator keeps of freed ones, and what CUDA and NCCL
take for themselves, comes on top.
"""

import argparse
import ctypes
import os
from pathlib import Path

import torch
import torch.distributed as dist

from data.files import read_json
from data.hub import find_model
from model import GPT, GPTConfig
from runtime import parallel
from runtime.errors import user_errors
from sar import answer_hidden, fused_logprob

SIZES = {  # as published: Qwen2.5 0.5B and 1.5B, Qwen3 4B, 8B and 32B
    "0.5b": ("qwen2", 896, 4864, 24, 14, 2, 64, True),
    "1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 128, True),
    "4b": ("qwen3", 2560, 9728, 36, 32, 8, 128, True),
    "8b": ("qwen3", 4096, 12288, 36, 32, 8, 128, False),
    "32b": ("qwen3", 5120, 25600, 64, 64, 8, 128, False),
}
TILES = 3 * 4 * 2**25  # bytes on a GPU: fused_logprob's tile of logits, two more in its backward
ANSWERS = 8  # that must at least be able to decode at once


def config_of(name: str) -> GPTConfig:
    if name not in SIZES:
        return GPTConfig.from_hf(read_json(Path(find_model(name)) / "config.json"))
    kind, width, mlp, layers, heads, kv_heads, head_dim, tied = SIZES[name]
    config = {
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
    return GPTConfig.from_hf(config)


def counts(config: GPTConfig) -> tuple[int, int, int]:
    """W, B, E."""
    with torch.device("meta"):
        model = GPT(config)
    W = sum(p.numel() for p in model.parameters())
    blocks = [sum(map(torch.numel, block.parameters())) for block in model.blocks]
    return W, max(blocks), W - sum(blocks)


def per_token(c: GPTConfig, b: int) -> int:
    """Bytes that a block keeps for its backward, per token.

    The float32 residual stream before each of the two norms (on a CPU rms_norm keeps its result
    too), and what the norms give to the matmuls; q, k, v; q and k rotated, and normed where that
    is done; what attention gives; gate, up, silu(gate) and its product with up.
    """
    q, k = c.heads * c.head_dim, c.kv_heads * c.head_dim
    turned = 2 if c.qk_norm else 1
    attention = (q + 2 * k) + turned * (q + k) + q
    residual = 4 if b == 4 else 2
    return residual * 4 * c.width + b * (2 * c.width + attention + 4 * c.mlp_width)


def memory(
    config: GPTConfig,
    processes: int,
    *,
    b: int = 2,
    micro_tokens: int = 8192,
    length: int = 5120,
    ppo: bool = False,
) -> dict[str, float]:
    """Bytes per process, part by part, and their peak. length: of an answer with its prompt."""
    W, B, E = counts(config)
    R, m, on_gpu = processes, micro_tokens, b == 2
    if R > 1:
        gathered = b * (E + 2 * B) + b * (E + B) + 4 * E
    else:
        gathered = 4 * E + on_gpu * b * (W - E)
    trained = 2 if ppo else 1
    has_sampler = R > 1 or on_gpu
    token_bytes = 2 * b * config.layers * config.kv_heads * config.head_dim  # in the cache
    parts = {
        "shards": trained * 16 * W / R,
        "frozen": 0 if ppo else b * W / R,
        "sampler": has_sampler * b * W,
        "gathered": gathered,
        "activations": m * config.layers * per_token(config, b),
        "head": on_gpu * TILES + m * config.width * (b + 4),
        "cache": ANSWERS * length * token_bytes,
    }
    update = parts["gathered"] + parts["activations"] + parts["head"]
    work = update + parts["cache"] if on_gpu else max(update, parts["cache"])
    parts["peak"] = parts["shards"] + parts["frozen"] + parts["sampler"] + work
    return parts


def measure(args) -> None:
    """Print the peak memory of SA-GRPO's update, the largest of all processes, and the formula's.

    All is in place that training holds. On a GPU it is what PyTorch allocates. On a CPU it is
    resident memory beyond what imports took, with a C library that returns freed memory at once.
    """
    parallel.join_processes()
    rank, R = parallel.processes()
    on_gpu = args.device.startswith("cuda")
    if on_gpu:
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(args.device)
    else:  # M_MMAP_THRESHOLD of glibc: larger blocks are mapped, and unmapped when freed
        ctypes.CDLL(None).mallopt(-3, 65536)
    args.dtype = "bfloat16" if on_gpu else "float32"
    folder = find_model(args.model)
    base = 0 if on_gpu else resident("VmRSS")
    shard, dtype = parallel.sharding(args), getattr(torch, args.dtype)
    policy = GPT.from_pretrained(folder, device=args.device, shard=shard)
    frozen = GPT.from_pretrained(folder, dtype=dtype, device=args.device, shard=shard)
    frozen.requires_grad_(False)
    sampler = parallel.sampler_for(policy, args)
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
    rows, length = 4, args.micro_tokens // 4
    drawn = torch.randint(policy.config.vocab_size, (rows, length - 1))
    contexts, answers = [[0, 0]] * rows, drawn.tolist()
    parallel.score(frozen, contexts, answers, args)
    for _ in range(2):  # optimizer steps: in the second one the moments are there
        parallel.copy_weights_to(sampler, policy)
        for _ in range(2):  # micro-batches: in the second one the gradients are there
            with parallel.autocast(args):
                hidden, targets = answer_hidden(policy, contexts, answers)
                logprob, _ = fused_logprob(hidden, policy.unembedding, targets)
            logprob.sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    used = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM") - base
    peak = torch.tensor(float(used))
    if R > 1:
        dist.all_reduce(peak, dist.ReduceOp.MAX)
    if rank == 0:
        b = dtype.itemsize
        parts = memory(policy.config, R, b=b, micro_tokens=rows * length, length=0)
        measured, formula = peak.item() / 1e9, parts["peak"] / 1e9
        print(
            f"{plural(R, 'process', 'es')}: measured {measured:.3f} GB, formula {formula:.3f} GB, "
            f"{measured / formula:.3f} of it"
        )


def resident(key: str) -> int:
    """VmRSS: bytes of this process in memory now; VmHWM: at most so far."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def plural(count: int, noun: str, ending: str) -> str:
    return f"{count} {noun}" + ending * (count > 1)


def table(first: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    lines = [f"| {first} | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    flag = parser.add_argument
    sizes, here = ", ".join(SIZES), "cuda" if torch.cuda.is_available() else "cpu"
    flag("--model", help=f"{sizes}, a folder or a name (default: a table of these sizes)")
    flag("--gpus", default="1,8,64", help="numbers of processes, separated by commas")
    flag("--gpu-gb", type=float, default=80, help="memory of a GPU; GB")
    flag("--micro-tokens", type=int, default=5120, help="tokens (default: 5120, the longest row)")
    flag("--max-tokens", type=int, default=5120, help="prompt and answer together; tokens")
    flag("--ppo", action="store_true", help="train_sa_ppo.py: a critic, and no frozen start")
    flag("--float32", action="store_true", help="as on a CPU")
    flag("--measure", action="store_true", help="measure an update of --model in these processes")
    flag("--device", default=here, help="with --measure")
    args = parser.parse_args(argv)
    if args.measure:
        return measure(args)
    b, gpus = 4 if args.float32 else 2, [int(number) for number in args.gpus.split(",")]

    def parts(config: GPTConfig, processes: int) -> dict[str, float]:
        settings = dict(micro_tokens=args.micro_tokens, length=args.max_tokens, ppo=args.ppo)
        return memory(config, processes, b=b, **settings)

    if args.model:
        config = config_of(args.model)
        W, B, E = counts(config)
        print(f"W = {W / 1e6:,.1f}M parameters, B = {B / 1e6:,.1f}M, E = {E / 1e6:,.1f}M;", end=" ")
        print("GB per process:\n")
        columns = [parts(config, R) for R in gpus]
        rows = {part: [f"{column[part] / 1e9:.2f}" for column in columns] for part in columns[0]}
        print(table("part", [plural(R, "process", "es") for R in gpus], rows))
        return
    rows = {}
    for name in SIZES:
        config = config_of(name)
        peaks = [parts(config, R)["peak"] / 1e9 for R in gpus]
        cells = [f"{peak:.0f} GB" for peak in peaks]
        fits = [peak <= args.gpu_gb for peak in peaks]
        rows[name.upper()] = [c if ok else f"**no** ({c})" for c, ok in zip(cells, fits)]
    print(table("model", [plural(R, "GPU", "s") for R in gpus], rows))


if __name__ == "__main__":
    with user_errors():
        main()
