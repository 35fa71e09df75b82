"""Attention under three masks: causal, prefix-LM and within documents. Who computes what:

| where | causal | prefix, document |
|---|---|---|
| CUDA | scaled_dot_product_attention: cuDNN or flash, torch chooses | FlexAttention, which skips empty blocks |
| elsewhere, up to 1,024 positions | plain products | scaled_dot_product_attention with a dense mask |
| elsewhere, longer | scaled_dot_product_attention | the same |

There is no kernel of ours here: PyTorch brings the fast ones. `torch.backends.cuda.enable_cudnn_sdp(False)` leaves
cuDNN out, should it ever be to blame for a NaN.
"""

import functools

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def visible(mode, prefix=None, doc=None, shift=0):
    """The rule of a mask as a function of (batch, head, query, key) indices, in FlexAttention's form; see
    `attention_mask`. shift: position of the first query."""
    if mode == "causal":
        return lambda b, h, q, k: q + shift >= k
    if mode == "prefix":
        return lambda b, h, q, k: (q + shift >= k) | (k < prefix[b])
    if mode == "document":
        return lambda b, h, q, k: (q + shift >= k) & (doc[b, q + shift] == doc[b, k])
    raise ValueError(f"attention mode {mode!r} is not causal, prefix or document")


def attention_mask(Tq, Tk, mode="causal", prefix=None, doc=None, device=None):
    """Boolean mask, True where a query may look: (Tq, Tk), or (B, 1, Tq, Tk) for `prefix` and `document`.

    Queries are the last Tq of the Tk positions. prefix: (B,) integer prefix lengths, looked at from both sides inside
    the prefix (Raffel et al., arXiv 1910.10683). doc: (B, Tk) integer document number of each position.
    """
    q, k = torch.arange(Tq, device=device)[:, None], torch.arange(Tk, device=device)[None, :]
    rule = visible(mode, prefix, doc, Tk - Tq)
    if mode == "causal":
        return rule(0, 0, q, k)
    b = torch.arange(len(prefix if mode == "prefix" else doc), device=device)[:, None, None, None]
    return rule(b, 0, q, k)


def batch_mask(T, mode, prefix=None, doc=None):
    """The mask of one batch for all its layers, to be given to `attention`: build it once, outside the model.

    For tensors prefix or doc on CUDA a BlockMask of blocks of 128; elsewhere the dense one of `attention_mask`. None
    for `causal`, which needs none.
    """
    if mode == "causal":
        return None
    per_row = prefix if mode == "prefix" else doc
    if not per_row.is_cuda:
        return attention_mask(T, T, mode, prefix, doc, per_row.device)
    return create_block_mask(visible(mode, prefix, doc), len(per_row), None, T, T, per_row.device, BLOCK_SIZE=128)


@functools.cache
def compiled_flex_attention():
    """One compiled function for all layers; uncompiled, FlexAttention would hold the whole score matrix."""
    return torch.compile(flex_attention, dynamic=False)


def dense_causal(q, k, v, scale, rows=128):
    """Causal attention from plain products, `rows` queries at a time, each against the keys up to its last one.

    On a CPU, contexts up to 1,024 train twice as fast so in bf16 as with scaled_dot_product_attention, whose backward
    is slow there, and no slower in fp32. Keeps about B * H * T^2 / 2 probabilities for the backward.
    """
    T, out = q.shape[2], []
    q = q * scale
    for i in range(0, T, rows):
        j = min(i + rows, T)
        future = torch.full((j - i, j), float("-inf"), dtype=q.dtype, device=q.device).triu_(1 + i)
        out.append(torch.softmax(q[:, :, i:j] @ k[:, :, :j].transpose(-1, -2) + future, dim=-1) @ v[:, :, :j])
    return torch.cat(out, dim=2)


def attention(q, k, v, mode="causal", prefix=None, doc=None, scale=None, mask=None):
    """softmax(scale * q k^T under the mask) v.

    q: (B, H, Tq, D); k, v: (B, H, Tk, D), Tk >= Tq: the queries are the last Tq positions, as with a key-value cache.
    mode, prefix, doc: see `attention_mask`; or `mask`, what `batch_mask` made of them. scale: 1/sqrt(D) unless given;
    muP wants 1/D (arXiv 2203.03466, section 5). Returns (B, H, Tq, D) in q's dtype.
    """
    Tq, Tk = q.shape[2], k.shape[2]
    if mask is None and mode == "causal":
        if Tq == Tk and q.device.type == "cpu" and Tq <= 1024:
            return dense_causal(q, k, v, q.shape[3] ** -0.5 if scale is None else scale)
        if Tq == Tk:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        if Tq == 1:  # one new token sees everything in the cache
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if mask is None:
        mask = batch_mask(Tq, mode, prefix, doc) if Tq == Tk else attention_mask(Tq, Tk, mode, prefix, doc, q.device)
    if isinstance(mask, BlockMask):
        flex = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
        return flex(q, k, v, block_mask=mask, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
