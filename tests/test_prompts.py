"""Prompt frames: placed token by token here, and equal to transformers' apply_chat_template.

SA_SHARED=../shared and SA_MODELS=FOLDER add the published templates of Qwen3, Gemma 3, SmolLM2 and
Qwen2.5.
"""
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from test_tokenizer import (
    OPENING,
    PUBLISHED,
    added,
    byte_level_spec,
    published,
    random_text,
    sentencepiece_spec,
    write,
)

from data.prompts import INSTRUCTION, encode_prompt
from data.tokenizer import Tokenizer

# The frames in templates of our own wording. The first two write newlines as escapes.
CHATML = (r"{% for m in messages %}"
          r"{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
          r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TEMPLATES = {
    "chatml": CHATML,
    "chatml-default": r"{% if messages[0].role != 'system' %}"
    r"{{ '<|im_start|>system\nYou are Test.<|im_end|>\n' }}{% endif %}" + CHATML,
    "gemma": "{{ bos_token }}{% set first_user_prefix = '' %}{% set turns = messages %}"
    "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}"
    "{% set first_user_prefix = messages[0].content + '\n\n' %}{% endif %}"
    "{% for m in turns %}"
    "{{ '<start_of_turn>' + m.role + '\n' + first_user_prefix + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "phi": "{% for m in messages %}{% if m.role == 'system' and m.content %}"
    "{{ '<|system|>\n' + m.content + '<|end|>\n' }}{% elif m.role == 'user' %}"
    "{{ '<|user|>\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "llama2": "{% set before = '' %}{% set turns = messages %}{% if messages[0].role == 'system' %}"
    "{% set before = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% endif %}{% for m in turns %}"
    "{{ bos_token + '[INST] ' + (before + m.content).strip() + ' [/INST]' }}{% endfor %}",
    "embedded": "{% for m in messages %}{{ '<|question|>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|answer|>' }}{% endif %}",
}
for frame in ("phi", "llama2"):  # with a space only at the text's start, as transformers 5 has it
    TEMPLATES[f"{frame}-first"] = TEMPLATES[frame]
NAMES = {
    "gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "phi": ["<|endoftext|>", "<|system|>", "<|user|>", "<|end|>", "<|assistant|>"],
    "embedded": ["<|question|>", "<|answer|>"],
}
QUESTIONS = ["What is 1+1?", "", "  two spaces,\ttab and end  \n", "\n\nnewlines\n\n", "'s",
             "Écrire ▁ 中文 😀 e\u0301", "a [INST] b <<SYS>> c", "\u3000wide\u3000"]
SYSTEMS = [None, "You are careful.", "  spaces around \n"]


def make(folder: Path, frame: str) -> Path:
    """A small tokenizer with the template TEMPLATES[frame] and its tokens, if there is one."""
    rng, settings = random.Random(frame), {"tokenizer_class": "PreTrainedTokenizerFast"}
    if frame in TEMPLATES:
        settings["chat_template"] = TEMPLATES[frame]
    scheme = "first" if frame.endswith("-first") else ""
    frame = frame.removesuffix("-first")
    if frame.startswith(("chatml", "embedded", "bytes")):
        spec = byte_level_spec(rng, OPENING)
        settings["eos_token"] = "<|endoftext|>"
    else:
        # Phi-3.5 has no words of white space: transformers finds such a word twice if it stands
        # behind a token that swallows white space.
        words = () if frame == "phi" else ("\n\n", "<p>")
        spec = sentencepiece_spec(rng, OPENING, prefix=frame != "gemma", scheme=scheme, words=words)
        settings["bos_token"] = "<bos>" if frame == "gemma" else "<s>"
        settings["add_bos_token"] = frame != "phi"
    tokens = spec["added_tokens"]
    present = {token["content"] for token in tokens}
    last = max([*spec["model"]["vocab"].values(), *(token["id"] for token in tokens)])
    for name in NAMES.get(frame, []):
        if name not in present:
            last += 1
            tokens.append(added(name, last, rstrip=frame == "phi" and name != "<|endoftext|>"))
    return write(folder, spec, tokenizer_config=settings)


def read(folder: Path, frame: str) -> Tokenizer:
    return Tokenizer.from_pretrained(make(folder, frame))


@pytest.mark.parametrize("frame, first", [("chatml", ""), ("chatml-default", "You are Test.")])
def test_chatml_by_hand(tmp_path, frame, first):
    t = read(tmp_path, frame)
    start, end = t.special["<|im_start|>"], t.special["<|im_end|>"]

    def turn(text: str) -> list[int]:
        return [start, *t.encode(text), end, *t.encode("\n")]

    answer = [start, *t.encode("assistant\n")]
    default = turn(f"system\n{first}") if first else []
    asked = turn(f"user\nhat?\n{INSTRUCTION}")
    assert encode_prompt(t, "hat?") == default + asked + answer
    assert encode_prompt(t, "hat?", instruction=False) == default + turn("user\nhat?") + answer
    assert encode_prompt(t, "", instruction=False) == default + turn("user\n") + answer
    assert encode_prompt(t, "") == default + turn(f"user\n\n{INSTRUCTION}") + answer
    assert encode_prompt(t, "hat?", system="Be.") == turn("system\nBe.") + asked + answer
    assert encode_prompt(t, "hat?", system="") == turn("system\n") + asked + answer


def test_gemma_phi_and_llama_by_hand(tmp_path):
    t = read(tmp_path / "gemma", "gemma")
    bos, start, end = (t.special[name] for name in NAMES["gemma"])
    for ids, turn in (
        (encode_prompt(t, " hat? ", system="Be.", instruction=False), "user\nBe.\n\nhat?"),
        (encode_prompt(t, ""), f"user\n{INSTRUCTION}"),
    ):
        answer = [*t.encode("\n"), start, *t.encode("model\n")]
        assert ids == [bos, start, *t.encode(turn), end, *answer]

    t = read(tmp_path / "phi", "phi")
    _, opens, user, end, assistant = (t.special[name] for name in NAMES["phi"])
    ids = encode_prompt(t, "hat?", system="Be.", instruction=False)  # tokens swallow the newlines
    assert ids == [opens, *t.encode("Be."), end, user, *t.encode("hat?"), end, assistant]

    t = read(tmp_path / "llama2", "llama2")
    ids = encode_prompt(t, "hat?", instruction=False)
    assert ids == [t.bos_id, *t.encode("[INST] hat? [/INST]")]
    ids = encode_prompt(t, "hat?", system="Be.", instruction=False)
    assert ids == [t.bos_id, *t.encode("[INST] <<SYS>>\nBe.\n<</SYS>>\n\nhat? [/INST]")]


def test_embedded_frame_is_only_the_question(tmp_path):
    t = read(tmp_path, "embedded")
    ask, answer = t.special["<|question|>"], t.special["<|answer|>"]
    assert encode_prompt(t, "2+2 ") == [ask, *t.encode("2+2 "), answer]
    assert encode_prompt(t, "") == [ask, answer]
    with pytest.raises(ValueError, match="system"):
        encode_prompt(t, "x", system="Be.")


def test_plain_frame_without_a_template(tmp_path):
    t = read(tmp_path / "a", "bytes")
    assert t.decode(encode_prompt(t, "hat?")) == f"Question: hat?\n{INSTRUCTION}\nAnswer:"
    assert t.decode(encode_prompt(t, "", instruction=False)) == "Question: \nAnswer:"
    t = read(tmp_path / "b", "pieces")  # this one adds bos
    ids = encode_prompt(t, "hat?", instruction=False)
    assert ids == [t.bos_id, *t.encode("Question: hat?\nAnswer:")]
    with pytest.raises(ValueError, match="system"):
        encode_prompt(t, "x", system="Be.")


@pytest.mark.parametrize("frame", TEMPLATES)
def test_a_question_cannot_place_special_tokens(tmp_path, frame):
    t = read(tmp_path, frame)
    special = set(t.special.values())
    plain = encode_prompt(t, "x", instruction=False)
    hostile = encode_prompt(t, "".join(t.special), instruction=False)
    assert [i for i in plain if i in special] == [i for i in hostile if i in special]


def test_unknown_templates_are_refused(tmp_path):
    folder = make(tmp_path, "chatml")
    unknown = ["{{ messages }}", "<|start_header_id|>user<|end_header_id|>", "[INST] x [/INST]", "",
               "<|im_start|>user<|im_sep|>", "{{ '<|im_start|>assistant\\n<think>\\n' }}",
               "<|user|> {{ eos_token }}"]
    lacking = ["<start_of_turn>", "{{ bos_token }}<|im_start|>assistant\n'"]  # tokens it lacks
    for template in unknown + lacking:
        (folder / "chat_template.jinja").write_text(template)
        says = "chat template uses" if template in lacking else "template is not of a known kind"
        with pytest.raises(ValueError, match=says) as error:
            encode_prompt(Tokenizer.from_pretrained(folder), "x")
        assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_where_the_template_is_read_from(tmp_path):
    folder = make(tmp_path, "chatml")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    named = {"tool_use": "x", "default": CHATML}
    settings["chat_template"] = [{"name": key, "template": named[key]} for key in named]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    t = Tokenizer.from_pretrained(folder)
    assert t.chat_template == CHATML
    assert t.stop_ids == {t.special["<|endoftext|>"], t.special["<|im_end|>"]}
    (folder / "chat_template.jinja").write_text(TEMPLATES["chatml-default"])  # the file goes first
    assert Tokenizer.from_pretrained(folder).chat_template == TEMPLATES["chatml-default"]
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": 7}))
    with pytest.raises(ValueError, match="chat_template"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("frame, names", [
    ("chatml", ["<|endoftext|>", "<|im_end|>"]), ("gemma", ["<end_of_turn>"]),
    ("phi", ["<|end|>"]), ("embedded", ["<|endoftext|>"])])
def test_stop_ids_of_the_frames(tmp_path, frame, names):
    t = read(tmp_path, frame)
    assert t.stop_ids == {t.special[name] for name in names}


def check_against_transformers(folder: Path, questions: list[str]) -> None:
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_pretrained(folder)
    embedded = "<|question|>" in ours.chat_template
    for system in [None] if embedded else SYSTEMS:
        before = [] if system is None else [{"role": "system", "content": system}]
        for question in questions:
            for instruction in (True, False):
                content = f"{question}\n{INSTRUCTION}" if instruction and not embedded else question
                expected = theirs.apply_chat_template(
                    [*before, {"role": "user", "content": content}],
                    tokenize=True, add_generation_prompt=True, return_dict=False)
                ids = encode_prompt(ours, question, system=system, instruction=instruction)
                assert ids == expected, (question, system, theirs.decode(ids))


@pytest.mark.parametrize("frame", TEMPLATES)
def test_small_frames_equal_transformers(tmp_path, frame, rng):
    questions = QUESTIONS + [random_text(rng) for _ in range(20)]
    check_against_transformers(make(tmp_path, frame), questions)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_frames_equal_transformers(tmp_path, name, rng):
    folder = published(name, tmp_path / "phi")
    if name in ("phi3.5", "llama2"):  # published without a template: it gets the one above
        folder = Path(shutil.copytree(folder, tmp_path / name))
        os.chmod(folder, 0o755)
        template = TEMPLATES["phi" if name == "phi3.5" else "llama2"]
        (folder / "chat_template.jinja").write_text(template)
    questions = QUESTIONS + [random_text(rng) for _ in range(50)]
    if os.environ.get("SA_SHARED"):
        file = Path(os.environ["SA_SHARED"]) / "data" / "raw" / "gsm8k_test.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines()[:100]
        questions += [json.loads(line)["question"] for line in lines]
    check_against_transformers(folder, questions)
