"""How this machine multiplies. No other file knows about oneDNN, MKL or malloc.

PyTorch's `@` on a CPU goes to MKL, which uses half the vector width of AMD's cores. oneDNN uses all
of it, and can keep a weight in a layout of its own (`pack`). On a GPU a product of bfloat16 is
summed and kept in float32 (`matmul`).

A row must come out the same to the last bit whatever stands beside it, so that samples do not
depend on the batch. oneDNN gives that for two rows or more. Attention gives it at equal lengths,
hence ATTENTION_STEP and PROMPT_STEP.
"""
import ctypes
import os
import platform

import torch
import torch.nn.functional as F
from torch import Tensor

ATTENTION_STEP = 16  # attended lengths are multiples of it: attention rounds differently at others
PROMPT_STEP = 32  # prompts are prefilled at widths that are multiples of it, for the same reason

try:  # two private operators: a PyTorch may lack them, only name them, or want other arguments
    _pack, _linear = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    ONEDNN = bool(_linear(torch.eye(2), _pack(torch.eye(2)), None, "none", [], "")[0, 0])
except (AttributeError, RuntimeError, TypeError):
    ONEDNN = False


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def fast_bfloat16(device) -> bool:
    """Whether it is a GPU that multiplies bfloat16 fast: compute capability 8.0 and up."""
    on_gpu = torch.device(device).type == "cuda"
    return on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """What a tile of logits is multiplied in: bfloat16 on a GPU, else float32 (or float64).
    Never float16: gradients of a mean over a batch may lie below its range."""
    keep = x.dtype == torch.float64 or (x.dtype == torch.bfloat16 and x.is_cuda)
    return x.dtype if keep else torch.float32


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (n, k), b (m, k) in matmul_dtype -> a @ b.T (n, m), summed and kept in float32 or float64.

    Rounded to bfloat16, a logit of size 20 would be off by 0.06.
    """
    if a.dtype == torch.bfloat16:
        return torch.mm(a, b.T, out_dtype=torch.float32)
    if a.dtype == torch.float32 and a.device.type == "cpu" and ONEDNN:
        return _linear(zero_padded(a), zero_padded(b), None, "none", [], "")[:len(a), :len(b)]
    with torch.autocast(a.device.type, enabled=False):  # a backward may run within it
        return a @ b.T


def zero_padded(x: Tensor) -> Tensor:
    """x (n, m) with zeros up to multiples of 64, and without gaps in memory.

    oneDNN keeps a compiled kernel (0.6 MB) for every size that it has met, and falls back to a slow
    reference kernel for inputs that are not contiguous.
    """
    pad = (0, -x.shape[1] % 64, 0, -x.shape[0] % 64)
    if any(pad):
        return F.pad(x, pad)
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()


def pack(weight: Tensor) -> Tensor | None:
    """A copy of weight (m, k) in oneDNN's layout, for `packed_linear`; None where there is none."""
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or not ONEDNN:
        return None
    return _pack(weight.detach())


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., k) float32 times a weight (m, k) that `pack` returned -> (..., m). A single row would
    take another path and round differently, so it is doubled."""
    rows = x.reshape(-1, x.shape[-1])
    two = rows if len(rows) > 1 else rows.repeat(2, 1)
    out = _linear(two, packed, bias, "none", [], "")
    return out[:len(rows)].view(*x.shape[:-1], -1)


def takes_groups(q: Tensor) -> bool:
    """Whether attention without a mask may get fewer key heads than query heads. On a GPU only
    flash attention takes them: half precision, compute capability 8.0 and up. Without it PyTorch
    falls back to its MATH path, which holds all scores."""
    return not q.is_cuda or (q.itemsize == 2 and fast_bfloat16(q.device))


def decode_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of one query per head: q (B, Hkv, H / Hkv, hd), k, v (B, Hkv, S, hd) -> as q.

    The query heads that share a key head stand where query positions would: k, v are read once.
    """
    if k.itemsize < 4:  # half precision: PyTorch's kernel keeps the scores in float32
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    batch, heads = q.shape[:2]
    if batch * heads == 1:  # one product is split over threads and rounds differently: double it
        q, k, v = (part.expand(2, -1, -1, -1) for part in (q, k, v))
    return (((q * scale) @ k.transpose(2, 3) + mask).softmax(-1) @ v)[:batch]


def keep_freed_memory():
    """Have glibc keep freed memory: page faults would cost up to a third of a training step. On a
    GPU segments shall grow, which leaves fewer gaps; that is read when CUDA starts."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)  # M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD of mallopt(3)
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 * 2**20)):
            libc.mallopt(option, value)
