"""Residual addition and normalisation in one step: the residual stream is written once and normalised as written."""

import torch.nn.functional as F


def add_norm(x, residual, weight, bias=None, eps=1e-5, rms=False, alpha=1.0):
    """r = residual + alpha * x; y = norm(r) * weight + bias.

    x: (..., d) branch output, any float dtype. residual: (..., d) or None (then r = alpha * x). weight, bias: (d,), bias
    may be None and must be with `rms`. alpha: multiplier of the branch. LayerNorm (arXiv 1607.06450) or, with `rms`,
    RMSNorm (arXiv 1910.07467); statistics are fp32 whatever the dtype of r, and taken from r as stored.
    Returns (y, r), both (..., d) in the dtype of the residual stream.
    """
    if alpha != 1.0:
        x = x * alpha
    r = x if residual is None else residual + x
    weight = weight.to(r.dtype)
    if rms:
        return F.rms_norm(r, weight.shape, weight, eps), r
    return F.layer_norm(r, weight.shape, weight, None if bias is None else bias.to(r.dtype), eps), r
