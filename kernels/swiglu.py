"""The gated unit of the MLP: SwiGLU (Shazeer, arXiv 2002.05202)."""

import torch
import torch.nn.functional as F

from kernels.backend import runs_triton, tile, tl, triton


def reference(gate_up, gate_first):
    gate, up = gate_up.chunk(2, dim=-1) if gate_first else gate_up.chunk(2, dim=-1)[::-1]
    return F.silu(gate) * up


@triton.jit
def forward_kernel(GATE_UP, H, WIDTH: tl.constexpr, GATE_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of one row a program; neighbours share the row."""
    row = (tl.program_id(0) // tl.cdiv(WIDTH, BLOCK)).to(tl.int64)
    col = tl.program_id(0) % tl.cdiv(WIDTH, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    at = GATE_UP + row * 2 * WIDTH + col
    first = tl.load(at, mask=col < WIDTH, other=0.0).to(tl.float32)
    second = tl.load(at + WIDTH, mask=col < WIDTH, other=0.0).to(tl.float32)
    gate, up = (first, second) if GATE_FIRST else (second, first)
    tl.store(H + row * WIDTH + col, (gate * tl.sigmoid(gate) * up).to(H.dtype.element_ty), mask=col < WIDTH)


@triton.jit
def backward_kernel(DH, GATE_UP, D, WIDTH: tl.constexpr, GATE_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """D: gradient of GATE_UP; programs as in the forward."""
    row = (tl.program_id(0) // tl.cdiv(WIDTH, BLOCK)).to(tl.int64)
    col = tl.program_id(0) % tl.cdiv(WIDTH, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    at = row * 2 * WIDTH + col
    dh = tl.load(DH + row * WIDTH + col, mask=col < WIDTH, other=0.0).to(tl.float32)
    first = tl.load(GATE_UP + at, mask=col < WIDTH, other=0.0).to(tl.float32)
    second = tl.load(GATE_UP + at + WIDTH, mask=col < WIDTH, other=0.0).to(tl.float32)
    gate, up = (first, second) if GATE_FIRST else (second, first)
    s = tl.sigmoid(gate)
    dgate = dh * up * s * (1 + gate * (1 - s))
    dup = dh * gate * s
    first, second = (dgate, dup) if GATE_FIRST else (dup, dgate)
    tl.store(D + at, first.to(D.dtype.element_ty), mask=col < WIDTH)
    tl.store(D + at + WIDTH, second.to(D.dtype.element_ty), mask=col < WIDTH)


# columns, so that each of 128 threads reads 16 bytes of bf16 at once: 32 registers, 64 warps a multiprocessor; derived
# from the compiled kernels, not measured
FORMULA = 1024, 4, 1


@torch.library.custom_op("nanocrystal::swiglu", mutates_args=())
def swiglu_op(gate_up: torch.Tensor, gate_first: bool) -> torch.Tensor:
    """gate_up (..., 2f) -> (..., f)."""
    h = swiglu_fake(gate_up, gate_first)
    width = h.shape[-1]
    BLOCK, warps, _ = tile("swiglu", width, h.dtype, FORMULA)
    programs = h.numel() // width * triton.cdiv(width, BLOCK)
    forward_kernel[(programs,)](gate_up.contiguous(), h, width, gate_first, BLOCK, num_warps=warps)
    return h


@swiglu_op.register_fake
def swiglu_fake(gate_up, gate_first):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("nanocrystal::swiglu_backward", mutates_args=())
def swiglu_backward_op(dh: torch.Tensor, gate_up: torch.Tensor, gate_first: bool) -> torch.Tensor:
    """dh (..., f), gate_up (..., 2f) -> gradient of gate_up."""
    d = swiglu_backward_fake(dh, gate_up, gate_first)
    width = dh.shape[-1]
    BLOCK, warps, _ = tile("swiglu_backward", width, dh.dtype, FORMULA)
    programs = dh.numel() // width * triton.cdiv(width, BLOCK)
    backward_kernel[(programs,)](
        dh.contiguous(), gate_up.contiguous(), d, width, gate_first, BLOCK, num_warps=warps
    )  # fmt: skip
    return d


@swiglu_backward_op.register_fake
def swiglu_backward_fake(dh, gate_up, gate_first):
    return gate_up.new_empty(gate_up.shape)


def save(ctx, inputs, output):
    gate_up, ctx.gate_first = inputs
    ctx.save_for_backward(gate_up)


def backward(ctx, dh):
    return swiglu_backward_op(dh, *ctx.saved_tensors, ctx.gate_first), None


swiglu_op.register_autograd(backward, setup_context=save)


def swiglu(gate_up, gate_first=True):
    """silu(gate) * up on packed halves: gate_up (..., 2f) -> (..., f), same dtype; the kernel's arithmetic is fp32.

    `gate_first` says which half passes through silu. Crystal's `fc(x) * silu(fc2(x))` is gate = fc2, up = fc.
    """
    if runs_triton("swiglu", gate_up) and gate_up.shape[-1] % 16 == 0:  # else rows do not begin at 16 bytes
        return swiglu_op(gate_up, gate_first)
    return reference(gate_up, gate_first)
