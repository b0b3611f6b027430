"""Files from outside: JSON, rows of data, safetensors. What is wrong is said in a sentence."""
import csv
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

BLANK = b"\xef\xbb\xbf \t\r\n"  # a byte order mark in UTF-8, and what may stand round JSON
MAX_BYTES = 2**28  # of a line, or of a whole JSON array: a small .gz can hold an endless one


def one_line(error: BaseException) -> str:
    """An error's text on one line, at most 300 characters."""
    return " ".join((str(error) or type(error).__name__).split())[:300]


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises FileNotFoundError or ValueError that names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
        raise ValueError(f"{path} is truncated or not JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, not a {type(content).__name__}")
    return content


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """(where, row) of JSONL or a JSON array, of either as .gz, of .parquet, of .csv with a head.
    where: the file, and its line or row. Raises ValueError that names both."""
    number, place = 0, f"{path}, line" if ".jsonl" in path.suffixes else f"{path}, row"
    try:
        if path.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile
            batches = ParquetFile(path).iter_batches(1024)
            rows = (row for batch in batches for row in batch.to_pylist())
        elif path.suffix == ".csv":
            rows = csv.DictReader(open(path, encoding="utf-8-sig", newline=""))
        else:
            rows = json_rows(gzip.open(path) if path.suffix == ".gz" else open(path, "rb"))
        for number, row in enumerate(rows, start=1):
            if row is not ...:
                yield f"{place} {number}", row
    except ImportError:
        raise ValueError(f"{path} is a Parquet file: pip install pyarrow") from None
    except (ValueError, OSError, EOFError, RecursionError, zlib.error, csv.Error) as error:
        raise ValueError(f"{place} {number + 1} is no valid JSON, CSV or Parquet: "
                         f"{one_line(error)}") from None


def json_rows(file) -> Iterator[object]:
    """The rows of JSONL, with ... for a blank line; or of an array, which begins with [."""
    with file:
        if file.peek(1).lstrip(BLANK).startswith(b"["):
            yield from json.loads(file.read(MAX_BYTES))
        while line := file.readline(MAX_BYTES):
            line = line.strip(BLANK)
            yield json.loads(line) if line else ...


def open_tensors(path: Path) -> safe_open:
    """Open a safetensors file. Raises FileNotFoundError or ValueError that names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {one_line(error)}") from None


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str):
    """Write a text file that is whole or not there, whatever happens meanwhile."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def lock(file, wait: bool = True):
    """Lock an open file until it is closed or this process ends, be it by kill -9. Raises OSError
    without locks, BlockingIOError if another process has it and this one should not wait."""
    if fcntl is None:
        raise OSError("the system has no file locks")
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
