"""Gradients of weights that are summed in fp32 by the matrix products that make them. PyTorch only, on every device."""

import torch
import torch.nn.functional as F


def accumulate(dw, dy, x, first=False):
    """dw (out, in) += dy (N, out)^T x (N, in), or = if `first`. A GPU sums in fp32 whatever dy and x are stored in."""
    beta = 0 if first else 1
    if dy.dtype == dw.dtype:
        torch.addmm(dw, dy.T, x, beta=beta, out=dw)
    elif dw.is_cuda:
        torch.addmm(dw, dy.T, x, torch.float32, beta=beta, out=dw)
    else:
        torch.addmm(dw, dy.T.float(), x.float(), beta=beta, out=dw)


@torch.library.custom_op("nanocrystal::accumulate_", mutates_args={"dw"})
def accumulate_op_(dw: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> None:
    """An operation, because torch.compile would turn addmm(out=dw) into a new sum and its copy to dw."""
    accumulate(dw, dy, x)


class Product(torch.autograd.Function):
    """x (..., in), weight (out, in), bias (out,) or None -> x weight^T + bias (..., out) in x's dtype.

    copy: weight in x's dtype. dw: fp32, like weight; the backward pass adds weight's gradient to it and returns none.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, copy, dw):
        ctx.save_for_backward(x, copy, dw)
        return F.linear(x, copy, bias)

    @staticmethod
    def backward(ctx, dy):
        x, copy, dw = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        accumulate_op_(dw, rows, x.flatten(0, -2))
        return dy @ copy, None, rows.sum(0) if ctx.needs_input_grad[2] else None, None, None
