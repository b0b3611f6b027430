"""bench/: what the studies compute from runs and texts. Training is in test_train_grpo.py."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, slow

from bench import gpu, memory, paper, pareto, ranking, seeds
from bench.ranking import read_gsm8k, variants
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig

EGGS = (
    "A cook has 3 boxes of 4 eggs and breaks 2. How many are whole?",
    "There are 3*4=<<3*4=12>>12 eggs.\nOf 12, 12-2=<<12-2=10>>10 are whole.\n#### 10",
)
RIDE = (
    "A ride costs $1,250. Two friends share. What does each pay?",
    "One pays $1250/2=$<<1250/2=625>>625.\nSo each pays $625.\n#### 625",
)
GSM8K = [EGGS, RIDE, ("What is 1+1?", "1+1=2\n#### 2")]  # made up, in GSM8K's published form


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in GSM8K))
    return str(path)


def test_ranking_has_a_table_for_each_prompt(data, capsys):
    ranking.main(["--model", "tiny", "--data", data, "--limit", "2"])
    out = capsys.readouterr().out
    tables = dict(re.findall(r"^Prompt: (.*)\n\n.*\n.*\n\| concise \| (\S+)", out, re.M))
    assert list(tables) == list(ranking.PROMPTS) and len({*tables.values()}) == 3


def test_variants_by_hand(data):
    problems = read_gsm8k(data, 2)
    texts = variants(*problems[0], "other", random.Random(1))
    steps, end = ["There are 3*4=12 eggs.", "Of 12, 12-2=10 are whole."], "The final answer is"
    assert texts["concise"] == "\n".join([*steps, f"{end} \\boxed{{10}}."])
    assert texts["answer only"] == f"{end} \\boxed{{10}}."
    assert texts["off-topic"] == "other"
    restated = texts["restated only"]
    assert restated.startswith("Let me first restate the problem. A cook has")
    assert restated.endswith(texts["concise"])
    for name in ("re-checked only", "restated and re-checked"):
        assert [texts[name].count(step) for step in steps] == [2, 2]
    a, b = (int(texts["wrong"].split("=")[i].split()[0]) for i in (1, 2))
    assert a != 12 and b != 10  # both results, and every later use of them
    wrong = [f"There are 3*4={a} eggs.", f"Of {a}, {a}-2={b} are whole."]
    assert texts["wrong"] == "\n".join([*wrong, f"{end} \\boxed{{{b}}}."])
    money = variants(*problems[1], "", random.Random(2))["wrong"]
    assert "625" not in money and "$1250/2" in money


def test_gsm8k_files_that_are_not(data, tmp_path):
    with pytest.raises(ValueError, match="holds 2 problems of two steps or more, asked for 3"):
        read_gsm8k(data, 3)
    (tmp_path / "bad.jsonl").write_text('{"question": "x", "answer": 3}\n')
    with pytest.raises(ValueError, match="line 1 is not GSM8K's published form"):
        read_gsm8k(str(tmp_path / "bad.jsonl"), 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose activations are most of its memory."""
    config = {"model_type": "qwen3", "vocab_size": 600, "hidden_size": 128, "head_dim": 32,
              "intermediate_size": 384, "num_hidden_layers": 14, "num_attention_heads": 4,
              "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 512}
    place = tmp_path_factory.mktemp("model")
    Tokenizer.from_pretrained(ROOT / "data/tiny").copy_to(place)
    GPT(GPTConfig.from_hf(config)).save_pretrained(place)
    return str(place)


@slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_by_role_is_the_formulas(dtype, folder):
    """The most that live tensors hold in an update on a CPU, plain and with the flags."""
    work = {}
    for mode in memory.MODES[:2 + (dtype == "bfloat16")]:
        argv = ["--measure", "--model", folder, "--device", "cpu", "--dtype", dtype, *mode.split()]
        measured, formula = memory.main([*argv, "--micro-tokens", "512"])
        for role, size in measured.items():
            assert size == pytest.approx(formula[role], rel=0.05), role
        work[mode] = 2 * measured["peak"] - sum(measured.values())
    assert work["--recompute"] < work[""] / 5


def test_what_fits_where():
    """Bytes of the issue's targets; the table says the same."""
    fits = {("1.5b", 24): 1, ("4b", 48): 1, ("8b", 80): 1, ("1.5b", 80): 3, ("8b", 48): 0}
    for (name, card), modes in fits.items():
        found = memory.modes_that_fit(card * 1e9, 1e12, memory.config_of(name), micro_tokens=5120)
        assert found == list(memory.MODES[3 - modes:])
    assert not memory.modes_that_fit(24e9, 20e9, memory.config_of("1.5b"))  # the host is too small
    row, = (x for x in memory.by_card(["4b"], micro_tokens=5120).splitlines() if "offload" in x)
    assert row.endswith("| - | - | yes | yes |")


def test_what_fits_is_said_before_the_first_step(monkeypatch):
    args = SimpleNamespace(device="cuda:0", dtype="bfloat16", micro_tokens=4096, kl_coef=0.001,
                           max_prompt_tokens=1024, max_new_tokens=4096, score_with="policy",
                           recompute=None, offload=None)
    monkeypatch.setattr(memory, "available_memory", lambda: 64e9)
    for free, words in ((80e9, "48.9 GB of GPU memory by the formula of bench.memory, 80.0 GB are"),
                        (40e9, "free: --recompute or --recompute --offload makes it fit"),
                        (20e9, "free: --recompute --offload makes it fit"),
                        (8e9, "free: none of --recompute and --offload makes it fit")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80e9))
        assert words in memory.what_fits(args, memory.config_of("1.5b"), ppo=False)
    args.recompute = args.offload = True
    assert "step needs 14.2 GB" in memory.what_fits(args, memory.config_of("1.5b"), ppo=False)


def test_gpu_writes_what_there_is(monkeypatch, tmp_path):
    """A part that fails and one that takes too long leave the others; their reason is in the file.
    Here all but the first part are the command's own, on a CPU, without being run."""
    seen = []

    def fake(command, timeout, **kwargs):
        seen.append(command[2:])
        assert 0 < timeout <= gpu.LIMIT
        if "bench.rollout" in command:
            raise subprocess.TimeoutExpired(command, timeout)
        failed = "--offload" in command
        return SimpleNamespace(returncode=2 * failed, stdout="a table", stderr="error: why")
    monkeypatch.setattr(gpu.subprocess, "run", fake)
    gpu.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "gpu.md")])
    text = (tmp_path / "gpu.md").read_text()
    assert text.count("a table") == 5 and text.count("ended with status 2: error: why") == 1
    assert text.count("not done after") == 1 and text.count("\n## ") == len(seen) == 6
    measured = [command for command in seen if "--measure" in command]
    assert [" ".join(command[9:]) for command in measured] == [
        f"256 {mode}".strip() for mode in memory.MODES]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is no GPU here"):
            gpu.main([])


def test_pareto_front_by_hand():
    points = {"a": (20, 90), "b": (30, 95), "c": (25, 80)}
    points |= {"d": (100, 95), "e": (20, 85), "f": (200, 99)}
    assert pareto.pareto_front(points) == [(20, 90), (30, 95), (200, 99)]
    assert pareto.pareto_front({"base": (5, 1)}) == [(5, 1)]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    for module in (paper, pareto, seeds):
        monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(folder, accuracy, length, steps=100, asked=None, logged=2, kl=0.1):
    """A run of which `asked` steps are wanted, `steps` evaluated and `logged` logged."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"settings": {"steps": asked or steps}}))
    before = {"step": 0, "problems": 10, "accuracy": 0.5, "length": 100.0}
    after = {"step": steps, "problems": 10, "accuracy": accuracy, "length": length}
    write_lines(folder / "evals.jsonl", [before, after])
    row = {"accuracy": accuracy, "length_mean": length, "r_sa_mean": 0.1, "entropy": 1.0}
    row |= {"kl": kl, "mismatch_mean": 1e-6}
    write_lines(folder / "metrics.jsonl", [{"step": i + 1, **row} for i in range(logged)])


def write_study(runs: Path) -> None:
    """Two finished seeds of GRPO and SAR 0.2, and runs that are not finished."""
    for seed, (accuracy, length) in enumerate([(0.8, 90), (0.9, 110)]):
        write_run(runs / f"pareto-grpo-s{seed}", accuracy, length)
        write_run(runs / f"pareto-sar-0.2-s{seed}", accuracy, length / 5)
    write_run(runs / "pareto-grpo+em-s0", 0.7, 50)
    evals = runs / "pareto-grpo+em-s0" / "evals.jsonl"
    evals.write_text(evals.read_text().splitlines()[0] + "\n")  # only begun
    write_run(runs / "pareto-o1-s0", 0.7, 50, steps=50, asked=100)  # half way
    write_run(runs / "pareto-sar-0.2-s2", 0.1, 500, steps=50, asked=100, logged=1)


def test_the_study_counts_finished_runs_only(runs):
    names = pareto.run_names(3, False)
    with pytest.raises(ValueError, match="none of the runs is finished"):
        seeds.collect(names)
    write_study(runs)
    base, ends = seeds.collect(names)
    assert {name: len(last) for name, last in ends.items()} == {"GRPO": 2, "SAR 0.2": 2}
    rows = seeds.table(base, ends).splitlines()
    assert rows[2] == "| base | 50.0 | 100.0 | | | |"
    # AES 5/5 of the two seeds of GRPO: 5 * 0.3 / 0.5 + 0.1 and 5 * 0.4 / 0.5 - 0.1; 3/5 with 3
    assert rows[3] == "| GRPO | 85.0 ± 5.0 | 100.0 ± 10.0 | 3.50 ± 0.40 | 2.10 ± 0.20 | 2 |"
    assert rows[4] == "| SAR 0.2 | 85.0 ± 5.0 | 20.0 ± 2.0 | 4.30 ± 0.48 | 2.90 ± 0.28 | 2 |"
    write_run(runs / "pareto-er-s0", 0.7, 50, steps=7)
    with pytest.raises(ValueError, match=r"end at different steps: \[7, 100\]"):
        seeds.collect(names)


def test_the_study_draws(runs, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    write_study(runs)
    names = pareto.run_names(3, False)
    pareto.draw_pareto(*seeds.collect(names), tmp_path / "a.svg")
    drawn = set()
    for line in plt.gcf().axes[0].lines:
        if len(line.get_xdata()) == 1:  # a point
            drawn.add((round(line.get_xdata()[0], 6), round(line.get_ydata()[0], 6)))
    assert drawn >= {(100, 50), (100, 85), (20, 85)}  # base, GRPO, SAR
    assert "<svg" in (tmp_path / "a.svg").read_text()
    log = pareto.mean_log(names["SAR 0.2"])  # the unfinished one is left out
    assert [row["step"] for row in log] == [1, 2]
    assert [row["length_mean"] for row in log] == [20, 20]
    write_run(runs / "pareto-em-s0", 0.3, 7, kl=None)
    assert [row["kl"] for row in pareto.mean_log(names["EM"])] == [None, None]


def test_finished_runs_are_kept_unfinished_resumed_and_failures_end_the_study(runs, monkeypatch):
    commands = []

    def fake(command, **kwargs):
        assert command[1:3] == ["train_sa_grpo.py", "--name"]
        commands.append(command[3:])
        return SimpleNamespace(returncode=3 if command[3] == "bad" else 0)

    monkeypatch.setattr(seeds.subprocess, "run", fake)
    for name, done in (("finished", True), ("killed", False)):
        (runs / name).mkdir(parents=True)
        (runs / name / "config.json").write_text('{"settings": {"steps": 4}}')
        (runs / name / "step_000004").mkdir()
        if done:
            (runs / name / "step_000004" / "state.json").write_text("{}")
    seeds.run_all([("grpo", name, ["--seed", "1"]) for name in ("finished", "killed", "new")], 1)
    assert commands == [["killed", "--resume"], ["new", "--seed", "1"]]
    commands.clear()
    with pytest.raises(ValueError, match="run bad ended with status 3: see .*bad.log"):
        seeds.run_all([("grpo", name, []) for name in ("bad", "a", "b", "c")], 1)
    assert commands == [["bad"]]


def test_the_papers_commands_parse(runs, monkeypatch, capsys):
    monkeypatch.setattr(paper, "PROMPT", [])  # --system and --instruction
    paper.main(["--dry-run"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 * (1 + 2 * 9)  # models; the base's evaluation, and two of each row
    gemma = [line for line in printed if "--model gemma3-1b --reward" in line]
    assert [line.split()[5] for line in gemma if "--alpha 0.15" in line] == ["o1", "er"]


def test_what_would_not_run_is_said_in_a_sentence(runs, monkeypatch, capsys):
    monkeypatch.setattr(paper, "PROMPT", ["--nosuch", "text", "--other", "x"])
    monkeypatch.setattr(paper, "LOGIC", ["prose"])
    one = ["--model", "qwen3-4b", "--rows", "SA-GRPO"]
    with pytest.raises(ValueError, match="train_sa_grpo.py has no --nosuch; train_sa_grpo.py has no"
                       " --other; evaluate.py has no --nosuch; .*there is no data prose$"):
        paper.main([*one, "--dry-run"])
    with pytest.raises(ValueError, match="train_sa_grpo.py: argument --steps: must be positive"):
        paper.main([*one, "--dry-run", "--steps", "0"])
    with pytest.raises(ValueError, match="choose from base, GRPO, SA-GRPO"):
        paper.main(["--rows", "TRPO"])
    with pytest.raises(ValueError, match="which --model"):
        paper.main([])


def test_the_papers_runs_go_on_and_are_tabulated(runs, monkeypatch, capsys):
    commands = []

    def fake(command, **kwargs):
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(paper.subprocess, "run", fake)
    name = "paper-qwen3-1.7b-SA-GRPO"
    rows = ["--model", "qwen3-1.7b", "--rows", "base,SA-GRPO", "--launch", "torchrun x", "--steps"]
    paper.main([*rows, "7"])
    assert [command[:2] for command in commands] == [
        [sys.executable, "evaluate.py"], ["torchrun", "x"], [sys.executable, "evaluate.py"]]
    assert commands[1][-2:] == ["--steps", "7"]
    (runs / name / "step_000007").mkdir(parents=True)
    (runs / name / "config.json").write_text('{"settings": {"steps": 7}}')
    paper.main([*rows, "7"])
    assert commands[4] == ["torchrun", "x", "train_sa_grpo.py", "--name", name, "--resume"]
    assert str(runs / name / "step_000007") in commands[5]
    (runs / name / "step_000007" / "state.json").write_text("{}")
    (runs / f"{name}-eval").mkdir()
    figures = {data: [{"last_number": 0.1 * i, "length": 100 * i}] for i, data in
               enumerate(paper.MATH)}
    (runs / f"{name}-eval" / "results.json").write_text(json.dumps(figures))
    capsys.readouterr()
    paper.main([*rows, "7"])
    assert len(commands) == 8  # two evaluations more
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| base |  |  |  |  |", "| SA-GRPO | 20.00 | 54.13 | 200 | 602 |"]
