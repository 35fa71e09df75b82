"""The output head and its loss as one operation, which never holds the logits of the whole batch.

Logits are the largest tensor of a small model: 32k tokens x 50k words are 3 GB in bf16, and naive code keeps several
copies. Here rows are taken in chunks, and since the loss is the end of the network its gradients are formed in the
forward pass, while a chunk's logits are still at hand.
"""

import torch

LOGIT_BYTES = {"cpu": 16 << 20}  # per chunk: what stays in a CPU's last-level cache; elsewhere 4 GiB


class LinearCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, target, logit_scale, z_coef, ignore_index, vocab_real, divisor, rows, with_grad):
        w = (weight[:vocab_real] * logit_scale).to(x.dtype)  # padding of the vocabulary is no word
        valid = target != ignore_index
        column = target.clamp_min(0)[:, None]  # (N, 1); what ignored rows pick is multiplied by 0
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
        dx, dw = ctx.saved_tensors
        return dx * dloss.to(dx.dtype), dw * dloss.to(dw.dtype), *[None] * 8


def linear_ce(
    x, weight, target, logit_scale=1.0, z_coef=0.0, ignore_index=-1, vocab_real=None, divisor=None, max_logit_bytes=None
):
    """Cross-entropy of softmax(logit_scale * x weight^T) against target, plus z-loss, without the full logits.

    x: (N, d) float. weight: (V, d) float, cast to x's dtype for the products. target: (N,) int64; rows equal to
    `ignore_index` count for nothing. Columns from `vocab_real` (default V) on are padding and get no probability.
    loss = (sum of losses + z_coef * sum of lse^2) / divisor, where divisor is the number of valid targets if None (else
    a number or scalar tensor: Crystal divides by batch * length whatever is masked), and the z term keeps the softmax
    normaliser near 1 (PaLM, arXiv 2204.02311, section 5). max_logit_bytes bounds one chunk of fp32 logits.
    Returns loss, a scalar with gradient; token_loss, (N,), without z-loss, 0 where ignored; and the sum of lse^2: fp32.
    The last two carry no gradient: they serve logs and evaluation.
    """
    budget = max_logit_bytes or LOGIT_BYTES.get(x.device.type, 4 << 30)
    rows = max(1, min(len(x), budget // (4 * len(weight))))
    with_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    vocab_real = len(weight) if vocab_real is None else vocab_real
    return LinearCE.apply(x, weight, target, logit_scale, z_coef, ignore_index, vocab_real, divisor, rows, with_grad)
