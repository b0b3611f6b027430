r"""Does a response end in the right answer? Extraction, equivalence, and the verdict that becomes
the reward R_VR.

    judge(response, reference, verifier) -> Verdict(reward, answer, status)
    extract_answer(response) -> str | None
    is_equivalent(prediction, reference) -> bool

An answer goes through _tokens, _Parser, _value and _same. Nothing is executed; sizes are bounded.

Only what a response commits itself to earns reward. The first rule that applies decides:

  R0  Only what follows the last </think> counts; a <think> never closed: no answer.
  R1  The last \boxed{...} or \fbox{...} that is not blank; never closed means cut off: no answer.
      Boxes with fewer than five words or a hedge (or, maybe, ...) in between are one list; a
      correction (wait, actually, ...) in between leaves the last one alone.
  R1b The last <answer>...</answer>.
  R2  What follows the last "answer is", "answer:", "answer =" or a line that begins with (Final)
      Answer; or stands before "is our answer": the formula if one follows, else the words up to the
      end of the sentence or a reason (because, since, so, which, as). If they are not one answer,
      the last side of the line's last chain of =; else the one bold text, number or formula in the
      sentence; else what follows its last is, are, equals; none if it doubts (not, maybe, or, ...).
  R3  The last line that begins with #### and a number (how GSM8K writes it).
  R4  The whole response, if it is one line and a single word or without ordinary words. Headings
      and lines that mention an empty box do not count. R6 Else none: numbers alone are no answer.

The verifier "last-number" is the rule of the paper's public code instead, with its faults: the last
-?(\d+\.?\d*|\.\d+) or plain \frac{a}{b} anywhere. "1,234" is 234, "3/4" is 4, \dfrac{1}{2} is 2.

When two answers are equal (is_equivalent). It is symmetric, and there is no tolerance:

  P1  The value counts, not the form: 2/4 is 1/2, \sqrt{8} is 2\sqrt{2}, (x+1)^2 is x^2+2x+1.
  P2  A rounded decimal is not the exact value: 0.33 is not 1/3. Terminating decimals are exact.
  P3  A unit or noun on one side only is ignored; two must be the same one, however spelled.
  P4  Degree signs are units (but sin 30° is the sine of an angle in degrees).
  P5  n% is n/100; a percent sign on one side only may also stand for nothing: 28% against 28.
  P6  Lists (, ; and or) are unordered, with or without braces. (1, 2) is ordered, never a set.
  P7  A name in front (x =, f(x) =, p+q =, \angle ABC =, x \in) on one side only is ignored; a side
      with a variable and a digit makes an equation. 12 * 4 = 48 is 48 if every link holds, and
      unreadable if one does not. a \approx b states a.
  P8  Text: case, \text wrappers, blanks, periods, (B) for B do not matter. A) 12 cm is choice A.
  P9  The brackets of a matrix do not matter. P10 An inequality in one variable is its interval.
  P11 Equations are equal if terms are moved or both sides multiplied by a nonzero constant.
  P12 a \pm b is the two values. P13 A base must agree where both sides show one: 52_8, 52_7.
  P14 Variables keep their case and names. P15 Digits may be grouped in threes: 1,234 is 1234.
  P16 Left-over \boxed, $ and \( \) wrappers are ignored.
  Nothing undefined or infinite (1/0, \tan 90°) equals anything, whatever stands beside it. Ratios
  with a zero and times of day (11:00) equal their own spelling only, and so does what cannot be
  read. Roots are principal, but odd roots of negative numbers are real; \sin^{-1} is the inverse;
  log alone is to base 10; i, e and pi are constants; \sqrt{x^2} is |x|, not x.
"""
import decimal
import itertools
import logging
import math
import random
import re
from contextvars import ContextVar
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

STATUSES = ("correct", "wrong", "no_answer", "unparsed", "error")
VERIFIERS = ("strict", "last-number")

# Bounds: sizes, no clock, so that a verdict is the same on every machine.
MAX_ANSWER = 1000          # characters; a longer "answer" is never read as mathematics
MAX_TOKENS = 400           # of one answer
MAX_DEPTH = 25             # groups, fractions, roots and exponents inside one another
MAX_EXPONENT = 2000        # decimal digits, of 1e2000
MAX_BITS = 8000            # of an exact number
MAX_WORK = 6000            # steps of arithmetic for one verdict, about a microsecond each


class Verdict(NamedTuple):
    """reward: 1.0 or 0.0; answer: the text that was compared, or None; status: one of STATUSES."""
    reward: float
    answer: str | None
    status: str


def judge(response: str, reference: str, verifier: str = "strict") -> Verdict:
    """Does the response commit itself to the reference answer?

    reference: an answer, or a worked solution that ends in one.
    Raises ValueError for an unknown verifier, and nothing else: a failure of ours is logged and
    has the status "error".
    """
    if verifier not in VERIFIERS:
        raise ValueError(f"unknown verifier {verifier!r}: choose one of {', '.join(VERIFIERS)}")
    try:
        answer = extract_answer(response) if verifier == "strict" else last_number(response)
        if answer is None:
            return Verdict(0.0, None, "no_answer")
        if is_equivalent(answer, final_answer(reference)):
            return Verdict(1.0, answer, "correct")
        kind = _kind_of(answer)
        unparsed = kind is None or kind == "text" and len(answer.split()) > 5
        return Verdict(0.0, answer, "unparsed" if unparsed else "wrong")
    except Exception:  # a bug must not look like a wrong answer, nor stop a run
        logging.exception("verify.judge failed on %.200r, reference %.200r", response, reference)
        return Verdict(0.0, None, "error")


def final_answer(reference: str) -> str:
    """The answer that a worked solution ends in, behind #### or by R1 and R2; else the text."""
    behind = re.search(r"####([^#\n]*)$", reference)
    worked = "\n" in reference.strip() or _COMMITS.search(reference[-MAX_ANSWER:])
    answer = _trim(behind[1]) if behind else extract_answer(reference) if worked else None
    return reference.strip() if answer is None else answer


def kind_of(answer: str) -> str | None:
    """What the answer is read as: a "value", a "choice", "text", or None: it cannot be read."""
    _work_left.set(MAX_WORK)
    return _kind_of(answer)

def _kind_of(answer):
    try:
        readings = _readings(answer) if len(answer) <= MAX_ANSWER else []
    except _Undefined:  # out of work
        return None
    if _LABEL.fullmatch(answer) or (readings and _text(answer) in _CHOICES):
        return "choice"
    return readings and ("text" if _kind(readings[0]) == "text" else "value") or None


# ---- extraction ----

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s{0,20}")
_UNBRACED = re.compile(r"[-+\u2212]?[0-9][0-9,]*(?:\.[0-9]+)?|\\?[A-Za-z]+(?:\{[^{}]{0,99}\}){0,2}")
_BLANK_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,20}\{\s*\}")
_BRACE = re.compile(r"\\.|[{}]", re.S)
_ASIDE = re.compile(r"^(?:#.*|.*\\(?:boxed|fbox)\s{0,20}(?:\{\s*\}.*)?)$", re.M)
_MARKER = re.compile(
    r"(?<!/)\banswers?(?:[*_`\"'\s]{0,8}(?::|=|\b(?:is|are|(?:seems?\sto|should|must|will)\sbe)\b)"
    r"|\s(?:to|for|of)\s[^.:=\n]{1,60}?\s(?:is|are)\b)"
    r"|^[^\w\n]{0,12}(?:the\s)?(?:final\s)?answers?[*_ \t]{0,8}(?=$|[-0-9$\\(])", re.I | re.M)
_NUMBER = (r"(?<![\w.,^_\\])(?<!\d:)[-\u2212]?(?:\\?\$|[\u20ac\u00a3])?[-\u2212]?"
           r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
           r"(?:\s?/\s?[0-9]+)?(?:\s?\\?%)?(?![0-9^!]|[A-Za-z](?![A-Za-z])|[,.:/][0-9])"
           r"(?:\s(?:[a-z]{1,9}ths?|hal(?:f|ves)|thirds?|quarters?|thousand|hundred|[mbtr]+illion)"
           r"\b)?")
_FORMULA = (r"\$\$[^$]{1,999}\$\$|\\\[.{1,999}?\\\]|\\\(.{1,999}?\\\)"
            r"|\$(?!\s)[^$\n]{1,300}(?<![\s\\])\$(?![0-9])")         # but $5 and $6 are prices
_VALUE = re.compile(f"{_FORMULA}|{_NUMBER}", re.S)
_BOLD = re.compile(r"(?:\*\*|__)([^*_\n]{1,200})(?:\*\*|__)")
_OURS = re.compile(r"\s(?:is|are)\s(?:our|the|my)\s(?:final\s|correct\s)?answers?\b", re.I)
_SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)[.!?](?=[\s*\"'\u201d)_`\]]|$)"
                           r"|(?<=[0-9])\.(?=[A-Z])|;(?=\s|$)")
_REASON = re.compile(r"[,\s]{1,20}(?:because|since|so|which|as)\b", re.I)
_PREFACE = re.compile(r"^(?:(?:if|since|because|as|when|after)\b[^,]{0,300},\s){1,3}", re.I)
_MAYBE = r"(?:\b(?:not|never|maybe|perhaps|possibly|either)\b|n['\u2019]t\b)"
_DOUBT = re.compile(rf"{_MAYBE}|\b(?:neither|nor|no|none|without|cannot|or|might|could|between"
                    r"|unknown|impossible|unclear)\b|\b(?:more|less|greater|fewer|at least|at most"
                    r"|up to)\s(?:than\s)?\$?[0-9]", re.I)
_DENIED = re.compile(rf"{_MAYBE}\s(?:be\s)?\W*[0-9][^A-Za-z]*$|^\W*{_MAYBE}", re.I)
_STATES = re.compile(r".*\b(?:is|are|was|be|equals|equal to|option|choice)\b", re.I)
_HASHES = re.compile(r"^####[ \t]*([-+\u2212$\\\u20ac\u00a3.]{0,4}[0-9][^\n]{0,200})", re.M)
_COMMITS = re.compile(r"\\f?box(ed)?\b|</answer>|^####|\banswers?(\sis\b|\sare\b|:)", re.I | re.M)
_LEAD = re.compile(r"^\s*(?:therefore|thus|hence|simply|just|equal to|approximately)\s", re.I)
_CALCULATION = re.compile(r"<<[^<>\n]{0,200}>>")                    # GSM8K's calculator marks
_WORD = re.compile(r"\\text\s?\{[^{}]*\}|\\[A-Za-z]+|[^\W\d_]{2,}")
_HEDGE = re.compile(r"\b(?:or|maybe|perhaps|possibly|alternatively|another|could|might)\b", re.I)
_CORRECTION = re.compile(r"\b(?:wait|no[,.]|wrong|actually|corrected|correction|mistake|instead"
                         r"|sorry|oops)(?!\w)", re.I)
_PAIRS = list(zip(r"""$$ \[ \( $ " ' ` “""".split(), r"""$$ \] \) $ " ' ` ”""".split()))
_PAPER = re.compile(r"\\frac\{[^{}]*\}\{[^{}]*\}|-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")


def last_number(text: str) -> str | None:
    r"""The last number or plain \frac{a}{b} anywhere: the rule of the paper's public code."""
    found = _last(_PAPER, text)
    return found and found[0]


def extract_answer(response: str) -> str | None:
    """The answer that a response commits itself to, by the rules R0 to R6, or None."""
    _work_left.set(MAX_WORK)
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    if (boxed := _boxed(text)) is not None:
        return boxed or None
    before, closed, _ = text.rpartition("</answer>")
    if closed and "<answer>" in before:
        return _statement(before.rpartition("<answer>")[2]) or None
    lines = text if "answer" in text.lower() else ""
    marker, ours = _last(_MARKER, lines), _last(_OURS, lines)
    if ours and (marker is None or ours.end() >= marker.start()):
        before = text[max(0, ours.start() - 300):ours.start()]
        value = _last(_BOLD, before) or _last(_VALUE, before)
        if value and value.end() == len(before):
            return _trim(value[0])
    if marker:
        return _statement(text[marker.end():marker.end() + 2 * MAX_ANSWER]) or None
    if hashes := "####" in text and _last(_HASHES, text):
        return _trim(hashes[1])
    bare = _ASIDE.sub("", text).strip() if len(text) <= 9 * MAX_ANSWER else ""
    words = [word for word in _WORD.findall(bare) if word[0] != "\\"]
    short = len(bare) <= MAX_ANSWER and "\n" not in bare
    return short and (not words or len(bare.split()) == 1) and _trim(bare) or None

def _last(pattern, text):
    found = None
    for found in pattern.finditer(text):  # noqa: B007
        pass
    return found

def _boxed(text):
    """R1: the last boxes that belong together, as a list; blank if cut off; None without a box."""
    answers, start, limit = [], 0, len(text)
    for _ in range(50):  # and no more are looked at
        begin = limit = max(text.rfind("\\boxed", 0, limit), text.rfind("\\fbox", 0, limit))
        content, end = _box_content(text, begin) if begin >= 0 else ("", 0)
        if content is None and not answers:
            return ""
        if content == "" or (answers and end > start):              # blank, or round the last box
            continue
        gap = text[end:start] if answers else ""
        many_words = len(_WORD.findall(gap[:200])) >= 5 and not _HEDGE.search(gap)
        if content is None or len(gap) > 200 or many_words or _CORRECTION.search(gap):
            break
        answers.append(content)
        start = begin
    return ", ".join(dict.fromkeys(reversed(answers))) if answers else None

def _box_content(text, begin):
    """What the box that begins here holds, and where it ends; None if it is never closed."""
    opening = _BOX.match(text, begin)
    depth, inside = 0, opening.end() if opening else begin
    if not text.startswith("{", inside):                            # \boxed 5
        unbraced = opening and _UNBRACED.match(text, inside)
        return (unbraced[0], unbraced.end()) if unbraced else ("", inside)
    for brace in _BRACE.finditer(text, inside, inside + MAX_ANSWER):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return _trim(_BLANK_BOX.sub("", text[inside + 1:brace.start()])), brace.end()
    return None, inside

def _statement(text):
    """R2: what the text after a marker states, or a blank string."""
    window = re.sub(r"^[*_:=\s]*\n\s*[-\u2022]\s+|^[*_:=\s]+", "", text)[:MAX_ANSWER]
    formula = re.match(_FORMULA, window, re.S)
    more = formula and re.match(r"[,;\s]*(?:and|or)?\s*(?:\$|\\\(|[-0-9])", window[formula.end():])
    if formula and not more and formula[0].strip("$()[]\\ \n"):
        return _trim(formula[0])
    if not formula and re.match(r"\$\$|\\[\[(]|\$\\", window):     # cut off
        return ""
    line = _PREFACE.sub("", _CALCULATION.sub("", re.split(r"[\r\n]", window, maxsplit=1)[0]))
    end, reason = _SENTENCE_END.search(line), _REASON.search(line)
    sentence = line[:end.start()] if end else line
    clause = sentence[:reason.start()] if reason else sentence
    cuts = (len(clause), len(sentence), sentence.find(", "), sentence.rfind(", "))
    for cut in dict.fromkeys(cuts):
        part, rest = _trim(sentence[:max(0, cut)]), sentence[cut:]
        kind, head = _kind_of(part), re.split(r"[0-9]", part)[0]
        words = [w for w in _WORD.findall(head) if w[0] != "\\" and w not in _PLAIN]
        plain = not words or (head == sentence and len(words) <= 3)  # no words before its number
        rest = re.match(r", (?:and )?[-$(\\0-9]|.*=", rest) or _DOUBT.search(rest)
        lost = head == part != sentence or (cut < len(clause) and rest)
        if kind == "choice" or (kind == "value" and plain and not lost):
            return part
    return _stated(line, clause) or _trim(clause)

def _stated(line, sentence):
    """The value that a line of words states, or None."""
    before, chain, side = line.rpartition("=")
    if chain:
        end = _SENTENCE_END.search(side)
        side = _trim(side[:end.start()] if end else side)
        value = _VALUE.match(side)
        if _DENIED.search(before) or (value and _DOUBT.match(side, value.end() + 1)):
            return None
        if _kind_of(side) == "value":
            return side
        sentence = value[0] if value else side
    elif _DOUBT.search(sentence):
        return None
    for pattern in (_BOLD, _VALUE):
        found = {_trim(match[0]) for match in pattern.finditer(sentence)}
        if len(found) == 1:
            return found.pop()
    states = _STATES.match(sentence)
    for side in (sentence[states.end():] if states else "", sentence.rpartition(" ")[2]):
        kind = _kind_of(_trim(side))
        if kind == "choice" or (states and kind == "value"):
            return _trim(side)
    return None

def _trim(value):
    """Without blanks, bold stars, paired quotes and delimiters, a lone $, final punctuation."""
    value = _LEAD.sub("", _CALCULATION.sub("", value))
    for _ in range(6):
        before = value
        value = value.strip(" \t\r\n*_")
        if value.endswith((".", ",", ";", ":", "?")) and not value.endswith(".."):
            value = value[:-1]
        for left, right in _PAIRS:
            inner = value[len(left):-len(right)]
            if value.startswith(left) and value.endswith(right) and inner and left not in inner:
                value = inner
        if value.count("$") == 1 and "\\$" not in value:
            value = value.replace("$", "")
        if "{" not in value:                                        # what closes {"answer": 5}
            value = value.rstrip("}")
        if value == before:
            break
    return value


# ---- equivalence ----

_SIMPLE = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")

class _Unreadable(Exception):
    """Not an answer in the grammar below, or larger than the bounds above."""

class _Words(Exception):
    """An ordinary word stands where a value should: the whole answer is text."""

class _Undefined(Exception):
    """No value: 1/0, log 0, an overflow, or more work than one verdict may take."""

def _need(holds, error=_Unreadable):
    if not holds:
        raise error

_work_left = ContextVar("_work_left", default=MAX_WORK)  # of this verdict, in steps

def _spend(steps):
    _work_left.set(_work_left.get() - steps)
    _need(_work_left.get() >= 0, _Undefined)


def is_equivalent(prediction: str, reference: str) -> bool:
    """Do the two texts name the same answer, by P1 to P16? Symmetric, never raises, bounded."""
    a, b = prediction.strip(), reference.strip()
    if a == b or max(len(a), len(b)) > MAX_ANSWER:
        return a == b != ""
    if _SIMPLE.fullmatch(a) and _SIMPLE.fullmatch(b):  # the common case needs no parser
        return Fraction(a) == Fraction(b)
    _work_left.set(MAX_WORK)
    try:
        return _equal(a, b)
    except _Undefined:  # out of work
        return False

def _equal(a, b):
    label_a, label_b = _LABEL.fullmatch(a), _LABEL.fullmatch(b)
    if label_a or label_b:
        return bool(_choices(a, label_a) & _choices(b, label_b))
    readings_a, readings_b = _readings(a), _readings(b)
    if any(_same(x, y) for x in readings_a for y in readings_b):
        return True
    if any(_kind(x) == "text" for x in readings_a + readings_b):
        return _text(a) == _text(b) != ""
    # outside the grammar: the same spelling
    return not readings_a and not readings_b and a.split() == b.split()

def _choices(text, label):
    """What an answer with a label names: B) 12 cm is b, B) False is b and false, B) C is none."""
    rest = _text(label[2]) if label else _text(text)
    if not label or rest in _CHOICES[:5]:
        return set() if label else {rest}
    return {_text(label[1]), _text(text), rest if rest in _CHOICES else _text(text)}

def _readings(text):
    """The ways to read an answer: a comma may group digits or separate items (100,200)."""
    readings = []
    for grouping in (True, False) if _GROUPED.search(text) else (True,):
        try:
            readings.append(_parse(_tokens(text, grouping)))
        except _Words:
            form = _text(text)
            return [_TEXT_VALUES.get(form.removesuffix("s"), ("text", form))]
        except _Unreadable:
            pass
    return readings

def _text(text):
    """The normal form of a text answer (P8); yes is true, (B) is b."""
    form = re.sub(rf"{_STYLE}|{_WRAPPER}(?=\{{)", "", text).lower()
    form = re.sub(r"\\[\s,;:!]|[\s{}$~\"'*`_\u2018\u2019\u201c\u201d]|\.(?![0-9])", "", form)
    form = re.sub(r"^(?:option|choice)?\(?([a-z])\)?$", r"\1", form)
    return {"yes": "true", "no": "false"}.get(form, form)


# ---- tokens ----

_WRAPPER = (r"\\(?:text|mbox|mathrm|mathbf|mathit|mathsf|textbf|textit|textrm|textnormal"
            r"|operatorname)\s?")
_STYLE = (r"\\(?:displaystyle|textstyle|boldsymbol|underline|bm|large|Large)(?![A-Za-z])"
          r"|\\(?:textcolor|color)\s?\{[^{}]*\}")
_TEXT_VALUES = {"nosolution": ("set",), "norealsolution": ("set",), "emptyset": ("set",),
                "allrealnumber": "ℝ", "allreal": "ℝ"}
_CHOICES = ("a", "b", "c", "d", "e", "true", "false")
_LABEL = re.compile(rf"(?:{_WRAPPER}\{{)?\(?([A-E])[).:](?:[\s}}~]|\\[\s,;:])+([\w\\$].*)", re.S)
_GROUPED = re.compile(r"[0-9][ ,][0-9]{3}(?![0-9])")
_TOKEN = {grouping: re.compile(rf"""
     [0-9]{{1,3}}(?:(?:,\\!\s?|\{{,\}}|\\[,!]\s?{comma})[0-9]{{3}})+(?![0-9])(?:\.[0-9]+)?  # 1,234
    |[0-9]*\.[0-9]*\\(?:overline|bar|dot)\s?\{{[0-9]+\}}  # 0.1\overline{{6}}
    |(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?
    |\\(?:begin|end)\s?\{{[A-Za-z]+\*?\}}|\\mathbb\s?\{{?[A-Z]\}}?
    |\\[A-Za-z]+|\\.|"?[A-Za-z]+|<=|>=|!=|\*\*|\.\.\.|\S""", re.X | re.S)
    for grouping, comma in ((True, "|[ ,]"), (False, ""))}
_TEXTS = re.compile(rf"({_WRAPPER})\{{([^{{}}]*)\}}")
_DEGREE = re.compile(r"\^\s?\{\s?\\circ\s?\}|\^?\s?\\circ(?![A-Za-z])")
_ORDINAL = re.compile(r"(?<=[0-9])\s?\^\s?(?:\{\s?\"?(?:st|nd|rd|th)\s?\}|\s?\"?(?:st|nd|rd|th)\b)")
_OVER = re.compile(r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}")
_PER = re.compile(r"(?<=[0-9]) (?:an?|per) (?=[a-z]{2})")
_SPEED = re.compile(r"(?<=[0-9]) ?([a-zA-Z]{1,3}(?=/[a-z]{1,3}(?:\^[23])?$)|m(?=\^[23]$))")
_WIDE = {0xFF10 + digit: str(digit) for digit in range(10)} | str.maketrans(
    "−–－×·⋅∙÷∕⁄⩽⩾º％，：（）’", "---****///≤≥°%,:()'")
_UNICODE = {ord(pair[0]): f" {pair[1:]} " for pair in r"""π\pi ∞\infty √\sqrt ≤<= ≥>= ≠!= ∪\cup
    ∈\in ∅\emptyset ±\pm ∓\mp …... θ\theta α\alpha β\beta λ\lambda ⟨( ⟩) ∠\angle ²^2 ³^3
    ½1/2 ⅓1/3 ⅔2/3 ¼1/4 ¾3/4 ⅕1/5 ⅖2/5 ⅗3/5 ⅘4/5 ⅙1/6 ⅚5/6 ⅛1/8 ⅜3/8 ⅝5/8 ⅞7/8""".split()}
_BEYOND_ASCII = ("°", "ℝ", "€", "£", "¢", "≈")
_SKIPPED = frozenset(r"""\left \right \limits \big \Big \bigl \bigr \Bigl \Bigr \bigg \Bigg \quad
    \qquad \, \; \: \! \( \) \[ \] ~ \vec \hat \overline \bar \overrightarrow \rm \bf \it \text
    \mathrm \mathbf \mbox \textbf \textit \hline \angle \triangle""".split()) | {
    "\\ ", "\\\n", "\\\t", "\\\r"}
_ALIASES = dict(pair.split("~") for pair in r"""
    \dfrac~\frac \tfrac~\frac \cfrac~\frac \dbinom~\binom \tbinom~\binom \times~* \cdot~* \ast~*
    \div~/ **~^ \leq~<= \le~<= \leqslant~<= \geq~>= \ge~>= \geqslant~>= \neq~!= \ne~!= \lt~< \gt~>
    \colon~: \land~and \lor~or \lbrace~\{ \rbrace~\} \lvert~| \rvert~| \vert~| \mid~| \|~| \langle~(
    \rangle~) \lbrack~[ \rbrack~] \%~% \$~$ percent~% \varnothing~\emptyset ...~\dots \ldots~\dots
    \cdots~\dots \degree~° \backslash~\setminus \R~ℝ \mathbb{R}~ℝ infinity~\infty inf~\infty
    asin~arcsin acos~arccos atan~arctan \approx~≈ \in~in""".split())
_FUNCTIONS = frozenset("sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan log ln lg exp "
                       "abs floor ceil".split())
_PLAIN = _FUNCTIONS | {"sqrt", "pi", "theta", "alpha", "beta", "lambda"}  # also without backslash
_UNITS = {spelling: unit.split()[0] for unit in """
    $ dollar dollars usd bucks; cent cents ¢; eur euro euros €; gbp £; lb lbs pound pounds;
    ° degree degrees deg; m meter meters metre metres; cm centimeter centimeters centimetres;
    mm millimeter millimeters; km kilometer kilometers kilometres; in inch inches; ft foot feet;
    yd yard yards; mi mile miles; g gram grams; kg kgs kilogram kilograms; mg milligram milligrams;
    oz ounce ounces; l liter liters litres; ml milliliter milliliters; s sec secs second seconds;
    min mins minute minutes; h hr hrs hour hours; day days; per /; mph; kph; rpm; mb; gb;
    sq square; cu cubic; th; st; nd; rd""".split(";") for spelling in unit.split()}
_NOT_UNITS = frozenset("""not no none nor or and but is are be was if then than to maybe perhaps
    possibly about versus vs plus minus times over divided by squared cubed factorial point am pm
    wrong incorrect false true yes unknown undefined nan mod modulo power root base between either
    all any neither except without less more greater fewer from through until answer""".split())
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10 ** 6, "billion": 10 ** 9,
           "trillion": 10 ** 12, "half": Fraction(1, 2), "halve": Fraction(1, 2)}
_SCALES |= {word: Fraction(1, n) for n, word in zip((3, 4, 4, 5, 6, 7, 8, 9, 10, 100, 1000), """
    third quarter fourth fifth sixth seventh eighth ninth tenth hundredth thousandth""".split())}

def _tokens(text, grouping):
    """Numbers (grouping: 1,234 is one), letters, \\commands, signs, words with a quote before."""
    if not text.isascii():
        text = text.translate(_WIDE).translate(_UNICODE)
    while (box := _BOX.match(text)) and text.endswith("}"):
        text = text[box.end() + 1:-1]
    if "\\" in text:
        text = _DEGREE.sub("°", re.sub(_STYLE, " ", text))
        nested = 3 if "\\over" in text or _TEXTS.search(text) else 0  # inside one another
        for _ in range(nested):
            text = _TEXTS.sub(_marked, _OVER.sub(r"\\frac{\1}{\2}", text))
    if "$" in text:  # pairs are math delimiters, others currency
        after = re.findall(r"(?<!\\)\$(.?)", text, re.S)
        if len(after) % 2 == 0 and not all(character.isdigit() for character in after):
            text = re.sub(r"(\\\$)|\$", r"\1", text)
    if not {" ", "^", "/"}.isdisjoint(text):
        text = _SPEED.sub(r' "\1', _PER.sub(' "per ', _ORDINAL.sub(' "th', text)))
    text = re.sub(r"(?<!\.)\.$", "", text)
    tokens = []
    for match in _TOKEN[grouping].finditer(text):
        token = _ALIASES.get(match[0], match[0])
        if not token.isascii() and token not in _BEYOND_ASCII:
            raise _Words if token.isalpha() else _Unreadable
        if token.isalpha() and len(token) > 1 and match[0] != "\\in":
            number = bool(tokens) and (tokens[-1][0].isdigit() or tokens[-1] == "%")
            tokens += _letters(token, number, number and text[match.start() - 1].isspace())
        elif token not in _SKIPPED:
            tokens.append(token)
    _need(0 < len(tokens) <= MAX_TOKENS)
    return tokens

def _marked(match):
    """The inside of \\text{...} with its words marked; \\mathrm{e} and \\mathbf{v} as they are."""
    inside = match[2]
    if "math" in match[1] and len(inside) == 1:
        return f" {inside} "
    return " " + re.sub(r"\b(?!(?:and|or)\b)(?=[A-Za-z])", '"', inside) + " "

def _letters(name, after_number, apart):
    """A run of letters: and, a function, variables, or a word (apart from a number: 20 mpg)."""
    lower = name.lower()
    if lower in ("and", "or"):
        return [lower]
    if name in _PLAIN and not (after_number and name in _UNITS):    # sec and min are both
        return ["\\" + name]
    vowels = len(name) == 3 and not after_number and not set("eiou").isdisjoint(lower)
    is_word = apart or vowels or len(name) > 3 or lower in _UNITS or lower in _NOT_UNITS
    return ['"' + name] if is_word else list(name)


# ---- parser ----
#
# A value is a Fraction, a name (str: a variable, or a constant: pi, e, i, ∞) or a tuple:
#     ("+", a, b, ...)  ("*", a, b, ...)  ("-", a) the negative  ("/", a) the reciprocal
#     ("^", a, b)  ("%", a)  ("call", function, a, ...)  ("unit", unit, a)
# Around values stand answers:
#     ("list", a, ...)  ("all", a, ...) inequalities joined by and  ("set", a, ...)
#     ("seq", brackets, a, ...) in order  ("rel", signs, a, ...)  ("union", a, b)  ("minus", a, b)
#     ("matrix", columns, a, ...)  ("based", digits, base)  ("text", normal form)

_RELATIONS = {"=", "<", ">", "<=", ">=", "!=", "in", "≈"}
_JOINERS = (",", ";", "and", "or")
_LEVELS = {"\\cup": 1, "\\setminus": 1, ":": 2, "+": 3, "-": 3, "*": 4, "/": 4, "%": 4}
_ANGLES = ("sin", "cos", "tan", "cot", "sec", "csc")
_GREEK = frozenset("alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa "
                   "lambda mu nu xi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta "
                   "Theta Lambda Xi Pi Sigma Phi Psi Omega ell".split())
_MINUS_INFINITY = ("-", "∞")
_CONSTANTS = ("pi", "e", "i", "∞", "ℝ", "…")
_NAMED = {"\\pi": "pi", "\\infty": "∞", "\\dots": "…", "ℝ": "ℝ", "\\emptyset": ("set",)}
_CALLS = {"\\" + name for name in _FUNCTIONS}
_LETTERS = frozenset(map(chr, (*range(65, 91), *range(97, 123))))
_FACTORS = _LETTERS | _CALLS | {"\\" + name for name in _GREEK} | {
    "\\frac", "\\sqrt", "\\pi", "\\binom", "\\infty", "\\lfloor", "\\lceil", "{", "("}
_CLOSING = {"(": (")", "]"), "[": ("]", ")", "["), "]": ("[", "]"), "{": ("}",), "\\{": ("\\}",),
            "\\lfloor": ("\\rfloor",), "\\lceil": ("\\rceil",)}
_NAME = re.compile(r"""(?:"[A-Za-z]+)+|[A-Za-z](?:'|\^\{-1\})*(?:\([A-Za-z,]*\))?""")

def _parse(tokens):
    """The answer that tokens spell; with plus-minus signs the list of its values (P12)."""
    places = [k for k, token in enumerate(tokens) if token in ("\\pm", "\\mp")]
    if not places:
        return _Parser(tokens).answer()
    _need(len(places) <= 3)
    found, tied = [], "\\mp" in tokens  # a minus-plus goes with the plus-minus
    for signs in ("+++", "---") if tied else itertools.product("+-", repeat=len(places)):
        chosen = list(tokens)
        for k, sign in zip(places, signs):
            chosen[k] = sign if tokens[k] == "\\pm" else "+-"[sign == "+"]
        node = _Parser(chosen).answer()
        listed = _kind(node) in ("list", "set")
        found += node[1:] if listed else [node]
    return (node[0] if listed else "list", *dict.fromkeys(found))

class _Parser:
    """Recursive descent: answer, item, relation, expression (by the levels above), power, atom."""

    def __init__(self, tokens):
        self.tokens, self.at, self.token = tokens + ["", "", ""], 0, tokens[0]
        self.units, self.depth, self.bars, self.angle = [], 0, 0, 0  # bars: open |; angle: in sin

    def next(self):
        token = self.token
        _need(token)
        self.at += 1
        self.token = self.tokens[self.at]
        return token

    def taken(self, token, needed=False):
        return bool(self.next()) if self.token == token else needed and _need(False)

    def answer(self):
        items = self.items(_JOINERS)
        _need(not self.token)
        both = set(self.tokens).intersection(_JOINERS) == {"and"} and all(map(_is_region, items))
        return items[0] if len(items) == 1 else ("all" if both else "list", *items)

    def items(self, joiners):
        """Relations or values with their units (P3), with commas or the like in between."""
        items = []
        while True:
            outer, self.units = self.units, []
            self.taken("≈")
            node = self.relation()
            if self.token[:1] == '"':
                self.unit()
            items.append(("unit", " ".join(sorted(set(self.units))), node) if self.units else node)
            self.units = outer
            if self.token not in joiners:
                return items
            self.next()
            if self.token in ("and", "or"):                         # 1, 2, and 3
                self.next()

    def relation(self):
        terms, signs = [self.name_before_equals() or self.expression()], []
        while self.token in _RELATIONS or self.token == '"in' and self.tokens[self.at + 1] in "([":
            signs.append(self.next().lstrip('"'))
            terms.append(self.expression())
        return _relation(signs, terms) if signs else terms[0]

    def name_before_equals(self):
        """The left side of f(x) = ... or Total cost = ... as one name."""
        if "=" not in self.tokens[self.at:self.at + 20]:
            return None
        end = self.tokens.index("=", self.at)
        name = "".join(self.tokens[self.at:end])
        if not _NAME.fullmatch(name) or _NOT_UNITS.intersection(name.lower().split('"')):
            return None
        self.at, self.token = end, "="
        return name

    def expression(self, level=1):
        """Operators of at least this level, and factors side by side."""
        negative, node = self.minus(), self.power()
        node = _negative(node) if negative else node
        while True:
            token = self.token
            if level <= 4 and self.factor_follows():
                node = _joined("*", node, self.power())             # 2x, 3(x+1), x sin x, 3!4!
                continue
            if _LEVELS.get(token, 0) < level or (token == ":" and self.bars):
                return node
            self.next()
            if token == "%":                                        # 1/2% is half a percent
                _need(self.token != "(" and not self.token[:1].isdigit())    # but 7 % 3 is none
                node = ("%", node)
                continue
            clock, right = self.token[:1] == "0", self.expression(_LEVELS[token] + 1)
            if token == ":" and (clock or 0 in (node, right)):      # 11:00, 3:05, 0:1
                return ("text", "".join(self.tokens))
            if token in ("+", "-"):
                node = _joined("+", node, right if token == "+" else _negative(right))
            elif token in ("*", "/", ":"):
                node = _joined("*", node, right if token == "*" else _reciprocal(right))
            else:
                node = ("union" if token == "\\cup" else "minus", node, right)

    def factor_follows(self):
        token = self.token
        if token[:1].isdigit():                                     # after 3!, (x+1), 2^{3} and 2^3
            return self.tokens[self.at - 1] in ("!", ")", "}") or self.tokens[self.at - 2] == "^"
        return token in _FACTORS or (token == "|" and not self.bars)

    def minus(self):
        """Take the plus and minus signs here: is their product a minus?"""
        negative = False
        while self.token in ("+", "-"):
            negative ^= self.next() == "-"
        return negative

    def power(self):
        """An atom and what follows it: ! ° ^ million."""
        node = self.atom()
        for _ in range(6):
            if self.token not in ("^", "!", "°") and self.token[:1] != '"':
                break
            scale = _SCALES.get(self.token[1:].lower().rstrip("s")) if self.token[:1] == '"' else 0
            if self.taken("^"):
                node = ("^", node, self.argument())
                _need(self.token != "^")                            # 2^3^2 has two readings
            elif self.taken("!"):
                node = ("call", "factorial", node)
            elif self.token == "°" and self.angle:                  # sin 30° means degrees
                self.next()
                node = ("*", node, "pi", Fraction(1, 180))
            elif self.taken("°"):
                self.units.append("°" + (self.next() if self.token in ("C", "F") else ""))
            elif scale:
                self.next()
                node = _joined("*", node, Fraction(scale))
        return node

    def atom(self):
        self.depth += 1
        _need(self.depth <= MAX_DEPTH)
        token = self.token
        if token[:1].isdigit() or (token[:1] == "." and len(token) > 1):
            node = self.number()
        elif token in _CLOSING:
            node = self.group()
        elif token in _NAMED:
            node = _NAMED[self.next()]
        elif token in _LETTERS or token[1:] in _GREEK:
            node = self.next().lstrip("\\")
            if self.taken("_"):
                node += "_" + self.subscript()
        elif token in _CALLS:
            node = self.call()
        elif token[:1] == "\\":
            node = self.command()
        elif self.taken("|"):
            self.bars += 1
            node = ("call", "abs", self.expression())
            self.bars -= 1
            self.taken("|", needed=True)
        elif token in ("$", "€", "£", "¢"):
            self.units.append(_UNITS[self.next()])
            negative, node = self.minus(), self.atom()
            node = _negative(node) if negative else node
        elif token[:1] == '"':
            _need(len(token) == 2, _Words)                          # all is text
            node = self.next()[1]
        else:
            raise _Unreadable
        self.depth -= 1
        return node

    def number(self):
        token = self.next()
        value = _number(token)
        if self.taken("_"):
            return ("based", token.lstrip("0"), self.subscript())
        top, bar, bottom = self.tokens[self.at:self.at + 3]
        if top == "\\frac" and token.isdigit():                     # 1\frac{3}{4}
            part = self.command()
            mixed = isinstance(part, Fraction) and 0 < part < 1
            return value + part if mixed else _joined("*", value, part)
        if token.isdigit() and top.isdigit() and bar == "/" and bottom.isdigit():       # 2 1/2
            self.next(), self.next()
            return _joined("+", value, _joined("*", _number(top), _reciprocal(self.number())))
        return value

    def subscript(self):
        """A subscript as text: 5, {10}, {n+1}."""
        start = self.at
        while self.tokens[start] == "{" and self.token != "}":
            self.next()
        self.next()
        return "".join(self.tokens[start:self.at]).strip("{}")

    def group(self):
        """Brackets: mere grouping round one item, else a tuple or interval, or a set in braces."""
        opening, bars, self.bars = self.next(), self.bars, 0
        pair = "," in self.token[1:] and self.tokens[self.at + 1] in _CLOSING[opening]
        _need(not pair or opening not in ("(", "["))                # (1,234) is no number
        items = [] if opening + self.token == "\\{\\}" else self.items((",", ";"))
        _need(self.token in _CLOSING[opening])
        closing, self.bars = self.next(), bars
        if len(items) == 1 and opening != "\\{":
            return ("call", opening[2:], items[0]) if opening[1:2] == "l" else items[0]
        if opening in ("{", "\\{"):
            return ("set", *items)
        return ("seq", {"]": "("}.get(opening, opening) + {"[": ")"}.get(closing, closing), *items)

    def command(self):
        name = self.next()[1:]
        if name == "frac":
            top = self.argument(shared=True)
            return _joined("*", top, _reciprocal(self.argument()))
        if name == "sqrt":
            index = Fraction(2)
            if self.taken("["):
                index = self.expression()
                self.taken("]", needed=True)
            return ("^", self.argument(), _reciprocal(index))
        if name == "binom":
            return ("call", "binom", self.argument(), self.argument())
        _need(name.startswith("begin") and "matrix" in name or "array" in name)
        return self.matrix(name)

    def argument(self, shared=False):
        """What \\frac, \\sqrt, ^ take: a group or one token; of 34 after \\frac (shared) only 3."""
        if self.token.isdigit() and shared and len(self.token) > 1:
            digit, self.token = self.token[0], self.token[1:]
            self.tokens[self.at] = self.token
            return Fraction(digit)
        negative = self.minus()
        node = Fraction(self.next()) if self.token.isdigit() else self.atom()
        return _negative(node) if negative else node

    def call(self):
        """\\sin x, \\sin^2 x, \\sin^{-1} x, \\log_2 8; without brackets up to the next call."""
        name, power, base = self.next()[1:], Fraction(1), Fraction(10)
        while self.token in ("^", "_"):
            if self.next() == "^":
                power = self.argument()
            else:
                base = self.argument()
        if power == -1 and name in ("sin", "cos", "tan"):
            name, power = "arc" + name, Fraction(1)
        self.angle += name in _ANGLES
        bracket, negative = self.token in ("(", "{"), self.minus()
        inside = self.atom() if bracket else self.power()
        while self.token in _FACTORS - _CALLS and not bracket:
            inside = _joined("*", inside, self.power())
        inside = _negative(inside) if negative else inside
        self.angle -= name in _ANGLES
        node = ("^", "e", inside) if name == "exp" else ("call", name, inside)
        if name in ("log", "lg"):
            node = ("*", ("call", "ln", inside), ("/", ("call", "ln", base)))
        return node if power == 1 else ("^", node, power)

    def matrix(self, name):
        """Rows of cells up to \\end; all rows must be of one length. One column is a tuple."""
        if "array" in name and self.token == "{":
            self.subscript()                                        # the columns' alignment
        rows, separator = [[]], ""
        while not separator.startswith("\\end"):
            rows[-1].append(self.expression())
            separator = self.next()
            if separator == "\\\\" and self.token.startswith("\\end"):
                separator = self.next()
            elif separator == "\\\\":
                rows.append([])
            _need(separator in ("&", "\\\\") or separator.startswith("\\end"))
        _need(len({len(row) for row in rows}) == 1)
        head = ("seq", "()") if len(rows[0]) == 1 < len(rows) else ("matrix", len(rows[0]))
        return (*head, *itertools.chain(*rows))

    def unit(self):
        """The words after a value in one spelling: square inches is in^2; nouns lose their s."""
        start, name, power = self.at, "", ""
        while self.token[:1] == '"' or (name and self.token in ("^", "/")):
            word = self.next().lstrip('"').lower() or "in"
            if word == "^":
                name += "^" + self.subscript()
            elif word == "/":
                name += "/" + (self.next().lower() if self.token in _LETTERS else "")
            elif word in _NOT_UNITS or self.at - start > 8:
                raise _Words
            elif word in ("square", "sq", "cubic", "cu"):
                power = "^2" if word[0] == "s" else "^3"
            else:
                singular = word[:-1] if word[-1] == "s" and len(word) > 3 else word
                name, power = name + _UNITS.get(word, singular) + power, ""
        self.units.append(name)

def _number(token):
    """The exact value of a number token."""
    if token[-1] == "}":                                            # 0.1\overline{6} = 1/10 + 6/90
        fixed, block = token[:token.index("\\")], token[token.index("{") + 1:-1]
        places = len(fixed.partition(".")[2])
        return Fraction(fixed + "0") + Fraction(int(block), (10 ** len(block) - 1) * 10 ** places)
    token = token if token.isdigit() else re.sub(r"[^0-9.eE+-]", "", token)
    exponent = token.lower().partition("e")[2]
    _need(not exponent or (len(exponent) < 6 and abs(int(exponent)) <= MAX_EXPONENT))
    return Fraction(int(token) if token.isdigit() else token)

def _negative(node):
    return -node if isinstance(node, Fraction) else ("-", node)

def _reciprocal(node):
    return 1 / node if isinstance(node, Fraction) and node else ("/", node)

def _joined(sign, a, b):
    """a + b or a * b, at once where both are numbers, else as one flat tuple."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a + b if sign == "+" else a * b
    return (*a, b) if isinstance(a, tuple) and a[0] == sign else (sign, a, b)

def _relation(signs, terms):
    """a = b, but what a chain of equal numbers says is the number, and a ≈ b says a (P7)."""
    names = 0
    while names < len(signs) and signs[names] in "=≈" and _is_name(terms[names]):
        names += 1
    if "≈" in signs[names:]:
        end = names + signs[names:].index("≈")
        signs, terms = signs[:end], terms[:end + 1]
    signs = ["=" if sign == "≈" else sign for sign in signs]
    chain = terms[names:]
    if set(signs) == {"="} and len(chain) > 1 and not _names(*chain):
        _need(all(_same(x, chain[-1]) for x in chain[:-1]))
        signs, terms = signs[:names], terms[:names] + chain[-1:]
    return ("rel", tuple(signs), *terms) if signs else terms[0]

_FIRST_PART = {"call": 2, "unit": 2, "rel": 2, "seq": 2, "matrix": 2, "text": 2, "based": 3}
_ANSWERS = ("list", "set", "all", "seq", "rel", "union", "minus", "matrix", "based", "text")

def _parts(node):
    return node[_FIRST_PART.get(node[0], 1):]

def _kind(node):
    return node[0] if isinstance(node, tuple) and node[0] in _ANSWERS else "value"

def _names(*nodes):
    """The variables of some nodes."""
    found = set()
    for node in nodes:
        if isinstance(node, tuple):
            found |= _names(*_parts(node))
        elif isinstance(node, str) and node not in _CONSTANTS:
            found.add(node)
    return found


# ---- values ----
#
# A value is a Fraction while everything in it is rational, else a _Ball: a complex number and a
# bound on its error. Balls are equal if they touch. A divisor whose ball holds zero makes the value
# undefined; a ball too wide to tell anything equals nothing. Variables stand for random rationals.

_DIGITS = decimal.Context(prec=120, Emax=99999, Emin=-99999, traps=[
    decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow, decimal.Underflow])
_ROUNDING = Decimal("1e-117")   # of a few operations, relative to their result
_WIDEST = Decimal("1e-40")      # ball that can still be compared, relative to its value
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620"
              "8998628034825342117067982148086513282306647093844609550582231725359408128481")
_0, _1 = Decimal(0), Decimal(1)

class _Ball(NamedTuple):
    """The complex number re + i im, each part known up to err."""
    re: Decimal
    im: Decimal = _0
    err: Decimal = _0

    @property
    def size(self):
        return (self.re * self.re + self.im * self.im).sqrt() if self.im else abs(self.re)

    def rounded(self):
        """The ball with room for the rounding of its last operations."""
        return self._replace(err=self.err + (abs(self.re) + abs(self.im)) * _ROUNDING)

    def __add__(self, other):
        w = _ball(other)
        return _Ball(self.re + w.re, self.im + w.im, self.err + w.err).rounded()

    def __mul__(self, other):
        (a, b, d), (x, y, e) = self, _ball(other)
        z_size, w_size = abs(a) + abs(b), abs(x) + abs(y)
        err = (z_size + d) * e + w_size * d + z_size * w_size * _ROUNDING
        return _Ball(a * x - b * y, a * y + b * x, err)
    __radd__, __rmul__ = __add__, __mul__

    def inverse(self):
        square, far = self.re * self.re + self.im * self.im, self.size - 2 * self.err
        _need(far > 0, _Undefined)
        err = 2 * self.err / (self.size * far)
        return _Ball(self.re / square, -self.im / square, err).rounded()

    def exp(self):
        _spend(20)
        _need(self.err < 1, _Undefined)
        size = self.re.exp()
        cosine, sine = _circle(self.im) if self.im else (_1, _0)
        return _Ball(size * cosine, size * sine, 2 * size * (self.err + _ROUNDING)).rounded()

    def ln(self):
        _spend(20)
        far = self.size - 2 * self.err
        _need(far > 0, _Undefined)
        x, y = self.re / self.size, self.im / self.size
        angle = _0 if x > 0 else +_PI
        if abs(self.im) > self.err:
            angle = Decimal(math.atan2(y, x))  # sixteen digits, tripled by each step of Newton's
            for _ in range(3):
                cosine, sine = _circle(angle)
                angle += y * cosine - x * sine
        return _Ball(self.size.ln(), angle, 2 * self.err / far + _ROUNDING).rounded()

def _ball(z):
    return z if isinstance(z, _Ball) else _Ball(Decimal(z.numerator) / z.denominator).rounded()

_dice, _POINTS = random.Random(0), []  # four points of random signs and six whole ones
for _n in range(10):  # with values for 12 variables each
    _signed = [_dice.choice((-1, 1)) * Fraction(_dice.randint(100, 2400), 1000) for _ in range(12)]
    _POINTS.append(_signed if _n < 4 else [Fraction(n) for n in _dice.sample(range(3, 40), 12)])
with decimal.localcontext(_DIGITS):
    _KNOWN = {"pi": _Ball(+_PI).rounded(), "e": _Ball(_1.exp()).rounded(), "i": _Ball(_0, _1)}

def _value(node, point):
    """A Fraction or _Ball, variables taken from point; raises _Undefined or ArithmeticError."""
    _spend(2)
    if isinstance(node, Fraction):
        return node
    if isinstance(node, str):
        _need(node in point or node in _KNOWN, _Undefined)
        return point[node] if node in point else _KNOWN[node]
    kind, *parts = node
    if kind in ("call", "unit"):
        name, *parts = parts
    _need(kind in ("call", "unit", "+", "*", "-", "/", "%", "^"), _Undefined)
    z, *others = [_value(part, point) for part in parts]
    if kind == "call":
        return _call(name, z, *others)
    if kind == "^":
        return _power(z, others[0])
    if kind == "/":
        return 1 / z if isinstance(z, Fraction) else z.inverse()
    for w in others:
        z = _bounded(z + w if kind == "+" else z * w)
    return z * {"-": -1, "%": Fraction(1, 100)}.get(kind, 1)

def _bounded(z):
    if isinstance(z, Fraction):
        bits = z.numerator.bit_length() + z.denominator.bit_length()
        _spend(bits // 64)
        _need(bits <= MAX_BITS, _Undefined)
    return z

def _power(z, n):
    """z^n: exact where it is rational; the principal value, but odd roots of negatives are real."""
    if isinstance(z, Fraction) and isinstance(n, Fraction):
        if n.denominator == 1:
            bits = max(abs(z.numerator), z.denominator).bit_length() if abs(z) != 1 else 0
            _need(abs(n) * bits <= MAX_BITS, _Undefined)
            return z ** int(n)
        if z == 0 < n:
            return z
        if z < 0 and n.denominator % 2:
            return _power(-z, n) * (-1 if n.numerator % 2 else 1)
    _spend(50)
    z = _ball(z)
    if n == Fraction(1, 2) and not z.im and z.size > z.err:         # by far the most frequent
        root, err = z.size.sqrt(), z.err / z.size.sqrt()
        return (_Ball(root, _0, err) if z.re > 0 else _Ball(_0, root, err)).rounded()
    return (z.ln() * n).exp()

def _circle(x):
    """Cosine and sine, by their series after reduction to [-pi, pi]."""
    _spend(80)
    _need(abs(x) < 10 ** 6, _Undefined)  # or more digits of pi than we carry
    with decimal.localcontext() as context:
        context.prec += 10
        x -= (x / (2 * _PI)).to_integral_value() * 2 * _PI
        sums, term, n = [_0, _0], _1, 0
        while abs(term) > Decimal("1e-125"):
            sums[n % 2] += term if n % 4 < 2 else -term
            n += 1
            term *= x / n
    return +sums[0], +sums[1]

def _call(name, z, k=Fraction(0)):
    """A function of values; all but ln, abs and the formulas want them real."""
    _spend(10)
    if name in _FORMULAS:
        return _value(_FORMULAS[name], {"x": z})
    if name == "ln":
        return _ball(z).ln()
    if name == "abs":
        return abs(z) if isinstance(z, Fraction) else _Ball(z.size, _0, 2 * z.err).rounded()
    if name in ("factorial", "binom"):
        _need(all(isinstance(n, Fraction) and n in range(1001) for n in (z, k)), _Undefined)
        _spend(100)
        whole = math.comb(int(z), int(k)) if name == "binom" else math.factorial(int(z))
        return _bounded(Fraction(whole))
    x, err = _real(z), _ball(z).err
    if name in ("sin", "cos"):
        return _Ball(_circle(x)[name == "sin"], _0, err + _ROUNDING * (1 + abs(x)))
    low, high = (z, z) if isinstance(z, Fraction) else (x - err, x + err)
    function = math.floor if name == "floor" else math.ceil
    _need(function(low) == function(high), _Undefined)
    return Fraction(function(low))

def _real(z):
    """The real number of a value, as a Decimal."""
    z = _ball(z)
    _need(abs(z.im) <= z.err <= _WIDEST * max(1, z.size), _Undefined)
    return z.re

_FORMULAS = {name: _parse(_tokens(formula, False)) for name, formula in {
    "tan": r"\sin x / \cos x", "cot": r"\cos x / \sin x", "sec": r"1/\cos x", "csc": r"1/\sin x",
    "sinh": "(e^x-e^{-x})/2", "cosh": "(e^x+e^{-x})/2", "tanh": "1-2/(e^{2x}+1)",
    "arcsin": r"-i\ln(ix+\sqrt{1-x^2})", "arccos": r"-i\ln(x+i\sqrt{1-x^2})",
    "arctan": r"i(\ln(1-ix)-\ln(1+ix))/2"}.items()}

def _try(function, *arguments):
    """The function's value, or None where it is undefined."""
    try:
        with decimal.localcontext(_DIGITS):
            return function(*arguments)
    except (_Undefined, ArithmeticError):
        _spend(0)  # raises again if the work is used up
        return None

def _close(z, w):
    """Are two values equal? None where one of them is undefined or too uncertain."""
    if None in (z, w) or isinstance(z, Fraction) and isinstance(w, Fraction):
        return None if None in (z, w) else z == w
    with decimal.localcontext(_DIGITS):
        z, w = _ball(z), _ball(w)
        touch = max(abs(z.re - w.re), abs(z.im - w.im)) <= z.err + w.err
        narrow = z.err + w.err <= _WIDEST * max(1, min(z.size, w.size))
        return touch and (narrow or None)


# ---- comparison ----

def _at_points(names):
    for values in (_POINTS if names else [()]) if len(names) <= 12 else ():
        yield dict(zip(sorted(names), values))

def _same_value(a, b):
    """Are two values equal, as they stand or at three random points or more?"""
    names, agreements = _names(a, b), 0
    for point in _at_points(names):
        agree = _close(_try(_value, a, point), _try(_value, b, point))
        if agree is False:
            return False
        agreements += bool(agree)
        if agreements == 4:
            break
    return agreements >= (3 if names else 1)

def _same(a, b):
    """Are two parsed answers equal? Raises _Undefined when the work is used up."""
    if a == b and (not isinstance(a, tuple) or a[0] in ("text", "based") or a == _MINUS_INFINITY):
        return True  # of other things parts might be undefined
    _spend(2)
    unit_a, a = a[1:] if isinstance(a, tuple) and a[0] == "unit" else ("", a)
    unit_b, b = b[1:] if isinstance(b, tuple) and b[0] == "unit" else ("", b)
    if unit_a and unit_b and unit_a != unit_b:                                          # P3
        return False
    kind_a, kind_b = _kind(a), _kind(b)
    kinds = {kind_a, kind_b}
    if "rel" in kinds and (kind_a != kind_b or a[1][0] != b[1][0]):                     # P7
        named_a, named_b = _after_name(a), _after_name(b)
        if (named_a is None) != (named_b is None):
            return _same(a if named_a is None else named_a, b if named_b is None else named_b)
    if kinds == {"value"}:
        percent = [isinstance(x, tuple) and x[0] == "%" for x in (a, b)]                # P5
        bare = [x[1] if has else x for x, has in zip((a, b), percent)]
        return _same_value(a, b) or (sum(percent) == 1 and _same_value(*bare))
    if _is_region(a) or _is_region(b):                                                  # P10
        if kinds == {"rel"} and _names(a) != _names(b):
            return False
        same = _same_region(a, b)
        if same is not None:
            return same
    if kinds == {"seq", "list"}:
        seq, items = (a, b[1:]) if kind_a == "seq" else (b, a[1:])
        named = [_after_name(x) for x in items]                     # m = 3, b = 1
        return all(_same(x, seq) for x in items) or (
            None not in named and seq[1] == "()" and _same_parts(("list", *named), seq))
    if kinds & {"list", "set", "all"} and not kinds & {"seq", "matrix"}:                # P6
        xs, ys = (_parts(x) if _kind(x) in ("list", "set", "all") else (x,) for x in (a, b))
        return _same_items(xs, ys, "set" in kinds or "value" in kinds)
    if kinds == {"based", "value"}:                                                     # P13
        return str(b) == a[1] if kind_a == "based" else str(a) == b[1]
    if kinds == {"rel"}:
        return _same_relation(a, b)
    return kinds in ({"seq"}, {"matrix"}) and a[1] == b[1] and _same_parts(a, b)

def _same_parts(a, b):
    a, b = _parts(a), _parts(b)
    return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))

def _same_items(xs, ys, repetition):
    """Equal in any order (P6). repetition: may an item occur more often on one side?"""
    if repetition:
        return (all(any(_same(x, y) for y in ys) for x in xs)
                and all(any(_same(x, y) for x in xs) for y in ys))
    rest = list(ys)
    for x in xs:
        match = next((k for k, y in enumerate(rest) if _same(x, y)), None)
        if match is None:
            return False
        del rest[match]
    return not rest

def _after_name(node):
    """What stands after a name (P7): 5 of x = 5, f(x) = 5 and x = y = 5; S of x in S, or None."""
    if _kind(node) != "rel" or set(node[1]) not in ({"="}, {"in"}):
        return None
    terms = node[2:]
    if len(terms) == 2 and _is_name(terms[1]) and not _is_name(terms[0]):
        return terms[0]
    named = _is_name(terms[0]) and all(_is_name(x) or _same(x, terms[-1]) for x in terms[1:-1])
    return terms[-1] if named else None

def _is_name(node):
    """Made of letters only: x, x_1, f(x), (x, y), AB, p+q, |AB|, V_1:V_2."""
    if not isinstance(node, tuple):
        return isinstance(node, str) and node not in _CONSTANTS
    if node[0] == "+":
        return all(_is_name(x[1] if isinstance(x, tuple) and x[0] == "-" else x) for x in node[1:])
    named = node[0] in ("*", "seq") or node[:2] == ("call", "abs")
    named = named or (node[0] == "/" and isinstance(node[1], str))
    return named and all(map(_is_name, _parts(node)))

def _same_relation(a, b):
    """Equal term by term, or one equation or inequality a constant multiple of the other (P11)."""
    a, b = (("rel", tuple(_FLIPPED[sign] for sign in r[1][::-1]), *r[:1:-1])
            if r[1][0] in (">", ">=") else r for r in (a, b))
    if a[1] != b[1] or _same_parts(a, b):
        return a[1] == b[1]
    if len(a[1]) > 1 or a[1] == ("in",) or any(_kind(x) != "value" for x in a[2:] + b[2:]):
        return False
    f, g = (("+", r[2], ("-", r[3])) for r in (a, b))
    ratios = []
    for point in _at_points(_names(f, g)):
        ratio = _try(_value, ("*", f, ("/", g)), point)
        if ratio is not None and _try(_value, ("/", "ratio"), {"ratio": ratio}) is not None:
            ratios.append(ratio)
    if len(ratios) < 3 or not all(_close(ratio, ratios[0]) for ratio in ratios):
        return False
    return a[1][0] in ("=", "!=") or _ball(ratios[0]).re > 0


# ---- regions of the line ----

_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!=", "in": "in"}
_HOLDS = {"<": (-1,), ">": (1,), "<=": (-1, 0), ">=": (0, 1), "=": (0,), "!=": (-1, 1)}

def _is_region(node):
    """Does the answer describe a part of the real line? (A pair alone may be a point.)"""
    kind = _kind(node)
    return (node == "ℝ" or kind in ("union", "minus", "all")
            or (kind == "rel" and not set(node[1]) <= {"=", "in"})
            or (kind == "list" and all(map(_is_region, node[1:]))))

def _same_region(a, b):
    """Do they hold the same ends, points between and beyond? None if that cannot be told."""
    try:
        ends_a, ends_b = _ends(a), _ends(b)
        ends = sorted({end for end in ends_a + ends_b if end and end.is_finite()} | {_0})
        with decimal.localcontext(_DIGITS):
            points = [ends[0] - 10 ** 6, ends[0] - 1, *ends, ends[-1] + 1, ends[-1] + 10 ** 6]
            points += [(2 * x + y) / 3 for x, y in zip(ends, ends[1:]) if _order(x, y)]
            inside = [_contains(a, x) for x in points]
            same = any(inside) and inside == [_contains(b, x) for x in points]
        return None if None in ends_a and None in ends_b else same
    except _Unreadable:
        return None

def _ends(node):
    """The ends of a region; None is that of 2x < 6. Raises _Unreadable if it is no region."""
    kind, names = _kind(node), _names(node)
    if kind == "rel":
        _need(len(names) == 1 and "in" not in node[1])
        return [None if _names(side) else _end(side) for side in node[2:] if side not in names]
    if kind == "seq":
        ends = [_end(part, infinite=True) for part in node[2:]]
        _need(len(ends) == 2 and ends[0] <= ends[1])
        _need(all(end.is_finite() or bracket in "()" for end, bracket in zip(ends, node[1])))
        return ends
    if kind == "value":
        return [] if node == "ℝ" else [_end(node)]
    _need(kind in ("list", "set", "all", "union", "minus"))
    return [end for part in node[1:] for end in _ends(part)]

def _contains(node, x):
    kind = _kind(node)
    if kind == "seq":
        low, high = (_end(part, infinite=True) for part in node[2:])
        low, high = _order(low, x), _order(x, high)
        return low < (node[1][0] == "[") and high < (node[1][1] == "]")
    if kind == "value":
        return node == "ℝ" or _order(x, _end(node)) == 0
    if kind == "rel":
        sides = [_end(side, dict.fromkeys(_names(node), Fraction(x))) for side in node[2:]]
        return all(_order(left, right) in _HOLDS[sign]
                   for left, sign, right in zip(sides, node[1], sides[1:]))
    inside = [_contains(part, x) for part in node[1:]]
    if kind == "minus":
        return inside == [True, False]
    return all(inside) if kind == "all" else any(inside)

def _end(node, point=None, infinite=False):
    """An end of an interval as a Decimal. Raises _Unreadable where there is none."""
    if node in ("∞", _MINUS_INFINITY) and infinite:
        return Decimal("Infinity" if node == "∞" else "-Infinity")
    _spend(20)
    real = _try(lambda: _real(_value(node, point or {})))
    _need(real is not None)
    return real

def _order(x, y):
    """-1, 0 or 1 for x < y, equal up to rounding, x > y."""
    near = x.is_finite() and y.is_finite() and abs(x - y) <= _WIDEST * max(abs(x), abs(y))
    return 0 if near or x == y else -1 if x < y else 1
