"""The command lines of the scripts, fuzzed: one sentence, or it works."""
import json
import re

import pytest
import torch

import evaluate
import train_sa_grpo
import train_sa_ppo
from runtime import runs as runs_module
from runtime import settings

VALUES = """0 1 -1 2 6 128 1e-6 0.5 1.5 -0.0 1e400 -1e400 inf -inf nan 1e-400 1_0 0x10 1e3 ٣ ½
    true None null [] {} % %s %(prog)s {0} \\ / . .. ~ ~nobody-here/x a/b ../../x tiny sar vr vr+em
    SAR strict cpu cuda cuda:0 cuda:99 mps meta cpu:0 float32 bfloat16 float16 gsm8k,math gsm8k,,
    , -- --resume -h= run 🙂""".split()
ODD = ["", " ", "\0", "\n", "\udcff", "9" * 30, "9" * 5000, "x" * 300, "x/" * 3000, "-" * 50]
SAVED = [{}, [], {"algorithm": "grpo"}, {"algorithm": "grpo", "settings": None},
         {"algorithm": ["grpo"], "settings": {}}, {"algorithm": "grpo", "settings": []}]


class Works(Exception):
    """Raised where the first model is looked up: the command line was taken."""


def stop(name):
    raise Works


@pytest.mark.parametrize("script", [train_sa_grpo, train_sa_ppo, evaluate])
def test_any_command_line_works_or_is_a_sentence(script, runs, rng, monkeypatch, capsys):
    monkeypatch.setattr(settings, "find_model", stop)
    monkeypatch.setattr(script, "keep_freed_memory", lambda: None)
    with pytest.raises(SystemExit):
        script.main(["--help"])
    flags = re.findall("^  (--[a-z-]+)", capsys.readouterr().out, re.M)
    assert len(flags) > 10
    for i, content in enumerate(SAVED):
        (runs / f"{i}").mkdir(parents=True)
        (runs / f"{i}" / "config.json").write_text(json.dumps(content))
    worked = 0
    for _ in range(170):
        argv = []
        for flag in rng.sample(flags, rng.choice([1, 2, 5])):
            value = rng.choice([rng.choice(VALUES + ODD), "1", "2"])
            argv += rng.choice([[flag, value], [f"{flag}={value}"]] * 4 + [[flag], [value, flag]])
        if rng.random() < 0.1:
            argv += ["--resume", "--name", str(rng.randrange(len(SAVED) + 1))]
        try:
            script.main(argv)
            pytest.fail(f"{argv} did not reach find_model")
        except Works:
            worked += 1
        except (ValueError, OSError) as error:
            assert str(error), argv
        except SystemExit as end:
            assert end.code == 0, argv
        except Exception as error:
            raise AssertionError(f"{argv} ends in {error!r}") from error
    assert worked > 10


@pytest.mark.parametrize("capability, dtype", [((7, 5), "float32"), ((8, 0), "bfloat16")])
def test_the_default_dtype_is_what_the_gpu_is_fast_in(capability, dtype, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(runs_module, "provenance", lambda device: {})
    seen = []

    def load(folder, **options):
        seen.append(str(options["dtype"]))
        raise Works
    monkeypatch.setattr(evaluate.GPT, "from_pretrained", load)
    with pytest.raises(Works):
        evaluate.main(["--limit", "1", "--max-new-tokens", "1"])
    assert seen == [f"torch.{dtype}"]
    parser = settings.training_parser("", train_sa_grpo.PAPER, train_sa_grpo.TINY)
    assert settings.parse(parser, "grpo", []).dtype == dtype
    assert settings.parse(parser, "grpo", ["--dtype", "float32"]).dtype == "float32"
    assert settings.parse(parser, "grpo", ["--device", "cpu"]).dtype == "float32"


def test_flags_out_of_range(runs):
    for argv, says in ((["--lr", "inf"], "--lr: must be positive, got inf"),
                       (["--temperature", "inf"], "--temperature: must be positive, got inf"),
                       (["--temperature", "nan"], "--temperature: must be positive, got nan"),
                       (["--micro-tokens", "0"], "--micro-tokens: must be positive, got 0"),
                       (["--model", "~nobody-is-called-this/x"], "~nobody-is-called-this/x"),
                       (["--data", "~nobody-is-called-this/x"], "~nobody-is-called-this/x")):
        with pytest.raises((ValueError, OSError), match=re.escape(says)):
            train_sa_grpo.main(argv)


def test_processes_without_a_local_rank_share_the_gpus(monkeypatch):
    """As mpirun or srun start them."""
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(settings.parallel, "processes", lambda: (6, 8))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert settings.choose_device(None) == "cuda:2"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert settings.choose_device("cuda") == "cuda:3" and taken == ["cuda:2", "cuda:3"]
