"""Prompts: a question in the model's own chat frame, up to where its answer begins.

The checkpoint's chat template is rendered as transformers renders it, with a placeholder for the
question, and then cut at special tokens. So a question that spells one stays ordinary text.
"""
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from data.files import one_line
from data.tokenizer import WHITE_SPACE, Tokenizer

SYSTEM = "Reason step by step, and put your final answer within \\boxed{}."
PLAIN = (  # the frame of a model without a template
    "{{ bos_token if adds_bos }}{% for m in messages %}{{ m.content + '\n\n' if m.role == 'system' "
    "else 'Question: ' + m.content + '\nAnswer:' }}{% endfor %}")
HOLE = "TheQuestionStandsHere"  # the placeholder


def encode_prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    """Ids of the frame around `question`, ending where the answer begins: those of transformers'
    apply_chat_template with add_generation_prompt, the question being ordinary text.

    tokenizer.system, .instruction and .thinking say what else is in it. "" as the question makes
    the context of ppl(a): an empty user turn, without the instruction. Raises ValueError for a
    template that fails, or that does not put the question into the prompt exactly once.
    """
    core = question.strip()  # the template sees the white space around it
    asked = question.replace(core, HOLE, 1) if core else question
    if question and tokenizer.instruction:
        asked += f" {tokenizer.instruction}"
    text = render_prompt(tokenizer, asked)
    if text.count(HOLE) != bool(core):
        raise ValueError(f"{tokenizer.folder}: its chat template puts the question "
                         f"{text.count(HOLE)} times into the prompt")
    marks, ids = tokenizer.marks, []
    frame = [part for part in tokenizer.mark.split(text) if part]  # marks, and text between them
    for before, part, after in zip([None, *frame], frame, [*frame[1:], None]):
        if part in marks:
            ids.append(marks[part])
            continue
        part = part.replace(HOLE, core)
        if marks.get(before) in tokenizer.strips_after:
            part = part.lstrip(WHITE_SPACE)
        if marks.get(after) in tokenizer.strips_before:
            part = part.rstrip(WHITE_SPACE)
        ids += tokenizer.encode(part, at_start=before is None, marks=False)
    if max(ids, default=0) >= tokenizer.rows:
        raise ValueError(f"{tokenizer.folder}: token {max(ids)} of the prompt is beyond the "
                         f"{tokenizer.rows} rows of the model: its files do not belong together")
    return ids


def opened_thinking(tokenizer: Tokenizer) -> str:
    """The "<think>" that every prompt ends in, with its white space; else "". A verifier needs it
    in front of the answer."""
    return re.search(r"(<think>\s*)?\Z", render_prompt(tokenizer, ""))[0]


def render_prompt(tokenizer: Tokenizer, asked: str) -> str:
    """The prompt as text; `asked` is the user's message. Where the template has no place for a
    system message, that opens the user's."""
    template = PLAIN if tokenizer.chat_template is None else tokenizer.chat_template
    system = tokenizer.system
    if system is None:  # the embedded model knows none
        system = "" if "<|question|>" in template else SYSTEM
    variables = tokenizer.names | {"adds_bos": tokenizer.adds_bos, "add_generation_prompt": True,
                                   "enable_thinking": tokenizer.thinking}
    opening = [{"role": "system", "content": system}]
    tried, _ = rendered(template, variables, HOLE, opening)
    if not system or tried.count(HOLE) != 1 or system.strip() not in tried:
        opening, asked = [], f"{system}\n\n{asked}" if system else asked
    text, wrong = rendered(template, variables, asked, opening)
    if wrong:
        raise ValueError(f"{tokenizer.folder}: its chat template fails: {one_line(wrong)}")
    return text


def rendered(template, variables, asked, opening):
    messages = [*opening, {"role": "user", "content": asked}]
    variables = variables | {"messages": messages, "tools": None, "documents": None}
    return reply_to(json.dumps([template, variables]), os.getpid())


@functools.lru_cache(maxsize=4096)
def reply_to(request: str, process: int) -> list[str]:
    """The reply of data/render.py, as a child of `process`, this one."""
    child = renderer(process)
    print(request, file=child.stdin, flush=True)
    reply = child.stdout.readline()
    if not reply:
        renderer.cache_clear()
        return ["", "it takes more than 5 seconds or a gigabyte"]
    return json.loads(reply)


@functools.cache
def renderer(process: int) -> subprocess.Popen:
    if importlib.util.find_spec("jinja2") is None:
        raise ValueError("chat templates need jinja2, which is not installed: pip install jinja2")
    program = [sys.executable, "-I", str(Path(__file__).with_name("render.py"))]
    return subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, text=True, start_new_session=True)
