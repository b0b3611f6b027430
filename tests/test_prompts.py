"""Prompt frames: placed token by token here, and equal to transformers' apply_chat_template where it is installed.

SA_SHARED=../shared and SA_MODELS=FOLDER add the published templates of Qwen3, Gemma 3, SmolLM2 and Qwen2.5.
"""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from test_tokenizer import (
    OPENING,
    added,
    byte_level_spec,
    phi_folder,
    random_text,
    sentencepiece_spec,
    write,
)

from data.prompts import INSTRUCTION, encode_prompt
from data.tokenizer import Tokenizer

SHARED = Path(os.environ["SA_SHARED"]) if os.environ.get("SA_SHARED") else None
MODELS = Path(os.environ["SA_MODELS"]) if os.environ.get("SA_MODELS") else None

# The frames as templates of our own wording; the first two write their newlines as escapes, the others as they are.
TEMPLATES = {
    "chatml": r"{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "chatml-default": r"{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are Test.<|im_end|>\n' }}{% endif %}"
    r"{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "gemma": "{{ bos_token }}{% set first_user_prefix = '' %}{% set turns = messages %}"
    "{% if messages[0].role == 'system' %}"
    "{% set first_user_prefix = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}{% endif %}"
    "{% for m in turns %}{{ '<start_of_turn>' + m.role + '\n' + first_user_prefix + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "phi": "{% for m in messages %}{% if m.role == 'system' and m.content %}"
    "{{ '<|system|>\n' + m.content + '<|end|>\n' }}{% elif m.role == 'user' %}"
    "{{ '<|user|>\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "llama2": "{% set before = '' %}{% set turns = messages %}{% if messages[0].role == 'system' %}"
    "{% set before = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% endif %}"
    "{% for m in turns %}{{ bos_token + '[INST] ' + (before + m.content).strip() + ' [/INST]' }}{% endfor %}",
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
QUESTIONS = [
    "What is 1+1?",
    "",
    "  two spaces,\ttab and end  \n",
    "\n\nnewlines\n\n",
    "Écrire ▁ 中文 😀 e\u0301",
    "'s",
    "a [INST] b <<SYS>> c",
    "\u3000wide\u3000",
]
SYSTEMS = [None, "You are careful.", "  spaces around \n"]


def make(folder: Path, frame: str) -> Path:
    """A small tokenizer with the template TEMPLATES[frame] and its tokens; any other name has no template."""
    rng, settings = random.Random(frame), {"tokenizer_class": "PreTrainedTokenizerFast"}
    frame, first = frame.removesuffix("-first"), frame.endswith("-first")
    if frame in TEMPLATES:
        settings["chat_template"] = TEMPLATES[frame]
    if frame.startswith(("chatml", "embedded", "bytes")):
        spec = byte_level_spec(rng, [OPENING])
        settings["eos_token"] = "<|endoftext|>"
    else:
        # Phi-3.5 has no words of white space; behind a token that swallows white space the library finds them twice
        words = () if frame == "phi" else ("\n\n", "<p>")
        spec = sentencepiece_spec(rng, [OPENING], prefix=frame != "gemma", words=words)
        settings |= {
            "bos_token": "<bos>" if frame == "gemma" else "<s>",
            "add_bos_token": frame != "phi",
        }
        if first:
            spec |= {
                "normalizer": None,
                "pre_tokenizer": {
                    "type": "Metaspace",
                    "replacement": "▁",
                    "split": False,
                    "prepend_scheme": "first",
                },
            }
    for name in NAMES.get(frame, []):
        if name not in [token["content"] for token in spec["added_tokens"]]:
            last = max(
                [*spec["model"]["vocab"].values(), *(token["id"] for token in spec["added_tokens"])]
            )
            spec["added_tokens"].append(
                added(name, last + 1, rstrip=frame == "phi" and name != "<|endoftext|>")
            )
    return write(folder, spec, tokenizer_config=settings)


def read(folder: Path, frame: str) -> Tokenizer:
    return Tokenizer.from_pretrained(make(folder, frame))


# ------------------------------------------------------------------------------------------------- by hand


def test_chatml_by_hand(tmp_path):
    for frame, first in (("chatml", None), ("chatml-default", "You are Test.")):
        t = read(tmp_path / frame, frame)
        start, end = t.special["<|im_start|>"], t.special["<|im_end|>"]

        def turn(text: str) -> list[int]:
            return [start, *t.encode(text), end, *t.encode("\n")]

        answer = [start, *t.encode("assistant\n")]
        default = turn(f"system\n{first}") if first else []
        assert encode_prompt(t, "hat?") == default + turn(f"user\nhat?\n{INSTRUCTION}") + answer
        assert encode_prompt(t, "hat?", instruction=False) == default + turn("user\nhat?") + answer
        assert encode_prompt(t, "", instruction=False) == default + turn("user\n") + answer
        assert encode_prompt(t, "") == default + turn(f"user\n\n{INSTRUCTION}") + answer
        asked = turn(f"user\nhat?\n{INSTRUCTION}")
        assert encode_prompt(t, "hat?", system="Be.") == turn("system\nBe.") + asked + answer
        assert encode_prompt(t, "hat?", system="") == turn("system\n") + asked + answer


def test_gemma_phi_and_llama_by_hand(tmp_path):
    t = read(tmp_path / "gemma", "gemma")
    bos, start, end = (t.special[name] for name in NAMES["gemma"])
    assert encode_prompt(t, " hat? ", system="Be.", instruction=False) == [
        bos,
        start,
        *t.encode("user\nBe.\n\nhat?"),
        end,
        *t.encode("\n"),
        start,
        *t.encode("model\n"),
    ]
    assert encode_prompt(t, "") == [
        bos,
        start,
        *t.encode(f"user\n{INSTRUCTION}"),
        end,
        *t.encode("\n"),
        start,
        *t.encode("model\n"),
    ]

    t = read(tmp_path / "phi", "phi")
    _, opens, user, end, assistant = (
        t.special[name] for name in NAMES["phi"]
    )  # these swallow the newline behind
    assert encode_prompt(t, "hat?", system="Be.", instruction=False) == [
        opens,
        *t.encode("Be."),
        end,
        user,
        *t.encode("hat?"),
        end,
        assistant,
    ]

    t = read(tmp_path / "llama2", "llama2")
    assert encode_prompt(t, "hat?", instruction=False) == [
        t.bos_id,
        *t.encode("[INST] hat? [/INST]"),
    ]
    assert encode_prompt(t, "hat?", system="Be.", instruction=False) == [
        t.bos_id,
        *t.encode("[INST] <<SYS>>\nBe.\n<</SYS>>\n\nhat? [/INST]"),
    ]


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
    assert encode_prompt(t, "hat?", instruction=False) == [
        t.bos_id,
        *t.encode("Question: hat?\nAnswer:"),
    ]
    with pytest.raises(ValueError, match="system"):
        encode_prompt(t, "x", system="Be.")


def test_bare_prompt_is_one_token(tmp_path):
    for frame, name in (
        ("chatml", "<|endoftext|>"),
        ("embedded", "<|endoftext|>"),
        ("gemma", "<bos>"),
        ("phi", "<s>"),
        ("llama2", "<s>"),
    ):
        t = read(tmp_path / frame, frame)
        assert bare_prompt(t) == [t.special[name]]
    folder = make(tmp_path / "smol", "chatml")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    t = Tokenizer.from_pretrained(folder)
    assert bare_prompt(t) == [t.special["<|endoftext|>"]]
    (folder / "tokenizer_config.json").write_text("{}")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"] = []
    with pytest.raises(ValueError, match="text token"):
        bare_prompt(Tokenizer.from_pretrained(write(folder, spec)))


@pytest.mark.parametrize("frame", TEMPLATES)
def test_a_question_cannot_place_special_tokens(tmp_path, frame):
    t = read(tmp_path, frame)
    plain = encode_prompt(t, "x", instruction=False)
    hostile = encode_prompt(t, "".join(t.special), instruction=False)
    assert sorted(i for i in plain if i in t.special.values()) == sorted(
        i for i in hostile if i in t.special.values()
    )


def test_unknown_templates_are_refused(tmp_path):
    folder = make(tmp_path, "chatml")
    for template in (
        "{{ messages }}",
        "<|start_header_id|>user<|end_header_id|>",
        "<|im_start|>user<|im_sep|>",
        "{{ '<|im_start|>assistant\\n<think>\\n' }}",
        "[INST] x [/INST]",
        "<|user|> {{ eos_token }}",
        "",
    ):
        (folder / "chat_template.jinja").write_text(template)
        with pytest.raises(ValueError, match="template") as error:
            encode_prompt(Tokenizer.from_pretrained(folder), "x")
        assert str(folder) in str(error.value) and "\n" not in str(error.value)
    for template in (
        "<start_of_turn>",
        "{{ bos_token }}<|im_start|>assistant\n'",
    ):  # tokens it does not have
        (folder / "chat_template.jinja").write_text(template)
        with pytest.raises(ValueError, match="start_of_turn|bos_token"):
            encode_prompt(Tokenizer.from_pretrained(folder), "x")


def test_where_the_template_is_read_from(tmp_path):
    folder = make(tmp_path, "chatml")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = [
        {"name": "tool_use", "template": "x"},
        {"name": "default", "template": TEMPLATES["chatml"]},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    t = Tokenizer.from_pretrained(folder)
    assert t.chat_template == TEMPLATES["chatml"]
    assert t.stop_ids == {t.special["<|endoftext|>"], t.special["<|im_end|>"]}
    (folder / "chat_template.jinja").write_text(TEMPLATES["chatml-default"])  # the file goes first
    assert Tokenizer.from_pretrained(folder).chat_template == TEMPLATES["chatml-default"]


def test_stop_ids_of_the_frames(tmp_path):
    for frame, names in (
        ("chatml", ["<|endoftext|>", "<|im_end|>"]),
        ("gemma", ["<end_of_turn>"]),
        ("phi", ["<|end|>"]),
        ("embedded", ["<|endoftext|>"]),
    ):
        t = read(tmp_path / frame, frame)
        assert t.stop_ids == {t.special[name] for name in names}


# ---------------------------------------------------------------------------------------------- against transformers


def check_against_transformers(
    folder: Path, questions: list[str], systems: list[str | None]
) -> None:
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_pretrained(folder)
    for system in systems:
        for question in questions:
            for instruction in (True, False):
                embedded = "<|question|>" in ours.chat_template
                content = f"{question}\n{INSTRUCTION}" if instruction and not embedded else question
                messages = [{"role": "system", "content": system}] if system is not None else []
                expected = theirs.apply_chat_template(
                    [*messages, {"role": "user", "content": content}],
                    tokenize=True,
                    add_generation_prompt=True,
                    return_dict=False,
                )
                ids = encode_prompt(ours, question, system=system, instruction=instruction)
                assert ids == expected, (
                    question,
                    system,
                    theirs.decode(ids),
                    theirs.decode(expected),
                )


@pytest.mark.parametrize("frame", TEMPLATES)
def test_small_frames_equal_transformers(tmp_path, frame, rng):
    questions = QUESTIONS + [random_text(rng) for _ in range(20)]
    check_against_transformers(
        make(tmp_path, frame), questions, [None] if frame == "embedded" else SYSTEMS
    )


@pytest.mark.parametrize(
    "name", ["qwen3", "gemma3", "smollm2-135m", "qwen2.5-coder-0.5b", "phi3.5", "llama2"]
)
def test_published_frames_equal_transformers(tmp_path, name, rng):
    if name in ("smollm2-135m", "qwen2.5-coder-0.5b"):
        folder = MODELS and MODELS / name
    else:
        folder = SHARED and SHARED / "tokenizers" / name.replace("phi3.5", "llama2")
    if not folder or not folder.exists():
        pytest.skip(f"{name}: set SA_SHARED and SA_MODELS")
    if name in ("phi3.5", "llama2"):  # published without a template: the one above
        folder = (
            phi_folder(tmp_path)
            if name == "phi3.5"
            else Path(shutil.copytree(folder, tmp_path / name))
        )
        os.chmod(folder, 0o755)
        (folder / "chat_template.jinja").write_text(
            TEMPLATES["phi" if name == "phi3.5" else "llama2"]
        )
    questions = QUESTIONS + [random_text(rng) for _ in range(200)]
    if SHARED:
        lines = (
            (SHARED / "data" / "raw" / "gsm8k_test.jsonl")
            .read_text(encoding="utf-8")
            .splitlines()[:200]
        )
        questions += [json.loads(line)["question"] for line in lines]
    check_against_transformers(folder, questions, SYSTEMS)
