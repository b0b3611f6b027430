"""What the training scripts need and neither is about: the command line, the device, runs and checkpoints, logs, signals."""
import argparse
import contextlib
import copy
import ctypes
import functools
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
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from data.problems import load_problems
from data.prompts import encode_prompt
from sar import GROUP_REWARDS, REWARDS

HERE = Path(__file__).parent
RUNS = Path(os.environ.get("SA_RUNS", HERE / "runs"))  # SA_RUNS: another disk, or a test's own folder

# ---- errors ----


@contextlib.contextmanager
def user_errors():
    """A user's mistake (ValueError, OSError) ends the program with one sentence and exit status 2, without a traceback."""
    try:
        yield
    except KeyboardInterrupt:  # before the run has begun; later a signal finishes the step first
        sys.exit(130)
    except (ValueError, OSError, SafetensorError) as error:
        if os.environ.get("SA_TRACEBACK"):  # for whoever hunts a bug of ours
            raise
        text = str(error)
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)


# ---- the command line ----


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
    parser.set_defaults(_pairs=pairs)


def parse(parser: argparse.ArgumentParser, algorithm: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse, fill in the defaults that belong to the model, and check. On --resume the run's saved settings are the defaults;
    a flag that would change what is computed is refused. Raises ValueError in one sentence."""
    args = absolute_paths(parser.parse_args(argv))
    if args.resume:
        if not args.run:
            raise ValueError(f"--resume needs --run NAME; the newest is {newest_run() or 'not there: runs/ is empty'}")
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
    """--model, --against and --data as they stay true in another working directory; names stay names."""
    for flag in ("model", "against"):
        name = getattr(args, flag, None)
        if name and name != "tiny" and Path(name).is_dir():
            setattr(args, flag, str(Path(name).resolve()))
    if args.data:
        args.data = ",".join(str(Path(name).resolve()) if Path(name).is_file() else name for name in args.data.split(","))
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


def sampler_for(policy, args):
    """The model that generates: the policy itself in float32, else a copy of it in bfloat16, which `refresh` keeps current."""
    return policy if args.dtype == "float32" else copy.deepcopy(policy).to(torch.bfloat16).requires_grad_(False)


@torch.no_grad()
def refresh(sampler, policy) -> None:
    """Bring the sampler's copy of the weights up to date, in place."""
    if sampler is not policy:
        for own, new in zip(sampler.parameters(), policy.parameters()):
            own.copy_(new)


def count_parameters(folder: Path) -> int:
    """From the headers of the folder's safetensors files: nothing is loaded."""
    total = 0
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return total


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
    versions |= {"python": platform.python_version(), "machine": platform.machine(), "threads": torch.get_num_threads()}
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
        args.run = args.run or f"{algorithm}-{Path(args.model).name}-{args.reward}-{time.strftime('%m%d-%H%M%S')}"
        self.args, self.folder, self.step = args, RUNS / args.run, 0
        self.checkpoint: Path | None = None  # the newest whole one
        self.stop_signal: int | None = None
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
            if before["versions"]["threads"] != here["versions"]["threads"]:
                print(f"note: the run began with {before['versions']['threads']} threads and goes on with {here['versions']['threads']}: "
                      "the last bits of its sums will differ (OMP_NUM_THREADS)", file=sys.stderr)
            config = before | {"settings": config["settings"], "resumes": [*before.get("resumes", []), {"step": self.step, **here}]}
        write_atomically(self.folder / "config.json", json.dumps(config, indent=2))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame) -> None:
        if self.stop_signal is not None:  # asked twice: now
            raise SystemExit(128 + number)
        self.stop_signal = number
        print(f"\n{signal.Signals(number).name}: finishing this step, then saving (again to stop at once)", file=sys.stderr)

    def log(self, name: str, record: dict) -> None:
        """Append one line to a log; NaN and infinity are written as null, which any JSON reader takes."""
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
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        policy.save_pretrained(scratch)
        tokenizer.copy_to(scratch)
        save_file(optimizer_tensors(policy, optimizer), scratch / "optimizer.safetensors")
        if critic is not None:
            save_file({name: p.detach().cpu().contiguous() for name, p in critic.named_parameters()}, scratch / "critic.safetensors")
            save_file(optimizer_tensors(critic, critic_optimizer), scratch / "critic_optimizer.safetensors")
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
        path = self.folder / f"bad_batch_step_{step + 1:06d}.json"
        write_atomically(path, json.dumps(batch, ensure_ascii=False))
        raise ValueError(f"the {what} of step {step + 1} is not finite; this update was not made, the batch is in {path}, and the "
                         f"newest checkpoint is {self.newest_checkpoint() or 'not there yet'}: try a lower --lr")

    def finish(self, script: str, table) -> None:
        """Say where everything is; after a signal, how to go on, with the exit status that shells expect."""
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
    return {f"{names[p]}.{key}": value.detach().cpu().contiguous() for p, state in optimizer.state.items() for key, value in state.items()}


@torch.no_grad()
def load_parameters(path: Path, model) -> None:
    saved = load_file(path)
    for name, p in model.named_parameters():
        p.copy_(saved[name])


def load_optimizer(path: Path, model, optimizer) -> None:
    """Put what `optimizer_tensors` saved back, bit for bit."""
    parameters = dict(model.named_parameters())
    for name, value in load_file(path).items():
        parameter, key = name.rsplit(".", 1)
        p = parameters[parameter]
        optimizer.state[p][key] = value.to(p.device)

