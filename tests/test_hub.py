"""data/hub.py against a loopback server that speaks a hub's resolve URLs, without any network."""
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from data import hub

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
JSON_FILES = ["config.json", "tokenizer.json"]
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
BROKEN = [b"", b'{"a": ', b"[1, 2]", b"\xff\xfe{}", b"[" * 100_000, b"<!DOCTYPE html>",
          (2**62).to_bytes(8, "little") + b"{" * 100]
OUTSIDE = ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ".safetensors", "x.bin", 7]
NOTHING = ["", "nosuch", "./nosuch", "a/b/c", "~/nosuch", "../x/y", "a/b\n", "x" * 200]


class Hub(BaseHTTPRequestHandler):
    """A hub and its CDN in one, with the state that the fixture `server` gives it.

    As on the real one, a .safetensors file is answered with a redirect to the CDN (another host
    name) that carries X-Linked-Etag (SHA-256), and the CDN knows ranges;
    tokenizer.json redirects within the hub first; small files are answered directly.
    """

    def do_GET(self):
        site = "cdn" if self.headers["Host"].startswith("localhost") else "hub"
        authorization = self.headers["Authorization"]
        self.seen.append((site, self.path, authorization))
        parts = self.path.strip("/").split("/")
        repo, file = "/".join(parts[:2]), parts[-1]
        if repo not in self.repos or repo in self.gated and site == "hub" and not authorization:
            return self.send(401)
        known = site == "cdn" or parts[3] in ("main", self.commit, "api")
        if not known or file not in self.repos[repo]:
            return self.send(404)
        fault, body = self.faults.get(file), self.repos[repo][file]
        headers = {"X-Repo-Commit": self.commit} if self.commit else {}
        if fault == "500":
            return self.send(500)
        if fault == "no HTTP":
            return self.wfile.write(b"220 ready\r\n")
        if file.endswith(".safetensors") and site == "hub":
            if self.announce:
                headers["X-Linked-Etag"] = f'"{hashlib.sha256(body).hexdigest()}"'
            there = f"http://localhost:{self.server.server_port}{self.path}"
            return self.send(302, headers | {"Location": there})
        if file == "tokenizer.json" and parts[3] != "api":
            return self.send(307, headers | {"Location": f"/{repo}/resolve/api/{file}"})

        code, whole = 200, len(body)
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if start and self.ranges:
            if start >= whole:
                return self.send(416)
            code, body = 206, body[start:]
            headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
        if fault == "flip":
            body = body[:-3] + bytes([body[-3] ^ 1]) + body[-2:]
        length = len(body) // 2 if fault in ("cut", "short", "stall") else len(body)
        told = length if fault == "short" else len(body)
        self.send(code, headers, body[:length], told)
        if fault == "stall":
            self.release.wait(30)

    def send(self, code, headers=None, body=b"no", length=2):
        self.send_response(code)
        for name, value in {"Content-Length": str(length), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        type(self).sent += len(body)  # before the client can have it
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *_):
        pass


def model_files(shards: int = 1) -> dict[str, bytes]:
    """The files of a made-up model with random weights."""
    files = {"config.json": b'{"model_type": "qwen3"}', "tokenizer.json": b'{"model": {}}'}
    files |= {"tokenizer_config.json": b"{}"}  # there is no generation_config.json
    files |= {"README.md": b"# not asked for", "pytorch_model.bin": b"\x80\x04"}
    tensors = {f"layers.{i}.weight": torch.randn(40 + i, 30) for i in range(6)}
    if shards == 1:
        return files | {"model.safetensors": save(tensors)}
    weight_map = {}
    for n in range(shards):
        shard = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[n::shards])
        weight_map |= dict.fromkeys(part, shard)
        files[shard] = save(part)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    return files | {INDEX: index.encode()}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, body in files.items():
        (folder / name).write_bytes(body)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Empty caches, no token, no proxy, and by default no network at all."""
    for name in ("HF_HUB_CACHE", "HF_TOKEN", "XDG_CACHE_HOME", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("SA_CACHE", str(tmp_path / "ours"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server(place, monkeypatch):
    state = dict(
        repos={},  # owner/name -> {file: body}
        gated=set(),
        commit=COMMIT,  # X-Repo-Commit, or None
        announce=True,  # send X-Linked-Etag
        ranges=True,  # know the Range header
        faults={},  # file -> cut (half comes), short (as told), flip (a bit), stall, 500, no HTTP
        seen=[],  # (site, path, authorization)
        sent=0,  # bytes of bodies
        release=threading.Event(),  # ends a stall
    )
    handler = type("Handler", (Hub,), state)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield handler
    handler.release.set()
    server.shutdown()
    server.server_close()


def asked(server, ending: str, site: str = "hub") -> int:
    return sum(where == site and path.endswith(ending) for where, path, _ in server.seen)


def message(name, kind=FileNotFoundError) -> str:
    """The one sentence that find_model or check_folder refuses with."""
    function = hub.find_model if isinstance(name, str) else hub.check_folder
    with pytest.raises(kind) as caught:
        function(name)
    text = str(caught.value)
    assert "\n" not in text and text
    return text


# ---- folders ----


@pytest.mark.parametrize("shards", [1, 3])
def test_a_whole_folder_is_found(place, shards):
    folder = write(place / "mine" / "model", model_files(shards))
    assert hub.find_model(str(folder)) == folder
    assert hub.find_model("mine/model") == Path("mine/model")  # a folder before a repository


@pytest.mark.parametrize("missing", [*JSON_FILES, INDEX, SHARDS[1]])
def test_a_missing_file_is_named(place, missing):
    files = model_files(3)
    del files[missing]
    text = message(write(place / "model", files))
    assert str(place / "model") in text and missing in text
    assert ("pickled weights" in text) == (missing == INDEX)


@pytest.mark.parametrize("name", [*JSON_FILES, INDEX, SHARDS[1]])
@pytest.mark.parametrize("body", BROKEN)
def test_a_broken_file_is_named(place, name, body):
    folder = write(place / "model", model_files(3) | {name: body})
    assert str(folder / name) in message(folder, ValueError)


@pytest.mark.parametrize("length", [4, 8, 100, 500, -2, None])  # None: a byte too many
def test_weights_too_short_or_too_long_are_named(place, length):
    files = model_files()
    files["model.safetensors"] = (files["model.safetensors"] + b"\0")[:length]
    assert "model.safetensors" in message(write(place / "model", files), ValueError)


@pytest.mark.parametrize("weight_map", [*({"t": name} for name in OUTSIDE), {}, None, ["a"]])
def test_an_index_cannot_point_out_of_its_folder(place, weight_map):
    files = model_files(3) | {INDEX: json.dumps({"weight_map": weight_map}).encode()}
    assert "plain .safetensors" in message(write(place / "model", files), ValueError)


@pytest.mark.parametrize("name", [*NOTHING, "model/config.json"])
def test_a_name_that_means_nothing(place, name):
    write(place / "model", model_files())  # config.json is there, but it is a file
    text = message(name)
    assert "neither a folder" in text and "qwen-1.5b" in text


def test_the_embedded_model_is_a_folder_of_this_repository(place):
    assert hub.find_model("tiny") == hub.TINY == ROOT / "data" / "tiny"


def snapshot(cache: Path, repo: str, files: dict[str, bytes], main: str = COMMIT) -> Path:
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(main)
    return write(folder / "snapshots" / COMMIT, files)


@pytest.mark.parametrize("variable, cache", [
    ("HF_HOME", "hub"), ("HF_HUB_CACHE", ""),
    ("XDG_CACHE_HOME", "huggingface/hub"), ("HOME", ".cache/huggingface/hub"),
])
def test_the_cache_is_where_the_environment_says(place, monkeypatch, variable, cache):
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(variable, str(place / "there"))
    whole = snapshot(place / "there" / cache, "Qwen/Qwen2.5-1.5B", model_files(3))
    assert hub.find_model("qwen-1.5b") == whole == hub.find_model("Qwen/Qwen2.5-1.5B")


def test_the_cache_is_read_as_its_own_library_reads_it(place):
    library = pytest.importorskip("huggingface_hub")
    cache = place / "hf" / "hub"
    snapshot(cache, "some/model", model_files())
    theirs = library.try_to_load_from_cache("some/model", "config.json", cache_dir=cache)
    assert hub.find_model("some/model") / "config.json" == Path(theirs)


def test_only_a_whole_snapshot_counts(place, server):
    server.repos["some/model"] = model_files()
    files = model_files(3)
    del files[SHARDS[2]]
    snapshot(place / "hf" / "hub", "some/model", files)
    assert hub.find_model("some/model") == place / "ours" / "some--model"
    snapshot(place / "hf" / "hub", "some/other", files)
    assert f"{SHARDS[2]} is missing" in message("some/other")
    for repo, main in (("a/a", "../../../elsewhere"), ("b/b", ""), ("c/c", "f" * 40)):
        snapshot(place / "hf" / "hub", repo, model_files(), main)  # a broken refs/main
        message(repo)


def test_a_copied_cache_without_refs(place):
    repo = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    whole = snapshot(place / "hf" / "hub", repo, model_files())
    main = whole.parent.parent / "refs" / "main"
    main.unlink()
    main.parent.rmdir()
    assert hub.find_model("r1-distill-1.5b") == whole
    (whole.parent / "another").mkdir()
    assert "refs/main" in message("r1-distill-1.5b")  # which of two is not guessed


def test_every_short_name_is_a_repository():
    assert hub.MODELS.keys() >= {"r1-distill-1.5b", "llama-3.2-1b", "qwen-math-1.5b"}
    for name, repo in list(hub.MODELS.items())[1:]:
        assert re.fullmatch(hub.REPOSITORY, repo), name
    assert {"chat_template.jinja", "chat_template.json", "special_tokens_map.json"} < {*hub.FILES}


# ---- downloads ----


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("commit, announce", [(COMMIT, True), (None, False)])
def test_download(place, server, shards, commit, announce):
    server.commit, server.announce = commit, announce
    server.repos["Qwen/Qwen2.5-1.5B"] = files = model_files(shards)
    folder = hub.find_model("qwen-1.5b")
    assert folder == place / "ours" / "Qwen--Qwen2.5-1.5B"
    brought = {p.name for p in folder.iterdir()} - {"revision"}
    assert brought == set(files) - {"README.md", "pytorch_model.bin"}
    for name in brought:
        assert (folder / name).read_bytes() == files[name]
    for path in folder.glob("*.safetensors"):
        load_file(path)
    # All files after the first come from the first one's revision.
    assert len(server.seen) > 4
    for _, path, _ in server.seen[1:]:
        assert f"/resolve/{commit or 'main'}/" in path or "/api/" in path
    server.seen.clear()
    assert hub.find_model("qwen-1.5b") == folder and not server.seen  # nobody is asked again


@pytest.mark.parametrize("file, fault, kind", [
    *itertools.product([*JSON_FILES, SHARDS[1]], ["cut", "500", "stall"], [FileNotFoundError]),
    ("config.json", "no HTTP", FileNotFoundError),
    *itertools.product(JSON_FILES, ["short"], [ValueError]),
    *itertools.product([SHARDS[1]], ["short", "flip"], [FileNotFoundError]),  # its hash is told
    (SHARDS[1], "short", ValueError),  # not told, but its header says how long it should be
])
def test_a_damaged_download_looks_damaged(place, server, monkeypatch, file, fault, kind):
    monkeypatch.setattr(hub, "TIMEOUT", 0.3)
    server.announce = kind is FileNotFoundError
    server.repos["some/model"] = files = model_files(3)
    server.faults[file] = fault
    text = message("some/model", kind)
    assert ("timed out" if fault == "stall" else file) in text
    assert ("does not speak HTTP" in text) == (fault == "no HTTP")
    assert not (place / "ours" / "some--model").exists()
    assert not (place / "ours" / ".some--model.partial" / file).exists()
    server.faults.clear()
    folder = hub.find_model("some/model")  # and the next try brings it
    assert (folder / file).read_bytes() == files[file] and not list(folder.glob("*.part"))


def interrupted(server) -> dict[str, bytes]:
    """The files of some/model, whose download has broken off within the third shard."""
    server.repos["some/model"] = files = model_files(3)
    server.faults[SHARDS[2]] = "cut"
    message("some/model")
    server.faults.clear()
    return files


@pytest.mark.parametrize("ranges", [True, False])
def test_what_has_come_is_not_asked_for_again(place, server, ranges):
    server.ranges = ranges
    last = interrupted(server)[SHARDS[2]]
    server.sent = 0
    assert (hub.find_model("some/model") / SHARDS[2]).read_bytes() == last
    assert asked(server, SHARDS[0]) == 1 and asked(server, SHARDS[2]) == 2
    assert (server.sent < len(last)) == ranges  # within a file too, by a range


def test_a_kill_between_the_last_byte_and_the_renaming(place, server):
    last = interrupted(server)[SHARDS[2]]
    (place / "ours" / ".some--model.partial" / f"{SHARDS[2]}.part").write_bytes(last)
    assert "416" in message("some/model")
    assert (hub.find_model("some/model") / SHARDS[2]).read_bytes() == last


@pytest.mark.parametrize("before", [COMMIT, None])
@pytest.mark.parametrize("commit", ["f" * 40, None])
def test_files_of_two_revisions_are_never_mixed(place, server, before, commit):
    server.commit = before
    interrupted(server)
    server.commit = commit
    server.repos["some/model"] = files = model_files(3)
    folder = hub.find_model("some/model")
    assert [(folder / name).read_bytes() for name in SHARDS] == [files[name] for name in SHARDS]


def test_a_killed_download_leaves_nothing_that_looks_whole_and_goes_on(place, server):
    server.repos["some/model"] = files = model_files(3)
    server.faults[SHARDS[1]] = "stall"
    code = "from data.hub import find_model; find_model('some/model')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not asked(server, SHARDS[1], "cdn"):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        child.kill()
        child.wait()
    assert not (place / "ours" / "some--model").exists()
    server.faults.clear()
    folder = hub.find_model("some/model")  # the lock has died with its process
    assert all((folder / name).read_bytes() == files[name] for name in SHARDS)
    assert not list(place.rglob("*.part*")) and asked(server, SHARDS[0]) == 1


def test_four_at_once_download_once(place, server):
    server.repos["some/model"] = model_files(3)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(hub.find_model, ["some/model"] * 4))
    assert found == [place / "ours" / "some--model"] * 4
    assert asked(server, SHARDS[0]) == 1


def test_the_token_opens_a_gated_repository_and_stays_at_its_site(place, server, monkeypatch):
    server.repos["google/gemma-3-1b-it"] = model_files()
    server.gated.add("google/gemma-3-1b-it")
    text = message("gemma3-1b")
    assert "HF_TOKEN" in text and "gated" in text and "401" in text
    assert [shown for _, _, shown in server.seen] == [None]
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.seen.clear()
    hub.find_model("gemma3-1b")
    shown = {(site, authorization) for site, _, authorization in server.seen}
    assert shown == {("hub", "Bearer hf_secret"), ("cdn", None)}
    assert "hf_secret" not in message("no/such")


def test_pickled_weights_are_not_taken(place, server):
    server.repos["some/pickle"] = model_files()
    del server.repos["some/pickle"]["model.safetensors"]
    assert "pickled weights" in message("some/pickle")


def test_offline_means_no_connection(place, server, monkeypatch):
    server.repos["some/model"] = model_files()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in message("some/model")
    assert not server.seen and not (place / "ours").exists()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub.find_model("some/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.find_model("some/model")  # what is here needs no network


def test_what_cannot_be_reached_or_written(place, monkeypatch):
    text = message("qwen-1.5b")
    cached = place / "hf" / "hub" / "models--Qwen--Qwen2.5-1.5B"
    for said in (cached, place / "ours" / "Qwen--Qwen2.5-1.5B", "http://127.0.0.1:9/Qwen/Qwen2.5-"):
        assert str(said) in text
    monkeypatch.setenv("HF_ENDPOINT", "huggingface.co")
    assert "unknown url type" in message("qwen-1.5b", ValueError)
    (place / "file").write_text("a file where the folder should be")
    monkeypatch.setenv("SA_CACHE", str(place / "file"))
    assert "File exists" in message("qwen-1.5b")


def test_a_folder_filled_by_hand_is_used_or_its_fault_named(place, server):
    files = model_files()
    del files["tokenizer.json"]
    folder = write(place / "ours" / "some--model", files)
    assert "tokenizer.json is missing" in message("some/model")
    (folder / "tokenizer.json").write_bytes(b"{}")
    assert hub.find_model("some/model") == folder and not server.seen
