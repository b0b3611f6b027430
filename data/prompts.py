"""Prompt formats: one user message in the model's own chat frame, up to where its answer begins.

The frame is recognised by the markers in the checkpoint's chat template; the template itself never
runs. Special tokens are placed here by id, so a question that spells one stays ordinary text.
"""
import re

from data.tokenizer import WHITE_SPACE, Tokenizer

INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."


def encode_prompt(tokenizer: Tokenizer, question: str, *, system: str | None = None,
                  instruction: bool = True) -> list[int]:
    """Ids of the frame around `question`, ending where the answer begins; the same ids as from
    transformers' apply_chat_template with add_generation_prompt.

    system: the system message; None takes the frame's own (Qwen2.5 and SmolLM2 have one).
    instruction: append the line INSTRUCTION to the user's message.
    The embedded model's frame ignores the instruction. Raises ValueError for an unknown template,
    and for a system message where the frame has no place for one.
    """
    template, special, folder = tokenizer.chat_template, tokenizer.special, tokenizer.folder
    message = f"{question}\n{INSTRUCTION}" if instruction else question
    if template is None:
        if system is not None:
            raise ValueError(f"{folder} has no chat template, so it takes no system message")
        bos = [tokenizer.bos_id] if tokenizer.adds_bos else []
        return join(tokenizer, [*bos, f"Question: {message}\nAnswer:"])

    def token(name: str) -> int:
        if name not in special:
            raise ValueError(f"{folder}: the chat template uses {name}, which is not a special "
                             f"token of the tokenizer")
        return special[name]

    if "<|question|>" in template and "<|answer|>" in template:  # the embedded model
        if system is not None:
            raise ValueError(f"{folder}: this model's prompt frame takes no system message")
        return join(tokenizer, [token("<|question|>"), question, token("<|answer|>")])

    if tokenizer.bos_id is None and "bos_token" in template:
        raise ValueError(f"{folder}: the chat template uses a bos_token, and tokenizer_config.json "
                         f"names none")
    frame = [tokenizer.bos_id] if "bos_token" in template else []
    if re.search(r"<\|im_start\|>assistant(\\n|\n)['\"]", template):  # ChatML: Qwen, SmolLM2
        start, end = token("<|im_start|>"), token("<|im_end|>")
        own = re.search(r"<\|im_start\|>system(?:\\n|\n)([^'\"{}<]+)<\|im_end\|>", template)
        if system is None and own:
            system = own[1]
        if system is not None:
            frame += [start, f"system\n{system}", end, "\n"]
        frame += [start, f"user\n{message}", end, "\n", start, "assistant\n"]
    elif "<start_of_turn>" in template:  # Gemma
        start, end = token("<start_of_turn>"), token("<end_of_turn>")
        if system is not None and "first_user_prefix" not in template:
            raise ValueError(f"{folder}: this model's prompt frame takes no system message")
        before = "" if system is None else f"{system}\n\n"
        frame += [start, f"user\n{before}{message.strip()}", end, "\n", start, "model\n"]
    elif "<|user|>" in template and "<|end|>" in template:  # Phi-3.5
        end = token("<|end|>")
        if system:  # an empty one gets no turn
            frame += [token("<|system|>"), f"\n{system}", end, "\n"]
        frame += [token("<|user|>"), f"\n{message}", end, "\n", token("<|assistant|>"), "\n"]
    elif "[INST]" in template and "<<SYS>>" in template:  # Llama 2: plain text after bos
        before = "" if system is None else f"<<SYS>>\n{system}\n<</SYS>>\n\n"
        frame += [f"[INST] {(before + message).strip()} [/INST]"]
    else:
        raise ValueError(f"{folder}: its chat template is not of a known kind (ChatML, Gemma, "
                         f"Phi-3, Llama 2)")
    return join(tokenizer, frame)


def join(tokenizer: Tokenizer, frame: list[int | str]) -> list[int]:
    """Ids of a frame. An int is a special token's id; a text between two of them is ordinary."""
    ids = []
    for before, part, after in zip([None, *frame], frame, [*frame[1:], None]):
        if isinstance(part, int):
            ids.append(part)
            continue
        if before in tokenizer.strips_after:
            part = part.lstrip(WHITE_SPACE)
        if after in tokenizer.strips_before:
            part = part.rstrip(WHITE_SPACE)
        ids += tokenizer.encode(part, at_start=before is None)
    return ids
