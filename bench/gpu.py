"""All that waits for a GPU, in one command: at most 8 minutes on a card of H100's class.

    python -m bench.gpu                                   # writes gpu.md and prints it
    python -m bench.gpu --quick --device cpu              # the same with small sizes, anywhere

The tests that need a GPU; log-probs and the sampler against the card's limits and other libraries;
two optimizer steps of qwen-1.5b's shape with random weights in each memory mode, measured against
the formula of bench.memory. Each part is a process of its own: its peak of memory is its own, and
one that fails leaves the others. A part that is not done when the time is up says so.
"""

import argparse
import importlib.util
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.memory import MODES, config_of
from data.hub import find_model
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig
from runtime.errors import user_errors

LIMIT = 480  # seconds for everything
QUICK = {"model_type": "llama", "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256,
         "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
         "rms_norm_eps": 1e-6, "max_position_embeddings": 512, "tie_word_embeddings": True}


def write_model(folder: Path, quick: bool, device: str) -> None:
    """A model folder with random weights, in bfloat16, that no tokenizer was trained for."""
    config = GPTConfig.from_hf(QUICK | {"head_dim": 32}) if quick else config_of("1.5b")
    with torch.device(device):
        model = GPT(config).bfloat16()
    model.save_pretrained(folder)
    Tokenizer.from_pretrained(find_model("tiny")).copy_to(folder)


def parts(folder: Path, quick: bool, device: str) -> dict[str, list[str]]:
    """{title: the command after `python -m`}."""
    on = ["--device", device]
    logprob = ["bench.logprob", *on, "--only", "ours;naive", "--repeats", "3"]
    sampler = ["bench.rollout", *on, "--model", str(folder), "--repeats", "1", "--cases"]
    sampler.append("2x2x16" if quick else "16x4x256,64x4x256")
    if quick:
        logprob += ["--quick", "--parts", "times"]
    if quick or not importlib.util.find_spec("transformers"):
        sampler.append("--no-transformers")
    tests = ["pytest", "-q", "-rs", "tests/test_gpu.py", "tests/test_rollout.py"]
    commands = {"Tests that need a GPU": [*tests, "-k", "gpu or cuda"]}
    memory = ["bench.memory", "--measure", "--model", str(folder), *on, "--dtype", "bfloat16",
              "--micro-tokens", "256" if quick else "5120"]
    for mode in MODES:
        commands[f"Memory {mode or 'without flags'}"] = [*memory, *mode.split()]
    return commands | {"Sampler": sampler, "Log-probs": logprob}


def outcome(command: list[str], seconds: float) -> str:
    """What the command prints within so many seconds; of one that fails, also its last words."""
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run([sys.executable, "-m", *command], cwd=root, capture_output=True,
                              text=True, timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    text = done.stdout.strip()
    if done.returncode:
        text += f"\nended with status {done.returncode}: {done.stderr.strip()[-2000:]}"
    return text


def main(argv: list[str] | None = None) -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    flag = parser.add_argument
    flag("--device", default="cuda", help="(default: cuda)")
    flag("--quick", action="store_true", help="small sizes")
    flag("--out", type=Path, default=Path("gpu.md"), help="file to write (default: gpu.md)")
    args = parser.parse_args(argv)
    name = platform.machine()
    if args.device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ValueError("there is no GPU here: --quick --device cpu tries the command itself")
        card = torch.cuda.get_device_properties(args.device)
        name = f"{card.name}, {card.total_memory / 1e9:.0f} GB"
    began = time.monotonic()
    lines = [f"# bench.gpu on {name}", f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}"]
    with tempfile.TemporaryDirectory() as scratch:
        write_model(Path(scratch), args.quick, args.device)
        torch.cuda.empty_cache()  # the parts want that memory
        for title, command in parts(Path(scratch), args.quick, args.device).items():
            started = time.monotonic()
            text = outcome(command, LIMIT - (started - began))
            print(f"{title}: {time.monotonic() - started:.0f} s", file=sys.stderr)
            shown = " ".join(command).replace(scratch, "FOLDER")
            lines += [f"## {title}", f"    python -m {shown}", text.replace(scratch, "FOLDER")]
            args.out.write_text("\n\n".join(lines) + "\n", encoding="utf-8")  # what is there so far
    print(args.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    with user_errors():
        main()
