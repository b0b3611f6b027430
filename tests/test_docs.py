"""The documentation: what it quotes, counts and promises holds for the code."""

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import textwrap
import types
from xml.etree import ElementTree

import pytest
from helpers import lines

import train_sa_grpo
from bench.size import ROOT
from runtime import runs, settings
from verify import extract_answer, is_equivalent
from view import answers

FLAG = r"(?<![\w-])--[a-z][\w-]*"
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "bench" / "RESULTS.md"
USAGE = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
VARIANTS = re.findall(
    r"^\*\*([^*]+)\.\*\*(?:(?!```).)*```diff\n(.*?)```",
    USAGE.partition("## Where to change what")[2], re.S | re.M)
SMALL = ("--steps 1 --prompts-per-step 4 --samples 4 --minibatch 2 --epochs 3 --max-new-tokens 40 "
         "--eval-every 0 --save-every 1 --reward vr --lr 0.003 --kl-coef 0.1").split()


def train(source: str, name: str, *flags: str) -> dict:
    """Run a script's source with few and short answers; returns what it logs of its step."""
    script = types.ModuleType(name)
    exec(compile(source, name, "exec"), script.__dict__)
    script.main([*SMALL, *flags, "--name", name])
    (line,) = (runs.RUNS / name / "metrics.jsonl").read_text().splitlines()
    return json.loads(line)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The metrics of a step of the script as it is; its run and the variants' in one folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "RUNS", tmp_path_factory.mktemp("runs"))
        yield train((ROOT / "train_sa_grpo.py").read_text(encoding="utf-8"), "plain")



def test_every_variant_of_the_table_is_there():
    table = USAGE.partition("| variant | where |")[2].partition("\n\n")[0]
    assert len(VARIANTS) == len(table.splitlines()) - 2 == 9


@pytest.mark.parametrize("name, diff", VARIANTS, ids=[name for name, _ in VARIANTS])
def test_a_variant_trains(name, diff, plain):
    source = (ROOT / "train_sa_grpo.py").read_text(encoding="utf-8")
    old = "".join(line[1:] for line in diff.splitlines(True) if line[0] == "-")
    new = "".join(line[1:] for line in diff.splitlines(True) if line[0] == "+")
    assert source.count(old) == 1
    metrics = train(source.replace(old, new), name)
    if not name.startswith("Truncated"):  # in float32 its weights are 1 up to rounding
        effect = [metrics[key] != plain[key] for key in ("loss", "entropy", "grad_norm")]
        assert any(effect), "the change has no effect"


# ---- the task of one's own ----


def test_countdown_trains(tmp_path, monkeypatch):
    """The file in docs/usage.md: what it pays, its problems, and two steps with it."""
    source = USAGE.partition("```python\n")[2].partition("```")[0]
    assert len(source.splitlines()) <= 30
    task, data = tmp_path / "countdown.py", tmp_path / "countdown.jsonl"
    task.write_text(source, encoding="utf-8")
    made = subprocess.run([sys.executable, task], capture_output=True, check=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    data.write_text(made.stdout)
    assert len(made.stdout.splitlines()) == 1000
    judge_own = settings.judge_of(str(task))
    for answer, reward in (("\\boxed{3*7-1}", 1), ("\\boxed{7*3 - 1 = 20}", 1), ("\\boxed{20}", 0),
                           ("\\boxed{3*7-1-0}", 0), ("\\boxed{(3*7)-1}", 1), ("3*7-1", 1),
                           ("\\boxed{3**7-1}", 0), ("\\boxed{1/0}", 0), ("none", 0)):
        assert judge_own(answer, "[[3, 7, 1], 20]").reward == reward, answer
    monkeypatch.setattr(runs, "RUNS", tmp_path / "runs")
    train_sa_grpo.main([
        "--name", "countdown", "--data", str(data), "--verifier", str(task), "--steps", "2",
        "--prompts-per-step", "4", "--samples", "2", "--max-new-tokens", "16", "--eval-every", "0"])
    rows = lines(tmp_path / "runs" / "countdown" / "metrics.jsonl")
    assert len(rows) == 2 and rows[-1]["share_error"] == 0


# ---- what is named exists ----


def text(path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [*DOCS, RESULTS], ids=lambda path: path.name)
def test_files_modules_and_functions_that_are_named_exist(path):
    source = text(path)
    prose = [line for line in source.splitlines() if path != RESULTS or not line.startswith("|")]
    assert max(map(len, prose)) <= 100
    named = re.findall(r"(?<![\w/])((?:docs|bench|data|tests|runtime|view)/[\w/.]*\w)", source)
    named += re.findall(r"`([\w/]+\.(?:py|md|txt|toml|cff))`", source)
    for name in named:
        if name in ("data/raw", "table.md"):  # of SA_SHARED, and of a run
            continue
        places = [ROOT / name, ROOT / "runtime" / name, path.parent / name]
        assert any(place.exists() for place in places), name
    for target in re.findall(r"\]\(([^)h][^)]*)\)", source):
        assert (path.parent / target).exists(), target
    for module in re.findall(r"-m ((?:bench|data|view)\.\w+)", source):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    for script in re.findall(r"(?:python|torchrun.*?) (\w+\.py)", source):
        assert (ROOT / script).exists() or script == "countdown.py", script
    for module, function in re.findall(r"`((?:train_sa_)?[a-z]+)\.(\w+)(?:\(|`)", source):
        if (ROOT / f"{module}.py").exists() and function not in ("py", "safetensors"):
            assert hasattr(importlib.import_module(module), function), f"{module}.{function}"


def flags_of(module: str, monkeypatch) -> set[str]:
    """The flags in a program's --help."""
    program, printed = importlib.import_module(module), io.StringIO()
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        program.main()
    return {*re.findall(FLAG, printed.getvalue())}


def test_the_flags_in_the_docs_are_those_of_the_programs(monkeypatch):
    training = flags_of("train_sa_grpo", monkeypatch) | flags_of("train_sa_ppo", monkeypatch)
    missing = {name for name in training if f"`{name}`" not in USAGE}
    assert missing == {"--nproc-per-node", "--standalone"}  # of torchrun
    known = set(training)
    for module in ("evaluate", "view.tokens", "view.answers", "view.curves", "bench.memory",
                   "bench.seeds", "bench.pareto", "bench.ranking", "bench.paper"):
        known |= flags_of(module, monkeypatch)
    torchrun = {"--standalone", "--nproc-per-node", "--nnodes", "--rdzv-backend",
                "--rdzv-endpoint", "--max-restarts", "--shutdown-timeout"}
    for path in DOCS:
        unknown = {*re.findall(FLAG, text(path))} - known - torchrun
        assert not unknown, f"{path.name} names {unknown}"


def test_usage_says_what_every_metric_and_variable_means(plain):
    ppo = train(text(ROOT / "train_sa_ppo.py"), "ppo", "--samples", "1")
    assert not {name for name in plain | ppo if f"`{name}`" not in USAGE}
    for run in ("plain", "ppo"):
        assert {path.name for path in (runs.RUNS / run).iterdir()} == {
            "config.json", "metrics.jsonl", "completions.jsonl", "evals.jsonl", "lock",
            "step_000001"}
    sources = [text(path) for folder in (".", "runtime", "data")
               for path in (ROOT / folder).glob("*.py")]
    variables = re.findall(r"environ(?:\.get\(|\[)\"((?:SA|HF)_\w+)\"", "\n".join(sources))
    assert {"SA_RUNS", "SA_DATA", "SA_CACHE", "HF_TOKEN"} <= {*variables}
    assert not {name for name in variables if f"`{name}`" not in USAGE}


def test_readme_is_short_and_its_line_counts_are_true():
    readme = text(ROOT / "README.md")
    assert len(readme.splitlines()) <= 110
    counts = re.findall(r"`(\w+\.py)` \((\d[\d,]*) lines\)", readme)
    assert len(counts) == 4
    for name, count in counts:
        lines = len(text(ROOT / name).splitlines())
        assert abs(int(count.replace(",", "")) - lines) <= 0.1 * lines, f"{name}: {lines} lines"


# ---- what is claimed holds ----


def test_sar_by_hand_prints_what_it_says(capsys):
    page = text(ROOT / "docs" / "sar_by_hand.md")
    code, output = re.findall(r"```(?:python)?\n(.*?)```", page, re.S)
    exec(code, {})
    assert capsys.readouterr().out == output


def test_the_answer_before_training_is_real(capsys):
    answers.main(["tiny"])
    assert textwrap.indent(capsys.readouterr().out, "    ") in text(ROOT / "README.md")


ROWS = [[cell.strip() for cell in line.strip("| \n").split(" | ")]
        for line in text(ROOT / "docs" / "verifier.md").splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_an_example_of_the_verifier(row):
    first, second = (cell.strip("`").replace(r"\n#", "\n#") for cell in row[:2])
    expected = row[2]
    if expected in ("yes", "no"):
        assert is_equivalent(first, second) == (expected == "yes")
    elif re.fullmatch(r"R\db?", expected):
        assert extract_answer(first) == (None if second == "none" else second)


def test_the_picture_is_well_formed():
    root = ElementTree.parse(ROOT / "docs" / "dataflow.svg").getroot()
    words = " ".join(root.itertext())
    for name in ("rollout.generate", "verify.judge", "sar.answer_logprobs"):
        module, function = name.split(".")
        assert name in words and hasattr(importlib.import_module(module), function)
