"""Memory of a training script, from a formula, and measured.

    python -m bench.memory                                # what fits on which card
    python -m bench.memory --gpus 1,8,64                  # what fits on how many
    python -m bench.memory --model 8b --gpus 8,64         # part by part
    python -m bench.memory --model ./my-folder --recompute --offload --ppo --micro-tokens 2048
    python -m bench.memory --measure --model ./my-folder --micro-tokens 512 \\
        --dtype bfloat16 --recompute --offload            # the formula against this machine
    torchrun --standalone --nproc-per-node 2 -m bench.memory --measure --model ./my-folder

W parameters (B in the largest block, E outside the blocks: embeddings, head, last norm; H in the
head), R processes, b bytes for a number that is multiplied (2: bfloat16, on GPUs; 4: float32),
m tokens in a micro-batch, l layers of width D, query width q, key width k, MLP width M:

    masters      12 W / R      float32 weights and AdamW's two moments
    gradients    4 W / R       float32; PPO's critic takes as much of both again
    working      b W           R > 1: a whole copy that samples. R = 1: the copy that is trained and
                               samples, of the critic too; in float32 the masters do both
    frozen       b W / R       the frozen start, where --kl-coef is not 0
    gathered     R > 1: b (E + 2 B) weights, b (E + B) their gradients, and 4 E, the buffer in
                        which these are summed
                 R = 1: 4 H, the head's gradient before it is added. When the backward ends, and
                        activations are gone, 6 H for the embeddings' (tied: 12 H for both)
    activations  m l (8 D + b (2 D + 3 q + 3 k + 4 M)) on a GPU; on a CPU 8 D more; norms of q and k
                 keep 4 (q + k) in float32, in bfloat16 8 (a CPU 6)
                 --recompute: m l 4 D
    head         the larger of the head's (the tiles of the logits, and m D (b + 4)) and a layer's
                 backward (m b 3 M; --recompute: and the activations of one layer)
    cache        2 l k b for each token of each answer that decodes at once: it takes what is
                 left. On a CPU it is freed before gathered, activations and head are allocated.

These tensors live at the same time. What an allocator keeps of freed ones, and what CUDA and NCCL
take for themselves, comes on top: CONTEXT. With --offload masters and frozen lie in host memory,
with one gradient (at most 4 H) at a time. The frozen start visits the GPU when no gradients are
there: it is the smaller one.
"""

import argparse
import contextlib
import ctypes
import os
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.files import read_json
from data.hub import find_model
from model import GPT, GPTConfig
from rollout import available_memory
from runtime import parallel
from runtime.errors import user_errors
from sar import answer_hidden, fused_logprob

SIZES = {  # as published: Qwen2.5 0.5B, 1.5B and 3B, Qwen3 4B, 8B and 32B
    "0.5b": ("qwen2", 896, 4864, 24, 14, 2, 64, True),
    "1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 128, True),
    "3b": ("qwen2", 2048, 11008, 36, 16, 2, 128, True),
    "4b": ("qwen3", 2560, 9728, 36, 32, 8, 128, True),
    "8b": ("qwen3", 4096, 12288, 36, 32, 8, 128, False),
    "32b": ("qwen3", 5120, 25600, 64, 64, 8, 128, False),
}
TILES = 3 * 4  # bytes a logit of fused_logprob's tile: itself, two more in its backward
ANSWERS = 8  # that must at least be able to decode at once
CONTEXT = 1e9  # bytes on a GPU that are no tensors
MODES = ("", "--recompute", "--recompute --offload")  # in the order in which to try them
CARDS = (16, 24, 48, 80)  # GB
PARTS = ("masters", "gradients", "working", "frozen", "gathered", "activations", "head", "cache")


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


def per_token(c: GPTConfig, b: int, gpu: bool) -> int:
    """Bytes that a block keeps for its backward, per token.

    The float32 residual stream before each of the two norms (on a CPU rms_norm keeps its result
    too), and what the norms give to the matmuls; q, k, v; q and k rotated, and normed where that
    is done; what attention gives; gate, up, silu(gate) and its product with up.
    """
    q, k = c.heads * c.head_dim, c.kv_heads * c.head_dim
    residual = 2 if gpu else 4
    norm = 4 if b == 4 else 6 + 2 * gpu  # of q and k; in bfloat16 they are float32 within
    attention = b * (q + 2 * k + q + k + q) + c.qk_norm * norm * (q + k)
    return residual * 4 * c.width + b * (2 * c.width + 4 * c.mlp_width) + attention


def memory(
    config: GPTConfig,
    processes: int = 1,
    *,
    b: int = 2,
    gpu: bool = True,
    micro_tokens: int = 8192,
    length: int = 5120,
    ppo: bool = False,
    frozen: bool = True,
    mode: str = "",
) -> dict[str, float]:
    """Bytes per process, part by part. peak: of the GPU, or of all; host: beside a GPU.

    length: of an answer with its prompt. mode: --recompute, --offload, both or neither.
    """
    W, B, E = counts(config)
    R, m, H = processes, micro_tokens, config.vocab_size * config.width
    trained = 2 if ppo else 1
    working = 0
    if R > 1:
        working = b * W
    elif b == 2:
        working = trained * b * W
    layers, block = config.layers, per_token(config, b, gpu)
    tiles = TILES * (2**25 if gpu else 2**19)
    kept, backward = layers * block, b * 3 * config.mlp_width
    if "--recompute" in mode:
        kept, backward = layers * 4 * config.width, backward + block
    token_bytes = 2 * b * layers * config.kv_heads * config.head_dim  # in the cache
    parts = {
        "masters": trained * 12 * W / R,
        "gradients": trained * 4 * W / R,
        "working": working,
        "frozen": frozen * b * W / R,
        "gathered": b * (E + 2 * B) + b * (E + B) + 4 * E if R > 1 else 4 * H,
        "activations": m * kept,
        "head": max(tiles + m * config.width * (b + 4), m * backward),
        "cache": ANSWERS * length * token_bytes,
    }
    update = parts["gathered"] + parts["activations"] + parts["head"]
    if R == 1:
        update = max(update, 12 * H if config.tied else 6 * H)
    work = update + parts["cache"] if gpu else max(update, parts["cache"])
    host = parts["masters"] + parts["frozen"]
    parts["peak"] = host + parts["working"] + parts["gradients"] + work
    parts["host"] = 0
    if gpu and "--offload" in mode:
        parts["peak"] -= host
        parts["host"] = host + 4 * H
    return parts


def modes_that_fit(free: float, host: float, config: GPTConfig, **settings) -> list[str]:
    """Those of MODES that need at most so many bytes of a GPU and of host memory."""
    fit = []
    for mode in MODES[:2] if settings.get("processes", 1) > 1 else MODES:
        parts = memory(config, mode=mode, **settings)
        if parts["peak"] + CONTEXT <= free and parts["host"] <= host:
            fit.append(mode)
    return fit


def what_fits(args, config: GPTConfig, ppo: bool) -> str:
    """A sentence: what the run of these settings needs, what is free, which flags make it fit."""
    settings = dict(
        processes=parallel.processes()[1], b=getattr(torch, args.dtype).itemsize, ppo=ppo,
        micro_tokens=max(args.micro_tokens, args.max_prompt_tokens + args.max_new_tokens),
        length=args.max_prompt_tokens + args.max_new_tokens,
        frozen=args.kl_coef > 0 or args.score_with == "frozen")
    free, host = torch.cuda.mem_get_info(args.device)[0], available_memory()
    parts = memory(config, mode=mode_of(args), **settings)
    text = f"a step needs {(parts['peak'] + CONTEXT) / 1e9:.1f} GB of GPU memory by the formula"
    text += f" of bench.memory, {free / 1e9:.1f} GB are free"
    fit = modes_that_fit(free, host, config, **settings)
    if mode_of(args) in fit:
        return text
    cure = " or ".join(mode for mode in fit if mode) or "none of --recompute and --offload"
    return f"{text}: {cure} makes it fit"


def mode_of(args) -> str:
    return " ".join(f"--{flag}" for flag in ("recompute", "offload") if getattr(args, flag))


class LiveTensors(TorchDispatchMode):
    """Inside, `peak` is the most bytes that tensors made inside hold at a time."""

    def __init__(self):
        super().__init__()
        self.sizes = {}  # storage -> bytes
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            self.see(tensor, made_here=False)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self.see(tensor, made_here=True)
        return result

    def see(self, tensor, made_here):
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = made_here * storage.nbytes()
            weakref.finalize(storage, self.forget, key)
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)

    def forget(self, key):
        self.now -= self.sizes.pop(key)


def of_role(masters, policy, frozen, optimizer) -> dict[str, int]:
    """Bytes of the tensors that stay, by the formula's names."""
    own = list(masters.parameters())
    moments = [t for state in optimizer.state.values() for t in state.values()]
    working = [] if policy is masters else policy.parameters()
    gradients = [p.grad for p in policy.parameters()]
    roles = {"masters": own + moments, "gradients": gradients, "working": working}
    roles["frozen"] = frozen.parameters()
    return {role: sum(t.nbytes for t in tensors) for role, tensors in roles.items()}


def measure(args) -> tuple[dict, dict]:
    """Print what SA-GRPO's update takes at its peak, in the process that takes most, and what the
    formula says; returns both, by role.

    All is in place that training holds. On a GPU it is what PyTorch allocates; in one process on a
    CPU what live tensors hold; in several on CPUs resident memory beyond what imports took, with a
    C library that returns freed memory at once.
    """
    parallel.join_processes()
    rank, R = parallel.processes()
    on_gpu = args.device.startswith("cuda")
    if on_gpu:
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(args.device)
    elif R > 1:  # M_MMAP_THRESHOLD of glibc: larger blocks are mapped, and unmapped when freed
        ctypes.CDLL(None).mallopt(-3, 65536)
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    args.temperature = 1.0
    base = resident("VmRSS")
    live = LiveTensors() if R == 1 and not on_gpu else contextlib.nullcontext()
    with live:
        roles, config, tokens = train_twice(args)
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = live.peak if R == 1 else resident("VmHWM") - base
    peak = torch.tensor(float(peak))
    if R > 1:
        dist.all_reduce(peak, dist.ReduceOp.MAX)
    b = getattr(torch, args.dtype).itemsize
    settings = dict(b=b, gpu=on_gpu, micro_tokens=tokens, length=0, mode=mode_of(args))
    parts, measured = memory(config, R, **settings), roles | {"peak": peak.item()}
    if rank == 0:
        name = f"{plural(R, 'process', 'es')} {mode_of(args)}".strip()
        print(f"{name}: measured {measured['peak'] / 1e9:.3f} GB, formula "
              f"{parts['peak'] / 1e9:.3f} GB, {measured['peak'] / parts['peak']:.3f} of it")
    return measured, parts


def train_twice(args) -> tuple[dict, GPTConfig, int]:
    """Two optimizer steps of two micro-batches of random tokens. Returns bytes by role, the
    config, and the tokens of a micro-batch."""
    folder = find_model(args.model)
    place = dict(device="cpu" if args.offload else args.device, shard=parallel.sharding(args))
    masters = GPT.from_pretrained(folder, **place)
    frozen = GPT.from_pretrained(folder, dtype=getattr(torch, args.dtype), **place)
    frozen.requires_grad_(False)
    policy = parallel.working_copy(masters, args)
    sampler = parallel.sampler_for(policy, args)
    optimizer = torch.optim.AdamW(masters.parameters(), fused=True)
    rows, length = 4, args.micro_tokens // 4
    drawn = torch.randint(policy.config.vocab_size, (rows, length - 1))
    contexts, answers = [[0, 0]] * rows, drawn.tolist()
    parallel.score(frozen, contexts, answers, args)
    for _ in range(2):  # in the second step the moments are there
        for _ in range(2):  # in the second micro-batch the gradients are there
            with parallel.autocast(args):
                hidden, targets = answer_hidden(policy, contexts, answers)
                logprob, _ = fused_logprob(hidden, policy.unembedding, targets)
            del hidden
            logprob.sum().backward()
        roles = of_role(masters, policy, frozen, optimizer)
        parallel.optimizer_step(optimizer, masters, policy)
        parallel.copy_weights_to(sampler, policy)
    return roles, policy.config, rows * length


def resident(key: str) -> int:
    """VmRSS: bytes of this process in memory now; VmHWM: at most so far."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def plural(count: int, noun: str, ending: str) -> str:
    return f"{count} {noun}" + ending * (count > 1)


def table(first: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    lines = [f"| {first} | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines)


def by_card(sizes: list[str], **settings) -> str:
    """A row a model and mode: what the GPU and the host hold, and on which cards that fits."""
    rows = {}
    for name in sizes:
        config = config_of(name)
        for mode in MODES:
            parts = memory(config, mode=mode, **settings)
            peak, host = parts["peak"] / 1e9, parts["host"] / 1e9
            fits = [peak + CONTEXT / 1e9 <= card for card in CARDS]
            used = parts if "--offload" not in mode else parts | {"masters": 0, "frozen": 0}
            shown = [f"{used[part] / 1e9:.1f}" for part in PARTS]
            cells = [*shown, f"{peak:.1f}", f"{host:.1f}", *("yes" if ok else "-" for ok in fits)]
            rows[f"{name.upper()} {mode}".strip()] = cells
    columns = [*PARTS, "GPU", "host", *(f"{card} GB" for card in CARDS)]
    return table("model, flags; GB", columns, rows)


def main(argv: list[str] | None = None) -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    flag = parser.add_argument
    sizes, here = ", ".join(SIZES), "cuda" if torch.cuda.is_available() else "cpu"
    flag("--model", help=f"{sizes}, a folder or a name (default: a table of these sizes)")
    flag("--gpus", help="numbers of processes, separated by commas")
    flag("--gpu-gb", type=float, default=80, help="memory of a GPU; GB")
    flag("--micro-tokens", type=int, default=5120, help="tokens (default: 5120, the longest row)")
    flag("--max-tokens", type=int, default=5120, help="prompt and answer together; tokens")
    flag("--ppo", action="store_true", help="train_sa_ppo.py: a critic, and no frozen start")
    flag("--float32", action="store_true", help="as on a CPU")
    flag("--recompute", action="store_true", help="as the scripts' flags")
    flag("--offload", action="store_true")
    flag("--dtype", choices=("float32", "bfloat16"), help="with --measure")
    flag("--measure", action="store_true", help="measure an update of --model in these processes")
    flag("--device", default=here, help="with --measure")
    args = parser.parse_args(argv)
    if args.measure:
        return measure(args)  # bytes by role
    settings = dict(micro_tokens=args.micro_tokens, length=args.max_tokens, ppo=args.ppo,
                    frozen=not args.ppo)
    if not args.model and not args.gpus:
        print(by_card([name for name in SIZES if name != "32b"], **settings))
        return
    settings |= dict(b=4 if args.float32 else 2, mode=mode_of(args))
    gpus = [int(number) for number in (args.gpus or "1,8,64").split(",")]
    if args.model:
        config = config_of(args.model)
        W, B, E = counts(config)
        print(f"W = {W / 1e6:,.1f}M parameters, B = {B / 1e6:,.1f}M, E = {E / 1e6:,.1f}M;", end=" ")
        print("GB per process:\n")
        columns = [memory(config, R, **settings) for R in gpus]
        rows = {part: [f"{column[part] / 1e9:.2f}" for column in columns] for part in columns[0]}
        print(table("part", [plural(R, "process", "es") for R in gpus], rows))
        return
    rows = {}
    for name in SIZES:
        config = config_of(name)
        peaks = [memory(config, R, **settings)["peak"] / 1e9 for R in gpus]
        cells = [f"{peak:.0f} GB" for peak in peaks]
        fits = [peak <= args.gpu_gb for peak in peaks]
        rows[name.upper()] = [c if ok else f"**no** ({c})" for c, ok in zip(cells, fits)]
    print(table("model", [plural(R, "GPU", "s") for R in gpus], rows))


if __name__ == "__main__":
    with user_errors():
        main()
