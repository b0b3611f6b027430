"""evaluate.py: the figures by hand, the tables, the command, and going on after a kill."""

import itertools
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate
from data.problems import Problem, load_problems
from runtime import parallel, runs, settings

BASE = {"problems": 4, "accuracy": 0.5, "length": 100.0}
QUESTION = "Amy has 3 pears. Amy buys 5 more. How many pears does Amy have now?"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the runs go."""
    monkeypatch.setattr(runs, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


def write_problems(path: Path, *questions: str) -> str:
    rows = [json.dumps({"question": q, "answer": 8}) + "\n" for q in questions]
    path.write_text("".join(rows))
    return str(path)


def row(length: int, status: str, last_number_status: str, finished: bool = True) -> dict:
    return {"tokens": [0] * length, "finished": finished, "status": status,
            "last_number_status": last_number_status}


# ---- figures ----


def test_aes_by_hand():
    better = {"accuracy": 0.6, "length": 70.0}
    assert evaluate.aes(better, BASE) == pytest.approx(0.3 + 5 * 0.2)
    assert evaluate.aes(better, BASE, gain=3) == pytest.approx(0.3 + 3 * 0.2)
    for gain in (5, 3):  # a loss weighs 5 in both forms
        worse = {"accuracy": 0.4, "length": 120.0}
        assert evaluate.aes(worse, BASE, gain) == pytest.approx(-0.2 - 5 * 0.2)
        assert evaluate.aes(BASE, BASE, gain) == 0
        assert math.isnan(evaluate.aes(better, BASE | {"accuracy": 0.0}, gain))


def test_wilson_by_hand(rng):
    assert evaluate.wilson(0.8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    assert evaluate.wilson(0.0, 20) == pytest.approx((0, 0.16113), abs=1e-5)
    assert evaluate.wilson(1.0, 20) == pytest.approx((1 - 0.16113, 1), abs=1e-5)
    for _ in range(50):  # what was seen is 1.96 standard errors of its ends away from its ends
        trials = rng.randint(1, 2000)
        seen = rng.randint(0, trials) / trials
        for end in evaluate.wilson(seen, trials):
            expected = 1.959963985**2 * end * (1 - end) / trials
            # Squared: at 0 and 1 the root would make 1e-8 of a rounding of 1e-16.
            assert (seen - end) ** 2 == pytest.approx(expected, rel=1e-9, abs=2e-15)


def test_pass_at_k_by_hand_and_by_counting(rng):
    assert evaluate.pass_at_k(4, 1, 2) == pytest.approx(0.5)
    assert evaluate.pass_at_k(5, 2, 3) == pytest.approx(0.9)
    assert evaluate.pass_at_k(5, 0, 5) == 0 and evaluate.pass_at_k(5, 3, 3) == 1
    for _ in range(30):
        n = rng.randint(1, 8)
        k, answers = rng.randint(1, n), [rng.random() < 0.3 for _ in range(n)]
        subsets = list(itertools.combinations(answers, k))
        share = sum(map(any, subsets)) / len(subsets)
        assert evaluate.pass_at_k(n, sum(answers), k) == pytest.approx(share)


def test_figures_by_hand():
    rows = [row(10, "correct", "correct"), row(20, "wrong", "correct"),
            row(40, "no_answer", "wrong", finished=False), row(30, "correct", "correct"),
            row(50, "unparsed", "wrong"), row(60, "correct", "wrong")]
    result = evaluate.summarise(rows)
    low, high = pytest.approx(0.18762, abs=1e-5), pytest.approx(0.81238, abs=1e-5)
    assert result == {
        "problems": 6, "accuracy": 0.5, "accuracy_low": low, "accuracy_high": high,
        "last_number": 0.5, "last_number_low": low, "last_number_high": high,
        "length": 35, "length_median": 35, "length_p95": pytest.approx(57.5),
        "length_correct": pytest.approx(100 / 3), "length_wrong": 20,
        "unfinished": pytest.approx(1 / 6), "unparsed": pytest.approx(2 / 6), "errors": 0}
    result = evaluate.summarise(rows, verifier="last-number")
    assert (result["length_correct"], result["length_wrong"]) == (20, 50)
    rows_with_error = [*rows, row(30, "wrong", "error")]
    assert evaluate.summarise(rows_with_error, verifier="last-number")["length_wrong"] == 50
    result = evaluate.summarise(rows, 3)  # two problems, right once and twice in three
    assert result["problems"] == 2 and result["accuracy"] == 0.5
    assert result["accuracy_low"] == evaluate.wilson(0.5, 2)[0]
    assert result["pass@2"] == pytest.approx((2 / 3 + 1) / 2) and result["pass@3"] == 1
    assert "pass@4" not in result and list(result)[-1] == "pass@3"
    nothing = evaluate.summarise([row(7, "error", "no_answer")])
    assert nothing["errors"] == 1 and nothing["unparsed"] == 1
    assert math.isnan(nothing["length_correct"]) and math.isnan(nothing["length_wrong"])


# ---- tables ----


def cells_of(table: str) -> list[list[str]]:
    head, _, *lines = table.partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in (head, *lines)]


def test_table_by_hand():
    """Two benchmarks, two models, two answers to each of two problems: which row is whose?"""
    right, wrong = row(10, "correct", "correct"), row(30, "wrong", "wrong")
    unread = row(40, "no_answer", "correct", finished=False)
    groups = []
    for base, new in (([right, wrong, wrong, unread], [right, right, wrong, right]),
                      ([wrong] * 4, [right] * 4)):
        groups.append({"base": evaluate.summarise(base, 2), "new": evaluate.summarise(new, 2)})
    table = evaluate.comparison_table(*groups)
    head, *rows = cells_of(table)
    assert head == ["model", "problems", "accuracy", "by last number",
                    "tokens: mean / median / p95", "if right / wrong", "unfinished", "unparsed",
                    "AES 5/5", "AES 3/5", "pass@2"]
    assert rows[0] == ["base", "2", "25.0% [2.7%, 80.2%]", "50.0% [9.5%, 90.5%]",
                       "27.5 / 30 / 38", "10.0 / 30.0", "25.0%", "25.0%", "", "", "50.0%"]
    assert [r[:1] + r[-3:] for r in rows[1:]] == [
        ["new", "+10.45", "+6.45", "100.0%"],  # 5 or 3 * 0.5 / 0.25 + (27.5 - 15) / 27.5
        ["base", "", "", "0.0%"],
        ["new", "+nan", "+nan", "100.0%"]]  # the other model was never right
    assert table.endswith("\n\n[95 % Wilson intervals]")
    assert cells_of(evaluate.comparison_table(groups[0])) == [head, *rows[:2]]


# ---- answers ----


def how(samples=1, temperature=0.0):
    return SimpleNamespace(samples=samples, temperature=temperature, max_new_tokens=40, seed=7,
                           slots=None, verifier="strict")


def test_answers_do_not_depend_on_their_neighbours(model, tokenizer):
    problems = [Problem(QUESTION.replace("3", str(k)), str(k + 5)) for k in (3, 9, 20)]
    first, second, third = problems

    def sampled(*asked):
        return evaluate.answer(model, tokenizer, list(asked), how(samples=3, temperature=1.0))

    together = sampled(first, second, first, third)
    assert together[:3] == together[6:9] and together[0] != together[1]  # a question asked twice
    assert together == sampled(first, second) + sampled(first, third)
    greedy = evaluate.evaluate(model, tokenizer, problems, how(samples=3, temperature=1.0))
    rows = evaluate.answer(model, tokenizer, problems, how())
    assert greedy == evaluate.summarise(rows) and greedy["problems"] == 3


def test_both_verdicts_of_an_answer(monkeypatch):
    """The texts are made up: the rules and the paper's rule disagree on both of them."""
    texts = iter(("The answer is 8. I checked it 2 times.", "Maybe 7 or 8"))

    def sample(model, tokenizer, problems, args, seed):
        return [parallel.Answer(p, [], [5], True, torch.zeros(1), next(texts)) for p in problems]

    monkeypatch.setattr(parallel, "sample", sample)
    rows = evaluate.answer(None, None, [Problem("a", "8"), Problem("b", "8")], how())
    keys = ("question", "reference", "answer", "status", "last_number", "last_number_status")
    assert [tuple(map(r.get, keys)) for r in rows] == [
        ("a", "8", "8", "correct", "2", "wrong"), ("b", "8", None, "no_answer", "8", "correct")]


# ---- the command ----


def test_command(folder, capsys):
    evaluate.main(["--against", "tiny", "--limit", "8", "--name", "first"])
    printed = capsys.readouterr().out
    table, *_ = printed.partition(f"\n{folder}")
    assert (folder / "first/table.md").read_text() == table
    assert [[r[0], r[1], r[-1]] for r in cells_of(table)[1:]] == [
        ["tiny: against-tiny", "8", ""], ["tiny: tiny", "8", "+0.00"]]
    assert "temperature 0, at most 512 tokens" in table
    base, ours = json.loads((folder / "first/results.json").read_text())["tiny"]
    assert base | {"aes": 0, "aes_3": 0} == ours
    assert ours["problems"] == 8 and ours["skipped"] == 0 and 0 < ours["accuracy"] <= 1
    rows = [json.loads(line) for line in (folder / "first/tiny.jsonl").read_bytes().splitlines()]
    assert len(rows) == 8 and sum(r["status"] == "correct" for r in rows) / 8 == ours["accuracy"]
    assert sum(len(r["tokens"]) for r in rows) / 8 == ours["length"]
    everything = [p.question for p in load_problems("tiny", split="test")]
    assert [r["question"] for r in rows] == everything[::len(everything) // 8]  # evenly spaced
    theirs = (folder / "first/against-tiny.jsonl").read_bytes()
    assert theirs == (folder / "first/tiny.jsonl").read_bytes()
    weights = json.loads((folder / "first/evaluation.json").read_text())["settings"]["weights"]
    assert set(weights) == {"model.safetensors", "against-model.safetensors"}


def test_against_another_model(folder, tmp_path, model, tokenizer):
    """The other model's answers are its own, and AES compares with it."""
    with torch.no_grad():
        model.norm.neg_()
    (tmp_path / "worse").mkdir()
    model.save_pretrained(tmp_path / "worse")
    tokenizer.copy_to(tmp_path / "worse")
    worse, flags = str(tmp_path / "worse"), ["--limit", "2", "--max-new-tokens", "12"]
    evaluate.main(["--against", worse, *flags, "--name", "both"])
    evaluate.main(["--model", worse, *flags, "--name", "alone"])
    theirs = (folder / "both/against-tiny.jsonl").read_bytes()
    assert theirs == (folder / "alone/tiny.jsonl").read_bytes()
    assert theirs != (folder / "both/tiny.jsonl").read_bytes()


def test_the_other_model_is_what_aes_compares_with(folder, monkeypatch):
    """The other model is right once in two with 40 tokens, ours always with 30, then both never."""
    right, wrong = row(30, "correct", "correct"), row(40, "wrong", "wrong")
    answers = iter([[row(40, "correct", "correct"), wrong], [right, right], [wrong, wrong],
                    [wrong, wrong]])

    def answer(model, tokenizer, problems, args):
        return [{"question": p.question, **r} for p, r in zip(problems, next(answers))]

    monkeypatch.setattr(evaluate, "answer", answer)
    evaluate.main(["--against", "tiny", "--limit", "2", "--name", "both"])
    first, second = json.loads((folder / "both/results.json").read_text())["tiny"]
    assert (first["accuracy"], second["accuracy"]) == (0.5, 1) and "aes" not in first
    assert second["aes"] == pytest.approx(5 * 0.5 / 0.5 + 10 / 40)
    assert second["aes_3"] == pytest.approx(3 * 0.5 / 0.5 + 10 / 40)
    assert "| +5.25 | +3.25 |" in (folder / "both/table.md").read_text()
    evaluate.main(["--against", "tiny", "--limit", "2", "--name", "never"])
    text = (folder / "never/results.json").read_text()
    assert json.loads(text)["tiny"][1]["aes"] is None and "NaN" not in text


def test_the_model_is_made_for_the_longest_sequence(folder, tmp_path, monkeypatch, tokenizer):
    """Phi-3.5 chooses its rope factors by it: the longest prompt that is kept, and an answer."""
    lengths = []
    load = evaluate.GPT.from_pretrained

    def from_pretrained(*args, length, **options):
        lengths.append(length)
        return load(*args, length=length, **options)

    monkeypatch.setattr(evaluate.GPT, "from_pretrained", from_pretrained)
    data = write_problems(tmp_path / "two.jsonl", QUESTION, QUESTION * 3)
    evaluate.main(["--data", f"tiny,{data}", "--limit", "2", "--max-new-tokens", "5"])
    assert lengths == [len(evaluate.encode_prompt(tokenizer, QUESTION * 3)) + 5]


def test_long_prompts_are_skipped_and_counted(folder, tmp_path, capsys):
    data = write_problems(tmp_path / "mixed.jsonl", QUESTION, QUESTION * 60, QUESTION + "?")
    evaluate.main(["--data", data, "--name", "long"])
    printed = capsys.readouterr()
    assert "| mixed: tiny | 2 |" in printed.out and "1 of 3 prompts of mixed" in printed.err
    assert json.loads((folder / "long/results.json").read_text())["mixed"][0]["skipped"] == 1
    write_problems(tmp_path / "mixed.jsonl", QUESTION * 60)
    with pytest.raises(ValueError, match="1 of 1 prompts of mixed leave no room"):
        evaluate.main(["--data", data, "--name", "too-long"])


def test_refusals(folder, tmp_path):
    tiny = write_problems(tmp_path / "tiny.jsonl", "q")
    for flags, says in ((["--limit", "0"], "--limit"),
                        (["--samples", "0", "--temperature", "1"], "--samples"),
                        (["--samples", "2"], "all the same"),
                        (["--n", "2"], "--n is now called --samples"),
                        (["--run=x"], "--run is now called --name"),
                        (["--temperature", "-1"], "--temperature"),
                        (["--temperature", "nan"], "--temperature"),
                        (["--device", "cuda:99"], "not here"),
                        (["--data", f"tiny,{tiny}"], "called alike")):
        with pytest.raises(ValueError, match=says):
            evaluate.main(flags)
    assert not folder.exists()  # nothing was begun
    short = ["--limit", "2", "--max-new-tokens", "4", "--name", "mine"]
    evaluate.main(short)
    with pytest.raises(ValueError, match="other settings .seed was 0, now 1.*another --name"):
        evaluate.main([*short, "--seed", "1"])
    (folder / "trained").mkdir()
    (folder / "trained/config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a training run"):
        evaluate.main(["--limit", "2", "--name", "trained"])
    with pytest.raises(ValueError, match="other settings .data was tiny, now tiny-train"):
        evaluate.main([*short, "--data", "tiny-train"])
    lines = (folder / "mine/tiny.jsonl").read_text().splitlines(keepends=True)
    (folder / "mine/tiny.jsonl").write_text("".join(lines[::-1]))
    with pytest.raises(ValueError, match="other problems"):
        evaluate.main(short)


def test_go_on_with_the_benchmarks_that_are_missing(folder, tmp_path, monkeypatch):
    """A kill in the second benchmark: the same command ends in the bytes of an undisturbed run."""
    data = write_problems(tmp_path / "second.jsonl", QUESTION, QUESTION.replace("3", "4"))
    flags = ["--data", f"tiny,{data}", "--limit", "2", "--samples", "2", "--temperature", "1",
             "--max-new-tokens", "20"]
    evaluate.main([*flags, "--name", "whole"])
    sample, asked = parallel.sample, []

    def killed_the_second_time(*args, **options):
        asked.append(args)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return sample(*args, **options)

    monkeypatch.setattr(parallel, "sample", killed_the_second_time)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main([*flags, "--name", "killed"])
    files = sorted(path.name for path in (folder / "killed").iterdir())
    assert files == ["evaluation.json", "tiny.jsonl"]
    evaluate.main([*flags, "--name", "killed"])
    assert len(asked) == 3  # the first benchmark was not run again
    for name in ("tiny.jsonl", "second.jsonl", "results.json", "table.md"):
        assert (folder / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_a_tilde_that_the_shell_left_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text("")
    assert (settings.model_name("~"), settings.model_name("tiny")) == (str(tmp_path), "tiny")
    names = settings.data_names("gsm8k,~/a.jsonl,~/none.jsonl")
    assert names == f"gsm8k,{tmp_path}/a.jsonl,~/none.jsonl"


@pytest.mark.skipif("SA_SHARED" not in os.environ, reason="SA_SHARED does not name the folder with "
                    "the published files")
def test_published_benchmarks_by_both_verifiers(folder, monkeypatch):
    """Every benchmark goes through, and its verdicts are there (the model cannot solve them)."""
    monkeypatch.setenv("SA_DATA", f"{os.environ['SA_SHARED']}/data/raw")
    names = ["gsm8k", "math500", "gsm-symbolic-p2", "aime24", "amc23", "logicbench", "prontoqa"]
    evaluate.main(["--data", ",".join(names), "--limit", "2", "--max-new-tokens", "16", "--name",
                   "all"])
    results = json.loads((folder / "all/results.json").read_text())
    assert list(results) == names
    assert all(r["problems"] + r["skipped"] == 2 for (r,) in results.values())
    assert len(cells_of((folder / "all/table.md").read_text())) == 1 + len(names)
