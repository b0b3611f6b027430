"""Where checkpoints come from: a folder, a short name, or a repository on a Hugging Face hub.

A model is one folder: config.json, tokenizer.json, model.safetensors (or shards with model.safetensors.index.json),
and mostly tokenizer_config.json and generation_config.json. `find_model` turns what --model was given into such a folder:

    1. a folder on this machine
    2. "tiny": data/tiny of this repository, and every other short name of MODELS: the repository that it stands for
    3. owner/name in the local Hugging Face cache   (HF_HUB_CACHE, else $HF_HOME/hub, else ~/.cache/huggingface/hub)
    4. owner/name in our own cache                  (SA_CACHE, else ~/.cache/self-aligned-reward)
    5. owner/name downloaded into our own cache     (from HF_ENDPOINT, else https://huggingface.co)

HF_TOKEN is sent to the endpoint where it is set, and only there. With HF_HUB_OFFLINE=1 step 5 is not taken.
A download grows in a folder of another name beside its place and is renamed when every file has been checked, so a folder
in our cache is whole or made by hand.
"""
import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError, safe_open

MODELS = {  # short name -> repository; Qwen names without "instruct" are base models, as the paper trains base models
    "qwen-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen-1.5b-instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B-Base",
    "qwen3-4b": "Qwen/Qwen3-4B-Base",
    "phi-3.5-mini": "microsoft/Phi-3.5-mini-instruct",
    "gemma3-1b": "google/gemma-3-1b-it",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
}
TINY = Path(__file__).resolve().parent / "tiny"
TIMEOUT = 30  # seconds without a byte, when connecting or reading, after which a download fails
OPTIONAL = ["tokenizer_config.json", "generation_config.json"]


def find_model(name_or_folder: str) -> Path:
    """The folder of a model: see the list at the top of this file. The folder has passed `check_folder`.

    Raises FileNotFoundError where there is no such model or it cannot be had, ValueError where it is there but broken;
    either message is one sentence that says where was looked and what to do.
    """
    name = str(name_or_folder)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return check_folder(folder)
    if name == "tiny":
        if not TINY.is_dir():
            raise FileNotFoundError(f"the embedded model is missing: run python -m data.make_tiny to make {TINY}")
        return check_folder(TINY)
    repo = MODELS.get(name, name)
    if folder.is_file():
        raise ValueError(f"{name} is a file: give the folder that holds config.json, tokenizer.json and the weights")
    if not is_repo(repo):
        raise FileNotFoundError(f"model {name!r} is neither a folder, nor a repository id (owner/name), nor one of the "
                                f"short names tiny, {', '.join(MODELS)}")

    snapshot, looked = cached_snapshot(repo)
    if snapshot:
        return snapshot
    ours = cache_folder() / repo.replace("/", "--")
    if ours.is_dir():
        return check_folder(ours)
    try:
        download_model(repo, ours)
        return check_folder(ours)
    except OSError as error:  # network errors are OSErrors, and so are a full disk and an unwritable folder
        raise FileNotFoundError(
            f"model {name!r} is no folder, not in the Hugging Face cache ({looked}), not in {ours}, and could not be downloaded from "
            f"{endpoint()}/{repo} ({one_line(error)}): put its config.json, tokenizer.json and .safetensors files into "
            f"{ours}, or give --model the folder that holds them") from error


def check_folder(path: str | Path) -> Path:
    """Check that a model folder holds what it needs, whole, and return it.

    config.json and tokenizer.json must be JSON objects; the weights one model.safetensors, or every shard that
    model.safetensors.index.json names; each weights file as long as its own header says.
    Raises FileNotFoundError for what is missing and ValueError for what is broken, naming the file.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    for name in ["config.json", "tokenizer.json"]:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a whole model: {name} is missing")
        read_json(folder / name)
    for name in OPTIONAL:
        if (folder / name).is_file():
            read_json(folder / name)

    if (folder / "model.safetensors").is_file():
        check_safetensors(folder / "model.safetensors")
    elif (folder / "model.safetensors.index.json").is_file():
        for shard, tensors in read_index(folder / "model.safetensors.index.json").items():
            if not (folder / shard).is_file():
                raise FileNotFoundError(f"{folder} is not a whole model: {shard} is missing, which "
                                        "model.safetensors.index.json names")
            absent = tensors - check_safetensors(folder / shard)
            if absent:
                raise ValueError(f"{folder / shard} has no tensor {min(absent)}, which model.safetensors.index.json names")
    else:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth"))
        raise FileNotFoundError(f"{folder} is not a whole model: model.safetensors (or model.safetensors.index.json with its "
                                "shards) is missing" + (", and pickled weights are not read" if pickled else ""))
    return folder


def check_safetensors(path: Path) -> set[str]:
    """The names of the tensors in a safetensors file; ValueError where its length and its header do not agree."""
    try:
        with safe_open(path, framework="pt") as file:  # reads and validates the header only
            return set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({one_line(error)}): fetch it again") from error


def read_json(path: Path) -> dict:
    """A JSON object from a file; ValueError with one sentence where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
        raise ValueError(f"{path} is truncated or not JSON ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def read_index(path: Path) -> dict[str, set[str]]:
    """The shards that a model.safetensors.index.json names, each with the tensors it must hold."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        # the name comes from outside and becomes a path: a plain file name or nothing
        if not isinstance(shard, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors", shard):
            raise ValueError(f"{path} names a shard that is no plain .safetensors file name: {str(shard)[:80]!r}")
        shards.setdefault(shard, set()).add(tensor)
    return shards


# ----------------------------------------------------------------------------------------------------------------------
# places


def cache_folder() -> Path:
    """Our own cache: SA_CACHE, else ~/.cache/self-aligned-reward. Models lie in owner--name/, problems in data/."""
    return Path(os.environ.get("SA_CACHE") or "~/.cache/self-aligned-reward").expanduser()


def endpoint() -> str:
    """Where repositories are downloaded from: HF_ENDPOINT, else https://huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true")


def is_repo(name: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII)) and ".." not in name


def cached_snapshot(repo: str) -> tuple[Path | None, str]:
    """(the whole snapshot of refs/main in the local Hugging Face cache or None, where was looked and what was wrong)."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()
    folder = cache / f"models--{repo.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
        if not re.fullmatch(r"\w[\w.-]*", revision, re.ASCII):
            return None, f"{folder}/refs/main is broken"
        return check_folder(folder / "snapshots" / revision), str(folder)
    except FileNotFoundError as error:
        return None, str(error) if "not a whole model" in str(error) else str(folder)
    except (ValueError, OSError) as error:
        return None, one_line(error)


def one_line(error: BaseException) -> str:
    """An error's text on one line, at most 300 characters."""
    return " ".join((str(error) or type(error).__name__).split())[:300]


# ----------------------------------------------------------------------------------------------------------------------
# downloads


def download_model(repo: str, target: Path) -> None:
    """Download a repository's model files into the folder `target`, which appears whole or not at all.

    The files come from {endpoint}/{repo}/resolve/{revision}/{file}. They gather in .NAME.partial beside the target; a file
    gets its own name there only after its size and hash have been checked, so an interrupted download goes on with
    the files that are missing, as long as the repository's revision is still the same. Raises OSError.
    """
    if offline():  # before anything is made on the disk
        raise ConnectionError("not tried, HF_HUB_OFFLINE is set")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial"
    with lock(target.parent / f".{target.name}.lock"):
        if target.is_dir():  # another process brought it while we waited
            return
        partial.mkdir(exist_ok=True)
        for half in [*partial.glob("*.partial"), *partial.glob("*.unchecked")]:  # of a download that was killed
            half.unlink()
        told = download(f"{endpoint()}/{repo}/resolve/main/config.json", partial / "config.json")
        # every further file comes from the revision of the first, also when the branch moves meanwhile
        commit = told.get("x-repo-commit", "")
        revision = commit if re.fullmatch(r"[0-9a-f]{40}", commit) else "main"
        note = partial / "revision"
        if revision == "main" or not note.is_file() or note.read_text() != revision:
            for old in partial.iterdir():
                if old.name != "config.json":
                    old.unlink()
            note.write_text(revision)

        def fetch(file: str) -> Path:
            if not (partial / file).is_file():
                download(f"{endpoint()}/{repo}/resolve/{revision}/{file}", partial / file)
            return partial / file

        try:
            fetch("tokenizer.json")
            for file in OPTIONAL:
                with contextlib.suppress(FileNotFoundError):
                    fetch(file)
            try:
                fetch("model.safetensors")
            except FileNotFoundError:  # then the weights are in shards
                for shard in sorted(read_index(fetch("model.safetensors.index.json"))):
                    fetch(shard)
            check_folder(partial)
        except ValueError as error:  # by size and hash every file came well, but together they are no model
            shutil.rmtree(partial)
            raise OSError(f"what came is no whole model: {one_line(error)}") from error
        os.rename(partial, target)


def download(url: str, path: Path, sha256: str | None = None) -> dict[str, str]:
    """Download one file, with a progress bar, check it, and only then give it its name.

    The size must be what the server said (X-Linked-Size or Content-Length), the SHA-256 what the caller or else the hub
    says (X-Linked-Etag or ETag, where it is one).
    Returns the headers that the server sent on the way, names in lower case. Raises FileNotFoundError where the server has
    no such file (404), PermissionError where it wants to know who asks (401, 403), other OSErrors for the network and the
    disk, and OSError too for a file that came damaged. Nothing is left behind in any of these cases.
    """
    if offline():
        raise ConnectionError("not tried, HF_HUB_OFFLINE is set")
    if urlsplit(url).scheme not in ("http", "https"):
        raise ConnectionError(f"{url} is no http or https address")
    print(f"downloading {url} to {path.parent}", file=sys.stderr)
    unchecked = path.with_name(path.name + ".unchecked")
    talk = Conversation()
    urllib.request.install_opener(urllib.request.build_opener(talk))  # torch.hub asks through the installed opener
    try:
        torch.hub.download_url_to_file(url, str(unchecked), progress=True)
        size = unchecked.stat().st_size
        told_size = talk.told.get("x-linked-size") or talk.told.get("content-length")
        if told_size and told_size.isdigit() and size != int(told_size):
            raise OSError(f"{url} broke off after {size} of {told_size} bytes")
        etag = (talk.told.get("x-linked-etag") or talk.told.get("etag") or "").strip('"')
        expected = sha256 or (etag if re.fullmatch(r"[0-9a-f]{64}", etag) else None)
        if expected and file_sha256(unchecked) != expected:
            raise OSError(f"{url} came damaged: its SHA-256 is {file_sha256(unchecked)}, not {expected}")
        os.replace(unchecked, path)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise PermissionError(f"{url} answers {error.code}: the repository is gated, private or does not exist; where it "
                                  "is gated, accept its licence and set HF_TOKEN") from error
        if error.code == 404:
            raise FileNotFoundError(f"{url} answers 404: not found") from error
        raise OSError(f"{url} answers {error.code}") from error
    except http.client.HTTPException as error:
        raise OSError(f"{url} does not speak HTTP properly: {one_line(error)}") from error
    finally:
        urllib.request.install_opener(None)
        unchecked.unlink(missing_ok=True)
    return talk.told


class Conversation(urllib.request.BaseHandler):
    """Looks over urllib's shoulder during one download: a time limit and the token on the way out, headers on the way in.

    The token goes to the endpoint's own scheme, host and port only, never on to where that redirects (a CDN).
    """

    handler_order = 100  # before urllib's own error and redirect handlers

    def __init__(self):
        self.told: dict[str, str] = {}

    def http_request(self, request):
        request.timeout = TIMEOUT
        token = os.environ.get("HF_TOKEN", "").strip()
        if token and same_site(request.full_url, endpoint()):
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        return request

    def http_response(self, request, response):
        for name in ("x-linked-size", "x-linked-etag", "x-repo-commit"):
            if response.headers.get(name):
                self.told[name] = response.headers[name]
        if response.code == 200:  # a redirect's own length and tag are not the file's
            if response.headers.get("content-length"):
                self.told["content-length"] = response.headers["content-length"]
            if response.headers.get("etag") and same_site(request.full_url, endpoint()):  # elsewhere a tag is any text
                self.told["etag"] = response.headers["etag"]
        return response

    https_request = http_request
    https_response = http_response


def same_site(url: str, other: str) -> bool:
    """Whether two addresses have the same scheme, host and port."""
    return urlsplit(url)[:2] == urlsplit(other)[:2]


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def lock(path: Path):
    """Hold the lock file `path`: processes that start together download once, and the lock dies with its process."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that downloads (lock {path})", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
