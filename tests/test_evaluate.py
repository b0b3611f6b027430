"""evaluate.py: the score by hand, the table, the command."""
import math

import pytest

import evaluate

BASE = {"problems": 4, "accuracy": 0.5, "length": 100.0, "unfinished": 0.25, "unparsed": 0.0}


def test_aes_by_hand():
    better = {"accuracy": 0.6, "length": 70.0}
    assert evaluate.aes(better, BASE) == pytest.approx(0.3 + 5 * 0.2)
    assert evaluate.aes({"accuracy": 0.4, "length": 120.0}, BASE) == pytest.approx(-0.2 - 5 * 0.2)
    assert evaluate.aes(BASE, BASE) == 0
    assert math.isnan(evaluate.aes(better, BASE | {"accuracy": 0.0}))


def test_table():
    text = evaluate.comparison_table({"base": BASE, "trained": BASE | {"accuracy": 0.6, "length": 70.0, "unfinished": 0.0}})
    assert "| base | 50.0% | 100.0 | 25.0% |  |" in text and "| trained | 60.0% | 70.0 | 0.0% | +1.30 |" in text


def test_command(capsys):
    evaluate.main(["--model", "tiny", "--against", "tiny", "--data", "tiny", "--limit", "16"])
    assert "(16 held-out problems, greedy)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no problems"):
        evaluate.main(["--limit", "0"])
