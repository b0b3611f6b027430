r"""Does a response end in the right answer? Extraction, equivalence, and the verdict that becomes
the reward R_VR.

    judge(response, reference) -> Verdict(reward, answer, status)
    extract_answer(response) -> str | None
    is_equivalent(prediction, reference) -> bool

Text goes through four small machines: a tokenizer (_tokens), a recursive-descent parser (_Parser),
an evaluator in two kinds of arithmetic (_exact, _value) and a comparison of parsed answers (_same).
Nothing is ever executed, every size is bounded by a constant below, and no regular expression can
backtrack over more than a bounded stretch. The rules below are the verifier "strict".

Where the final answer of a response is (extract_answer). The first rule that applies decides:

  R0  Only what follows the last </think> counts; if a <think> was never closed there is no answer.
  R1  The last \boxed{...} or \fbox{...} that is not blank. If it is never closed the response was
      cut off: no answer.
  R2  The last statement "answer is ...", "answers are ...", "answer: ...", "answer = ...", or what
      follows a line that says only (Final) Answer: the formula if it begins with a math delimiter,
      else the words up to the end of the sentence or up to because, since, so, which, as. If
      nothing follows, the response was cut off: no answer.
  R3  The last line that begins with #### and a number (how GSM8K writes it).
  R4  The whole response, if it is one line and a single word or without ordinary words.
  R5  The last number.
  R6  None.

When two answers are equal (is_equivalent). It is symmetric, and there is no tolerance anywhere:

  P1  The value counts, not the form: 2/4 is 1/2, \sqrt{8} is 2\sqrt{2}, (x+1)^2 is x^2+2x+1.
  P2  A rounded decimal is not the exact value: 0.33 is not 1/3. Terminating decimals are exact
      rationals.
  P3  A unit or counted noun on one side only is ignored; two units must be the same one, however
      spelled.
  P4  Degree signs are units (but sin 30° is the sine of an angle in degrees).
  P5  n% is n/100. A percent sign on one side only may also stand for nothing: 28% against 28.
  P6  Lists with commas, semicolons, and, or are unordered, with or without braces. (1, 2) is
      ordered and never a set.
  P7  A name in front (x =, f(x) =, (x, y) =, x \in) on one side only is ignored. 2x + z = 1 is
      not 1.
  P8  Text: case, \text wrappers, blanks, periods, and parentheses round one letter do not matter.
  P9  The brackets of a matrix do not matter, its shape and entries do.
  P10 An inequality in one variable is the interval it describes.
  P11 Equations are equal if terms are moved or both sides multiplied by a nonzero constant.
  P12 a \pm b is the two values.
  P13 A numeral's base must agree where both sides show one: 52_8 is not 52_7.
  P14 Variables keep their case and their names: 3r is neither 3R nor 3s.
  P15 Digits may be grouped in threes by a comma, {,}, \, or ,\! and by a blank.
  P16 Left-over \boxed, $ and \( \) wrappers are ignored.
  Roots are principal, except that odd roots of negative numbers are real; \sin^{-1} is the inverse
  function; log alone is to base 10; i, e and pi are constants. Expressions in variables must agree
  for negative values too: \sqrt{x^2} is |x|, not x. What cannot be read is equal only to the same
  spelling, and nothing undefined (1/0) equals anything else.

What earns no reward although the right number may be in it (judge):

  G1  No answer, or a blank one. Nothing that is only in an unfinished <think>, or in a box that
      was cut off.
  G2  A last number (R5) that ends a list of numbers: nobody has committed to it. Lists under R1 to
      R4 are lists (P6).
  G3  Boxes side by side, with fewer than five words or a hedge (or, maybe, another, ...) in
      between, count together as one list; a correction (wait, wrong, actually, ...) or more words
      in between leaves the last one alone.
  G4  A last number (R5) in or before a question or a task ("Find ...", "Compute ..."): the problem
      repeated.
  G5  A choice (A to E, True, False) needs R1 to R4 or words that state it ("is False",
      "option B"), last one counts.
  G6  A longer number that contains the reference: values are compared, never substrings. Likewise
      a last number (R5) inside a formula is not the answer, but what the formula's last side says:
      "is $3\sqrt{13}$." does not state 13.
"""

import decimal
import itertools
import logging
import math
import random
import re
import string
from contextvars import ContextVar
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

STATUSES = ("correct", "wrong", "no_answer", "unparsed", "error")
VERIFIERS = ("strict", "last-number")

# Bounds. All of them are sizes, none is a clock, so a verdict is the same on every machine.
MAX_ANSWER = 1000          # characters; a longer "answer" is never read as mathematics
MAX_TOKENS = 400           # of one answer
MAX_DEPTH = 25             # groups, fractions, roots and exponents inside one another
MAX_EXPONENT = 2000        # decimal digits, of 1e2000
MAX_BITS = 8000            # of an exact number
MAX_TERMS = 200            # of an exact polynomial
MAX_WORK = 6000            # steps of arithmetic for one verdict, about a microsecond each

log = logging.getLogger(__name__)


class Verdict(NamedTuple):
    """reward: 1.0 or 0.0; answer: the text that was compared, or None; status: one of STATUSES."""
    reward: float
    answer: str | None
    status: str


def judge(response: str, reference: str, verifier: str = "strict") -> Verdict:
    """Does the response commit itself to the reference answer?

    verifier: "strict" as documented above, or "last-number", the paper's rule: the last number or
    fraction anywhere. Raises ValueError for another verifier, and nothing else: a failure of ours
    is logged and has the status "error".
    """
    if verifier not in VERIFIERS:
        raise ValueError(f"unknown verifier {verifier!r}: choose one of {', '.join(VERIFIERS)}")
    try:
        answer = (last_number(response) if verifier == "last-number"
                  else _committed_answer(response, reference))
        if answer is None:
            return Verdict(0.0, None, "no_answer")
        if is_equivalent(answer, reference):
            return Verdict(1.0, answer, "correct")
        return Verdict(0.0, answer, "wrong" if len(answer) <= MAX_ANSWER and _readings(answer)
                       else "unparsed")
    except Exception:  # a bug must not look like a wrong answer, nor stop a run
        log.exception("verify.judge failed on the response %.200r with the reference %.200r",
                      response, reference)
        return Verdict(0.0, None, "error")


# --------------------------------------------------------------------------------------- extraction

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(rf"(?:(?<![\w)}}\]])[-+\u2212])?(?:\\?\$)?"
                     rf"(?:\\[dtc]?frac\s?\{{\s?-?{_DIGITS}\s?\}}\s?\{{\s?-?{_DIGITS}\s?\}}"
                     rf"|{_DIGITS}(?:\s?/\s?{_DIGITS})?)"
                     rf"(?:\s?\\?%)?")
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,20}")
_BLANK_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,20}\{\s*\}")
_UNBRACED = re.compile(r"[-+\u2212]?[0-9][0-9,]*(?:\.[0-9]+)?"
                       r"|\\?[A-Za-z]+(?:\{[^{}]{0,99}\}){0,2}|[^\s{}$.,;]")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_MARKER = re.compile(r"(?<!/)\banswers?[*_`\"'\s]{0,8}(?:\bis\b|\bare\b|:|=)"
                     r"|^[#>*_ \t]{0,12}(?:the\s)?(?:final\s)?answers?[*_ \t]{0,8}$",
                     re.IGNORECASE | re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?](?=[\s*\"'\u201d)_`\]]|$)|(?<=[0-9])\.(?=[A-Z])|;(?=\s|$)"
                           r"|(?<![,\s])[,\s]{1,20}(?:because|since|so|which|as)\b", re.IGNORECASE)
_HASHES = re.compile(r"^####[ \t]*([-+\u2212]?(?:\\?\$|[\u20ac\u00a3])?"
                     r"[-+\u2212]?\.?[0-9][^\n]{0,200})", re.MULTILINE)
_LEAD = re.compile(r"^\s*(?:therefore|thus|hence|simply|just|equal to|approximately)\s",
                   re.IGNORECASE)
_BOLD_END = re.compile(r"(?:\*\*|__)(?=[\s.,;]|$)")
_CALCULATION = re.compile(r"<<[^<>]*>>")                            # GSM8K's calculator marks
_WORD = re.compile(r"\\text\s?\{[^{}]*\}|\\[A-Za-z]+|[^\W\d_]{2,}")
_DELIMITERS = (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("$", "$"))
_QUOTES = (('"', '"'), ("'", "'"), ("`", "`"), ("\u201c", "\u201d"))


def extract_answer(response: str) -> str | None:
    """The final answer of a response by the rules R0 to R6, or None."""
    return _locate(_after_thinking(response))[0]


def last_number(text: str) -> str | None:
    """The last number anywhere: sign, commas, decimals, a/b, \\frac{a}{b}, percent sign (R5)."""
    return _last_number(text)[0]


def _after_thinking(response):
    """R0: what follows the last finished <think> block; nothing where one was left open."""
    text = response.rpartition("</think>")[2]
    return "" if "<think>" in text else text


def _locate(text):
    """(the answer, where it starts, the rule that found it), by R1 to R6 in that order."""
    boxes = _last_boxes(text, 1)
    if boxes:
        return *boxes[0][:2], "box"
    marker = None
    for marker in _MARKER.finditer(text):  # noqa: B007
        pass
    if marker:
        return _statement(text, marker.end()) or None, marker.end(), "statement"
    hashes = None
    for hashes in _HASHES.finditer(text):  # noqa: B007
        pass
    if hashes:
        return _trim(hashes[1]), hashes.start(), "hashes"
    bare = _BLANK_BOX.sub("", text).strip()
    if 0 < len(bare) <= MAX_ANSWER and "\n" not in bare and (
            not re.search(r"\s", bare) or all(word[0] == "\\" for word in _WORD.findall(bare))
            ) and _trim(bare):
        return _trim(bare), 0, "bare"
    return *_last_number(text), "number"


def _last_boxes(text, count):
    """R1: up to `count` boxes from the end, as (content, start, end).

    None is the content of a box never closed. Blank boxes do not count. Only the last 50 boxes and
    MAX_ANSWER characters of each are looked at.
    """
    boxes, limit = [], len(text)
    for _ in range(50):
        start = limit = max(text.rfind("\\boxed", 0, limit), text.rfind("\\fbox", 0, limit))
        if start < 0 or len(boxes) == count:
            break
        opening = _BOX.match(text, start)
        content = end = None
        if text.startswith("{", opening.end()):
            depth = 0
            for brace in _BRACE.finditer(text, opening.end(), opening.end() + MAX_ANSWER):
                depth += {"{": 1, "}": -1}.get(brace[0], 0)
                if depth == 0:
                    content = _trim(_BLANK_BOX.sub("", text[opening.end() + 1:brace.start()]),
                                    prose=False)
                    end = brace.end()
                    break
        elif unbraced := _UNBRACED.match(text, opening.end()):      # \boxed 5
            content, end = unbraced[0], unbraced.end()
        if content != "":
            boxes.append((content, start, end))
        if content is None:
            break
    return boxes


def _statement(text, start):
    """R2: what the text after a marker states."""
    window = text[start:].lstrip("*_:= \t\r\n")[:MAX_ANSWER]
    for left, right in _DELIMITERS:
        if window.startswith(left):
            close = window.find(right, len(left))
            inner = window[len(left):close]
            price = left == "$" and ("\n" in inner or inner != inner.strip()
                                     or window[close + 1:close + 2].isdigit())
            if close > 0 and inner.strip() and not price:
                return _trim(inner, prose=False)
            break
    line = _BOLD_END.sub("", re.split(r"[\r\n]", window, maxsplit=1)[0])
    stop = _SENTENCE_END.search(line)
    return _trim(line[:stop.start()] if stop else line)


def _last_number(text):
    last = max(text.rfind(digit) for digit in "0123456789")
    begin = max(0, last - 200)
    number = None
    for number in _NUMBER.finditer(text, begin, last + 8) if last >= 0 else ():  # noqa: B007
        pass
    if not number or 0 < begin == number.start():  # none, or one of more than 200 digits
        return None, -1
    return number[0].replace("\\$", "").replace("$", "").strip(), number.start()


def _trim(value, prose=True):
    """Without blanks, bold stars, paired quotes and delimiters, a lone $, final punctuation."""
    value = _LEAD.sub("", _CALCULATION.sub("", value))
    for _ in range(6):
        before = value
        value = value.strip(" \t\r\n*_" if prose else " \t\r\n")
        if value.endswith(tuple(".,;:!?" if prose else ".,;:")) and not value.endswith(".."):
            value = value[:-1]
        for left, right in _DELIMITERS + _QUOTES:
            inner = value[len(left):-len(right)]
            if (value.startswith(left) and value.endswith(right) and len(value) > len(left)
                    and left not in inner):
                value = inner
        if value.count("$") == 1 and "\\$" not in value:
            value = value.replace("$", "")
        if "{" not in value:                                        # what closes {"answer": 5}
            value = value.rstrip("}")
        if value == before:
            break
    return value


# --------------------------------------------------------------------------------------- commitment

_HEDGE = re.compile(r"\b(?:or|maybe|perhaps|possibly|alternatively|another|either|could|might)\b",
                    re.IGNORECASE)
_CORRECTION = re.compile(r"\b(?:wait|no[,.]|wrong|actually|corrected|correction|mistake|instead"
                         r"|sorry|oops)(?!\w)", re.IGNORECASE)
_LISTED = re.compile(r"[0-9)\]}%$](?:[ *_$]*(?:[,;|/]|\bor\b|\band\b|\bto\b)|[ \t])"  # 3, 4 or _
                     r"[\s,;|*_$(\[]*(?:and|or)?[\s*_$(\[]*$"
                     r"|(?:^|\n)[^\w\n]*[0-9][0-9.,/]*[^\w\n]*\n[^\w]*$")  # a lone number
_START = r"""(?:^|\n|[.!?{}][$)\]*"']{{0,3}}\s)\s{{0,9}}"""  # of a sentence
_TASK = re.compile(_START.format(":,")
                   + r"(?:how many|how much|find|compute|calculate|determine|evaluate)\b|"
                   + _START.format("") + r"(?:what|which|simplify|express|write|solve|give|answer|"
                   r"enter|round|prove|show|state|convert|factor|expand)\b", re.IGNORECASE)
_SENTENCE_START = re.compile(r"[.!?][$)\]*\"']{0,3}\s{1,9}(?=[A-Z$\\])|\n\s*\n")
_CHOICES = ("a", "b", "c", "d", "e", "true", "false")
_STATED = re.compile(r"\b(?:is|are|be|option|choice|choose|select|pick|therefore|thus|hence|so)\b"
                     r"[\s,:]{1,3}(?:(?:that|it|is|the|statement|option|choice|definitely|clearly"
                     r"|correct)\s){0,4}[*_`\"'(]{0,4}"
                     r"(?:((?-i:[A-E]))|(true|false|yes|no))\b(?!\s+or\b)", re.IGNORECASE)


def _committed_answer(response, reference):
    """extract_answer, but only what the response commits itself to: G1 to G5."""
    text = _after_thinking(response)
    answer, start, rule = _locate(text)
    if rule == "box" and answer is not None:                        # G3
        return _boxes_together(text)
    if rule != "number":
        return answer
    if _text(reference) in _CHOICES:                                # G5
        stated = None
        for stated in _STATED.finditer(text):  # noqa: B007
            pass
        return stated[1] or stated[2] if stated and "?" not in text[stated.end():] else None
    if answer is None or _LISTED.search(text[max(0, start - 60):start]) or _is_problem(text, start):
        return None
    return _formula_around(text, start) or answer


def _is_problem(text, start):
    """G4: does a question or task end the text, from the sentence with the number at `start` on?"""
    before = text[max(0, start - 500):start]
    if re.search(r"=[\s$*\\(]{0,5}$", before) and len(text) - start < 40:        # ... = 42.
        return "?" in text[start:]
    begins = [match.end() for match in _SENTENCE_START.finditer(before)]
    sentence = before[begins[-1] if begins else 0:] + text[start:start + 2000]
    return "?" in text[start:] or bool(_TASK.search(sentence))


def _formula_around(text, start):
    """G6: the last side of the closed formula round the number at `start`.

    None if there is no such formula, or if its last side cannot be read.
    """
    start += text[start] == "$"  # the number's $ may open a formula rather than name a price
    for left, right in _DELIMITERS:
        begin, end = (text.rfind(left, max(0, start - MAX_ANSWER), start),
                      text.find(right, start, start + MAX_ANSWER))
        inner = text[begin + len(left):end]
        prose = left == "$" and any(word[0] != "\\" for word in _WORD.findall(inner))
        if 0 <= begin and 0 <= end and right not in inner and not prose:
            side = _trim(re.split(r"=|\\approx", inner)[-1], prose=False)
            return side if _readings(side) else None
    return None


def _boxes_together(text):
    """G3: the last box and those shortly before it, as one list of the different answers."""
    (answer, start, _), *earlier = _last_boxes(text, 12)
    answers = [answer]
    for content, begin, end in earlier:
        if content is None:
            break
        if end > start:                                             # a box round the box
            continue
        gap, start = text[end:start], begin
        if len(gap) > 200 or _CORRECTION.search(gap) or (
                len(_WORD.findall(gap)) >= 5 and not _HEDGE.search(gap)):
            break
        if content not in answers:
            answers.append(content)
    return ", ".join(answers[::-1])


# -------------------------------------------------------------------------------------- equivalence

_SIMPLE = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")


class _Unreadable(Exception):
    """Not an answer in the grammar below, or larger than the bounds above."""


class _Words(Exception):
    """An ordinary word stands where a value should: the whole answer is text."""


class _Undefined(Exception):
    """No value: 1/0, log 0, an overflow, or more work than one verdict may take."""


class _Inexact(Exception):
    """A value outside the exact arithmetic below: compare numerically instead."""


class _TooLarge(_Inexact):
    """Exact in principle, but beyond the bounds: no precision tells 2^100000 from 2^100000 + 1."""


_work_left = ContextVar("_work_left")  # of this verdict, in steps of about a microsecond


def _spend(steps):
    """Count the work of a verdict, which a clock would measure differently on every machine."""
    left = _work_left.get() - steps
    _work_left.set(left)
    if left < 0:
        raise _Undefined


def is_equivalent(prediction: str, reference: str) -> bool:
    """Do the two texts name the same answer, by P1 to P16?

    Symmetric; never raises; bounded time and memory.
    """
    a, b = prediction.strip(), reference.strip()
    if not a or not b:
        return False
    if a == b:
        return True
    if len(a) > MAX_ANSWER or len(b) > MAX_ANSWER:
        return False
    if _SIMPLE.fullmatch(a) and _SIMPLE.fullmatch(b):  # the common case needs no parser
        return Fraction(a) == Fraction(b)
    try:
        _work_left.set(MAX_WORK)
        if _equal(a, b):
            return True
        label_a, label_b = _LABEL.fullmatch(a), _LABEL.fullmatch(b)  # "B) False" is B and is False
        if bool(label_a) == bool(label_b):
            return False
        label, other = (label_a, b) if label_a else (label_b, a)
        return _text(label[1]) == _text(other) or _equal(label[2], other)
    except _Undefined:                                              # out of work
        return False


def kind_of(answer: str) -> str | None:
    """How an answer is read: "value", "choice", "text", or None where it cannot be read."""
    if re.fullmatch(r"\(?([A-E]|true|false)\)?", answer.strip(), re.IGNORECASE):
        return "choice"
    if len(answer) > MAX_ANSWER:
        return None
    kinds = [_kind(reading) for reading in _readings(answer)]
    return None if not kinds else "text" if kinds[0] == "text" else "value"


def _equal(a, b):
    readings_a, readings_b = _readings(a), _readings(b)
    if any(_same(x, y) for x in readings_a for y in readings_b):
        return True
    if any(_kind(x) == "text" for x in readings_a + readings_b):
        return _text(a) == _text(b)
    # outside the grammar: the same spelling
    return not readings_a and not readings_b and _spelling(a) == _spelling(b)


def _readings(text):
    """The ways to read an answer.

    A comma may group digits or separate items (100,200), a letter may be a unit (10 m).
    """
    texts = [text, _LONE_UNIT.sub(r" \\text{\1}", text)] if _LONE_UNIT.search(text) else [text]
    readings = []
    for grouping in (True, False) if _GROUPED.search(text) else (True,):
        for reading in texts:
            try:
                readings.append(_Parser(_tokens(reading, grouping)).answer())
            except _Words:
                form = _text(text)
                return [_TEXT_VALUES.get(form, ("text", form))]
            except _Unreadable:
                pass
    return readings


# --------------------------------------------------------------------------------------------- text

_WRAPPERS = (r"\\(?:text|mbox|mathrm|mathbf|mathit|mathsf|textbf|textit|textrm|textnormal"
             r"|operatorname)\s?\{")
_TEXT_VALUES = {"nosolution": ("set",), "nosolutions": ("set",), "norealsolution": ("set",),
                "emptyset": ("set",), "norealsolutions": ("set",),
                "allrealnumbers": "ℝ", "allreals": "ℝ"}
_LABEL = re.compile(rf"(?:{_WRAPPERS})?\(?([A-E])[).:](?:[\s}}~]|\\[\s,;:])+([\w\\$].*)", re.DOTALL)


def _spelling(text):
    """The text with single blanks and without a final period."""
    return " ".join(text.split()).rstrip(".")


def _text(text):
    """The normal form of a text answer (P8): no wrappers, blanks, periods, quotes or case.

    yes is true, (B) is b.
    """
    form = re.sub(_WRAPPERS, "{", text).lower()
    form = re.sub(r"\\[\s,;:!]|[\s{}$~\"'*`_\u2018\u2019\u201c\u201d]|\.(?![0-9])", "", form)
    form = re.sub(r"^(?:option|choice)(?=\(?[a-e]\)?$)", "", form)
    form = re.sub(r"^\(([a-z])\)$", r"\1", form)
    return {"yes": "true", "no": "false"}.get(form, form)


# ------------------------------------------------------------------------------------------- tokens

_GROUPED = re.compile(r"[0-9][ ,][0-9]{3}(?![0-9])")
_TOKEN = {grouping: re.compile(rf"""
     [0-9]{{1,3}}(?:(?:,\\!\s?|\{{,\}}|\\[,!]\s?{comma})[0-9]{{3}})+(?![0-9])(?:\.[0-9]+)?  # 1,234
    |[0-9]*\.[0-9]*\\(?:overline|bar|dot)\s?\{{[0-9]+\}}  # 0.1\overline{{6}}
    |(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?
    |{_WRAPPERS}[^{{}}]*\}}
    |\\(?:begin|end)\s?\{{[A-Za-z]+\*?\}}
    |\\mathbb\s?\{{?[A-Z]\}}?
    |\\[A-Za-z]+|\\.|[A-Za-z]+|<=|>=|!=|\*\*|\.\.\.|\S""", re.VERBOSE | re.DOTALL)
    for grouping, comma in ((True, "|[ ,]"), (False, ""))}
_DEGREE = re.compile(r"\^\s?\{?\s?\\circ\s?\}?|\\circ(?![A-Za-z])")
_ORDINAL = re.compile(r"(?<=[0-9])\s?\^\s?\{?\s?(?:\\(?:text|mathrm)\s?)?"
                      r"\{?(?:st|nd|rd|th)\}?\s?\}?")
_LONE_UNIT = re.compile(r"(?<=[0-9]) ([mshgLNJWV])(?=/[a-z]{1,3}$|\^[23]$|\s?(?:[,;]|$))")

_UNICODE = str.maketrans({
    "−": "-", "–": "-", "－": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "÷": "/", "∕": "/",
    "⁄": "/", "π": "\\pi ", "∞": "\\infty ", "√": "\\sqrt ", "≤": "<=", "≥": ">=", "⩽": "<=",
    "⩾": ">=", "≠": "!=", "∪": "\\cup ", "∈": "\\in ", "∅": "\\emptyset ", "±": "\\pm ",
    "∓": "\\mp ", "≈": "\\approx ", "…": "...", "º": "°", "％": "%", "θ": "\\theta ",
    "α": "\\alpha ", "β": "\\beta ", "λ": "\\lambda ", "，": ",", "：": ":", "（": "(", "）": ")",
    "⟨": "\\langle ", "⟩": "\\rangle ", "’": "'", "²": "^2", "³": "^3",
    **{fraction: f" {top}/{bottom}" for fraction, top, bottom in zip(
        "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "112131234151357", "233445555668888")},
    **{chr(0xFF10 + digit): str(digit) for digit in range(10)}})

_BEYOND_ASCII = ("°", "ℝ", "€", "£", "¢")
_SKIPPED = frozenset(r"""\left \right \displaystyle \textstyle \limits \big \Big \bigl \bigr \Bigl
    \Bigr \bigg \Bigg \quad \qquad \, \; \: \! \( \) \[ \] ~ \vec \hat \boldsymbol \overline \bar
    \overrightarrow \rm \bf \it \text \mathrm \mathbf \mbox \textbf \hline""".split()) | {
    "\\ ", "\\\n", "\\\t", "\\\r"}
_ALIASES = dict(pair.split("~") for pair in r"""
    \dfrac~\frac \tfrac~\frac \cfrac~\frac \dbinom~\binom \tbinom~\binom \times~* \cdot~* \ast~*
    \div~/ **~^ \leq~<= \le~<= \leqslant~<= \geq~>= \ge~>= \geqslant~>= \neq~!= \ne~!= \lt~< \gt~>
    \colon~: \land~and \lor~or \lbrace~\{ \rbrace~\} \lvert~| \rvert~| \vert~| \mid~| \|~| \langle~(
    \rangle~) \lbrack~[ \rbrack~] \%~% \$~$ percent~% \varnothing~\emptyset ...~\dots \ldots~\dots
    \cdots~\dots \degree~° \backslash~\setminus \R~ℝ \mathbb{R}~ℝ infinity~\infty inf~\infty
    asin~arcsin acos~arccos atan~arctan""".split())
_FUNCTIONS = frozenset("sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan log ln lg exp "
                       "abs floor ceil min max gcd lcm".split())
# may be written without a backslash
_PLAIN = _FUNCTIONS | {"sqrt", "pi", "theta", "alpha", "beta", "lambda"}
_UNITS = {spelling: unit.split()[0] for unit in """
    $ dollar dollars usd bucks; cent cents ¢; eur euro euros €; gbp £; lb lbs pound pounds;
    ° degree degrees deg; m meter meters metre metres;
    cm centimeter centimeters centimetre centimetres; mm millimeter millimeters;
    km kilometer kilometers kilometre kilometres; in inch inches; ft foot feet; yd yard yards;
    mi mile miles; g gram grams; kg kgs kilogram kilograms; mg milligram milligrams;
    oz ounce ounces; l liter liters litre litres; ml milliliter milliliters;
    s sec secs second seconds; min mins minute minutes; h hr hrs hour hours; day days; per /; mph;
    kph; rpm; sq square; cu cubic; th; st; nd; rd""".split(";") for spelling in unit.split()}
_NOT_UNITS = frozenset("""not no none nor or and but is are be was if then than to maybe perhaps
    possibly about versus vs plus minus times over divided by squared cubed factorial point half
    halves third thirds quarter quarters fourth fifth fifths tenth tenths hundredth hundredths
    hundred thousand million billion trillion dozen am pm wrong incorrect false true yes unknown
    undefined nan mod modulo power root base between either neither except without less more greater
    fewer from through until approximately answer""".split())
_SHORT_WORDS = _NOT_UNITS | set("""one two six ten yes odd the it of nan red men day car cup box pen
    egg cat dog way pie bag bus jar all any old new ago age top""".split())
_NUMBER_WORDS = {word: n for n, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty".split())} | {
    word: 10 * n
    for n, word in enumerate("thirty forty fifty sixty seventy eighty ninety".split(), 3)}
_MULTIPLIERS = {'"hundred': 100, '"thousand': 10 ** 3, '"million': 10 ** 6, '"billion': 10 ** 9,
                '"trillion': 10 ** 12}


def _tokens(text, grouping):
    """Cut an answer into numbers, letters, \\commands, signs and '"words' (with a quote in front).

    grouping: may a comma or a blank group the digits of a number?
    """
    if not text.isascii():
        text = text.translate(_UNICODE)
    if "\\circ" in text:
        text = _DEGREE.sub("°", text)
    if "$" in text:  # pairs are math delimiters, others currency
        after = re.findall(r"(?<!\\)\$(.?)", text, re.DOTALL)
        if len(after) % 2 == 0 and not all(character.isdigit() for character in after):
            text = re.sub(r"(\\\$)|\$", r"\1", text)
    if "^" in text:
        text = _ORDINAL.sub(r" \\text{th}", text)
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1]
    while (box := _BOX.match(text)) and text.endswith("}"):
        text = text[box.end() + 1:-1]
    tokens = []
    for token in _TOKEN[grouping].findall(text):
        token = _ALIASES.get(token, token)
        if token in _SKIPPED:
            continue
        if token[-1] == "}" and re.match(_WRAPPERS, token):
            inside = token[token.index("{") + 1:-1].strip()
            if inside.lower() in ("and", "or"):
                tokens.append(inside.lower())
            elif inside[:1].isalpha():  # a vector \mathbf{v}, else words or a unit
                tokens.append(inside if len(inside) == 1 and token.startswith("\\mathbf")
                              else '"' + inside)
            elif inside:
                tokens += _tokens(inside, grouping)                 # (B), 13, 12 dollars
        elif not token.isascii() and token not in _BEYOND_ASCII:
            raise _Words if token.isalpha() else _Unreadable
        elif token.isalpha() and len(token) > 1:
            tokens += _letters(token, after_number=bool(tokens) and tokens[-1][0].isdigit())
        else:
            tokens.append(token)
    if not tokens or len(tokens) > MAX_TOKENS:
        raise _Unreadable
    return tokens


def _letters(name, after_number):
    """A run of letters: a connective, a function, a unit or word, or a product of variables."""
    lower = name.lower()
    if lower in ("and", "or"):
        return [lower]
    if name in _PLAIN and not (after_number and name in _UNITS):    # sec and min are both
        return ["\\" + name]
    if len(name) > 3 or lower in _UNITS or lower in _SHORT_WORDS:
        return ['"' + name]
    for function in (name[:-1], name[:2]):                          # sinx, pir
        if function in _PLAIN and len(name) - len(function) == 1 and name[-1] in "xyzrhnkRt":
            return ["\\" + function, name[-1]]
    return list(name)


# ------------------------------------------------------------------------------------------- parser
#
# A value is an int, a Fraction, a name (str: a variable, or a constant: pi, e, i, ∞) or a tuple:
#     ("+", a, b, ...)  ("*", a, b, ...)  ("-", a) the negative  ("/", a) the reciprocal
#     ("^", a, b)  ("%", a)  ("call", function, a, ...)  ("unit", unit, a)
#     ("pm", a) plus or minus a  ("mp", a) minus or plus a
# Around values stand answers:
#     ("list", a, ...)  ("all", a, ...) inequalities joined by and  ("set", a, ...)
#     ("seq", brackets, a, ...) in order  ("rel", signs, a, ...)  ("union", a, ...)  ("minus", a, b)
#     ("ratio", a, ...)  ("matrix", columns, a, ...)  ("based", digits, base)  ("text", normal form)

_RELATIONS = {"=": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "\\in": "in",
              "\\approx": "="}
_INEQUALITIES = {"<", ">", "<=", ">=", "!="}
_ANGLES = ("sin", "cos", "tan", "cot", "sec", "csc")
_GREEK = frozenset("alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa "
                   "lambda mu nu xi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta "
                   "Theta Lambda Xi Pi Sigma Phi Psi Omega ell".split())
_CONSTANTS = ("pi", "e", "i", "∞", "ℝ", "…")
_NAMED = {"\\pi": "pi", "\\infty": "∞", "\\dots": "…", "ℝ": "ℝ", "\\emptyset": ("set",)}
_CALLS = {"\\" + name for name in _FUNCTIONS}
_LETTERS = frozenset(string.ascii_letters)
_FACTORS = _LETTERS | {"\\" + name for name in _GREEK} | {
    "\\frac", "\\sqrt", "\\pi", "\\binom", "\\infty", "\\lfloor", "\\lceil", "{"}
_CLOSING = {"(": (")", "]"), "[": ("]", ")", "["), "]": ("[", "]"), "{": ("}",), "\\{": ("\\}",)}


class _Parser:
    """Recursive descent, one method per level.

    The levels are answer, item, relation, union, ratio, sum, product, power, atom.
    """

    def __init__(self, tokens: list[str]):
        self.tokens = tokens + ["", "", ""]     # the end, and room to look ahead
        self.at = 0
        self.token = tokens[0]
        self.depth = 0              # of atoms inside atoms
        self.bars = 0               # open absolute values
        self.angle = 0              # > 0 in the argument of a trigonometric function
        self.units = []             # seen in this item
        self.signs = [token for token in tokens if token in ("\\pm", "\\mp")]

    def next(self) -> str:
        token = self.token
        if not token:
            raise _Unreadable
        self.at += 1
        self.token = self.tokens[self.at]
        return token

    def expect(self, token: str):
        if self.token != token:
            raise _Unreadable
        self.next()

    def answer(self):
        """The whole text."""
        items = self.both_signs(self.items((",", ";", "and", "or")))
        if self.token:
            raise _Unreadable
        if len(items) == 1:
            return items[0]
        joined = set(self.tokens) & {",", ";", "and", "or"}
        inequalities = all(_kind(x) == "rel" and x[1][0] in _INEQUALITIES for x in items)
        return ("all" if inequalities and joined == {"and"} else "list", *items)

    def items(self, joiners: tuple) -> list:
        """Items with commas or the like in between."""
        items = [self.item()]
        while self.token in joiners:
            self.next()
            if self.token in ("and", "or"):                         # 1, 2, and 3
                self.next()
            items.append(self.item())
        return items

    def both_signs(self, items: list) -> list:
        return items if not self.signs else [
            x for item in items for x in _both_signs(item, "\\mp" in self.signs)]

    def item(self):
        """A relation or value and its unit (P3)."""
        outer, self.units = self.units, []
        if self.token == "\\approx":
            self.next()
        node = self.relation()
        if self.token[:1] == '"':
            self.unit()
        if self.units:
            node = ("unit", " ".join(sorted(set(self.units))), node)
        self.units = outer
        return node

    def relation(self):
        """a = b, a < b <= c, x in S."""
        terms, signs = [self.name_before_equals() or self.union()], []
        while self.token in _RELATIONS or (
                self.token == '"in' and self.tokens[self.at + 1] in _CLOSING):
            signs.append(_RELATIONS.get(self.next(), "in"))
            terms.append(self.union())
        return ("rel", tuple(signs), *terms) if signs else terms[0]

    def name_before_equals(self) -> str | None:
        """The left side of f(x) = ... or Total cost = ... as one name."""
        end = self.at
        if self.token[:1] == '"' and self.token[1:].lower() not in _NOT_UNITS:
            while self.tokens[end][:1] == '"':
                end += 1
        elif self.token in _LETTERS and self.tokens[end + 1] in ("(", "^"):
            while self.tokens[end] not in (")", "=", ""):
                end += 1
            end += 1
        if end == self.at or self.tokens[end] != "=" or self.tokens[end - 1] in ("=", ""):
            return None
        name = "".join(self.tokens[self.at:end])
        self.at, self.token = end, "="
        return name

    def union(self):
        node = self.ratio()
        for _ in range(30):
            if self.token == "\\cup":
                self.next()
                node = (*(node if _kind(node) == "union" else ("union", node)), self.ratio())
            elif self.token == "\\setminus":
                self.next()
                node = ("minus", node, self.ratio())
            else:
                break
        return node

    def ratio(self):
        terms = [self.sum()]
        while self.token == ":" and not self.bars:
            self.next()
            terms.append(self.sum())
        return ("ratio", *terms) if len(terms) > 1 else terms[0]

    def sum(self):
        terms = [self.product()]
        while self.token in ("+", "-", "\\pm", "\\mp"):
            terms.append(self.product())                            # which takes the sign
        return ("+", *terms) if len(terms) > 1 else terms[0]

    def product(self):
        """Factors with *, / or nothing in between; a sign in front covers them all."""
        negative = self.minus()
        both = {"\\pm": "pm", "\\mp": "mp"}.get(self.token)
        if both:
            self.next()
        factors = [self.power()]
        while True:
            if self.token in ("*", "/"):
                sign = self.next()
                factor = self.signed(self.power)
                factors.append(factor if sign == "*" else _reciprocal(factor))
            elif self.token == "%":                                 # 1/2% is half a percent
                self.next()
                factors = [("%", _times(factors))]
            elif self.token in _FACTORS or self.token in _CALLS or self.token == "(" or (
                    self.token == "|" and not self.bars) or (
                    self.token[:1].isdigit() and self.tokens[self.at - 1] in ("!", ")", "}")):
                factors.append(self.power())                        # 2x, 3(x+1), x sin x, 3!4!
            else:
                break
        node = (both, _times(factors)) if both else _times(factors)
        return _negative(node) if negative else node

    def minus(self) -> bool:
        """Take the plus and minus signs here: is their product a minus?"""
        negative = False
        while self.token in ("+", "-"):
            negative ^= self.next() == "-"
        return negative

    def signed(self, parse):
        negative = self.minus()
        node = parse()
        return _negative(node) if negative else node

    def power(self):
        """An atom and what follows it: ! ° ^ million."""
        node = self.atom()
        for _ in range(6):
            if self.token == "^":
                tower = [node]
                while self.token == "^" and len(tower) < MAX_DEPTH:
                    self.next()
                    tower.append(self.argument())
                while len(tower) > 1:                               # 2^3^2 is 2^(3^2)
                    tower[-2:] = [("^", tower[-2], tower[-1])]
                node = tower[0]
            elif self.token == "!":
                self.next()
                node = ("call", "factorial", node)
            elif self.token == "°":
                self.next()
                if self.angle:                                      # sin 30° means degrees
                    node = ("*", node, "pi", Fraction(1, 180))
                else:
                    self.units.append("°")
            elif self.token in _MULTIPLIERS:
                node = ("*", node, _MULTIPLIERS[self.next()])
            else:
                break
        return node

    def atom(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Unreadable
        token = self.token
        if token[:1].isdigit() or (token[:1] == "." and len(token) > 1):
            node = self.number()
        elif token in _CLOSING:
            node = self.group()
        elif token in _NAMED:
            node = _NAMED[self.next()]
        elif token in _LETTERS or token[1:] in _GREEK:
            node = self.next().lstrip("\\")
            if self.token == "_":
                self.next()
                node += "_" + self.subscript()
        elif token in _CALLS:
            node = self.call()
        elif token[:1] == "\\":
            node = self.command()
        elif token == "|":
            self.next()
            self.bars += 1
            node = ("call", "abs", self.sum())
            self.bars -= 1
            self.expect("|")
        elif token in ("$", "€", "£", "¢"):
            self.units.append(_UNITS[self.next()])
            node = self.signed(self.atom)
        elif token[:1] == '"':
            node = self.word()
        else:
            raise _Unreadable
        self.depth -= 1
        return node

    def number(self):
        token = self.next()
        value = _number(token)
        if self.token == "_":
            self.next()
            return ("based", token.lstrip("0"), self.subscript())
        if isinstance(value, int):  # mixed numbers: 1\frac{3}{4}, 2 1/2
            top, bar, bottom = self.tokens[self.at:self.at + 3]
            if top == "\\frac":
                part = self.command()
                return (value + part if isinstance(part, Fraction) and 0 < part < 1
                        else ("*", value, part))
            if top.isdigit() and bar == "/" and bottom.isdigit() and int(bottom):
                self.next(), self.next(), self.next()
                return value + Fraction(int(top), int(bottom))
        return value

    def subscript(self) -> str:
        """A subscript as text: 5, {10}, {n+1}."""
        if self.token != "{":
            return self.next()
        self.next()
        start = self.at
        while self.token not in ("}", ""):
            self.next()
        text = "".join(self.tokens[start:self.at])
        self.expect("}")
        return text

    def group(self):
        """Brackets: mere grouping round one item, else a tuple or interval, or a set in braces."""
        opening = self.next()
        bars, self.bars = self.bars, int(opening == "\\{")  # in a set, a bar may be "such that"
        items = []
        if opening + self.token != "\\{\\}":
            if (opening in ("(", "[") and "," in self.token[1:]
                    and self.tokens[self.at + 1] in _CLOSING[opening]):
                raise _Unreadable                                   # (1,234) is a pair, no number
            items = self.items((",", ";"))
        if opening == "\\{" and self.token in ("|", ":"):           # {x | x > 2}
            self.next()
            items = self.items((",", ";", "and", "or"))
            self.expect("\\}")
            self.bars = bars
            return items[0] if len(items) == 1 else ("list", *items)
        if self.token not in _CLOSING[opening]:
            raise _Unreadable
        closing = self.next()
        self.bars = bars
        if opening == "\\{" or (opening == "{" and len(items) > 1):
            return ("set", *self.both_signs(items))
        if len(items) == 1:
            return items[0]
        return ("seq", {"]": "("}.get(opening, opening) + {"[": ")"}.get(closing, closing), *items)

    def command(self):
        name = self.next()[1:]
        if name == "frac":
            top = self.argument(shared=True)
            return _times([top, _reciprocal(self.argument())])
        if name == "sqrt":
            index = 2
            if self.token == "[":
                self.next()
                index = self.sum()
                self.expect("]")
            return ("call", "root", self.argument(), index)
        if name == "binom":
            top = self.argument()
            return ("call", "binom", top, self.argument())
        if name in ("lfloor", "lceil"):
            inside = self.sum()
            self.expect("\\r" + name[1:])
            return ("call", name[1:], inside)
        if name.startswith("begin") and "matrix" in name or "array" in name:
            return self.matrix(name)
        raise _Unreadable

    def argument(self, shared: bool = False):
        """What \\frac, \\sqrt, ^ take: a group or one token.

        shared: of 34 after \\frac, 3 is on top and 4 below.
        """
        if self.token.isdigit():
            digits = self.token
            if shared and len(digits) > 1:
                self.tokens[self.at] = self.token = digits[1:]
                return int(digits[0])
            return int(self.next())
        return self.signed(self.atom)

    def call(self):
        """\\sin x, \\sin^2 x, \\sin^{-1} x, \\log_2 8, \\max(1, 2).

        Without brackets the argument goes up to the next call.
        """
        name = self.next()[1:]
        power = base = None
        while self.token in ("^", "_"):
            if self.next() == "^":
                power = self.argument()
            else:
                base = self.argument()
        if power == -1 and name in ("sin", "cos", "tan"):
            name, power = "arc" + name, None
        self.angle += name in _ANGLES
        if self.token in ("(", "{"):
            inside = self.atom()
        else:
            negative = self.minus()
            factors = [self.power()]
            while self.token in _FACTORS:
                factors.append(self.power())
            inside = _negative(_times(factors)) if negative else _times(factors)
        self.angle -= name in _ANGLES
        arguments = inside[2:] if _kind(inside) == "seq" else (inside,)
        if name in ("log", "lg"):
            name, arguments = "log", (*arguments, 10 if base is None else base)
        node = ("call", name, *arguments)
        return node if power is None else ("^", node, power)

    def matrix(self, name: str):
        """Rows of cells up to \\end; all rows must be of one length."""
        if "array" in name and self.token == "{":
            self.subscript()                                        # the columns' alignment
        rows = [[]]
        while True:
            rows[-1].append(self.sum())
            separator = self.next()
            if separator == "\\\\" and not self.token.startswith("\\end"):
                rows.append([])
            elif separator == "\\\\":
                self.next()
                break
            elif separator.startswith("\\end"):
                break
            elif separator != "&":
                raise _Unreadable
        if len({len(row) for row in rows}) != 1:
            raise _Unreadable
        return ("matrix", len(rows[0]), *(cell for row in rows for cell in row))

    def word(self):
        """A word where a value should stand: a number word or a lone letter, else all is text."""
        word = self.next()[1:]
        if len(word) == 1:
            return word
        value = _NUMBER_WORDS.get(word.lower())
        if value is None:
            raise _Words
        if value >= 20 and self.token == "-":                       # twenty-five
            self.next()
            value += _NUMBER_WORDS.get(self.next()[1:].lower(), 0)
        return value

    def unit(self):
        """The words after a value, with powers and slashes, as a unit or counted noun.

        Some words never are one.
        """
        words = []
        while self.token[:1] == '"' or (words and self.token in ("^", "/")):
            word = self.next()
            if word == "^":
                words.append("^" + self.subscript())
            elif word == "/" and self.token in _LETTERS:
                words += ["/", self.next()]
            else:
                words += re.findall(r"[A-Za-z]+|\^?[0-9]+|/", word)
        if len(words) > 6 or any(word.lower() in _NOT_UNITS for word in words):
            raise _Words
        self.units.append(_unit_name(words))


def _unit_name(words):
    """One spelling for each unit: square inches and inches^2 are in^2; a noun loses its plural."""
    name, power = "", ""
    for word in words:
        word = word.lower()
        if word in ("square", "sq", "cubic", "cu"):
            power = "^2" if word[0] == "s" else "^3"
        elif word[-1].isdigit():
            name += "^" + word.lstrip("^")
        else:
            name += _UNITS.get(word) or (word[:-1] if word[-1] == "s" and len(word) > 3 else word)
            name, power = name + power, ""
    return name


def _number(token):
    """The exact value of a number token: int or Fraction."""
    if token.isdigit():
        return int(token)
    if token[-1] == "}":                                            # 0.1\overline{6} = 1/10 + 6/90
        fixed, block = token[:token.index("\\")], token[token.index("{") + 1:-1]
        places = len(fixed.partition(".")[2])
        return Fraction(fixed + "0") + Fraction(int(block), (10 ** len(block) - 1) * 10 ** places)
    token = re.sub(r"[^0-9.eE+-]", "", token)
    exponent = token.lower().partition("e")[2]
    if exponent and (len(exponent) > 6 or abs(int(exponent)) > MAX_EXPONENT):
        raise _Unreadable
    return _whole(Fraction(token))


def _whole(value):
    """An int where the value is one."""
    return value.numerator if value.denominator == 1 else value


def _negative(node):
    return -node if isinstance(node, (int, Fraction)) else ("-", node)


def _reciprocal(node):
    return 1 / Fraction(node) if isinstance(node, (int, Fraction)) and node else ("/", node)


def _times(factors):
    """A product; 3/4 and \\frac{3}{4} become one Fraction at once."""
    if len(factors) == 1:
        return factors[0]
    if (len(factors) == 2 and isinstance(factors[1], Fraction)
            and isinstance(factors[0], (int, Fraction))):
        return _whole(factors[0] * factors[1])
    return ("*", *factors)


_FIRST_PART = {"call": 2, "unit": 2, "rel": 2, "seq": 2, "matrix": 2, "text": 2, "based": 3}


def _parts(node):
    return node[_FIRST_PART.get(node[0], 1):]


def _with_parts(node, change):
    """The node with `change` applied to each of its parts."""
    first = _FIRST_PART.get(node[0], 1)
    return node[:first] + tuple(change(part) for part in node[first:])


def _kind(node):
    return node[0] if isinstance(node, tuple) and node[0] in (
        "list", "set", "all", "seq", "rel", "union", "minus", "ratio", "matrix", "based", "text"
    ) else "value"


def _names(node, found):
    """Add the variables of a node to `found`."""
    if isinstance(node, tuple):
        for part in _parts(node):
            _names(part, found)
    elif isinstance(node, str) and node not in _CONSTANTS:
        found.add(node)
    return found


def _both_signs(node, together):
    """The values of a node with plus-minus signs in it.

    All combinations, or two where a minus-plus ties them.
    """
    def count(node) -> int:
        return isinstance(node, tuple) and (node[0] in ("pm", "mp")) + sum(map(count, _parts(node)))

    def choose(node, bits):
        if not isinstance(node, tuple):
            return node
        if node[0] in ("pm", "mp"):
            negative = next(bits) ^ (node[0] == "mp")
            inside = choose(node[1], bits)
            return _negative(inside) if negative else inside
        return _with_parts(node, lambda part: choose(part, bits))

    n = count(node)
    if n > 3:
        raise _Unreadable
    choices = ([[bit] * n for bit in (0, 1)] if together and n
               else itertools.product((0, 1), repeat=n))
    return [choose(node, iter(bits)) for bits in choices]


# --------------------------------------------------------------------------------- exact arithmetic
#
# A value is a quotient of two polynomials with rational coefficients, each a dict {monomial:
# coefficient}. A monomial is a sorted tuple of (name, exponent). Besides the variables a name may
# be pi, e, i, or "√p" for a prime p, with i*i = -1 and √p*√p = p applied at once. That makes the
# form of a polynomial unique, so two values are equal exactly when their quotients satisfy
# a/b == c/d, that is a*d == c*b. (pi and e count as independent of all else: nobody has found
# otherwise.)

_ONE = {(): 1}


def _exact(node):
    """node as (numerator, denominator).

    Raises _Inexact where it has no such form, _Undefined for 1/0.
    """
    if isinstance(node, (int, Fraction)):
        return ({(): node} if node else {}), _ONE
    if isinstance(node, str):
        if node in ("∞", "…", "ℝ"):
            raise _Inexact
        return {((node, 1),): 1}, _ONE
    kind = node[0]
    if kind in ("+", "*"):
        top, bottom = _exact(node[1])
        for part in node[2:]:
            t, b = _exact(part)
            if kind == "*":
                top = _product(top, t)
            elif b == bottom:
                top = _plus(top, t)
                continue
            else:
                top = _plus(_product(top, b), _product(t, bottom))
            bottom = b if bottom is _ONE else bottom if b is _ONE else _product(bottom, b)
        return top, bottom
    if kind == "unit":
        return _exact(node[2])
    if kind == "call":
        return _exact_call(node[1], node[2:])
    if kind not in ("-", "/", "%", "^"):
        raise _Inexact
    top, bottom = _exact(node[1])
    if kind == "/":
        return _inverse(top, bottom)
    if kind == "^":
        return _exact_power(top, bottom, _rational(node[2]))
    factor = -1 if kind == "-" else Fraction(1, 100)
    return {monomial: c * factor for monomial, c in top.items()}, bottom


def _plus(p, q):
    _spend(len(p) + len(q))
    out = dict(p)
    for monomial, c in q.items():
        c += out.pop(monomial, 0)
        if c:
            out[monomial] = _bounded(c)
    return out


def _product(p, q):
    _spend(2 * len(p) * len(q))
    if len(p) * len(q) > 4 * MAX_TERMS:
        raise _Inexact
    out = {}
    for m, c in p.items():
        for n, d in q.items():
            monomial, factor = _reduced(m, n) if m and n else (m or n, 1)
            out[monomial] = out.get(monomial, 0) + _bounded(c * d * factor)
    return {monomial: c for monomial, c in out.items() if c}


def _bounded(c):
    bits = c.numerator.bit_length() + c.denominator.bit_length()
    if bits > 64:
        _spend(bits // 64)
        if bits > MAX_BITS:
            raise _TooLarge
    return c


def _reduced(*monomials):
    """The product of monomials, and the factor that i*i = -1 and √p*√p = p leave."""
    exponents, factor = {}, 1
    for name, k in itertools.chain(*monomials):
        exponents[name] = exponents.get(name, 0) + k
    for name in exponents:
        if name == "i" or name[0] == "√":
            pairs, exponents[name] = divmod(exponents[name], 2)
            factor *= (-1 if name == "i" else int(name[1:])) ** pairs
    return tuple(sorted(pair for pair in exponents.items() if pair[1])), factor


def _inverse(top, bottom):
    if not top:
        raise _Undefined
    if top.keys() == {()}:
        return {monomial: Fraction(c) / top[()] for monomial, c in bottom.items()}, _ONE
    return bottom, top


def _rational(node):
    """node as an int or Fraction; raises _Inexact if it is not one."""
    if isinstance(node, (int, Fraction)):
        return node
    top, bottom = _exact(node)
    if bottom is not _ONE or not top.keys() <= {()}:
        raise _Inexact
    return _whole(Fraction(top.get((), 0)))


def _exact_power(top, bottom, n):
    if n < 0:
        (top, bottom), n = _inverse(top, bottom), -n
    if n.denominator > 1:                                           # 8^(2/3) is (8^(1/3))^2
        if bottom is not _ONE or not top.keys() <= {()}:
            raise _Inexact
        top, n = _exact_root(Fraction(top.get((), 0)), n.denominator), n.numerator
    powers = []
    for p in (top, bottom):
        power = _ONE
        if len(p) == 1:                                             # one term: (c m)^n for any n
            (monomial, c), = p.items()
            bits = 0 if abs(c) == 1 else c.numerator.bit_length() + c.denominator.bit_length()
            bits += sum(int(name[1:]).bit_length() for name, _ in monomial if name[0] == "√")
            if n > 10 ** 6 or n * bits > MAX_BITS:
                raise _TooLarge
            monomial, factor = _reduced(tuple((name, k * n) for name, k in monomial))
            power = {monomial: _bounded(c ** n * factor)} if p is not _ONE else _ONE
        elif n > 40:
            raise _Inexact
        else:
            for _ in range(n):
                power = _product(power, p)
        powers.append(power)
    return powers[0], powers[1]


def _exact_root(value, index):
    """A square root as a rational times a product of √p, or a root that comes out even.

    Real for odd indices.
    """
    top, bottom = abs(value.numerator), value.denominator
    _spend(20)
    if not value:
        return {}
    if not 2 <= index <= 64:
        raise _Inexact
    if index > 2 and max(top, bottom) > 2 ** 100:
        raise _TooLarge
    if index == 2:                                                  # √(t/b) = √(t b) / b
        outside, primes, rest, p = Fraction(1, bottom), [], top * bottom, 2
        while p * p <= rest and p < 1000:
            while rest % (p * p) == 0:
                rest, outside = rest // (p * p), outside * p
            if rest % p == 0:
                rest //= p
                primes.append(p)
            p += 1
        _spend(p // 8)
        root = math.isqrt(rest)
        if root * root == rest:
            outside *= root
        elif rest < 1000 * 1000:
            primes.append(rest)
        else:  # not known to be a product of different primes
            raise _TooLarge if rest > 2 ** 100 else _Inexact
        names = [f"√{p}" for p in primes] + ["i"] * (value < 0)
        return {tuple(sorted((name, 1) for name in names)): outside}
    if value < 0 and index % 2 == 0:
        raise _Inexact
    roots = [round(n ** (1 / index)) for n in (top, bottom)]
    if roots[0] ** index != top or roots[1] ** index != bottom:
        raise _Inexact
    return {(): Fraction(-roots[0] if value < 0 else roots[0], roots[1])}


def _exact_call(name, arguments):
    if name == "exp":
        return _exact(("^", "e", arguments[0]))
    if name == "binom":                                             # n (n-1) ... (n-k+1) / k!
        n, k = arguments[0], _rational(arguments[1])
        if not isinstance(k, int) or not 0 <= k <= 1000:
            raise _Inexact
        if isinstance(n, int) and 0 <= n <= 1000:
            return _exact(math.comb(n, k))
        return _exact(("*", Fraction(1, math.factorial(k)), 1, *(("+", n, -j) for j in range(k))))
    if name not in ("root", "abs", "floor", "ceil", "factorial", "min", "max", "gcd", "lcm"):
        raise _Inexact
    values = [_rational(argument) for argument in arguments]
    if name == "root":
        if not isinstance(values[1], int):
            raise _Inexact
        return _exact_root(Fraction(values[0]), values[1]), _ONE
    if name in ("factorial", "gcd", "lcm"):
        limit = 1000 if name == "factorial" else 10 ** 50
        if not all(isinstance(value, int) and 0 <= value <= limit for value in values):
            raise _Undefined
        _spend(values[0] if name == "factorial" else 50 * len(values))
    if name in ("min", "max"):
        return _exact(min(values) if name == "min" else max(values))
    function = {"abs": abs, "floor": math.floor, "ceil": math.ceil, "factorial": math.factorial,
                "gcd": math.gcd, "lcm": math.lcm}[name]
    return _exact(function(*values))


# ------------------------------------------------------------------------------- numeric arithmetic
#
# Where no exact form exists: complex numbers as pairs of Decimals, in the precision of the current
# decimal context.

_TRAPS = [decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow, decimal.Underflow]
_LOW, _HIGH = (decimal.Context(prec=digits, Emax=99999, Emin=-99999, traps=_TRAPS)
               for digits in (30, 60))
_PI = Decimal("3.14159265358979323846264338327950288419716939937510"
              "58209749445923078164062862089986280348253421170679")
_0, _1 = Decimal(0), Decimal(1)


def _random_points():
    """Four real points and six whole ones, values for 12 variables each.

    Signs and order differ in every way.
    """
    dice = random.Random(0)
    points = []
    for signs in ((1,), (-1,), (1, -1), (-1, -1, 1, 1)):
        points.append(tuple(
            Decimal(signs[k % len(signs)] * dice.randint(10 ** 11, 24 * 10 ** 11)) / 10 ** 12
            for k in range(12)))
    for _ in range(3):
        whole = tuple(map(Decimal, dice.sample(range(4, 40, 3), 12)))
        points += [whole, tuple(43 - n for n in whole)]
    return points


_POINTS = _random_points()


def _value(node, point):
    """node as a complex number, its variables taken from `point`.

    Raises _Undefined or ArithmeticError.
    """
    _spend(2)
    if isinstance(node, int):
        return Decimal(node), _0
    if isinstance(node, Fraction):
        return Decimal(node.numerator) / node.denominator, _0
    if isinstance(node, str):
        if node in point:
            return point[node], _0
        if node not in ("pi", "e", "i"):
            raise _Undefined
        return {"pi": (+_PI, _0), "e": (_1.exp(), _0), "i": (_0, _1)}[node]
    kind = node[0]
    if kind == "call":
        return _call(node[1], [_value(argument, point) for argument in node[2:]])
    if kind == "unit":
        return _value(node[2], point)
    if kind not in ("+", "*", "-", "/", "%", "^"):
        raise _Undefined
    z = _value(node[1], point)
    if kind == "^":
        n = node[2]
        # (-8)^(2/3) = 4 is real
        if isinstance(n, Fraction) and n.denominator % 2 and not z[1] and z[0] < 0:
            size = _pow((-z[0], _0), (Decimal(n.numerator) / n.denominator, _0))[0]
            return (-size if n.numerator % 2 else size), _0
        return _pow(z, _value(n, point))
    for part in node[2:]:
        w = _value(part, point)
        z = _mul(z, w) if kind == "*" else (z[0] + w[0], z[1] + w[1])
    if kind == "/":
        return _div((_1, _0), z)
    return {"-": (-z[0], -z[1]), "%": (z[0] / 100, z[1] / 100)}.get(kind, z)


def _mul(z, w):
    if not z[1] and not w[1]:
        return z[0] * w[0], _0
    return z[0] * w[0] - z[1] * w[1], z[0] * w[1] + z[1] * w[0]


def _div(z, w):
    if not z[1] and not w[1]:
        return z[0] / w[0], _0
    size = w[0] * w[0] + w[1] * w[1]
    return (z[0] * w[0] + z[1] * w[1]) / size, (z[1] * w[0] - z[0] * w[1]) / size


def _pow(z, w):
    whole = not w[1] and w[0] == w[0].to_integral_value()
    if whole and not z[1]:
        return z[0] ** w[0], _0
    _spend(50)
    if not w[1] and not z[1] and z[0] > 0:
        with decimal.localcontext() as context:
            context.prec += 10  # the exponent's error counts in full
            power = (w[0] * z[0].ln()).exp()
        return +power, _0
    if not z[0] and not z[1]:
        if w[1] or w[0] <= 0:
            raise _Undefined
        return z
    if whole and abs(w[0]) <= 64:
        out = (_1, _0)
        for _ in range(int(abs(w[0]))):
            out = _mul(out, z)
        return out if w[0] >= 0 else _div((_1, _0), out)
    return _exp(_mul(w, _ln(z)))


def _exp(z):
    _spend(15)
    size = z[0].exp()
    if not z[1]:
        return size, _0
    sine, cosine = _sine_cosine(z[1])
    return size * cosine, size * sine


def _ln(z):
    _spend(20)
    if not z[1]:
        if not z[0]:
            raise _Undefined
        return abs(z[0]).ln(), (+_PI if z[0] < 0 else _0)
    return (z[0] * z[0] + z[1] * z[1]).ln() / 2, _atan2(z[1], z[0])


def _sqrt(z):
    if not z[1]:
        return (z[0].sqrt(), _0) if z[0] >= 0 else (_0, (-z[0]).sqrt())
    size = (z[0] * z[0] + z[1] * z[1]).sqrt()
    imaginary = ((size - z[0]) / 2).sqrt()
    return ((size + z[0]) / 2).sqrt(), (imaginary if z[1] > 0 else -imaginary)


def _sine_cosine(x):
    """Taylor series after reduction to [-pi, pi]."""
    _spend(40)
    if abs(x) > 10 ** 6:  # would need more digits of pi than we carry
        raise _Undefined
    with decimal.localcontext() as context:
        context.prec += 10
        x -= (x / (2 * _PI)).to_integral_value() * 2 * _PI
        sums, term, n, tiny = [_0, _0], _1, 0, Decimal(10) ** -context.prec
        while abs(term) > tiny:
            sums[n % 2] += term if n % 4 < 2 else -term
            n += 1
            term *= x / n
    return +sums[1], +sums[0]


def _atan2(y, x):
    """The angle of the point (x, y).

    Halved until its tangent is small, then the series of the arcus tangent.
    """
    _spend(60)
    if not x and not y:
        raise _Undefined
    with decimal.localcontext() as context:
        context.prec += 10
        if x < 0:  # turn by half a circle: more accurate there
            turned = _atan2(-y, -x) if y else _0
            return turned + (_PI if y >= 0 else -_PI)
        t, doublings = y / ((x * x + y * y).sqrt() + x), 1          # the tangent of half the angle
        while abs(t) > Decimal("0.1"):
            t, doublings = t / (1 + (1 + t * t).sqrt()), doublings + 1
        total, power, n, tiny = _0, t, 1, Decimal(10) ** -context.prec
        while abs(power) > tiny:
            total += power / n if n % 4 == 1 else -power / n
            power *= t * t
            n += 2
        return total * 2 ** doublings


def _call(name, arguments):
    """A function of complex arguments; all but roots, logarithms, exp and abs want them real."""
    z = arguments[0]
    _spend(10)
    if name == "abs":
        return (abs(z[0]) if not z[1] else (z[0] * z[0] + z[1] * z[1]).sqrt()), _0
    if name == "exp":
        return _exp(z)
    if name == "ln":
        return _ln(z)
    if name == "log":
        return _div(_ln(z), _ln(arguments[1]))
    if name == "root":
        index = arguments[1]
        if index == (2, 0):
            return _sqrt(z)
        if index[0] % 2 and not index[1] and not z[1] and z[0] < 0:  # odd roots are real
            z = _pow((-z[0], _0), (1 / index[0], _0))
            return -z[0], _0
        return _pow(z, _div((_1, _0), index))
    if any(argument[1] for argument in arguments):
        raise _Undefined
    x, y = z[0], arguments[-1][0]
    if name in _ANGLES:
        sine, cosine = _sine_cosine(x)
        top, bottom = {"sin": (sine, _1), "cos": (cosine, _1), "tan": (sine, cosine),
                       "cot": (cosine, sine), "sec": (_1, cosine), "csc": (_1, sine)}[name]
        return top / bottom, _0
    if name in ("sinh", "cosh", "tanh"):
        up, down = x.exp(), (-x).exp()
        top, bottom = {"sinh": (up - down, 2), "cosh": (up + down, 2),
                       "tanh": (up - down, up + down)}[name]
        return top / bottom, _0
    if name == "arctan":
        return _atan2(x, _1), _0
    if name in ("arcsin", "arccos") and abs(x) <= 1:
        other = (1 - x * x).sqrt()
        return _atan2(*((x, other) if name == "arcsin" else (other, x))), _0
    if name in ("floor", "ceil"):
        return x.to_integral_value(
            decimal.ROUND_FLOOR if name == "floor" else decimal.ROUND_CEILING), _0
    if name in ("min", "max"):
        return (min if name == "min" else max)(argument[0] for argument in arguments), _0
    if (name in ("factorial", "binom") and 0 <= x <= 200 and 0 <= y <= 200
            and x == int(x) and y == int(y)):
        return Decimal(math.factorial(int(x)) if name == "factorial"
                       else math.comb(int(x), int(y))), _0
    raise _Undefined


def _try_value(node, point, context):
    """The value in the context's precision, or None where it is undefined."""
    try:
        with decimal.localcontext(context):
            return _value(node, point)
    except (_Undefined, ArithmeticError):
        return None


def _agree(a, b, point):
    """Are two nodes equal at a point, judged in two precisions? None where one is undefined.

    No tolerance says how small a difference may be: a true zero shrinks with the rounding error
    when the precision doubles, any other difference stays.
    """
    low_a, low_b = _try_value(a, point, _LOW), _try_value(b, point, _LOW)
    if low_a is None or low_b is None:
        return None
    with decimal.localcontext(_HIGH) as context:
        context.clear_traps()
        low_gap = max(abs(low_a[0] - low_b[0]), abs(low_a[1] - low_b[1]))
        if low_gap > Decimal("1e-12") and low_gap > Decimal("1e-12") * max(map(abs, low_a + low_b)):
            return False  # far more than rounding: no need to look closer
    high_a, high_b = _try_value(a, point, _HIGH), _try_value(b, point, _HIGH)
    if high_a is None or high_b is None:
        return None
    with decimal.localcontext(_HIGH) as context:
        context.clear_traps()
        gap = max(abs(high_a[0] - high_b[0]), abs(high_a[1] - high_b[1]))
        return (gap <= Decimal("1e-54") * max(map(abs, high_a + high_b))
                or gap <= Decimal("1e-26") * low_gap)


# --------------------------------------------------------------------------------------- comparison

def _same_value(a, b):
    """Are two values equal?

    Exactly if both have an exact form, else at random points in two precisions.
    """
    if a == b:
        return True
    _spend(5)
    try:
        (top_a, bottom_a), (top_b, bottom_b) = _exact(a), _exact(b)
        if bottom_a == bottom_b:
            return top_a == top_b
        return _product(top_a, bottom_b) == _product(top_b, bottom_a)
    except _Undefined:
        return False
    except _TooLarge:
        if not _names(a, _names(b, set())):
            return False
    except _Inexact:
        pass
    names = sorted(_names(a, _names(b, set())))
    agreements = 0
    for values in _POINTS if names else [()]:
        agree = _agree(a, b, dict(zip(names, values))) if len(names) <= len(values) else False
        if agree is False:
            return False
        agreements += bool(agree)
        if agreements == 4:
            break
    return agreements >= (3 if names else 1)


def _same(a, b):
    """Are two parsed answers equal? Raises _Undefined when the work is used up."""
    if a == b:
        return True
    _spend(2)
    unit_a, a = a[1:] if isinstance(a, tuple) and a[0] == "unit" else ("", a)
    unit_b, b = b[1:] if isinstance(b, tuple) and b[0] == "unit" else ("", b)
    if unit_a and unit_b and unit_a != unit_b:                                          # P3
        return False
    kind_a, kind_b = _kind(a), _kind(b)
    if "rel" in (kind_a, kind_b) and (kind_a != kind_b or a[1][0] != b[1][0]):
        named_a, named_b = _after_name(a), _after_name(b)
        if (named_a is None) != (named_b is None):                                      # P7
            return _same(a if named_a is None else named_a, b if named_b is None else named_b)
    kinds = {kind_a, kind_b}
    if kinds == {"value"}:
        bare_a, bare_b = (x[1] if isinstance(x, tuple) and x[0] == "%" else None for x in (a, b))
        if (bare_a is None) != (bare_b is None) and _same_value(                        # P5
                a if bare_a is None else bare_a, b if bare_b is None else bare_b):
            return True
        return _same_value(a, b)
    if _is_region(a) or _is_region(b):                                                  # P10
        if kinds == {"rel"} and _names(a, set()) != _names(b, set()):
            return False
        region_a, region_b = _region(a), _region(b)
        if region_a is not None and region_b is not None:
            return len(region_a) == len(region_b) and all(
                x[1] == y[1] and x[3] == y[3]
                and _equal_ends(x[0], y[0]) and _equal_ends(x[2], y[2])
                for x, y in zip(region_a, region_b))
    if "seq" in kinds and "matrix" in kinds:  # a column vector as a tuple
        a, b = (a, b) if kind_b == "seq" else (b, a)
        return a[1] == 1 and b[1] == "()" and _same_parts(a, b)
    if "seq" in kinds and "list" in kinds:
        a, b = (a, b) if kind_b == "seq" else (b, a)
        if all(_same(x, b) for x in a[1:]):  # (1,2) or (2/2,2)
            return True
        values = [_after_name(x) for x in a[1:]]
        # m = 3, b = 1
        return None not in values and b[1] == "()" and _same_parts(("list", *values), b)
    if kinds & {"list", "set", "all"} and not kinds & {"seq", "matrix"}:
        items_a, items_b = (x[1:] if k in ("list", "set", "all") else (x,)
                            for x, k in ((a, kind_a), (b, kind_b)))
        return _same_items(items_a, items_b, "set" in kinds or "value" in kinds)
    if "ratio" in kinds and kinds <= {"ratio", "value"}:  # 3:4 is 6:8 and 3/4
        x, y = (n[1:] if k == "ratio" else (n, 1) for n, k in ((a, kind_a), (b, kind_b)))
        return len(x) == len(y) and all(
            _same_value(("*", x[k], y[k + 1]), ("*", x[k + 1], y[k]))
            for k in range(len(x) - 1))
    if kinds == {"based", "value"}:                                                     # P13
        based, value = (a, b) if kind_a == "based" else (b, a)
        return isinstance(value, int) and based[1] == str(value)
    if kinds == {"rel"}:
        return _same_relation(a, b)
    if kinds in ({"seq"}, {"matrix"}):
        return a[1] == b[1] and _same_parts(a, b)
    return False


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
        match = rest.index(x) if x in rest else next(
            (k for k, y in enumerate(rest) if _same(x, y)), None)
        if match is None:
            return False
        del rest[match]
    return not rest


def _after_name(node):
    """What stands after a name (P7): 5 of x = 5, f(x) = 5 and x = 2 + 3 = 5; S of x in S.

    None without a name.
    """
    if _kind(node) != "rel" or set(node[1]) not in ({"="}, {"in"}):
        return None
    terms = node[2:]
    if len(terms) == 2 and _is_name(terms[1]) and not _is_name(terms[0]):
        return terms[0]
    if not _is_name(terms[0]) or not all(_same(x, terms[-1]) for x in terms[1:-1]):
        return None
    return terms[-1]


def _is_name(node):
    """x, x_1, f(x), (x, y), or points side by side: AB."""
    if isinstance(node, str):
        return node not in _CONSTANTS
    return isinstance(node, tuple) and (
        (node[0] == "seq" and all(map(_is_name, node[2:])))
        or (node[0] == "*" and all(
            isinstance(x, str) and len(x) == 1 and x.isupper() for x in node[1:])))


def _same_relation(a, b):
    """Equal term by term, or one equation or inequality a constant multiple of the other (P11)."""
    a, b = (("rel", tuple(_FLIPPED[sign] for sign in r[1][::-1]), *r[:1:-1])
            if r[1][0] in (">", ">=") else r for r in (a, b))
    if a[1] != b[1]:
        return False
    if _same_parts(a, b):
        return True
    if len(a[1]) > 1 or a[1] == ("in",) or any(_kind(x) != "value" for x in a[2:] + b[2:]):
        return False
    f, g = (("+", r[2], ("-", r[3])) for r in (a, b))
    names = sorted(_names(f, _names(g, set())))
    # f = c g with a constant c means f(x) g(p) = g(x) f(p) for all x and one point p where neither
    # is zero.
    f_p, g_p = (_at(node, {name: Fraction(7 + 4 * k, 5) for k, name in enumerate(names)})
                for node in (f, g))
    if not names or _same_value(f_p, 0) or _same_value(g_p, 0) or not _same_value(
            ("*", f, g_p), ("*", g, f_p)):
        return False
    ratio = _try_value(("*", f_p, ("/", g_p)), {}, _LOW)
    return ratio is not None and (ratio[0] > 0 or a[1][0] in ("=", "!="))


def _at(node, values):
    """The node with values for its variables."""
    if isinstance(node, tuple):
        return _with_parts(node, lambda part: _at(part, values))
    return values.get(node, node) if isinstance(node, str) else node


# ------------------------------------------------------------------------------ regions of the line
#
# A region is a sorted list of disjoint intervals (low end, is it in, high end, is it in), the ends
# Decimals.

_INFINITE = Decimal("Infinity")
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!=", "in": "in"}


def _is_region(node):
    """Does the answer describe a part of the real line? (A pair alone may be a point.)"""
    kind = _kind(node)
    return (node == "ℝ" or kind in ("union", "minus", "all")
            or (kind == "rel" and bool(set(node[1]) & _INEQUALITIES))
            or (kind == "list" and all(map(_is_region, node[1:]))))


def _region(node):
    """The region that an answer describes, or None."""
    kind = _kind(node)
    if node == "ℝ":
        return [(-_INFINITE, False, _INFINITE, False)]
    if kind == "seq" and len(node) == 4:
        low, high = _end(node[2]), _end(node[3])
        if low is None or high is None or low > high:
            return None
        return [(low, node[1][0] == "[", high, node[1][1] == "]")]
    if kind == "set":
        ends = [_end(x) for x in node[1:]]
        return None if None in ends else _merged([(end, True, end, True) for end in ends])
    if kind == "rel":
        parts = [_half_line(*step) for step in zip(node[2:], node[1], node[3:])]
    elif kind == "value":
        end = _end(node)
        return None if end is None else [(end, True, end, True)]
    elif kind in ("list", "all", "union", "minus"):
        parts = [_region(part) for part in node[1:]]
    else:
        return None
    if None in parts:
        return None
    if kind in ("list", "union"):
        return _merged(sum(parts, []))
    if kind == "minus":
        parts[1] = _complement(parts[1])
    return _complement(_merged(sum(map(_complement, parts), [])))  # the intersection


def _half_line(left, sign, right):
    """Solve an inequality for its one variable if it is linear.

    f(x) = a x + b exactly if four points say so.
    """
    f = ("+", left, ("-", right))
    names = _names(f, set())
    if len(names) != 1 or sign == "in" or _kind(left) != "value" or _kind(right) != "value":
        return None
    name = names.pop()
    f_0, f_1, f_2, f_3 = (_at(f, {name: x}) for x in (0, 1, 2, Fraction(-13, 7)))
    slope = ("+", f_1, ("-", f_0))
    if not _same_value(("+", f_2, ("-", f_1)), slope) or not _same_value(
            ("+", f_3, ("-", f_0)), ("*", Fraction(-13, 7), slope)):
        return None
    bound, rise = _end(("*", ("-", f_0), ("/", slope))), _end(slope)
    if bound is None or not rise:
        return None
    sign = sign if rise > 0 else _FLIPPED[sign]
    below, above = (-_INFINITE, False, bound, sign == "<="), (bound, sign == ">=", _INFINITE, False)
    if sign == "=":
        return [(bound, True, bound, True)]
    return [below, above] if sign == "!=" else [below] if sign in ("<", "<=") else [above]


def _end(node):
    if node in ("∞", ("-", "∞")):
        return _INFINITE if node == "∞" else -_INFINITE
    if _names(node, set()) or _kind(node) != "value":
        return None
    value = _try_value(node, {}, _HIGH)
    return value[0] if value and not value[1] else None


def _equal_ends(x, y):
    return x == y or (x.is_finite() and y.is_finite() and abs(x - y) < Decimal("1e-25") * abs(x))


def _merged(intervals):
    """The union of intervals: sort them and join those that touch."""
    out = []
    for low, low_in, high, high_in in sorted(
            intervals, key=lambda interval: (interval[0], not interval[1])):
        if low == high and not (low_in and high_in):
            continue
        if out and (low < out[-1][2] or (_equal_ends(low, out[-1][2]) and (low_in or out[-1][3]))):
            low, low_in, top, top_in = out.pop()
            high, high_in = max((high, high_in), (top, top_in))
        out.append((low, low_in, high, high_in))
    return out


def _complement(region):
    out, low, low_in = [], -_INFINITE, False
    for start, start_in, end, end_in in region:
        if low < start or (low == start and low_in and not start_in):
            out.append((low, low_in, start, not start_in))
        low, low_in = end, not end_in
    return out + [(low, low_in, _INFINITE, False)] if low < _INFINITE else out
