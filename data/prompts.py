"""Prompts: a question in the model's own chat frame, up to where its answer begins.

The checkpoint's chat template is rendered as transformers renders it, with a placeholder for the
question, and then cut at special tokens. So a question that spells one stays ordinary text.
"""
import functools
import json
import re
import sys
import time
import tracemalloc

from data.files import one_line
from data.tokenizer import Tokenizer

SYSTEM = "Reason step by step, and put your final answer within \\boxed{}."
PLAIN = (  # the frame of a model without a template
    "{{ bos_token if adds_bos }}{% for m in messages %}{{ m.content + '\n\n' if m.role == 'system' "
    "else 'Question: ' + m.content + '\nAnswer:' }}{% endfor %}")
HOLE = "TheQuestionStandsHere"  # the placeholder
MOST = 200_000  # of a template: characters that it prints, lines that it runs


def encode_prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    """Ids of the frame around `question`, ending where the answer begins: those of transformers'
    apply_chat_template with add_generation_prompt, the question being ordinary text.

    tokenizer.system, .instruction and .thinking say what else is in it. "" as the question makes
    the context of ppl(a): an empty user turn, without the instruction. Raises ValueError for a
    template that fails, or that does not put the question into the prompt once."""
    core = question.strip()  # the template sees the white space around it
    asked = question.replace(core, HOLE, 1) if core else question
    if question and tokenizer.instruction:
        asked += f" {tokenizer.instruction}"
    text = render_prompt(tokenizer, asked)
    if text.count(HOLE) != bool(core):
        raise ValueError(f"{tokenizer.folder}: its chat template puts the question "
                         f"{text.count(HOLE)} times into the prompt")
    ids = []
    for part in tokenizer.split(text, tokenizer.mark_finder):
        if isinstance(part, int):
            ids.append(part)
        else:
            ids += tokenizer.encode(part.replace(HOLE, core), at_start=not ids, marks=False)
    if max(ids, default=0) >= tokenizer.rows:
        raise ValueError(f"{tokenizer.folder}: token {max(ids)} of the prompt is beyond the "
                         f"{tokenizer.rows} rows of the model: its files do not belong together")
    return ids


def opened_thinking(tokenizer: Tokenizer) -> str:
    """The "<think>" that every prompt ends in, for a verifier of answers; else ""."""
    return re.search(r"(<think>\s*)?\Z", render_prompt(tokenizer, ""))[0]


def render_prompt(tokenizer: Tokenizer, asked: str) -> str:
    """The prompt as text. A system message without a place opens the user's, `asked`."""
    template = tokenizer.chat_template or PLAIN
    system = tokenizer.system
    if system is None:  # the embedded model knows none
        system = "" if "<|question|>" in template else SYSTEM
    names = tokenizer.names | dict(adds_bos=tokenizer.adds_bos, enable_thinking=tokenizer.thinking)
    if system:
        tried, _ = rendered(template, system, HOLE, **names)
        if tried.count(HOLE) != 1 or system.strip() not in tried:
            system, asked = "", f"{system}\n\n{asked}"
    text, wrong = rendered(template, system, asked, **names)
    if wrong:
        raise ValueError(f"{tokenizer.folder}: its chat template fails: {wrong}")
    return text


@functools.lru_cache(maxsize=4096)
def rendered(template: str, system: str, asked: str, **names) -> tuple[str, str]:
    """(The prompt, what went wrong). A template is a program from outside: it runs in a sandbox,
    and the lines that it runs, its memory and its products are limited."""
    lines = 0

    def watch(*event):
        nonlocal lines
        lines += 1
        if lines > MOST or tracemalloc.get_traced_memory()[0] > 500 * MOST:
            raise ValueError("it runs too long or takes too much memory")
        return watch

    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": asked})
    # {% generation %} only marks what is trained on.
    template = re.sub(r"({%[-+]?\s*(end)?)generation\b", r"\1with", template)
    environment, before = sandbox(), sys.gettrace()
    tracemalloc.start()
    try:
        program = environment.from_string(template)
        sys.settrace(watch)
        text = program.render(names, messages=messages, add_generation_prompt=True, tools=None,
                              documents=None)
        if len(text) > MOST:
            raise ValueError(f"it prints {len(text)} characters")
    except Exception as error:
        return "", f"{type(error).__name__}: {one_line(error)}"
    finally:
        sys.settrace(before)
        tracemalloc.stop()
    return text, ""


@functools.cache
def sandbox():
    """The environment that transformers renders templates in. Raises ValueError without jinja2."""
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ValueError("chat templates need a package: pip install jinja2") from None
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                         extensions=["jinja2.ext.loopcontrols"])
    calculate = made.call_binop

    def limited(context, operator, *values):
        for value in values:
            size = abs(value) if isinstance(value, int | float) else len(value)
            if size > 10_000:
                raise ValueError(f"it multiplies by {size}")
        return calculate(context, operator, *values)

    def refuse(message):
        raise ValueError(message)

    made.intercepted_binops, made.call_binop = {"*", "**"}, limited
    made.filters["tojson"] = lambda x, **how: json.dumps(x, **{"ensure_ascii": False} | how)
    made.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
    return made
