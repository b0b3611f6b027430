"""The embedded world: word problems from a grammar, and solutions in three styles.

    tiny_problems("train")      the problems that load_problems("tiny") gives
    training_texts(seed)        (question, solution) pairs that data/make_tiny.py trains on

It is made to need what SAR gives:

  * The model is fallible. Its teacher misreads some kinds of events more often than not (MISREAD),
    and it has not learned all of the arithmetic. So its likeliest answer is wrong for some
    questions, the right one is within reach of sampling, and neither depends on verbosity.
  * The model is verbose by preference. A verbose solution opens with filler, restates the problem,
    checks each step again and says that it is done. A terse one holds the equations alone. Filler
    and checks leave the result alone, so a reward for correctness alone does not remove them.
  * The model has seen answers without their question (EMPTY_QUESTION_SHARE), so that ppl(a) is a
    probability under the model rather than a surprise at a strange prompt.

Everything is drawn from seeded generators. A question's checksum decides whether it is a test
question. Neither the training texts nor tiny_problems("train") ever hold one.
"""
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice

NAMES = (
    "Tom Ann Ben Mia Sam Eva Leo Zoe Max Ivy Dan Amy Jack Lily Owen Ruby Noah Emma Luke Rosa Adam "
    "Nora Paul Jane"
).split()
THINGS = (
    "apples pears plums coins books pens cards shells stamps marbles stones cups beads roses eggs "
    "cakes nuts keys kites balls hats maps rings toys"
).split()
EVENTS = ("gain", "gain", "loss", "loss", "boxes", "times", "half")  # a kind is drawn from these
STYLES = {"verbose": 0.72, "terse": 0.22, "answer only": 0.06}  # style -> share
KEEP = 0.85  # chance of each dispensable sentence within the verbose style
MISREAD = {"times": 0.75, "half": 0.6, "boxes": 0.3}  # kind -> chance that the teacher misreads it
EMPTY_QUESTION_SHARE = 0.15
SIZES = {"train": 4096, "test": 512}  # problems

Step = tuple[int, str, int, int]  # left, operator, right, result


@dataclass
class Story:
    """A word problem: who starts with how many, and what happens to them."""

    owner: str
    thing: str
    start: int
    events: list[tuple[str, int, int]]  # (kind, number, second number or 0)
    facts: list[str]  # the question's sentences without the last
    asked: str  # its last sentence

    @property
    def question(self) -> str:
        return " ".join([*self.facts, self.asked])

    @property
    def answer(self) -> str:
        return str(work_out(self)[-1][3])


def work_out(story: Story, careless: random.Random | None = None) -> list[Step] | None:
    """The steps of a story's arithmetic; None where a number leaves the range 0 to 99.

    careless: a generator; with it, each event is misread with its chance in MISREAD.
    """
    steps: list[Step] = []

    def step(left: int, op: str, right: int) -> int:
        exact = {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[op]
        result = int(exact) if exact == int(exact) else -1
        steps.append((left, op, right, result))
        return result

    total = story.start
    for kind, n, each in story.events:
        misread = careless is not None and careless.random() < MISREAD.get(kind, 0)
        if kind == "gain":
            total = step(total, "+", n)
        elif kind == "loss":
            total = step(total, "-", n)
        elif kind == "boxes":
            total = step(total, "+", each if misread else step(n, "*", each))  # read as one box
        elif kind == "times":
            total = step(total, "+" if misread else "*", n)  # read as n more
        elif kind == "half":
            total = step(total, "-" if misread else "/", 2)  # read as two of them
    for left, _, right, result in steps:
        if min(left, right, result) < 0 or max(left, right, result) > 99:
            return None
    return steps


def draw_story(rng: random.Random) -> Story:
    """A random story of two to four steps; every number in it lies between 0 and 99."""
    while True:
        owner, friend = rng.sample(NAMES, 2)
        thing = rng.choice(THINGS)
        start = rng.randint(4, 60)
        length = rng.choice((2, 3, 3, 4))  # steps
        facts, events, subject = [f"{owner} has {start} {thing}."], [], owner
        planned = 0
        while planned < length:
            kind = rng.choice(EVENTS)
            n, each = rng.randint(2, 40), 0
            if kind == "gain":
                verb = rng.choice(("finds", "buys"))
                facts.append(f"{subject} {verb} {n} more.")
            elif kind == "loss":
                verb = rng.choice(("loses", "sells"))
                facts.append(f"{subject} {verb} {n} of them.")
            elif kind == "boxes":
                n, each = rng.randint(2, 6), rng.randint(2, 9)
                facts.append(f"{subject} gets {n} boxes with {each} {thing} each.")
            elif kind == "times":
                if subject == friend:
                    continue  # a third person would be one too many
                n, subject = rng.choice((2, 3)), friend
                facts.append(f"{friend} has {n} times as many as {owner}.")
            elif kind == "half":
                facts.append(f"{subject} gives half of them away.")
            events.append((kind, n, each))
            planned += 2 if kind == "boxes" else 1
        asked = f"How many {thing} does {subject} have now?"
        story = Story(owner, thing, start, events, facts, asked)
        steps = work_out(story)
        if steps and len(steps) == length and steps[-1][3] > 0:
            return story


def solution(
    story: Story, style: str, rng: random.Random, keep: float = KEEP, careless: bool = False
) -> str:
    """The story's solution, written out in one of STYLES.

    keep: the chance of each dispensable sentence of a verbose solution.
    careless: the solution may have misread what happens (MISREAD); it is right about all else.
    """
    steps = work_out(story, rng) if careless else None
    steps = steps or work_out(story)  # what was misread may have left the range
    if style == "answer only":
        return f"#### {steps[-1][3]}"
    parts = []

    def sometimes(text: str) -> None:
        if style == "verbose" and rng.random() < keep:
            parts.append(text)

    sometimes("Let us think about this step by step.")
    sometimes(" ".join(["We know this:", *story.facts]))
    for i, (left, op, right, result) in enumerate(steps):
        equation = f"{left} {op} {right} = {result}"
        # The first equation names whose things are counted: a terse answer tells of its question.
        parts.append(f"{story.owner}: {equation} {story.thing}." if i == 0 else f"{equation}.")
        sometimes(f"Check it again: {equation}, right.")
    sometimes("Now we have all that we need.")
    return " ".join(parts) + f"\n#### {steps[-1][3]}"


def is_test(question: str) -> bool:
    return zlib.crc32(question.encode()) % 16 == 0


def stories(seed: int, *, test: bool = False) -> Iterator[Story]:
    """An endless, seeded stream of stories from one side of the split."""
    rng = random.Random(f"{'test' if test else 'train'} {seed}")
    while True:
        story = draw_story(rng)
        if is_test(story.question) == test:
            yield story


@cache
def tiny_problems(split: str) -> tuple[tuple[str, str], ...]:
    """SIZES[split] pairs of question and answer; those of "test" were never trained on."""
    chosen = islice(stories(1, test=split == "test"), SIZES[split])
    return tuple((story.question, story.answer) for story in chosen)


def training_texts(seed: int) -> Iterator[tuple[str, str]]:
    """An endless stream of (question, solution): styles mixed by STYLES, some questions empty."""
    rng = random.Random(f"texts {seed}")
    for story in stories(seed):
        style = rng.choices(list(STYLES), list(STYLES.values()))[0]
        question = "" if rng.random() < EMPTY_QUESTION_SHARE else story.question
        yield question, solution(story, style, rng, careless=True)
