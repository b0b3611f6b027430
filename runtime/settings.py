"""The command line: flags, defaults and checks.

A flag is declared once, with its unit and source. Its default stands in the PAPER and TINY
dictionaries of the script: TINY for the embedded model, PAPER for every other model.
"""
import argparse
import functools
import math
import os
import re
import runpy
import traceback
from pathlib import Path

import torch

from data.files import read_json
from data.hub import MODELS, find_model
from data.prompts import SYSTEM
from data.tokenizer import Tokenizer
from kernels import fast_bfloat16
from model import GPTConfig
from runtime import parallel, runs
from sar import GROUP_REWARDS, REWARDS
from verify import STATUSES, VERIFIERS, Verdict, judge

OLD_FLAGS = {"--n": "is now called --samples", "--run": "is now called --name",
             "--alone": "is gone: ppl(a) is taken after the prompt's frame without the question"}
FREE_ON_RESUME = {"steps", "save_every", "slots", "resume", "name", "device", "micro_tokens",
                  "recompute", "offload"}


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are ValueErrors; `flag` shows the defaults of PAPER and TINY."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        flag = re.split("[ =]", message.removeprefix("unrecognized arguments: "))[0]
        raise ValueError(f"{flag} {OLD_FLAGS[flag]}" if flag in OLD_FLAGS else message)

    def flag(self, name: str, kind, text: str, **options):
        """Declare a flag whose default the script's dictionaries hold."""
        key = name[2:].replace("-", "_")
        default = self.paper[key]
        if self.tiny[key] != default:
            default = f"{default}; tiny: {self.tiny[key]}"
        self.add_argument(name, type=kind, help=f"{text} (default: {default})", **options)


# ---- argparse types ----


def checked(kind, holds, what: str):
    """`kind` of the text, refused where `holds` does not hold."""
    def convert(text: str):
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"must be {what}, got {text}")
        return value
    convert.__name__ = kind.__name__  # argparse names it where the text is no number
    return convert


positive_int = checked(int, lambda x: x > 0, "positive")
natural = checked(int, lambda x: x >= 0, "0 or more")
positive_float = checked(float, lambda x: 0 < x < math.inf, "positive")
not_negative = checked(float, lambda x: 0 <= x < math.inf, "0 or a positive number")
finite = checked(float, math.isfinite, "a number")
share = checked(float, lambda x: 0 <= x <= 1, "between 0 and 1")


def absolute(name: str, is_there) -> str:
    """What is there as an absolute path, true in another working directory too; else the name."""
    path = Path(os.path.expanduser(name))  # ~nobody stays as it is
    return str(path.resolve()) if is_there(path) else name


def model_name(text: str) -> str:
    """A folder or a name."""
    return text if text == "tiny" else absolute(text, Path.is_dir)


def data_names(text: str) -> str:
    """Names and files, separated by commas."""
    return ",".join(absolute(name, Path.is_file) for name in text.split(","))


def verifier_name(text: str) -> str:
    """One of VERIFIERS, or a Python file."""
    if text in VERIFIERS:
        return text
    path = absolute(text, Path.is_file)
    if not path.endswith(".py") or not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f"must be {' or '.join(VERIFIERS)} or a file my_task.py")
    return path


def judge_of(verifier: str):
    """The function (response, reference) -> Verdict: verify.py's rules, or a file's own judge. That
    may return a number, the reward. Its exceptions have the status "error"; the first is shown.
    Raises ValueError if the file has no judge."""
    if verifier in VERIFIERS:
        return functools.partial(judge, verifier=verifier)
    try:
        own = runpy.run_path(verifier)["judge"]
    except Exception as error:  # whatever that file does
        raise ValueError(f"--verifier {verifier} gives no judge(response, reference): "
                         f"{type(error).__name__}: {error}") from None
    failures = []

    def judged(response: str, reference: str) -> Verdict:
        try:
            verdict = own(response, reference)
            if not isinstance(verdict, Verdict):
                verdict = Verdict(float(verdict), None, "correct" if verdict > 0 else "wrong")
            if not math.isfinite(verdict.reward) or verdict.status not in STATUSES:
                raise ValueError(f"it returned {verdict}")
            return verdict
        except Exception:  # must not look like a wrong answer
            if not failures:
                runs.say(f"{verifier} failed, and answers like this one count as errors: "
                         f"{response!r:.300}\n{traceback.format_exc()}")
            failures.append(response)
            return Verdict(0.0, None, "error")

    return judged


def prompt_flags(parser: argparse.ArgumentParser):
    """What is in a prompt beside the question."""
    add = parser.add_argument
    add("--system", help="system message, also of ppl(a); '': the model's own (default: "
        f"{SYSTEM} For tiny none)")
    add("--instruction", help="text behind the question, which ppl(a) is without (default: none)")
    add("--thinking", action="store_true", default=None, help="let a model like Qwen3 think first")


def open_model(name: str, args: argparse.Namespace) -> tuple[Path, Tokenizer]:
    """A model's folder, whose config.json is checked, and its tokenizer with the prompt's flags."""
    folder = find_model(name)
    GPTConfig.from_hf(read_json(folder / "config.json"))
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.system, tokenizer.instruction = args.system, args.instruction
    tokenizer.thinking = bool(args.thinking)
    return folder, tokenizer


# ---- the training scripts ----


def training_parser(description: str, paper: dict, tiny: dict) -> Parser:
    """The flags that both training scripts have, in the same words."""
    parser = Parser(description)
    parser.epilog = "On 8 GPUs: torchrun --standalone --nproc-per-node 8 SCRIPT (docs/cluster.md)"
    parser.paper, parser.tiny = paper, tiny
    add, flag = parser.add_argument, parser.flag
    add("--model", type=model_name, help="a folder, a name (tiny, "
        f"{', '.join(list(MODELS)[1:])}), or owner/name on the hub (default: tiny)")
    flag("--data", data_names, "problems: names and JSONL files, separated by commas")
    add("--question-field", help="of the files (default: question or problem); info.text is nested")
    add("--answer-field", help="of the files: text, a number, a worked solution (default: answer)")
    prompt_flags(parser)
    flag("--max-prompt-tokens", positive_int, "longer prompts are skipped and counted; tokens")
    flag("--max-new-tokens", positive_int, "longest answer, stop token included; tokens")
    flag("--reward", str, "the formulas are in docs/usage.md; vr: plain R_VR", choices=REWARDS)
    add("--alpha", type=finite, help="weight of what is added to R_VR (default: sar.REWARDS)")
    add("--alpha-end", type=finite, help="the same at the last step (default: --alpha; cde: 0)")
    flag("--score-with", str, "whose perplexities are rewarded", choices=("policy", "frozen"))
    flag("--verifier", verifier_name, "strict; last-number, the paper's rule; or a my_task.py")
    flag("--steps", positive_int, "batches of sampled answers to train on")
    flag("--prompts-per-step", positive_int, "questions in such a batch")
    flag("--samples", positive_int, "answers sampled for each question")
    add("--minibatch", type=positive_int, help="questions in an optimizer step (default: half)")
    flag("--epochs", positive_int, "passes over a batch")
    flag("--lr", positive_float, "AdamW's learning rate, constant")
    flag("--kl-coef", not_negative, "weight of the KL to the frozen start")
    flag("--temperature", positive_float, "of sampling and of every log-prob")
    flag("--seed", int, "of the order of questions and of every sample")
    add("--name", help="the run's folder is runs/NAME (default: made of model, reward and time)")
    add("--resume", action="store_true", help="go on from the newest checkpoint of --name")
    flag("--save-every", positive_int, "steps between checkpoints; there is one at the end")
    flag("--eval-every", natural, "steps between greedy evaluations on held-out problems; 0: never")
    add("--micro-tokens", type=positive_int, help="tokens in one forward and backward, padding "
        "included; changes memory alone (default: 8192; large models on a CPU: 512)")
    switch = argparse.BooleanOptionalAction
    add("--recompute", action=switch, help="activations in the backward: less memory, slower")
    add("--offload", action=switch, help="float32 weights, AdamW and the start in host memory")
    add("--slots", type=positive_int, help="answers decoded at once (default: what memory holds)")
    add("--device", help="(default: a GPU if there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="of matmuls (bfloat16 from Ampere on)")
    return parser


def parse(parser: Parser, algorithm: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse, meet the other processes, fill in the defaults, check. Raises ValueError."""
    args = parser.parse_args(argv)
    parallel.join_processes()
    if args.resume:
        take_saved_settings(args, algorithm)
    args.model = args.model or "tiny"
    defaults = parser.tiny if args.model == "tiny" else parser.paper
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.alpha is None:
        args.alpha = REWARDS[args.reward]
    if args.reward == "cde" and args.alpha_end is None:
        args.alpha_end = 0.0  # curiosity decays
    args.device = choose_device(args.device)
    if not args.micro_tokens:
        args.micro_tokens = 512 if args.device == "cpu" and args.model != "tiny" else 8192
    args.dtype = args.dtype or ("bfloat16" if fast_bfloat16(args.device) else "float32")
    if args.offload and (args.dtype == "float32" or parallel.processes()[1] > 1):
        raise ValueError("--offload is for one process with --dtype bfloat16: use --no-offload")
    prompts = args.prompts_per_step
    args.minibatch = args.minibatch or (prompts if prompts % 2 else prompts // 2)
    if prompts % args.minibatch:
        raise ValueError(f"--prompts-per-step {prompts} is no multiple of --minibatch "
                         f"{args.minibatch}")
    if args.reward in GROUP_REWARDS and args.samples < 2:
        raise ValueError(f"--reward {args.reward} compares the answers to one question: it needs "
                         f"--samples 2 or more, got {args.samples}")
    if args.alpha < 0:
        runs.say(f"--alpha {args.alpha} is negative: it rewards what the question does not explain")
    return args


def take_saved_settings(args: argparse.Namespace, algorithm: str):
    """--resume: fill `args` from the run's config.json. Refuses a flag that changes the run."""
    if not args.name:
        raise ValueError(f"--resume needs --name NAME, a folder in {runs.RUNS}")
    path = runs.RUNS / args.name / "config.json"
    if not parallel.from_rank_0(path.exists):
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            raise ValueError(f"{path} is not there: no such run")
        runs.say(f"there is no run {args.name} yet: starting it (torchrun --max-restarts resumes)")
        args.resume = False
        return
    config = read_json(path)
    before, saved, free = config.get("algorithm"), config.get("settings"), set(FREE_ON_RESUME)
    if before != algorithm:
        raise ValueError(f"{args.name} is a run of train_sa_{before}.py: resume it with that")
    if not isinstance(saved, dict) or vars(args).keys() != saved.keys():
        raise ValueError(f"{path} has the flags of another version: resume the run with that")
    if saved["data"] == "tiny" or (saved["eval_every"] > 0) == ((args.eval_every or 0) > 0):
        free.add("eval_every")  # elsewhere it decides which problems are held out
    if saved["alpha_end"] is not None:
        free.remove("steps")  # the slope of alpha depends on them
    changed = []
    for key, was in saved.items():
        now = getattr(args, key)
        if now is None:
            setattr(args, key, was)
        elif now != was and key not in free:
            changed.append(f"--{key.replace('_', '-')} was {was}, now {now}")
    if changed:
        raise ValueError(f"--resume would change {args.name}: {'; '.join(changed)}; leave the flag "
                         "out, or start a run of another --name")


def choose_device(device: str | None) -> str:
    """The device asked for, else a GPU if there is one; under torchrun each process its own."""
    gpus = torch.cuda.device_count()
    here = ["cuda", *(f"cuda:{i}" for i in range(gpus)), "cpu"] if gpus else ["cpu"]
    device, (rank, world) = device or here[0], parallel.processes()
    if device not in here:
        raise ValueError(f"--device {device} is not here: there is {', '.join(here)}")
    if device != "cpu" and world > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', rank % gpus)}"
        torch.cuda.set_device(device)
    return device
