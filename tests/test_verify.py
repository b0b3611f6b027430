"""verify.py: extraction, equivalence and verdicts."""

import pytest

from verify import STATUSES, extract_answer, is_equivalent, judge


@pytest.mark.parametrize("response, answer", [
    ("So $19 + 23 = \\boxed{42}$.", "42"), ("The answer is 18.", "18"), ("6 * 7 = 42\n#### 42", "42"), ("18", "18"),
    ("In total there are 1,250 marbles.", "1,250"), ("<think>so 7", None), ("cut \\boxed{\\frac{1}{2", None), ("", None)])
def test_extraction(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize("a, b, equal", [
    ("42", "42.0", True), ("1,234", "1234", True), ("1/2", "\\frac12", True), ("0.33", "1/3", False),
    ("even", "\\text{Even}", True), ("", "", False), ("12", "-12", False)])
def test_equivalence(a, b, equal):
    assert is_equivalent(a, b) is equal and is_equivalent(b, a) is equal


def test_verdicts():
    assert judge("#### 37", "37") == (1.0, "37", "correct")
    assert judge("#### 36", "37") == (0.0, "36", "wrong")
    assert judge("I do not know", "37") == (0.0, None, "no_answer")
    assert {judge(None, "37").status} <= set(STATUSES)
