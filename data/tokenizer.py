"""Text <-> token ids through tiktoken, from a checkpoint's own tokenizer.json (nothing is ever downloaded).

tiktoken repeats one step: among neighbouring pieces whose joined bytes have a rank, join the pair of the lowest rank,
the leftmost first. A tokenizer.json lists its joins in the same order (`merges`), so all it takes is a rank per join:

    byte-level BPE (Qwen, SmolLM2)
        the 256 bytes, then what each merge makes
    SentencePiece-style BPE with byte fallback (Llama 2, Phi-3.5, Gemma 3)
        the 256 bytes, then the byte prefixes of every character that is a piece (so that characters are whole before
        anything else is joined), then what each merge makes

After encoding, ranks are mapped to ids; a character that is no piece maps to the ids of its bytes.
"""
import codecs
import gc
import json
import re
import shutil
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import tiktoken

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
         "chat_template.jinja", "vocab.json", "merges.txt")
MAX_ID = 2_000_000                 # an id above this is a broken file, not a vocabulary
MAX_SPACES = 500_000               # tiktoken's splitter overflows its stack on a million spaces in a row
SEVERAL = -1                       # in the table rank -> id: this rank stands for no id or for several
MARK = "\u2581"                    # SentencePiece's visible space
WHITE_SPACE = ("\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
               "\u2028\u2029\u202f\u205f\u3000")                     # Unicode White_Space; str.strip() takes four more
WHITE_SPACES = re.compile(f"[{WHITE_SPACE}]*")

# The ByteLevel pre-tokenizer's own pattern (GPT-2's), and the same after a step that first sets every digit apart:
# white space before a digit then ends its stretch of text, so all of it stays together. The extra code points are
# digits of Unicode 17, which the pattern engine does not know yet and the reference does.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}"
DIGITS_GPT2 = (rf"'s|'t|'re|'ve|'m|'ll|'d|[{DIGIT}]| ?\p{{L}}+| ?[^\s\p{{L}}{DIGIT}]+"
               rf"|\s+(?![^\s{DIGIT}])|\s+")

# Combining marks younger than the Unicode tables in the reference's NFC, which lets them block composition and order.
YOUNG_MARKS = re.compile("([\u05c8\u05c9\u07fd\u0897-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715"
                         "\u1abf-\u1af0\u1df6-\u1dfa\ua82c\U00010d24-\U00010d27\U00010d69-\U00010d6d"
                         "\U00010eab-\U00010eac\U00010ecb-\U00010ecf\U00010ef0-\U00010efb\U00010efd-\U00010eff"
                         "\U00010f46-\U00010f50\U00010f82-\U00010f85\U00011070\U0001133b\U000113ce-\U000113d0"
                         "\U0001145e\U00011839\U0001183a\U0001193d\U0001193e\U00011943\U000119e0\U00011a34\U00011a47"
                         "\U00011a99\U00011d42\U00011d44\U00011d45\U00011d97\U00011f41\U00011f42\U0001612f\U00016ff0"
                         "\U00016ff1\U0001d127\U0001d128\U0001d250-\U0001d252\U0001d25b\U0001d25c\U0001d25f\U0001d280"
                         "\U0001d281\U0001e08f\U0001e130-\U0001e136\U0001e2ae\U0001e2ec-\U0001e2ef"
                         "\U0001e4ec-\U0001e4ef\U0001e5ee\U0001e5ef\U0001e6e3\U0001e6e6\U0001e6ee\U0001e6ef"
                         "\U0001e6f5])")


def read_json(path: Path) -> dict:
    """The JSON object in `path`; {} where there is no such file. Raises ValueError when it is something else."""
    if not path.exists():
        return {}
    collecting = gc.isenabled()
    gc.disable()                    # half a million merges are as many lists: collecting in between doubles the time
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): copy the file again") from None
    finally:
        if collecting:
            gc.enable()
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

    special: every special token and its id; ordinary text never becomes one, prompts.py places them by id.
    stop_ids: the ids that end an answer.  bos_id, eos_id: the beginning- and end-of-text tokens, None where not named.
    adds_bos: whether the tokenizer puts bos_id in front of plain text.  vocab_size: every id is below it.
    strips_after, strips_before: special ids that swallow the white space on that side of them in a prompt.
    chat_template: the checkpoint's Jinja template as text, None where there is none (prompts.py recognises it).
    """

    @classmethod
    def from_pretrained(cls, folder) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json and config.json.

        Raises FileNotFoundError when there is no tokenizer.json, ValueError when a file is broken or of another kind.
        """
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json: put the checkpoint's there "
                                    f"(a SentencePiece tokenizer.model alone is not read)")
        files = [read_json(folder / name) for name in
                 ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")]
        try:
            return cls(folder, *files)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{folder / 'tokenizer.json'} is not laid out as a tokenizer "
                             f"({type(error).__name__}: {error}): copy the file again") from error

    def __init__(self, folder: Path, spec: dict, settings: dict, generation: dict, config: dict):
        self.folder = folder
        self._read_bpe(spec)
        self._read_bos_and_eos(spec, settings)
        jinja = folder / "chat_template.jinja"
        template = settings.get("chat_template")
        if jinja.exists():
            template = jinja.read_text(encoding="utf-8", errors="replace")
        if isinstance(template, list):                             # several named templates: the one called default
            template = {t["name"]: t["template"] for t in template}.get("default")
        if not isinstance(template, str | None):
            raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template is a {type(template).__name__}")
        self.chat_template = template
        self._read_stop_ids(generation, config)

    # ------------------------------------------------------------------------------------------------------- reading

    def _unsupported(self, what: str) -> ValueError:
        return ValueError(f"{self.folder / 'tokenizer.json'}: {what} is not supported (byte-level BPE as in Qwen and "
                          f"SmolLM2 is, and SentencePiece-style BPE as in Llama 2, Phi-3.5 and Gemma 3)")

    def _read_added(self, added: list[dict], vocab: dict[str, int]) -> None:
        """Added tokens: the special ones, kept out of ordinary text, and plain words that text always matches whole."""
        if any(not token["content"] or token["single_word"] or token["normalized"] for token in added
               if not token["special"]):
            raise self._unsupported("an added token that is empty, or matches normalised text or single words only,")
        if any(vocab.get(token["content"], token["id"]) != token["id"] for token in added):
            raise self._unsupported("an added token whose id is another in the vocabulary")
        self.special = {token["content"]: token["id"] for token in added if token["special"]}
        self.strips_after = {token["id"] for token in added if token["rstrip"]}
        self.strips_before = {token["id"] for token in added if token["lstrip"]}
        self._special_ids = set(self.special.values())
        self._words = {token["content"]: token["id"] for token in added if not token["special"]}
        self._word_lengths = sorted({len(word) for word in self._words}, reverse=True)
        starts = sorted({word[:2] for word in self._words})
        self._word_start = re.compile("|".join(map(re.escape, starts))) if starts else None

    def _read_bpe(self, spec: dict) -> None:
        model, vocab = spec["model"], spec["model"].get("vocab")
        if model.get("type", "BPE") != "BPE" or not isinstance(vocab, dict) or not isinstance(model["merges"], list):
            raise self._unsupported(f"a model of type {model.get('type')!r}")
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
            if model.get(option):
                raise self._unsupported(f"the model option {option}={model[option]!r}")
        merges = model["merges"]
        if merges and isinstance(merges[0], str):
            merges = [pair.split(" ") for pair in merges]
        made = dict.fromkeys(map("".join, merges))              # what each merge makes, in order, once
        if set(map(len, merges)) - {2} or min(map(len, made), default=2) < 2 or not vocab.keys() >= made.keys():
            raise self._unsupported("a merge that is no pair, or whose result is not in the vocabulary,")
        self._read_added(spec["added_tokens"], vocab)
        ids = [*vocab.values(), *self.special.values(), *self._words.values()]
        if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= MAX_ID:
            raise self._unsupported(f"a token id that is no whole number from 0 to {MAX_ID - 1}")
        self.vocab_size = 1 + max(ids)
        self._several = {}                                                      # rank -> ids, where they are not one
        if model.get("byte_fallback"):
            self._read_sentencepiece(spec, vocab, made)
        else:
            self._read_byte_level(spec, vocab, made)
        for word, i in (self.special | self._words).items():
            self._pieces[i] = word.encode() if self._byte_level else word.replace(MARK, " ")

    def _read_byte_level(self, spec: dict, vocab: dict[str, int], made: Iterable[str]) -> None:
        self._byte_level = True
        if spec["decoder"]["type"] != "ByteLevel":
            raise self._unsupported(f"the decoder {json.dumps(spec['decoder'])[:80]}")
        normalizer = spec.get("normalizer") or {"type": None}
        if normalizer["type"] not in (None, "NFC"):
            raise self._unsupported(f"the normalizer {json.dumps(normalizer)[:80]}")
        self._nfc = normalizer["type"] == "NFC"

        alphabet = byte_alphabet()
        unknown = vocab.get(spec["model"].get("unk_token"), SEVERAL)
        ids = [0] * 256
        for char, byte in alphabet.items():
            ids[byte] = vocab.get(char, unknown)
        # Where there is no unknown token either, the reference drops a byte that is no piece and joins its neighbours.
        self._dropped = bytes(byte for byte in range(256) if ids[byte] == SEVERAL)
        self._several.update((byte, ()) for byte in self._dropped)
        if any(chr(byte) in WHITE_SPACE or chr(byte).isalnum() and byte < 0x80 or 0x80 <= byte < 0xC0
               or 0xC2 <= byte < 0xF1 for byte in self._dropped):
            raise self._unsupported("a vocabulary that lacks the bytes of letters, digits or white space")
        ranks = {bytes([byte]): byte for byte in range(256)}
        for piece in made:
            ranks[bytes([alphabet[char] for char in piece])] = len(ids)
            ids.append(vocab[piece])
        self._ids = ids                                                         # rank -> id
        self._tiktoken = tiktoken.Encoding(str(self.folder), pat_str=self._read_pattern(spec["pre_tokenizer"]),
                                           mergeable_ranks=ranks, special_tokens={})
        # keeps a character that is neither white space, letter nor digit by the pattern engine's own tables, and no other
        self._other = tiktoken.Encoding("other", pat_str=rf"[^\s\p{{L}}{DIGIT}]", mergeable_ranks={bytes([b]): b for b in range(256)},
                                        special_tokens={})
        self._pieces = [b""] * self.vocab_size                                  # id -> bytes
        for joined, rank in ranks.items():
            if ids[rank] != SEVERAL:
                self._pieces[ids[rank]] = joined
        for piece, i in vocab.items():
            if not self._pieces[i]:
                known = all(char in alphabet for char in piece)
                self._pieces[i] = bytes([alphabet[char] for char in piece]) if known else piece.encode()

    def _read_pattern(self, pre_tokenizer: dict) -> str:
        """The pattern whose matches are encoded one by one."""
        steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
        kinds = [step["type"] for step in steps]
        if kinds[-1] == "ByteLevel" and not steps[-1]["add_prefix_space"]:
            own_pattern = steps[-1].get("use_regex", True)
            if kinds == ["ByteLevel"] and own_pattern:
                return GPT2
            if kinds == ["Digits", "ByteLevel"] and own_pattern and steps[0]["individual_digits"]:
                return DIGITS_GPT2
            if (kinds == ["Split", "ByteLevel"] and not own_pattern and "Regex" in steps[0]["pattern"]
                    and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]):
                pattern = steps[0]["pattern"]["Regex"]
                return rf"{pattern}|(?:(?!{pattern})[\s\S])+"        # what lies between matches is encoded too
        raise self._unsupported(f"the pre_tokenizer {json.dumps(pre_tokenizer)[:120]}")

    def _read_sentencepiece(self, spec: dict, vocab: dict[str, int], made: Iterable[str]) -> None:
        self._byte_level = self._nfc = False
        self._dropped = b""
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
        prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": MARK}, replace]}
        split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        metaspace = {"type": "Metaspace", "replacement": MARK, "split": False}      # how transformers 5 writes Llama's
        normalizer, pre_tokenizer = spec.get("normalizer"), spec.get("pre_tokenizer")
        if normalizer == prepend and pre_tokenizer is None:
            self._prefix = "always"
        elif normalizer == replace and pre_tokenizer in (None, split):                  # no space is left to split at
            self._prefix = "never"
        elif normalizer is None and (pre_tokenizer or {}).items() >= metaspace.items():
            self._prefix = {"always": "unless spaced", "first": "at start unless spaced",
                            "never": "never"}[pre_tokenizer["prepend_scheme"]]
        else:
            raise self._unsupported(f"the normalizer {json.dumps(normalizer)[:160]} with the pre_tokenizer "
                                    f"{json.dumps(pre_tokenizer)[:80]}")
        steps = spec["decoder"].get("decoders", [])
        self._strip_first = {"type": "Strip", "content": " ", "start": 1, "stop": 0} in steps
        if [step["type"] for step in steps] != ["Replace", "ByteFallback", "Fuse"] + ["Strip"] * self._strip_first:
            raise self._unsupported(f"the decoder {json.dumps(spec['decoder'])[:120]}")
        byte_names = [f"<0x{byte:02X}>" for byte in range(256)]
        if any(name not in vocab for name in [*byte_names, MARK]):
            raise self._unsupported(f"a vocabulary that lacks {MARK} or some of <0x00> to <0xFF>")

        # Everything below is written with spaces in place of MARK: one byte where there would be three.
        byte_ids = [vocab[name] for name in byte_names]
        ids = [vocab.get(MARK if byte == 0x20 else chr(byte), byte_ids[byte]) if byte < 128 else byte_ids[byte]
               for byte in range(256)]
        ranks = {bytes([byte]): byte for byte in range(256)}
        for char in vocab:
            if len(char) == 1 and not char.isascii() and char != MARK:
                whole = char.encode()
                for end in range(2, len(whole)):
                    if whole[:end] not in ranks:
                        ranks[whole[:end]] = len(ids)
                        self._several[len(ids)] = tuple(byte_ids[byte] for byte in whole[:end])
                        ids.append(SEVERAL)
                ranks[whole] = len(ids)
                ids.append(vocab[char])
        pieces = [piece.replace(MARK, " ") for piece in made]
        for piece in pieces:
            ranks[piece.encode()] = len(ids)
            ids.append(vocab[piece.replace(" ", MARK)])
        self._ids = ids
        # No piece has a space behind another character, save behind the characters `inner`. So no merge crosses such a
        # place, and cutting there gives tiktoken short matches without changing what is joined.
        inner = {char for piece in pieces if " " in piece.lstrip(" ") for char, after in zip(piece, piece[1:])
                 if char != " " and after == " "}
        pattern = r" *[^ ]+| +"
        if inner:
            pattern = rf" *(?:[^ ]*[{''.join(map(re.escape, sorted(inner)))}] +)+[^ ]*|{pattern}"
        self._tiktoken = tiktoken.Encoding(str(self.folder), pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self._undo_dead_pieces(pieces, ranks)

        self._pieces = [""] * self.vocab_size                                   # id -> text, or the byte as an int
        for piece, i in vocab.items():
            self._pieces[i] = piece.replace(MARK, " ")
        for byte, i in enumerate(byte_ids):
            self._pieces[i] = byte

    def _undo_dead_pieces(self, pieces: list[str], ranks: dict[bytes, int]) -> None:
        """Map the pieces that no order of merges makes (Gemma 3 has four, such as " YYYY") to what is made of them.

        tiktoken takes a match that has a rank whole, without merging, so that a dead piece would come to life. Here
        every piece is encoded with a character behind it that joins with nothing, and so by its merges.
        """
        end = min(set(map(chr, range(32))) - set("".join(pieces)))
        out = np.array(self._tiktoken.encode_ordinary("".join(f" {end}{piece}{end}" for piece in pieces)))
        ends = np.flatnonzero(out == ord(end)).reshape(len(pieces), 2)          # before and behind each piece
        for k in np.flatnonzero(ends[:, 1] - ends[:, 0] > 2):
            dead, spelled = ranks[pieces[k].encode()], out[ends[k, 0] + 1:ends[k, 1]].tolist()
            self._several[dead] = tuple(self._ids[rank] for rank in spelled)
            self._ids[dead] = SEVERAL

    def _read_bos_and_eos(self, spec: dict, settings: dict) -> None:
        named = {}
        for key in ("bos_token", "eos_token"):
            token = settings.get(key)
            named[key] = (self._words | self.special).get(token["content"] if isinstance(token, dict) else token)
        self.bos_id, self.eos_id = named["bos_token"], named["eos_token"]
        post = spec.get("post_processor") or {"type": None}
        adds = settings.get("add_bos_token")
        if adds is None:
            adds = post["type"] == "TemplateProcessing" and "SpecialToken" in post["single"][0]
        self.adds_bos = self.bos_id is not None and bool(adds)

    def _read_stop_ids(self, generation: dict, config: dict) -> None:
        self.stop_ids = set() if self.eos_id is None else {self.eos_id}
        for name, source in (("generation_config.json", generation), ("config.json", config),
                             ("config.json", config.get("text_config") or {})):
            listed = source.get("eos_token_id")
            listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
            if not all(type(i) is int and 0 <= i < MAX_ID for i in listed):
                raise ValueError(f"{self.folder / name}: eos_token_id is {source['eos_token_id']!r}, "
                                 f"where a token id or a list of them belongs")
            self.stop_ids |= set(listed)
        # A base checkpoint often names only its end of text, while the prompt frame ends a turn with one of these.
        for end in ("<|im_end|>", "<end_of_turn>", "<|end|>"):
            if end in (self.chat_template or "") and end in self.special:
                self.stop_ids.add(self.special[end])

    # --------------------------------------------------------------------------------------------------------- using

    def encode(self, text: str, *, at_start: bool = True) -> list[int]:
        """Ids of ordinary text: nothing is put in front or behind, and a spelled-out special token is just text.

        Words that the tokenizer adds without calling them special (Qwen3's <think>, Gemma 3's runs of newlines) are
        found as the `tokenizers` library finds them. at_start: False where a special token went before; some
        SentencePiece-style tokenizers put their space only at the start. Raises ValueError on a run of half a million
        white-space characters.
        """
        if len(text) >= MAX_SPACES and re.search(rf"\s{{{MAX_SPACES}}}", text):
            raise ValueError(f"the text holds a run of more than {MAX_SPACES} white-space characters: shorten it")
        if self._word_start is None:
            return self._encode_stretch(text, at_start)
        ids, done, at = [], 0, 0
        while found := self._word_start.search(text, at):
            start = found.start()
            spelled = (text[start:start + length] for length in self._word_lengths)
            word = next((word for word in spelled if word in self._words), None)
            if word is None:
                at = start + 1
                continue
            before = text[done:start]
            at = done = start + len(word)
            if self._words[word] in self.strips_before:
                before = before.rstrip(WHITE_SPACE)
            if self._words[word] in self.strips_after:
                done = WHITE_SPACES.match(text, at).end()
            ids += [*self._encode_stretch(before, at_start), self._words[word]]
            at_start = False
        return ids + self._encode_stretch(text[done:], at_start)

    def _encode_stretch(self, text: str, at_start: bool) -> list[int]:
        """Ids of text between added tokens: normalise, split and join in tiktoken, map ranks to ids."""
        if not text:
            return []
        if not self._byte_level:
            text = text.replace(MARK, " ")
            if self._prefix == "always" or not text.startswith(" ") and (
                    self._prefix == "unless spaced" or self._prefix == "at start unless spaced" and at_start):
                text = " " + text
        elif self._nfc and not text.isascii() and not unicodedata.is_normalized("NFC", text):
            text = "".join(unicodedata.normalize("NFC", part) for part in YOUNG_MARKS.split(text))
        ranks = self._tiktoken.encode_ordinary(text)
        ids = [self._ids[rank] for rank in ranks]
        if SEVERAL in ids:
            if self._dropped:
                ranks = self._ranks_around_dropped(text)
            ids = [i for rank in ranks for i in self._several.get(rank, (self._ids[rank],))]
        return ids

    def _ranks_around_dropped(self, text: str) -> list[int]:
        """Ranks when bytes that the vocabulary lacks vanish after the split, so that their neighbours may join.

        Such bytes belong to characters that are neither letters, digits nor white space, and the split keeps a run of
        those together with one space before it: encode each run that holds some again, without them. What belongs to a run
        is asked of tiktoken's tables, for Python's may be older.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")       # as tiktoken treats surrogates
        dropped = set(self._dropped)
        kinds = "".join(" " if char == " " else "-" if not self._other.encode_ordinary(char) else
                        "." if dropped.isdisjoint(char.encode()) else "x" for char in text)
        ranks, done = [], 0
        for run in re.finditer(r" ?[x.]+", kinds):
            if "x" in run[0]:
                spelled = text[run.start():run.end()].encode()
                kept = spelled.translate(None, self._dropped)
                ranks += self._tiktoken.encode_ordinary(text[done:run.end()])
                del ranks[-len(self._tiktoken._encode_single_piece(spelled)):]
                ranks += self._tiktoken._encode_single_piece(kept) if kept else []
                done = run.end()
        return ranks + self._tiktoken.encode_ordinary(text[done:])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without the special tokens. Bytes that are no UTF-8, such as a cut character, become U+FFFD.

        An id at or above vocab_size (a model may have more rows than its tokenizer has tokens) stands for no text.
        """
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of ids as they arrive; the parts joined are decode(ids).

        What a later id may still change is held back: byte-level, the bytes of an incomplete character; otherwise
        a run of single-byte tokens, which is text only if all of it is valid (as the `tokenizers` library has it).
        """
        pieces = (self._pieces[i] for i in ids if 0 <= i < self.vocab_size and i not in self._special_ids)
        if self._byte_level:
            characters = codecs.getincrementaldecoder("utf-8")("replace")
            for piece in pieces:
                if text := characters.decode(piece):
                    yield text
            yield characters.decode(b"", final=True)
            return
        run, strip = bytearray(), self._strip_first
        for piece in chain(pieces, [""]):                               # the "" ends a run at the very end
            if isinstance(piece, int):
                run.append(piece)
                continue
            try:
                text = run.decode() + piece
            except UnicodeDecodeError:
                text = "\ufffd" * len(run) + piece
            run.clear()
            if strip and text:                                          # the space that encode put in front
                text, strip = text.removeprefix(" "), False
            if text:
                yield text

    def copy_to(self, folder) -> None:
        """Write the tokenizer's files, unchanged, into a checkpoint folder, which then loads in transformers."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if folder.resolve() != self.folder.resolve():
            for name in FILES:
                if (self.folder / name).is_file():
                    shutil.copyfile(self.folder / name, folder / name)
