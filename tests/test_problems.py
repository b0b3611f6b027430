"""data/problems.py: our own files, made-up published ones, and, with SA_SHARED, the real ones."""

import gzip
import hashlib
import io
import itertools
import json
import os
import random
import string
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY

import evaluate
import verify
from data import problems
from data.problems import Problem, batch_of, load_problems, shuffled, training_problems
from data.prompts import encode_prompt

SHARED = os.environ.get("SA_SHARED")
FIRST_HELD_OUT = 7
SHUFFLED = (1, 0, 3, 4, 2)
BATCH = ["d", "e", "b", "c"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """No published files, no network, unless a test brings them."""
    monkeypatch.delenv("SA_DATA", raising=False)
    monkeypatch.setenv("SA_CACHE", str(tmp_path / "ours"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path


def jsonl(path: Path, *rows, end="\n") -> str:
    path.write_bytes(
        "".join((row if isinstance(row, str) else json.dumps(row)) + end for row in rows).encode()
    )
    return str(path)


def refusal(name, *args) -> str:
    """The one sentence that load_problems refuses with."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_problems(name, *args)
    text = str(caught.value)
    assert "\n" not in text and text
    return text


# ---- JSONL ----


def test_question_or_problem_and_answer(place):
    path = jsonl(
        place / "a.jsonl",
        {"question": " How many? ", "answer": " 3 "},
        {"problem": "Why?", "answer": "x^2", "id": 7},
        {"question": "This one", "problem": "not this", "answer": "1"},
    )
    assert load_problems(path) == [
        Problem("How many?", "3"),
        Problem("Why?", "x^2"),
        Problem("This one", "1"),
    ]


def test_gsm8k_keeps_only_the_reference(place):
    solution = "She earns 2 * 3 = $<<2*3=6>>6,000 a day.\nThat is <<6000*5=30000>>30,000.\n#### "
    answers = ["30,000", "-5", "$12", "0.5", "<<1+1=2>>2", "3\n"]
    path = jsonl(
        place / "a.jsonl", *({"question": "q", "answer": solution + answer} for answer in answers)
    )
    assert [p.answer for p in load_problems(path)] == ["30,000", "-5", "12", "0.5", "2", "3"]


def test_marks_stay_where_there_is_no_gsm8k_reference(place):
    path = jsonl(place / "a.jsonl", {"question": "q", "answer": "a << b >> c"})
    assert load_problems(path)[0].answer == "a << b >> c"


@pytest.mark.parametrize(
    "written, text",
    [
        ("27.0", "27"),
        ("27", "27"),
        ("-3.50", "-3.5"),
        ("0.1", "0.1"),
        ("1e3", "1000"),
        ("1e16", "1e+16"),
        ("1e300", "1e+300"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("0", "0"),
    ],
)
def test_numbers_become_text(place, written, text):
    path = jsonl(place / "a.jsonl", f'{{"question": "q", "answer": {written}}}')
    assert load_problems(path)[0].answer == text


def test_blank_lines_carriage_returns_and_byte_order_marks(place):
    path = place / "a.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf\xef\xbb\xbf"
        + b'\r\n  \r\n{"question": "a", "answer": 1}\r\n\n\t\n{"question": "b", "answer": 2}'
    )
    assert load_problems(path) == [Problem("a", "1"), Problem("b", "2")]
    path.write_bytes(
        b'\xef\xbb\xbf{"question": "a\xe2\x80\xa8b", "answer": 1}\n'
    )  # a line separator inside a text is text
    assert load_problems(path) == [Problem("a\u2028b", "1")]


GOOD = {"question": "q", "answer": "1"}


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"question": "q", "answer": "1"', "JSON"),
        ("question: q", "JSON"),
        ("[1, 2]", "list"),
        ('"text"', "str"),
        ("null", "NoneType"),
        ("[" * 100_000, "JSON"),
        ('{"question": "q", "answer": NaN}', "answer is neither text nor a number: nan"),
        ('{"question": "q", "answer": 1e999}', "inf"),
        ('{"question": "q", "answer": -Infinity}', "-inf"),
        ('{"question": "q", "answer": %s}' % ("9" * 10_000), "JSON"),
        ({"question": "q"}, "question (or problem) and answer"),
        ({"answer": "1"}, "question (or problem) and answer"),
        ({"prompt": "q", "response": "1"}, "'prompt', 'response'"),
        ({}, "question (or problem) and answer"),
        ({"question": "q", "answer": None}, "the answer is null or missing"),
        ({"question": None, "problem": None, "answer": "1"}, "the question is null or missing"),
        ({"question": "q", "answer": "\x0crac{1}{2}"}, "\\\\frac"),  # JSON's reading of \frac
        ({"question": "\x08eta", "answer": "1"}, "control character, '\\x08eta'"),
        ({"question": " \n", "answer": "1"}, "question is blank"),
        ({"question": "q", "answer": ""}, "answer is blank"),
        ({"question": "q", "answer": "worked out\n#### "}, "answer is blank"),
        ({"question": "q", "answer": "#### <<1+1>>"}, "answer is blank"),
        ({"question": "q", "answer": True}, "True"),
        ({"question": "q", "answer": ["1"] * 1000}, "['1', '1'"),
        ({"question": 5, "answer": "1"}, "question is neither text nor a number: 5"),
        ({"question": "q \ud83d", "answer": "1"}, "half a character"),
        ({"question": "q", "answer": "\udc00"}, "half a character"),
    ],
)
def test_a_broken_line_is_named(place, line, says):
    path = jsonl(place / "broken.jsonl", GOOD, "", line, GOOD)
    text = refusal(path)
    assert text.startswith(f"{path}, line 3") and says in text and len(text) < 500


@pytest.mark.parametrize(
    "body",
    [
        "{}".encode("utf-16"),
        b'{"question": "caf\xe9", "answer": 1}',
        gzip.compress(b"{}"),
        b"\x00" * 50,
    ],
)
def test_what_is_no_text_is_named(place, body):
    (place / "a.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + body)
    assert f"{place / 'a.jsonl'}, line 2" in refusal(str(place / "a.jsonl"))


@pytest.mark.parametrize("body", [b"", b"\n\n \r\n", b"\xef\xbb\xbf"])
def test_an_empty_file(place, body):
    (place / "a.jsonl").write_bytes(body)
    text = refusal(str(place / "a.jsonl"))
    assert (
        "no problems" in text
        and "question (or problem) and answer" in text
        and str(place / "a.jsonl") in text
    )


def test_what_is_no_file(place):
    assert "neither a file nor one of" in refusal(str(place))
    assert "neither a file nor one of" in refusal("/dev/zero")
    text = refusal("nosuch.jsonl")
    assert "neither a file nor one of" in text and "gsm8k" in text
    assert "neither a file" in refusal("")


def test_any_problems_survive_the_way_through_a_file(place):
    rng = random.Random()
    alphabet = string.printable[:-2] + 'äß€𝔘漢字\u2028\ufeff\\"<>#'
    rows = []
    while len(rows) < 300:
        question, answer = ("".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(2))
        # an answer of several lines is a worked solution
        answer = answer.replace("\n", " ").replace("#", "")
        if question.strip() and answer.strip():
            rows.append({rng.choice(["question", "problem"]): question, "answer": answer})
    lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows]
    got = load_problems(jsonl(place / "a.jsonl", *lines, end=rng.choice(["\n", "\r\n", "\n\n"])))
    expected = [
        Problem(row.get("question", row.get("problem")).strip(), row["answer"].strip())
        for row in rows
    ]
    assert got == expected


# ---- files as people keep them ----


ROWS = [{"question": f"q{i}", "answer": i, "score": float("nan"), "tags": [None]} for i in range(9)]


def as_parquet(rows: list[dict]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    body = io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), body)
    return body.getvalue()


@pytest.mark.parametrize("name, body", [
    ("a.jsonl", lambda: lines(*ROWS)),
    ("a.json", lambda: b"\xef\xbb\xbf\n " + json.dumps(ROWS, indent=2).encode() + b"\n\n"),
    ("a.jsonl", lambda: json.dumps(ROWS).encode()),  # an array on one line
    ("a.jsonl.gz", lambda: gzip.compress(lines(*ROWS))),
    ("a.json.gz", lambda: gzip.compress(json.dumps(ROWS, indent=1).encode())),
    ("a.parquet", lambda: as_parquet(ROWS)),
    ("a.csv", lambda: "\ufeffid,Question,Answer\r\n".encode()
        + "".join(f'{i},"q{i}",{i}\r\n' for i in range(9)).encode()),
])
def test_every_kind_of_file(place, name, body, capsys):
    (place / name).write_bytes(body())
    assert load_problems(str(place / name)) == [Problem(f"q{i}", str(i)) for i in range(9)]
    assert capsys.readouterr().err == f"{name}: 9 problems\n"


def test_a_broken_file_of_every_kind_is_one_sentence(place, monkeypatch):
    good = {"a.json": json.dumps(ROWS).encode(), "a.jsonl.gz": gzip.compress(lines(*ROWS)),
            "a.parquet": as_parquet(ROWS), "a.csv": b'question,answer\n"q\0' + b"x" * 200_000}
    for name, body in good.items():
        (place / name).write_bytes(body[:-20])
        place_of = "line" if "jsonl" in name else "row"
        assert f"{place / name}, {place_of} " in refusal(str(place / name))
    (place / "a.json").write_bytes(b'[{"question": "q", "answer": 1}, 7]')
    assert "row 2 is no JSON object but a int" in refusal(str(place / "a.json"))
    monkeypatch.setattr("data.files.MAX_BYTES", 1000)  # an endless line in a small file
    (place / "a.jsonl.gz").write_bytes(gzip.compress(b"0" * 10**6))
    assert "line 1 is no valid JSON" in refusal(str(place / "a.jsonl.gz"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install pyarrow" in refusal(str(place / "a.parquet"))


def test_null_means_absent(place):
    joined = {"question": None, "problem": "p", "answer": "18"}
    assert load_problems(jsonl(place / "a.jsonl", joined)) == [Problem("p", "18")]


def test_fields_of_other_names(place, tokenizer):
    row = {"prompt": "q", "reward_model": {"ground_truth": 7}, "extra.id": "e", "question": "no"}
    path = jsonl(place / "a.jsonl", row)
    fields = dict(question_field="prompt", answer_field="reward_model.ground_truth")
    assert load_problems(path, **fields) == [Problem("q", "7")]
    assert load_problems(path, **fields | {"question_field": "extra.id"}) == [Problem("e", "7")]
    for field in ("reward_model.none", "prompt.x", "answer"):
        with pytest.raises(ValueError, match="the answer is null or missing .*--answer-field"):
            load_problems(path, answer_field=field, question_field="prompt")
    with pytest.raises(ValueError, match="'prompt', 'reward_model', 'extra.id'"):
        load_problems(path)
    flags = SimpleNamespace(data=path, limit=None, max_new_tokens=9, eval_every=0, **fields,
                            max_prompt_tokens=99, prompts_per_step=1)
    assert evaluate.load_benchmarks(flags, [tokenizer], 99)[0] == {"a": [Problem("q", "7")]}
    assert training_problems(flags, tokenizer, TINY) == ([Problem("q", "7")], [])


@pytest.mark.parametrize("answer, reference", [
    ("We add.\nSo it is \\boxed{18}.", "18"),
    ("First 2 and 3.\nThe answer is: 3", "3"),
    ("**Answer:** 42", "42"),
    ("#### Step 1\n6 * 3 = 18\n#### Step 2\nso \\boxed{18}", "18"),  # headings, not GSM8K's form
    ("6 * 3 = <<6*3=18>>18\n#### 18", "18"),
    ("x^2", "x^2"),
    ("the answering machine", "the answering machine"),
])
def test_a_worked_solution_gives_its_final_answer(place, answer, reference, capsys):
    rows = [{"question": f"q{i}", "answer": answer} for i in range(3)]
    path = jsonl(place / "a.jsonl", *rows, {"question": "q", "answer": "1"})
    assert [p.answer for p in load_problems(path)] == [reference] * 3 + ["1"]
    how = " (3 worked solutions shortened to their final answer)" if answer != reference else ""
    assert capsys.readouterr().err == f"a.jsonl: 4 problems{how}\n"


def test_references_that_the_verifier_cannot_read_are_counted(place, capsys):
    answers = ["1", "Paris", "(A)", "\\frac{1}{", "x^2", "So we add\nand are done"]
    path = jsonl(place / "a.jsonl", *({"question": "q", "answer": a} for a in answers))
    assert [p.answer for p in load_problems(path)] == answers
    says = f"a.jsonl: 6 problems (2 answers that the verifier cannot read, first {path}, line 4)\n"
    assert capsys.readouterr().err == says


def test_repeated_problems_are_merged_and_counted(place, capsys):
    path = jsonl(place / "a.jsonl", *[GOOD, {"question": "r", "answer": "2"}] * 20,
                 {"question": "q", "answer": "other"})
    expected = [Problem("q", "1"), Problem("r", "2"), Problem("q", "other")]
    assert load_problems(path) == expected  # answers that contradict one another stay
    assert capsys.readouterr().err == "a.jsonl: 3 problems (38 repeated ones merged)\n"


def test_no_mutated_file_ends_in_a_traceback(place):
    rng = random.Random()
    row = {"question": "q \\frac{1}{2}", "answer": "so\n#### 3", "info": {"a": [1.5, None, "é"]}}
    bodies = [lines(row, GOOD), json.dumps([row, GOOD], indent=1).encode()]
    parts = [b"\\", b'"', b"[", b"{", b"null", b"\xff", b"\x00", b"1e999", b"\\u0000", b"\n"]
    worked = 0
    for _ in range(500):
        body = bytearray(rng.choice(bodies))
        for _ in range(rng.randint(0, 3)):
            start, width = rng.randrange(len(body)), rng.randint(0, 5)
            body[start:start + width] = rng.choice(parts)
        path = place / rng.choice(["a.json", "a.json", "a.json.gz", "a.csv"])
        packed = gzip.compress(body) if path.suffix == ".gz" else bytes(body)
        path.write_bytes(packed[:rng.randint(1, len(packed))] if rng.random() < 0.2 else packed)
        field = rng.choice([None] * 9 + ["info.a"])
        try:
            worked += len(load_problems(path, question_field=field)) > 0
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error), body
    assert worked > 20


# ---- answers of published solutions ----


@pytest.mark.parametrize(
    "answer, number",
    [
        ("5", True),
        ("-5", True),
        ("3.25", True),
        (r"\frac{2}{3}", True),
        (r"-\frac{2}{3}", True),
        (r"2\frac{1}{2}", True),
        ("(7)", True),
        ("12345678901234567890", True),
        ("123456789012345678901", False),
        ("1,000", False),
        ("", False),
        ("-", False),
        ("x", False),
        (r"\frac{x}{2}", False),
        (r"\frac{0}{2}", False),
        (r"\frac{1}{2}\frac{1}{2}", False),
        (r"\sqrt{2}", False),
        ("5%", False),
        ("٣", False),
        ("5\n", False),
        ("A", False),
    ],
)
def test_which_answers_are_numbers(answer, number):
    assert problems.is_number(answer) == number


# ---- published files, made up ----


@pytest.fixture
def publish(place, monkeypatch):
    """publish(name, body) puts a file where $SA_DATA is and its SHA-256 on record."""
    monkeypatch.setenv("SA_DATA", str(place / "raw"))
    files = dict(problems.PUBLISHED)
    monkeypatch.setattr(problems, "PUBLISHED", files)

    def put(name: str, body: bytes) -> Path:
        path = place / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        files[name] = {"url": files[name]["url"], "sha256": hashlib.sha256(body).hexdigest()}
        return path

    return put


def lines(*rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_gsm8k_splits(publish, capsys):
    publish("gsm8k_train.jsonl", lines({"question": "a", "answer": "x\n#### 1"}))
    publish(
        "gsm8k_test.jsonl",
        lines({"question": "b", "answer": "x\n#### 2,000"}, {"question": "c", "answer": "#### 3"}),
    )
    assert (
        load_problems("gsm8k")
        == load_problems("gsm8k-train")
        == load_problems("gsm8k-train", "test")
        == [Problem("a", "1")]
    )
    assert (
        load_problems("gsm8k", "test")
        == load_problems("gsm8k-test")
        == [Problem("b", "2,000"), Problem("c", "3")]
    )
    assert "gsm8k-test: 2 problems (2 worked solutions" in capsys.readouterr().err
    with pytest.raises(AssertionError):
        load_problems("gsm8k", "dev")


def test_at_most_ten_thousand_per_source_with_a_fixed_seed(publish, capsys):
    publish(
        "gsm8k_train.jsonl", lines(*({"question": f"q{i}", "answer": i} for i in range(10_050)))
    )
    first, second = load_problems("gsm8k"), load_problems("gsm8k")
    assert first == second and len({p.question for p in first}) == len(first) == 10_000
    assert "10000 drawn" in capsys.readouterr().err


def test_a_changed_file_is_refused(publish):
    path = publish("math500_test.jsonl", lines({"problem": "a", "answer": "1"}))
    assert load_problems("math500", "test") == [Problem("a", "1")]
    path.write_bytes(lines({"problem": "a", "answer": "2"}))
    text = refusal("math500")
    assert str(path) in text and "SHA-256" in text
    assert load_problems(str(path)) == [Problem("a", "2")]  # as a file of one's own it is welcome


def test_aime_and_amc_numbers(publish):
    publish(
        "aime24_test.jsonl",
        lines(
            *({"problem": "p", "solution": "s", "answer": a} for a in ("033", "204", "000", "080"))
        ),
    )
    assert [p.answer for p in load_problems("aime24")] == ["033", "204", "000", "080"]
    assert verify.is_equivalent("33", "033") and verify.is_equivalent("0", "000")
    publish(
        "amc23_test.jsonl",
        lines({"problem": "p", "answer": 27.0}, {"problem": "p", "answer": -1.0}),
    )
    assert [p.answer for p in load_problems("amc23")] == ["27", "-1"]


def test_aime_of_all_years_is_a_table(publish):
    head = "ID,Year,Problem Number,Question,Answer,Part\r\n"
    row = '2000-I-1,2000,1,"Find $n$, with ""0""\nin it.",8,I\r\n'
    publish("aime_1983_2024.csv", f"{head}1983-1,1983,1,What is $w$?,60,\r\n{row}".encode())
    assert load_problems("aime") == [Problem("What is $w$?", "60"),
                                     Problem('Find $n$, with "0"\nin it.', "8")]


def test_math_archive(publish, capsys):
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:

        def add(name, content):
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))

        for number in (10, 9, 2):
            add(
                f"MATH/train/algebra/{number}.json",
                {"problem": f"a{number}", "solution": rf"$\boxed{{{number}}}$"},
            )
        add("MATH/train/geometry/1.json", {"problem": "g1", "solution": r"$\boxed{\frac{1}{2}}$"})
        add("MATH/train/geometry/2.json", {"problem": "g2", "solution": r"$\boxed{\sqrt{2}}$"})
        add("MATH/test/algebra/1.json", {"problem": "t1", "solution": r"$\boxed{1}$"})
        add("MATH/train/geometry/._2.json", b"\x00\x05\x16\x07")
        add("MATH/train/../../escape.json", b"{}")
        link = tarfile.TarInfo("MATH/train/algebra/3.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    publish("MATH.tar", tar.getvalue())
    assert [(p.question, p.answer) for p in load_problems("math")] == [
        ("a10", "10"),
        ("a2", "2"),
        ("a9", "9"),
        ("g1", r"\frac{1}{2}"),
    ]
    assert "4 of 5 have a numeric answer" in capsys.readouterr().err
    assert load_problems("math", "test") == [Problem("t1", "1")]


def files_of(name: str) -> list[str]:
    return [file for file in problems.PUBLISHED if file.startswith(problems.WORD_SETS[name])]


@pytest.mark.parametrize("name", ["openr1", "numina"])
def test_word_problems_of_openr1_and_numina(publish, capsys, name):
    rng, files = random.Random(), files_of(name)
    judged = {"numina": {"problem_is_valid": "Yes", "solution_is_valid": "Yes"},
              "openr1": {"correctness_math_verify": [False, True], "generations": ["r", "s"]}}

    def row(**changes):
        return {
            "problem": f"p{rng.random()}",
            "solution": "s",
            "answer": str(rng.randint(0, 99)),
            "problem_type": "Algebra",
            "question_type": "math-word-problem",
            "source": "olympiads",
        } | judged[name] | changes

    invalid = {"numina": [{"problem_is_valid": "Incomplete"}, {"solution_is_valid": "No"}],
               "openr1": [{"correctness_math_verify": [False, False]},
                          {"correctness_math_verify": None}]}
    good = [row() for _ in range(200)]
    bad = [
        *(row(**changes) for changes in invalid[name]),
        row(question_type="MCQ"),
        row(answer="proof"),
        row(answer=None),
        row(answer="x=1"),
        row(answer="1" * 21),
        row(problem="see http://x"),
        row(solution="http"),
        row(problem=None),
    ]
    rows = good + bad + [row(problem=good[0]["problem"], answer="100"), good[1]]
    rng.shuffle(rows)
    for i, file in enumerate(files):
        publish(file, as_parquet(rows[i::len(files)]))
    train, test = load_problems(name), load_problems(name, "test")
    assert (len(train), len(test)) == (184, 16) and load_problems(f"{name}-train") == train
    assert {p.question for p in train + test} == {r["problem"] for r in good}
    told = "202 of 212 are valid word problems with a numeric answer, 2 repeated ones merged"
    assert f"{name} train: 184 problems ({told})" in capsys.readouterr().err


def test_numina_names_pyarrow_where_it_is_missing(publish, monkeypatch):
    for name in files_of("numina"):
        publish(name, b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install pyarrow" in refusal("numina")


def test_logicbench_choices_become_letters(publish):
    sample = {
        "id": 1,
        "context": "If it rains, it pours. ",
        "question": "What follows?",
        "answer": "choice_3",
        "choices": {
            "choice_1": "",
            "choice_2": "nothing",
            "choice_3": "it pours",
            "choice_4": "it snows",
        },
    }
    other = sample | {
        "id": 2,
        "answer": "choice_1",
        "choices": {"choice_1": "yes", "choice_2": "no"},
    }
    for i, axiom in enumerate(problems.LOGICBENCH):
        samples = [sample | {"context": f"If it rains, it pours{'!' * i}. "}, other]
        publish(axiom, json.dumps({"samples": samples}).encode())
    got = load_problems("logicbench")
    assert len(got) == len(problems.LOGICBENCH) + 1 == 26  # `other` stands in every file
    assert got[0] == Problem(
        "If it rains, it pours.\nWhat follows?\nA. nothing\nB. it pours\nC. it snows\n"
        "Answer with the letter of the right choice.",
        "B",
    )
    assert got[1].answer == "A"
    paper = load_problems("logicbench-paper")[0]  # a blank choice keeps its letter
    assert paper.question == ("If it rains, it pours.\nWhat follows? Choose from the following "
                              "answers:\nA: \nB: nothing\nC: it pours\nD: it snows")
    assert paper.answer == "C"


def test_prontoqa_answers_become_true_and_false(publish):
    sample = {
        "id": "P1",
        "context": "Cats purr.",
        "question": "Is it true? Cats purr.",
        "options": ["A) True", "B) False"],
        "answer": "A",
    }
    publish(
        "prontoqa_dev.json",
        json.dumps(
            [sample, sample | {"answer": "B"},
             sample | {"context": "No.", "options": ["A) False", "B) True"]}]
        ).encode(),
    )
    got = load_problems("prontoqa")
    assert [p.answer for p in got] == ["True", "False", "False"]
    paper = load_problems("prontoqa-paper")[0]
    assert paper == Problem("Cats purr. Is it true? Cats purr.", "True")
    assert got[0].question == "Cats purr.\nIs it true? Cats purr. Answer with True or False."


# ---- training data ----


def training(tokenizer, data: str, **changes):
    settings = dict(data=data, max_prompt_tokens=128, max_new_tokens=256, eval_every=1,
                    prompts_per_step=4, question_field=None, answer_field=None)
    return training_problems(SimpleNamespace(**settings | changes), tokenizer, TINY)


def test_the_embedded_data_has_its_own_test_set(tokenizer):
    train, test = training(tokenizer, "tiny")
    assert train == load_problems("tiny") and test == load_problems("tiny-test")


def test_a_tenth_is_held_out_chosen_by_the_data_alone(tokenizer, place, monkeypatch):
    paths = [
        jsonl(place / f"{name}.jsonl", *({"question": f"{name}{i}", "answer": i} for i in range(5)))
        for name in "ab"
    ]
    both = load_problems(paths[0]) + load_problems(paths[1])
    kept, held_out = training(tokenizer, ",".join(paths))
    assert held_out == [both[shuffled(10, "held out")[0]]] == [both[FIRST_HELD_OUT]]
    assert kept == [p for p in both if p not in held_out]  # in the files' order
    assert training(tokenizer, ",".join(paths), eval_every=0) == (both, [])
    monkeypatch.setattr(problems, "HELD_OUT", 0)
    with pytest.raises(ValueError, match="holds out a tenth"):
        training(tokenizer, ",".join(paths))
    with pytest.raises(ValueError, match="only 5 different problems: use 0"):
        training(tokenizer, paths[0])


def test_no_held_out_question_is_trained_on_and_data_may_weigh_twice(tokenizer, place):
    a, b = (jsonl(place / f"{name}.jsonl", *[
        {"question": f"{name}{i}", "answer": i} for i in range(20)] * 20) for name in "ab")
    kept, held_out = training(tokenizer, f"{a},{a},{b}")
    asked = {p.question for p in held_out}
    assert len(held_out) == len(asked) == 4
    assert not asked & {p.question for p in kept}
    for name, times in (("a", 2), ("b", 1)):
        left = 20 - sum(question[0] == name for question in asked)
        assert sum(p.question[0] == name for p in kept) == times * left


def test_long_prompts_are_skipped_and_counted_never_cut(tokenizer, place, capsys):
    short, long = "Tom Tom Tom", "Tom" + " Tom" * 12
    rows = [{"question": f"{short if i % 3 else long} {i:02}", "answer": i} for i in range(60)]
    limit = max(len(encode_prompt(tokenizer, r["question"])) for r in rows if r["answer"] % 3)
    path = jsonl(place / "a.jsonl", *rows)
    kept, held_out = training(tokenizer, path, max_prompt_tokens=limit)
    _, *said = capsys.readouterr().err.splitlines()
    assert not [p for p in kept + held_out if p.question.startswith(long)]
    assert len(kept) + len(held_out) == 40
    counts = f"{54 - len(kept)} of 54 prompts", f"{6 - len(held_out)} of 6 held-out prompts"
    assert said == [f"note: {c} are longer than {limit} tokens and are skipped" for c in counts]
    # The model has 1024 positions for a prompt and its answer.
    assert training(tokenizer, path, max_new_tokens=1024 - limit) == (kept, held_out)


@pytest.mark.parametrize("changes, says", [
    (dict(max_prompt_tokens=2), r"all 9 prompts are longer than --max-prompt-tokens 2.*has \d+"),
    (dict(max_new_tokens=1022), r"all 9 prompts .* in 1024 positions"),
    (dict(max_new_tokens=1024), r"all 9 prompts .* --max-new-tokens 1024 in 1024 positions"),
    (dict(prompts_per_step=10), r"--prompts-per-step 10 is more than the 9 problems of"),
])
def test_data_that_cannot_be_trained_on(tokenizer, place, changes, says):
    rows = [{"question": "Tom has a cup." + "?" * i, "answer": 1} for i in range(10)]
    path = jsonl(place / "a.jsonl", *rows)
    with pytest.raises(ValueError, match=says):
        training(tokenizer, path, **changes)


def test_batches_are_slices_of_shuffled_passes(rng):
    size, count, seed = rng.randint(1, 30), rng.randint(1, 40), rng.randint(0, 9)
    data = [Problem(f"q{i}", str(i)) for i in range(size)]
    steps = range(2 * size)
    row = list(itertools.chain(*(batch_of(data, step, count, seed) for step in steps)))
    assert len(row) == len(steps) * count and all(p in data for p in row)
    for start in range(0, len(row) - size, size):  # every pass has each problem once
        assert {p.question for p in row[start:start + size]} == {p.question for p in data}
    assert batch_of(data, 1, count, seed) == row[count:2 * count]  # no memory is needed
    # A run that is resumed later, with another version of this file, must see the same order.
    assert shuffled(5, "0 0") == SHUFFLED and batch_of(list("abcde"), 1, 4, 7) == BATCH


# ---- downloads ----


@pytest.fixture
def web(monkeypatch):
    """A web server with the files of `web.bodies`; every published file's address leads there."""

    class Web(BaseHTTPRequestHandler):
        bodies: dict[str, bytes] = {}
        seen: list[str] = []
        authorizations: list = []
        missing = 0  # bytes that are promised and do not come

        def do_GET(self):
            self.seen.append(self.path)
            self.authorizations.append(self.headers.get("Authorization"))
            body = self.bodies.get(self.path.rsplit("/", 1)[-1])
            self.send_response(200 if body is not None else 404)
            # any text may stand in a tag: it must not be taken for a hash where the site is no hub
            self.send_header("ETag", '"' + "a" * 64 + '"')
            self.send_header("Content-Length", str(len(body or b"") + self.missing))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.daemon_threads = True
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    ).start()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    address = f"http://127.0.0.1:{server.server_port}"
    for name, entry in problems.PUBLISHED.items():
        there = {"url": f"{address}/{name}", "sha256": entry["sha256"]}
        monkeypatch.setitem(problems.PUBLISHED, name, there)
    yield Web
    server.shutdown()
    server.server_close()


def test_an_absent_file_is_downloaded_once_and_checked(web, place):
    body = lines({"problem": "a", "answer": "1"})
    web.bodies["math500_test.jsonl"] = body
    ours = place / "ours" / "data" / "math500_test.jsonl"
    text = refusal("math500")  # not the published one: its hash is another
    assert "came damaged" in text and str(ours) in text and not ours.exists()
    problems.PUBLISHED[ours.name]["sha256"] = hashlib.sha256(body).hexdigest()
    assert load_problems("math500") == load_problems("math500") == [Problem("a", "1")]
    assert len(web.seen) == 2
    assert set(web.authorizations) == {None}  # the hub's token is nobody else's business
    ours.write_bytes(body[:-3])
    assert "SHA-256" in refusal("math500")


def test_a_file_without_a_known_hash_comes_whole_or_not_at_all(web, place):
    body = lines({"question": "a", "answer": "x\n#### 1"})
    web.bodies["gsm_symbolic_p1.jsonl"] = body
    web.missing = 7
    assert "broke off" in refusal("gsm-symbolic")
    assert not (place / "ours" / "data" / "gsm_symbolic_p1.jsonl").exists()
    web.missing = 0
    assert load_problems("gsm-symbolic") == load_problems("gsm-symbolic-p1") == [Problem("a", "1")]


def test_a_file_that_is_nowhere(web, place, monkeypatch):
    monkeypatch.setenv("SA_DATA", str(place / "given"))
    text = refusal("aime24")
    assert (
        str(place / "given" / "aime24_test.jsonl") in text
        and str(place / "ours") in text
        and "404" in text
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    web.seen.clear()
    assert "HF_HUB_OFFLINE" in refusal("aime24") and not web.seen


def test_hub_addresses_follow_the_endpoint(place, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9/mirror")
    assert "http://127.0.0.1:9/mirror/datasets/HuggingFaceH4/MATH-500" in refusal("math500")


# ---- the published files themselves ----


@pytest.mark.skipif(
    not SHARED, reason="SA_SHARED does not name the folder with the published files"
)
def test_the_published_files(monkeypatch, capsys):
    monkeypatch.setenv("SA_DATA", f"{SHARED}/data/raw")
    counts = {
        "gsm8k-train": 7473,
        "gsm8k": 1319,
        "math500": 500,
        "gsm-symbolic-p2": 2500,
        "aime24": 30,
        "amc23": 40,
        "logicbench": 500,
        "prontoqa": 500,
    }
    sets = {name: load_problems(name, "test") for name in counts}
    assert {name: len(found) for name, found in sets.items()} == counts
    told = capsys.readouterr().err
    for name, count in counts.items():
        assert f"{'gsm8k-test' if name == 'gsm8k' else name}: {count} problems" in told
    assert "merged" not in told and "cannot read" not in told
    for problem in itertools.chain(*sets.values()):
        assert problem.question == problem.question.strip()
        assert problem.answer and "####" not in problem.answer and "<<" not in problem.answer

    def rows(file: str) -> list[dict]:
        text = Path(SHARED, f"data/raw/{file}.jsonl").read_text(encoding="utf-8")
        return list(map(json.loads, text.splitlines()))

    for name, file in (("gsm8k-train", "gsm8k_train"), ("gsm8k", "gsm8k_test"),
                       ("gsm-symbolic-p2", "gsm_symbolic_p2")):
        answers = [row["answer"].splitlines()[-1].split()[1] for row in rows(file)]
        assert [p.answer for p in sets[name]] == answers
    assert all(0 <= int(p.answer) <= 999 for p in sets["aime24"])
    assert all(int(p.answer) < 10_000 for p in sets["amc23"])
    assert {p.answer for p in sets["logicbench"]} == set("ABCD")
    assert {p.answer for p in sets["prontoqa"]} == {"True", "False"}
    for problem in sets["logicbench"]:
        assert f"\n{problem.answer}. " in problem.question
    for row in rows("math500_test"):
        boxed = problems.extract_answer(row["solution"])
        if ", " in boxed:  # two boxes side by side, of equal values
            assert verify.is_equivalent(boxed, row["answer"])
        elif problems.is_number(row["answer"]):
            assert boxed == row["answer"].rstrip(".")
        else:
            assert not problems.is_number(boxed)
