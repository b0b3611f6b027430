"""Files from outside: JSON objects, safetensors. What is wrong with one is said in a sentence."""
import hashlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


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


def open_tensors(path: Path) -> safe_open:
    """Open a safetensors file. Raises FileNotFoundError or ValueError that names the file.

    Only the header is read; ValueError where the file's length and its header disagree.
    """
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
    """Lock an open file until it is closed or this process ends, be it by kill -9. Raises
    BlockingIOError if another has it and this one should not wait, OSError if there are no locks.
    """
    if fcntl is None:
        raise OSError("the system has no file locks")
    fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
