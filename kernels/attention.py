"""Attention under three masks, alone or together: causal, prefix-LM and within documents. Who computes what:

| where | causal | prefix, document |
|---|---|---|
| CUDA | scaled_dot_product_attention: cuDNN or flash, torch chooses | FlexAttention, which skips empty blocks |
| CUDA, fewer queries than keys, or a dense mask | the same, but never cuDNN | the same, with the mask added |
| elsewhere, up to 1,024 positions | plain products | the same, with the mask added |
| elsewhere, longer | scaled_dot_product_attention | the same, with the mask added |

There is no kernel of ours here: PyTorch brings the fast ones. `torch.backends.cuda.enable_cudnn_sdp(False)` leaves
cuDNN out, should it ever be to blame for a NaN.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

ROWS = 128  # queries that plain products take at a time
# cuDNN builds a plan for every new shape, tens of milliseconds on the host: a decoding loop would pay them at each key.
NO_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def visible(prefix=None, doc=None, shift=0):
    """The rule of a mask as a function of (batch, head, query, key) indices, in FlexAttention's form; see
    `attention_mask`. shift: position of the first query."""

    def rule(b, h, q, k):
        q = q + shift
        seen = q >= k
        if prefix is not None:
            seen = seen | ((prefix[b, q] == prefix[b, k]) & (prefix[b, k] > 0))
        if doc is not None:
            seen = seen & (doc[b, q] == doc[b, k])
        return seen

    return rule


def attention_mask(Tq, Tk, prefix=None, doc=None, device=None):
    """Boolean mask, True where a query may look: (Tq, Tk), or (B, 1, Tq, Tk) with `prefix` or `doc`.

    Queries are the last Tq of the Tk positions. prefix: (B, Tk) integer, the number of the prefix that a position is
    in, 0 for none; a prefix sees itself from both sides (Raffel et al., arXiv 1910.10683). doc: (B, Tk) integer, the
    number of its document, beyond which nothing is seen.
    """
    q, k = torch.arange(Tq, device=device)[:, None], torch.arange(Tk, device=device)[None, :]
    rule = visible(prefix, doc, Tk - Tq)
    if prefix is None and doc is None:
        return rule(0, 0, q, k)
    b = torch.arange(len(doc if prefix is None else prefix), device=device)[:, None, None, None]
    return rule(b, 0, q, k)


class DenseMask(NamedTuple):
    bias: torch.Tensor  # (B, 1, T, T), 0 where a query may look, else -inf
    causal: bool  # no query looks at a later key, so those need not be multiplied


def batch_mask(T, prefix=None, doc=None, dtype=torch.float32):
    """The mask of one batch for all its layers, to be given to `attention`: build it once, outside the model.

    For tensors prefix or doc on CUDA a BlockMask of blocks of 128; elsewhere a DenseMask for arithmetic in `dtype`.
    None if there is neither: causal attention needs none.
    """
    if prefix is None and doc is None:
        return None
    some = doc if prefix is None else prefix
    if some.is_cuda:
        return create_block_mask(visible(prefix, doc), len(some), None, T, T, some.device, BLOCK_SIZE=128)
    seen = attention_mask(T, T, prefix, doc, some.device)
    return dense_mask(seen, dtype, prefix is None)


def dense_mask(seen, dtype, causal):
    """seen: bool (B, 1, Tq, Tk), where a query may look; causal: never at a later key. -> DenseMask for `attention`."""
    bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return DenseMask(bias.masked_fill_(~seen, float("-inf")), causal)


@functools.cache
def compiled_flex_attention():
    """One compiled function for all layers; uncompiled, FlexAttention would hold the whole score matrix."""
    return torch.compile(flex_attention, dynamic=False)


def plain(q, k, v, scale, mask=None):
    """Attention from plain products, ROWS queries at a time, each against the keys that it can see.

    On a CPU, contexts up to 1,024 train twice as fast so in bf16 as with scaled_dot_product_attention, whose backward
    is slow there, and no slower in fp32 (measured for causal attention). Keeps B * H * T^2 / 2 probabilities for the
    backward, under a prefix mask all B * H * T^2. mask: DenseMask.
    """
    T, out = q.shape[2], []
    q = q * scale
    for i in range(0, T, ROWS):
        j = min(i + ROWS, T)
        if mask is None:
            end, bias = j, torch.full((j - i, j), float("-inf"), dtype=q.dtype, device=q.device).triu_(1 + i)
        else:
            end = j if mask.causal else T
            bias = mask.bias[:, :, i:j, :end]
        out.append(torch.softmax(q[:, :, i:j] @ k[:, :, :end].transpose(-1, -2) + bias, dim=-1) @ v[:, :, :end])
    return torch.cat(out, dim=2)


def attention(q, k, v, scale=None, mask=None):
    """softmax(scale * q k^T under the mask) v.

    q: (B, H, Tq, D); k, v: (B, H, Tk, D), Tk >= Tq: the queries are the last Tq positions, as with a key-value cache.
    mask: what `batch_mask` made, for Tq = Tk, or `dense_mask`; None: causal. scale: 1/sqrt(D) unless given; muP wants
    1/D (arXiv 2203.03466, section 5). Returns (B, H, Tq, D) in q's dtype.
    """
    Tq, Tk = q.shape[2], k.shape[2]
    if isinstance(mask, BlockMask):
        flex = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
        return flex(q, k, v, block_mask=mask, scale=scale)
    if Tq == Tk and q.device.type == "cpu" and Tq <= 1024:
        return plain(q, k, v, q.shape[3] ** -0.5 if scale is None else scale, mask)
    if Tq == Tk and mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    if mask is None:
        # one new token sees everything in the cache
        bias = attention_mask(Tq, Tk, device=q.device) if Tq > 1 else None
    else:
        assert mask.bias.dtype == q.dtype, (mask.bias.dtype, q.dtype)  # some backends misread another one silently
        bias = mask.bias
    with sdpa_kernel(NO_PLANS):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
