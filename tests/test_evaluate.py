"""evaluate.py: the figures by hand, the tables, the command, a kill and what comes after it."""

import argparse
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import evaluate
import runtime
from data.make_tiny import tiny_problems
from data.problems import Problem

ROOT = Path(__file__).resolve().parent.parent
BASE = {"problems": 4, "accuracy": 0.5, "length": 100.0, "unfinished": 0.25, "unparsed": 0.0}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "RUNS", tmp_path)
    return tmp_path


def test_aes_by_hand():
    better = {"accuracy": 0.6, "length": 70.0}
    assert evaluate.aes(better, BASE) == pytest.approx(0.3 + 5 * 0.2)
    assert evaluate.aes({"accuracy": 0.4, "length": 120.0}, BASE) == pytest.approx(-0.2 - 5 * 0.2)
    assert evaluate.aes(BASE, BASE) == 0
    assert math.isnan(evaluate.aes(better, BASE | {"accuracy": 0.0}))


def test_wilson_by_hand(rng):
    assert evaluate.wilson(0.8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    assert evaluate.wilson(0.0, 20) == pytest.approx((0, 0.16113), abs=1e-5)
    assert evaluate.wilson(1.0, 20) == pytest.approx((1 - 0.16113, 1), abs=1e-5)
    for _ in range(
        50
    ):  # its ends are the shares from which what was seen lies 1.96 standard errors away
        trials = rng.randint(1, 2000)
        seen = rng.randint(0, trials) / trials
        for end in evaluate.wilson(seen, trials):
            # squared: at 0 and 1 the root would make 1e-8 of a rounding of 1e-16
            assert (seen - end) ** 2 == pytest.approx(
                1.959963985**2 * end * (1 - end) / trials, rel=1e-9, abs=2e-15
            )


def test_pass_at_k_by_hand_and_by_counting(rng):
    assert evaluate.pass_at_k(4, 1, 2) == pytest.approx(0.5)
    assert evaluate.pass_at_k(5, 2, 3) == pytest.approx(0.9)
    assert evaluate.pass_at_k(5, 0, 5) == 0 and evaluate.pass_at_k(5, 3, 3) == 1
    for _ in range(30):
        n = rng.randint(1, 8)
        k, answers = rng.randint(1, n), [rng.random() < 0.3 for _ in range(n)]
        subsets = list(itertools.combinations(answers, k))
        assert evaluate.pass_at_k(n, sum(answers), k) == pytest.approx(
            sum(map(any, subsets)) / len(subsets)
        )


def row(length: int, status: str, last_number_status: str, finished: bool = True) -> dict:
    return {
        "tokens": [0] * length,
        "status": status,
        "last_number_status": last_number_status,
        "finished": finished,
    }


def test_figures_by_hand():
    rows = [
        row(10, "correct", "correct"),
        row(20, "wrong", "correct"),
        row(40, "no_answer", "wrong", finished=False),
        row(30, "correct", "correct"),
        row(50, "unparsed", "wrong"),
        row(60, "correct", "wrong"),
    ]
    result = evaluate.summarise(rows)
    assert result == {
        "problems": 6,
        "accuracy": 0.5,
        "accuracy_low": pytest.approx(0.18762, abs=1e-5),
        "accuracy_high": pytest.approx(0.81238, abs=1e-5),
        "last_number": 0.5,
        "last_number_low": result["accuracy_low"],
        "last_number_high": result["accuracy_high"],
        "length": 35,
        "length_median": 35,
        "length_p95": pytest.approx(57.5),
        "length_correct": pytest.approx(100 / 3),
        "length_wrong": 20,
        "unfinished": pytest.approx(1 / 6),
        "unparsed": pytest.approx(2 / 6),
        "errors": 0,
    }
    result = evaluate.summarise(rows, verifier="last-number")
    assert (result["length_correct"], result["length_wrong"]) == (20, 50)
    assert (
        evaluate.summarise([*rows, row(30, "wrong", "error")] * 2, verifier="last-number")[
            "length_wrong"
        ]
        == 50
    )
    result = evaluate.summarise(rows, n=3)  # two problems, right once and twice in three
    assert (
        result["problems"] == 2
        and result["accuracy"] == 0.5
        and result["accuracy_low"] == evaluate.wilson(0.5, 2)[0]
    )
    assert (
        result["pass@2"] == pytest.approx((2 / 3 + 1) / 2)
        and result["pass@3"] == 1
        and "pass@4" not in result
    )
    nothing = evaluate.summarise([row(7, "error", "no_answer")])
    assert (
        nothing["errors"] == 1
        and nothing["unparsed"] == 1
        and math.isnan(nothing["length_correct"])
    )


def test_table():
    text = evaluate.comparison_table(
        {"base": BASE, "trained": BASE | {"accuracy": 0.6, "length": 70.0, "unfinished": 0.0}}
    )
    assert (
        "| base | 50.0% | 100.0 | 25.0% |  |" in text
        and "| trained | 60.0% | 70.0 | 0.0% | +1.30 |" in text
    )


def test_benchmark_table_by_hand():
    """Two models, two answers to each of two problems: which row is whose, and what AES compares with what."""

    def models(*answers):
        first, second = (
            evaluate.summarise(rows, n=2) | {"model": name, "skipped": 0}
            for name, rows in zip(("base", "runs/x/step_7"), answers)
        )
        return [first, second | {"aes": evaluate.aes(second, first)}]

    right, wrong, unread = (
        row(10, "correct", "correct"),
        row(30, "wrong", "wrong"),
        row(40, "no_answer", "correct", finished=False),
    )
    results = {
        "one": models([right, wrong, wrong, unread], [right, right, wrong, right]),
        "two": models([wrong] * 4, [right] * 4),
    }
    args = argparse.Namespace(n=2, against="base", temperature=0.5, seed=3, max_new_tokens=50)
    head, _, *lines, _, foot = evaluate.benchmark_table(results, args).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (head, *lines)]
    assert cells[0] == [
        "benchmark",
        "model",
        "problems",
        "mean@2 (%)",
        "by last number (%)",
        "tokens: mean / median / p95",
        "if right / wrong",
        "unfinished (%)",
        "unparsed (%)",
        "pass@2 (%)",
        "AES",
    ]
    assert [[c[0], c[1], c[6], c[7], c[8], c[9], c[10]] for c in cells[1:]] == [
        ["one", "base", "10.0 / 30.0", "25.0", "25.0", "50.0", ""],
        [
            "one",
            "x/step_7",
            "10.0 / 30.0",
            "0.0",
            "0.0",
            "100.0",
            "+10.45",
        ],  # 5 * 0.5 / 0.25 + (27.5 - 15) / 27.5
        ["two", "base", "– / 30.0", "0.0", "0.0", "0.0", ""],
        ["two", "x/step_7", "10.0 / –", "0.0", "0.0", "100.0", "–"],
    ]  # against nothing that was right
    assert (
        cells[1][3].startswith("25.0 [")
        and cells[1][4].startswith("50.0 [")
        and cells[2][3].startswith("75.0 [")
    )
    assert (
        cells[1][5] == "27.5 / 30 / 38"
        and foot
        == "[95 % Wilson intervals]; 2 answers to each at temperature 0.5, seed 3, at most 50 tokens"
    )


def test_against_another_model(runs, tmp_path, model, tokenizer):
    """The other model's answers are its own."""
    with torch.no_grad():
        model.norm.neg_()
    (tmp_path / "worse").mkdir()
    model.save_pretrained(tmp_path / "worse")
    tokenizer.copy_to(tmp_path / "worse")
    flags = ["--limit", "2", "--max-new-tokens", "12"]
    evaluate.main(
        ["--model", "tiny", "--against", str(tmp_path / "worse"), *flags, "--run", "both"]
    )
    evaluate.main(["--model", str(tmp_path / "worse"), *flags, "--run", "worse-alone"])
    theirs, mine, alone = (
        (runs / name).read_bytes()
        for name in ("both/against-tiny.jsonl", "both/tiny.jsonl", "worse-alone/tiny.jsonl")
    )
    assert theirs == alone != mine


def test_the_other_model_is_what_aes_compares_with(runs, tmp_path, monkeypatch, model, tokenizer):
    """Answers by hand: the other model is right once in two with 40 tokens, ours always with 30."""
    model.save_pretrained(tmp_path)
    tokenizer.copy_to(tmp_path)
    answers = iter(
        [
            [row(40, "correct", "correct"), row(40, "wrong", "wrong")],
            [row(30, "correct", "correct")] * 2,
        ]
    )
    monkeypatch.setattr(evaluate, "answer", lambda *args, **kwargs: next(answers))
    evaluate.main(["--model", "tiny", "--against", str(tmp_path), "--limit", "2", "--run", "both"])
    other, ours = json.loads((runs / "both/results.json").read_text())["tiny"]
    assert (other["model"], other["accuracy"], ours["model"], ours["accuracy"]) == (
        str(tmp_path),
        0.5,
        "tiny",
        1,
    )
    assert ours["aes"] == pytest.approx(5 * 0.5 / 0.5 + 10 / 40) and "aes" not in other
    assert "| +5.25 |" in (runs / "both/table.md").read_text()


def test_command(runs, capsys):
    evaluate.main(["--model", "tiny", "--against", "tiny", "--limit", "16", "--run", "first"])
    printed = capsys.readouterr().out
    assert (
        "| tiny | tiny | 16 |" in printed
        and "| +0.00 |" in printed
        and "greedy, at most 512 tokens" in printed
    )
    assert (runs / "first/table.md").read_text() in printed
    base, ours = json.loads((runs / "first/results.json").read_text())["tiny"]
    assert (
        base == {k: v for k, v in ours.items() if k != "aes"}
        and ours["aes"] == 0
        and ours["problems"] == 16
        and ours["skipped"] == 0
        and 0 < ours["accuracy"] <= 1
    )
    rows = [json.loads(line) for line in (runs / "first/tiny.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and sum(r["status"] == "correct" for r in rows) / 16 == ours["accuracy"]
    assert sum(len(r["tokens"]) for r in rows) / 16 == ours["length"]
    everything = [p.question for p in tiny_problems("test")]
    assert [r["question"] for r in rows] == everything[:: len(everything) // 16]  # evenly spaced
    assert (runs / "first/against-tiny.jsonl").read_bytes() == (
        runs / "first/tiny.jsonl"
    ).read_bytes()


def test_answers_do_not_depend_on_blocks_nor_on_their_neighbours(model, tokenizer):
    first, second, third = (
        Problem(
            f"Amy has {k} pears. Amy buys 5 more. How many pears does Amy have now?", str(k + 5)
        )
        for k in (3, 9, 20)
    )

    def sampled(*problems):
        return evaluate.answer(
            model, tokenizer, list(problems), max_new_tokens=40, n=3, temperature=1.0, seed=7
        )

    together = sampled(first, second, first, third)
    assert together[:3] == together[6:9] and together[0] != together[1]  # a question asked twice
    assert together == sampled(first, second) + sampled(first, third)


def test_a_tilde_that_the_shell_left_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text("")
    args = runtime.absolute_paths(
        argparse.Namespace(model="~", against="tiny", data="gsm8k,~/a.jsonl,~/none.jsonl")
    )
    assert vars(args) == {
        "model": str(tmp_path),
        "against": "tiny",
        "data": f"gsm8k,{tmp_path}/a.jsonl,~/none.jsonl",
    }


def test_long_prompts_are_skipped_and_counted(runs, tmp_path, capsys):
    question = "Amy has 3 pears. Amy buys 5 more. How many pears does Amy have now?"
    data = tmp_path / "mixed.jsonl"
    data.write_text(
        "".join(
            json.dumps({"question": q, "answer": 8}) + "\n"
            for q in (question, question * 60, question)
        )
    )
    evaluate.main(["--data", str(data), "--run", "long"])
    printed = capsys.readouterr()
    assert (
        "| mixed | tiny | 2 (1 skipped) |" in printed.out
        and "1 of 3 prompts of mixed" in printed.err
    )
    data.write_text(json.dumps({"question": question * 60, "answer": 8}))
    with pytest.raises(ValueError, match="no prompt of mixed"):
        evaluate.main(["--data", str(data), "--run", "too-long"])


def test_refusals(runs, tmp_path):
    (tmp_path / "tiny.jsonl").write_text(json.dumps({"question": "q", "answer": 8}))
    for flags, says in (
        (["--limit", "0"], "--limit"),
        (["--n", "0", "--temperature", "1"], "--n"),
        (["--n", "2"], "same answer 2 times"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--device", "cuda:99"], "not here"),
        (["--data", f"tiny,{tmp_path}/tiny.jsonl"], "called alike"),
    ):
        with pytest.raises(ValueError, match=says):
            evaluate.main(flags)
    assert [path.name for path in runs.iterdir()] == ["tiny.jsonl"]  # nothing was begun
    short = ["--limit", "2", "--max-new-tokens", "4", "--run", "mine"]
    evaluate.main(short)
    with pytest.raises(ValueError, match="other settings .seed was 0, now 1.*another --run"):
        evaluate.main([*short, "--seed", "1"])
    with pytest.raises(ValueError, match="other settings .data was tiny, now tiny-train"):
        evaluate.main([*short, "--data", "tiny-train"])
    lines = (runs / "mine/tiny.jsonl").read_text().splitlines(keepends=True)
    (runs / "mine/tiny.jsonl").write_text("".join(lines[::-1]))
    with pytest.raises(ValueError, match="other problems"):
        evaluate.main(short)
    (runs / "mine/tiny.jsonl").write_text("\0" * 9 + "\n" + lines[1])
    with pytest.raises(ValueError, match="damaged"):
        evaluate.main(short)
    (runs / "trained").mkdir()
    (runs / "trained/config.json").write_text("{}")
    with pytest.raises(ValueError, match="training run"):
        evaluate.main(["--run", "trained"])


def test_kill_and_go_on(runs):
    """After kill -9 in the middle, and half a line more, the same command ends in the same bytes as an undisturbed one."""
    flags = [
        "--limit",
        "192",
        "--n",
        "2",
        "--temperature",
        "1",
        "--max-new-tokens",
        "20",
    ]  # twelve blocks of 16 problems
    evaluate.main([*flags, "--run", "whole"])
    path = runs / "killed/tiny.jsonl"
    process = subprocess.Popen(
        [sys.executable, "evaluate.py", *flags, "--run", "killed"],
        cwd=ROOT,
        env=os.environ | {"SA_RUNS": str(runs)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (path.exists() and path.stat().st_size):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = path.read_bytes().splitlines(keepends=True)
    assert 32 <= len(lines) < 384 and not (runs / "killed/table.md").exists()
    path.write_bytes(b"".join(lines[:38]) + b'{"question": "half a l')
    evaluate.main([*flags, "--run", "killed"])
    for name in ("tiny.jsonl", "results.json", "table.md"):
        assert (runs / "killed" / name).read_bytes() == (runs / "whole" / name).read_bytes()


@pytest.mark.skipif(
    "SA_SHARED" not in os.environ,
    reason="SA_SHARED does not name the folder with the published files",
)
def test_published_benchmarks_by_both_verifiers(runs, monkeypatch):
    """Not what the embedded model can do: that every benchmark goes through, and that its verdicts are there."""
    monkeypatch.setenv("SA_DATA", f"{os.environ['SA_SHARED']}/data/raw")
    names = ["gsm8k", "math500", "gsm-symbolic-p2", "aime24", "amc23", "logicbench", "prontoqa"]
    evaluate.main(
        ["--data", ",".join(names), "--limit", "2", "--max-new-tokens", "16", "--run", "all"]
    )
    results = json.loads((runs / "all/results.json").read_text())
    assert list(results) == names and all(
        r["problems"] + r["skipped"] == 2 for (r,) in results.values()
    )
    assert len((runs / "all/table.md").read_text().splitlines()) == 2 + len(names) + 2
