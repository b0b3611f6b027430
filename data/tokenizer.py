"""Text <-> token ids through tiktoken, from a checkpoint's own tokenizer.json (nothing is ever downloaded).

tiktoken repeats one step: among neighbouring pieces whose joined bytes are known, join the pair of the lowest rank, the
leftmost first. `tokenizers` does the same with the list `merges`, so a rank per merge result is all that has to be made:

    byte-level BPE (Qwen, SmolLM2)      single bytes, then the merge results in order
    SentencePiece-style BPE (Llama 2, Phi-3.5, Gemma 3)
                                        single bytes, then the byte prefixes of every multi-byte character (so that
                                        characters are complete before anything is merged), then the merge results

Ranks are mapped back to ids after encoding; a character that is no piece maps back to its bytes.
"""
import json
import re
import shutil
import unicodedata
from pathlib import Path

import tiktoken

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
         "chat_template.jinja", "vocab.json", "merges.txt")
MAX_ID = 2_000_000            # an id above this is a broken file, not a vocabulary
# What the ByteLevel pre-tokenizer splits by when its use_regex is on (GPT-2's pattern), and the same with every numeric
# character on its own first: white space before a digit then ends a run, so it stays whole.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


def read_json(path: Path) -> dict:
    """The JSON object in `path`; {} where there is no such file. Raises ValueError when it is something else."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): copy the file again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where a JSON object belongs: copy the file again")
    return content


def byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: itself where it is printable, else U+0100, U+0101, ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Tokenizer:
    """One checkpoint's tokenizer. Build it with Tokenizer.from_pretrained(folder).

    special: every special token and its id. Ordinary text never becomes one; prompts.py places them by id.
    stop_ids: the ids that end an answer.  bos_id: the beginning-of-text token, None where there is none.
    adds_bos: whether the tokenizer puts bos_id in front of plain text.  vocab_size: all ids are below it.
    chat_template: the checkpoint's Jinja template as text, None where there is none (prompts.py recognises it).
    """

    @classmethod
    def from_pretrained(cls, folder) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json and config.json.

        Raises FileNotFoundError when there is no tokenizer.json, ValueError when a file is broken or of another kind.
        """
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json: a model folder needs one (a SentencePiece "
                                    f"tokenizer.model alone is not read)")
        return cls(folder, *(read_json(folder / name) for name in (
            "tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")))

    def __init__(self, folder: Path, spec: dict, settings: dict, generation: dict, config: dict):
        self.folder = folder
        self._read_vocabulary(spec)
        self._read_special(spec, settings)
        jinja = folder / "chat_template.jinja"
        self.chat_template = jinja.read_text(encoding="utf-8") if jinja.exists() else settings.get("chat_template")
        if isinstance(self.chat_template, list):                   # several named templates: the one called default
            self.chat_template = {t.get("name"): t.get("template") for t in self.chat_template}.get("default")
        self.stop_ids = self._read_stop_ids(settings, generation, config)

    # reading -------------------------------------------------------------------------------------------------------

    def _unsupported(self, what: str) -> ValueError:
        return ValueError(f"{self.folder / 'tokenizer.json'}: {what} is not supported "
                          f"(byte-level BPE as in Qwen and SmolLM2 is)")

    def _read_vocabulary(self, spec: dict) -> None:
        model = spec.get("model")
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            raise self._unsupported(f"a {model.get('type') if isinstance(model, dict) else 'missing'} model")
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
            if model.get(option):
                raise self._unsupported(f"the model option {option}={model[option]!r}")
        vocab, merges = model.get("vocab"), model.get("merges")
        if not isinstance(vocab, dict) or not isinstance(merges, list):
            raise self._unsupported("a model without a vocab object and a merges list")
        if not all(type(i) is int and 0 <= i < MAX_ID for i in vocab.values()):
            raise self._unsupported(f"a vocabulary id that is not a whole number from 0 to {MAX_ID - 1}")
        pattern = self._read_pattern(spec)

        alphabet = byte_alphabet()
        if any(char not in vocab for char in alphabet):
            raise self._unsupported("a byte-level vocabulary that lacks some of the 256 bytes")
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        if any(len(pair) != 2 or pair[0] not in vocab or pair[1] not in vocab or pair[0] + pair[1] not in vocab
               for pair in pairs):
            raise self._unsupported("a merge whose parts or result are not in the vocabulary")
        ids, ranks = [0] * 256, {}
        for char, byte in alphabet.items():
            ids[byte] = vocab[char]
            ranks[bytes([byte])] = byte
        for left, right in pairs:
            joined = bytes(alphabet[char] for char in left + right)
            if joined not in ranks:
                ranks[joined] = len(ids)
                ids.append(vocab[left + right])
        self._ids = ids                                                                   # rank -> id
        self._core = tiktoken.Encoding("byte-level", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

        self.vocab_size = 1 + max(vocab.values())
        self._bytes = [b""] * self.vocab_size                                             # id -> bytes
        for piece, i in vocab.items():
            known = all(char in alphabet for char in piece)
            self._bytes[i] = bytes(alphabet[char] for char in piece) if known else piece.encode()

    def _read_pattern(self, spec: dict) -> str:
        """The pre-tokenizer as one pattern; also sets whether text is normalised first."""
        normalizer = spec.get("normalizer") or {}
        if normalizer.get("type") not in (None, "NFC"):
            raise self._unsupported(f"the normalizer {json.dumps(normalizer)[:80]}")
        self._nfc = normalizer.get("type") == "NFC"
        steps = spec.get("pre_tokenizer") or {}
        steps = steps.get("pretokenizers") if steps.get("type") == "Sequence" else [steps]
        kinds = [step.get("type") for step in steps]
        if kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space", True):
            regex = steps[-1].get("use_regex", True)
            if kinds == ["ByteLevel"] and regex:
                return GPT2
            if kinds == ["Digits", "ByteLevel"] and regex and steps[0].get("individual_digits"):
                return DIGITS_GPT2
            if (kinds == ["Split", "ByteLevel"] and not regex and steps[0].get("behavior") == "Isolated"
                    and not steps[0].get("invert") and isinstance(steps[0].get("pattern", {}).get("Regex"), str)):
                return steps[0]["pattern"]["Regex"]
        raise self._unsupported(f"the pre_tokenizer {json.dumps(spec.get('pre_tokenizer'))[:120]}")

    def _read_special(self, spec: dict, settings: dict) -> None:
        self.special = {}
        for token in spec.get("added_tokens") or []:
            i = token["id"]
            self._bytes.extend([b""] * (i + 1 - len(self._bytes)))
            self._bytes[i] = token["content"].encode()
            if token.get("special"):
                self.special[token["content"]] = i
        self.vocab_size = len(self._bytes)
        self._special_ids = set(self.special.values())

        def named(key: str) -> int | None:
            token = settings.get(key)
            return self.special.get(token.get("content") if isinstance(token, dict) else token)
        self.bos_id, self.eos_id = named("bos_token"), named("eos_token")
        post = spec.get("post_processor") or {}
        single = post.get("single") if post.get("type") == "TemplateProcessing" else None
        adds = bool(single) and "SpecialToken" in single[0]
        self.adds_bos = self.bos_id is not None and bool(settings.get("add_bos_token", adds))

    def _read_stop_ids(self, settings: dict, generation: dict, config: dict) -> set[int]:
        stops = set() if self.eos_id is None else {self.eos_id}
        for name, source in (("generation_config.json", generation), ("config.json", config),
                             ("config.json", config.get("text_config") or {})):
            listed = source.get("eos_token_id")
            listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
            if not all(type(i) is int and 0 <= i < MAX_ID for i in listed):
                raise ValueError(f"{self.folder / name}: eos_token_id is {source['eos_token_id']!r}, "
                                 f"where a token id or a list of them belongs")
            stops |= set(listed)
        # a base checkpoint often names only <|endoftext|>, but its prompt frame ends each turn with one of these
        for end in ("<|im_end|>", "<end_of_turn>", "<|end|>"):
            if end in (self.chat_template or "") and end in self.special:
                stops.add(self.special[end])
        return stops

    # using ---------------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: nothing is put in front or behind, and a spelled-out special token is just text."""
        if self._nfc and not text.isascii():
            text = unicodedata.normalize("NFC", text)
        ids = self._ids
        return [ids[rank] for rank in self._core.encode_ordinary(text)]

    def decode(self, ids: list[int]) -> str:
        """Text of ids without the special tokens. Bytes that are no UTF-8 (a cut character) become U+FFFD.

        Ids at or above vocab_size (a model may have more rows than its tokenizer has tokens) stand for no text.
        """
        pieces, special = self._bytes, self._special_ids
        return b"".join(pieces[i] for i in ids if i < self.vocab_size and i not in special).decode(errors="replace")

    def copy_to(self, folder) -> None:
        """Write the tokenizer's files, unchanged, into a checkpoint folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (self.folder / name).is_file() and self.folder.resolve() != Path(folder).resolve():
                shutil.copyfile(self.folder / name, Path(folder) / name)
