"""Attention under three masks: causal, prefix-LM and within documents."""

import torch
import torch.nn.functional as F


def attention_mask(Tq, Tk, mode="causal", prefix=None, doc=None, device=None):
    """Boolean mask, True where a query may look: (Tq, Tk), or (B, 1, Tq, Tk) for `prefix` and `document`.

    Queries are the last Tq of the Tk positions. prefix: (B,) integer prefix lengths, looked at from both sides inside
    the prefix (Raffel et al., arXiv 1910.10683). doc: (B, Tk) integer document number of each position.
    """
    q = torch.arange(Tk - Tq, Tk, device=device)[:, None]
    k = torch.arange(Tk, device=device)[None, :]
    mask = q >= k
    if mode == "prefix":
        P = prefix.view(-1, 1, 1, 1)
        mask = mask | ((q < P) & (k < P))
    elif mode == "document":
        mask = mask & (doc[:, None, Tk - Tq :, None] == doc[:, None, None, :])
    elif mode != "causal":
        raise ValueError(f"attention mode {mode!r} is not causal, prefix or document")
    return mask


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


def attention(q, k, v, mode="causal", prefix=None, doc=None, scale=None):
    """softmax(scale * q k^T under the mask) v.

    q: (B, H, Tq, D); k, v: (B, H, Tk, D), Tk >= Tq: the queries are the last Tq positions, as with a key-value cache.
    mode, prefix, doc: see `attention_mask`. scale: 1/sqrt(D) unless given; muP wants 1/D (arXiv 2203.03466, section 5).
    Returns (B, H, Tq, D) in q's dtype.
    """
    Tq, Tk = q.shape[2], k.shape[2]
    if mode == "causal" and Tq == Tk:
        if q.device.type == "cpu" and Tq <= 1024:
            return dense_causal(q, k, v, q.shape[3] ** -0.5 if scale is None else scale)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    if mode == "causal" and Tq == 1:  # one new token sees everything in the cache
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    mask = attention_mask(Tq, Tk, mode, prefix, doc, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
