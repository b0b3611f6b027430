"""Problems: a question and the reference of its final answer, from your file or a published set.

    load_problems("my.jsonl")       JSONL or a JSON array, .gz of either, .parquet, .csv
    load_problems("gsm8k", "test")  a published set; one that is not split ignores the split
    load_problems("tiny")           the embedded model's own problems (data/tiny_world.py)

Repeated problems are merged, worked solutions become their final answer by the rules of verify.py,
and a note counts both, and the references that the verifier cannot read.

Published files (data/published.json) are looked for in $SA_DATA, then in our cache, and are
downloaded into the cache when absent. Training sets are filtered and cut as by the authors (github.
com/amazon-science/Self-Aligned-Reward-Towards_Effective_and_Efficient_Reasoners): MATH, OpenR1 and
NuminaMath keep problems whose answer is a number, every source gives at most 10,000, the last two
are split 92 to 8 (what the paper calls NuminaMath is OpenR1 in that code). Their draw used other
random number generators: ours is as large, not the same.
"""
import functools
import json
import math
import os
import random
import re
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from data.files import file_sha256, one_line, read_json, read_rows
from data.hub import cache_folder, download, download_lock, endpoint
from data.prompts import encode_prompt
from data.tiny_world import tiny_problems
from verify import extract_answer, final_answer, kind_of

MAX_PER_SOURCE = 10_000  # problems (the authors' merge_datasets.py)
TEST_SHARE = 0.08  # of openr1 and numina (the authors' openr1.py)
SEED = 42  # of their split and of every draw of MAX_PER_SOURCE
HELD_OUT = 320  # problems kept from training, at most, where the data has no test set of its own

PUBLISHED = read_json(Path(__file__).with_name("published.json"))
WORD_SETS = {"openr1": "OpenR1-Math-220k", "numina": "NuminaMath-1.5"}  # the folders of their files
LOGICBENCH = [file for file in PUBLISHED if file.startswith("logicbench")]
JSONL_SETS = {entry["name"]: file for file, entry in PUBLISHED.items() if "name" in entry}
JSONL_SETS["gsm-symbolic"] = JSONL_SETS["gsm-symbolic-p1"]  # which the authors evaluate
LOGIC_SETS = {  # how a question is worded: by us, and by the authors' code
    "logicbench": "{}\n{}\n{}\nAnswer with the letter of the right choice.",
    "logicbench-paper": "{}\n{} Choose from the following answers:\n{}",
    "prontoqa": "{}\n{} Answer with True or False.",
    "prontoqa-paper": "{} {}"}
NAMES = ["tiny", "gsm8k", "math", *WORD_SETS, *JSONL_SETS, *LOGIC_SETS]
EXPECTED = "expected one JSON object a line with question (or problem) and answer"
NOT_TEXT = "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]"


@dataclass
class Problem:
    question: str
    answer: str  # the reference of the final answer only, never the solution


def load_problems(name_or_path: str, split: str = "train", question_field: str | None = None,
                  answer_field: str | None = None) -> list[Problem]:
    """Read problems from a file or a published set (one of NAMES), in the file's order.

    split: "train" or "test", where a set has both; NAME-train and NAME-test say it in the name.
    Fields of a file may be nested, as in info.answer. Raises ValueError for content that cannot be
    used, FileNotFoundError for what cannot be had."""
    assert split in ("train", "test"), split
    name, path = name_or_path, Path(os.path.expanduser(name_or_path))
    if path.is_file() and name not in NAMES:
        found = read_problems(path, question_field, answer_field)
        return at_most(path.name, *found, most=sys.maxsize)
    if name.endswith(("-train", "-test")):
        name, _, split = name.rpartition("-")
    if name == "tiny":
        return [Problem(*pair) for pair in tiny_problems(split)]
    if name == "gsm8k":
        name = f"gsm8k-{split}"
    if name == "math":
        return math_problems(split)
    if name in WORD_SETS:
        return word_problems(name, split)
    if name in LOGIC_SETS:
        read = logicbench_problems if name.startswith("logicbench") else prontoqa_problems
        return at_most(name, read(name))
    if name not in JSONL_SETS:
        raise FileNotFoundError(f"data {name!r} is neither a file nor one of {', '.join(NAMES)}")
    return at_most(name, *read_problems(published(JSONL_SETS[name])))


def read_problems(path: Path, question_field: str | None = None,
                  answer_field: str | None = None) -> tuple:
    """(the problems of a file, notes of references that were shortened or cannot be read ...)"""
    problems, shortened, unread = [], 0, []
    for where, row in read_rows(path):
        question = text_of(row, where, "question", question_field or "question,problem,Question")
        answer = text_of(row, where, "answer", answer_field or "answer,Answer")
        problem = Problem(question, final_answer(answer))
        for what, text in vars(problem).items():
            if not text:
                raise ValueError(f"{where}: the {what} is blank")
        shortened += problem.answer != answer
        kind = kind_of(problem.answer)
        if kind is None or kind == "text" and "\n" in problem.answer:  # no final answer was found
            unread.append(where)
        problems.append(problem)
    if not problems:
        raise ValueError(f"{path} holds no problems: {EXPECTED}")
    notes = []
    if shortened:
        notes.append(f"{shortened} worked solutions shortened to their final answer")
    if unread:
        notes.append(f"{len(unread)} answers that the verifier cannot read, first {unread[0]}")
    return problems, *notes


def text_of(row: dict, where: str, what: str, names: str) -> str:
    """The question or the answer (text, or a number) in a row: the first of the fields `names` that
    is not null. `where` opens every ValueError."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object but a {type(row).__name__}: {EXPECTED}")
    for name in names.split(","):
        value = row
        for key in [name] if name in row else name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            break
    else:
        raise ValueError(f"{where}: the {what} is null or missing in the fields {list(row)[:12]}: "
                         f"{EXPECTED}, or their names in --question-field and --answer-field")
    if what == "answer" and type(value) in (int, float) and math.isfinite(value):
        value = str(value).removesuffix(".0")  # 27.0 says 27
    if not isinstance(value, str):
        raise ValueError(f"{where}: the {what} is neither text nor a number: {value!r:.60}")
    if re.search(NOT_TEXT, value):
        raise ValueError(f"{where}: the {what} holds half a character or a control character, "
                         f"{value!r:.60}: JSON doubles the backslash of \\\\frac")
    return value.strip()


def at_most(name: str, problems: list[Problem], *notes: str,
            most: int = MAX_PER_SOURCE) -> list[Problem]:
    """The different ones, at most `most`, drawn with a fixed seed. Says on stderr what was kept."""
    notes = list(notes)
    different = list({(p.question, p.answer): p for p in problems}.values())
    if len(different) < len(problems):
        notes.append(f"{len(problems) - len(different)} repeated ones merged")
    if len(different) > most:
        different = random.Random(SEED).sample(different, most)
        notes.append(f"{most} drawn with seed {SEED}")
    how = f" ({', '.join(notes)})" if notes else ""
    if os.environ.get("RANK", "0") == "0":
        print(f"{name}: {len(different)} problems{how}", file=sys.stderr)
    return different


def published(file: str) -> Path:
    """A published file, from $SA_DATA, our cache, or the network, with its SHA-256 checked."""
    entry = PUBLISHED[file]
    url, sha256 = entry["url"].replace("https://huggingface.co", endpoint()), entry["sha256"]
    folder = cache_folder() / "data"
    ours = folder / file
    given = Path(os.environ.get("SA_DATA") or folder).expanduser() / file
    path = given if given.is_file() else ours
    try:
        if not path.is_file():
            with download_lock(folder / ".lock"):
                ours.parent.mkdir(parents=True, exist_ok=True)
                download(url, ours, sha256)
    except OSError as error:
        raise FileNotFoundError(f"{file} is neither at {given} ($SA_DATA) nor at {ours}: put it "
                                f"there by hand ({url}: {one_line(error)})") from error
    if sha256 and file_sha256(path) != sha256:
        raise ValueError(f"{path} is not the published file (its SHA-256 is not {sha256}): delete "
                         "it, or give its path as the data")
    return path


def math_problems(split: str) -> list[Problem]:
    """MATH (Hendrycks et al. 2021): the answer is what the solution boxes last."""
    wanted, problems = re.compile(rf"MATH/{split}/\w+/\d+\.json"), []
    with tarfile.open(published("MATH.tar")) as archive:  # nothing is unpacked onto the disk
        members = [m for m in archive if m.isfile() and wanted.fullmatch(m.name)]
        for member in sorted(members, key=lambda m: m.name):
            row = json.load(archive.extractfile(member))
            answer = extract_answer(row["solution"]) or ""
            if is_number(answer):
                problems.append(Problem(row["problem"].strip(), answer))
    return at_most(f"math {split}", problems,
                   f"{len(problems)} of {len(members)} have a numeric answer")


def word_problems(name: str, split: str) -> list[Problem]:
    """OpenR1-Math-220k ("default") or NuminaMath 1.5: word problems whose answer is a number."""
    answers, read, good = {}, 0, 0  # by question: a question must not stand in both splits
    for file in PUBLISHED:
        if not file.startswith(WORD_SETS[name]):
            continue
        for _, row in read_rows(published(file)):
            read += 1
            if is_word_problem(row):
                good += 1
                answers.setdefault(row["problem"].strip(), row["answer"])
    problems = [Problem(*pair) for pair in answers.items()]
    random.Random(SEED).shuffle(problems)
    test = round(TEST_SHARE * len(problems))
    part = problems[:test] if split == "test" else problems[test:]
    return at_most(f"{name} {split}", part,
                   f"{good} of {read} are valid word problems with a numeric answer",
                   f"{good - len(problems)} repeated ones merged")


def is_word_problem(row: dict) -> bool:
    """The authors' filters: OpenR1's answers were verified, NuminaMath's problems were judged."""
    problem, solution = row["problem"] or "", row["solution"] or ""
    valid = row.get("problem_is_valid") == row.get("solution_is_valid") == "Yes"
    if "correctness_math_verify" in row:
        valid = any(row["correctness_math_verify"] or [])  # of R1's answers at least one
    asked = row["question_type"] == "math-word-problem" and problem.strip() != ""
    linked = "http" in problem + solution
    return valid and asked and not linked and is_number(row["answer"] or "")


def logicbench_problems(name: str) -> list[Problem]:
    """LogicBench(Eval) MCQA: the choices become lettered lines, the reference is a letter."""
    problems, paper = [], name.endswith("-paper")  # where a blank choice has a letter too
    for path in map(published, LOGICBENCH):
        for sample in read_json(path)["samples"]:
            choices = {key: text.strip() for key, text in sample["choices"].items()}
            shown = [key for key, text in choices.items() if text or paper]  # one choice is blank
            letters, mark = dict(zip(shown, "ABCDEFGH")), ":" if paper else "."
            lines = [f"{letter}{mark} {choices[key]}" for key, letter in letters.items()]
            parts = sample["context"].strip(), sample["question"].strip(), "\n".join(lines)
            problems.append(Problem(LOGIC_SETS[name].format(*parts), letters[sample["answer"]]))
    return problems


def prontoqa_problems(name: str) -> list[Problem]:
    """ProntoQA as Logic-LM published it: context and statement, the reference True or False."""
    problems = []
    for _, sample in read_rows(published("prontoqa_dev.json")):
        options = dict(option.split(") ", 1) for option in sample["options"])  # "A) True"
        parts = sample["context"].strip(), sample["question"].strip()
        problems.append(Problem(LOGIC_SETS[name].format(*parts), options[sample["answer"]]))
    return problems


def is_number(answer: str) -> bool:
    r"""The authors' filter for numeric references: at most 20 characters, and besides at most one
    \frac{a}{b} of positive whole numbers only digits, signs, points, brackets and backslashes."""
    rest = re.sub(r"\\frac\{[1-9][0-9]*\}\{[1-9][0-9]*\}", "", answer, count=1)
    has_digit = re.search("[0-9]", answer) is not None
    return has_digit and len(answer) <= 20 and set(rest) <= set("0123456789-.()\\")


def training_problems(args, tokenizer, folder: Path) -> tuple[list[Problem], list[Problem]]:
    """(the problems to train on, those held out for --eval-every).

    Prompts longer than --max-prompt-tokens, or than the positions of the model in `folder` leave
    room for beside an answer, are skipped and counted, never cut. The embedded model's data has
    its own test set. Elsewhere a tenth (at most HELD_OUT) is held out, chosen by the data alone."""
    problems, held_out = [], []
    for name in args.data.split(","):  # one that stands twice weighs twice
        problems += load_problems(name, "train", args.question_field, args.answer_field)
    if args.eval_every and args.data == "tiny":
        held_out = load_problems("tiny-test")
    elif args.eval_every:
        different = list({p.question: p for p in problems}.values())
        count = min(HELD_OUT, len(different) // 10)
        if count == 0:
            raise ValueError("--eval-every holds out a tenth of the data, but there are only "
                             f"{len(different)} different problems: use 0")
        held_out = [different[i] for i in shuffled(len(different), "held out")[:count]]
        asked = {p.question for p in held_out}  # no question is in both parts
        problems = [p for p in problems if p.question not in asked]

    positions = read_json(folder / "config.json")["max_position_embeddings"]
    limit = min(args.max_prompt_tokens, positions - args.max_new_tokens)

    def short_enough(candidates, what):
        lengths = [len(encode_prompt(tokenizer, p.question)) for p in candidates]
        kept = [p for p, length in zip(candidates, lengths) if length <= limit]
        skipped = len(candidates) - len(kept)
        if candidates and not kept:
            raise ValueError(f"all {skipped} {what} are longer than --max-prompt-tokens "
                             f"{args.max_prompt_tokens} or leave no room for --max-new-tokens "
                             f"{args.max_new_tokens} in {positions} positions: the shortest has "
                             f"{min(lengths)} tokens")
        if skipped:
            print(f"note: {skipped} of {len(candidates)} {what} are longer than {limit} tokens and "
                  "are skipped", file=sys.stderr)
        return kept

    problems = short_enough(problems, "prompts")
    held_out = short_enough(held_out, "held-out prompts")
    if len(problems) < args.prompts_per_step:
        raise ValueError(f"--prompts-per-step {args.prompts_per_step} is more than the "
                         f"{len(problems)} problems of {args.data}")
    return problems, held_out


def batch_of(problems: list[Problem], step: int, count: int, seed: int) -> list[Problem]:
    """The problems of a step: the step-th slice of an endless row of shuffled passes over the data.
    It depends on the arguments alone, so a resumed run needs no memory of where it was."""
    batch = []
    for k in range(step * count, (step + 1) * count):
        epoch, place = divmod(k, len(problems))
        batch.append(problems[shuffled(len(problems), f"{seed} {epoch}")[place]])
    return batch


@functools.lru_cache(maxsize=4)
def shuffled(size: int, key: str) -> tuple[int, ...]:
    """The numbers below `size` in an order that follows from `key`."""
    order = list(range(size))
    random.Random(key).shuffle(order)
    return tuple(order)
