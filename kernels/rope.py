"""Rotary position embedding (RoFormer, arXiv 2104.09864) on part of each head's channels, on packed q, k, v."""

import torch

from kernels.backend import next_power_of_2, runs_triton, tile, tl, triton


def rope_tables(length, rotary_dim, base=10000.0, device=None):
    """cos and sin, fp32, (length, rotary_dim / 2): position t turns channel pair i by t * base^(-2i / rotary_dim).

    Angles are formed in float64: in bf16, tables lose whole positions long before 2,048.
    """
    frequency = base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim)
    angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def reference_rotate_(x, cos, sin, pos, interleaved):
    """Turn q and k of x (B, T, 3, H, D) in place."""
    if pos is None:
        cos, sin = (table[: x.shape[1], None, None] for table in (cos, sin))  # (T, 1, 1, R/2), over q|k and heads
    else:
        cos, sin = (table[pos][:, :, None, None] for table in (cos, sin))  # (B, T, 1, 1, R/2)
    R, x = 2 * cos.shape[-1], x[:, :, :2]
    a, b = (x[..., 0:R:2], x[..., 1:R:2]) if interleaved else (x[..., : R // 2], x[..., R // 2 : R])
    a_, b_ = a.float(), b.float()
    a_, b_ = a_ * cos - b_ * sin, b_ * cos + a_ * sin
    a.copy_(a_)
    b.copy_(b_)


def reference_pack(dq, dk, dv, cos, sin, pos, interleaved):
    """Gradients of the heads (B, H, T, D) -> of what `reference_rotate_` was given: a rotation's inverse is its own
    with the other sign."""
    packed = torch.stack([d.transpose(1, 2) for d in (dq, dk, dv)], dim=2)
    reference_rotate_(packed, cos, -sin, pos, interleaved)
    return packed


@triton.jit
def rotate_kernel(
    QKV, COS, SIN, POS, T, rows,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """HEADS heads a program, counted through q and k of all rows; BLOCK >= HALF pairs of channels of each."""
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    row = head // (2 * H)
    pair = tl.arange(0, BLOCK)
    real = (row < rows)[:, None] & (pair < HALF)[None, :]
    pos = row % T if POS is None else tl.load(POS + row, mask=row < rows, other=0)
    cos = tl.load(COS + pos[:, None] * HALF + pair[None, :], mask=real, other=0.0)
    sin = tl.load(SIN + pos[:, None] * HALF + pair[None, :], mask=real, other=0.0)
    a_at = (
        QKV
        + (row.to(tl.int64) * 3 * H * D + head % (2 * H) * D)[:, None]
        + (2 * pair if INTERLEAVED else pair)[None, :]
    )
    b_at = a_at + (1 if INTERLEAVED else HALF)
    a = tl.load(a_at, mask=real, other=0.0).to(tl.float32)
    b = tl.load(b_at, mask=real, other=0.0).to(tl.float32)
    tl.store(a_at, (a * cos - b * sin).to(QKV.dtype.element_ty), mask=real)
    tl.store(b_at, (b * cos + a * sin).to(QKV.dtype.element_ty), mask=real)


@triton.jit
def pack_kernel(
    DQ, DK, DV, OUT, COS, SIN, POS, T, rows, stride_b, stride_h, stride_t,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy HEADS heads of one of dq, dk, dv to their place in OUT, turned back; a channel reads its partner too."""
    part = tl.program_id(1)
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    row = head // H
    col = tl.arange(0, BLOCK)
    real = (row < rows)[:, None] & (col < D)[None, :]
    IN = DQ if part == 0 else (DK if part == 1 else DV)
    at = IN + ((row // T).to(tl.int64) * stride_b + head % H * stride_h + row % T * stride_t)[:, None]
    out = tl.load(at + col[None, :], mask=real, other=0.0)
    if part < 2:
        turned = real & (col < 2 * HALF)[None, :]
        first = (col % 2 == 0) if INTERLEAVED else (col < HALF)
        partner = tl.where(first, col + (1 if INTERLEAVED else HALF), col - (1 if INTERLEAVED else HALF))
        pair = col // 2 if INTERLEAVED else col % HALF
        pos = row % T if POS is None else tl.load(POS + row, mask=row < rows, other=0)
        table = pos[:, None] * HALF + pair[None, :]
        cos = tl.load(COS + table, mask=turned, other=1.0)
        sin = tl.load(SIN + table, mask=turned, other=0.0)
        other = tl.load(at + partner[None, :], mask=turned, other=0.0).to(tl.float32)
        back = out.to(tl.float32) * cos + tl.where(first[None, :], other, -other) * sin
        out = back.to(OUT.dtype.element_ty)
    to = OUT + (row.to(tl.int64) * 3 * H * D + part * H * D + head % H * D)[:, None] + col[None, :]
    tl.store(to, out, mask=real)


def formula(width):
    """As many heads of `width` pairs or channels as give each of 128 threads one 16-byte read of bf16 at a time: 32
    registers, 64 warps a multiprocessor. Derived from the compiled kernels, not measured."""
    return max(1, 1024 // next_power_of_2(width)), 4, 1


@torch.library.custom_op("nanocrystal::rope_rotate_", mutates_args={"qkv"})
def rotate_op_(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pos: torch.Tensor | None, interleaved: bool
) -> None:
    """qkv (B, T, 3, H, D), in place; cos, sin (>= T, R / 2) fp32; pos (B, T) integers or None: all contiguous."""
    B, T, _, H, D = qkv.shape
    HALF = cos.shape[1]
    HEADS, warps, _ = tile("rope", HALF, qkv.dtype, formula(HALF))
    rotate_kernel[(triton.cdiv(B * T * 2 * H, HEADS),)](
        qkv, cos, sin, pos, T, B * T, H, D, HALF, interleaved, HEADS, next_power_of_2(HALF), num_warps=warps
    )


@rotate_op_.register_fake
def _(qkv, cos, sin, pos, interleaved):
    return None


@torch.library.custom_op("nanocrystal::rope_pack", mutates_args=())
def pack_op(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    pos: torch.Tensor | None, interleaved: bool,
) -> torch.Tensor:  # fmt: skip
    """dq, dk, dv (B, H, T, D) of any strides -> dqkv (B, T, 3, H, D) in their dtype."""
    B, H, T, D = dq.shape
    out = pack_fake(dq, dk, dv, cos, sin, pos, interleaved)
    if not dq.stride() == dk.stride() == dv.stride() or dq.stride(3) != 1:
        dq, dk, dv = (d.contiguous() for d in (dq, dk, dv))
    HEADS, warps, _ = tile("rope_pack", D, dq.dtype, formula(D))
    pack_kernel[(triton.cdiv(B * T * H, HEADS), 3)](
        dq, dk, dv, out, cos, sin, pos, T, B * T, *dq.stride()[:3], H, D, cos.shape[1], interleaved, HEADS,
        next_power_of_2(D), num_warps=warps,
    )  # fmt: skip
    return out


@pack_op.register_fake
def pack_fake(dq, dk, dv, cos, sin, pos, interleaved):
    B, H, T, D = dq.shape
    return dq.new_empty(B, T, 3, H, D)


class RopeQKV(torch.autograd.Function):
    """In place: the product that made qkv does not keep it, and only a quarter of the channels must be written."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, pos, interleaved):
        ctx.save_for_backward(cos, sin, pos)
        ctx.interleaved = interleaved
        rotate = rotate_op_ if runs_triton("rope", qkv) else reference_rotate_
        rotate(qkv, cos, sin, pos, interleaved)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        pack = pack_op if runs_triton("rope", dq) else reference_pack
        return pack(dq, dk, dv, *ctx.saved_tensors, ctx.interleaved), None, None, None, None


def rope_qkv_(qkv, cos, sin, interleaved=False, pos=None):
    """Rotate the first R = 2 * cos.shape[1] channels of every q and k head, in place; v and the rest stay.

    qkv: (B, T, 3, H, D) contiguous; use what is returned, not qkv, afterwards. cos, sin: (>= T, R / 2) fp32. Channel i
    is paired with i + R/2 (half-split, as in Llama and StableLM) or, `interleaved`, 2i with 2i + 1 (as in GPT-J and
    the released Crystal); the kernels read the latter two bytes at a time, the former sixteen. pos: (B, T) integer
    positions, or None for 0 .. T-1. Returns q, k, v: views of qkv, each (B, H, T, D); their gradients are rotated back
    while they are packed. The arithmetic is fp32.

    What made qkv must not have kept it: selective recomputation that saves this product refuses, because it would
    otherwise be rotated twice. ValueError for a qkv or tables that cannot be meant.
    """
    if not qkv.is_contiguous():
        raise ValueError("rope_qkv_ works in place and needs a contiguous qkv")
    if pos is None and len(cos) < qkv.shape[1]:
        raise ValueError(f"rope_qkv_ has tables for {len(cos)} positions and {qkv.shape[1]} to turn")
    if qkv.ndim != 5 or qkv.shape[2] != 3 or 2 * cos.shape[1] > qkv.shape[4]:
        raise ValueError(f"rope_qkv_ cannot turn {2 * cos.shape[1]} channels of {tuple(qkv.shape)}, (B, T, 3, H, D)")
    cos, sin, pos = (t if t is None else t.contiguous() for t in (cos, sin, pos))
    return RopeQKV.apply(qkv, cos, sin, pos, interleaved)
