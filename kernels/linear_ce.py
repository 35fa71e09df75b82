"""The output head and its loss as one operation, which never holds the logits of the whole batch.

Logits are the largest tensor of a small model: 32k tokens x 50k words are 3 GB in bf16, and naive code keeps several
copies. Here rows are taken in chunks, and since the loss is the end of the network its gradients are formed in the
forward pass, while a chunk's logits are at hand. On a GPU chunks are large, because each reads and writes the fp32
gradient of the weight; on a CPU as small as its cache.
"""

import torch

from kernels.backend import runs_triton, tile, tl, triton
from kernels.product import accumulate

LOGIT_BYTES = {"cpu": 16 << 20}  # per chunk: what stays in a CPU's last-level cache; elsewhere 4 GiB


class Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, target, logit_scale, z_coef, ignore_index, vocab_real, divisor, rows, with_grad):
        w = (weight[:vocab_real] * logit_scale).to(x.dtype)  # padding of the vocabulary is no word
        valid = target != ignore_index
        column = torch.where(valid, target, 0)[:, None]  # (N, 1); what ignored rows pick is multiplied by 0
        if divisor is None:
            divisor = valid.sum().clamp_min(1)
        token_loss = torch.empty(len(x), dtype=torch.float32, device=x.device)
        lse_sq = torch.empty_like(token_loss)
        if with_grad:
            dx, dw = torch.empty_like(x), torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
        for lo in range(0, len(x), rows):
            at = slice(lo, lo + rows)
            u = x[at] @ w.T  # (rows, vocab_real)
            logp = torch.log_softmax(u, dim=1, dtype=torch.float32)
            picked = logp.gather(1, column[at])
            lse = u[:, :1].float() - logp[:, :1]
            token_loss[at] = -picked[:, 0] * valid[at]
            lse_sq[at] = lse[:, 0].square() * valid[at]
            if with_grad:
                # d loss / d logit = ((1 + 2 k lse) softmax - onehot) / n. The 1 is taken off before rounding to bf16: a
                # probability near 1 would otherwise lose all of its gradient.
                weigh, row = 1 + 2 * z_coef * lse, valid[at, None] / divisor
                du = torch.mul(logp.exp_(), weigh * row, out=u)
                du.scatter_(1, column[at], ((picked.exp() * weigh - 1) * row).to(u.dtype))
                torch.mm(du, w, out=dx[at])
                dw[:vocab_real] += du.T @ x[at]
        if with_grad and logit_scale != 1.0:
            dw *= logit_scale
        lse_sq_sum = lse_sq.sum()
        loss = (token_loss.sum() + z_coef * lse_sq_sum) / divisor
        if with_grad:
            ctx.save_for_backward(dx, dw.to(weight.dtype))
        ctx.mark_non_differentiable(token_loss, lse_sq_sum)
        return loss, token_loss, lse_sq_sum

    @staticmethod
    def backward(ctx, dloss, *_):
        return *backward(ctx, dloss), None, None


@triton.jit
def cross_entropy_kernel(
    U, TARGET, DIVISOR, LOSS, LSE_SQ, logit_scale, z_coef, ignore_index, vocab_real,
    V: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, WITH_GRAD: tl.constexpr,
):  # fmt: skip
    """One row of logits u (rows, V) a program, the last row first: it was written last and may still be in the cache.

    Each 8 neighbouring columns of a tile, which a thread reads as 16 bytes of bf16, share a maximum and a sum, in base
    2: few registers, and the one exchange between threads comes after the loop. The second pass replaces each logit by
    its gradient.
    """
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    U += row.to(tl.int64) * V
    target = tl.load(TARGET + row)
    valid = target != ignore_index
    log2e: tl.constexpr = 1.4426950408889634
    scale = logit_scale * log2e
    known = (target >= 0) & (target < vocab_real)  # another target, if not ignored, makes the loss NaN
    picked = tl.load(U + target, mask=known, other=float("nan")).to(tl.float32) * logit_scale
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK // 8], -1e30, tl.float32)  # finite: where no column is seen, inf - inf must not make NaN
    total = tl.zeros([BLOCK // 8], tl.float32)
    for lo in tl.range(0, V, BLOCK, num_stages=STAGES):
        col = lo + lane
        # masked by V, whose alignment is known: by vocab_real the load would fall to two bytes at a time
        z = tl.load(U + col, mask=col < V, other=0.0).to(tl.float32) * scale
        z = tl.reshape(tl.where(col < vocab_real, z, -1e30), [BLOCK // 8, 8])
        higher = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(z - higher[:, None]), 1)
        top = higher
    most = tl.max(top, 0)
    lse2 = most + tl.log2(tl.sum(total * tl.exp2(top - most), 0))
    lse = lse2 / log2e
    tl.store(LOSS + row, tl.where(valid, lse - picked, 0.0))
    tl.store(LSE_SQ + row, tl.where(valid, lse * lse, 0.0))
    if WITH_GRAD:
        weigh = 1.0 + 2.0 * z_coef * lse
        factor = logit_scale / tl.load(DIVISOR)
        for lo in tl.range(0, V, BLOCK, num_stages=STAGES):
            col = lo + lane
            z = tl.load(U + col, mask=col < V, other=0.0).to(tl.float32) * scale
            # the 1 of the target is taken off before rounding: else a probability near 1 would lose its gradient
            du = (tl.exp2(z - lse2) * weigh - tl.where(col == target, 1.0, 0.0)) * factor
            du = tl.where(valid & (col < vocab_real), du, 0.0)
            tl.store(U + col, du.to(U.dtype.element_ty), mask=col < V)


def formula(V):
    """Columns so that each thread reads 16 bytes of bf16 twice, while the next 32 are under way to shared memory.

    That takes at most 64 registers: 32 warps a multiprocessor. They share 2 long rows rather than 4, so that the
    second pass finds its row in the L2 cache: 2 rows of 50,304 words on each of 132 multiprocessors are 26 MB of an
    H100's 50. Derived from the compiled kernel, not measured.
    """
    return (4096, 8, 2) if V <= 16384 else (8192, 16, 2)


@torch.library.custom_op("nanocrystal::linear_ce", mutates_args=())
def linear_ce_op(
    x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, logit_scale: float, z_coef: float, ignore_index: int,
    vocab_real: int, divisor: torch.Tensor | None, rows: int, with_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> loss, token_loss (N,), lse_sq_sum, and dx, dw as x and weight, which are empty unless with_grad."""
    N, V, w = len(x), len(weight), weight.to(x.dtype)
    if divisor is None:
        divisor = (target != ignore_index).sum().clamp_min(1)
    divisor = divisor.to(torch.float32)
    token_loss, lse_sq = (x.new_empty(N, dtype=torch.float32) for _ in range(2))  # lse_sq: 0 where ignored
    dx, logits = torch.empty_like(x) if with_grad else x.new_empty(0), x.new_empty(min(rows, N), V)
    # in one chunk cuBLAS can round the sum it keeps in fp32; several chunks must add up before they are rounded
    dtype = weight.dtype if weight.dtype == w.dtype and rows >= N else torch.float32
    dw = torch.empty(weight.shape if with_grad else 0, dtype=dtype, device=x.device)
    BLOCK, warps, stages = tile("linear_ce", V, x.dtype, formula(V))
    for lo in range(0, N, rows):
        some = x[lo : lo + rows]
        u = torch.mm(some, w.T, out=logits[: len(some)])
        cross_entropy_kernel[(len(some),)](
            u, target[lo:], divisor, token_loss[lo:], lse_sq[lo:], logit_scale, z_coef, ignore_index, vocab_real,
            V, BLOCK, stages, with_grad, num_warps=warps,
        )  # fmt: skip
        if with_grad:
            torch.mm(u, w, out=dx[lo : lo + rows])
            accumulate(dw, u, some, first=lo == 0)
    lse_sq_sum = lse_sq.sum()
    loss = (token_loss.sum() + z_coef * lse_sq_sum) / divisor
    return loss, token_loss, lse_sq_sum, dx, dw.to(weight.dtype)


@linear_ce_op.register_fake
def linear_ce_fake(x, weight, target, logit_scale, z_coef, ignore_index, vocab_real, divisor, rows, with_grad):
    loss, lse_sq_sum = (x.new_empty((), dtype=torch.float32) for _ in range(2))
    dx, dw = (torch.empty_like(t) if with_grad else t.new_empty(0) for t in (x, weight))
    return loss, x.new_empty(len(x), dtype=torch.float32), lse_sq_sum, dx, dw


def save(ctx, inputs, output):
    ctx.save_for_backward(*output[3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def backward(ctx, dloss, *_):
    dx, dw = ctx.saved_tensors
    # in fp32, where loss / 3 does not become loss * 0.334
    return (dx.float() * dloss).to(dx.dtype), (dw.float() * dloss).to(dw.dtype), *[None] * 6


linear_ce_op.register_autograd(lambda ctx, *grads: (*backward(ctx, *grads), None, None), setup_context=save)


def linear_ce(
    x, weight, target, logit_scale=1.0, z_coef=0.0, ignore_index=-1, vocab_real=None, divisor=None, max_logit_bytes=None
):
    """Cross-entropy of softmax(logit_scale * x weight^T) against target, plus z-loss, without the full logits.

    x: (N, d) float, N > 0; not fp16, in which gradients of a mean over thousands of rows are 0. weight: (V, d) float,
    cast to x's dtype for the products. target: (N,) int64; rows equal to `ignore_index` count for nothing. Columns from
    `vocab_real` (default V) on are padding and get no probability.
    loss = (sum of losses + z_coef * sum of lse^2) / divisor, where divisor is the number of valid targets if None (else
    a number or scalar tensor: Crystal divides by batch * length whatever is masked), and the z term keeps the softmax
    normaliser near 1 (PaLM, arXiv 2204.02311, section 5). max_logit_bytes bounds one chunk of logits, in the
    reference their fp32 copy.
    Returns loss, a scalar with gradient; token_loss, (N,), without z-loss, 0 where ignored; and the sum of lse^2: fp32.
    The last two carry no gradient: they serve logs and evaluation. A target that is neither a word nor ignored is a
    RuntimeError of the reference; the kernel, which does not wait for the device, makes the loss NaN.
    """
    fused = runs_triton("linear_ce", x)
    # the reference keeps a chunk's probabilities in fp32
    rows = (max_logit_bytes or LOGIT_BYTES.get(x.device.type, 4 << 30)) // ((x.itemsize if fused else 4) * len(weight))
    rows = -(-len(x) // -(-len(x) // max(1, rows)))  # chunks of one size
    with_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    vocab_real = len(weight) if vocab_real is None else vocab_real
    if not fused:
        return Reference.apply(
            x, weight, target, logit_scale, z_coef, ignore_index, vocab_real, divisor, rows, with_grad
        )
    if divisor is not None and not torch.is_tensor(divisor):
        divisor = torch.full((), divisor, dtype=torch.float32, device=x.device)
    x, weight, target = (t.contiguous() for t in (x, weight, target))
    return linear_ce_op(
        x, weight, target, logit_scale, z_coef, ignore_index, vocab_real, divisor, rows, with_grad
    )[:3]  # fmt: skip
