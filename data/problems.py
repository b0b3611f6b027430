"""Problems: a question and the reference of its final answer, from your file or a published set.

    load_problems("my.jsonl")       one JSON object a line with question (or problem) and answer
    load_problems("gsm8k", "test")  a published set; one that is not split ignores the split
    load_problems("tiny")           the embedded model's own problems (data/tiny_world.py)

Published files (data/published.json) are looked for in $SA_DATA, then in our cache, and are
downloaded into the cache when absent. Training sets are filtered and cut as by the authors (github.
com/amazon-science/Self-Aligned-Reward-Towards_Effective_and_Efficient_Reasoners): MATH and
NuminaMath keep problems whose answer is a number, every source gives at most 10,000, NuminaMath is
split 92 to 8. Their draw used other random number generators: ours is as large, not the same.
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

from data.files import file_sha256, one_line, read_json
from data.hub import cache_folder, download, download_lock, endpoint
from data.prompts import encode_prompt
from data.tiny_world import tiny_problems

MAX_PER_SOURCE = 10_000  # problems (the authors' merge_datasets.py)
NUMINA_TEST_SHARE = 0.08  # the authors' openr1.py
SEED = 42  # of the numina split and of every draw of MAX_PER_SOURCE
HELD_OUT = 320  # problems kept from training, at most, where the data has no test set of its own

PUBLISHED = read_json(Path(__file__).with_name("published.json"))
NUMINA = [file for file in PUBLISHED if file.startswith("NuminaMath")]
LOGICBENCH = [file for file in PUBLISHED if file.startswith("logicbench")]
JSONL_SETS = {entry["name"]: file for file, entry in PUBLISHED.items() if "name" in entry}
JSONL_SETS["gsm-symbolic"] = JSONL_SETS["gsm-symbolic-p1"]  # which the authors evaluate
SPLIT_SETS = ["tiny", "gsm8k", "math", "numina"]
NAMES = [*SPLIT_SETS, *JSONL_SETS, "logicbench", "prontoqa"]
EXPECTED = "expected one JSON object a line with question (or problem) and answer"


@dataclass
class Problem:
    question: str
    answer: str  # the reference of the final answer only, never the solution


def load_problems(name_or_path: str, split: str = "train") -> list[Problem]:
    """Read problems from a JSONL file or a published set (one of NAMES), in the file's order.

    split: "train" or "test", for SPLIT_SETS; NAME-train and NAME-test say it in the name. Raises
    ValueError for content that cannot be used, FileNotFoundError for what cannot be had.
    """
    if split not in ("train", "test"):
        raise ValueError(f"a split is 'train' or 'test', not {split!r}")
    name = str(name_or_path)
    path = Path(os.path.expanduser(name))
    if name and path.exists() and name not in NAMES:
        return read_jsonl(path)
    base, _, ending = name.rpartition("-")
    if base in SPLIT_SETS and ending in ("train", "test"):
        name, split = base, ending
    if name == "tiny":
        return [Problem(*pair) for pair in tiny_problems(split)]
    if name == "gsm8k":
        return at_most(f"gsm8k {split}", read_jsonl(published(f"gsm8k_{split}.jsonl")))
    if name == "math":
        return math_problems(split)
    if name == "numina":
        return numina_problems(split)
    if name == "logicbench":
        return at_most(name, logicbench_problems())
    if name == "prontoqa":
        return at_most(name, prontoqa_problems())
    if name not in JSONL_SETS:
        raise FileNotFoundError(f"data {name!r} is neither a file nor one of {', '.join(NAMES)}")
    problems = read_jsonl(published(JSONL_SETS[name]))
    if name == "aime24":  # published with three digits, as 033
        problems = [Problem(p.question, p.answer.lstrip("0") or "0") for p in problems]
    return at_most(name, problems)


def read_jsonl(path: Path) -> list[Problem]:
    """Problems from a JSONL file; blank lines, byte order marks and CRLF are fine."""
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file: problems are read from a JSONL file")
    problems = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8").strip("\ufeff \t\r\n")
                row = json.loads(text) if text else None
            except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
                why = one_line(error)
                raise ValueError(f"{where} is not valid JSON ({why}): {EXPECTED}") from None
            if text:
                problems.append(problem_from(row, where))
    if not problems:
        raise ValueError(f"{path} holds no problems: {EXPECTED}")
    return problems


def problem_from(row: dict, where: str) -> Problem:
    """Check an object with "question" or "problem", and "answer" (text or a number).

    In GSM8K's published form the answer is a worked solution: the reference is what follows ####,
    and calculator marks such as <<48/2=24>> are dropped. `where` opens every ValueError.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object but a {type(row).__name__}: {EXPECTED}")
    question, answer = row.get("question", row.get("problem")), row.get("answer")
    if question is None or answer is None:
        fields = ", ".join(map(repr, list(row)[:12])) or "(none)"
        raise ValueError(f"{where} has the fields {fields}: {EXPECTED}")
    if isinstance(answer, float) and answer.is_integer() and abs(answer) < 2**53:
        answer = int(answer)  # 27.0 says 27; beyond 2^53 a float's digits are not its own
    if type(answer) in (int, float) and abs(answer) < math.inf:
        answer = str(answer)
    for field, value in (("question", question), ("answer", answer)):
        if not isinstance(value, str):
            raise ValueError(f"{where}: the {field} is neither text nor a number: {value!r:.60}")
    if "####" in answer:
        answer = re.sub(r"<<[^<>\n]*>>", "", answer).rpartition("####")[2]
    problem = Problem(question.strip(), answer.strip())
    for field, value in vars(problem).items():
        if not value:
            raise ValueError(f"{where}: the {field} is blank")
        if re.search("[\ud800-\udfff]", value):  # JSON can write it, and no tokenizer can read it
            raise ValueError(f"{where}: the {field} holds half a character (a lone surrogate)")
    return problem


def at_most(name: str, problems: list[Problem], how: str = "") -> list[Problem]:
    """At most MAX_PER_SOURCE problems, drawn with a fixed seed. Says on stderr what was kept."""
    if len(problems) > MAX_PER_SOURCE:
        problems = random.Random(SEED).sample(problems, MAX_PER_SOURCE)
        how = f"{how}, {len(problems)} drawn with seed {SEED}".removeprefix(", ")
    how = f" ({how})" if how else ""
    if os.environ.get("RANK", "0") == "0":
        print(f"{name}: {len(problems)} problems{how}", file=sys.stderr)
    return problems


def published(file: str) -> Path:
    """A published file, from $SA_DATA, our cache, or the network, with its SHA-256 checked."""
    url = PUBLISHED[file]["url"].replace("https://huggingface.co", endpoint())
    sha256 = PUBLISHED[file]["sha256"]
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
        where = f"neither at {given} ($SA_DATA) nor at {ours}, and could not be had from {url}"
        why = f"{one_line(error)}): put it there by hand"
        raise FileNotFoundError(f"{file} is {where} ({why}") from error
    if sha256 and file_sha256(path) != sha256:
        raise ValueError(f"{path} is not the published file (its SHA-256 is not {sha256}): delete "
                         "it, or give its path as the data to use it as it is")
    return path


def math_problems(split: str) -> list[Problem]:
    """MATH (Hendrycks et al. 2021): the answer is what the solution boxes last."""
    wanted = re.compile(rf"MATH/{split}/\w+/\d+\.json")
    problems = []
    with tarfile.open(published("MATH.tar")) as archive:  # nothing is unpacked onto the disk
        members = [m for m in archive if m.isfile() and wanted.fullmatch(m.name)]
        members.sort(key=lambda m: (m.name.split("/")[2], int(Path(m.name).stem)))
        for member in members:
            row = json.load(archive.extractfile(member))
            row["answer"] = last_boxed(row["solution"])
            if row["answer"] and is_number(row["answer"]):
                problems.append(problem_from(row, f"MATH.tar, {member.name}"))
    how = f"{len(problems)} of {len(members)} have a numeric answer"
    return at_most(f"math {split}", problems, how)


def numina_problems(split: str) -> list[Problem]:
    """NuminaMath 1.5: valid word problems whose answer is a number."""
    try:  # before gigabytes are fetched that cannot be read
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError("numina is a set of Parquet files: pip install pyarrow") from None
    kept, read = {}, 0
    for path in map(published, NUMINA):
        for batch in ParquetFile(path).iter_batches(batch_size=4096):
            read += len(batch)
            for row in filter(is_word_problem, batch.to_pylist()):
                problem = problem_from(row, str(path))
                kept.setdefault(problem.question, problem)  # else it could stand in both splits
    problems = list(kept.values())
    random.Random(SEED).shuffle(problems)
    test = round(NUMINA_TEST_SHARE * len(problems))
    part = problems[:test] if split == "test" else problems[test:]
    how = f"{len(problems)} of {read} are different valid word problems with a numeric answer"
    return at_most(f"numina {split}", part, how)


def is_word_problem(row: dict) -> bool:
    """The authors' filter for NuminaMath 1.5."""
    problem, solution = row["problem"] or "", row["solution"] or ""
    valid = row["problem_is_valid"] == "Yes" and row["solution_is_valid"] == "Yes"
    asked = row["question_type"] == "math-word-problem" and problem.strip() != ""
    linked = "http" in problem or "http" in solution
    return valid and asked and not linked and is_number(row["answer"] or "")


def logicbench_problems() -> list[Problem]:
    """LogicBench(Eval) MCQA: the choices become lettered lines, the reference is a letter."""
    problems = []
    for path in map(published, LOGICBENCH):
        for sample in read_json(path)["samples"]:
            choices = {key: text.strip() for key, text in sample["choices"].items()}
            filled = [key for key, text in choices.items() if text]  # one choice is blank
            letters = dict(zip(filled, "ABCDEFGH"))
            lines = [f"{letter}. {choices[key]}" for key, letter in letters.items()]
            lines = [sample["context"].strip(), sample["question"].strip(), *lines,
                     "Answer with the letter of the right choice."]
            problems.append(Problem("\n".join(lines), letters[sample["answer"]]))
    return problems


def prontoqa_problems() -> list[Problem]:
    """ProntoQA as Logic-LM published it: context and statement, the reference True or False."""
    problems = []
    for sample in json.loads(published("prontoqa_dev.json").read_text(encoding="utf-8")):
        options = dict(option.split(") ", 1) for option in sample["options"])  # "A) True"
        question = f"{sample['context'].strip()}\n{sample['question'].strip()}"
        question += " Answer with True or False."
        problems.append(Problem(question, options[sample["answer"]]))
    return problems


def last_boxed(solution: str) -> str | None:
    r"""What the last \boxed{...} or \fbox{...} of a LaTeX solution holds; None if there is none."""
    start = max(solution.rfind("\\boxed"), solution.rfind("\\fbox"))
    if start < 0:
        return None
    rest = solution[start:].removeprefix("\\boxed").removeprefix("\\fbox").lstrip()
    if not rest.startswith("{"):  # \boxed 7
        return re.split(r"[\s$]", rest, maxsplit=1)[0].rstrip(".") or None
    depth = 0
    for position, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:position].strip()
    return None


def is_number(answer: str) -> bool:
    r"""The authors' filter for numeric references: at most 20 characters, and besides at most one
    \frac{a}{b} of positive whole numbers only digits, signs, points, brackets and backslashes."""
    rest = re.sub(r"\\frac\{[1-9][0-9]*\}\{[1-9][0-9]*\}", "", answer, count=1)
    has_digit = any(character in "0123456789" for character in answer)
    return has_digit and len(answer) <= 20 and set(rest) <= set("0123456789-.()\\")


def training_problems(args, tokenizer, folder: Path) -> tuple[list[Problem], list[Problem]]:
    """(the problems to train on, the problems held out for --eval-every).

    Prompts longer than --max-prompt-tokens, or than the positions of the model in `folder` leave
    room for beside an answer, are skipped and counted, never cut. The embedded model's data has
    its own test set. Elsewhere a tenth (at most HELD_OUT) is held out, chosen by the data alone.
    """
    problems, held_out = [], []
    for name in args.data.split(","):
        problems += load_problems(name)
    if args.eval_every and args.data == "tiny":
        held_out = load_problems("tiny-test")
    elif args.eval_every:
        count = min(HELD_OUT, len(problems) // 10)
        if count == 0:
            raise ValueError("--eval-every holds out a tenth of the data, but there are only "
                             f"{len(problems)} problems: use 0")
        order = shuffled(len(problems), "held out")
        held_out = [problems[i] for i in order[:count]]
        problems = [problems[i] for i in sorted(order[count:])]

    positions = read_json(folder / "config.json")["max_position_embeddings"]
    limit = min(args.max_prompt_tokens, positions - args.max_new_tokens)
    if limit < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt: "
                         f"{folder} has {positions} positions")

    def short_enough(candidates: list[Problem], what: str) -> list[Problem]:
        lengths = [len(encode_prompt(tokenizer, p.question)) for p in candidates]
        kept = [p for p, length in zip(candidates, lengths) if length <= limit]
        skipped = len(candidates) - len(kept)
        if candidates and not kept:
            raise ValueError(f"all {skipped} {what} are longer than --max-prompt-tokens "
                             f"{args.max_prompt_tokens}, or leave no room for an answer within "
                             f"{positions} positions (the shortest has {min(lengths)} tokens)")
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

    It depends on the arguments alone, so a resumed run needs no memory of where it was.
    """
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
