"""Problems: a question and the reference of its final answer, from a file of yours or from a published set.

    load_problems("my.jsonl")             JSONL: one object a line with question (or problem) and answer
    load_problems("gsm8k", "test")        a published set; sets with one split only ignore the split
    load_problems("tiny")                 the embedded model's own problems (data/make_tiny.py)

Published files are looked for in $SA_DATA, then in our cache ($SA_CACHE/data, else ~/.cache/self-aligned-reward/data), and
are downloaded into the cache when absent; their SHA-256 is checked every time (for GSM-Symbolic's p1 none is on record: there
it is that of the first download).

Training sets are filtered and cut as the authors' examples/data_preprocess does it (github.com/amazon-science/Self-Aligned-
Reward-Towards_Effective_and_Efficient_Reasoners): MATH and NuminaMath keep problems whose answer is a number, every source gives
at most 10,000, NuminaMath is split 92 to 8. Their draw used other random number generators, so ours is as large but not the same.
"""
import json
import math
import os
import random
import re
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from data.hub import cache_folder, download, endpoint, file_sha256, lock, one_line

MAX_PER_SOURCE = 10_000  # problems (the authors' merge_datasets.py)
NUMINA_TEST_SHARE = 0.08  # the authors' openr1.py
SEED = 42  # of the numina split and of every draw of MAX_PER_SOURCE
MAX_LINE = 16 * 2**20  # bytes; a longer line is no problem but a mistake, and would only fill the memory


@dataclass
class Problem:
    question: str
    answer: str  # the reference of the final answer only, never the solution


def load_problems(name_or_path: str, split: str = "train") -> list[Problem]:
    """Read problems from a JSONL file or a published set (one of NAMES).

    split: "train" or "test", for the names that have both (tiny, gsm8k, math, numina); NAME-train and NAME-test say it in
    the name. Files come back in their order. Raises ValueError (file and line, what is accepted) for content that cannot be
    used and FileNotFoundError for a name or file that cannot be had, with one sentence each.
    """
    if split not in ("train", "test"):
        raise ValueError(f"a split is 'train' or 'test', not {split!r}")
    name = str(name_or_path)
    path = Path(name).expanduser()
    if name and path.exists() and name not in NAMES:
        return read_jsonl(path)
    for ending in ("train", "test"):
        if name.endswith(f"-{ending}") and name.removesuffix(f"-{ending}") in ("tiny", "gsm8k", "math", "numina"):
            name, split = name.removesuffix(f"-{ending}"), ending
    if name == "tiny":
        from data.make_tiny import tiny_problems  # only here: it is the one set that needs no file
        return tiny_problems(split)
    if name == "gsm8k":
        return cut(name, split, read_jsonl(published(f"gsm8k_{split}.jsonl")))
    if name == "math":
        return math_problems(published("MATH.tar"), split)
    if name == "numina":
        parquet_reader()  # before gigabytes are fetched that cannot be read
        return numina_problems([published(file) for file in NUMINA], split)
    if name == "logicbench":
        return cut(name, "", [problem for axiom in LOGICBENCH
                              for problem in logicbench_problems(published(f"logicbench/MCQA/{axiom}/data_instances.json"))])
    if name == "prontoqa":
        return cut(name, "", prontoqa_problems(published("prontoqa_dev.json")))
    if name in JSONL_SETS:
        problems = read_jsonl(published(JSONL_SETS[name]))
        if name == "aime24":  # published with three digits, as 033
            problems = [Problem(p.question, p.answer.lstrip("0") or "0") for p in problems]
        return cut(name, "", problems)
    raise FileNotFoundError(f"data {name!r} is neither a file nor one of the names {', '.join(NAMES)}")


# ----------------------------------------------------------------------------------------------------------------------
# JSONL


def read_jsonl(path: Path) -> list[Problem]:
    """Problems from a file with one JSON object a line: "question" or "problem", and "answer" (text or a number).

    In GSM8K's published form the answer is a worked solution: the reference is what follows ####, and calculator marks
    such as <<48/2=24>> are dropped. Blank lines, byte order marks and CRLF are fine. Raises ValueError naming file and line.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file: problems are read from a JSONL file")
    problems = []
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > MAX_LINE:
                raise ValueError(f"{where} is longer than {MAX_LINE >> 20} MiB: expected one JSON object a line")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where} is not UTF-8 text ({error.reason} at byte {error.start} of the line)") from error
            text = text.strip("\ufeff \t\r\n")
            if text:
                problems.append(problem_from(text, where))
    if not problems:
        raise ValueError(f"{path} holds no problems: expected one JSON object a line with question (or problem) and answer")
    return problems


def problem_from(text: str, where: str) -> Problem:
    """One problem from the text of one JSON object; `where` opens the message of every ValueError."""
    try:
        row = json.loads(text, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({one_line(error)})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object but a {type(row).__name__}: expected question (or problem) and answer")
    question = row["question"] if "question" in row else row.get("problem")
    if question is None or row.get("answer") is None:
        raise ValueError(f"{where} has the fields {', '.join(map(repr, list(row)[:12])) or '(none)'}: expected question "
                         "(or problem) and answer")
    return make_problem(question, row["answer"], where)


def make_problem(question: object, answer: object, where: str) -> Problem:
    """Check a question and an answer from a file and bring the answer into its final form."""
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ValueError(f"{where}: the answer is a number too large to read")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        # 27.0 says 27; beyond 2^53 a float's digits are not its own
        answer = str(int(answer)) if answer == int(answer) and abs(answer) < 2**53 else str(answer)
    for field, value in (("question", question), ("answer", answer)):
        if not isinstance(value, str):
            raise ValueError(f"{where}: the {field} is a {type(value).__name__}, expected text" +
                             (" or a number" if field == "answer" else ""))
    if "####" in answer:
        answer = re.sub(r"<<[^<>\n]*>>", "", answer).rpartition("####")[2]
    question, answer = question.strip(), answer.strip()
    for field, value in (("question", question), ("answer", answer)):
        if not value:
            raise ValueError(f"{where}: the {field} is blank")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair, which no tokenizer can read
            raise ValueError(f"{where}: the {field} holds half a character (\\u{ord(value[error.start]):04x})") from error
    return Problem(question, answer)


def no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


# ----------------------------------------------------------------------------------------------------------------------
# published sets: what each file is turned into


def math_problems(tar: Path, split: str) -> list[Problem]:
    """MATH (Hendrycks et al. 2021) from its published archive: the answer is what the solution boxes last."""
    problems = []
    with tarfile.open(tar) as archive:
        members = [m for m in archive if m.isfile() and re.fullmatch(rf"MATH/{split}/\w+/\d+\.json", m.name)]
        members.sort(key=lambda m: (m.name.split("/")[2], int(Path(m.name).stem)))
        for member in members:  # read in place: nothing is unpacked onto the disk
            row = json.loads(archive.extractfile(member).read(MAX_LINE))
            answer = last_boxed(row["solution"])
            if answer and is_number(answer):
                problems.append(make_problem(row["problem"], answer, f"{tar}, {member.name}"))
    return cut("math", split, problems, f"{len(problems)} of {len(members)} have a numeric answer")


def parquet_reader():
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError("numina is published as Parquet, and reading it needs pyarrow: pip install pyarrow") from error
    return ParquetFile


def numina_problems(files: list[Path], split: str) -> list[Problem]:
    """NuminaMath 1.5 from its published Parquet files: word problems marked valid whose answer is a number."""
    columns = ["problem", "solution", "answer", "question_type", "problem_is_valid", "solution_is_valid"]
    kept, read = {}, 0
    for file in files:
        for batch in parquet_reader()(file).iter_batches(batch_size=4096, columns=columns):
            for row in batch.to_pylist():
                read += 1
                if (row["question_type"] == "math-word-problem" and row["problem_is_valid"] == "Yes"
                        and row["solution_is_valid"] == "Yes" and is_number(row["answer"] or "")
                        and (row["problem"] or "").strip()
                        and "http" not in row["problem"] and "http" not in (row["solution"] or "")):
                    problem = make_problem(row["problem"], row["answer"], str(file))
                    kept.setdefault(problem.question, problem)  # a question asked twice must not stand in both splits
    problems = list(kept.values())
    random.Random(SEED).shuffle(problems)
    test = round(NUMINA_TEST_SHARE * len(problems))
    part = problems[:test] if split == "test" else problems[test:]
    return cut("numina", split, part, f"{len(problems)} of {read} are different valid word problems with a numeric answer, "
                                      f"{len(part)} of them for {split}")


def logicbench_problems(path: Path) -> list[Problem]:
    """One file of LogicBench(Eval) MCQA: the choices become lettered lines, the reference the right one's letter."""
    problems = []
    for sample in json.loads(path.read_text(encoding="utf-8"))["samples"]:
        where = f"{path}, sample {sample['id']}"
        choices = {key: text.strip() for key, text in sample["choices"].items() if text.strip()}  # one choice is blank
        if sample["answer"] not in choices:
            raise ValueError(f"{where}: the answer {sample['answer']!r} is none of the choices")
        letters = dict(zip(choices, "ABCDEFGH"))
        lines = [sample["context"].strip(), sample["question"].strip(), *(f"{letters[key]}. {choices[key]}" for key in choices),
                 "Answer with the letter of the right choice."]
        problems.append(make_problem("\n".join(lines), letters[sample["answer"]], where))
    return problems


def prontoqa_problems(path: Path) -> list[Problem]:
    """ProntoQA as Logic-LM published it: context and statement, the reference True or False."""
    problems = []
    for sample in json.loads(path.read_text(encoding="utf-8")):
        where = f"{path}, {sample['id']}"
        options = dict(option.split(") ", 1) for option in sample["options"])  # "A) True" -> {"A": "True"}
        if options.get(sample["answer"]) not in ("True", "False"):
            raise ValueError(f"{where}: the answer {sample['answer']!r} is neither True nor False in {sample['options']}")
        question = f"{sample['context'].strip()}\n{sample['question'].strip()} Answer with True or False."
        problems.append(make_problem(question, options[sample["answer"]], where))
    return problems


def last_boxed(solution: str) -> str | None:
    r"""What the last \boxed{...} of a LaTeX solution holds, braces balanced; also \fbox and \boxed 7. None if there is none."""
    start = max(solution.rfind("\\boxed"), solution.rfind("\\fbox"))
    if start < 0:
        return None
    rest = solution[start:].removeprefix("\\boxed").removeprefix("\\fbox").lstrip()
    if not rest.startswith("{"):
        return re.split(r"[\s$]", rest, maxsplit=1)[0].rstrip(".") or None
    depth = 0
    for position, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:position].strip()
    return None


def is_number(answer: str) -> bool:
    r"""The authors' filter for numeric references: at most 20 characters, and besides at most one \frac{a}{b} of positive
    whole numbers nothing but digits, signs, points, brackets and backslashes."""
    rest = re.sub(r"\\frac\{[1-9][0-9]*\}\{[1-9][0-9]*\}", "", answer, count=1)
    return len(answer) <= 20 and set(rest) <= set("0123456789-.()\\") and any(c in "0123456789" for c in answer)


def cut(name: str, split: str, problems: list[Problem], how: str = "") -> list[Problem]:
    """At most MAX_PER_SOURCE of them, drawn with a fixed seed, and a line on stderr that says what was kept."""
    kept = problems
    if len(problems) > MAX_PER_SOURCE:
        kept = random.Random(SEED).sample(problems, MAX_PER_SOURCE)
    if os.environ.get("RANK", "0") == "0":
        drawn = f", {len(kept)} drawn with seed {SEED}" if len(kept) < len(problems) else ""
        print(f"{name} {split}".strip() + f": {len(kept)} problems" + (f" ({how}{drawn})" if how or drawn else ""), file=sys.stderr)
    return kept


# ----------------------------------------------------------------------------------------------------------------------
# published sets: where the files come from


def published(file: str) -> Path:
    """A published file, from $SA_DATA, our cache, or the network, with its recorded SHA-256 checked. Where FILES records none,
    the one that the download came with is kept beside it and holds from then on."""
    url, sha256 = FILES[file]
    url = url.replace("https://huggingface.co", endpoint())
    ours = cache_folder() / "data" / file
    record = ours.with_name(f"{ours.name}.sha256")
    if not sha256 and record.is_file():
        sha256 = record.read_text().strip()
    given = Path(os.environ["SA_DATA"]).expanduser() / file if os.environ.get("SA_DATA") else None
    for path in (given, ours):
        if path is not None and path.is_file():
            if sha256 and file_sha256(path) != sha256:
                raise ValueError(f"{path} is not the published file (SHA-256 {file_sha256(path)}, expected {sha256}): delete "
                                 "it to have it downloaded, or give its path as the data to use it as it is")
            return path
    try:
        ours.parent.mkdir(parents=True, exist_ok=True)
        with lock(cache_folder() / "data" / ".lock"):
            if not ours.is_file():  # else another process brought it while we waited
                download(url, ours, sha256)
                if not sha256:
                    record.write_text(file_sha256(ours) + "\n")
                    print(f"no SHA-256 was on record for {ours}: it came with {file_sha256(ours)}, which {record.name} now records",
                          file=sys.stderr)
    except OSError as error:
        looked = f"{given} nor at {ours}" if given else f"{ours} ($SA_DATA is not set)"
        raise FileNotFoundError(f"{file} is not at {looked}, and could not be downloaded from {url} ({one_line(error)}): put "
                                "it there by hand") from error
    return ours


GITHUB = "https://raw.githubusercontent.com"
HUB = "https://huggingface.co/datasets"
GSM_SYMBOLIC = f"{GITHUB}/apple-aiml-research/ml-gsm-symbolic/b6a1625025fc857300203bac9f617e5d8ec99f65/generated_data"
QWEN_MATH = f"{GITHUB}/QwenLM/Qwen2.5-Math/main/evaluation/data"
NUMINA = [f"NuminaMath-1.5/train-0000{i}-of-00003.parquet" for i in range(3)]
JSONL_SETS = {
    "math500": "math500_test.jsonl",
    "gsm-symbolic": "gsm_symbolic_p1.jsonl",  # the variant that the authors' gsm_symbolic.py evaluates
    "gsm-symbolic-main": "gsm_symbolic_main.jsonl",
    "gsm-symbolic-p1": "gsm_symbolic_p1.jsonl",
    "gsm-symbolic-p2": "gsm_symbolic_p2.jsonl",
    "aime24": "aime24_test.jsonl",
    "amc23": "amc23_test.jsonl",
}
NAMES = ["tiny", "gsm8k", "math", "numina", *JSONL_SETS, "logicbench", "prontoqa"]
FILES = {  # file name -> (address, SHA-256 or None where none is on record)
    "gsm8k_train.jsonl": (
        f"{GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/train.jsonl",
        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
    "gsm8k_test.jsonl": (
        f"{GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/test.jsonl",
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    "MATH.tar": (  # the Internet Archive's copy of the published archive; its first address is not dependable
        "https://web.archive.org/web/20240101000000id_/https://people.eecs.berkeley.edu/~hendrycks/MATH.tar",
        "0fbe4fad0df66942db6c221cdcc95b298cc7f4595a2f0f518360cce84e90d9ac"),
    "math500_test.jsonl": (
        f"{HUB}/HuggingFaceH4/MATH-500/resolve/main/test.jsonl",
        "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132"),
    "gsm_symbolic_main.jsonl": (
        f"{GSM_SYMBOLIC}/GSM_symbolic.jsonl", "945055837b232bd9b56827b1e3a5aa019075f29e8ba4669d9a9df8b4439a291f"),
    "gsm_symbolic_p1.jsonl": (f"{GSM_SYMBOLIC}/GSM_p1.jsonl", None),
    "gsm_symbolic_p2.jsonl": (
        f"{GSM_SYMBOLIC}/GSM_p2.jsonl", "f7d6701619f824f4fedd0a914b1cfbc0fd31f61617887aa7fe318d018dda3f29"),
    "aime24_test.jsonl": (
        f"{QWEN_MATH}/aime24/test.jsonl", "af2b8bd2aa911b6333ad0df32f3ca05c7ae8ed10f1731f4372c8ae26990bf7ac"),
    "amc23_test.jsonl": (
        f"{QWEN_MATH}/amc23/test.jsonl", "43707e1ca784602d8479de24ee8ce36609dbebc46dd152b0b12a46611aa898a4"),
    "prontoqa_dev.json": (
        f"{GITHUB}/teacherpeterpan/Logic-LLM/main/data/ProntoQA/dev.json",
        "2d2e9d0adbef05cd66b51d11516b8fb3d3fb2cbc1664867d1123a000f7b11a5f"),
    NUMINA[0]: (
        f"{HUB}/AI-MO/NuminaMath-1.5/resolve/1b05109f9e5c1ad06c0663519502416c30b300f8/data/train-00000-of-00003.parquet",
        "1e37cedcc5104c0d5a9afbf8b26328a59d7005cd37c2bd08352419f5f0e03214"),
    NUMINA[1]: (
        f"{HUB}/AI-MO/NuminaMath-1.5/resolve/1b05109f9e5c1ad06c0663519502416c30b300f8/data/train-00001-of-00003.parquet",
        "bc48fdddc1ab4e559727ad4f1f03b0263785c1c16b7964fb885fba07e18d6a39"),
    NUMINA[2]: (
        f"{HUB}/AI-MO/NuminaMath-1.5/resolve/1b05109f9e5c1ad06c0663519502416c30b300f8/data/train-00002-of-00003.parquet",
        "951aa899fe2a1b64f5b40c6636372d35b9db4f0b9c922e874d4bf357db64da66"),
}
LOGICBENCH = {  # LogicBench(Eval)/MCQA: logic/axiom -> SHA-256 of its data_instances.json
    "first_order_logic/bidirectional_dilemma": "f842f0fd5613b86081fa43e74653a57a51bfc5d62f44f3d66e380e642d968d40",
    "first_order_logic/constructive_dilemma": "0ee3441e4b6689ce9dbabbea217ce351630586d5bc2eb4b96a6001544e4a6f7f",
    "first_order_logic/destructive_dilemma": "36bc261811f646f26af769e3958316221b792407ce31e49a0e6c07208b65f010",
    "first_order_logic/disjunctive_syllogism": "80dbe87805515aa493e703fdf8089943308376c833edae540bddf05c1a4640c7",
    "first_order_logic/existential_generalization": "0137e5eba93d4ebd4041c0905e7687123cd3bf5b269d7cf4ca990a58cccf99e6",
    "first_order_logic/hypothetical_syllogism": "7b6e3ba3dd58c6fd6b5e1ef726677f2a87da502527233453bbb28db4d8eb7e8f",
    "first_order_logic/modus_ponens": "fcf81d8bd0da702fedd1e27b42ba62567aa650225c3500caed5a7b4530298b63",
    "first_order_logic/modus_tollens": "c8c1666bb67c7690bc7a33eb5334eb64e060197658c1fe5d0201d8dc60190c2b",
    "first_order_logic/universal_instantiation": "f3e2075113928c0a72eba602f6523994df3f44003cef2af3b3044022efe1e83f",
    "nm_logic/default_reasoning_default": "fefa3f7c02aea474361001fd9f3f889df2668b1b4e1e744661831c1398e07450",
    "nm_logic/default_reasoning_irr": "301e55669b8915d9e453c159579b33fa3e13112d57f4fb81a5d821c374f27cee",
    "nm_logic/default_reasoning_open": "56269349b56a416e3bce4f4145aa9b989db62072865759573a755cf45cafac84",
    "nm_logic/default_reasoning_several": "d1578ac46d5f7c58436d8f138c8b884649e8946dd5cbe15cf91a4fe49b2c1c3d",
    "nm_logic/reasoning_about_exceptions_1": "f895455e05a06bc83a136fad4de8c010911107461e1e4fdab7bc36338a9b69be",
    "nm_logic/reasoning_about_exceptions_2": "96d7e6b432db502a823714b0bed37b420e740b4fa674ad4c9306253cf9c3551d",
    "nm_logic/reasoning_about_exceptions_3": "de75acea7caf8a9ba53b0a60dc307e6fe664244a0474e960d051f58ff7fbcf5a",
    "nm_logic/reasoning_about_priority": "0412e9a57bacf153af3f163688215cc55c0deedcef45c82c6298711a81f55d36",
    "propositional_logic/bidirectional_dilemma": "1116e6464b0dd93090431d2fe57d99719f9173e01e1512ffd7e3f4b40ca4f762",
    "propositional_logic/commutation": "c27b35a71b4f4295e75761f1d0d15683633251a4c0de3e6d416a3675f3a470be",
    "propositional_logic/constructive_dilemma": "954066cb7d5877948e15b4414f8f24cc8da237b27e00c35ac3418a6edb4ed330",
    "propositional_logic/destructive_dilemma": "b6c53a8c4ce0cc1f8a94aafb5dcc1339dd93ac2260f5e9247175af831917f04e",
    "propositional_logic/disjunctive_syllogism": "6dc1802379417d39df327231ed6ab2cdefeb32eda8c983440fbbb05bf6c436d4",
    "propositional_logic/hypothetical_syllogism": "0d653f6e41261163bc59303dfbb9cf76ba83ffeacb65805f3d2d8c1d4b273db4",
    "propositional_logic/material_implication": "130ccec84e7bece9ef3b1e1a90d03496232042c648e93b2f0876c6cfe9aace7d",
    "propositional_logic/modus_tollens": "dd91ca5312526b8913bcc165a797dfc47b8317a7c831ff45a949e06c28f0c5e6",
}
for axiom, sha256_of_axiom in LOGICBENCH.items():
    FILES[f"logicbench/MCQA/{axiom}/data_instances.json"] = (
        f"{GITHUB}/Mihir3009/LogicBench/7aeb0659d41d6dc7aeb4e64712de1ab0017f4603/data/LogicBench(Eval)/MCQA/{axiom}/"
        "data_instances.json", sha256_of_axiom)
