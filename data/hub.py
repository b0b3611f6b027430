"""Where checkpoints come from: `find_model` turns a name into a folder that holds config.json,
tokenizer.json, and model.safetensors or the shards that model.safetensors.index.json names.

    1. a short name of MODELS stands for a folder of ours or for a repository, owner/name
    2. a folder on this machine
    3. the Hugging Face cache    (HF_HUB_CACHE, else $HF_HOME/hub, else ~/.cache/huggingface/hub)
    4. our own cache             (SA_CACHE, else ~/.cache/self-aligned-reward)
    5. a download into our cache (from HF_ENDPOINT, else https://huggingface.co)

HF_TOKEN is sent to the endpoint, and only there. With HF_HUB_OFFLINE=1 nothing is downloaded.
"""
import contextlib
import http.client
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from data.files import file_sha256, lock, one_line, open_tensors, read_json
from data.tokenizer import FILES

TINY = Path(__file__).resolve().parent / "tiny"
MODELS = {  # as the paper trains base models, Qwen names without "instruct" are base models
    "tiny": str(TINY),
    "qwen-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen-1.5b-instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B-Base",
    "qwen3-4b": "Qwen/Qwen3-4B-Base",
    "phi-3.5-mini": "microsoft/Phi-3.5-mini-instruct",
    "gemma3-1b": "google/gemma-3-1b-it",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "qwen-math-1.5b": "Qwen/Qwen2.5-Math-1.5B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "r1-distill-1.5b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
}
REPOSITORY = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"  # owner/name
SHARD = r"[A-Za-z0-9][\w.-]*\.safetensors"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TIMEOUT = 30  # seconds without a byte after which a download fails


def find_model(name_or_folder: str | Path) -> Path:
    """The folder of a model, checked. Raises FileNotFoundError or, for a broken one, ValueError."""
    name = str(name_or_folder)
    repo = MODELS.get(name, name)
    folder = Path(os.path.expanduser(repo))
    if repo and folder.is_dir():
        return check_folder(folder)
    if folder.is_file() or not re.fullmatch(REPOSITORY, repo, re.ASCII):
        raise FileNotFoundError(f"model {name!r} is neither a folder, nor a repository "
                                f"(owner/name), nor one of {', '.join(MODELS)}")
    try:
        return check_folder(cached_snapshot(repo))
    except (ValueError, OSError) as error:
        not_cached = one_line(error)
    ours = cache_folder() / repo.replace("/", "--")
    try:
        if not ours.is_dir():
            download_model(repo, ours)
    except OSError as error:  # of the network, or of a full disk or an unwritable folder
        raise FileNotFoundError(
            f"model {name!r} is no folder, not in the Hugging Face cache ({not_cached}), not in "
            f"{ours}, and not to be had from {endpoint()}/{repo} ({one_line(error)}): give --model "
            "its folder (is it gated? accept its licence, set HF_TOKEN)") from error
    return check_folder(ours)


def check_folder(folder: Path) -> Path:
    """`folder`, if it is a whole model; else FileNotFoundError or ValueError that names a file."""
    read_json(folder / "config.json")
    read_json(folder / "tokenizer.json")
    for name in weight_files(folder):
        open_tensors(folder / name)  # the file is as long as its own header says
    return folder


def weight_files(folder: Path) -> list[str]:
    """The file with the weights, or the shards that the index names. Raises as check_folder."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS} and no {INDEX} with its shards "
                                "(pickled weights, .bin or .pt, are not read)")
    weight_map = read_json(folder / INDEX).get("weight_map")
    shards = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    # A name from outside becomes a path: it must not lead out of the folder.
    if not shards or not all(re.fullmatch(SHARD, shard, re.ASCII) for shard in shards):
        raise ValueError(f"{folder / INDEX}: its weight_map should hold plain .safetensors file "
                         f"names, not {shards}"[:300])
    return shards


def cached_snapshot(repo: str) -> Path:
    """Where the Hugging Face cache keeps the main revision of a repository, or in a copy without
    refs/ the only one. Raises OSError."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    folder = hub / f"models--{repo.replace('/', '--')}"
    main, snapshots = folder / "refs" / "main", list(folder.glob("snapshots/*"))
    if len(snapshots) == 1 and not main.exists():
        return snapshots[0]
    return folder / "snapshots" / main.read_text().strip()


def cache_folder() -> Path:
    """Our own cache. Models lie in owner--name/, problems in data/."""
    return Path(os.environ.get("SA_CACHE") or "~/.cache/self-aligned-reward").expanduser()


def endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


@contextlib.contextmanager
def download_lock(path: Path) -> Iterator[None]:
    """One process downloads and others wait. Raises ConnectionError when offline."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true"):
        raise ConnectionError("not tried, HF_HUB_OFFLINE is set")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        with contextlib.suppress(OSError):  # no locks: two may download at once
            lock(file)
        yield


def download_model(repo: str, target: Path):
    """Download a model into `target`, which appears whole or not at all. An interrupted download
    goes on in .NAME.partial. Raises OSError, or ValueError where what came is no whole model."""
    partial = target.with_name(f".{target.name}.partial")
    with download_lock(target.with_name(f".{target.name}.lock")):
        if target.is_dir():  # another process brought it while this one waited
            return
        partial.mkdir(exist_ok=True)
        for old in partial.glob("config.json*"):
            old.unlink()
        source = f"{endpoint()}/{repo}/resolve"
        headers = download(f"{source}/main/config.json", partial / "config.json")
        revision = headers.get("x-repo-commit", "main")  # all files must come from one revision
        note = partial / "revision"
        if revision == "main" or not note.is_file() or note.read_text() != revision:
            for old in set(partial.iterdir()) - {partial / "config.json"}:
                old.unlink()
            note.write_text(revision)
        try:
            for file in [*FILES, WEIGHTS, INDEX]:
                with contextlib.suppress(FileNotFoundError):  # check_folder knows what is needed
                    download(f"{source}/{revision}/{file}", partial / file)
            for file in weight_files(partial):
                download(f"{source}/{revision}/{file}", partial / file)
            check_folder(partial)
        except ValueError:  # every file came well by size and hash, but together they are no model
            shutil.rmtree(partial)
            raise
        os.rename(partial, target)


def download(url: str, path: Path, sha256: str = "") -> dict[str, str]:
    """Download a file, unless it is here. It gets its name when its length and its hash are right
    (`sha256`, else what the hub tells). Returns the headers. Raises FileNotFoundError where there
    is no such file, other OSErrors for all else."""
    if path.is_file():
        return {}
    part = path.with_name(f"{path.name}.part")
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    handler = HubHandler()
    try:
        with urllib.request.build_opener(handler).open(request, timeout=TIMEOUT) as answer:
            have = have if answer.status == 206 else 0  # else the server sends the whole file
            bar = tqdm.wrapattr(answer, "read", total=have + (answer.length or 0), initial=have,
                                desc=path.name)
            with bar as body, open(part, "ab" if have else "wb") as file:
                shutil.copyfileobj(body, file)
            if answer.length:
                raise OSError(f"{url} broke off, {answer.length} bytes before its end")
    except urllib.error.HTTPError as error:
        if error.code == 416:  # what is here is as long as the file or longer: begin anew
            part.unlink(missing_ok=True)
        kind = FileNotFoundError if error.code == 404 else OSError
        raise kind(f"{url} answers {error.code}") from error
    except http.client.HTTPException as error:
        raise OSError(f"{url} does not speak HTTP ({one_line(error)})") from error
    expected = sha256 or handler.headers.get("x-linked-etag", "").strip('"')
    if len(expected) == 64 and file_sha256(part) != expected:
        part.unlink()
        raise OSError(f"{url} came damaged: its SHA-256 is not {expected}")
    os.replace(part, path)
    return handler.headers


class HubHandler(urllib.request.BaseHandler):
    """Adds the token to requests to the endpoint, and keeps the headers of every answer."""

    def __init__(self):
        self.headers = {}

    def http_request(self, request):
        token = os.environ.get("HF_TOKEN", "").strip()
        if token and urlsplit(request.full_url)[:2] == urlsplit(endpoint())[:2]:
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        return request

    def http_response(self, request, response):
        self.headers |= {name.lower(): value for name, value in response.headers.items()}
        return response

    https_request, https_response = http_request, http_response
