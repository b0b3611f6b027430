"""data/hub.py against a loopback server that speaks a hub's resolve URLs. Nothing here leaves this machine."""

import hashlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from data import hub

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A hub and its CDN on two ports. `repos` maps owner/name to {file: bytes}; faults are set per file name.

    As on the real one, a .safetensors file is answered with a redirect to the CDN that carries X-Linked-Size and
    X-Linked-Etag (SHA-256); tokenizer.json redirects within the hub first; small files are answered directly.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.token = None
        self.commit = COMMIT
        self.announce = True  # X-Linked-* headers
        self.faults: dict[str, str] = {}  # file -> cut | short | flip | stall | 500
        self.seen: list[tuple[str, str, str | None]] = []  # (site, path, authorization)
        self.release = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                owner.answer(self, "cdn" if self.server is owner.cdn else "hub")

            def log_message(self, *_):
                pass

        self.hub = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.cdn = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        for server in (self.hub, self.cdn):
            server.daemon_threads = True
            threading.Thread(
                target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
            ).start()
        self.url = f"http://127.0.0.1:{self.hub.server_port}"

    def close(self):
        self.release.set()
        for server in (self.hub, self.cdn):
            server.shutdown()
            server.server_close()

    def asked(self, ending: str, site: str = "hub") -> int:
        return sum(where == site and path.endswith(ending) for where, path, _ in self.seen)

    def answer(self, request, site):
        authorization = request.headers.get("Authorization")
        self.seen.append((site, request.path, authorization))
        parts = request.path.strip("/").split("/")
        if site == "cdn" or parts[0] == "api":
            tag = (
                {"ETag": '"' + "b" * 64 + '"'} if site == "cdn" else {}
            )  # a CDN's tag may be anything
            return self.send_file(
                request, parts[-1], self.repos["/".join(parts[-3:-1])][parts[-1]], tag
            )
        repo, file = "/".join(parts[:2]), "/".join(parts[4:])
        if parts[2] != "resolve" or parts[3] not in ("main", self.commit):
            return self.refuse(request, 404)
        if repo not in self.repos or repo in self.gated and authorization != f"Bearer {self.token}":
            return self.refuse(request, 401)
        if file not in self.repos[repo]:
            return self.refuse(request, 404)
        if self.faults.get(file) == "500":
            return self.refuse(request, 500)
        body = self.repos[repo][file]
        headers = {"X-Repo-Commit": self.commit} if self.commit else {}
        if file.endswith(".safetensors"):
            if self.announce:
                headers["X-Linked-Size"] = str(len(body))
                headers["X-Linked-Etag"] = f'"{hashlib.sha256(body).hexdigest()}"'
            headers["Location"] = f"http://127.0.0.1:{self.cdn.server_port}/cdn/{repo}/{file}"
            return self.send(request, 302, headers, b"moved")
        if file == "tokenizer.json":
            return self.send(
                request,
                307,
                headers | {"Location": f"/api/{repo}/{file}", "ETag": '"' + "0" * 64 + '"'},
                b"",
            )
        blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        self.send_file(request, file, body, headers | {"ETag": f'"{blob}"'})

    def refuse(self, request, code):
        self.send(request, code, {}, b"no")

    def send(self, request, code, headers, body):
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def send_file(self, request, file, body, headers):
        fault = self.faults.get(file)
        if (
            fault == "short"
        ):  # a body that ends early and whose length says so: only the content can tell
            return self.send(request, 200, headers, body[: len(body) // 2])
        if fault == "flip":
            return self.send(request, 200, headers, body[:-3] + bytes([body[-3] ^ 1]) + body[-2:])
        request.send_response(200)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if fault in ("cut", "stall"):
            request.wfile.write(body[: len(body) // 2])
            request.wfile.flush()
            if fault == "stall":
                self.release.wait(30)
            return request.connection.close()
        request.wfile.write(body)


def model_files(shards: int = 1) -> dict[str, bytes]:
    """The files of a made-up model, with random weights and names that only the sharded form has an index for."""
    files = {
        "config.json": b'{"model_type": "qwen3"}',
        "tokenizer.json": b'{"model": {"vocab": {}}}',
        "tokenizer_config.json": b"{}",
        "README.md": b"# not asked for",
        "pytorch_model.bin": b"\x80\x04",
    }
    tensors = {f"layers.{i}.weight": torch.randn(40 + i, 30) for i in range(6)}
    if shards == 1:
        return files | {"model.safetensors": save(tensors)}
    weight_map = {}
    for n in range(shards):
        shard = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[n::shards])
        weight_map |= dict.fromkeys(part, shard)
        files[shard] = save(part)
    return files | {
        "model.safetensors.index.json": json.dumps(
            {"metadata": {}, "weight_map": weight_map}
        ).encode()
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, body in files.items():
        (folder / name).write_bytes(body)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An environment of our own: empty caches, no token, no proxy, and by default no network at all."""
    for name in (
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_TOKEN",
        "HF_ENDPOINT",
        "XDG_CACHE_HOME",
        "HF_HUB_OFFLINE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("SA_CACHE", str(tmp_path / "ours"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server(place, monkeypatch):
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.close()


def message(kind, *args) -> str:
    """The one sentence that find_model or check_folder refuses with."""
    function = hub.find_model if isinstance(args[0], str) else hub.check_folder
    with pytest.raises(kind) as caught:
        function(*args)
    text = str(caught.value)
    assert "\n" not in text and text
    return text


# ----------------------------------------------------------------------------------------------------------------------
# folders


@pytest.mark.parametrize("shards", [1, 3])
def test_a_whole_folder_is_found(place, shards):
    folder = write(place / "mine" / "model", model_files(shards))
    assert hub.find_model(str(folder)) == folder
    assert hub.find_model("mine/model") == Path(
        "mine/model"
    )  # a folder comes before a repository of that name


@pytest.mark.parametrize(
    "missing",
    [
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "model-00002-of-00003.safetensors",
        "model.safetensors.index.json",
    ],
)
def test_a_missing_file_is_named(place, missing):
    files = model_files(shards=1 if missing == "model.safetensors" else 3)
    del files[missing]
    text = message(FileNotFoundError, write(place / "model", files))
    assert missing in text and str(place / "model") in text
    if missing == "model.safetensors":
        assert "pickled weights are not read" in text


@pytest.mark.parametrize("size", [0, 4, 8, 100, 500, -1])
@pytest.mark.parametrize("shards", [1, 2])
def test_truncated_weights_are_named(place, size, shards):
    files = model_files(shards)
    name = [name for name in files if name.endswith(".safetensors")][-1]
    files[name] = files[name][:size]
    assert name in message(ValueError, write(place / "model", files))


def test_weights_with_bytes_too_many_or_an_absurd_header_are_named(place):
    files = model_files()
    assert "model.safetensors" in message(
        ValueError,
        write(place / "a", files | {"model.safetensors": files["model.safetensors"] + b"\0"}),
    )
    assert "model.safetensors" in message(
        ValueError,
        write(
            place / "b", files | {"model.safetensors": (2**62).to_bytes(8, "little") + b"{" * 100}
        ),
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("body", [b"", b'{"a": ', b"[1, 2]", b"\xff\xfe{}", b"[" * 100_000])
def test_broken_json_is_named(place, name, body):
    assert name in message(ValueError, write(place / "model", model_files() | {name: body}))


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ".safetensors", "x.bin", 7]
)
def test_an_index_cannot_point_out_of_its_folder(place, shard):
    files = model_files(2) | {
        "model.safetensors.index.json": json.dumps({"weight_map": {"t": shard}}).encode()
    }
    assert "plain .safetensors file name" in message(ValueError, write(place / "model", files))


def test_a_shard_without_a_tensor_that_the_index_promises(place):
    files = model_files(2)
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"]["lost.weight"] = "model-00001-of-00002.safetensors"
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    text = message(ValueError, write(place / "model", files))
    assert "lost.weight" in text and "model-00001-of-00002.safetensors" in text


@pytest.mark.parametrize(
    "name",
    ["", "nosuch", "./nosuch", "a/b/c", "~/nosuch", "../x/y", "own..er/name", "a/b\n", "x" * 200],
)
def test_a_name_that_means_nothing(place, name):
    text = message(FileNotFoundError, name)
    assert "neither a folder" in text and "qwen-1.5b" in text


def test_a_file_is_no_folder(place):
    folder = write(place / "model", model_files())
    assert "is a file" in message(ValueError, str(folder / "model.safetensors"))


def test_the_embedded_model_is_a_folder_of_this_repository(place, monkeypatch):
    monkeypatch.setattr(hub, "TINY", place / "tiny-of-the-repository")
    assert "data.make_tiny" in message(FileNotFoundError, "tiny")
    write(hub.TINY, model_files())
    assert hub.find_model("tiny") == hub.TINY


# ----------------------------------------------------------------------------------------------------------------------
# the Hugging Face cache


def snapshot(
    cache: Path, repo: str, files: dict[str, bytes], revision: str = COMMIT, main: str | None = None
) -> Path:
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(main or revision)
    return write(folder / "snapshots" / revision, files)


@pytest.mark.parametrize(
    "variable, value, cache",
    [
        ("HF_HOME", "here", "here/hub"),
        ("HF_HUB_CACHE", "there", "there"),
        ("XDG_CACHE_HOME", "xdg", "xdg/huggingface/hub"),
        ("HOME", "home", "home/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_looked_up_where_the_environment_says(
    place, monkeypatch, variable, value, cache
):
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(variable, str(place / value))
    whole = snapshot(place / cache, "Qwen/Qwen2.5-1.5B", model_files(2))
    assert hub.find_model("qwen-1.5b") == whole == hub.find_model("Qwen/Qwen2.5-1.5B")


def test_the_cache_is_read_as_its_own_library_reads_it(place):
    peer = pytest.importorskip("huggingface_hub")
    snapshot(place / "hf" / "hub", "some/model", model_files())
    theirs = peer.try_to_load_from_cache(
        "some/model", "config.json", cache_dir=place / "hf" / "hub"
    )
    assert hub.find_model("some/model") / "config.json" == Path(theirs)


def test_only_a_whole_snapshot_counts(place, server):
    server.repos["some/model"] = model_files()
    files = model_files(3)
    del files["model-00003-of-00003.safetensors"]
    snapshot(place / "hf" / "hub", "some/model", files)
    assert hub.find_model("some/model") == place / "ours" / "some--model"
    del server.repos["some/model"]
    snapshot(place / "hf" / "hub", "some/other", files)
    assert "model-00003-of-00003.safetensors is missing" in message(FileNotFoundError, "some/other")


@pytest.mark.parametrize("main", ["../../../elsewhere", "", "f" * 40])
def test_a_broken_reference_in_the_cache(place, main):
    snapshot(place / "hf" / "hub", "some/model", model_files(), main=main or " ")
    message(FileNotFoundError, "some/model")


# ----------------------------------------------------------------------------------------------------------------------
# downloads


def nothing_whole(place: Path, repo: str) -> bool:
    return not (place / "ours" / repo.replace("/", "--")).exists()


def leftovers(place: Path) -> list[str]:
    return sorted(
        str(p.relative_to(place))
        for p in place.rglob("*")
        if p.name.endswith((".unchecked", ".partial")) and p.is_file()
    )


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("commit, announce", [(COMMIT, True), (None, False)])
def test_download(place, server, shards, commit, announce):
    server.commit, server.announce = commit, announce
    server.repos["Qwen/Qwen2.5-1.5B"] = files = model_files(shards)
    folder = hub.find_model("qwen-1.5b")
    assert folder == place / "ours" / "Qwen--Qwen2.5-1.5B"
    brought = {p.name for p in folder.iterdir()}
    assert brought == set(files) - {"README.md", "pytorch_model.bin"} | {"revision"}
    for name in brought - {"revision"}:
        assert (folder / name).read_bytes() == files[name]
    assert (folder / "revision").read_text() == (commit or "main")
    for path in folder.glob("*.safetensors"):
        load_file(path)
    # all files after the first come from the first one's revision
    assert all(
        f"/resolve/{commit or 'main'}/" in path
        for _, path, _ in server.seen[1:]
        if "/resolve/" in path
    )
    assert len(server.seen) > 4

    server.seen.clear()
    assert (
        hub.find_model("qwen-1.5b") == folder and not server.seen
    )  # the second time nobody is asked
    assert not leftovers(place)


def test_optional_files_may_be_absent(place, server):
    server.repos["some/model"] = files = model_files()
    del files["tokenizer_config.json"]
    assert not (hub.find_model("some/model") / "tokenizer_config.json").exists()


@pytest.mark.parametrize(
    "file, fault, announce",
    [
        *itertools.product(
            ["config.json", "tokenizer.json", "model-00002-of-00003.safetensors"],
            ["cut", "short", "500"],
            [True, False],
        ),
        ("model-00002-of-00003.safetensors", "flip", True),
    ],
)  # of other files no hash is told: a flipped bit cannot be seen
def test_a_damaged_download_leaves_nothing_that_looks_whole(place, server, file, fault, announce):
    server.announce = announce
    server.repos["some/model"] = model_files(3)
    server.faults[file] = fault
    text = message(FileNotFoundError, "some/model")
    assert file in text and str(place / "ours" / "some--model") in text and server.url in text
    assert nothing_whole(place, "some/model") and not leftovers(place)
    assert not (place / "ours" / ".some--model.partial" / file).exists()

    server.faults.clear()
    hub.check_folder(hub.find_model("some/model"))  # and the next try brings it


def test_what_has_come_well_is_not_asked_for_again(place, server):
    server.repos["some/model"] = model_files(3)
    server.faults["model-00003-of-00003.safetensors"] = "cut"
    message(FileNotFoundError, "some/model")
    server.faults.clear()
    hub.find_model("some/model")
    assert server.asked("model-00001-of-00003.safetensors") == 1
    assert server.asked("model-00003-of-00003.safetensors") == 2


@pytest.mark.parametrize(
    "before, commit", [(COMMIT, "f" * 40), (COMMIT, None), (None, COMMIT), (None, None)]
)
def test_files_of_two_revisions_are_never_mixed(place, server, before, commit):
    server.commit = before
    server.repos["some/model"] = model_files(3)
    server.faults["model-00003-of-00003.safetensors"] = "cut"
    message(FileNotFoundError, "some/model")
    server.repos["some/model"] = files = model_files(3)
    server.faults.clear()
    server.commit = commit
    folder = hub.find_model("some/model")
    assert all(
        (folder / name).read_bytes() == files[name]
        for name in files
        if name.endswith(".safetensors")
    )


def test_a_shard_that_does_not_fit_the_index_is_refused_and_forgotten(place, server):
    server.repos["some/model"] = files = model_files(2)
    right = files["model-00002-of-00002.safetensors"]
    files["model-00002-of-00002.safetensors"] = save({"another": torch.zeros(3)})
    assert "no whole model" in message(FileNotFoundError, "some/model")
    assert nothing_whole(place, "some/model")
    files["model-00002-of-00002.safetensors"] = right
    hub.find_model("some/model")


def test_a_stalled_server_does_not_hang(place, server, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 0.3)
    server.repos["some/model"] = model_files()
    server.faults["model.safetensors"] = "stall"
    start = time.monotonic()
    assert "timed out" in message(FileNotFoundError, "some/model")
    assert time.monotonic() - start < 20  # the server would keep it waiting for 30
    assert nothing_whole(place, "some/model") and not leftovers(place)


def test_a_killed_download_leaves_nothing_that_looks_whole(place, server):
    server.repos["some/model"] = model_files(3)
    server.faults["model-00002-of-00003.safetensors"] = "stall"
    child = subprocess.Popen(
        [sys.executable, "-c", "from data.hub import find_model; find_model('some/model')"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not leftovers(place) or not server.asked("model-00002-of-00003.safetensors", "cdn"):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert nothing_whole(place, "some/model")

    server.faults.clear()
    folder = hub.find_model("some/model")
    hub.check_folder(folder)
    assert not leftovers(place) and not list(place.glob("ours/.*.partial"))
    assert server.asked("model-00001-of-00003.safetensors") == 1  # whole before the kill


def test_two_at_once_download_once(place, server):
    server.repos["some/model"] = model_files(2)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(hub.find_model("some/model")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [place / "ours" / "some--model"] * 4
    assert server.asked("model-00001-of-00002.safetensors") == 1


def test_the_token_opens_a_gated_repository_and_stays_at_its_site(place, server, monkeypatch):
    server.repos["google/gemma-3-1b-it"] = model_files()
    server.gated.add("google/gemma-3-1b-it")
    server.token = "hf_secret"
    text = message(FileNotFoundError, "gemma3-1b")
    assert (
        "HF_TOKEN" in text
        and "gated" in text
        and str(place / "ours" / "google--gemma-3-1b-it") in text
    )
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.seen.clear()
    hub.find_model("gemma3-1b")
    assert {authorization for site, _, authorization in server.seen if site == "hub"} == {
        "Bearer hf_secret"
    }
    assert {authorization for site, _, authorization in server.seen if site == "cdn"} == {None}
    assert "hf_secret" not in message(FileNotFoundError, "no/such")


def test_no_token_is_sent_where_none_is_set(place, server):
    server.repos["some/model"] = model_files()
    hub.find_model("some/model")
    assert {authorization for _, _, authorization in server.seen} == {None}


def test_missing_repository_and_missing_weights(place, server):
    assert "no/such" in message(FileNotFoundError, "no/such")
    server.repos["some/pickle"] = files = model_files()
    del files["model.safetensors"]
    assert "model.safetensors.index.json" in message(FileNotFoundError, "some/pickle")


def test_offline_means_no_connection(place, server, monkeypatch):
    server.repos["some/model"] = model_files()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = message(FileNotFoundError, "some/model")
    assert "HF_HUB_OFFLINE" in text and not server.seen
    assert not (place / "ours").exists()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub.find_model("some/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.find_model("some/model")  # what is here needs no network


def test_nobody_there(place):
    text = message(FileNotFoundError, "qwen-1.5b")
    for said in (
        "Qwen/Qwen2.5-1.5B",
        str(place / "hf" / "hub" / "models--Qwen--Qwen2.5-1.5B"),
        str(place / "ours" / "Qwen--Qwen2.5-1.5B"),
        "http://127.0.0.1:9",
    ):
        assert said in text


@pytest.mark.parametrize("address", ["huggingface.co", "file:///etc", "ftp://x"])
def test_an_endpoint_that_is_no_web_address(place, monkeypatch, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert "no http or https address" in message(FileNotFoundError, "qwen-1.5b")


def test_something_that_is_no_web_server(place, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"220 ready\r\n")

        threading.Thread(target=talk, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert "HTTP" in message(FileNotFoundError, "qwen-1.5b")


def test_a_cache_that_cannot_be_written(place, server, monkeypatch):
    server.repos["some/model"] = model_files()
    (place / "ours").write_text("a file where the folder should be")
    assert str(place / "ours") in message(FileNotFoundError, "some/model")


def test_a_folder_filled_by_hand_is_used_or_its_fault_named(place, server):
    files = model_files()
    del files["tokenizer.json"]
    folder = write(place / "ours" / "some--model", files)
    assert "tokenizer.json is missing" in message(FileNotFoundError, "some/model")
    (folder / "tokenizer.json").write_bytes(b"{}")
    assert hub.find_model("some/model") == folder and not server.seen
