"""Prompt formats: one user message in the model's own chat frame, up to where its answer begins.

The frame is recognised by the markers in the checkpoint's chat template; the template itself is never run. Special
tokens are placed here by id, so that a question that spells one stays ordinary text.
"""
import re

INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."


def encode_prompt(tokenizer, question: str, *, system: str | None = None, instruction: bool = True) -> list[int]:
    """Ids of the frame around `question`, ending where the answer begins.

    system: None takes the frame's own default (Qwen2.5 and SmolLM2 have one). instruction: append the line INSTRUCTION
    to the user's message. The embedded model's frame takes neither. Raises ValueError for an unknown template or
    a system message where the frame has no place for one.
    """
    template = tokenizer.chat_template
    special = tokenizer.special
    message = f"{question}\n{INSTRUCTION}" if instruction else question

    if template is None:
        if system is not None:
            raise ValueError(f"{tokenizer.folder} has no chat template, so its prompts take no system message")
        bos = [tokenizer.bos_id] if tokenizer.adds_bos else []
        return join(tokenizer, [*bos, f"Question: {message}\nAnswer:"])

    def marker(name: str) -> int:
        if name not in special:
            raise ValueError(f"{tokenizer.folder}: the chat template uses {name}, which is no special token there")
        return special[name]

    if "<|question|>" in template and "<|answer|>" in template:
        if system is not None:
            raise ValueError(f"{tokenizer.folder}: this model's prompt frame takes no system message")
        return join(tokenizer, [marker("<|question|>"), question, marker("<|answer|>")])
    if "<|im_start|>" in template:
        start, end = marker("<|im_start|>"), marker("<|im_end|>")
        if system is None:
            default = re.search(r"<\|im_start\|>system(?:\\n|\n)([^'\"{}<]+)<\|im_end\|>", template)
            system = default and default[1]
        first = [] if system is None else [start, f"system\n{system}", end, "\n"]
        return join(tokenizer, [*first, start, f"user\n{message}", end, "\n", start, "assistant\n"])
    raise ValueError(f"{tokenizer.folder}: the chat template is none of those known here (ChatML, Gemma, Phi-3, Llama 2)")


def bare_prompt(tokenizer) -> list[int]:
    """Only the beginning-of-text token, or the end-of-text token where there is no other."""
    bos = tokenizer.bos_id
    if bos is None or bos == tokenizer.special.get("<|im_start|>"):       # ChatML's bos opens a turn, not a text
        bos = tokenizer.special.get("<|endoftext|>", tokenizer.eos_id)
    if bos is None:
        raise ValueError(f"{tokenizer.folder} names neither a beginning-of-text nor an end-of-text token")
    return [bos]


def join(tokenizer, parts: list) -> list[int]:
    """Ids of a frame: an int is a special token's id, text in between is ordinary."""
    ids = []
    for part in parts:
        ids += [part] if isinstance(part, int) else tokenizer.encode(part)
    return ids
