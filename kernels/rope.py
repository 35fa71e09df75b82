"""Rotary position embedding (RoFormer, arXiv 2104.09864) on part of each head's channels, on packed q, k, v."""

import torch


def rope_tables(length, rotary_dim, base=10000.0, device=None):
    """cos and sin, fp32, (length, rotary_dim / 2): position t turns channel pair i by t * base^(-2i / rotary_dim).

    Angles are formed in float64: in bf16, tables lose whole positions long before 2,048.
    """
    frequency = base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim)
    angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotate_(x, cos, sin, interleaved):
    """Turn the first 2 * cos.shape[-1] channels of x in place; cos and sin broadcast against a half of them."""
    R = 2 * cos.shape[-1]
    a, b = (x[..., 0:R:2], x[..., 1:R:2]) if interleaved else (x[..., : R // 2], x[..., R // 2 : R])
    a_, b_ = a.float(), b.float()
    a_, b_ = a_ * cos - b_ * sin, b_ * cos + a_ * sin
    a.copy_(a_)
    b.copy_(b_)


class RopeQKV(torch.autograd.Function):
    """In place: the product that made qkv does not keep it, and only a quarter of the channels must be written."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        ctx.mark_dirty(qkv)
        rotate_(qkv[:, :, :2], cos, sin, interleaved)
        return qkv

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        grad = grad.clone()
        rotate_(grad[:, :, :2], cos, -sin, ctx.interleaved)  # the inverse of a rotation is its transpose
        return grad, None, None, None


def rope_qkv_(qkv, cos, sin, interleaved=False, pos=None):
    """Rotate the first R = 2 * cos.shape[1] channels of every q and k head, in place; v and the rest stay.

    qkv: (B, T, 3, H, D). cos, sin: (>= T, R / 2) fp32. Channel i is paired with i + R/2 (half-split, as in Llama and
    StableLM) or, `interleaved`, 2i with 2i + 1 (as in GPT-J and the released Crystal). pos: (B, T) integer positions,
    or None for 0 .. T-1. Returns qkv; the arithmetic is fp32.
    """
    if pos is None:
        cos, sin = (table[: qkv.shape[1], None, None] for table in (cos, sin))  # (T, 1, 1, R/2), over q|k and heads
    else:
        cos, sin = (table[pos][:, :, None, None] for table in (cos, sin))  # (B, T, 1, 1, R/2)
    if torch.is_grad_enabled():
        return RopeQKV.apply(qkv, cos, sin, interleaved)
    rotate_(qkv[:, :, :2], cos, sin, interleaved)
    return qkv
