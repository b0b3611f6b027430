"""The folder of a run: settings, logs, checkpoints, resume, signals.

    runs/NAME/   config.json   metrics.jsonl (a line a step)   completions.jsonl (a line an answer)
                 evals.jsonl   step_000100/ (a model folder, and what --resume needs)
"""
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from data.files import lock, open_tensors, read_json, write_atomically
from model import GPT, GPTConfig
from runtime.parallel import Answer, Means, all_gather, from_rank_0, own_rows, processes, reshard
from sar import perplexity
from verify import STATUSES

HERE = Path(__file__).resolve().parent.parent
RUNS = Path(os.environ.get("SA_RUNS", HERE / "runs"))  # SA_RUNS: another disk
LOGS = ("metrics.jsonl", "completions.jsonl", "evals.jsonl")


def provenance(device: str) -> dict:
    """What a run is made with: the commit, versions, machine, threads."""
    command = "git describe --always --dirty --abbrev=40 || echo unknown"
    described = subprocess.run(command, shell=True, cwd=HERE, capture_output=True, text=True)
    versions = {name: version(name) for name in ("numpy", "tiktoken", "safetensors")}
    versions |= {"torch": torch.__version__, "python": platform.python_version(),
                 "machine": platform.machine(), "threads": torch.get_num_threads(),
                 "processes": processes()[1]}
    if device.startswith("cuda"):
        versions["gpu"] = torch.cuda.get_device_name(device)
    return {"git_commit": described.stdout.strip(), "versions": versions}


def peak_memory(device: str) -> float:
    """The highest memory so far in GB: of the GPU where there is one, else of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if platform.system() == "Darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def record(a: Answer, step: int) -> dict:
    """What completions.jsonl says of an answer."""
    row = {"step": step, "question": a.problem.question, "text": a.text, "tokens": a.tokens,
           "reference": a.problem.answer, "answer": a.verdict.answer, "status": a.verdict.status,
           "finished": a.finished, "r_vr": a.verdict.reward, "r_sa": a.r_sa,
           "ppl_query": perplexity(a.with_question), "ppl_alone": perplexity(a.without_question),
           "reward": a.reward, "advantage": a.advantage.mean()}
    return row if a.values is None else row | {"value": a.values[0]}


def describe(answers: list[Answer], means: Means, args) -> dict:
    """The metrics that both training scripts log; docs/usage.md says what each means."""
    right = torch.tensor([a.verdict.reward for a in answers]).double()  # (N,)
    reward = torch.stack([a.reward for a in answers])
    r_sa = torch.stack([a.r_sa for a in answers])
    lengths = torch.tensor([len(a.tokens) for a in answers]).double()
    mismatch = torch.cat([a.logprobs - a.with_question for a in answers]).abs()  # (tokens,)
    statuses = [a.verdict.status for a in answers]
    sums, mean, largest = means.gather()
    optimizer_steps = args.epochs * args.prompts_per_step // args.minibatch
    metrics = {
        "reward": reward.mean(), "accuracy": right.mean(),
        "r_sa_mean": r_sa.mean(), "r_sa_std": r_sa.std(),
        "ppl_query": torch.stack([perplexity(a.with_question) for a in answers]).mean(),
        "ppl_alone": torch.stack([perplexity(a.without_question) for a in answers]).mean(),
        "length_mean": lengths.mean(), "length_p50": lengths.quantile(0.5),
        "length_p95": lengths.quantile(0.95), "length_max": lengths.max(),
        "unfinished": sum(not a.finished for a in answers) / len(answers),
        "loss": sums["loss"] / optimizer_steps,
        "kl": mean["kl"] if args.kl_coef else None, "entropy": mean["entropy"],
        "clip_fraction": mean["clipped"], "ratio_max": math.exp(largest["drift"]),
        "mismatch_mean": mismatch.mean(), "mismatch_max": mismatch.max(),
        "grad_norm": largest["grad_norm"], "lr": args.lr, "tokens": int(lengths.sum()),
        "peak_memory_gb": largest["peak_memory"]}
    if "value_loss" in sums:
        metrics["value_loss"] = sums["value_loss"] / optimizer_steps
        metrics["critic_grad_norm"] = largest["critic_grad_norm"]
    return metrics | {f"share_{name}": statuses.count(name) / len(answers) for name in STATUSES}


class Run:
    """One training run and its folder. Rank 0 alone writes, but for the other processes' logs.

    A checkpoint is whole or not there: it is written beside its place and renamed. It also holds
    the lengths of the logs: a resumed run drops what was logged after it. `step`: steps done.
    """

    def __init__(self, args, algorithm: str, folder: Path, models: int = 1):
        name = f"{algorithm}-{Path(args.model).name}-{args.reward}-{time.strftime('%m%d-%H%M%S')}"
        args.name = args.name or from_rank_0(lambda: name)
        self.args, self.folder, self.step = args, RUNS / args.name, 0
        self.stop_signal = self.stopping = 0  # numbers of signals
        self.unsaved, self.early, self.is_main = False, [], processes()[0] == 0
        if self.is_main:
            config = GPTConfig.from_hf(read_json(folder / "config.json"))
            with torch.device("meta"):
                parameters = sum(map(torch.numel, GPT(config).parameters()))
            warn_if_large(args, parameters, models)
            if args.device.startswith("cuda"):
                from bench.memory import what_fits  # the formula, which nothing else here needs
                say(what_fits(args, config, ppo=models > 1))
            self.prepare(algorithm, models * parameters)
        self.step = from_rank_0(lambda: self.step)
        self.checkpoint = self.folder / f"step_{self.step:06d}" if self.step else None
        if not self.is_main:
            path = self.folder / f"process_{processes()[0]}.log"
            sys.stdout = sys.stderr = open(path, "a", encoding="utf-8", buffering=1)
        signal.signal(signal.SIGINT, self.on_signal)
        signal.signal(signal.SIGTERM, self.on_signal)

    def prepare(self, algorithm: str, parameters: int):
        """Make the folder, or find the checkpoint to resume from and cut the logs back to it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hold()
        path, here = self.folder / "config.json", provenance(self.args.device)
        config = {"algorithm": algorithm, "settings": vars(self.args) | {"resume": False}, **here}
        if self.args.resume:
            self.rewind()
            before = read_json(path)
            resumes = [*before.get("resumes", []), {"step": self.step, **here}]
            config = before | {"settings": config["settings"], "resumes": resumes}
        elif path.exists():
            raise ValueError(f"{self.folder} already holds a run: --resume, or another --name")
        free = shutil.disk_usage(self.folder).free / 1e9  # GB
        size = parameters * 3 * 4 / 1e9  # float32 weights and AdamW's two moments
        if free < (size if self.step else 2 * size):
            raise ValueError(f"{self.folder} has {free:.2f} GB free, but a checkpoint takes "
                             f"{size:.2f} GB, and for a while there are two: set SA_RUNS")
        write_atomically(path, json.dumps(config, indent=2))
        self.logs = {name: open(self.folder / name, "ab") for name in LOGS}

    def hold(self):
        """Keep other jobs out until this process ends, be it by kill -9, or has another run."""
        path = self.folder / "lock"
        Run.held = open(path, "ab")  # of the class: the run before lets go
        try:
            lock(Run.held, wait=False)
        except BlockingIOError:
            raise ValueError(f"{self.folder} is in use by {path.read_text('utf-8')}: wait until it "
                             "ends, or choose another --name") from None
        except OSError as error:
            say(f"{self.folder} is not locked ({error}): start no other job with this --name")
        path.write_text(f"process {os.getpid()} on {platform.node()} since {time.ctime()}", "utf-8")

    def rewind(self):
        """Take up the newest checkpoint, if there is one, and drop what was logged after it."""
        found = sorted(self.folder.glob("step_*[0-9]/optimizer.safetensors"))
        state = {"step": 0, "log_bytes": dict.fromkeys(LOGS, 0)}
        if found:
            state = read_json(found[-1].with_name("state.json"))
        elif list(self.folder.glob("step_*[0-9]")):
            raise ValueError(f"{self.folder} has checkpoints, but none that can be resumed")
        else:
            say(f"{self.folder} has no checkpoint yet: starting at the first step")
        self.step = state["step"]
        for name, size in state["log_bytes"].items():
            path = self.folder / name
            with open(path, "ab+") as log:
                found = log.tell()
                log.seek(max(size - 1, 0))
                if found and size and log.read(1) != b"\n":
                    raise ValueError(f"{path} was changed: no line ends at byte {size}, where step "
                                     f"{self.step} did; put it back, or move it away")
                log.truncate(min(size, found))
            if found != size:
                say(f"{path} has {found} bytes, {size} after step {self.step}: cut, or begun anew")

    def on_signal(self, number, frame):
        nothing_to_lose = not (self.unsaved or self.stopping)  # in an evaluation
        if self.stop_signal or nothing_to_lose:
            say("stopped, --resume goes on")
            raise SystemExit(128 + number)
        self.stop_signal = number
        say(f"{signal.Signals(number).name}: finishing this step, then saving (again to stop now)")

    def steps(self, title: str) -> Iterator[int]:
        """The steps that are left, with a bar; ends after the step in which a signal came."""
        left = range(self.step, self.args.steps)
        self.bar = tqdm(left, title, total=left.stop, initial=left.start)
        for step in self.bar:
            self.unsaved, self.seconds, self.lap_start = True, {}, time.perf_counter()
            yield step
            if self.stopping:
                break
        self.bar.close()

    def lap(self, name: str):
        """Log the seconds since the last lap, or since the step began, as seconds_NAME."""
        now = time.perf_counter()
        self.seconds[f"seconds_{name}"] = now - self.lap_start
        self.lap_start = now

    def must_be_finite(self, what: str, value: Tensor, batch: list[Answer]):
        """End the run before a NaN or infinity reaches the weights; keep the batch to look at."""
        if torch.isfinite(value):
            return
        rank, step = processes()[0], self.step + 1
        path = self.folder / f"bad_batch_step_{step:06d}_process_{rank}.json"
        write_atomically(path, json.dumps([plain(record(a, step)) for a in batch]))
        raise ValueError(f"the {what} of step {step} is not finite; this update was not made, the "
                         f"batch is in {path}: try a lower --lr")

    def log(self, name: str, row: dict):
        if self.is_main:
            self.logs[name].write(f"{json.dumps(plain(row), ensure_ascii=False)}\n".encode())
            self.logs[name].flush()

    def log_step(self, answers: list[Answer], means: Means, **own):
        """Log the metrics of both scripts, those of one (`own`), and the answers. A collective."""
        means.add(peak_memory=torch.tensor(peak_memory(self.args.device)))
        metrics = describe(answers, means, self.args) | own | self.seconds
        self.step += 1
        self.log("metrics.jsonl", {"step": self.step} | metrics)
        for answer in answers:
            self.log("completions.jsonl", record(answer, self.step))
        self.look_out(answers, metrics["unfinished"])
        self.bar.set_postfix_str("reward {reward:.3f}, accuracy {accuracy:.2f}, length "
                                 "{length_mean:.0f}".format_map(metrics))

    def look_out(self, answers: list[Answer], unfinished: float):
        """Say after five steps what would make the others useless."""
        self.early.append((unfinished, any(a.advantage.any() for a in answers)))
        if len(self.early) != 5:
            return
        unfinished, signals = map(sum, zip(*self.early))
        if unfinished > 0.9 * 5:
            say("more than 90 % of the answers of five steps are unfinished: is --max-new-tokens "
                "too low, or the stop token another one? completions.jsonl has them")
        if not signals:
            say("no group had any signal in five steps: is --data too easy, too hard, or not what "
                "the verifier reads? completions.jsonl has answers, references and verdicts")

    def evaluation_due(self) -> bool:
        """Whether --eval-every asks for an evaluation now: before step 1, or just after a save."""
        every, last = self.args.eval_every, self.step == self.args.steps
        return every > 0 and not self.stopping and (last or self.step % every == 0)

    def checkpoint_due(self) -> bool:
        """Whether to save now. A collective: a signal that one process got by now stops all."""
        number = torch.tensor(self.stop_signal)
        if processes()[1] > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        self.stopping = number.item()
        ends = self.stopping or self.step == self.args.steps
        return bool(ends) or self.evaluation_due() or self.step % self.args.save_every == 0

    def finish(self, script: str) -> dict[str, dict]:
        """Say where everything is, and return the first and the last evaluation, by name.
        After a signal: say how to go on, and exit with the status that shells expect."""
        saved = f"step_{self.step:06d}"
        if self.stopping:
            say(f"stopped and saved {saved}; go on with: python {script} --name {self.args.name} "
                "--resume")
            sys.exit(128 + self.stopping)
        if not self.is_main:
            return {}
        print(f"{self.folder}: {saved}, metrics.jsonl, completions.jsonl")
        lines = (self.folder / "evals.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines[:1] + lines[-1:]]
        return {f"step {row['step']}" if row["step"] else "base": row for row in rows}

    def save(self, tokenizer, policy, optimizer, critic=None, critic_optimizer=None):
        """Write step_XXXXXX/: a model folder, and what --resume needs; only the newest keeps that.
        A collective."""
        place = self.folder / f"step_{self.step:06d}"
        scratch = place.with_suffix(".tmp")
        if self.is_main:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            tokenizer.copy_to(scratch)
        reshard(policy)
        policy.save_pretrained(scratch if self.is_main else None, all_gather)
        save_tensors(adam_state(policy, optimizer), scratch / "optimizer.safetensors")
        if critic:
            reshard(critic)
            save_tensors(dict(critic.named_parameters()), scratch / "critic.safetensors")
            save_tensors(adam_state(critic, critic_optimizer),
                         scratch / "critic_optimizer.safetensors")
        if not self.is_main:
            return
        sizes = {name: (self.folder / name).stat().st_size for name in LOGS}
        write_atomically(scratch / "state.json",
                         json.dumps({"step": self.step, "log_bytes": sizes}))
        if hasattr(os, "sync"):  # the checkpoint and the logs are on the disk before it has a name
            os.sync()
        shutil.rmtree(place, ignore_errors=True)  # one without optimizer state
        scratch.rename(place)
        for older in self.folder.glob("step_*/[!m]*.safetensors"):  # all but the model's
            if older.parent != place:
                older.unlink()
        self.unsaved = False


def say(note: str):
    tqdm.write(f"note: {note}", file=sys.stderr)  # a bar goes on below it


def plain(row: dict) -> dict:
    """A row as JSON can hold it: tensors as numbers, NaN and infinity as null."""
    row = {key: value.item() if isinstance(value, Tensor) else value for key, value in row.items()}
    infinite = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
    return row | dict.fromkeys(infinite)


def warn_if_large(args, parameters: int, models: int):
    """Say what a step of a large model on a CPU will take. models: 2 if a critic is trained too."""
    if args.device != "cpu" or parameters < 50e6:
        return
    tokens = args.prompts_per_step * args.samples * args.max_new_tokens
    # 2 FLOP a parameter and token for each forward: sampling, three scorings, an update worth three
    minutes = (14 + 8 * (models - 1)) * parameters * tokens / 200e9 / 60
    # float32: weights, gradients and two moments of each; the frozen start where a KL is asked for
    memory = parameters * 4 * (4 * models + (args.kl_coef > 0)) / 1e9
    say(f"{parameters / 1e9:.2f}B parameters on a CPU: about {memory:.0f} GB of memory besides "
        f"activations; at 200 GFLOP/s a step of {tokens:,} tokens takes {minutes:,.0f} minutes")


# ---- checkpoints: whole tensors under their names, for any number of processes ----


def save_tensors(tensors: dict[str, Tensor], path: Path):
    """Write {name: tensor}; rank 0 gathers them. (torch.distributed.checkpoint writes a pickle.)"""
    whole, rank = {}, processes()[0]
    for name, tensor in tensors.items():
        tensor = all_gather(tensor)
        if rank == 0:
            whole[name] = tensor.cpu().contiguous()
    if rank == 0:
        save_file(whole, path)


def adam_state(model, optimizer) -> dict[str, Tensor]:
    """AdamW's state by name, e.g. norm.exp_avg; empty before the first step."""
    tensors = {}
    for name, p in model.named_parameters():
        for key, value in optimizer.state[p].items():
            tensors[f"{name}.{key}"] = value
    return tensors


@torch.no_grad()
def load_parameters(path: Path, model):
    for name, p in model.named_parameters():
        load_into(path, name, p)


@torch.no_grad()
def load_optimizer(path: Path, model, optimizer):
    """Put what `adam_state` named back, bit for bit."""
    for name in open_tensors(path).keys():
        parameter, key = name.rsplit(".", 1)
        p = model.get_parameter(parameter)
        like = torch.zeros((), device=p.device) if key == "step" else p
        state = optimizer.state[p][key] = torch.zeros_like(like)
        load_into(path, name, state)


def load_into(path: Path, name: str, place: Tensor):
    """Copy a tensor of a safetensors file into `place`; of a sharded one this process's rows."""
    ours, first = own_rows(place)
    with open_tensors(path) as file:
        if ours.dim() == 0:
            ours.copy_(file.get_tensor(name))
        else:
            ours.copy_(file.get_slice(name)[first:first + len(ours)])
