"""What the training scripts need and neither is about: the command line, the device, processes, runs and checkpoints, logs,
signals.

One process or many: under torchrun the scripts are the same programs. Weights, gradients and optimizer state are sharded over the
processes (FSDP2's fully_shard); for rollouts each gathers a whole copy of the weights. Everything that is sampled and scored is
shared with all of them, so that what follows (rewards, advantages, the cut into micro-batches) is computed by each alone and is
the same for all: the collectives of a step follow from what all processes know, and none stands inside a branch on what one
of them found. Decoding and verification have none.
"""
import argparse
import atexit
import contextlib
import copy
import ctypes
import functools
import io
import itertools
import json
import math
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import uuid
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from data.problems import load_problems
from data.prompts import encode_prompt
from sar import GROUP_REWARDS, REWARDS

HERE = Path(__file__).parent
RUNS = Path(os.environ.get("SA_RUNS", HERE / "runs"))  # SA_RUNS: another disk, or a test's own folder

# ---- errors ----


@contextlib.contextmanager
def user_errors():
    """A user's mistake (ValueError, OSError) ends the program with one sentence and exit status 2, without a traceback. Where there
    are several processes, whatever ends the first of them is what all of them show."""
    try:
        yield
        if dist.is_initialized():  # done, and all is written: leave before C++ threads that Python's end does not wait for can abort it
            dist.destroy_process_group()
            sys.stdout.flush(), sys.stderr.flush(), sys.__stdout__.flush(), sys.__stderr__.flush()
            os._exit(0)
    except KeyboardInterrupt:  # before the run has begun; later a signal finishes the step first
        sys.exit(130)
    except (ValueError, OSError, SafetensorError) as error:
        if os.environ.get("SA_TRACEBACK"):  # for whoever hunts a bug of ours
            raise
        text = str(error)
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        if dist.is_initialized():
            end_all(text, 2)
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if dist.is_initialized():
            end_all(f"{type(error).__name__}: {error}", 1, traceback.format_exc())
        raise


def end_all(text: str, status: int, details: str = "") -> None:
    """End this process because of an error. The first process that fails leaves its message in the store; the others, whose
    collectives then fail too, repeat it instead of theirs. torchrun stops whoever still runs."""
    rank, _ = processes()
    try:
        first = store.compare_set("failure", "", f"process {rank}: {text}").decode()
    except RuntimeError:  # the store is gone: so is the machine that held it
        first = f"process {rank}: {text}"
    if first == f"process {rank}: {text}":
        print(f"{details}error: {first}", file=sys.__stderr__, flush=True)
    elif rank == 0:
        print(f"error: ended by {first}", file=sys.__stderr__, flush=True)
    if sys.stderr is not sys.__stderr__:  # the log of this process
        print(f"{details}error: {text}", file=sys.stderr, flush=True)
    os._exit(status)  # without waiting for collectives under way


# ---- the command line ----


PROCESSES = """several GPUs, several machines:
  torchrun --standalone --nproc-per-node 8 -- SCRIPT ...       8 GPUs here (the -- keeps torchrun from taking --n and --run for its own)
  torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 -- SCRIPT ...       on each of 4 machines
  torchrun --standalone --nproc-per-node 8 --max-restarts 3 -- SCRIPT --run NAME --resume ...       goes on by itself after a failure
It is the same program with the same results; runs/ must be a folder that all machines see.

peak memory of SA-GRPO per GPU with --micro-tokens 5120, GB (python -m bench.memory counts any other case):
             1 GPU    8 GPUs   64 GPUs
  0.5B          19        11        10
  1.5B          51        25        22
  4B           123        55        47
  8B           224        87        71
  32B          847       277       213
"""


def common_arguments(parser: argparse.ArgumentParser, ppo: dict | None = None, **own_defaults) -> None:
    """The flags of both training scripts, in the same words. Each is declared here once, with its unit, its source, and two
    defaults: the paper's (DESIGN.md's fidelity table; arXiv 2509.05489 and its public code) and the embedded model's.

    own_defaults: {flag name: (paper's, tiny's)} where a script's algorithm has another default.
    ppo: {flag: (paper's, tiny's, text, type)} that PPO alone has."""
    pairs: dict[str, tuple] = {}

    def add(group, flag: str, paper, tiny, text: str, **options) -> None:
        name = flag[2:].replace("-", "_")
        pairs[name] = own_defaults.get(name, (paper, tiny))
        shown = pairs[name][0] if pairs[name][0] == pairs[name][1] else f"{pairs[name][0]}; tiny: {pairs[name][1]}"
        group.add_argument(flag, help=f"{text} (default: {shown})", **options)

    group = parser.add_argument_group("model and data")
    group.add_argument("--model", default="tiny", help="a model folder, or a name: tiny (embedded), qwen-0.5b, qwen-1.5b, "
                       "qwen3-1.7b, qwen3-4b, phi-3.5-mini, gemma3-1b, smollm2-135m, or owner/name on the hub (default: tiny)")
    add(group, "--data", "gsm8k,math,numina", "tiny", "problems: names or JSONL files with question and answer, separated by commas")
    add(group, "--max-prompt-tokens", 1024, 128, "longer prompts are skipped and counted; tokens", type=int)
    add(group, "--max-new-tokens", 4096, 256, "longest answer, stop token included; also the constant that the loss is divided "
        "by; tokens", type=int)

    group = parser.add_argument_group("reward")
    add(group, "--reward", "sar", "sar", "sar: R_VR + alpha R_SA; vr: R_VR alone, the plain algorithm; sar-only: R_SA alone; em, vr+em: "
        "-log ppl(a|q) alone, with R_VR; o1, er: R_VR with a length reward within the group (sar.py: total_reward)", choices=REWARDS)
    add(group, "--alpha", 0.2, 0.2, "weight of what is added to R_VR, no unit (paper: 0.2, swept 0.05 to 0.3)", type=float)
    group.add_argument("--alpha-end", type=float, help="weight at the last step; it goes there from --alpha in a straight line "
                       "(default: --alpha throughout; the public code has such a schedule)")
    add(group, "--alone", "empty", "empty", "the context of ppl(a): the prompt's frame with an empty question, or the bare "
        "beginning-of-text token", choices=("empty", "bare"))
    add(group, "--verifier", "policy", "policy", "what counts as the answer: verify.py's policy, or the last number in the text "
        "(the paper's rule)", choices=("policy", "last-number"))

    group = parser.add_argument_group("algorithm")
    add(group, "--steps", 500, 140, "rollout batches to train on", type=int)
    add(group, "--prompts-per-step", 128, 16, "questions in a rollout batch", type=int)
    add(group, "--n", 6, 8, "answers sampled for each question", type=int)
    group.add_argument("--minibatch", type=int, help="questions in an optimizer step (default: half of --prompts-per-step)")
    add(group, "--epochs", 1, 1, "passes over a rollout batch", type=int)
    add(group, "--lr", 1e-6, 8e-5, "AdamW's learning rate, constant", type=float)
    add(group, "--kl-coef", 0.001, 0.001, "weight of the KL to the frozen start, in the loss (k3)", type=float)
    add(group, "--temperature", 1.0, 1.0, "of sampling; log-probs are those at temperature 1", type=float)
    add(group, "--seed", 0, 0, "of the order of questions and of every sample", type=int)

    for flag, (paper, tiny, text, kind) in (ppo or {}).items():
        add(group, flag, paper, tiny, text, type=kind)

    group = parser.add_argument_group("run and machine")
    group.add_argument("--run", help="the run's folder is runs/RUN (default: made of model, reward and time)")
    group.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint of --run")
    add(group, "--save-every", 50, 70, "a checkpoint every so many steps, and one at the end", type=int)
    add(group, "--eval-every", 0, 35, "greedy accuracy on held-out problems every so many steps, before the first and after the "
        "last; 0: never", type=int)
    group.add_argument("--micro-tokens", type=int, help="tokens in one forward and backward, padding included; bounds memory and "
                       "changes nothing else (default: 8192; large models on a CPU: 512)")
    group.add_argument("--slots", type=int, help="answers that decode at once (default: what the free memory holds)")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: a GPU if there is one)")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the matmuls; weights and optimizer are float32 "
                       "(default: bfloat16 on a GPU, float32 on a CPU)")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # which leaves the table below alone
    parser.description, parser.epilog = textwrap.fill(parser.description, 100), PROCESSES
    parser.set_defaults(_pairs=pairs)


def parse(parser: argparse.ArgumentParser, algorithm: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse, fill in the defaults that belong to the model, and check. On --resume the run's saved settings are the defaults;
    a flag that would change what is computed is refused. Raises ValueError in one sentence."""
    args = absolute_paths(parser.parse_args(argv))
    join_processes()
    if args.resume and not args.run:
        raise ValueError(f"--resume needs --run NAME; the newest is {newest_run() or 'not there: runs/ is empty'}")
    if args.resume and "TORCHELASTIC_RUN_ID" in os.environ and agreed(lambda: not (RUNS / args.run / "config.json").exists()):
        print(f"note: there is no run {args.run} yet: starting it (torchrun --max-restarts goes on with it)", file=sys.stderr)
        args.resume = False
    if args.resume:
        config = read_json(RUNS / args.run / "config.json")
        if config["algorithm"] != algorithm:
            raise ValueError(f"{args.run} is a run of train_sa_{config['algorithm']}.py: resume it with that script")
        saved = config["settings"]
        parser.set_defaults(**saved)
        args = absolute_paths(parser.parse_args(argv))
        free = {"steps", "save_every", "slots", "resume", "run", "device", "micro_tokens", "_pairs"}
        if saved["data"] == "tiny" or (saved["eval_every"] > 0) == (args.eval_every > 0):
            free.add("eval_every")  # else it would hold out problems that were trained on, or train on those held out
        if saved.get("alpha_end") is not None:
            free.remove("steps")  # the slope of alpha depends on them
        changed = [f"--{k.replace('_', '-')} was {saved[k]}, now {v}" for k, v in vars(args).items()
                   if k not in free and k in saved and saved[k] != v]
        if changed:
            raise ValueError(f"--resume would change the run {args.run}: {'; '.join(changed)}; leave the flag out or start another --run")
    for name, (paper, tiny) in args._pairs.items():
        if getattr(args, name) is None:
            setattr(args, name, tiny if args.model == "tiny" else paper)
    del args._pairs
    if args.minibatch is None:
        args.minibatch = args.prompts_per_step if args.prompts_per_step % 2 else args.prompts_per_step // 2
    check_device(args.device)
    if args.device.startswith("cuda") and processes()[1] > 1:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    args.micro_tokens = args.micro_tokens or (8192 if args.model == "tiny" or args.device.startswith("cuda") else 512)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    positive = ("steps", "prompts_per_step", "n", "minibatch", "epochs", "lr", "max_prompt_tokens", "max_new_tokens",
                "temperature", "save_every", "micro_tokens", "critic_lr", "slots")
    for name in positive:
        if getattr(args, name, None) is not None and not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    for name, low, high in (("gamma", 0, 1), ("lam", 0, 1)):
        if not low <= getattr(args, name, low) <= high:
            raise ValueError(f"--{name} must lie between {low} and {high}, got {getattr(args, name)}")
    if not args.kl_coef >= 0 or args.eval_every < 0:
        raise ValueError(f"--kl-coef and --eval-every must not be negative, got {args.kl_coef} and {args.eval_every}")
    for name in ("alpha", "alpha_end"):
        if getattr(args, name) is not None and not math.isfinite(getattr(args, name)):
            raise ValueError(f"--{name.replace('_', '-')} must be a number, got {getattr(args, name)}")
    if args.reward in GROUP_REWARDS and args.n < 2:
        raise ValueError(f"--reward {args.reward} compares the answers to one question: it needs --n 2 or more, got {args.n}")
    if args.minibatch > args.prompts_per_step:
        raise ValueError(f"--minibatch {args.minibatch} is larger than --prompts-per-step {args.prompts_per_step}: both count questions")
    if args.prompts_per_step % args.minibatch:
        raise ValueError(f"--prompts-per-step {args.prompts_per_step} is no multiple of --minibatch {args.minibatch}")
    if args.alpha < 0:
        print(f"note: --alpha {args.alpha} is negative: answers are rewarded for what their question does not explain", file=sys.stderr)
    return args


def check_device(device: str) -> None:
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if device not in ("cpu", *gpus, *["cuda"] * bool(gpus)):
        raise ValueError(f"--device {device} is not here: there is cpu" + "".join(f", {gpu}" for gpu in gpus))


def absolute_paths(args: argparse.Namespace) -> argparse.Namespace:
    """--model, --against and --data as they stay true in another working directory; names stay names. A shell leaves the ~ of
    gsm8k,~/my.jsonl as it is."""
    for flag in ("model", "against"):
        name = getattr(args, flag, None)
        if name and name != "tiny" and Path(name).expanduser().is_dir():
            setattr(args, flag, str(Path(name).expanduser().resolve()))
    if args.data:
        paths = {name: Path(name).expanduser() for name in args.data.split(",")}
        args.data = ",".join(str(path.resolve()) if path.is_file() else name for name, path in paths.items())
    return args


# ---- the machine ----


def prepare_machine() -> None:
    """Keep freed memory instead of returning it to the system: on a CPU, page faults otherwise cost up to a third of a
    training step (glibc only; the settings are MALLOC_MMAP_MAX_, MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_)."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 * 2**20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(option, value)


def autocast(args):
    """float32 weights with bfloat16 matmuls where --dtype asks for it."""
    device = args.device.split(":")[0]
    return torch.autocast(device, torch.bfloat16) if args.dtype == "bfloat16" else contextlib.nullcontext()


def peak_memory_gb(device: str) -> float:
    """Highest memory so far in GB: of the GPU where there is one, else of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if platform.system() == "Darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def warn_if_slow(args, parameters: int, models: int = 1) -> None:
    """Say before a large model starts on a CPU what a step will take: memory from the parameter count, time from the matmul
    rate measured here and the largest number of tokens a step can have. models: 2 where a critic is trained too."""
    if args.device != "cpu" or parameters < 50e6:
        return
    a = torch.randn(1024, 1024)
    a @ a
    began = time.perf_counter()
    for _ in range(4):
        a @ a
    rate = 4 * 2 * 1024**3 / (time.perf_counter() - began)
    tokens = args.prompts_per_step * args.n * args.max_new_tokens
    # 2 flops per parameter and token and forward: sampling, three scorings, an update worth three; a critic scores and learns
    minutes = (14 + 8 * (models - 1)) * parameters * tokens / rate / 60
    # float32: weights, gradients and two moments of each model that is trained, and the frozen start where a KL is asked for
    memory = parameters * 4 * (4 * models + (args.kl_coef > 0)) / 1e9
    print(f"note: {parameters / 1e9:.2f}B parameters on a CPU ({rate / 1e9:.0f} GFLOP/s): about {memory:.0f} GB of memory besides "
          f"activations, and for a step of {tokens:,} tokens, the most it can have, about {minutes:,.0f} minutes; --prompts-per-step, --n and --max-new-tokens "
          "make it shorter", file=sys.stderr)


def count_parameters(folder: Path) -> int:
    """From the headers of the folder's safetensors files: nothing is loaded."""
    total = 0
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return total


# ---- processes ----

store = None  # what torchrun's processes share beside collectives: small values by name
turn = itertools.count()  # numbers the uses of the store, alike in every process


def processes() -> tuple[int, int]:
    """This process's number and how many there are: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes() -> None:
    """Meet the other processes that torchrun started, if it started several. All but the first keep quiet: no bars, and what
    they print is kept for their log in the run's folder."""
    global store
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    store, rank, world = next(dist.rendezvous("env://"))
    store = this_start(store, rank, world)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank, world_size=world)
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    if rank > 0:
        sys.stdout = sys.stderr = io.StringIO()
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)


def this_start(store, rank: int, world: int):
    """A part of the store that is new: torchrun keeps its store when it starts the processes again, and what the dead left there,
    their addresses for example, must not be taken for news. The first process answers every greeting, old ones too, with a new
    name, until all have said it."""
    if rank > 0:
        greeting = uuid.uuid4().hex
        store.set(f"greeting {rank}", greeting)
        name = store.get(f"answer to {greeting}").decode()
        store.set(f"{name} {rank}", "here")
        return dist.PrefixStore(name, store)
    name, others = uuid.uuid4().hex, range(1, world)
    while not store.check([f"{name} {k}" for k in others]):
        for k in others:
            if store.check([f"greeting {k}"]):
                store.set(f"answer to {store.get(f'greeting {k}').decode()}", name)
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


def agreed(find):
    """What find() gives in the first process, for all: anything that JSON can hold."""
    rank, world = processes()
    if world == 1:
        return find()
    key = f"agreed {next(turn)}"
    if rank == 0:
        store.set(key, json.dumps(find()))
    return json.loads(store.get(key))


def add_up(totals: dict, largest: tuple[str, ...] = ()) -> dict:
    """Sums of the numbers of all processes, for the keys in `largest` their maxima; lists stay, they are alike everywhere."""
    if processes()[1] == 1:
        return totals
    sums = [key for key, value in totals.items() if key not in largest and not isinstance(value, list)]
    together = {}
    for keys, operation in ((sums, dist.ReduceOp.SUM), (list(largest), dist.ReduceOp.MAX)):
        numbers = torch.tensor([totals[key] for key in keys], dtype=torch.float64)
        dist.all_reduce(numbers, operation)
        together |= dict(zip(keys, numbers.tolist()))
    return totals | together


def sharding(args):
    """The `shard` of GPT.from_pretrained: None for one process. For several it lets FSDP2 divide every parameter by rows. Each block's
    weights are gathered when its turn comes and given back after it; the root's, embeddings and last norm, stay whole from the
    forward to the end of the backward, since the scripts hand `policy.unembedding` to the loss.

    For --dtype bfloat16 the gathered copies are bfloat16 (half the bytes), gradients are summed in float32 and the shards stay
    float32. The matmuls' inputs are cast by autocast, as with one process; only norms and embeddings are rounded earlier."""
    rank, world = processes()
    if world == 1:
        return None
    mesh = init_device_mesh(args.device.split(":")[0], (world,))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def shard(model):
        blocks = getattr(model, "blocks", [])
        for module in (*blocks, model):
            policy = half if args.dtype == "bfloat16" and blocks else MixedPrecisionPolicy()  # a critic's own head stays float32
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=module is not model)
            module.set_gradient_divide_factor(1.0)  # sums, not means: the loss has its denominator
            module.set_force_sum_reduction_for_comms(True)  # gloo can do nothing else
        return own_rows
    return shard


def own_rows(p: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The rows of a parameter, or of AdamW's moments, that this process holds, and the number of the first: all for one process."""
    if not isinstance(p, DTensor):
        return p.detach(), 0
    rank, world = processes()
    return p.detach().to_local(), min(rank * -(-len(p) // world), len(p))


def whole(p: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor with the rows of all processes; all of them must ask."""
    p = p.detach().to(dtype or p.dtype)  # before it travels
    return p.full_tensor() if isinstance(p, DTensor) else p


def reshard(model) -> None:
    """Give back gathered weights: parameters() then lists the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def sampler_for(policy, args, GPT):
    """The model that generates: the policy itself in float32, else a copy of it in bfloat16, which `refresh` keeps current. Where
    the policy is sharded it is always a copy, whole in every process."""
    if not isinstance(policy, FSDPModule):
        return policy if args.dtype == "float32" else copy.deepcopy(policy).to(torch.bfloat16).requires_grad_(False)
    with torch.device("meta"):
        sampler = GPT(policy.config).to(getattr(torch, args.dtype)).requires_grad_(False)
    sampler.to_empty(device=args.device)
    refresh(sampler, policy)
    return sampler


@torch.no_grad()
def refresh(sampler, policy) -> None:
    """Bring the sampler's copy of the weights up to date, in place, one parameter at a time."""
    if sampler is not policy:
        reshard(policy)
        for own, new in zip(sampler.parameters(), policy.parameters()):
            own.copy_(whole(new, own.dtype))


def sample(generate, model, prompts: list[list[int]], *, n: int = 1, **options) -> list:
    """generate(model, prompts, n=n, **options), by all processes together: each takes the next prompt from a counter in the job's
    store when it has a free slot, and in the end all hold all answers.

    How many answers a process may hold at once: on a GPU its even share, since a decoding step takes about as long for few rows
    as for many, so that all at once is fastest; on a CPU half of it, since there the time follows the rows, and what is not
    held can still go to whoever is free."""
    rank, world = processes()
    if world == 1:
        return generate(model, prompts, n=n, **options)
    counter = f"prompts {next(turn)}"
    share = -(-len(prompts) * n // world)
    answers = generate(model, prompts, n=n, take=lambda: store.add(counter, 1) - 1,
                       at_once=share if model.unembedding.is_cuda else -(-share // 2), **options)
    # Every answer is one process's, and zeros elsewhere: sums bring them together exactly, in three collectives.
    ends = torch.tensor([[len(a.tokens), a.finished] for a in answers])  # (N, 2)
    dist.all_reduce(ends)
    lengths = ends[:, 0].tolist()
    tokens = spread([torch.tensor(a.tokens) for a in answers], lengths, torch.int64)
    logprobs = spread([torch.tensor(a.logprobs) for a in answers], lengths, torch.float64)
    for answer, t, lp, finished in zip(answers, tokens, logprobs, ends[:, 1].tolist()):
        answer.tokens, answer.logprobs, answer.finished = t.tolist(), lp.tolist(), bool(finished)
    return answers


def spread(pieces: list[torch.Tensor], lengths: list[int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Pieces (lengths[i],) of which each is filled in one process and empty in the others -> filled, in all of them."""
    flat = torch.cat([p.to(dtype) if len(p) else torch.zeros(length, dtype=dtype) for p, length in zip(pieces, lengths)])
    dist.all_reduce(flat)
    return list(flat.split(lengths))


def score(function, model, contexts: list[list[int]], answers: list[list[int]], micro_tokens: int) -> list[torch.Tensor]:
    """function(model, contexts, answers, micro_tokens=...), a (len(a),) tensor for each answer, by all processes together."""
    pieces = function(model, contexts, answers, micro_tokens=micro_tokens, share=processes())
    if processes()[1] == 1:
        return pieces
    reshard(model)
    return spread(pieces, [len(a) for a in answers], torch.float32)


def pick(pieces: list[torch.Tensor], indices: list[int], device: str) -> torch.Tensor:
    """pieces[i] for each index, one after the other, on the device; (0,) where there is none."""
    return torch.cat([pieces[i] for i in indices] or [torch.empty(0)]).to(device)


def clip_gradients(model, limit: float) -> torch.Tensor:
    """Scale the gradients down to a norm of at most `limit`; returns the norm that they had. One collective."""
    if processes()[1] == 1:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    shards = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
    square = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) ** 2 for g in shards]).sum()
    dist.all_reduce(square)
    norm = square.sqrt()
    torch._foreach_mul_(shards, (limit / (norm + 1e-6)).clamp(max=1.0).to(shards[0].dtype))
    return norm


# ---- data ----

HELD_OUT = 320  # problems kept from training where there is no test set of their own


def load_data(args, tokenizer, folder: Path) -> tuple[list, list[list[int]], list]:
    """The problems to train on, their prompts as tokens, and the problems held out for --eval-every.

    Prompts longer than --max-prompt-tokens, or than the positions of the model in `folder` leave room for beside an answer,
    are skipped and counted, never cut. The embedded model's data has its own test set;
    elsewhere, if evaluation is asked for, a tenth of the data (at most HELD_OUT) is held out, chosen by the data alone."""
    problems, held_out = [], []
    for name in args.data.split(","):
        problems += load_problems(name)
    if args.eval_every and args.data == "tiny":
        held_out = load_problems("tiny-test")
    elif args.eval_every:
        order = shuffled(len(problems), "held out")
        cut = min(HELD_OUT, len(problems) // 10)
        if cut == 0:
            raise ValueError(f"--eval-every holds out a tenth of the data, but there are only {len(problems)} problems: use 0")
        held_out, problems = [problems[i] for i in order[:cut]], [problems[i] for i in sorted(order[cut:])]
    positions = read_json(folder / "config.json")["max_position_embeddings"]
    limit = min(args.max_prompt_tokens, positions - args.max_new_tokens)
    if limit < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt: {args.model} has {positions} positions")
    prompts = [encode_prompt(tokenizer, p.question) for p in problems]
    short = [i for i, prompt in enumerate(prompts) if len(prompt) <= limit]
    tested = [p for p in held_out if len(encode_prompt(tokenizer, p.question)) <= limit]
    if not short or (held_out and not tested):
        raise ValueError(f"all {len(prompts)} prompts are longer than --max-prompt-tokens {args.max_prompt_tokens}, or leave no room for "
                         f"an answer within {positions} positions (the shortest has {min(map(len, prompts))} tokens)")
    for what, before, after in (("", prompts, short), ("held-out ", held_out, tested)):
        if len(after) < len(before):
            print(f"note: {len(before) - len(after)} of {len(before)} {what}prompts are longer than {limit} tokens and are skipped",
                  file=sys.stderr)
    if len(short) < args.prompts_per_step:
        raise ValueError(f"--prompts-per-step {args.prompts_per_step} is more than the {len(short)} problems of {args.data}")
    return [problems[i] for i in short], [prompts[i] for i in short], tested


def batch_of(problems: list, step: int, count: int, seed: int) -> list[int]:
    """Indices of step's questions: the step-th slice of an endless row of shuffled passes over the data. Depends on nothing
    but its arguments, so a resumed run needs no memory of where it was."""
    places = [divmod(k, len(problems)) for k in range(step * count, (step + 1) * count)]
    return [shuffled(len(problems), f"{seed} {epoch}")[place] for epoch, place in places]


@functools.lru_cache(maxsize=4)
def shuffled(size: int, key: str) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(key).shuffle(order)
    return tuple(order)


# ---- runs, logs, checkpoints ----


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is not there: no such run") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def newest_run() -> str | None:
    runs = sorted(RUNS.glob("*/config.json"), key=lambda p: p.stat().st_mtime)
    return runs[-1].parent.name if runs else None


def git_commit() -> str:
    try:
        answer = subprocess.run(["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True)
    except OSError:  # no git here
        return "unknown"
    return answer.stdout.strip() or "unknown"


def provenance(device: str) -> dict:
    """What a run is made with: the commit, versions, machine, threads."""
    versions = {name: version(name) for name in ("torch", "numpy", "tiktoken", "safetensors")}
    versions |= {"python": platform.python_version(), "machine": platform.machine(), "threads": torch.get_num_threads(),
                 "processes": processes()[1]}
    if device.startswith("cuda"):
        versions["gpu"] = torch.cuda.get_device_name(device)
    return {"git_commit": git_commit(), "versions": versions}


class Run:
    """runs/NAME: config.json, metrics.jsonl (a line a step), completions.jsonl (a line an answer), evals.jsonl, step_000100/.

    A checkpoint is whole or not there: it is written beside its place and renamed. It also holds the lengths of the logs, so
    that a resumed run drops what was logged after it and writes the same lines again. `self.step` is the number of steps done.
    """
    LOGS = ("metrics.jsonl", "completions.jsonl", "evals.jsonl")

    def __init__(self, args: argparse.Namespace, algorithm: str, parameters: int, models: int = 1):
        args.run = args.run or agreed(lambda: f"{algorithm}-{Path(args.model).name}-{args.reward}-{time.strftime('%m%d-%H%M%S')}")
        self.args, self.folder, self.step = args, RUNS / args.run, 0
        self.checkpoint: Path | None = None  # the newest whole one
        self.stop_signal: int | None = None
        self.first = processes()[0] == 0  # it alone writes, but for the logs of the others
        if self.first:
            self.prepare(args, algorithm, parameters, models)
        self.step, checkpoint = agreed(lambda: (self.step, str(self.checkpoint or "")))
        if not self.first:
            self.checkpoint = Path(checkpoint) if checkpoint else None
            kept = sys.stderr.getvalue() if isinstance(sys.stderr, io.StringIO) else ""
            sys.stdout = sys.stderr = open(self.folder / f"process_{processes()[0]}.log", "a", encoding="utf-8", buffering=1)
            sys.stderr.write(kept)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def prepare(self, args: argparse.Namespace, algorithm: str, parameters: int, models: int) -> None:
        """Find the checkpoint to resume from, and put the folder and its logs in order."""
        if args.resume:
            self.checkpoint = self.newest_checkpoint()
            if self.checkpoint is None and [p for p in self.folder.glob("step_*") if p.suffix != ".tmp"]:
                raise ValueError(f"{self.folder} has checkpoints, but none that can be resumed (optimizer.safetensors and state.json)")
            for stale in self.folder.glob("*.tmp"):  # a kill during a checkpoint's writing leaves one
                shutil.rmtree(stale)
            state = {"step": 0, "log_bytes": {name: 0 for name in self.LOGS}}
            if self.checkpoint:
                state = read_json(self.checkpoint / "state.json")
            else:
                print(f"note: {self.folder} has no whole checkpoint yet: starting at the first step", file=sys.stderr)
            self.step = state["step"]
            for name, size in state["log_bytes"].items():
                if (self.folder / name).exists():
                    os.truncate(self.folder / name, size)
        elif (self.folder / "config.json").exists():
            raise ValueError(f"{self.folder} already holds a run: go on with it by --resume, or choose another --run")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".probe").write_bytes(b"x")
            (self.folder / ".probe").unlink()
        except OSError as error:
            raise ValueError(f"cannot write into {self.folder}: {error.strerror}") from None
        free = shutil.disk_usage(self.folder).free
        checkpoint_bytes = models * parameters * 3 * 4  # float32 weights and AdamW's two moments
        if free < checkpoint_bytes:
            raise ValueError(f"{self.folder} has {free / 1e9:.2f} GB free, but a checkpoint takes {checkpoint_bytes / 1e9:.2f} GB: "
                             "free some space, or let runs/ be a link to a larger disk")
        self.logs = {name: open(self.folder / name, "a", encoding="utf-8") for name in self.LOGS}
        here = provenance(args.device)
        config = {"algorithm": algorithm, "settings": vars(args) | {"resume": False}, **here}
        if args.resume:  # what it began with stays, what it goes on with is added
            before = read_json(self.folder / "config.json")
            for what in ("threads", "processes"):
                was, now = before["versions"].get(what, 1), here["versions"][what]
                if was != now:
                    print(f"note: the run began with {was} {what} and goes on with {now}: the last bits of its sums will differ"
                          f"{' (OMP_NUM_THREADS)' * (what == 'threads')}", file=sys.stderr)
            config = before | {"settings": config["settings"], "resumes": [*before.get("resumes", []), {"step": self.step, **here}]}
        write_atomically(self.folder / "config.json", json.dumps(config, indent=2))

    def on_signal(self, number, frame) -> None:
        if self.stop_signal is not None:  # asked twice: now
            raise SystemExit(128 + number)
        self.stop_signal = number
        print(f"\n{signal.Signals(number).name}: finishing this step, then saving (again to stop at once)", file=sys.stderr)

    def stop_asked(self) -> int | None:
        """The signal that one of the processes got, if any did: they all stop after the same step."""
        if processes()[1] > 1:
            number = torch.tensor(self.stop_signal or 0)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self.stop_signal = number.item() or None
        return self.stop_signal

    def log(self, name: str, record: dict) -> None:
        """Append one line to a log; NaN and infinity are written as null, which any JSON reader takes."""
        if not self.first:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.logs[name].write(json.dumps(clean, ensure_ascii=False) + "\n")
        self.logs[name].flush()

    def newest_checkpoint(self) -> Path | None:
        whole = sorted(p for p in self.folder.glob("step_*") if p.suffix != ".tmp" and (p / "state.json").exists()
                       and (p / "optimizer.safetensors").exists())
        return whole[-1] if whole else None

    def save(self, step: int, tokenizer, policy, optimizer, critic=None, critic_optimizer=None) -> Path:
        """Write step_XXXXXX/: a model folder that loads anywhere, plus optimizer.safetensors and state.json for resume; PPO's
        critic and its optimizer go beside them. Only the newest checkpoint keeps what resume alone needs."""
        place = self.folder / f"step_{step:06d}"
        scratch = place.with_suffix(".tmp")
        if self.first:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            tokenizer.copy_to(scratch)
        save_model(policy, scratch)
        save_tensors(optimizer_tensors(policy, optimizer), scratch / "optimizer.safetensors")
        if critic is not None:
            reshard(critic)
            save_tensors(dict(critic.named_parameters()), scratch / "critic.safetensors")
            save_tensors(optimizer_tensors(critic, critic_optimizer), scratch / "critic_optimizer.safetensors")
        if not self.first:
            return place
        for log in self.logs.values():
            log.flush()
            os.fsync(log.fileno())
        state = {"step": step, "log_bytes": {name: (self.folder / name).stat().st_size for name in self.LOGS}}
        (scratch / "state.json").write_text(json.dumps(state))
        for path in (*scratch.iterdir(), scratch):
            sync(path)
        shutil.rmtree(place, ignore_errors=True)  # one without optimizer state, which a resume passed over
        scratch.rename(place)
        sync(self.folder)
        for name in ("optimizer", "critic", "critic_optimizer"):
            for older in self.folder.glob(f"step_*/{name}.safetensors"):
                if older.parent != place:
                    older.unlink()
        return place

    def stop_on_nan(self, step: int, what: str, batch: list[dict]) -> None:
        """A loss or gradient that is not finite ends the run before it reaches the weights; the batch is kept for inspection."""
        rank = processes()[0]
        path = self.folder / f"bad_batch_step_{step + 1:06d}{f'_process_{rank}' if rank else ''}.json"
        write_atomically(path, json.dumps(batch, ensure_ascii=False))
        raise ValueError(f"the {what} of step {step + 1} is not finite; this update was not made, the batch is in {path}, and the "
                         f"newest checkpoint is {self.newest_checkpoint() or 'not there yet'}: try a lower --lr")

    def finish(self, script: str, table) -> None:
        """Say where everything is; after a signal, how to go on, with the exit status that shells expect."""
        if not self.first:  # it has nothing to say, but leaves in the same way
            if self.stop_signal:
                sys.exit(128 + self.stop_signal)
            return
        newest = self.newest_checkpoint()
        if self.stop_signal and json.loads((newest / "state.json").read_text())["step"] < self.args.steps:
            print(f"stopped and saved {newest.name}; go on with: python {script} --run {self.args.run} --resume", file=sys.stderr)
            sys.exit(128 + self.stop_signal)
        evals = [json.loads(line) for line in open(self.folder / "evals.jsonl", encoding="utf-8")]
        if evals:
            print(table({"base" if e["step"] == 0 else f"step {e['step']}": e for e in (evals[0], evals[-1])}))
        print(f"{self.folder}: {newest.name if newest else 'no checkpoint'}, metrics.jsonl, completions.jsonl")


def sync(path: Path) -> None:
    """Have the system write a file or folder to the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    scratch = path.with_suffix(path.suffix + ".new")
    scratch.write_text(text)
    scratch.rename(path)


def optimizer_tensors(model, optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state as named tensors, e.g. model.norm.weight.exp_avg; empty before the first step."""
    names = {p: name for name, p in model.named_parameters()}
    return {f"{names[p]}.{key}": value for p, state in optimizer.state.items() for key, value in state.items()}


# A checkpoint is the same folder whatever the number of processes: whole tensors under their names. torch.distributed.checkpoint
# is not used: its metadata file is a pickle, and reading one runs whatever it says.


def save_model(model, folder: Path) -> None:
    """model.save_pretrained(folder), also for a sharded model."""
    if not isinstance(model, FSDPModule):
        return model.save_pretrained(folder)
    if processes()[0] == 0:
        model.save_config(folder)
    reshard(model)
    rows = model.hf_rows()
    save_tensors({name: model.get_parameter(p) for name, (p, _) in rows.items()}, folder / "model.safetensors",
                 {name: r for name, (_, r) in rows.items()}, {"format": "pt"})


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, rows: dict[str, slice] | None = None, metadata: dict | None = None) -> None:
    """Write {name: tensor}, or of each tensor only rows[name], to a safetensors file. From several processes it comes together a
    tensor at a time, and the first writes it: nobody holds more than one whole. The file is then the one that save_file makes."""
    rank, world = processes()
    if world == 1:
        return save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata)
    rows = rows or {}
    header = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in sorted(tensors):
        shape = list(tensors[name].shape)
        if name in rows:
            shape[0] = len(range(*rows[name].indices(shape[0])))
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") if rank == 0 else contextlib.nullcontext() as file:
        if rank == 0:
            file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            tensor = whole(tensors[name])
            if rank == 0:
                tensor = tensor[rows[name]] if name in rows else tensor
                file.write(tensor.cpu().float().contiguous().numpy())


@torch.no_grad()
def load_parameters(path: Path, model) -> None:
    for name, p in model.named_parameters():
        fill(path, name, p)


@torch.no_grad()
def load_optimizer(path: Path, model, optimizer) -> None:
    """Put what `optimizer_tensors` saved back, bit for bit."""
    parameters = dict(model.named_parameters())
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    for name in names:
        parameter, key = name.rsplit(".", 1)
        p = parameters[parameter]
        state = torch.zeros_like(p) if key.startswith("exp_avg") else torch.zeros((), device=p.device)
        optimizer.state[p][key] = fill(path, name, state)


def fill(path: Path, name: str, place: torch.Tensor) -> torch.Tensor:
    """Copy a tensor of a safetensors file, of a sharded one this process's rows, into `place`, and return it."""
    ours, first = own_rows(place)
    with safe_open(path, framework="pt") as file:
        ours.copy_(file.get_slice(name)[first:first + len(ours)] if ours.dim() else file.get_tensor(name))
    return place
