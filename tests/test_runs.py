"""runtime/runs.py and runtime/parallel.py: two jobs, changed logs, signals, other systems."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, lines, metrics, slow

import train_sa_grpo
from data import files
from runtime import runs as runs_module

SMALL = ("--prompts-per-step 2 --minibatch 2 --samples 2 --max-new-tokens 32 --eval-every 0 "
         "--save-every 2").split()


def train(*argv):
    train_sa_grpo.main([*SMALL, *map(str, argv)])


def resume(*argv):
    train_sa_grpo.main(["--resume", *map(str, argv)])


def test_a_second_job_is_refused_until_the_first_is_killed(runs):
    command = [sys.executable, "train_sa_grpo.py", *SMALL, "--name", "t", "--steps", "100000"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"SA_RUNS": str(runs)})
    deadline = time.time() + 60
    while time.time() < deadline and not (runs / "t" / "step_000002").exists():
        time.sleep(0.05)
    for second in (resume, train):
        with pytest.raises(ValueError, match=f"in use by process {process.pid} on .* since .*20"):
            second("--name", "t")
    process.send_signal(signal.SIGSTOP)  # so that nothing changes while it is copied
    shutil.copytree(runs / "t", runs / "copy")  # as to another machine
    process.kill()
    process.communicate()
    done = json.loads(max(runs.glob("t/step_*[0-9]/state.json")).read_text())["step"]
    resume("--name", "t", "--steps", done + 1)
    assert [m["step"] for m in metrics(runs / "t")] == list(range(1, done + 2))
    resume("--name", "copy", "--steps", 3)
    assert metrics(runs / "copy")[:3] == metrics(runs / "t")[:3]


@pytest.mark.parametrize("why", ["system", "disk"])
def test_where_there_are_no_locks_a_note_says_so(runs, why, monkeypatch, capsys):
    def flock(*args):
        raise OSError(95, "Operation not supported")
    broken = None if why == "system" else SimpleNamespace(flock=flock, LOCK_EX=0, LOCK_NB=0)
    monkeypatch.setattr(files, "fcntl", broken)
    train("--name", "n", "--steps", 1)
    assert "is not locked" in capsys.readouterr().err


def test_logs_that_were_changed_are_not_cut_in_silence(runs, capsys):
    train("--name", "a", "--steps", 2)
    log = runs / "a" / "metrics.jsonl"
    whole = log.read_bytes()
    assert whole.endswith(b"}\n") and whole.count(b"\n") == 2
    for changed in (whole[:-5], whole[:30], b"{}\n" + whole, whole.replace(b"\n", b"", 1)):
        log.write_bytes(changed)
        with pytest.raises(ValueError, match="metrics.jsonl was changed: .* or move it away"):
            resume("--name", "a", "--steps", 3)
        assert log.read_bytes() == changed
    log.write_bytes(whole + b"a note of mine\n")
    resume("--name", "a", "--steps", 3)
    assert f"has {len(whole) + 15} bytes, {len(whole)} after step 2" in capsys.readouterr().err
    assert log.read_bytes().startswith(whole) and len(metrics(runs / "a")) == 3
    log.unlink()  # the others are as they were
    resume("--name", "a", "--steps", 4)
    said = capsys.readouterr().err
    assert said.count("bytes, ") == 1 and "metrics.jsonl has 0 bytes" in said
    assert [m["step"] for m in metrics(runs / "a")] == [4]


@pytest.mark.parametrize("call, saved, evaluated", [(1, 0, []), (2, 3, [0])])
def test_a_signal_in_an_evaluation_loses_nothing(runs, tmp_path, monkeypatch, capsys, call, saved,
                                                 evaluated):
    """It stops at once, because the steps so far are saved; --resume evaluates after all."""
    rows = [{"question": f"Tom has {i} cups. How many?", "answer": f"{i}"} for i in range(20)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--data", tmp_path / "data.jsonl", "--steps", 4, "--eval-every", 3, "--save-every",
             100, "--name"]
    calls, evaluate = [], train_sa_grpo.evaluate

    def interrupted(*args):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        return evaluate(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train_sa_grpo, "evaluate", interrupted)
        began = time.time()
        with pytest.raises(SystemExit) as stop:
            train(*flags, "stopped")
        assert stop.value.code == 128 + signal.SIGTERM and time.time() - began < 29
    assert "note: stopped, --resume goes on" in capsys.readouterr().err
    folder = runs / "stopped"
    states = [json.loads(state.read_text())["step"] for state in folder.glob("step_*/state.json")]
    assert states == [saved][:saved]
    assert [e["step"] for e in lines(folder / "evals.jsonl")] == evaluated
    resume("--name", "stopped")
    train(*flags, "undisturbed")
    for name in ("evals.jsonl", "completions.jsonl"):
        assert (folder / name).read_bytes() == (runs / "undisturbed" / name).read_bytes()
    assert [e["step"] for e in lines(folder / "evals.jsonl")] == [0, 3, 4]


def test_the_disk_must_hold_two_checkpoints(runs, monkeypatch):
    size = 12 * sum(p.numel() for p in train_sa_grpo.GPT.from_pretrained(ROOT / "data/tiny")
                    .parameters())
    free = SimpleNamespace(free=2 * size - 1)
    monkeypatch.setattr(runs_module.shutil, "disk_usage", lambda path: free)
    with pytest.raises(ValueError, match="for a while there are two"):
        train("--name", "full")
    free.free += 1
    train("--name", "room", "--steps", 1)
    free.free = size  # the old one is there already
    resume("--name", "room", "--steps", 2)


def test_runs_that_teach_nothing_say_so_after_five_steps(runs, capsys):
    train("--name", "mute", "--steps", 5, "--max-new-tokens", 3, "--reward", "vr")
    said = capsys.readouterr().err
    assert said.count("more than 90 % of the answers of five steps are unfinished") == 1
    assert said.count("no group had any signal in five steps") == 1

    def told(unfinished, signals):
        run = SimpleNamespace(early=[])
        for share, signal_here in zip(unfinished, signals):
            answers = [SimpleNamespace(advantage=torch.tensor(a)) for a in (0.0, signal_here)]
            runs_module.Run.look_out(run, answers, share)
        said = capsys.readouterr().err
        return "unfinished" in said, "signal" in said
    assert told([1.0] * 4, [0.0] * 4) == (False, False)  # not yet
    assert told([1.0] * 4 + [0.5], [0.0] * 4 + [-0.1]) == (False, False)
    assert told([1.0] * 4 + [0.6], [0.0] * 4 + [-0.1]) == (True, False)
    assert told([0.0] * 5 + [1.0] * 5, [0.0] * 10) == (False, True)  # once


def test_a_model_without_a_stop_token_is_told_before_the_first_step(runs, tmp_path, capsys):
    folder = shutil.copytree(ROOT / "data/tiny", tmp_path / "m")
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        content = json.loads((folder / name).read_text())
        kept = {key: value for key, value in content.items() if not key.startswith("eos")}
        (folder / name).write_text(json.dumps(kept))
    flags = ["--data", "tiny", "--steps", 1, "--max-prompt-tokens", 128, "--model"]
    train(*flags, ROOT / "data/tiny", "--name", "with")
    assert "ends an answer" not in capsys.readouterr().err
    train(*flags, folder, "--name", "without")
    said = capsys.readouterr().err
    assert f"no file in {folder} names a token that ends an answer" in said.split("0/1")[0]
    assert not any(a["finished"] for a in lines(runs / "without" / "completions.jsonl"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_wait_for_processes_that_nobody_started_is_said(rank):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = ("import os, threading; threading.Timer(30, os._exit, [1]).start(); from runtime import "
            "parallel; parallel.PATIENCE = 0.5; parallel.join_processes()")
    env = os.environ | {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, text=True,
                               stderr=subprocess.PIPE)
    said = process.stderr.readline()
    process.kill()
    process.communicate()
    assert "note: waiting for the other processes of WORLD_SIZE=2" in said
    assert f"(this is RANK={rank})" in said


HIDE = """
import os, sys
sys.modules.update(dict.fromkeys(("fcntl", "resource", "pwd", "grp", "termios")))
for name in ("sync", "sysconf", "fork", "getuid"):
    delattr(os, name)
exists = os.path.exists
os.path.exists = lambda path: not str(path).startswith("/proc") and exists(path)
import rollout, train_sa_ppo, train_sa_grpo, evaluate, view.tokens, view.curves, view.answers
assert rollout.available_memory() == 2**32
train_sa_grpo.main([*sys.argv[1:], "--name", "n", "--steps", "1"])
train_sa_grpo.main(["--name", "n", "--resume", "--steps", "2"])
evaluate.main("--limit 2 --max-new-tokens 4 --name e".split())
"""


@slow
def test_without_what_windows_lacks(tmp_path):
    """No module fails to import; a run, its resumption and an evaluation end."""
    done = subprocess.run([sys.executable, "-c", HIDE, *SMALL], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"SA_RUNS": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert [m["peak_memory_gb"] for m in lines(tmp_path / "n" / "metrics.jsonl")] == [None] * 2
    assert (tmp_path / "e" / "results.json").exists()
