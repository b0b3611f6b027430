"""verify.py: extraction, equivalence, verdicts, and what must not happen.

With SA_SHARED set, the labelled cases and the published problems in that folder are tested too.
SA_ANSWERS=50000 tries so many random answers instead of few.
"""

import functools
import json
import logging
import math
import os
import random
import re
import time
import tracemalloc
from fractions import Fraction
from pathlib import Path

import pytest

import verify
from verify import (
    STATUSES,
    Verdict,
    extract_answer,
    final_answer,
    is_equivalent,
    judge,
    kind_of,
    last_number,
)

SHARED = Path(os.environ["SA_SHARED"]) if "SA_SHARED" in os.environ else None
ANSWERS = int(os.environ.get("SA_ANSWERS", 0))
needs_shared = pytest.mark.skipif(not SHARED, reason="SA_SHARED does not name the shared folder")


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --------------------------------------------------------------------------------------- extraction

# (response, answer): the extracted text must be the answer or equivalent to it; None exactly None.
EXTRACT = [
    # R0
    ("<think>It is \\boxed{8}, surely.</think> So it is \\boxed{9}.", "9"),
    ("<think>\\boxed{8}</think>", None), ("<think>the answer is 8", None),
    ("8 it is.</think>\n8", "8"), ("</think>4<think>5", None),
    ("<think>1</think>2<think>3</think>The answer is 4.", "4"),
    # R1
    ("It is $\\boxed{12}$, after 3 tries.", "12"), ("\\boxed{1} no, wait: \\boxed{2}", "2"),
    ("\\boxed{\\boxed{6}}", "6"), ("$\\boxed{\\frac{1}{\\sqrt{2}}}$", "\\frac{1}{\\sqrt{2}}"),
    ("\\fbox{7}", "7"), ("\\boxed 31", "31"), ("\\boxed{ 5 }", "5"), ("\\boxed {5}", "5"),
    ("\\boxed{\n5\n}", "5"), ("\\boxed{}", None), ("\\boxed{ } so 3", None),
    ("\\boxed{\\{3, 4\\}}", "\\{3,4\\}"), ("\\boxed{4} } {", "4"), ("{ \\boxed{4}", "4"),
    ("\\boxed{\\frac{1}{2", None), ("\\boxed{5} then \\boxed{6", None), ("\\boxed", None),
    ("\\boxed{\\$9}", "9"), ("\\boxed{1{,}000}", "1000"),
    ("\\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("The answer is 3, \\boxed{4}. The answer is 5.", "4"), ("\\boxed{9}\n#### 8", "9"),
    ("\\boxed{5.}", "5"),
    # R2
    ("The answer is 44.", "44"), ("answer: 44", "44"), ("ANSWER = 44", "44"),
    ("**Answer:** 44", "44"), ("**Answer: 44**", "44"), ("**Answer**: 44", "44"),
    ("The final answer is $44$", "44"), ("Answer:\n\n\n44", "44"), ("# Final Answer\n44", "44"),
    ("**Final Answer**\n\\[\n\\frac{4}{5}\n\\]", "4/5"), ("Answer: $$4$$ or so", "4"),
    ("The answer is \\(x^2\\), obviously.", "x^2"),
    ("The answer is $44 because 22 + 22 = 44.", "44"),
    ("The answer is $4.50. Each costs $1.50.", "4.5"), ("The answer is 4.5. Not 5.", "4.5"),
    ("The answer is 1,200.", "1200"), ("The answer is 9 as 3 * 3 = 9.", "9"),
    ("The answer is 9, since 3 * 3 = 9", "9"), ("The answer is 9; see above", "9"),
    ("The answer is 9 apples, which is 3 more.", "9"), ("The answers are 3 and -1.", "-1, 3"),
    ("The answer is (C).", "C"), ("The answer is False.", "False"), ('The answer is "red".', "red"),
    ("The answer is `4`.", "4"), ("The answer:", None), ("The answer is 4. The answer is", None),
    ("The answer is 4, no, the answer is 5.", "5"), ("The answer is −3.", "-3"),
    ("The answer is 30%.", "30%"), ("The answer is 2\n#### 3", "2"), ("The answer is 7\r\n", "7"),
    ("24 answers * 2 points/answer = 48 points\n#### 66", "66"),
    ("The answer is **4** cats.", "4"), ("The answer is therefore 4.", "4"),
    ("The answer is <<2+2=4>>4.", "4"),
    # R3
    ("2 + 2 = 4\n#### 4", "4"), ("#### 1,000", "1000"), ("####5", "5"), ("#### -5", "-5"),
    ("#### $5", "5"), ("#### 4\nThat was 1 of 3.", "4"), ("#### 4\n#### 5", "5"),
    ("#### Part 2\nso 6", None),
    # R4
    ("15", "15"), ("3/5", "3/5"), ("\\frac{3}{5}", "3/5"), ("D", "D"), ("false", "False"),
    ("x = 2", "2"), ("$2x+1$", "1+2x"), ("**15**", "15"), ("(1, 2)", "(1,2)"), ("50%", "1/2"),
    # R1b
    ("<think>3</think> <answer>4</answer>", "4"), ("<answer>x^2+1</answer>", "x^2+1"),
    ("<answer>It makes 3 + 4 = 7 cups.</answer>", "7"), ("<answer>4</answer><answer>5</answer>",
     "5"),
    ("\\boxed{3} <answer>4</answer>", "3"), ("The answer is 3. <answer>4</answer>", "4"),
    # R2, what a sentence states
    ("The answer is: So they make 100 hours * $50/hour = $5000 a day", "5000"),
    ("The answer is: The largest n is 41.", "41"), ("Answer: 213+48 = 261", "261"),
    ("Final Answer: The volume of $ABCD$ is 150. I hope it is correct.", "150"),
    ("Final Answer: Kim started 4 hours ago.", "4"), ("The answer is that **18** are left.", "18"),
    ("The answer is 64, in total, so that is it.", "64"), ("Answer 64", "64"),
    ("Answer $64$", "64"), ("Answer seems to be A.", "A"), ("Answer: I think it is C", "C"),
    ("Thus $x <= 6$ is our answer.", "x<=6"), ("So **12** is the final answer.", "12"),
    ("So the answer is $\\frac{180}{", None), ("Answer: \\(x = ", None),
    ("The final answer is: $2i$ This is the final answer within \\boxed{}.", "2i"),
    ("The answer is:\n- 6", "6"), ("The answer to the second part is 12.", "12"),
    ("Answer: Mr. Lee needs 4 x 4 = <<4*4=16>>16 tiles", "16"), ("Answer: 2 + 2 = 5 pens", "5"),
    ("The answer is: If 3 are lost, he has 5 - 3 = 2 hats left", "2"),
    ("Answer: the pie costs $3.50 and 2 pies cost $7", "the pie costs $3.50 and 2 pies cost $7"),
    # numbers that merely stand in the text
    ("He has 3 and buys 4 more, 7 in all", None), ("In the end, 1,234,567 votes", None),
    ("It costs $3.20.", None), ("So 5-3=2", None), ("about 2/3 of them", None),
    ("up by 12.5% then", None), ("There are 6! orders.", None), ('{"answer": 7}', "7"),
    # mentions and headings
    ("I will write it in \\boxed{}.\n2 + 3 = 5", "5"), ("#### Step 1: add\n4 + 5 = 9", "9"),
    # R6
    ("", None), (" \n ", None), ("I do not know.", None), ("Let me think about that, and", None),
]


@pytest.mark.parametrize("response, answer", EXTRACT)
def test_extraction(response, answer):
    extracted = extract_answer(response)
    if answer is None:
        assert extracted is None
    else:
        assert extracted is not None
        assert extracted == answer or is_equivalent(extracted, answer)


@needs_shared
def test_extraction_shared():
    cases, wrong = read_jsonl(SHARED / "verify" / "extract_visible.jsonl"), []
    for case in cases:
        answer, extracted = case["answer"], extract_answer(case["response"])
        if extracted in (answer, *case.get("also", [])):
            continue
        if None in (answer, extracted) or not is_equivalent(extracted, answer):
            wrong.append((case["why"], extracted))
    print(f"{len(cases) - len(wrong)} of {len(cases)} extracted; not: {wrong}")
    assert len(wrong) <= 0.02 * len(cases), wrong


@needs_shared
def test_reported_shared():
    """Every pair and response that a grader got wrong in a public report."""
    wrong, cases = [], read_jsonl(SHARED / "verify" / "reported.jsonl")
    for case in cases:
        if "response" in case:
            right = (judge(case["response"], case["reference"]).reward == 1) is case["reward"]
        else:
            a, b = case["prediction"], case["reference"]
            right = is_equivalent(a, b) is is_equivalent(b, a) is case["equal"]
        if not right:
            wrong.append(case)
    print(f"{len(cases) - len(wrong)} of {len(cases)} as labelled")
    assert not wrong


# -------------------------------------------------------------------------------------- equivalence

# Every line: all members are equal. A line that ends in === goes on in the next.
EQUAL = r"""
    7 === 7.0 === 007 === +7 === 14/2 === \frac{14}{2} === 7! / 6! === \boxed{7} === $7$ ===
        \(7\) === \text{7} === ７
    -8 === −8 === - 8 === -\frac{16}{2} === \sqrt[3]{-512} === (-2)^3 === -(2^3) === -2^3
    1234567 === 1,234,567 === 1{,}234{,}567 === 1\,234\,567 === 1,\!234,\!567 === 1 234 567
    0.25 === .25 === 1/4 === \frac14 === \dfrac{1}{4} === \frac{1}4 === 25\% === 25% ===
        25 percent === ¼ === 2^{-2}
    0.25 === 0.250
    261 === 213+48=261 === x = 213+48 = 261 === 522/2 = 261 = 260+1
    5 === p+q = 5 === |AB| = 5 === \angle ABC = 5^\circ === P(A) = 5 === xy = 5 === V_1:V_2 = 5 ===
        f'(x) = 5 === f^{-1}(x) = 5 === 5 \approx 5.01 === x \approx 5
    \frac{\sqrt5}{5} === \frac{\sqrt5}{5}\approx0.447 === y = \frac{1}{\sqrt5} \approx 0.4
    3/8 === 3 eighths === 3 \text{ eighths} === 0.375
    0.007 === 7 thousandths
    1500000 === 1.5 million === 1.5 million dollars
    20 === 20 mpg === 20 °C === 20 yen === 20 cows === 20 a day === 20 per day === 20 m/s^2 ===
        20 km/h === 20\% === \textbf{20^{th}} === \textcolor{red}{20} === \underline{20}
    14 === \textbf{14^{th}} === 14^\text{th} === {14^\circ} === \displaystyle 14
    {3 \over 4} === \frac34 === {1+2 \over 2\cdot2}
    y^\frac12 === \sqrt{y}
    x^2 y^3 === x^2y^3 === y^3 x^2
    72 === 2^3 3^2 === 2^3\cdot3^2
    e^{9}-2 === exp(9) - 2 === \mathrm{e}^9-2
    8\cos{60^\circ} === 4 === 8\sin(30^\circ)
    k=4,5,6 === 4, 5, 6 === k = 4 or k = 5 or k = 6
    odd === \displaystyle\text{odd} === \boldsymbol{\text{odd}}
    52 === 52_8
    2.5 === 2\frac{1}{2} === 2 1/2 === 2½ === \frac52 === 5 / 2 === 250%
    -2.5 === -2\frac{1}{2} === -2 1/2
    1/3 === 0.\overline{3} === .\overline{3} === \frac{2}{6} === \frac{\frac{2}{3}}{2}
    0.1\overline{6} === 1/6
    3\times10^{5} === 3e5 === 300000 === 3 \cdot 10^5 === 300,000 === 300 thousand
    2^{10} === 2**10 === 1024 === 2^10 === 4^5
    2^{3^2} === 512
    120 === 5! === \binom{10}{3} === \frac{10!}{3!7!} === |-120| === \lfloor 120.9 \rfloor
    \sqrt{12} === 2\sqrt{3} === 2 * sqrt(3) === √12 === 12^{1/2} === \frac{6}{\sqrt{3}} ===
        \sqrt 3 + \sqrt{3}
    \sqrt{12} === 12^{0.5}
    \frac{2}{\sqrt5-1} === \frac{1+\sqrt5}{2} === 2\cos 36^\circ === 2\cos\frac{\pi}{5}
    \sqrt{3+2\sqrt2} === 1+\sqrt2
    \sqrt[3]{54} === 3\sqrt[3]{2} === 3 * 2^{1/3} === 54^{1/3}
    \pi/6 === \frac{\pi}{6} === π/6 === pi/6 === \arcsin\frac12 === \arctan\frac{1}{\sqrt3} ===
        \sin^{-1} 0.5
    e^{2\ln 3} === 9 === \log_2 512 === \ln e^9
    \ln 6 === \ln 2+\ln 3
    \ln(-1-i) === \frac{\ln2}{2}-\frac{3\pi i}{4}
    \ln(-1+i) === \frac{\ln2}{2}+\frac{3\pi i}{4}
    (-16)^{1/4} === \sqrt2+\sqrt2i === 2e^{i\pi/4}
    \sin 30^\circ === 1/2 === \cos 60° === \sin\frac{\pi}{6} === \tan 45^\circ / 2 === \log 10 / 2
    2i === \sqrt{-4} === (1+i)^2 === 2e^{i\pi/2}
    \frac{1}{1+i} === \frac{1-i}{2} === 0.5 - 0.5i
    x^2-1 === (x-1)(x+1) === -(1-x^2) === x*x - 1 === \frac{x^4-1}{x^2+1} === (1+x)(x-1)
    \frac{x+y}{xy} === \frac1x+\frac1y === x^{-1}+y^{-1}
    2^{n+1} === 2\cdot2^n
    |x| === \sqrt{x^2} === |-x| === (x^2)^{1/2}
    \sin 2x === 2\sin x\cos x === \sin(2x)
    \tan^2 y + 1 === \sec^2 y === \frac{1}{\cos^2 y}
    n(n-1)/2 === \binom{n}{2} === \frac{n!}{2(n-2)!}
    (a+b+c+d)^{30} === (d+c+b+a)^{30}
    x_1+x_2 === x_{2}+x_{1}
    12 === 12 cm === 12\text{ cm} === x = 12 === x = 12\text{ cm} === 12 cats === f(x) = 12 ===
        Total cost = 12 === 12th
    $12 === \$12.00 === 12 dollars === \text{12 dollars}
    5 m^2 === 5\text{ square meters} === 5\text{ m}^2 === 5 \mbox{ meters}^2
    90 === 90^\circ === 90^{\circ} === 90° === 90 degrees
    4210_5 === 4210_{5}
    1,2,3 === 3, 2 and 1 === \{1,2,3\} === {2,1,3} === 1; 2; 3 === x=1, x=2 or x=3 ===
        \{1,2\}\cup\{3\} === 1, 2, and 3
    \pm3 === 3,-3 === -3 \text{ or } 3 === x=\pm3
    \frac{1\pm\sqrt5}{2} === \frac{1-\sqrt5}{2}, \frac{1+\sqrt5}{2}
    (\pm1,\mp2) === (1,-2),(-1,2)
    \emptyset === \{\} === \varnothing === no solution
    (1/2, \sqrt{4}) === (0.5, 2) === \left(\frac12, 2\right) === (x, y) = (0.5, 2) ===
        \langle 1/2, 2\rangle
    (1/2, \sqrt{4}) === x = 1/2, y = 2
    (-\infty,3] === x \le 3 === x<=3 === 3\ge x === 2x-6\leq0 === x\in(-\infty,3] === -x \geq -3
    (-\infty,3] === ]-∞,3]
    (-1,\sqrt2] === -1<x\le\sqrt2 === x>-1 and x\le 2^{1/2}
    (-\infty,1)\cup(3,\infty) === x<1 or x>3 === (3,\infty)\cup(-\infty,1)
    x\ne5 === \mathbb{R}\setminus\{5\} === (-\infty,5)\cup(5,\infty)
    [1,2]\cup(2,3] === [1,3] === [1,3]\cup(4,4) === [1,3]\cup[2,3)
    \mathbb{R} === (-\infty,\infty) === all real numbers
    y=2x+1 === 2x-y+1=0 === y-1 = 2x === 2y = 4x+2 === \frac{y}{2} = x+\frac12 === -2x+y=1
    x<2y === 2y>x === 3x<6y === -x>-2y
    \begin{pmatrix}1&2\\3&4\end{pmatrix} === \begin{bmatrix}1&2\\3&8/2\\\end{bmatrix}
    \begin{pmatrix}1&2\\3&4\end{pmatrix} === \left[\begin{array}{cc}1&2\\3&4\end{array}\right]
    \begin{pmatrix}1\\2\end{pmatrix} === (1, 2)
    3:4 === 6:8 === 3/4
    even === \text{Even} === EVEN. === \textbf{even}
    B === (B) === \text{(B)} === B. === Option B === B) False === \textbf{(B) }5
    True === true === \text{True} === yes
    June 20 === \text{June 20} === june 20
    4:30 p.m. === 4:30 pm
"""

# Every line: none of its members equals another.
DIFFERENT = r"""
    7 =/= 70 =/= -7 =/= 7.1 =/= 77 =/= 1/7 =/= 7i =/= 7x =/= \frac{7}{0} =/= \pm 7 =/= [0,7] =/=
        7 or 8 =/= not 7
    7 =/= x =/= 7e2
    9007199254740993 =/= 9007199254740992 =/= 9007199254740994
    10^{100} =/= 10^{100}+1 =/= 10^{100}-1 =/= 10^{99}
    2^{100000} =/= 2^{100000}+1
    0 =/= 10^{-20} =/= 1e-400 =/= \sqrt2\cdot10^{-70} =/= \frac{1}{50!} =/= \emptyset =/= \{\{\}\}
    1/3 =/= 0.33 =/= 0.333333333333333333333333333333333333
    \pi =/= 3.14 =/= 22/7 =/= 3.14159265358979323846264338327950288419716939937510582097494459 =/=
        \sqrt{10}
    \pi =/= \sqrt2+\sqrt3
    \sqrt2 =/= 1.41421356237309504880168872420969807856967187537694807317667973799 =/=
        \sqrt2+10^{-60}
    \sqrt[3]{2} =/= 1.2599210498948731647672106072782283505702514647015 =/= \sqrt[3]{2}+10^{-40}
    \sqrt{10^{100}+1} =/= 10^{50}
    1\frac34 =/= 13/4 =/= \frac34 =/= 1.34
    21/2 =/= 2\frac12 =/= 2/12
    1,24 =/= 124 =/= 1.24
    12, 13 =/= 1213 =/= 12.13
    (10,000) =/= 10000
    \frac{x}{9}+4 =/= \frac{x+4}{9} =/= x/9+4/9+1
    x =/= |x| =/= -x =/= x^2 =/= \sqrt{x^3}
    x^2y =/= xy^2 =/= x^{2y} =/= (xy)^2
    2k =/= 2n =/= 2K =/= 2k_1 =/= 2^k
    x(x-1)(x-2) =/= 0
    \sin^{-1} x =/= \frac{1}{\sin x} =/= \sin x^{-1} =/= \sin x
    \binom{n}{k} =/= \frac{n!}{k!} =/= \frac{n!}{(n-k)!}
    (x+1)^{100} =/= (x+1)^{100}+1 =/= (x-1)^{100}
    -2^2 =/= (-2)^2
    (-16)^{1/4} =/= -2 =/= 2 =/= 2i
    6+5i =/= 6-5i =/= \sqrt{61} =/= 5+6i
    5 cm =/= 5 m =/= 5 cm^2 =/= 5 minutes =/= 5 hours =/= $5 =/= 5 cents
    5 =/= 5 million =/= 5 hundred =/= 5 maybe =/= 5 squared =/= 5 or so =/= 5) =/= 5 = 6 =/=
        2x+z=5 =/= 2+4 = 5 =/= 2x+1=5 =/= -x=5 =/= 5\cdot3=15=5
    52_8 =/= 52_7 =/= 25_8
    28\% =/= 27\% =/= 2.8\% =/= 280
    1,2 =/= 1,2,3 =/= (1,2) =/= [1,2] =/= 1,3 =/= 1,2,\dots,3 =/= 12
    1,1,2 =/= 1,2,2
    (1,2) =/= (2,1) =/= [1,2) =/= (1,2,0) =/= ((1,2)) , 3 =/= \{1,2\}
    (1,2),(3,4) =/= (1,3),(2,4) =/= (2,1),(4,3)
    x<3 =/= x>3 =/= x\le3 =/= y<3 =/= x\ne3 =/= x=3 =/= x<-3
    [1,2)\cup(2,3] =/= [1,3] =/= [1,2]\cup[2,4]
    y=2x+1 =/= y=2x =/= y=-2x-1 =/= 2x+y=1 =/= xy = 2x^2+x
    x^2+y^2=25 =/= x^2+y^2=5 =/= x+y=5
    x < 2y =/= x > 2y =/= -x < 2y
    f(1)<f(2)<f(4) =/= f(2)<f(1)<f(4)
    \begin{pmatrix}1&2\\3&4\end{pmatrix} =/= \begin{pmatrix}1&3\\2&4\end{pmatrix}
    \begin{pmatrix}1&2\\3&4\end{pmatrix} =/= \begin{pmatrix}1&2&3&4\end{pmatrix} =/= 1,2,3,4
    \infty =/= -\infty =/= 1e400 =/= \mathbb{R}
    even =/= odd =/= not even =/= evening
    A =/= B =/= A or B =/= AB =/= ABCD
    True =/= False =/= 1
    Maria =/= Marie =/= Maria and Marie
    3:4 =/= 4:3 =/= 3:4:5 =/= 7
    4:30 p.m. =/= 4:30 a.m. =/= 5:30 p.m.
    2 hours =/= 2 million =/= 2 thirds =/= 2 thousandths =/= \infty =/= 2+\infty
    11:00 =/= 3:00 =/= 0:0 =/= 3:05 =/= 3:5 =/= 0:5
    A) B =/= A =/= B
    2xy =/= 2 =/= 3 xy
    1 \% 0 =/= 5 =/= 0
    12:30 =/= 1:30
"""


def table(text: str, sign: str) -> list[list[str]]:
    lines = text.replace(f"{sign}\n", sign).strip().splitlines()
    return [[member.strip() for member in line.split(sign)] for line in lines]


@pytest.mark.parametrize("members", table(EQUAL, "==="), ids=lambda members: members[0])
def test_equal(members):
    """Everything on a line equals the line's first member, in both directions."""
    for member in members:
        assert is_equivalent(member, members[0]), f"{member} is {members[0]}"
        assert is_equivalent(members[0], member), f"{members[0]} is {member}"


@pytest.mark.parametrize("members", table(DIFFERENT, "=/="), ids=lambda members: members[0])
def test_different(members):
    for k, a in enumerate(members):
        assert is_equivalent(a, a)
        for b in members[k + 1:]:
            assert not is_equivalent(a, b) and not is_equivalent(b, a), f"{a} is not {b}"


def test_nothing_equals_no_answer():
    for blank in ("", " ", "\n", "\\boxed{}", "$$", "?", "\\frac{", "NaN", "undefined"):
        for other in ("5", "0", "", "\\frac12", "x"):
            assert not is_equivalent(blank, other) and not is_equivalent(other, blank)


UNDEFINED = r"""1/0 0/0 0^{-1} 0^{-\frac12} 0^{1/0} 0^i \ln0 \log0 \log_20 \log_15 \log_05 \ln(1-1)
    \tan90^\circ \tan\frac{\pi}{2} \cot0 \cot\pi \sec90^\circ \csc\pi \csc0 \frac{1}{x-x}
    \frac{1}{\sin\pi} \frac{1}{\sqrt2\sqrt3-\sqrt6} \frac{\sin1}{\sin1-\sin1} \frac{1}{\ln1}
    \ln(\ln1) \frac{1}{1-\sin^21-\cos^21} \frac{1}{e^{i\pi}+1} \ln(\sqrt2\sqrt3-\sqrt6) \sqrt[0]{5}
    (-1)! \frac{x}{x-x} (1/2)! \binom{-1}{2} \lfloor1/0\rfloor |1/0| \infty-\infty 0\cdot\infty
    \frac{\infty}{\infty} \infty+5 1^\infty e^\infty e^{-\infty} 2^{100000}-2^{100000} e^{10^9}
    e^{-10^9} 10^{5000}/10^{5000} (\frac10)^0 \sin(10^{30})-\sin(10^{30}) 0:0 0:5 5:0 3:0:1
    \frac10\text{cm} 1/0\% \frac10^\circ \arctan(1/0) \arctan{i} \tanh\infty \sqrt{1/0}
    5\cdot0^{-1}\cdot0 (0^{-1})^{-1} 1\%0 \frac{1}{1-0.\overline{9}} \sqrt2-\sqrt2+0^{-1}
    \pi+\tan\frac{\pi}{2} \ln2+0^{-1} x+0^{-1} e^x+0^{-1} (x-x)^{-1}""".split()
IN_WHAT = r"""%s|\boxed{%s}|x=%s|%s=5|5=%s|(%s,1)|[0,%s]|[%s,5)|(-\infty,%s]|1,%s|%s or 5
    |\{1,2,%s\}|%s\pm1|x<%s|x>%s|3<x<%s|x<3 or x>%s|x<3 or x+%s>5|x<3 and x<%s|(1,2)\cup(%s,3)
    |\mathbb{R}\setminus\{%s\}|\begin{pmatrix}%s\\2\end{pmatrix}
    |\begin{pmatrix}%s&2\\3&4\end{pmatrix}|%s:4|3:%s|0\cdot(%s)|5+0\cdot(%s)|(%s)^0
    |y=2x+1+0\cdot(%s)|y+0\cdot(%s)=2x+1|-(%s)|\sqrt{%s}|2^{%s}|\frac{1}{%s}|\frac{0}{%s}|\ln(%s)
    |\sin(%s)|\arctan(%s)|%s\%%|%s^\circ|5 %s|A) %s|5 \approx %s|%s \approx 5"""
REFERENCES = r"""0|1|-1|5|540|100|\frac12|\frac37|0.25|3.14|\sqrt2|3\sqrt{13}|\pi|2\pi|e|i|1+i|x
    |x^2|2x+1|\frac{x}{2}|e^x|\sin x|(1,2)|(0,0)|(2,2)|[0,1]|(-\infty,3]|(2,\infty)|\mathbb{R}
    |x<1 or x>3|\{1,2\}|1,2|\emptyset|\{0\}|x=5|y=2x+1|x>3|x\ne5|0=0|x=x
    |\begin{pmatrix}1\\2\end{pmatrix}|3:4|11:00|50\%|\begin{pmatrix}1&2\\3&4\end{pmatrix}|90^\circ
    |5\text{ cm}|B|\text{even}|True|no solution|52_8"""
FORMS, KINDS = ([part.strip() for part in text.split("|")] for text in (IN_WHAT, REFERENCES))


def test_a_divisor_that_rounds_to_zero_is_zero():
    """No product with zero, no sum and no power hides it."""
    for hidden in (r"\sqrt2\sqrt3-\sqrt6", r"e^{i\pi}+1", r"\sin\pi", r"\ln6-\ln2-\ln3"):
        assert is_equivalent(hidden, "0")
        for form in (r"0\cdot\frac{1}{%s}", r"\frac{0}{%s}", r"0\cdot\ln(%s)", r"0\cdot(%s)^{-1}"):
            assert not is_equivalent(form % hidden, "0"), form % hidden
            assert not is_equivalent("5+" + form % hidden, "5"), form % hidden


def test_nothing_undefined_equals_anything(rng):
    """Every undefined form, bare and inside other things, against every kind of reference."""
    assert len(UNDEFINED) >= 60 and len(KINDS) >= 40
    for undefined in UNDEFINED:
        for form in ("%s", rng.choice(FORMS)):
            answer = form.replace("%s", undefined).replace("%%", "%")
            for reference in KINDS if form == "%s" else rng.sample(KINDS, 8):
                kept = form in ("5 \\approx %s", "A) %s")  # which state 5, and the choice A
                if kept and is_equivalent("5", reference):
                    continue
                assert not is_equivalent(answer, reference), (answer, reference)
                assert not is_equivalent(reference, answer), (answer, reference)
            assert judge(f"\\boxed{{{answer}}}", rng.choice(KINDS[:30])).reward == 0 or kept, answer


def test_no_answer_equals_two_references(rng, monkeypatch):
    """Random and mutated answers against a pool in which no two are equal; symmetric, reflexive."""
    monkeypatch.setattr(verify, "_readings", functools.lru_cache(1000)(verify._readings))
    numbers = [f"\\frac{{{rng.randint(1, 99)}}}{{{rng.randint(2, 99)}}}" for _ in range(200)]
    pool = []
    for reference in KINDS[:-10] + numbers:
        if not any(is_equivalent(reference, other) for other in pool):
            pool.append(reference)
    pool = pool[:200]
    assert len(pool) >= 180
    for _ in range(ANSWERS or 60):
        answer = mutated(rng.choice(pool), pool, rng)
        if rng.random() < 0.3:
            answer = " ".join(rng.choice(FRAGMENTS) for _ in range(rng.randint(1, 8)))
        equal = [reference for reference in pool if is_equivalent(answer, reference)]
        assert len(equal) <= 1, (answer, equal)
        assert all(is_equivalent(reference, answer) for reference in equal)
        assert is_equivalent(answer, answer) or not answer.strip()


def spellings(value: Fraction, rng: random.Random) -> list[str]:
    """Ways to write an exact rational."""
    k = rng.randint(2, 9)
    top, bottom = value.numerator, value.denominator
    out = [
        f"{top}/{bottom}", f"({top})/{bottom}", f"\\frac{{{top}}}{{{bottom}}}",
        f"\\frac{{{k * top}}}{{{k * bottom}}}", f"\\frac{{{-top}}}{{{-bottom}}}",
        f"{top}\\cdot{bottom}^{{-1}}", f"{100 * value}\\%",
    ]
    whole, rest = divmod(abs(value), 1)
    if whole and rest:
        sign = "-" if value < 0 else ""
        out.append(f"{sign}{whole}\\frac{{{rest.numerator}}}{{{rest.denominator}}}")
    if value.denominator == 1:
        out += [f"{top:,}", f"{top}.0", f"{top}.", f"x = {top}"]
    if 10**6 % bottom == 0:
        out.append(f"{float(value):.6f}")
    return out


def test_random_rationals(rng):
    """All spellings of one number are equal, and none equals any spelling of a neighbour."""
    for _ in range(60):
        size = 10 ** rng.randint(1, 5)
        value = Fraction(rng.randint(-size, size), rng.choice((1, 1, 2, 3, 7, 8, 20, 125, 99)))
        near = value + Fraction(rng.choice((-1, 1)), rng.choice((1, 7, 10**6, 10**30)))
        if value in (100 * near, near / 100):  # where a percent sign may stand for nothing (P5)
            continue
        ours, others = spellings(value, rng), spellings(near, rng)
        for a in ours:
            assert is_equivalent(a, ours[0]), (a, ours[0])
            b = rng.choice(others)
            assert not is_equivalent(a, b), (a, b)


def polynomial(coefficients: list[int]) -> str:
    """[1, -3, 2] as 1x^{2} - 3x^{1} + 2x^{0}."""
    degree = len(coefficients) - 1
    terms = [f"{a}x^{{{degree - k}}}" for k, a in enumerate(coefficients)]
    return " + ".join(terms).replace("+ -", "- ")


def test_random_polynomials(rng):
    """A product of linear factors equals its expansion (made here), and no other polynomial."""
    for _ in range(40):
        roots = [rng.randint(-9, 9) for _ in range(rng.randint(2, 5))]
        coefficients = [1]
        for root in roots:  # times (x - root)
            coefficients = [a - root * b for a, b in zip(coefficients + [0], [0] + coefficients)]
        factored = "".join(f"(x-{root})" if root >= 0 else f"(x+{-root})" for root in roots)
        assert is_equivalent(factored, polynomial(coefficients))
        coefficients[rng.randrange(len(coefficients))] += rng.choice((-1, 1))
        assert not is_equivalent(factored, polynomial(coefficients))


def test_random_radicals(rng):
    """(a + b√c)^2 = a^2 + b^2 c + 2ab √c, the same under one root, and 1 / (a + b√c)."""
    for _ in range(40):
        a, b = rng.randint(1, 20), rng.choice((-1, 1)) * rng.randint(1, 9)
        c = rng.choice((2, 3, 5, 6, 7, 12, 50, 101))
        plus, minus = f"{a}+{b}\\sqrt{{{c}}}", f"{a}-{b}\\sqrt{{{c}}}"
        square = f"{a * a + b * b * c}+{2 * a * b}\\sqrt{{{c}}}"
        assert is_equivalent(f"({plus})^2", square)
        assert is_equivalent(f"\\sqrt{{{square}}}", f"|{plus}|")
        assert not is_equivalent(f"({minus})^2", square)
        norm = a * a - b * b * c
        assert is_equivalent(f"\\frac{{1}}{{{plus}}}", f"\\frac{{{minus}}}{{{norm}}}")
        assert not is_equivalent(f"\\sqrt{{{square}}}", f"|{plus}|+10^{{-50}}")


def test_random_identities(rng):
    """Functions at random numbers obey their laws, in every quadrant; a changed sign is noticed."""
    for _ in range(12):
        a, b = (Fraction(rng.randint(-400, 400), 97) for _ in range(2))
        assert is_equivalent(f"\\sin({a}+{b})", f"\\sin({a})\\cos({b})+\\cos({a})\\sin({b})")
        if a and b:
            other = f"\\sin({a})\\cos({b})-\\cos({a})\\sin({b})"
            assert not is_equivalent(f"\\sin({a}+{b})", other)
        assert is_equivalent(f"e^{{i({a})}}", f"\\cos({a})+i\\sin({a})")
        assert is_equivalent(f"\\tan(\\arctan({a}))", f"{a}")
        assert is_equivalent(f"e^{{{a}}}\\cdot e^{{{b}}}", f"e^{{{a + b}}}")
        p, q = abs(a) + 1, abs(b) + 1
        assert is_equivalent(f"\\ln({p * q})", f"\\ln({p})+\\ln({q})")
        assert is_equivalent(f"({p})^{{{b}}}", f"e^{{({b})\\ln({p})}}")


def test_random_regions(rng):
    """Unions of intervals against a plain membership test on all ends and midpoints."""

    def contains(parts, x):
        for left, low, high, right in parts:
            if low < x < high or (x == low and left == "[") or (x == high and right == "]"):
                return True
        return False

    def written(parts):
        return "\\cup".join(f"{left}{low},{high}{right}" for left, low, high, right in parts)

    points = [Fraction(k, 2) for k in range(-1, 16)]
    for _ in range(150):
        unions = []
        for _ in range(2):
            parts = []
            for _ in range(rng.randint(1, 3)):
                low, high = sorted(rng.sample(range(8), 2))
                parts.append((rng.choice("(["), low, high, rng.choice(")]")))
            unions.append(parts)
        a, b = map(written, unions)
        if "cup" in a:  # a lone pair is a point as well as an interval
            same = all(contains(unions[0], x) == contains(unions[1], x) for x in points)
            assert is_equivalent(a, b) is same, (a, b)


@needs_shared
def test_pairs_shared():
    """Every labelled pair, symmetric, and every answer equal to itself."""
    wrong, pairs = [], read_jsonl(SHARED / "verify" / "pairs.jsonl")
    for pair in pairs:
        a, b = pair["prediction"], pair["reference"]
        assert is_equivalent(b, b) and (is_equivalent(a, a) or not a.strip())
        assert is_equivalent(a, b) is is_equivalent(b, a)
        if is_equivalent(a, b) is not pair["equal"]:
            wrong.append((a, b, pair["why"]))
    print(f"{len(pairs) - len(wrong)} of {len(pairs)} as labelled; not: {wrong}")
    assert not wrong


# ----------------------------------------------------------------------------------------- verdicts


def test_statuses():
    assert judge("2 * 3 = 6\n#### 6", "6") == Verdict(1.0, "6", "correct")
    assert judge("#### 5", "6") == (0.0, "5", "wrong")
    assert judge("I give up", "6") == (0.0, None, "no_answer")
    assert judge("\\boxed{6 + }", "6") == (0.0, "6 +", "unparsed")
    assert judge("\\boxed{" + "6" * 990 + "\\sqrt}", "6").status == "unparsed"
    assert set(STATUSES) == {"correct", "wrong", "no_answer", "unparsed", "error"}


def test_an_internal_error_is_visible(monkeypatch, caplog):
    def broken(prediction, reference):
        raise KeyError("a bug")

    monkeypatch.setattr(verify, "is_equivalent", broken)
    with caplog.at_level(logging.ERROR):
        assert judge("#### 6", "6") == (0.0, None, "error")
    assert "a bug" in caplog.text and "#### 6" in caplog.text


def test_what_is_not_text_is_an_error_not_a_wrong_answer(caplog):
    assert judge(None, "6").status == "error" and judge("#### 6", None).status == "error"


def test_unknown_verifier():
    with pytest.raises(ValueError, match="strict, last-number"):
        judge("6", "6", "lenient")


def test_last_number_is_the_papers_rule_with_its_faults():
    for text, number in (
            ("The answer is 3. I checked it 2 times.", "2"), ("1,234", "234"), ("3/4", "4"),
            ("\\dfrac{1}{2}", "2"), ("\\frac{1}{2}", "\\frac{1}{2}"),
            ("so \\frac{x}{2} it is", "\\frac{x}{2}"),
            ("10-3", "-3"), ("5.", "5."), (".5", ".5"), ("1e5", "5"), ("50%", "50"), ("$7", "7"),
            ("<think>8", "8"), ("\\frac{1}{2} of 6", "6"), ("7 \\frac12", "12"), ("none", None)):
        assert last_number(text) == number
    response = "The answer is 3. I checked it 2 times."
    assert judge(response, "3").status == "correct" and judge(response, "2").status == "wrong"
    assert judge(response, "2", "last-number") == (1.0, "2", "correct")
    assert judge("<think>so \\frac{1}{2}", "0.5", "last-number").status == "correct"
    assert judge("none", "2", "last-number").status == "no_answer"


def test_references_are_read():
    for reference, answer in (("18", "18"), ("x = 5", "x = 5"), ("So \\boxed{18}.", "18"),
                              ("2 + 2\n#### 4", "4"), ("The answer is: 3", "3"), ("a\nb", "a\nb")):
        assert final_answer(reference) == answer
    assert judge("The answer is 18.", "We have 13+5=18. So \\boxed{18} left.").reward == 1
    kinds = {"18": "value", "x^2+1": "value", "B": "choice", "(C)": "choice", "true": "choice",
             "Evelyn": "text", "June 20": "text", "1 + ": None, "\\frac{1}{": None, "5 = 6": None}
    assert {answer: kind_of(answer) for answer in kinds} == kinds


GAMES = [
    # G1: nothing, or nothing finished
    ("", "5"), ("   ", "5"), ("\\boxed{}", "5"), ("<think>The answer is \\boxed{5}", "5"),
    ("<think>5</think>", "5"), ("\\boxed{5", "5"), ("The answer is", "5"),
    # G2: a list without a commitment
    ("1 2 3 4 5", "5"), ("1, 2, 3, 4, 5", "5"), ("It is one of 1, 2, 3, 4, 5", "5"),
    ("Maybe 3, 4 or 5", "5"), ("1\n2\n3\n4\n5", "5"), ("- 3\n- 4\n- 5", "5"),
    ("The answer is 3, 4, 5.", "5"), ("The answer is 4 or 5.", "5"), ("\\boxed{4, 5}", "5"),
    ("\\boxed{1,2,3,4,5,6,7,8,9}", "5"), ("The answer is 5 or something else.", "5"),
    ("#### 1 2 3 4 5", "5"), ("The answer is between 4 and 5.", "5"),
    ("The answer is A, B, C or D.", "D"), ("\\boxed{ABCD}", "D"),
    ("The answer is True or False.", "False"),
    # G3: several boxes
    ("\\boxed{3} \\boxed{4} \\boxed{5}", "5"), ("$\\boxed{3}$, $\\boxed{4}$, $\\boxed{5}$", "5"),
    ("\\boxed{4}\n\n\\boxed{5}", "5"),
    ("The correct answer is \\boxed{4}. The correct answer is \\boxed{5}.", "5"),
    ("It is \\boxed{4} or maybe it could also turn out to be \\boxed{5}", "5"),
    ("\\boxed{4} or \\boxed{5}", "4"),
    # G4: the problem again
    ("A box holds 5 pens. How many pens do 4 boxes and 5 pens make?", "5"), ("What is 3 + 5?", "5"),
    ("Find the remainder when 17 is divided by 5.", "5"), ("Compute $3 + 5$.", "5"),
    ("Let $x + y = 5$. Determine the largest value of $xy$.", "5"),
    ("Tom has 5 hats, calculate how many Ann has.", "5"),
    # G5: choices that nobody made
    ("Is it true or false?", "False"), ("A) red\nB) blue\nC) green", "C"),
    ("Answer with True or False.", "False"), ("A. True\nB. False", "B"),
    ("Is the statement true?", "True"), ("Either it is A or B", "A"),
    # G6: the reference inside another number
    ("#### 152", "5"), ("The answer is 15.", "5"), ("\\boxed{5.5}", "5"), ("\\boxed{0.5}", "5"),
    ("\\boxed{x_5}", "5"), ("\\boxed{\\text{5 or 6}}", "5"), ("\\boxed{not 5}", "5"),
    ("\\boxed{[4,5]}", "5"), ("\\boxed{\\pm5}", "5"), ("\\boxed{x=5=6}", "5"),
    ("The distance is \\(3\\sqrt{5}\\).", "5"), ("So they differ by $5x$.", "5"),
    ("Thus\n\\[ y = x^5 \\]", "5"), ("They meet at $(4, 5)$.", "5"),
    ("It costs $3 or so in all: $$c = \\frac{2}{3}\\cdot 5$$", "5"), ("\\boxed{x}", "5"),
    ("\\boxed{5x}", "5"), ("\\boxed{5 = 6}", "5"), ("\\boxed{5\\ne6}", "5"),
]


@pytest.mark.parametrize("response, reference", GAMES)
@pytest.mark.parametrize("prefix", ["", "Let me think about this one step by step.\n\n"])
def test_not_gameable(response, reference, prefix):
    if prefix and not response.strip():
        response = "nothing"
    verdict = judge(prefix + response, reference)
    assert verdict.reward == 0.0 and verdict.status in ("wrong", "no_answer", "unparsed"), verdict


@pytest.mark.parametrize("response", [
    "So 3 + 2 = 5", "He has 5 pens left.", "There were 3 and now there are 5.", "9 - 4 = 5\n5",
    "So it is \\(5\\) long.", "\\[ \\begin{aligned} x &= 2 + 3 \\\\ &= 5 \\end{aligned} \\]",
    "The cost is $3 + $2 = $5", "The answer is not 5.", "The answer is maybe 5", "Answer: 5 or so",
    "The answer isn't 3 + 2 = 5", "The answer is not 3 + 2 = 5", "The answer is less than 5",
    "The answer is: at least 5 hats", "The answer is that it could be 5", "Answer: between 5 and 6",
    "The answer is either 5 or not", "The answer is: perhaps 2 + 3 = 5", "Answer: 3 + 2 = 5 or 6",
])
def test_no_commitment_no_reward(response):
    verdict = judge(response, "5")
    assert verdict.reward == 0 and verdict.status in ("no_answer", "unparsed", "wrong"), verdict


@pytest.mark.parametrize(
    "response, reference",
    [
        ("First \\boxed{4}. No, that is wrong: \\boxed{5}", "5"),
        ("\\boxed{5} and again \\boxed{5}", "5"), ("\\boxed{\\boxed{5}}", "5"),
        ("It is \\boxed{even}, yes, \\boxed{even}", "even"),
        ("I first found \\boxed{4}. After checking the second equation it must be \\boxed{5}", "5"),
        ("The roots are \\boxed{4} and \\boxed{5}", "4,5"),
        ("Why 5? Because 2 + 3 = 5. The answer is 5.", "5"),
    ],
)
def test_honest_answers_are_paid(response, reference):
    assert judge(response, reference).status == "correct"


@pytest.mark.parametrize(
    "response, reference",
    [
        ("The answer is (B).", "B"), ("B", "B"), ("B.", "B"), ("(B)", "B"), ("\\boxed{B}", "B"),
        ("\\boxed{\\text{B}}", "B"), ("The correct answer is B) False", "B"),
        ("Answer: B. False", "B"), ("A is wrong for 2 reasons, so the answer is option B.", "B"),
        ("The answer is true.", "True"), ("true", "True"),
        ("Answer: No", "No"),
    ],
)
def test_choices(response, reference):
    """The last stated choice counts, and only that one."""
    assert judge(response, reference).status == "correct"
    for other in ("A", "B", "C", "D") if reference in "ABCD" else ("True", "False"):
        if other != reference.replace("No", "False"):
            assert judge(response, other).reward == 0.0


# ------------------------------------------------------------------------------------------ hostile


def hostile_texts() -> list[str]:
    texts = [
        "10**10**10", "9^9^9^9", "9^{9^{9^{9}}}", "2^{100000}", "7^{-100000000}",
        "(1+10^{-9})^{10^{9}}", "1e999999", "-1e99999999999", "999999999!", "((((9!)!)!)!)!",
        "9" + "!" * 300, "\\binom{1000000000}{500000000}", "\\sqrt[1000000000]{2}",
        "\\sum_{k=1}^{10^{18}} k", "(x+1)^{1000000}", "(a+b+c+d+e+f+g+h)^{50}",
        "(\\sqrt{999983})^{99999}", "0.\\overline{" + "1" * 900 + "}", "7\x008", "\x00", "\ud800",
        "\\boxed{7\udc00}", "\u202e71\u202c", "\ufeff7", "1\u200b7", "\u0667", "\u00b2", "\u2466",
        "\u0130", "__import__('os').system('touch pwned')", "\\input{/etc/passwd}", "\\frac{1}{0}",
        "{0.__class__}", "%s%n", "(a+)+$", "[", "nan", "-inf", "0x1F", "1_000", "\\frac",
        "\\frac}{1}{2}", "\\sqrt[", "x^", "^2", "(1,", "1,,2", "1/", "\\boxed", "\\left(",
        "\\end{pmatrix}\\begin{pmatrix}", "\\begin{pmatrix}1&2\\\\3\\end{pmatrix}",
        "0.\\overline{}", "1.2.3", "1e", "_", "\\", "7_{1}",
        "0\\pm 1\\pm 1\\pm 1\\pm 1\\pm 1\\pm 1\\pm 1", "$", "'" * 50, "...",
    ]
    for unit in (
        "7", "(", ")", "{", "\\boxed{", "}", "\\sqrt{", "\\sqrt ", "\\frac", "\\frac{1}{1+",
        "\\left(", "\\sin(", "\\sin ", "_{", "x^", "2^", "(1,", "|", "<think>", "a", " ", "\n",
        "the answer is ", "#", "$", "\\", "-", "+-", "1+", "1,", ",x+y", ",111", "1 ", "\\pm 1",
        "x=", "<x", "(0,1)\\cup", "1&", "\\begin{pmatrix}", "\\text{", "\u0301", "\U0001f600",
        "Answer\n", "\\boxed{}", "\\boxed{ ", "!", "%", "°", '"', "<<", ":", "=", "\\sin x+",
        "\\ln 2x<\\sin 3 or ", "\\sqrt[3]{2}+", "\\arctan(1/3)+", "x^{77.7}", "(x+y)^{9}",
        "1/3^{900}+", "(1,x),",
    ):
        texts += [
            unit * 20,
            unit * (900 // len(unit)),
            unit * (100_000 // len(unit)),
            "The answer is " + unit * 60 + "1",
            "\\boxed{" + unit * (900 // len(unit)) + "}",
            "5" + unit * 40 + "5",
        ]
    return texts


def cpu_seconds(function, *arguments) -> float:
    """CPU time of a call: the least of several tries, so that only what is always slow counts."""
    best = math.inf
    for attempt in range(20):
        start = time.process_time()
        function(*arguments)
        best = min(best, time.process_time() - start)
        if best < 0.005 or attempt >= 4 and best < 0.020:
            break
        time.sleep(0.01 * attempt)  # neighbours slow the clock of a shared core too: let them pass
    return best


def check_hostile(text: str):
    extracted = extract_answer(text)
    assert extracted is None or isinstance(extracted, str)
    assert is_equivalent(text, "17") is False and is_equivalent("17", text) is False
    assert isinstance(is_equivalent(text, text), bool)
    assert isinstance(is_equivalent(text, text + "+0"), bool)
    for verifier in ("strict", "last-number"):
        assert judge(text, "17", verifier).status in ("wrong", "no_answer", "unparsed")


def test_hostile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    slowest = 0.0
    for text in hostile_texts():
        check_hostile(text)
        seconds = cpu_seconds(judge, text, "17")
        seconds = max(seconds, cpu_seconds(is_equivalent, text, text[:900] + "+0"))
        assert seconds < 0.020, text[:50]
        slowest = max(slowest, seconds)
    print(f"{len(hostile_texts())} texts, the slowest verdict {slowest * 1000:.1f} ms")
    assert not list(tmp_path.iterdir())  # nothing was executed or written


@needs_shared
def test_hostile_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    slowest, cases = 0.0, read_jsonl(SHARED / "verify" / "hostile.jsonl")
    for case in cases:
        text = case.get("text")
        if text is None:
            text = case.get("prefix", "") + case["repeat"] * case["times"] + case.get("middle", "")
            text += case.get("close", "") * case.get("close_times", 0) + case.get("suffix", "")
        if text == "\u202e71\u202c":  # shown as 17, which is not what it says
            assert not is_equivalent(text, "71")
        assert is_equivalent(text, "5") is False and is_equivalent("5", text) is False, case["note"]
        assert isinstance(is_equivalent(text, text), bool)
        assert isinstance(extract_answer(text), str | None)
        assert judge(text, "5").reward == 0.0 and judge(text, "5").status != "error", case["note"]
        seconds = cpu_seconds(judge, text, "5") / max(1, len(text) / 100_000)
        assert seconds < 0.020, case["note"]
        slowest = max(slowest, seconds)
    print(f"{len(cases)} cases, the slowest verdict {slowest * 1000:.1f} ms (per 100 kB)")
    assert not list(tmp_path.iterdir())


def test_memory():
    """One verdict on a response of 100 kB takes less than 10 MB."""
    most = 0
    for text in hostile_texts():
        if len(text) > 50_000:
            tracemalloc.start()
            judge(text, "17")
            is_equivalent(text[:900], text[:899])
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < 10e6, (text[:50], peak)
            most = max(most, peak)
    print(f"most memory {most / 1e6:.1f} MB")


FRAGMENTS = r"""\frac \sqrt \sqrt[3] { } { } ( ) [ ] \{ \} ^ _ ^2 ^{ \sin \cos^2 \ln \log_2 \arctan
    \arcsin \pm \mp , ; and or = < > <= \ne \in \cup \setminus + - * / ! % ° $ \$ | \left( \right)
    \pi e i x y n 2 7 0 10 999 1e99 0.5 1,000 \overline{3} \infty \begin{pmatrix} \end{pmatrix} & \\
    \binom{n}{k} \text{ cm} \boxed{ \fbox{ answer is Answer: #### <think> </think> apples cm \sum :
    . ... \lfloor \rfloor \max( x^y e^{x} n! é ² ７ \quad " ` ** ?""".split()


def mutated(text: str, answers: list[str], rng: random.Random) -> str:
    for _ in range(rng.randint(1, 5)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.randint(1, 12))
        kind = rng.random()
        if kind < 0.4:
            text = text[:start] + rng.choice(FRAGMENTS) + text[start:]
        elif kind < 0.6:
            text = text[:start] + text[end:]
        elif kind < 0.75:
            text = text[:start] + text[start:end] * rng.choice((2, 3, 10, 40)) + text[end:]
        elif kind < 0.9:
            text = text[:start] + rng.choice(answers) + text[start:]
        else:
            code = rng.choice((rng.randrange(32, 127), rng.randrange(0x110000)))
            text = text[:start] + chr(code) + text[end:]
    return text


def test_fuzz(rng):
    """Mutated responses and answers: no exception, no slow verdict, symmetric, reflexive."""
    answers = [member for line in table(EQUAL, "===") + table(DIFFERENT, "=/=") for member in line]
    responses = [response for response, _ in EXTRACT + GAMES if response.strip()]
    slowest = 0.0
    for k in range(ANSWERS or 12_000):
        reference = rng.choice(answers)
        text = mutated(rng.choice(responses if k % 2 else answers), answers, rng)
        if k % 5 == 0:
            text = "\\boxed{" + text + "}"
        if k % 500 == 0:
            text *= 100_000 // len(text)
        start = time.process_time()
        status = judge(text, reference).status
        seconds = time.process_time() - start
        if seconds > 0.020:  # once may be the machine's fault
            seconds = cpu_seconds(judge, text, reference)
            assert seconds < 0.020, (text[:200], reference)
        slowest = max(slowest, seconds)
        assert status in ("correct", "wrong", "no_answer", "unparsed"), (text, reference)
        if k % 10 == 0:
            forth, back = is_equivalent(text, reference), is_equivalent(reference, text)
            assert forth is back, (text, reference)
            assert is_equivalent(text, text) is bool(text.strip())
    print(f"{k + 1} texts, the slowest verdict {slowest * 1000:.1f} ms")


# ------------------------------------------------------------------------------- published problems


def gsm8k_problems() -> list[tuple[str, str, str]]:
    """(question, solution, answer) of both splits."""
    raw = SHARED / "data" / "raw"
    rows = read_jsonl(raw / "gsm8k_train.jsonl") + read_jsonl(raw / "gsm8k_test.jsonl")
    return [(r["question"], r["answer"], r["answer"].split("####")[1].strip()) for r in rows]


def math500_problems() -> list[tuple[str, str, str]]:
    rows = read_jsonl(SHARED / "data" / "raw" / "math500_test.jsonl")
    return [(r["problem"], r["solution"], r["answer"]) for r in rows]


@needs_shared
@pytest.mark.parametrize("problems", [gsm8k_problems, math500_problems])
def test_gold_solutions_verify(problems):
    """The answer extracted from a reference solution equals the reference answer.

    The exceptions are printed.
    """
    problems = problems()
    missed = []
    for _, solution, answer in problems:
        extracted = extract_answer(solution)
        equal = extracted is not None and is_equivalent(extracted, answer)
        if not equal or judge(solution, answer).status != "correct":
            missed.append((extracted, answer))
    print(f"{len(problems) - len(missed)} of {len(problems)} verify; not: {missed}")
    assert len(missed) <= 0.005 * len(problems), missed


@needs_shared
def test_a_last_line_behind_a_marker_is_read(rng):
    """GSM8K's test solutions: "The answer is: " and the last line; then with a changed number."""
    missed, problems = [], gsm8k_problems()[-1319:]
    for _, solution, answer in problems:
        line = solution.split("\n####")[0].split("\n")[-1]
        if judge(f"The answer is: {line}", answer).reward == 0:
            missed.append((line, answer))
        other = str(int(answer.replace(",", "")) + rng.randint(1, 99))
        number = f"{int(answer.replace(',', '')):,}".replace(",", ",?")  # 1,234 or 1234
        changed = re.sub(rf"(?<![\d.,]){number}(?!,?\d)", other, re.sub("<<.*?>>", "", line))
        if other in changed:
            assert judge(f"The answer is: {changed}", answer).reward == 0, changed
        assert judge(solution.replace(f"#### {answer}", f"#### {other}"), answer).reward == 0
    print(f"{len(problems) - len(missed)} of {len(problems)} read; not: {missed}")
    assert len(missed) <= 0.01 * len(problems), missed


@needs_shared
def test_changed_boxes_earn_nothing(rng):
    """MATH-500's solutions with another problem's answer in the box."""
    problems = math500_problems()
    for _, solution, answer in problems:
        other = rng.choice(problems)[2]
        before, box, after = solution.rpartition(f"\\boxed{{{answer}}}")
        if box and not is_equivalent(other, answer):
            assert judge(f"{before}\\boxed{{{other}}}{after}", answer).reward == 0, (answer, other)


@needs_shared
@pytest.mark.parametrize("problems", [gsm8k_problems, math500_problems])
def test_repeating_the_question_earns_nothing(problems):
    for question, _, answer in problems():
        assert judge(question, answer).reward == 0.0, question
        assert judge(f"{question}\n{question}", answer).reward == 0.0, question
