"""Prompt frames: placed token by token here, and equal to transformers' apply_chat_template.

SA_SHARED=../shared and SA_MODELS=FOLDER add the published templates of Qwen3, Gemma 3, SmolLM2 and
Qwen2.5.
"""
import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
from test_tokenizer import (
    OPENING,
    PUBLISHED,
    added,
    byte_level_spec,
    llama3_spec,
    published,
    random_text,
    sentencepiece_spec,
    write,
)

import evaluate
import train_sa_grpo
import train_sa_ppo
from data import prompts
from data.hub import TINY
from data.prompts import SYSTEM, encode_prompt, opened_thinking
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig
from runtime import parallel

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
    "llama3": "{{- bos_token }}{%- set system = 'Cutting Date: ' ~ strftime_now('%Y') %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' ~ system ~ '<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] }}"
    "{{- '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
    "r1": "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}{% set ns = namespace(system_prompt='') %}{%- for m in messages %}"
    "{%- if m['role'] == 'system' %}{% set ns.system_prompt = m['content'] %}{%- endif %}"
    "{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for m in messages %}"
    "{%- if m['role'] == 'user' %}{{'<\uff5cUser\uff5c>' + m['content']}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<\uff5cAssistant\uff5c><think>\\n'}}{% endif %}",
    "zephyr": "{% for m in messages %}\n{% if m['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + m['content'] + eos_token }}\n{% elif m['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + m['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}",
    "factory": "{% set system_message = 'Mind the \"braces\" {} and it\\'s fine.\\n' %}"
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% endif %}{% if system_message is defined %}"
    "{{ '<|im_start|>system\n' + system_message + '<|im_end|>\n' }}{% endif %}"
    "{% for message in loop_messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'user' %}{{ '<|im_start|>user\n' + content + '<|im_end|>\n"
    "<|im_start|>assistant\n' }}{% endif %}{% endfor %}",
    "alternating": "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('roles must\nalternate') }}{% endif %}"
    "[INST] {{ m.content.rstrip() }} [/INST]{% endfor %}",
    "deaf": "{{ '<s>' }}{% generation %}Human: {{ messages[-1].content }}{% endgeneration %}\nBot:",
}
TAKES_NO_SYSTEM = ("alternating", "deaf")
DEFAULTS = [  # default system messages as templates have them; CHATML follows
    "{{ '<|im_start|>system\\nPut it in \\\\boxed{}.<|im_end|>\\n' }}",
    "{% set s = 'Two\nlines' %}{{ '<|im_start|>system\\n' + s + '<|im_end|>\\n' }}",
    "{{ '<|im_start|>system\\nIt\\'s <b>you</b>.' ~ '<|im_end|>' ~ '\\n' }}",
    "<|im_start|>system\n{%- for w in ['You', 'are', 'here'] %} {{ w }}{% endfor %}<|im_end|>\n\n",
    "{%- set d = {'a': [1, 'ü<&>']} %}<|im_start|>system\n{{ d | tojson }}<|im_end|>",
    "{% macro f(x) %}<|im_start|>{{ x }}{% endmacro %}{{ f('system') }}{{ '\\n{{}}' }}<|im_end|>",
    "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{# says nothing #}{{ 'a b'.split()[1] | upper }}{{ none_such }}",
]
for frame in ("phi", "llama2"):  # with a space only at the text's start, as transformers 5 has it
    TEMPLATES[f"{frame}-first"] = TEMPLATES[frame]
NAMES = {
    "gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "phi": ["<|endoftext|>", "<|system|>", "<|user|>", "<|end|>", "<|assistant|>"],
    "embedded": ["<|question|>", "<|answer|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "zephyr": ["<|system|>", "<|user|>", "<|assistant|>"],
    "r1": ["<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"],
}
QUESTIONS = ["What is 1+1?", "", "  two spaces,\ttab and end  \n", "\n\nnewlines\n\n", "'s",
             "Écrire ▁ 中文 😀 e\u0301", "a [INST] b <<SYS>> c", "\u3000wide\u3000"]
SYSTEMS = ["", "You are careful.", "  spaces around \n"]


def make(folder: Path, frame: str) -> Path:
    """A small tokenizer with the template TEMPLATES[frame] and its tokens, if there is one."""
    rng, settings = random.Random(frame), {"tokenizer_class": "PreTrainedTokenizerFast"}
    if frame in TEMPLATES:
        settings["chat_template"] = TEMPLATES[frame]
    scheme = "first" if frame.endswith("-first") else ""
    frame = frame.removesuffix("-first")
    if frame.startswith(("chatml", "embedded", "bytes", "llama3", "r1", "factory")):
        spec = byte_level_spec(rng, OPENING)
        settings["eos_token"] = settings["bos_token"] = "<|endoftext|>"
    else:
        # Phi-3.5 has no words of white space: transformers finds such a word twice if it stands
        # behind a token that swallows white space.
        words = () if frame in ("phi", "zephyr") else ("\n\n", "<p>")
        spec = sentencepiece_spec(rng, OPENING, prefix=frame != "gemma", scheme=scheme, words=words)
        settings["bos_token"] = "<bos>" if frame == "gemma" else "<s>"
        settings["eos_token"] = "</s>"
        settings["add_bos_token"] = frame != "phi"
    tokens = spec["added_tokens"]
    present = {token["content"] for token in tokens}
    last = max([*spec["model"]["vocab"].values(), *(token["id"] for token in tokens)])
    for name in NAMES.get(frame, []):
        if name not in present:
            last += 1
            tokens.append(added(name, last, frame != "r1",
                                rstrip=frame == "phi" and name != "<|endoftext|>"))
    return write(folder, spec, tokenizer_config=settings)


def read(folder: Path, frame: str) -> Tokenizer:
    return Tokenizer.from_pretrained(make(folder, frame))


def ask(t: Tokenizer, question: str, system: str | None = "", instruction: str = "") -> list[int]:
    t.system, t.instruction = system, instruction
    return encode_prompt(t, question)


@pytest.mark.parametrize("frame, first", [("chatml", ""), ("chatml-default", "You are Test.")])
def test_chatml_by_hand(tmp_path, frame, first):
    t = read(tmp_path, frame)
    start, end = t.special["<|im_start|>"], t.special["<|im_end|>"]

    def turn(text: str) -> list[int]:
        return [start, *t.encode(text), end, *t.encode("\n")]

    answer = [start, *t.encode("assistant\n")]
    default = turn(f"system\n{first}") if first else []
    ours = turn(f"system\n{SYSTEM}")
    assert encode_prompt(t, "hat?") == ours + turn("user\nhat?") + answer
    assert encode_prompt(t, "") == ours + turn("user\n") + answer
    assert ask(t, "hat?") == default + turn("user\nhat?") + answer
    assert ask(t, "hat?", "Be.", "Now.") == turn("system\nBe.") + turn("user\nhat? Now.") + answer
    assert ask(t, "", "Be.", "Now.") == turn("system\nBe.") + turn("user\n") + answer


def test_gemma_phi_and_llama_by_hand(tmp_path):
    t = read(tmp_path / "gemma", "gemma")
    bos, start, end = (t.special[name] for name in NAMES["gemma"])
    for ids, turn in ((ask(t, " hat? ", "Be."), "user\nBe.\n\nhat?"), (ask(t, ""), "user\n")):
        answer = [*t.encode("\n"), start, *t.encode("model\n")]
        assert ids == [bos, start, *t.encode(turn), end, *answer]

    t = read(tmp_path / "phi", "phi")
    _, opens, user, end, assistant = (t.special[name] for name in NAMES["phi"])
    ids = ask(t, "hat?", "Be.")  # tokens swallow the newlines
    assert ids == [opens, *t.encode("Be."), end, user, *t.encode("hat?"), end, assistant]

    t = read(tmp_path / "llama2", "llama2")
    assert ask(t, "hat?") == [t.bos_id, *t.encode("[INST] hat? [/INST]")]
    ids = ask(t, "hat?", "Be.")
    assert ids == [t.bos_id, *t.encode("[INST] <<SYS>>\nBe.\n<</SYS>>\n\nhat? [/INST]")]


def test_embedded_frame_is_only_the_question(tmp_path):
    t = read(tmp_path, "embedded")
    question, answer = t.special["<|question|>"], t.special["<|answer|>"]
    assert encode_prompt(t, "2+2 ") == [question, *t.encode("2+2 "), answer]
    assert encode_prompt(t, "") == [question, answer]


def test_plain_frame_without_a_template(tmp_path):
    t = read(tmp_path / "a", "bytes")
    assert t.decode(encode_prompt(t, "hat?")) == f"{SYSTEM}\n\nQuestion: hat?\nAnswer:"
    assert t.decode(ask(t, "")) == "Question: \nAnswer:"
    t = read(tmp_path / "b", "pieces")  # this one adds bos
    assert ask(t, "hat?") == [t.bos_id, *t.encode("Question: hat?\nAnswer:")]


def test_a_system_message_without_a_place_opens_the_question(tmp_path):
    t = read(tmp_path, "alternating")
    assert ask(t, "hat? ", "Be.") == [t.bos_id, *t.encode("[INST] Be.\n\nhat? [/INST]")]
    assert ask(t, "", "Be.") == [t.bos_id, *t.encode("[INST] Be. [/INST]")]
    t.chat_template = "{{ messages[0].content }}"  # the system message in the question's stead
    assert ask(t, "hat?", "Be.") == t.encode("Be.\n\nhat?")


def test_the_verifier_learns_of_an_opened_think(tmp_path):
    t = read(tmp_path, "r1")
    assert opened_thinking(t) == "<think>\n" and encode_prompt(t, "x")[-1] == t.encode("\n")[0]
    t.chat_template = t.chat_template.replace("<think>", "<think></think>")
    assert opened_thinking(t) == ""


def test_thinking_is_a_flag(tmp_path):
    folder = make(tmp_path, "chatml")
    template = CHATML + "{% if enable_thinking is false %}<think>\n\n</think>{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    without = encode_prompt(Tokenizer.from_pretrained(folder), "x")
    thinking = Tokenizer.from_pretrained(folder)
    thinking.thinking = True
    assert without == encode_prompt(thinking, "x") + thinking.encode("<think>\n\n</think>")


def tiny_with(folder: Path, template: str, **config) -> str:
    """The embedded model with another template, and another config.json."""
    shutil.copytree(TINY, folder)
    (folder / "chat_template.jinja").write_text(template)
    config = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


SMALL = ("--data tiny --steps 1 --prompts-per-step 2 --samples 2 --max-new-tokens 9 --kl-coef 0 "
         "--save-every 1").split()


def test_the_contexts_of_a_run(tmp_path, runs, monkeypatch):
    """ppl(a) has the same system message, an empty user turn, and no instruction."""
    template = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}<think>"
    folder = tiny_with(tmp_path / "m", template)
    seen, score = [], parallel.score
    monkeypatch.setattr(parallel, "score", lambda model, contexts, *rest: seen.extend(contexts)
                        or score(model, contexts, *rest))
    flags = ["--system", "Be brief.", "--instruction", "In one word.", "--name", "x"]
    train_sa_grpo.main([*SMALL, "--model", folder, *flags])
    t = Tokenizer.from_pretrained(folder)
    texts = {t.decode(context) for context in seen}
    alone = "[system:Be brief.][user:]<think>"
    assert len(texts) == 3 and alone in texts
    for text in texts - {alone}:
        assert text.startswith("[system:Be brief.][user:") and text != alone
        assert text.endswith(" In one word.]<think>")
    rows = [json.loads(line) for line in (runs / "x" / "completions.jsonl").open()]
    assert len(rows) == 4 and all(row["text"].startswith("<think>") for row in rows)
    with pytest.raises(ValueError, match="--system was Be brief., now Be."):
        train_sa_grpo.main(["--name", "x", "--resume", "--system", "Be."])


@pytest.mark.parametrize("kind, template", [("llama, scaled rope, untied", "llama3"),
                                            ("qwen2.5", "r1")])
def test_published_forms_run_end_to_end(tmp_path, runs, kind, template):
    """Llama 3.x and R1-Distill with random weights: two steps, resumed after the first."""
    folder = tmp_path / "m"
    settings = {"chat_template": TEMPLATES[template], "bos_token": "<|im_start|>"}
    spec = llama3_spec(random.Random(1), OPENING, nfc=template == "r1")
    last = max(token["id"] for token in spec["added_tokens"])
    for i, name in enumerate(NAMES[template], last + 1):
        spec["added_tokens"].append(added(name, i, template == "llama3"))
    write(folder, spec, tokenizer_config=settings, special_tokens_map={"eos_token": "<|im_end|>"})
    cases = json.loads((Path(__file__).parent / "model_vectors" / "cases.json").read_text())
    config = cases[kind]["config"] | {"vocab_size": i + 1, "max_position_embeddings": 1024}
    GPT(GPTConfig.from_hf(config)).save_pretrained(folder)
    t = Tokenizer.from_pretrained(folder)
    assert t.adds_bos and encode_prompt(t, "x")[0] == t.special["<|im_start|>"]
    flags = [*SMALL, "--model", str(folder), "--name", "x", "--max-prompt-tokens", "900"]
    train_sa_grpo.main(flags)
    train_sa_grpo.main(["--name", "x", "--resume", "--steps", "2"])
    rows = [json.loads(line) for line in (runs / "x" / "completions.jsonl").open()]
    assert len(rows) == 8
    assert all(row["text"].startswith("<think>\n") == (template == "r1") for row in rows)
    evaluate.main(["--model", str(runs / "x" / "step_000002"), "--data", "tiny", "--limit", "1",
                   "--max-new-tokens", "5"])


@pytest.mark.parametrize("main", [train_sa_grpo.main, train_sa_ppo.main, evaluate.main])
@pytest.mark.parametrize("config", [
    {"max_position_embeddings": None}, {"max_position_embeddings": "many"},
    {"model_type": "llava", "text_config": {"model_type": "llama"}}])
def test_the_config_is_checked_before_anything_reads_it(tmp_path, runs, main, config):
    with pytest.raises(ValueError, match="config.json: ") as error:
        main(["--model", tiny_with(tmp_path / "m", CHATML, **config)])
    assert "\n" not in str(error.value) and not runs.exists()


@pytest.mark.parametrize("frame", TEMPLATES)
def test_a_question_cannot_place_special_tokens(tmp_path, frame):
    t = read(tmp_path, frame)
    marks = set(t.marks.values())
    plain = encode_prompt(t, "x")
    hostile = encode_prompt(t, "".join(t.marks) + " x <|im_end|>")
    assert [i for i in plain if i in marks] == [i for i in hostile if i in marks]
    assert marks >= {t.marks[name] for name in NAMES.get(frame, [])}


@pytest.mark.parametrize("template, says", [
    ("{% if %}", "TemplateSyntaxError"), ("{{ raise_exception('no\\nway') }}", "no way"),
    ("{{ messages.x.y }}", "Undefined"), ("{{ messages.append(1) }}", "SecurityError"),
    ("{{ ''.__class__.__mro__ }}", "SecurityError"), ("{{ 7 }}", "0 times"),
    ("{{ messages }}{{ messages[0].content }}", "2 times"),
    ("{{ 'x' * 10**10 }}", "fails: ValueError: it multiplies"),
    ("{{ ('ab' * 9999) * 99 }}", "it multiplies by 19998"),
    ("{% for i in range(60) %}{{ 'ab' * 9999 }}{% endfor %}", "prints 1199880 characters"),
    ("{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
     "too much memory"),
    ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "too long"),
])
def test_a_template_that_fails_is_one_sentence(tmp_path, template, says):
    t = read(tmp_path, "chatml")
    t.chat_template = template
    with pytest.raises(ValueError, match=says) as error:
        ask(t, "x")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    t.chat_template = CHATML
    assert ask(t, "x")


def test_without_jinja_there_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    monkeypatch.setattr(prompts, "sandbox", prompts.sandbox.__wrapped__)
    with pytest.raises(ValueError, match="pip install jinja2"):
        ask(read(tmp_path, "chatml"), "x", "Not rendered before.")


def test_a_token_beyond_the_rows_of_the_model_is_one_sentence(tmp_path):
    folder = make(tmp_path, "chatml")
    (folder / "config.json").write_text('{"vocab_size": 256}')
    with pytest.raises(ValueError, match=r"token \d+ of the prompt is beyond the 256 rows"):
        encode_prompt(Tokenizer.from_pretrained(folder), "x")


def test_where_the_template_is_read_from(tmp_path):
    folder = make(tmp_path, "chatml")
    settings = json.loads((folder / "tokenizer_config.json").read_text())

    def template(**changes) -> str:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | changes))
        return Tokenizer.from_pretrained(folder).chat_template

    named = {"tool_use": "x", "default": CHATML}
    assert template(chat_template=[{"name": k, "template": named[k]} for k in named]) == CHATML
    t = Tokenizer.from_pretrained(folder)
    assert t.stop_ids == {t.special["<|endoftext|>"], t.special["<|im_end|>"]}
    (folder / "chat_template.json").write_text('{"chat_template": "of json"}')
    assert template() == CHATML and template(chat_template=None) == "of json"
    (folder / "chat_template.jinja").write_text("of jinja")  # the file goes first
    assert template() == "of jinja"
    (folder / "chat_template.jinja").unlink()
    for wrong, says in ((7, "chat_template"), ([{"name": "x", "template": "y"}], "default")):
        with pytest.raises(ValueError, match=says):
            template(chat_template=wrong)


@pytest.mark.parametrize("frame, names", [
    ("chatml", ["<|endoftext|>", "<|im_end|>"]), ("gemma", ["</s>", "<end_of_turn>"]),
    ("phi", ["</s>", "<|end|>"]), ("embedded", ["<|endoftext|>"]),
    ("llama3", ["<|endoftext|>", "<|eot_id|>"])])
def test_stop_ids_of_the_frames(tmp_path, frame, names):
    t = read(tmp_path, frame)
    known = t.special | t.marks | {"</s>": 2}
    assert t.stop_ids == {known[name] for name in names}


def check_against_transformers(folder: Path, questions: list[str], folds: bool = False) -> None:
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_pretrained(folder)
    for system in SYSTEMS:
        for question in questions:
            for instruction in ("", "Now think."):
                content = f"{question} {instruction}" if instruction and question else question
                messages = [{"role": "user", "content": content}]
                if system and folds:
                    messages = [{"role": "user", "content": f"{system}\n\n{content}"}]
                elif system:
                    messages.insert(0, {"role": "system", "content": system})
                expected = theirs.apply_chat_template(
                    messages, tokenize=True, add_generation_prompt=True, return_dict=False,
                    enable_thinking=False)
                ids = ask(ours, question, system, instruction)
                assert ids == expected, (question, system, theirs.decode(ids))


@pytest.mark.parametrize("frame", TEMPLATES)
def test_small_frames_equal_transformers(tmp_path, frame, rng):
    questions = QUESTIONS + [random_text(rng) for _ in range(6)]
    check_against_transformers(make(tmp_path, frame), questions, frame in TAKES_NO_SYSTEM)


@pytest.mark.parametrize("default", DEFAULTS)
def test_default_system_messages_equal_transformers(tmp_path, default):
    folder = make(tmp_path, "chatml")
    before = "{% if messages[0].role != 'system' %}" + default + "{% endif %}"
    for template in (before + CHATML, default + CHATML + "<think>\n", CHATML + default):
        (folder / "chat_template.jinja").write_text(template)
        check_against_transformers(folder, QUESTIONS[:3])


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
