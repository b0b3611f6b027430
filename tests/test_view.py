"""view/tokens.py: every token is shown, nothing that a model wrote is obeyed."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from data.hub import find_model
from view import tokens


class Page(HTMLParser):
    """What a browser makes of a page: its tags, its text, v of each token and v above some."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.values, self.above = [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.values += [float(value) for name, value in attributes if name == "title"]

    def handle_data(self, data):
        if self.tags[-1] == "rt" and re.fullmatch(r"[+-]\d+\.\d", data):
            self.above.append(data)
        else:
            self.text += data


QUESTION = 'Tom has 3 cups. <script>alert("1")</script> & \x1b[2J How many?'
ANSWER = 'Tom é </span><img src=x onerror="y">\n\x1b[31m\r3 + 4 = 7'
# é is two tokens, the first of which is no text yet
SHOWN = 'Tom ·é </span><img src=x onerror="y">↵\\x1b[31m\\x0d3 + 4 = 7<end>'


@pytest.fixture
def view(tmp_path, capsys, monkeypatch):
    """The view of a hostile answer: (rows of the table, all that was printed, the page)."""
    path = tmp_path / "v.html"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    tokens.main(["--question", QUESTION, "--answer", ANSWER, "--html", str(path)])
    printed = capsys.readouterr().out
    table, _, _ = printed.partition("\n\n")
    row = re.compile(r" *([+-][0-9.]+) = *(-[0-9.]+) - *(-[0-9.]+)   ")
    rows = [[float(x) for x in row.match(line).groups()] for line in table.splitlines()]
    return rows, printed, path.read_text(encoding="utf-8")


def test_the_terminal_obeys_only_our_colours(view):
    rows, printed, _ = view
    codes = set(re.findall("\x1b.[0-9;]*.", printed))
    assert "\x1b[0m" in codes
    assert all(code.startswith("\x1b[38;2;0;0;0;48;2;") for code in codes - {"\x1b[0m"})
    assert "\r" not in printed and "\\x1b[2J" in printed
    assert SHOWN in re.sub("\x1b[^m]*m", "", printed).replace("↵\n", "↵")
    for v, with_question, without_question in rows:
        assert v == pytest.approx(with_question - without_question, abs=0.011)


def test_the_page_shows_every_token_as_text(view):
    rows, _, source = view
    page = Page(source)
    assert set(page.tags) == {"meta", "title", "style", "body", "p", "ruby", "rt", "br"}
    assert "http" not in source
    assert QUESTION in page.text and SHOWN in page.text
    assert page.tags.count("ruby") == len(rows) and page.values == [row[0] for row in rows]
    large = [v for v in page.values if abs(v) >= 0.5]
    assert [float(v) for v in page.above] == pytest.approx(large, abs=0.056)  # both are rounded
    r_sa = float(re.search(r"R_SA = (-?[0-9.]+)", page.text)[1])
    mean = sum(page.values) / len(rows)
    assert r_sa == pytest.approx(max(-1, 1 - math.exp(-mean)), abs=0.01)


def test_shades_by_hand():
    assert tokens.shade(0.0) == (255, 255, 255)
    assert tokens.shade(6.0) == tokens.shade(60.0) == (240, 130, 0)
    assert tokens.shade(-6.0) == tokens.shade(-60.0) == (90, 160, 255)
    assert tokens.shade(3.0) == (248, 192, 128)


@pytest.fixture
def completions(tmp_path, tokenizer):
    """A completions.jsonl whose second line alone holds an answer of the embedded model."""
    answer = [*tokenizer.encode("3 + 4 = 7"), *tokenizer.stop_ids]
    rows = [{}, {"question": "Tom has 3 cups.", "tokens": answer},
            {"question": "x", "tokens": [9**9]}, {"question": "x", "tokens": [[1]]}]
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    return path


def test_the_view_of_a_completion(completions, capsys):
    tokens.main(["--completions", str(completions), "--line", "2"])
    shown = capsys.readouterr().out
    count = len(json.loads(completions.read_text().splitlines()[1])["tokens"])
    assert "3 + 4 = 7<end>" in shown and f"{count} tokens" in shown and " R_SA was" not in shown
    assert "\x1b" not in shown  # not a terminal: no colours


def test_beside_a_run_its_model_is_taken_and_its_record_shown(
    completions, capsys, monkeypatch
):
    config = completions.with_name("config.json")
    row = json.loads(completions.read_text().splitlines()[1])
    completions.write_text(json.dumps(row | {"r_sa": 0.125, "step": 9}) + "\n")
    settings = {"model": "the run's", "max_prompt_tokens": 30, "max_new_tokens": 40}
    config.write_text(json.dumps({"settings": settings}))
    asked, lengths, load = [], [], tokens.GPT.from_pretrained
    monkeypatch.setattr(tokens, "find_model", lambda name: asked.append(name) or find_model("tiny"))
    monkeypatch.setattr(
        tokens.GPT,
        "from_pretrained",
        lambda folder, length: lengths.append(length) or load(folder, length=length),
    )
    tokens.main(["--completions", str(completions)])
    assert "R_SA was 0.125 in step 9" in capsys.readouterr().out
    tokens.main(["--completions", str(completions), "--model", "another"])
    assert asked == ["the run's", "another"]
    assert lengths == [70, 70]  # the run's limit: Phi-3.5 takes the rope factors of the run
    config.write_text("{")
    with pytest.raises(ValueError, match="config.json is truncated or not JSON"):
        tokens.main(["--completions", str(completions)])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--line", "1"], "line 1 .* needs question and tokens"),
        (["--line", "3"], "outside the vocabulary of tiny"),
        (["--line", "4"], "a list of token ids"),
        (["--line", "5"], "line 5 .* needs question and tokens"),
        (["--line", "6"], "has no line 6"),
        (["--line", "0"], "has no line 0"),
        (["--question", "x", "--answer", "y"], "give --question and --answer, or"),
        (["--question", "x"], "give --question and --answer, or"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(completions, flags, words):
    with pytest.raises(ValueError, match=words):
        tokens.main(["--completions", str(completions), *flags])


def test_a_missing_half_and_a_missing_model(completions):
    for half in (["--question", "x"], ["--answer", "x"], []):
        with pytest.raises(ValueError, match="give --question and --answer, or"):
            tokens.main(half)
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        tokens.main(["--completions", str(completions), "--line", "2", "--model", "no-such-model"])
