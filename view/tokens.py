"""What the question says about each token of an answer.

    python -m view.tokens --question "Tom has 3 cups. ..." --answer "3 + 4 = 7"
    python -m view.tokens --completions runs/NAME/completions.jsonl --line 7

Prints v(a_j) = log P(a_j | q, a_<j) - log P(a_j | a_<j) of every token in nats, the answer in
colours, and the R_SA = 1 - exp(-mean_j v(a_j)) that they make. --html FILE: also as a page.
"""
import html
import json
import sys
from pathlib import Path

from data.files import read_json
from data.hub import find_model
from data.prompts import encode_prompt
from data.tokenizer import Tokenizer
from model import GPT
from runtime.errors import user_errors
from runtime.settings import Parser
from sar import answer_logprobs, perplexity, self_aligned_reward, token_values

STYLE = ("body {font: 16px monospace; max-width: 60em} p {line-height: 2; white-space: pre-wrap} "
         "rt {font-size: 55%; padding: 0 1px}")


def read_completion(path: str, number: int) -> tuple[str, list[int], str]:
    """An answer in line `number` (from 1) of a completions.jsonl: its question, its tokens, and the
    R_SA that the run recorded, as text. Raises ValueError where the line holds no answer."""
    with open(path, encoding="utf-8") as file:
        line = next((line for i, line in enumerate(file, 1) if i == number), None)
    if line is None:
        raise ValueError(f"{path} has no line {number}")
    try:
        row = json.loads(line)
        question, tokens = row["question"], row["tokens"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{path}, line {number} is no line of a completions.jsonl: it needs "
                         "question and tokens") from None
    listed = isinstance(tokens, list) and tokens and all(type(t) is int for t in tokens)
    if not isinstance(question, str) or not listed:
        raise ValueError(f"{path}, line {number}: question must be text and tokens a list of "
                         "token ids")
    if not all(isinstance(row.get(key), (int, float)) for key in ("r_sa", "step")):
        return question, tokens, ""
    return question, tokens, f"; R_SA was {row['r_sa']:.3f} in step {row['step']}"


def settings_beside(completions: str) -> dict:
    """The settings of the run that wrote this file; {} where it does not lie in a run's folder."""
    config = Path(completions).with_name("config.json")
    return read_json(config).get("settings", {}) if config.exists() else {}


def token_texts(tokenizer: Tokenizer, answer: list[int]) -> list[str]:
    """The text that each token adds; <end> for an end token, and a dot for one that only begins a
    character."""
    pieces, before = [], ""
    for j, token in enumerate(answer):
        text = tokenizer.decode(answer[:j + 1]).rstrip("\ufffd")
        nothing = "<end>" if token in tokenizer.stop_ids else "·"
        pieces.append(text[len(before):] or nothing)
        before = text
    return pieces


def visible(text: str) -> str:
    """What a model wrote, as text that moves no cursor and sets no colour."""
    shown = []
    for c in text:
        escaped = c if c.isprintable() else f"\\x{ord(c):02x}"
        shown.append("↵" if c == "\n" else escaped)
    return "".join(shown)


def shade(value: float) -> tuple[int, int, int]:
    """Red, green, blue: white at 0 nats, orange towards +6, blue towards -6, which colour-blind
    readers can tell apart."""
    end = (240, 130, 0) if value > 0 else (90, 160, 255)
    strength = min(1.0, abs(value) / 6)
    return tuple(round(255 + (e - 255) * strength) for e in end)


def print_coloured(pieces: list[str], values: list[float]) -> None:
    for piece, v in zip(pieces, values):
        text = visible(piece)
        if sys.stdout.isatty():
            red, green, blue = shade(v)
            text = f"\x1b[38;2;0;0;0;48;2;{red};{green};{blue}m{text}\x1b[0m"
        print(text, end="\n" if "\n" in piece else "")


def html_page(question: str, pieces: list[str], values: list[float], summary: str) -> str:
    """A page without scripts or outside files. v stands above a token where it is half a nat or
    more, and shows under the pointer for all of them."""
    tokens = ""
    for piece, v in zip(pieces, values):
        above = f"{v:+.1f}" if abs(v) >= 0.5 else ""
        tokens += (f'<ruby style="background:rgb{shade(v)}" title="{v:+.2f}">'
                   f"{html.escape(visible(piece))}<rt>{above}</rt></ruby>")
        tokens += "<br>" * piece.count("\n")
    return (f'<!doctype html><meta charset="utf-8"><title>v(a_j)</title><style>{STYLE}</style>'
            f"<body>\n<p>{html.escape(question)}</p>\n<p>{tokens}</p>\n"
            f"<p>{html.escape(summary)}</p>\n")


def make_parser() -> Parser:
    parser = Parser("What the question says about each token of an answer, v(a_j) in nats, and the "
                    "R_SA that these make.")
    parser.add_argument("--model", help="a model folder or name, see train_sa_grpo.py (default: "
                        "tiny; for --completions what its run began with)")
    parser.add_argument("--question", help="with --answer")
    parser.add_argument("--answer", help="its tokens are scored together with an end-of-text token")
    parser.add_argument("--completions", help="a run's completions.jsonl, instead of --question "
                        "and --answer")
    parser.add_argument("--line", type=int, default=1,
                        help="which of its answers, from 1 (default: 1)")
    parser.add_argument("--html", help="also write a page to this file")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    given = bool(args.completions), bool(args.question), bool(args.answer)
    if given not in ((True, False, False), (False, True, True)):
        raise ValueError("give --question and --answer, or --completions (with --line)")

    settings = {}
    if args.completions:
        question, answer, recorded = read_completion(args.completions, args.line)
        settings = settings_beside(args.completions)
    name = args.model or settings.get("model", "tiny")
    folder = find_model(name)
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.system, tokenizer.instruction = settings.get("system"), settings.get("instruction")
    tokenizer.thinking = bool(settings.get("thinking"))
    if args.answer:
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        answer = tokenizer.encode(args.answer, at_start=False) + end
        question, recorded = args.question, ""
    prompts = [encode_prompt(tokenizer, question), encode_prompt(tokenizer, "")]
    run_length = settings.get("max_prompt_tokens", 0) + settings.get("max_new_tokens", 0)
    model = GPT.from_pretrained(folder, length=run_length or len(prompts[0]) + len(answer))
    if not all(0 <= t < len(model.unembedding) for t in answer):
        raise ValueError(f"{args.completions}, line {args.line}: a token is outside the vocabulary "
                         f"of {name}: choose the run's model by --model")

    with_question, without_question = answer_logprobs(model, prompts, [answer, answer])
    values = token_values(with_question, without_question).tolist()  # (L,)
    pieces = token_texts(tokenizer, answer)
    r_sa = self_aligned_reward([with_question], [without_question]).item()
    summary = (f"R_SA = {r_sa:.3f}     mean v = {sum(values) / len(values):.3f} nats over "
               f"{len(answer)} tokens, ppl(a|q) = {perplexity(with_question):.2f}, "
               f"ppl(a) = {perplexity(without_question):.2f}{recorded}")
    rows = zip(pieces, values, with_question.tolist(), without_question.tolist())
    for piece, v, conditional, plain in rows:
        print(f"{v:+8.2f} = {conditional:7.2f} - {plain:7.2f}   {visible(piece)}")
    print("\n" + visible(question))
    print_coloured(pieces, values)
    print("\n\n" + summary)
    if args.html:
        page = html_page(question, pieces, values, summary)
        Path(args.html).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    with user_errors():
        main()
