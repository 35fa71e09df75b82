"""Residual addition and normalisation in one step: the residual stream is written once and normalised as written."""

import torch
import torch.nn.functional as F

from kernels.backend import next_power_of_2, processors, runs_triton, tile, tl, triton


def reference(x, residual, weight, bias, eps, rms, alpha):
    if alpha != 1.0:
        x = x * alpha
    r = x if residual is None else residual + x
    # not in bf16, where a CPU also sums the weight's gradient over rows in bf16, and is several per cent off
    up = torch.promote_types(r.dtype, torch.float32)
    if rms:
        return F.rms_norm(r.to(up), weight.shape, weight.to(up), eps).to(r.dtype), r
    bias = None if bias is None else bias.to(up)
    return F.layer_norm(r.to(up), weight.shape, weight.to(up), bias, eps).to(r.dtype), r


@triton.jit
def forward_kernel(
    X, RESIDUAL, W, BIAS, Y, R, MEAN, RSTD, M, eps, alpha,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows a program, in registers. MEAN, RSTD (M,) fp32 are kept for the backward."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    real = (row < M)[:, None] & (col < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + col[None, :]
    r = tl.load(X + at, mask=real, other=0.0).to(tl.float32) * alpha
    if RESIDUAL is not None:
        r += tl.load(RESIDUAL + at, mask=real, other=0.0).to(tl.float32)
    r = r.to(R.dtype.element_ty)
    tl.store(R + at, r, mask=real)
    r = r.to(tl.float32)  # the statistics are those of the rounded sum, which is what the backward will see
    if not RMS:
        mean = tl.sum(r, 1) / D
        tl.store(MEAN + row, mean, mask=row < M)
        r = tl.where(real, r - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(r * r, 1) / D + eps)
    tl.store(RSTD + row, rstd, mask=row < M)
    y = r * rstd[:, None] * tl.load(W + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
    if BIAS is not None:
        y += tl.load(BIAS + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=real)


@triton.jit
def backward_kernel(
    DY, DR, R, W, MEAN, RSTD, DX, DW, DB, M,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Each program strides over the rows and leaves its sums for the weight in its own row of DW, DB (programs, D)."""
    col = tl.arange(0, BLOCK)
    w = tl.load(W + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS)
        real = (row < M)[:, None] & (col < D)[None, :]
        at = row.to(tl.int64)[:, None] * D + col[None, :]
        dy = tl.load(DY + at, mask=real, other=0.0).to(tl.float32)
        r = tl.load(R + at, mask=real, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row, mask=row < M, other=0.0)[:, None]
        if not RMS:
            r = tl.where(real, r - tl.load(MEAN + row, mask=row < M, other=0.0)[:, None], 0.0)
        unit = r * rstd
        dw += dy * unit  # here, so that dy need not be kept in registers until all threads have met
        if DB is not None:
            db += dy
        g = dy * w
        dx = g - unit * (tl.sum(g * unit, 1) / D)[:, None]
        if not RMS:
            dx -= (tl.sum(g, 1) / D)[:, None]
        dx *= rstd
        if DR is not None:
            dx += tl.load(DR + at, mask=real, other=0.0).to(tl.float32)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=real)
    out = tl.program_id(0) * D + col
    tl.store(DW + out, tl.sum(dw, 0), mask=col < D)
    if DB is not None:
        tl.store(DB + out, tl.sum(db, 0), mask=col < D)


def formula(D):
    """As many rows, at least one, and warps as give each thread 8 elements: one 16-byte read of bf16 from each tensor.

    The forward then takes 32 registers a thread, and 64 warps fit a multiprocessor; the backward, which keeps its sums
    there too, 60 to 70. With 4 rows of 1,024 it took 200: 8 warps. Derived from the compiled kernels, not measured.
    """
    width = next_power_of_2(D)
    return max(1, 1024 // width), max(4, width // 256), 2


@torch.library.custom_op("nanocrystal::add_norm", mutates_args=())
def add_norm_op(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None,
    eps: float, rms: bool, alpha: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> y, r as x, and mean, rstd (rows,) fp32; mean is empty with rms. weight, bias (D,) contiguous."""
    D, M = x.shape[-1], x.numel() // x.shape[-1]
    y, r, mean, rstd = add_norm_fake(x, residual, weight, bias, eps, rms, alpha)
    ROWS, warps, _ = tile("norm", D, x.dtype, formula(D))
    forward_kernel[(triton.cdiv(M, ROWS),)](
        x.contiguous(), None if residual is None else residual.contiguous(), weight, bias, y, r, mean, rstd, M, eps,
        alpha, D, next_power_of_2(D), ROWS, rms, num_warps=warps,
    )  # fmt: skip
    return y, r, mean, rstd


@add_norm_op.register_fake
def add_norm_fake(x, residual, weight, bias, eps, rms, alpha):
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y, r = (torch.empty(x.shape, dtype=dtype, device=x.device) for _ in range(2))
    rows = x.numel() // x.shape[-1]
    mean, rstd = (torch.empty(n, dtype=torch.float32, device=x.device) for n in (0 if rms else rows, rows))
    return y, r, mean, rstd


@torch.library.custom_op("nanocrystal::add_norm_backward", mutates_args=())
def add_norm_backward_op(
    dy: torch.Tensor, dr: torch.Tensor | None, r: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor,
    rstd: torch.Tensor, rms: bool, with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> dx as r, and dw, db (D,) fp32; db is empty without a bias."""
    D, M = r.shape[-1], rstd.numel()
    ROWS, warps, stages = tile("norm_backward", D, r.dtype, formula(D))
    # as many as fit at once, since each has the same number of rows: 32 warps a multiprocessor, or 28 of 70 registers
    programs = min(triton.cdiv(M, ROWS), min(6, max(1, 32 // warps)) * processors(r))
    dx = torch.empty_like(r)
    dw, db = (torch.empty(programs, D if some else 0, dtype=torch.float32, device=r.device) for some in (1, with_bias))
    backward_kernel[(programs,)](
        dy.contiguous(), None if dr is None else dr.contiguous(), r, weight, mean, rstd, dx, dw,
        db if with_bias else None, M, D, next_power_of_2(D), ROWS, rms, stages, num_warps=warps,
    )  # fmt: skip
    return dx, dw.sum(0), db.sum(0)


@add_norm_backward_op.register_fake
def _(dy, dr, r, weight, mean, rstd, rms, with_bias):
    dw, db = (r.new_empty(r.shape[-1] if some else 0, dtype=torch.float32) for some in (True, with_bias))
    return torch.empty_like(r), dw, db


def save(ctx, inputs, output):
    x, residual, weight, bias, _, rms, alpha = inputs
    _, r, mean, rstd = output
    ctx.save_for_backward(r, weight, mean, rstd)
    ctx.rms, ctx.alpha, ctx.dtype = rms, alpha, x.dtype
    ctx.residual = None if residual is None else residual.dtype
    ctx.bias = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def backward(ctx, dy, dr, *_):
    r, weight, mean, rstd = ctx.saved_tensors
    dy = torch.zeros_like(r) if dy is None else dy
    d, dw, db = add_norm_backward_op(dy, dr, r, weight, mean, rstd, ctx.rms, ctx.bias is not None)
    dx = (d if ctx.alpha == 1.0 else d * ctx.alpha).to(ctx.dtype)  # one tensor for both inputs, as an addition does
    residual = d.to(ctx.residual) if ctx.residual else None
    return dx, residual, dw.to(weight.dtype), db.to(ctx.bias) if ctx.bias else None, None, None, None


add_norm_op.register_autograd(backward, setup_context=save)


def add_norm(x, residual, weight, bias=None, eps=1e-5, rms=False, alpha=1.0):
    """r = residual + alpha * x; y = norm(r) * weight + bias.

    x: (..., d) branch output, any float dtype. residual: (..., d), or None: then r = alpha * x. weight, bias: (d,);
    bias may be None, and with `rms` must be. alpha: multiplier of the branch. LayerNorm (arXiv 1607.06450), with `rms`
    RMSNorm (arXiv 1910.07467); the arithmetic is fp32 at least, on r as stored.
    Returns (y, r), both (..., d) in the dtype of the residual stream.
    """
    plain = residual is None or residual.shape == x.shape  # the kernel does not broadcast
    if runs_triton("norm", x) and plain and x.shape[-1] <= 8192:  # a row has to fit a program's registers
        weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
        return add_norm_op(x, residual, weight, bias, eps, rms, alpha)[:2]
    return reference(x, residual, weight, bias, eps, rms, alpha)
