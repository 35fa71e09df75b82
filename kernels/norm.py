"""Residual addition and normalisation in one step: the residual stream is written once and normalised as written."""

import torch
import torch.nn.functional as F


def add_norm(x, residual, weight, bias=None, eps=1e-5, rms=False, alpha=1.0):
    """r = residual + alpha * x; y = norm(r) * weight + bias.

    x: (..., d) branch output, any float dtype. residual: (..., d), or None: then r = alpha * x. weight, bias: (d,);
    bias may be None, and with `rms` must be. alpha: multiplier of the branch. LayerNorm (arXiv 1607.06450), with `rms`
    RMSNorm (arXiv 1910.07467); the arithmetic is fp32 at least, on r as stored.
    Returns (y, r), both (..., d) in the dtype of the residual stream.
    """
    if alpha != 1.0:
        x = x * alpha
    r = x if residual is None else residual + x
    # not in bf16, where a CPU also sums the weight's gradient over rows in bf16, and is several per cent off
    up = torch.promote_types(r.dtype, torch.float32)
    if rms:
        return F.rms_norm(r.to(up), weight.shape, weight.to(up), eps).to(r.dtype), r
    bias = None if bias is None else bias.to(up)
    return F.layer_norm(r.to(up), weight.shape, weight.to(up), bias, eps).to(r.dtype), r
