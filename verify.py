"""Final-answer extraction and equivalence: the verifiable part of the reward (first version, being deepened)."""

import logging
import re
from fractions import Fraction
from typing import NamedTuple

STATUSES = ("correct", "wrong", "no_answer", "unparsed", "error")
VERIFIERS = ("policy", "last-number")
MAX_ANSWER = 1000          # characters; a longer "answer" is never read as mathematics

log = logging.getLogger(__name__)


class Verdict(NamedTuple):
    """reward: 1.0 or 0.0; answer: the extracted text or None; status: one of STATUSES."""
    reward: float
    answer: str | None
    status: str


def judge(response: str, reference: str, verifier: str = "policy") -> Verdict:
    """Compare the final answer of `response` with `reference`. Never raises for any text."""
    if verifier not in VERIFIERS:
        raise ValueError(f"unknown verifier {verifier!r}: choose one of {', '.join(VERIFIERS)}")
    try:
        answer = last_number(response) if verifier == "last-number" else extract_answer(response)
        if answer is None:
            return Verdict(0.0, None, "no_answer")
        if is_equivalent(answer, reference):
            return Verdict(1.0, answer, "correct")
        return Verdict(0.0, answer, "wrong")
    except Exception:                      # counted as "error" and logged: a bug must not look like a wrong answer
        log.exception("the verifier failed on a response of %s characters", len(response) if response else 0)
        return Verdict(0.0, None, "error")


# ---------------------------------------------------------------------------------------------------- extraction

_BOX = re.compile(r"\\f?box(?:ed)?(?![A-Za-z])\s{0,20}")
_BLANK_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,20}\{\s*\}")
_BARE_BOX = re.compile(r"[-+\u2212]?\d[\d,]*(?:\.\d+)?|\\?[A-Za-z]+|[^\s{}$.,;]")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_MARKER = re.compile(r"\banswers?[*_`\s]{0,8}(?:\bis\b|\bare\b|:|=)"
                     r"|^[#>*_ \t]{0,12}(?:the\s)?(?:final\s)?answers?[*_ \t]{0,8}$", re.IGNORECASE | re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?](?=[\s*\"'\u201d)_`\]]|$)|(?<=\d)\.(?=[A-Z])|;(?=\s|$)"
                           r"|[,\s]+(?:because|since|so|which|as)\b", re.IGNORECASE)
_DELIMITERS = (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("$", "$"))
_HASH = re.compile(r"^####[ \t]*([-+\u2212]?(?:\\?\$|[\u20ac\u00a3])?[-+\u2212]?\.?\d[^\n]{0,200})", re.MULTILINE)
_WORD = re.compile(r"\\text\s*\{[^{}]*\}|\\[A-Za-z]+|[^\W\d_]{2,}")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(r"(?:(?<![\w)}\]])[-+\u2212])?(?:\\?\$)?(?:\\[dtc]?frac\s?\{\s?-?" + _DIGITS + r"\s?\}\s?\{\s?-?"
                     + _DIGITS + r"\s?\}|" + _DIGITS + r"(?:\s?/\s?" + _DIGITS + r")?)(?:\s?\\?%)?")


def extract_answer(response: str) -> str | None:
    """The final answer of a response, or None: last box > last statement > #### > bare answer > last number."""
    return _locate(response)[0]


def _locate(response: str) -> tuple[str | None, str]:
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return None, "none"
    found, value = _last_box(text)
    if found:
        return value, "box"
    marker = None
    for marker in _MARKER.finditer(text):
        pass
    if marker:
        return _statement(text, marker.end()) or None, "statement"
    hashes = None
    for hashes in _HASH.finditer(text):
        pass
    if hashes:
        return _trim(hashes[1]), "hashes"
    bare = text.strip()
    if bare and len(bare) <= MAX_ANSWER and "\n" not in bare and (
            not re.search(r"\s", bare) or all(w[0] == "\\" for w in _WORD.findall(bare))):
        value = _trim(bare)
        if value:
            return value, "bare"
    value = last_number(text)
    return value, "number" if value else "none"


def _last_box(text: str) -> tuple[bool, str | None]:
    """(is there a box, its content): the content is None where the last box is never closed."""
    end = len(text)
    for _ in range(50):
        start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if start < 0:
            return False, None
        end = start
        if _BLANK_BOX.match(text, start):
            continue
        inside = _BOX.match(text, start)
        if not inside:
            continue
        if not text.startswith("{", inside.end()):
            bare = _BARE_BOX.match(text, inside.end())
            return True, _trim(bare[0]) or None if bare else None
        depth = 0
        for brace in _BRACE.finditer(text, inside.end(), inside.end() + MAX_ANSWER):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                content = text[inside.end() + 1:brace.start()]
                value = _trim(_BLANK_BOX.sub("", content), prose=False)
                if value:
                    return True, value
                break
        else:
            return True, None
    return False, None


def _statement(text: str, start: int) -> str:
    window = text[start:].lstrip("*_:= \t\r\n")[:MAX_ANSWER]
    for left, right in _DELIMITERS:
        if window.startswith(left):
            close = window.find(right, len(left))
            inner = window[len(left):close]
            is_price = left == "$" and ("\n" in inner or inner != inner.strip() or window[close + 1:close + 2].isdigit())
            if close > 0 and inner.strip() and not is_price:
                return _trim(inner, prose=False)
            break
    line = re.split(r"[\r\n]", window, maxsplit=1)[0]
    stop = _SENTENCE_END.search(line)
    return _trim(line[:stop.start()] if stop else line)


def last_number(text: str) -> str | None:
    """The last number anywhere in the text: sign, thousands commas, decimals, a/b, \\frac{a}{b}, percent sign."""
    last = max(text.rfind(d) for d in "0123456789")
    if last < 0:
        return None
    number = None
    for number in _NUMBER.finditer(text, max(0, last - 200), last + 6):
        pass
    return number and number[0].replace("\\$", "").replace("$", "").strip()


def _trim(value: str, prose: bool = True) -> str:
    for _ in range(6):
        before = value
        value = value.strip(" \t\r\n*_" if prose else " \t\r\n")
        if value.endswith(tuple(".,;:!?" if prose else ".,;:")) and not value.endswith(".."):
            value = value[:-1]
        for left, right in _DELIMITERS + (('"', '"'), ("'", "'"), ("`", "`"), ("\u201c", "\u201d")):
            if value.startswith(left) and value.endswith(right) and len(value) >= len(left + right):
                inner = value[len(left):-len(right)]
                if left not in inner and right not in inner:
                    value = inner
        if value.count("$") == 1 and "\\$" not in value:
            value = value.replace("$", "")
        if value == before:
            break
    return value


# --------------------------------------------------------------------------------------------------- equivalence

def is_equivalent(prediction: str, reference: str) -> bool:
    """Do the two texts name the same answer? (numbers, fractions and text so far)"""
    a, b = _plain(prediction), _plain(reference)
    if not a or not b:
        return False
    if a == b:
        return True
    x, y = _fraction(a), _fraction(b)
    return x is not None and x == y


def _plain(text: str) -> str:
    text = text.strip()[:MAX_ANSWER].rstrip(".").replace("\u2212", "-").replace("\\!", "").replace("{,}", ",")
    text = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s?\{([^{}]*)\}", r"\1", text)
    return re.sub(r"[\s$]|\\[,;()\[\]]", "", text).lower()


def _fraction(text: str) -> Fraction | None:
    match = re.fullmatch(r"(-?)\\[dt]?frac\{?(-?\d{1,50})\}?\{?(\d{1,50})\}?", text)
    if match:
        text = f"{match[1]}{match[2]}/{match[3]}".replace("--", "")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    if len(text) < 200 and re.fullmatch(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:/\d+)?", text):
        top, _, bottom = text.partition("/")
        if int(bottom or 1):
            return Fraction(top) / int(bottom or 1)
    return None
