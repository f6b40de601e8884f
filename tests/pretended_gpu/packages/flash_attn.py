"""Stand in for the package flash-attn: what transformers calls of it, in plain PyTorch.

transformers reads the signatures: softcap and deterministic are there, but nothing here passes them. Unlike the package
it takes float32 too, so that results can be compared to the last digits.
"""

import sys
from types import ModuleType

import torch
from torch import Tensor

calls = 0  # shows that the package was used


@torch.autocast("cuda", enabled=False)
def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: tuple[int, int]) -> Tensor:
    """Attention of q [n, heads, D] to k and v [m, fewer heads, D]; if causal, the last query sees all keys."""
    dtype, (q, k, v) = q.dtype, (x.float() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    behind = torch.arange(len(q), device=q.device)[:, None] + len(k) - len(q) - torch.arange(len(k), device=q.device)
    seen = torch.ones_like(behind, dtype=torch.bool)
    if causal:
        seen &= behind >= 0
    if window[0] >= 0:
        seen &= behind <= window[0]
    scores = torch.einsum("nhd,mhd->hnm", q, k) * scale
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v).to(dtype)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False
):  # fmt: skip
    ends = [torch.arange(x.shape[0] + 1) * x.shape[1] for x in (q, k)]
    flat = (x.flatten(0, 1) for x in (q, k, v))
    return flash_attn_varlen_func(*flat, *ends, 0, 0, dropout_p, softmax_scale, causal, window_size).view_as(q)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, deterministic=False,
):  # fmt: skip
    """Sequences one after the other, q [tokens, heads, D]; cu_seqlens: where each begins, and the end."""
    global calls
    calls += 1
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    parts = [x.split(ends.diff().tolist()) for x, ends in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))]
    return torch.cat([attend(*part, scale, causal, window_size) for part in zip(*parts)])


def flash_attn_with_kvcache(*args, **kwargs):
    raise NotImplementedError


# transformers imports pad_input and unpad_input from here, and has copies of both with an underscore.
bert_padding = ModuleType("flash_attn.bert_padding")
bert_padding.__getattr__ = lambda name: getattr(sys.modules["transformers.modeling_flash_attention_utils"], f"_{name}")
sys.modules[bert_padding.__name__] = bert_padding
