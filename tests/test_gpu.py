"""What can be checked of the GPU's path without one, and what waits for one (bench.gpu runs it)."""
import contextlib
import copy
import inspect
import os
import re
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train_sa_grpo
import train_sa_ppo
from bench import memory
from kernels import keep_freed_memory
from model import GPT, GPTConfig, KVCache
from rollout import draw
from runtime import parallel
from sar import FusedLogprob

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HALF, SINGLE, CUDA = torch.bfloat16, torch.float32, torch.device("cuda:0")
CONFIG = {"model_type": "qwen2", "vocab_size": 600, "hidden_size": 128, "intermediate_size": 256,
          "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
          "rms_norm_eps": 1e-6, "max_position_embeddings": 512, "tie_word_embeddings": True}


class Context:
    """What autograd hands to a function, without its engine, which would want a device."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def set_materialize_grads(self, value):
        pass


@contextlib.contextmanager
def cuda_autocast():
    """torch.autocast turns itself off where there is no GPU."""
    torch.set_autocast_dtype("cuda", HALF)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch was built without CUDA")
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_shapes_dtypes_and_devices_under_fake_cuda_tensors(kind):
    """The policy's forward, a step of the sampler, and the fused log-prob with its backward."""
    with FakeTensorMode(), torch.no_grad():
        model = GPT(GPTConfig.from_hf(CONFIG | {"model_type": kind}))
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                p = p.to(CUDA, SINGLE if p.dim() == 1 else HALF)  # as parallel.working_copy
                setattr(module, name, torch.nn.Parameter(p))
                getattr(module, name).grad_dtype = SINGLE
        cache = KVCache(model.config, 4, 64, dtype=HALF, device=CUDA)
        for width in (32, 1):  # prompts, then a token each
            hidden = model(torch.zeros(4, width, dtype=torch.int64, device=CUDA), cache)
            assert (hidden.shape, hidden.dtype) == ((4, width, 128), HALF)
        logits = model.logits(hidden[:, 0])
        assert (logits.shape, logits.dtype, logits.device) == ((4, 600), SINGLE, CUDA)
        drawn = draw(logits, torch.zeros(4, dtype=torch.float64, device=CUDA), 1.0, 1.0, 0)
        assert (drawn.shape, drawn.dtype, drawn.device) == ((4, 2), SINGLE, CUDA)

        with cuda_autocast():
            hidden = model(torch.zeros(2, 40, dtype=torch.int64, device=CUDA)).flatten(0, 1)
        assert (hidden.shape, hidden.dtype, hidden.device) == ((80, 128), SINGLE, CUDA)
        targets, context = torch.zeros(80, dtype=torch.int64, device=CUDA), Context()
        tiles = 1.0, 32, 256, 64
        outputs = FusedLogprob.forward(context, hidden.to(HALF), model.unembedding, targets, *tiles)
        for output in outputs:
            assert (output.shape, output.dtype, output.device) == ((80,), SINGLE, CUDA)
        grad_hidden, grad_unembedding, *_ = FusedLogprob.backward(context, *outputs)
        assert (grad_hidden.shape, grad_hidden.dtype) == ((80, 128), HALF)
        assert (grad_unembedding.shape, grad_unembedding.dtype) == ((600, 128), SINGLE)


def test_segments_may_grow_from_the_start(monkeypatch):
    """Set before anything can start CUDA; a user's own setting stays."""
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    for own in ("expandable_segments:True", "backend:native"):
        keep_freed_memory()
        assert os.environ["PYTORCH_ALLOC_CONF"] == own
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    for script in (train_sa_grpo, train_sa_ppo):
        calls = re.findall(r"^ +(?:args = )?(keep_freed_memory|settings.parse)\(",
                           inspect.getsource(script.main), re.M)
        assert calls == ["keep_freed_memory", "settings.parse"]


@needs_gpu
def test_masters_on_the_host_step_as_on_the_gpu(model, prompts, rng):
    """Two optimizer steps with the flags and without; CPU and GPU round differently in AdamW."""
    micro = [SimpleNamespace(prompt=p, tokens=rng.choices(range(64), k=20)) for p in prompts]
    ends = []
    for offload in (None, True):
        args = SimpleNamespace(dtype="bfloat16", device="cuda", temperature=1.0, offload=offload,
                               recompute=offload)
        masters = copy.deepcopy(model).to("cpu" if offload else "cuda")
        policy = parallel.working_copy(masters, args)
        optimizer = torch.optim.AdamW(masters.parameters(), 1e-4, fused=True)
        for _ in range(2):
            logprob, entropy = parallel.score_with_gradient(policy, micro, args)
            (logprob + entropy).sum().backward()
            parallel.optimizer_step(optimizer, masters, policy)
        assert all(p.is_cuda for p in policy.parameters())
        ends.append(torch.cat([p.detach().cpu().flatten() for p in masters.parameters()]))
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (ends[0] - ends[1]).norm() < 0.02 * (ends[0] - before).norm()


@needs_gpu
def test_a_start_on_the_host_scores_on_the_gpu(model, prompts):
    args = SimpleNamespace(dtype="bfloat16", device="cuda", temperature=1.0, micro_tokens=512)
    tokens = [[5, 6, 7]] * len(prompts)
    args.offload = True
    from_host = parallel.score(model, prompts, tokens, args)
    assert not next(model.parameters()).is_cuda
    args.offload = None
    assert torch.equal(torch.cat(from_host),
                       torch.cat(parallel.score(model.cuda(), prompts, tokens, args)))


@needs_gpu
@pytest.mark.parametrize("mode", memory.MODES)
def test_memory_on_the_gpu_is_the_formulas(mode, tokenizer, tmp_path):
    sizes = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1536}
    GPT(GPTConfig.from_hf(CONFIG | sizes | {"num_hidden_layers": 16})).save_pretrained(tmp_path)
    tokenizer.copy_to(tmp_path)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    argv = ["--measure", "--model", str(tmp_path), "--micro-tokens", "8192", *mode.split()]
    measured, formula = memory.main(argv)
    assert measured["peak"] == pytest.approx(formula["peak"], rel=0.1)
