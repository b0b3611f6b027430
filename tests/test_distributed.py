"""The training scripts under torchrun (gloo, CPU): the same run for any number of processes.

SA_SLOW=1 adds what takes minutes: failures, kills, two nodes, extreme raggedness.
"""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, TIMES, lines, slow
from safetensors import safe_open
from safetensors.torch import load_file

from bench import memory
from data import files
from model import GPT, GPTConfig
from runtime import parallel
from sar import micro_batches

GRPO = ("--prompts-per-step 6 --minibatch 3 --samples 3 --max-new-tokens 40 --eval-every 0 "
        "--save-every 2 --steps 2 --micro-tokens 300").split()
PPO = ("--prompts-per-step 10 --minibatch 5 --max-new-tokens 40 --eval-every 0 --save-every 2 "
       "--steps 2 --micro-tokens 200 --kl-coef 0.01").split()
# No prompt for one of two processes; all rewards equal, as no answer ends within four tokens; and
# evaluation on 4 of 40 problems.
IDLE = ("--prompts-per-step 1 --minibatch 1 --samples 2 --max-new-tokens 4 --eval-every 1 "
        "--save-every 2 --steps 2 --reward vr --kl-coef 0").split()

# Runs scripts one after the other. The gradients that every optimizer step sees go to a file
# beside the run's folder.
WORKER = """
import json, sys, torch, train_sa_grpo, train_sa_ppo
from runtime import parallel, runs
from runtime.errors import user_errors
from safetensors.torch import save_file
clip = parallel.clip_gradients
def record(model, limit):
    have = [p.grad for p in model.parameters() if p.grad is not None]
    grads = [parallel.all_gather(grad).clone() for grad in have]
    if parallel.processes()[0] == 0:
        seen.append(torch.cat([g.flatten() for g in grads]))
    return clip(model, limit)
parallel.clip_gradients = record
with user_errors():
    for script, argv in json.loads(sys.argv[1]):
        seen = []
        {"grpo": train_sa_grpo, "ppo": train_sa_ppo}[script].main(argv)
        if parallel.processes()[0] == 0:
            name = argv[argv.index("--name") + 1]
            save_file({str(i): g for i, g in enumerate(seen)}, runs.RUNS / f"{name}.gradients")
"""


def torchrun(world, code, *argv, folder, options=(), timeout=240, check=True):
    env = os.environ | {"SA_RUNS": str(folder), "OMP_NUM_THREADS": "1"}
    options = [*(options or ["--standalone"]), "--nproc-per-node", str(world), "--no-python", "--"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, sys.executable, "-c", code]
    done = subprocess.run([*command, *map(str, argv)], cwd=ROOT, env=env, capture_output=True,
                          text=True, timeout=timeout)
    assert not check or done.returncode == 0, done.stderr[-6000:]
    return done


def alone(jobs, folder):
    """The same without torchrun."""
    env = os.environ | {"SA_RUNS": str(folder), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", WORKER, json.dumps(jobs)], cwd=ROOT, env=env, check=True,
                   capture_output=True)


def assert_about_the_same(a, b, but=()):
    assert a.keys() == b.keys()
    for key in a.keys() - but:
        close = isinstance(a[key], float)
        assert a[key] == (pytest.approx(b[key], rel=1e-4, abs=1e-5) if close else b[key]), key


def assert_same(a, b, step="step_000002", files=("model", "optimizer")):
    """Tokens exactly; weights to 1e-6 of their norm; optimizer state, which follows gradients of
    weights that differ by that, and what is written down, about as closely."""
    for name in ("completions.jsonl", "metrics.jsonl"):
        for x, y in zip(lines(a / name), lines(b / name), strict=True):
            assert_about_the_same(x, y, but=TIMES)
    for place in files:
        one, two = (load_file(folder / step / f"{place}.safetensors") for folder in (a, b))
        assert one.keys() == two.keys()
        worst = 0.0
        for key in one:
            worst = max(worst, ((one[key] - two[key]).norm() / (one[key].norm() + 1e-30)).item())
        print(f"{a.name} {b.name} {step} {place}: {worst:.1e}")
        assert worst <= (1e-4 if "optimizer" in place else 1e-6), place


def assert_same_gradients(folder, a, b):
    one, two = load_file(folder / f"{a}.gradients"), load_file(folder / f"{b}.gradients")
    assert one.keys() == two.keys() and len(one)
    for key in sorted(one, key=int)[:1 if b[:3] != "ppo" else 2]:  # before any weight has changed
        apart, size = (one[key] - two[key]).norm(), one[key].norm()  # both may be 0
        print(f"gradient {key} of {b}: {size:.3e}, apart {apart:.1e}")
        assert apart <= 1e-6 * size


def test_micro_batches_of_several_processes(rng):
    for _ in range(200):
        lengths = [int(rng.paretovariate(1) * 20) + 1 for _ in range(rng.randrange(0, 30))]
        budget, world = rng.randrange(1, 600), rng.randrange(1, 6)
        dealt = [micro_batches(lengths, budget, rank, world) for rank in range(world)]
        batches = [batch for own in dealt for batch in own]
        assert len({len(own) for own in dealt}) == 1  # as many for each
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        for batch in filter(None, batches):
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
        rounds = -(-len(micro_batches(lengths, budget)) // world)
        assert len(dealt[0]) == rounds  # no more than needed
        assert dealt == [micro_batches(lengths, budget)] or world > 1


@pytest.mark.parametrize("b", [4, 2])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_the_memory_formula_counts_what_a_block_keeps(kind, b):
    """bench.memory against what autograd saves on a CPU; what a second layer adds."""
    args = SimpleNamespace(dtype={4: "float32", 2: "bfloat16"}[b], device="cpu", recompute=False)

    def kept(layers):
        config = GPTConfig.from_hf({
            "model_type": kind, "vocab_size": 64, "hidden_size": 256, "intermediate_size": 704,
            "head_dim": 32, "num_hidden_layers": layers, "num_attention_heads": 8,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 512,
            "tie_word_embeddings": True})
        model, seen = parallel.working_copy(GPT(config), args), {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(t):
            if (place := t.untyped_storage().data_ptr()) not in weights:
                seen[place] = t  # held, so that no other tensor takes its place
            return t
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        with hooks, parallel.autocast(args):
            model(torch.randint(64, (2, 256)))
        return sum(t.untyped_storage().nbytes() for t in seen.values()) / 512, config
    (one, config), (two, _) = kept(1), kept(2)
    assert two - one == pytest.approx(memory.per_token(config, b, gpu=False), rel=0.01)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The runs of one process, which those of several are compared with."""
    folder = tmp_path_factory.mktemp("alone")
    with open(folder / "data.jsonl", "w") as file:
        for i in range(40):
            question = f"Tom has {i} cups. Tom finds 4 more. How many cups does Tom have now?"
            file.write(json.dumps({"question": question, "answer": f"{i + 4}"}) + "\n")
    alone(jobs_named("grpo", "ppo", "idle", folder), folder)
    return folder


def jobs_named(grpo, ppo, idle, folder):
    return [("grpo", [*GRPO, "--name", grpo]), ("ppo", [*PPO, "--name", ppo]),
            ("grpo", [*IDLE, "--name", idle, "--data", str(folder / "data.jsonl")])]


def test_same_run_for_any_number_of_processes(reference, tmp_path, world=2):
    """Both scripts, uneven batches, processes without work, a group whose rewards are all equal;
    the same files in the checkpoint."""
    names = [f"grpo{world}", f"ppo{world}", f"idle{world}"]
    torchrun(world, WORKER, json.dumps(jobs_named(*names, reference)), folder=tmp_path)
    for name in names:
        gradients = (tmp_path / f"{name}.gradients").read_bytes()
        (reference / f"{name}.gradients").write_bytes(gradients)
        assert_same_gradients(reference, name[:-1], name)
    assert_same(reference / "grpo", tmp_path / names[0])
    assert_same(reference / "ppo", tmp_path / names[1],
                files=("model", "optimizer", "critic", "critic_optimizer"))
    assert_same(reference / "idle", tmp_path / names[2])
    evals = lines(tmp_path / names[2] / "evals.jsonl")
    assert lines(reference / "idle" / "evals.jsonl") == evals != []
    for name in names:
        ours, theirs = tmp_path / name / "step_000002", reference / name[:-1] / "step_000002"
        assert {f.name for f in ours.iterdir()} == {f.name for f in theirs.iterdir()}
        for file in ours.glob("*.safetensors"):
            with safe_open(file, "pt") as one, safe_open(theirs / file.name, "pt") as other:
                assert one.metadata() == other.metadata()


# ---- what takes minutes ----


@slow
@pytest.mark.parametrize("script, worlds", [("grpo", (3, 1, 2)), ("ppo", (1, 2, 1))])
def test_checkpoints_do_not_know_how_many_wrote_them(script, worlds, tmp_path):
    """A run that goes on with more and with fewer processes: the weights of six steps of one."""
    base = [*{"grpo": GRPO, "ppo": PPO}[script], "--save-every", "2"]
    alone([(script, [*base, "--name", "whole", "--steps", "6"])], tmp_path)
    for i, world in enumerate(worlds):
        flags = [*base, "--name", "parts", "--steps", str(2 * i + 2), *["--resume"][:i]]
        if world == 1:
            alone([(script, flags)], tmp_path)
        else:
            torchrun(world, WORKER, json.dumps([(script, flags)]), folder=tmp_path)
    files = ("model", "optimizer", "critic", "critic_optimizer")[:2 if script == "grpo" else 4]
    assert_same(tmp_path / "whole", tmp_path / "parts", "step_000006", files)
    resumes = json.loads((tmp_path / "parts" / "config.json").read_text())["resumes"]
    assert [r["versions"]["processes"] for r in resumes] == list(worlds[1:])


@slow
def test_extreme_raggedness(tmp_path, rng):
    """Answers of 1 to 200 tokens, micro-batches from one answer to all, more processes than
    answers, one slot: no process waits for ever, and every token is that of one process."""
    jobs = []
    for i in range(4):
        prompts = rng.choice([1, 2, 5, 7])
        flags = {"--prompts-per-step": prompts, "--minibatch": rng.choice([1, prompts]),
                 "--samples": rng.choice([2, 3, 5]), "--eval-every": 0, "--steps": 1,
                 "--max-new-tokens": rng.choice([1, 2, 30, 200]),
                 "--temperature": rng.choice([0.3, 1.0, 3.0]),
                 "--micro-tokens": rng.choice([1, 150, 500, 100_000]),
                 "--slots": rng.choice([1, 7, 999]), "--seed": rng.randrange(1000),
                 "--name": f"r{i}"}
        jobs.append(("grpo", [str(word) for pair in flags.items() for word in pair]))
        print(jobs[-1])
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    alone(jobs, tmp_path / "one")
    torchrun(3, WORKER, json.dumps(jobs), folder=tmp_path / "many")
    for i in range(4):
        a, b = (lines(tmp_path / n / f"r{i}" / "completions.jsonl") for n in ("one", "many"))
        assert [x["tokens"] for x in a] == [x["tokens"] for x in b]


@slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_memory_formula_against_what_processes_hold(tokenizer, tmp_path):
    config = GPTConfig.from_hf({
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1536,
        "head_dim": 64, "num_hidden_layers": 12, "num_attention_heads": 8,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 512,
        "tie_word_embeddings": True})
    GPT(config).save_pretrained(tmp_path)
    tokenizer.copy_to(tmp_path)
    code = "import sys; from bench.memory import main; main(sys.argv[1:])"
    done = torchrun(2, code, "--measure", "--model", tmp_path, "--micro-tokens", "512",
                    "--device", "cpu", folder=tmp_path)
    print(done.stdout)
    assert 0.9 < float(re.search(r"GB, ([\d.]+) of it", done.stdout)[1]) < 1.1


# Something happens to one process. argv: its rank, a function of runtime, at which call of it,
# what, then the script's arguments.
TROUBLE = """
import os, signal, sys, train_sa_grpo
from runtime import parallel, runs
from runtime.errors import user_errors
who, where, when, what = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
real, calls = getattr(parallel, where), 0
def troubled(*args, **kwargs):
    global calls
    calls += 1
    first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if calls == when and parallel.processes()[0] == who and first_start:
        if what == "mistake":
            raise ValueError("broken on purpose")
        if what == "bug":
            raise KeyError("a bug on purpose")
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGTERM}[what])
    return real(*args, **kwargs)
for module in (parallel, runs):
    if hasattr(module, where):
        setattr(module, where, troubled)
with user_errors():
    train_sa_grpo.main(sys.argv[5:])
"""


@slow
@pytest.mark.parametrize("where, what, words", [
    ("sample", "mistake", "process 1: broken on purpose"),
    ("clip_gradients", "bug", "process 1: KeyError: 'a bug on purpose'")])
def test_an_error_of_one_process_ends_all_and_is_shown(tmp_path, what, words, where):
    began = time.time()
    done = torchrun(3, TROUBLE, 1, where, 2, what, *GRPO, "--name", "e", "--steps", 1000,
                    folder=tmp_path, check=False)
    print(done.stderr)
    assert done.returncode != 0
    assert f"error: {words}" in done.stderr and f"error: ended by {words}" in done.stderr
    assert ("in troubled" in done.stderr) == (what == "bug")
    assert words.split(": ", 1)[1] in (tmp_path / "e" / "process_1.log").read_text()
    assert time.time() - began < 60


@slow
def test_killed_restarted_and_resumed_equals_undisturbed(tmp_path):
    """kill -9 while weights are gathered in step 3: torchrun starts all processes again."""
    who, where, when = 0, "all_gather", 130
    argv = [*GRPO, "--steps", "4", "--resume"]
    done = torchrun(2, TROUBLE, who, where, when, "kill", *argv, "--name", "killed",
                    folder=tmp_path, options=["--standalone", "--max-restarts", "1"])
    assert "note: there is no run killed yet: starting it" in done.stderr
    config = json.loads((tmp_path / "killed" / "config.json").read_text())
    assert len(config["resumes"]) == 1  # it did happen
    print(config["resumes"][0]["step"])
    torchrun(2, TROUBLE, 9, where, when, "kill", *argv, "--name", "undisturbed", folder=tmp_path)
    a, b = tmp_path / "killed", tmp_path / "undisturbed"
    assert (a / "completions.jsonl").read_bytes() == (b / "completions.jsonl").read_bytes()
    for name in ("model", "optimizer"):
        file = f"step_000004/{name}.safetensors"
        assert (a / file).read_bytes() == (b / file).read_bytes()


@slow
def test_a_run_that_another_job_holds_is_refused(tmp_path):
    alone([("grpo", [*GRPO, "--name", "held", "--steps", "1"])], tmp_path)
    with open(tmp_path / "held" / "lock", "r+") as file:
        assert files.lock(file, wait=False) is None
        said = file.read()
        done = torchrun(2, WORKER, json.dumps([("grpo", ["--name", "held", "--resume"])]),
                        folder=tmp_path, check=False)
        assert done.returncode != 0 and f"is in use by {said}: wait" in done.stderr
    torchrun(2, WORKER, json.dumps([("grpo", ["--name", "held", "--resume", "--steps", "2"])]),
             folder=tmp_path)


@slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    done = torchrun(2, TROUBLE, 1, "sample", 2, "stop", *GRPO, "--name", "s", "--steps", "1000",
                    folder=tmp_path, check=False)
    assert "stopped and saved step_000002; go on with" in done.stderr
    assert len(lines(tmp_path / "s" / "metrics.jsonl")) == 2
    assert "SIGTERM: finishing this step" in (tmp_path / "s" / "process_1.log").read_text()


@slow
def test_stopping_torchrun_saves(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "train_sa_grpo.py", *GRPO, "--name", "t", "--steps", "1000"]
    env = os.environ | {"SA_RUNS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "t" / "metrics.jsonl"
    deadline = time.time() + 90
    while time.time() < deadline and not (log.exists() and log.read_text().count("\n") >= 1):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "stopped and saved" in errors
    assert (tmp_path / "t" / f"step_{len(lines(log)):06d}" / "optimizer.safetensors").exists()


@slow
def test_two_nodes(reference, tmp_path):
    """Two torchrun agents on the loopback device: only rank 0 writes and draws bars."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "two", "--local-addr",
               "127.0.0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "train_sa_grpo.py", *GRPO,
               "--name", "nodes"]
    env = os.environ | {"SA_RUNS": str(tmp_path), "OMP_NUM_THREADS": "1",
                        "GLOO_SOCKET_IFNAME": "lo"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    nodes = [subprocess.Popen(command, cwd=ROOT, env=env, **pipes) for _ in range(2)]
    shown = [node.communicate(timeout=240) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], shown
    assert_same(reference / "grpo", tmp_path / "nodes")
    assert sum("GRPO with reward sar: 100%" in err for _, err in shown) == 1
    assert sum("metrics.jsonl" in out for out, _ in shown) == 1
    assert (tmp_path / "nodes" / "process_1.log").exists()
    assert not (tmp_path / "nodes" / "process_0.log").exists()


# Counts the collectives of a run and the bytes that FSDP's carry, in every process.
COUNT = """
import collections, json, sys, torch, torch.distributed as dist
calls, carried = [], collections.Counter()
def counted(name):
    real = getattr(dist, name)
    def call(*args, **kwargs):
        calls.append(name)
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        carried[name] += max(t.numel() * t.element_size() for t in tensors)  # the whole one
        return real(*args, **kwargs)
    setattr(dist, name, call)
for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather_single",
             "reduce_scatter_single"):
    if hasattr(dist, name):
        counted(name)
import train_sa_grpo
from runtime import parallel, runs
from runtime.errors import user_errors
with user_errors():
    train_sa_grpo.main(sys.argv[1:])
    path = runs.RUNS / f"calls_{parallel.processes()[0]}"
    path.write_text(json.dumps([calls, carried]))
"""


@slow
def test_every_process_makes_the_same_collectives(tmp_path):
    """The same ones in the same order, and as many bytes as bench/RESULTS.md reckons with: a round
    of micro-batches gathers 2 W - E weights (E, the root's, stay whole between forward and
    backward) and adds up W gradients, here in float32."""
    torchrun(3, COUNT, *GRPO, "--name", "c", "--steps", "1", "--save-every", "100", "--kl-coef",
             "0", folder=tmp_path)
    counts = [json.loads((tmp_path / f"calls_{rank}").read_text()) for rank in range(3)]
    calls, carried = counts[0]
    assert calls == counts[1][0] == counts[2][0]
    config = GPT.from_pretrained(ROOT / "data/tiny").config
    W, B, E = memory.counts(config)
    scatter, = (name for name in carried if name.startswith("reduce_scatter"))  # by torch version
    gather, = (name for name in carried if name.startswith("all_gather"))
    rounds = calls.count(scatter) // (config.layers + 1)
    print({name: (calls.count(name), size) for name, size in carried.items()}, W, B, E, rounds)
    assert calls.count(scatter) == rounds * (config.layers + 1)
    assert carried[scatter] == pytest.approx(4 * W * rounds, rel=0.02)  # rows are padded
    forwards = (calls.count(gather) - 2 * rounds * config.layers) / config.layers  # of scoring
    assert carried[gather] >= 4 * rounds * (2 * W - E) and forwards > 0


@slow
@pytest.mark.parametrize("script", ["grpo", "ppo"])
def test_bfloat16_matmuls_over_sharded_float32(script, tmp_path):
    """What GPUs do, on a CPU: the same samples in the first step, and gradients that differ by
    bfloat16's rounding (2^-9); with recomputed blocks inside the sharded ones."""
    base = [*{"grpo": GRPO, "ppo": PPO}[script], "--steps", "1", "--dtype", "bfloat16"]
    alone([(script, [*base, "--name", "one"])], tmp_path)
    jobs = [(script, [*base, "--name", "two", "--recompute"])]
    torchrun(2, WORKER, json.dumps(jobs), folder=tmp_path)
    a, b = (lines(tmp_path / run / "completions.jsonl") for run in ("one", "two"))
    assert [x["tokens"] for x in a] == [x["tokens"] for x in b]
    one, two = (load_file(tmp_path / f"{run}.gradients") for run in ("one", "two"))
    for key in one:
        print(script, key, ((one[key] - two[key]).norm() / one[key].norm()).item())
    assert (one["0"] - two["0"]).norm() < 0.05 * one["0"].norm()
    saved = load_file(tmp_path / "two" / "step_000001" / "model.safetensors")
    assert all(p.dtype == torch.float32 for p in saved.values())
