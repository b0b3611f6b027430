"""Text <-> token ids through tiktoken, from a checkpoint's own tokenizer.json.

tiktoken repeats one step: among all neighbouring pieces whose joined bytes have a rank, it joins
the pair of the lowest rank, the leftmost first. A tokenizer.json lists its joins in the same order
(`merges`), so every join only needs a rank:

    byte-level BPE (Qwen, SmolLM2)
        the 256 bytes, then the result of each merge
    SentencePiece-style BPE with byte fallback (Llama 2, Phi-3.5, Gemma 3)
        the 256 bytes, then the byte prefixes of every character that is a piece (so that characters
        are whole before anything else is joined), then the result of each merge

After encoding, ranks are mapped to ids. A character that is no piece becomes the ids of its bytes.
"""
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import tiktoken

from data.files import read_json

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json",
         "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
BESIDE = ("tokenizer_config.json", "generation_config.json", "config.json",
          "special_tokens_map.json", "chat_template.json")
MAX_ID = 2_000_000  # a larger id means a broken file
TOO_MANY_SPACES = re.compile(r"\s{500000}")  # tiktoken's splitter overflows its stack on a million
MARK = "\u2581"  # SentencePiece's visible space
WHITE_SPACE = ("\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008"
               "\u2009\u200a\u2028\u2029\u202f\u205f\u3000")  # Unicode's; str.strip() has four more
WHITE_SPACES = re.compile(f"[{WHITE_SPACE}]*")
LOOKS_SPECIAL = re.compile(r"<[|\uff5c].*[|\uff5c]>").fullmatch  # DeepSeek has wide bars
# Bytes that a vocabulary may lack, as SmolLM2's does: of control characters, or unused in UTF-8.
RARE_BYTES = {*range(9), *range(14, 32), 0x7F, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}

# The ByteLevel pre-tokenizer's own pattern (GPT-2's), and the same behind a step that splits off
# every digit: white space before a digit stays together.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# The steps of SentencePiece-style files; the comments say where the space goes at the front.
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}  # nowhere
PREPEND = {"type": "Prepend", "prepend": MARK}  # everywhere
METASPACE = {"type": "Metaspace", "replacement": MARK, "split": False}  # as prepend_scheme says
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
         "invert": False}  # after REPLACE no space is left to split at
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def byte_alphabet() -> list[str]:
    """The character that byte-level BPE writes for each of the 256 bytes (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


class Tokenizer:
    """One checkpoint's tokenizer. Build it with Tokenizer.from_pretrained(folder).

    special: every special token and its id. Text never becomes one; prompts.py places them by id.
    marks: special tokens, and added words that look like them (<|User|>): no question places them.
    stop_ids: the ids that end an answer. vocab_size: every id is below it.
    bos_id, eos_id: the beginning- and end-of-text tokens, None where no file names one.
    names: what the files call bos_token, eos_token and so on, for the chat template.
    adds_bos: whether the tokenizer puts bos_id in front of plain text.
    chat_template: the checkpoint's Jinja template as text, or None (prompts.py renders it).
    system, instruction, thinking: of its prompts; a script sets them. system None: the default.
    rows: the tokens that the model of config.json knows.
    """

    system, instruction, thinking = None, "", False

    @classmethod
    def from_pretrained(cls, folder) -> "Tokenizer":
        """Read tokenizer.json and, where they exist, the files beside it. Raises FileNotFoundError
        without a tokenizer.json, ValueError when a file is broken or of an unsupported kind."""
        try:
            return cls(Path(folder))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{folder}: tokenizer.json or a file beside it is oddly laid out "
                             f"({type(error).__name__}: {error}): copy it again") from error

    def __init__(self, folder: Path):
        self.folder = folder
        spec = read_json(folder / "tokenizer.json")
        settings, generation, config, names, template = (
            read_json(folder / name) if (folder / name).exists() else {} for name in BESIDE)
        config = (config.get("text_config") or {}) | config
        self._read_bpe(spec)
        self._read_names(spec, names, settings)
        self._read_template(settings.get("chat_template") or template.get("chat_template"))
        self._read_stop_ids(generation, config)
        self.rows = config.get("vocab_size", MAX_ID)

    def _unsupported(self, what):
        return ValueError(f"{self.folder / 'tokenizer.json'}: {what} is not supported (only BPE as "
                          "in Qwen, SmolLM2 and Llama 3, or in Llama 2, Phi-3.5 and Gemma 3)")

    def _read_bpe(self, spec):
        model, vocab, added = spec["model"], spec["model"].get("vocab"), spec.get("added_tokens")
        options = "dropout", "continuing_subword_prefix", "end_of_word_suffix"
        asked = [model.get("type", "BPE"), *filter(model.get, options)]
        if asked != ["BPE"]:
            raise self._unsupported(f"a model with {', '.join(asked)}")
        self._read_added(added, vocab)
        ids = [*vocab.values(), *self._added.values()]
        if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= MAX_ID:
            raise self._unsupported(f"a token id that is no integer from 0 to {MAX_ID - 1}")
        self.vocab_size = 1 + max(ids)
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        merge_results = list(dict.fromkeys(map("".join, merges)))  # in order, each once
        pairs = all(len(pair) == 2 and all(pair) for pair in merges)
        if not pairs or not vocab.keys() >= set(merge_results):
            raise self._unsupported("a merge that is no pair or makes no piece of the vocabulary")
        self._byte_level = not model.get("byte_fallback")
        read = self._read_byte_level if self._byte_level else self._read_sentencepiece
        read(spec, vocab, merge_results)
        words = {}, {}  # found in the text as it is, found when it is normalised
        for token in added:
            word, i, late = token["content"], token["id"], token["normalized"]
            if token["special"]:
                self._pieces[i] = b""
                continue
            if late:
                word = self._normalised(word)
            words[late][word] = i
            self._pieces[i] = word.encode() if self._byte_level else word.replace(MARK, " ")
        self._words, self._late_words = [(one_of(found), found) for found in words]

    def _read_added(self, added, vocab):
        """Special tokens, which text never becomes, and words that it always matches."""
        self._added = {token["content"]: token["id"] for token in added}
        for token in added:
            word = token["content"]
            if not word or vocab.get(word, token["id"]) != token["id"] or token["single_word"]:
                raise self._unsupported(f"an empty, double or single_word added token, {word!r},")
        self.special = {token["content"]: token["id"] for token in added if token["special"]}
        self.marks = {word: i for word, i in self._added.items()
                      if word in self.special or LOOKS_SPECIAL(word)}
        self.mark_finder = one_of(self.marks), self.marks
        self._strips_after = {token["id"] for token in added if token["rstrip"]}  # swallow spaces
        self._strips_before = {token["id"] for token in added if token["lstrip"]}

    def _set_ranks(self, ids, pattern):
        """ids: joined bytes -> token ids, by rank. pattern: its matches are encoded one by one."""
        self._ids = list(ids.values())  # rank -> ids
        ranks = {joined: rank for rank, joined in enumerate(ids)}
        self._tiktoken = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks,
                                           special_tokens={})

    def _read_byte_level(self, spec, vocab, merge_results):
        decoders, normalizers = steps(spec["decoder"], "decoders"), steps(spec.get("normalizer"))
        kinds = [step["type"] for step in decoders]
        if kinds != ["ByteLevel"] or normalizers not in ([], [{"type": "NFC"}]):
            raise self._unsupported(f"the decoder or normalizer {kinds + normalizers}"[:160])
        self._nfc, self._prefix = bool(normalizers), "never"
        alphabet = {char: byte for byte, char in enumerate(byte_alphabet())}
        missing = {byte for char, byte in alphabet.items() if char not in vocab}
        if not missing <= RARE_BYTES:
            raise self._unsupported("a vocabulary that lacks bytes of ordinary text")

        def spelled(piece):
            try:
                return bytes([alphabet[char] for char in piece])
            except KeyError:  # an added token, written as it is
                return piece.encode()

        # A missing byte has no ids. (The tokenizers library then also joins its neighbours.)
        ids = {bytes([byte]): () for byte in range(256)}
        whole = vocab if spec["model"].get("ignore_merges") else ()  # tiktoken keeps pieces whole
        for piece in [*alphabet, *merge_results, *whole]:
            if piece in vocab:
                ids[spelled(piece)] = (vocab[piece],)
        self._set_ranks(ids, self._read_pattern(spec["pre_tokenizer"]))
        self._pieces = [b""] * self.vocab_size  # id -> bytes
        for piece, i in vocab.items():
            self._pieces[i] = spelled(piece)

    def _read_pattern(self, pre_tokenizer):
        split = steps(pre_tokenizer, "pretokenizers")
        kinds, first, last = [step["type"] for step in split], split[0], split[-1]
        if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
            own_pattern = last.get("use_regex", True)
            if kinds == ["ByteLevel"] and own_pattern:
                return GPT2
            if kinds == ["Digits", "ByteLevel"] and own_pattern and first["individual_digits"]:
                return DIGITS_GPT2
            if (kinds == ["Split", "ByteLevel"] and not own_pattern and "Regex" in first["pattern"]
                    and first["behavior"] == "Isolated" and not first["invert"]):
                pattern = first["pattern"]["Regex"]
                return rf"{pattern}|(?:(?!{pattern})[\s\S])+"  # also the text between its matches
        raise self._unsupported(f"the pre_tokenizer {pre_tokenizer}"[:160])

    def _read_sentencepiece(self, spec, vocab, merge_results):
        normalizers = steps(spec.get("normalizer"))
        split = steps(spec.get("pre_tokenizer"), "pretokenizers")
        if normalizers == [PREPEND, REPLACE] and not split:
            self._prefix = "always"
        elif normalizers == [REPLACE] and split in ([], [SPLIT]):
            self._prefix = "never"
        elif not normalizers and len(split) == 1 and split[0].items() >= METASPACE.items():
            schemes = {"always": "unless spaced", "first": "at start", "never": "never"}
            self._prefix = schemes[split[0]["prepend_scheme"]]
        else:
            raise self._unsupported(f"the normalizer, pre_tokenizer {normalizers + split}"[:240])
        decoders = steps(spec["decoder"], "decoders")
        self._strip_first = STRIP in decoders
        kinds = ["Replace", "ByteFallback", "Fuse"] + ["Strip"] * self._strip_first
        if [step["type"] for step in decoders] != kinds or spec["model"].get("ignore_merges"):
            raise self._unsupported(f"ignore_merges or the decoder {decoders}"[:160])
        byte_names = [f"<0x{byte:02X}>" for byte in range(256)]
        if not vocab.keys() >= {*byte_names, MARK}:
            raise self._unsupported(f"a vocabulary that lacks {MARK} or some of <0x00> to <0xFF>")

        # From here on a space stands for MARK: one byte instead of three.
        byte_ids = [vocab[name] for name in byte_names]
        ids = {bytes([byte]): (i,) for byte, i in enumerate(byte_ids)}
        for char in vocab:
            if len(char) == 1 and char != " ":
                whole = char.replace(MARK, " ").encode()
                for end in range(2, len(whole)):
                    ids.setdefault(whole[:end], tuple(byte_ids[byte] for byte in whole[:end]))
                ids[whole] = (vocab[char],)
        pieces = [piece.replace(MARK, " ") for piece in merge_results]
        ids |= {piece.encode(): (vocab[name],) for piece, name in zip(pieces, merge_results)}
        self._set_ranks(ids, space_pattern(pieces))
        self._undo_unreachable(pieces)
        self._pieces = [b""] * self.vocab_size  # id -> text, or a byte
        for piece, i in vocab.items():
            self._pieces[i] = piece.replace(MARK, " ")
        for byte, i in enumerate(byte_ids):
            self._pieces[i] = bytes([byte])

    def _undo_unreachable(self, pieces):
        """Give a piece that the merges never make (Gemma 3 has four, such as " YYYY") the ids that
        they make instead: tiktoken looks a match up before it merges, and would find the piece.
        Here every piece is encoded with a character behind it that joins with nothing."""
        end = min(set(map(chr, range(32))) - set("".join(pieces)))
        for piece in pieces:
            *made, _ = self._tiktoken.encode_ordinary(piece + end)
            if len(made) > 1:
                rank = self._tiktoken.encode_single_token(piece)
                self._ids[rank] = sum((self._ids[part] for part in made), ())

    def _read_names(self, spec, names, settings):
        self.names = {}  # those of tokenizer_config.json go first, unless they are null
        for key, token in [*names.items(), *settings.items()]:
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str) and key.endswith("_token"):
                self.names[key] = text
        self.bos_id = self._added.get(self.names.get("bos_token"))
        self.eos_id = self._added.get(self.names.get("eos_token"))
        adds = settings.get("add_bos_token")
        if adds is None:
            post = steps(spec.get("post_processor"), "processors")
            adds = any("SpecialToken" in step.get("single", [()])[0] for step in post)
        self.adds_bos = self.bos_id is not None and bool(adds)

    def _read_template(self, template):
        jinja = self.folder / "chat_template.jinja"
        if jinja.exists():
            template = jinja.read_text(encoding="utf-8", errors="replace")
        if isinstance(template, list):  # several named templates
            template = {t["name"]: t["template"] for t in template}["default"]
        if not isinstance(template, str | None):
            raise ValueError(f"{self.folder / 'tokenizer_config.json'}: chat_template is no text")
        self.chat_template = template

    def _read_stop_ids(self, generation, config):
        self.stop_ids = set() if self.eos_id is None else {self.eos_id}
        for name, source in ("generation_config.json", generation), ("config.json", config):
            ids = source.get("eos_token_id")
            if ids is None:
                continue
            listed = ids if isinstance(ids, list) else [ids]
            if not all(type(i) is int and 0 <= i < MAX_ID for i in listed):
                raise ValueError(f"{self.folder / name}: eos_token_id {ids!r} is no token id")
            self.stop_ids |= set(listed)
        # A base checkpoint often names only its end of text, while its chat frame ends turns with:
        for end in ("<|im_end|>", "<end_of_turn>", "<|end|>", "<|eot_id|>"):
            if end in (self.chat_template or "") and end in self.marks:
                self.stop_ids.add(self.marks[end])
        if not self.stop_ids:
            print(f"note: no file in {self.folder} names a token that ends an answer (eos_token, "
                  "eos_token_id): every answer runs to its limit", file=sys.stderr)

    def encode(self, text: str, *, at_start: bool = True, marks: bool = True) -> list[int]:
        """Ids of ordinary text. Nothing is put around it; a spelled-out special token is just text.

        Added words that are not special (Qwen3's <think>, Gemma 3's runs of newlines) are found.
        at_start: False behind a special token; some SentencePiece-style tokenizers put a space only
        at the start of a text. marks: False: words that look special are just text, too.
        Raises ValueError on a run of half a million white-space characters."""
        if TOO_MANY_SPACES.search(text):
            raise ValueError("the text has 500000 white-space characters in a row: cut it")
        skipped = () if marks else self.marks.values()
        ids = []
        for part in self.split(text, self._words, skipped):
            pieces = [part]
            if isinstance(part, str):
                pieces = self.split(self._normalised(part), self._late_words, skipped)
            for piece in pieces:
                if isinstance(piece, int):
                    ids.append(piece)
                elif piece:
                    wants_space = {"unless spaced": True, "at start": at_start}.get(self._prefix)
                    if wants_space and not piece.startswith(" "):
                        piece = " " + piece
                    for rank in self._tiktoken.encode_ordinary(piece):
                        ids += self._ids[rank]
                at_start = False
        return ids

    def split(self, text: str, finder: tuple, skipped: Iterable[int] = ()) -> Iterator[str | int]:
        """Stretches of text, and between them the ids of words. finder: their pattern, and ids."""
        (pattern, words), done = finder, 0
        for found in pattern.finditer(text):
            i = words[found[0]]
            if i in skipped:
                continue
            before, done = text[done:found.start()], found.end()
            if i in self._strips_before:
                before = before.rstrip(WHITE_SPACE)
            if i in self._strips_after:
                done = WHITE_SPACES.match(text, done).end()
            yield from (before, i)
        yield text[done:]

    def _normalised(self, text):
        if self._byte_level:
            return unicodedata.normalize("NFC", text) if self._nfc else text
        text = text.replace(MARK, " ")
        return " " + text if text and self._prefix == "always" else text

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without special tokens. Invalid UTF-8, such as half a character, is U+FFFD.
        An id outside the vocabulary (a model may have more rows than tokens) has no text."""
        pieces = [self._pieces[i] for i in ids if 0 <= i < self.vocab_size]
        if self._byte_level:
            return b"".join(pieces).decode("utf-8", "replace")
        text = ""
        for kind, run in groupby(pieces, type):
            run = kind().join(run)
            try:
                text += run if kind is str else run.decode()
            except UnicodeDecodeError:  # single-byte tokens are text only if the whole run is valid
                text += "\ufffd" * len(run)
        return text.removeprefix(" ") if self._strip_first else text  # encode put it there

    def copy_to(self, folder):
        """Copy the tokenizer's files into a checkpoint folder, which then loads in transformers."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            source, copy = self.folder / name, folder / name
            if source.is_file() and source.resolve() != copy.resolve():
                shutil.copyfile(source, copy)


def steps(part: dict | None, key: str = "normalizers") -> list[dict]:
    """The steps of a part of a tokenizer.json, in a Sequence (of Sequences) or alone or none."""
    if part is None or part["type"] != "Sequence":
        return [] if part is None else [part]
    return [inner for step in part[key] for inner in steps(step, key)]


def one_of(words: Iterable[str]) -> re.Pattern:
    """A pattern of any of the words, the longest that fits."""
    longest_first = sorted(map(re.escape, words), key=len, reverse=True)
    return re.compile("|".join(longest_first) or "(?!)")  # (?!) matches nothing


def space_pattern(pieces: list[str]) -> str:
    """A pattern that cuts text before runs of spaces: tiktoken is faster with short matches. A cut
    must not change a merge: there is none behind the few characters (`inner`) that have a space
    behind them in some piece."""
    inner = set(re.findall("([^ \0]) ", "\0".join(pieces)))
    pattern = r" *[^ ]+| +"
    if inner:
        allowed = "".join(map(re.escape, sorted(inner)))
        pattern = rf" *(?:[^ ]*[{allowed}] +)+[^ ]*|{pattern}"
    return pattern
