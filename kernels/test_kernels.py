"""Every kernel against float64, in Triton's interpreter on a CPU or, where there is one, on an NVIDIA GPU.

    TRITON_INTERPRET=1 python -m pytest kernels/test_kernels.py     # without a GPU; test_smoke.py does this too
    python -m pytest kernels/test_kernels.py                        # on one

The interpreter must be on before Triton is imported. It sees arithmetic and indexing, not races, alignment or speed, so
on a GPU the same tests take larger sizes, training's among them, another seed each time, and real bf16. Memory that
nobody wrote is NaN: see `poison`. The oracles are written out in float64, apart from the references that stand beside
the kernels.
"""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

import train
from kernels import add_norm, attention, backend, batch_mask, linear_ce, rope_qkv_, rope_tables, swiglu
from kernels.attention import attention_mask, visible
from model import GPT, GPTConfig, init_weights

GPU = torch.cuda.is_available() and not backend.INTERPRET
if not (GPU or backend.INTERPRET):
    pytest.exit("there is no GPU and TRITON_INTERPRET=1 is not set, or triton is not installed", returncode=2)
if (
    not GPU
    and backend.triton.__version__.startswith("3.6")
    and not np.__version__.startswith(("1.", "2.0", "2.1", "2.2", "2.3"))
):
    pytest.exit("the interpreter of Triton 3.6 and earlier needs numpy below 2.4 (triton#9171)", returncode=2)
ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if GPU else "cpu"
SEED = int(os.environ.get("SEED", int.from_bytes(os.urandom(3), "little") if GPU else 1))  # a failure names it
# the interpreter cuts bf16 off where hardware rounds: twice the error, and biased
EPS = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 3e-3 if GPU else 8e-3}
DTYPES = list(EPS)


def sizes(small, odd, training, dtypes=DTYPES):
    """Parameters `shape` and `dtype`: small shapes in the interpreter; on a GPU such as fit no tile, in as many dtypes,
    and in bf16 those of training."""
    cases = list(itertools.product(odd if GPU else small, dtypes))
    if GPU:
        cases += [(shape, torch.bfloat16) for shape in training]
    return pytest.mark.parametrize(("shape", "dtype"), cases, ids=str)


@pytest.fixture(autouse=True)
def poison():
    """Fresh memory is NaN, so that an element nobody wrote is seen; and all operations are Triton's."""
    torch._dynamo.reset()  # the one compiled FlexAttention may compile anew 8 times: for one test, not for all together
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    before = dict(backend.using)
    backend.using.update(dict.fromkeys(backend.using, "triton"))
    if not GPU:  # several turns of the loops, over columns and over rows, at the small sizes here
        backend.TILES.update({("linear_ce", width, size): (256, 4, 1) for width in (512, 1024) for size in (2, 4)})
        backend.TILES.update({("norm_backward", 64, size): (4, 16, 1) for size in (2, 4)})  # by 2 programs
    yield
    backend.using.update(before)
    torch.use_deterministic_algorithms(False)


def draw(*shape, dtype=torch.float32, scale=1.0, shift=0.0, salt=0):
    generator = torch.Generator(DEVICE).manual_seed(SEED + salt + sum(shape) * 7919)
    return (torch.randn(shape, generator=generator, device=DEVICE) * scale + shift).to(dtype)


def words(n, *shape):
    """Integers below n, int64."""
    return torch.randint(n, shape, generator=torch.Generator(DEVICE).manual_seed(SEED + n), device=DEVICE)


def assert_close(got, want, tolerance, what=""):
    """Relative error in the norm over the whole tensor; NaN never passes."""
    error = (got.double() - want).norm().item()
    size = want.norm().item()
    assert error <= tolerance * size + 1e-30, f"{what}: off by {error:.2e} of {size:.2e}, SEED={SEED}"


def assert_same(got, want, tolerance=1e-6):
    """The same bits in the interpreter; on a GPU to rounding, since two variants of a kernel may fuse products and sums
    differently, and libraries may add in any order."""
    assert_close(got, want.double(), tolerance if GPU else 0)


def gradients(function, inputs, upstream):
    """Outputs of function and gradients of sum(output * upstream) over the inputs that are not None."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    total = sum((y * u.to(y.dtype)).sum() for y, u in zip(outputs, upstream, strict=True) if u is not None)
    return outputs, torch.autograd.grad(total, [x for x in leaves if x is not None])


def compare(function, oracle, inputs, upstream, tolerances):
    """function on the inputs as they are against oracle on them in float64: outputs, then gradients."""
    outputs, grads = gradients(function, inputs, upstream)
    wide = [None if x is None else x.double() for x in inputs]
    want, want_grads = gradients(oracle, wide, [None if u is None else u.double() for u in upstream])
    tensors = zip((*outputs, *grads), (*want, *want_grads), tolerances, strict=True)
    for i, (a, b, tolerance) in enumerate(tensors):
        assert_close(a, b, tolerance, f"tensor {i}")


# --------------------------------------------------------------------------------------------------------------- norm


def norm_oracle(rms, alpha):
    def oracle(x, residual, weight, bias):
        r = alpha * x if residual is None else residual + alpha * x
        centred = r if rms else r - r.mean(-1, keepdim=True)
        y = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
        return y if bias is None else y + bias, r

    return oracle


@sizes([(3, 7, 37)], [(3, 4097, 771)], [(8, 2048, 2048), (32, 1024, 768)])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize(("rms", "with_bias", "alpha"), [(False, True, 1.0), (False, False, 0.5), (True, False, 1.0)])
def test_add_norm_forward_and_backward(rms, with_bias, alpha, with_residual, shape, dtype):
    x, residual = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, salt=1) if with_residual else None
    weight, bias = draw(shape[-1], shift=1.0), draw(shape[-1], salt=2) if with_bias else None
    upstream = [draw(*shape, dtype=dtype, salt=3), draw(*shape, dtype=dtype, salt=4)]
    eps, sums = EPS[dtype], max(1e-4, 4 * EPS[dtype])  # r is rounded to dtype before anything is made of it
    tolerances = [eps * 2, eps, *[eps * 2] * (1 + with_residual), *[sums] * (1 + with_bias)]
    compare(
        lambda *t: add_norm(*t, rms=rms, alpha=alpha), norm_oracle(rms, alpha),
        [x, residual, weight, bias], upstream, tolerances,
    )  # fmt: skip


@pytest.mark.parametrize("rms", [False, True])
def test_gradients_of_the_norms_weights_are_sums_in_fp32_also_when_the_rows_are_bf16(rms):
    shape = (32769, 768) if GPU else (40, 64)
    x, dy, weight = draw(*shape, dtype=torch.bfloat16), draw(*shape, dtype=torch.bfloat16, salt=1), draw(shape[1])
    bias = None if rms else draw(shape[1], salt=2)
    _, grads = gradients(lambda x, w, b: add_norm(x, None, w, b, rms=rms), [x, weight, bias], [dy, None])
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    _, want = gradients(lambda x, w, b: norm_oracle(rms, 1.0)(x, None, w, b), wide, [dy.double(), None])
    for got, expected in zip(grads[1:], want[1:], strict=True):
        assert_close(got, expected, 1e-4)


def test_the_statistics_of_a_norm_are_those_of_the_residual_stream_as_stored():
    """At 200, bf16 numbers are 1 apart: what is normalised must be the rounded sum, which the backward sees too."""
    d = 768 if GPU else 64
    x, residual = draw(32, d, dtype=torch.bfloat16, shift=100), draw(32, d, dtype=torch.bfloat16, shift=100, salt=1)
    ones = torch.ones(d, device=DEVICE)
    y, r = add_norm(x, residual, ones)
    assert_close(y, norm_oracle(False, 1.0)(r.double(), None, ones.double(), None)[0], EPS[torch.bfloat16])


def test_a_norm_takes_strided_weights_and_broadcasts_as_torch_does():
    d = 40
    x, weights = draw(2, 3, d), draw(d, 2, salt=1)
    stored = weights.double()
    y, _ = add_norm(x, None, weights[:, 0], weights[:, 1])
    assert_close(y, norm_oracle(False, 1.0)(x.double(), None, stored[:, 0], stored[:, 1])[0], 1e-6)
    y, _ = add_norm(x, x[:1], weights[:, 0].contiguous())
    assert_close(y, norm_oracle(False, 1.0)(x.double(), x[:1].double(), stored[:, 0], None)[0], 1e-6)


def test_norms_of_rows_far_from_zero_of_constant_rows_and_of_a_residual_stream_in_fp32():
    d = 768 if GPU else 40
    far = draw(9, d, shift=1000.0)
    residual, branch = draw(9, d, salt=1), draw(9, d, dtype=torch.bfloat16, salt=2)
    ones = torch.ones(d, device=DEVICE)
    want = norm_oracle(False, 1.0)(far.double(), None, ones.double(), None)[0]
    # fp32 itself has 3e-5 of a step of 1 at 1000; a GPU's division may be two such steps off
    assert_close(add_norm(far, None, ones)[0], want, 3e-4 if GPU else 1e-4)
    y, _ = add_norm(torch.full((3, d), 7.0, device=DEVICE), None, ones, draw(d))
    assert_same(y, draw(d).expand(3, d), 1e-3)  # nothing but the bias
    y, r = add_norm(branch, residual, ones)
    assert r.dtype == y.dtype == torch.float32
    assert_close(r, residual.double() + branch.double(), 1e-7)
    assert_close(y, norm_oracle(False, 1.0)(branch.double(), residual.double(), ones.double(), None)[0], 1e-6)


# ------------------------------------------------------------------------------------------------------------- swiglu


@sizes([(2, 3, 2 * 1032)], [(2, 1025, 2 * 2728)], [(16384, 2 * 5504)])  # each row ends in a part of a block
@pytest.mark.parametrize("gate_first", [True, False])
def test_swiglu_forward_and_backward(gate_first, shape, dtype):
    x, dh = draw(*shape, dtype=dtype, scale=3.0), draw(*shape[:-1], shape[-1] // 2, dtype=dtype, salt=1)

    def oracle(x):
        gate, up = x.chunk(2, -1) if gate_first else x.chunk(2, -1)[::-1]
        return [gate / (1 + (-gate).exp()) * up]

    compare(lambda x: [swiglu(x, gate_first)], oracle, [x], [dh], [EPS[dtype]] * 2)


def test_swiglu_saturates_without_nan_and_leaves_unaligned_widths_to_torch():
    x = torch.tensor([-3e4, -100.0, 0.0, 100.0, 3e4, 1.0, 1.0, 1.0] * 4, device=DEVICE)[None].requires_grad_()
    (grad,) = torch.autograd.grad(swiglu(x).sum(), x)
    assert swiglu(x).isfinite().all() and grad.isfinite().all()
    odd = draw(3, 2 * 5461)  # Crystal's MLP has 10,922 columns
    assert torch.equal(swiglu(odd), torch.nn.functional.silu(odd[:, :5461]) * odd[:, 5461:])


# --------------------------------------------------------------------------------------------------------------- rope


def turn(qkv, R, interleaved, pos):
    """q, k, v (B, H, T, D) in float64, rotated by multiplication with complex numbers."""
    B, T = qkv.shape[:2]
    frequency = 10000.0 ** (-torch.arange(0, R, 2, device=qkv.device).double() / R)
    angle = (torch.arange(T, device=qkv.device).expand(B, T) if pos is None else pos)[..., None] * frequency
    unit = torch.polar(torch.ones_like(angle), angle)[:, None]
    heads = []
    for part, x in enumerate(qkv.double().unbind(2)):
        x = x.transpose(1, 2)
        if part < 2:
            a, b = (x[..., 0:R:2], x[..., 1:R:2]) if interleaved else (x[..., : R // 2], x[..., R // 2 : R])
            z = torch.complex(a, b) * unit
            both = torch.stack((z.real, z.imag), -1).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)
            x = torch.cat((both, x[..., R:]), -1)
        heads.append(x)
    return heads


@sizes([(2, 7, 3, 16)], [(3, 1031, 5, 16)], [(4, 2048, 16, 128), (4, 2048, 12, 64)])
@pytest.mark.parametrize("interleaved", [False, True])
# a quarter, no power of two, all of the head; each with another kind of positions, which does not touch the channels
@pytest.mark.parametrize(("share", "positions"), [(1 / 4, "none"), (3 / 8, "each"), (1, "expanded")])
def test_rope_forward_and_backward(share, positions, interleaved, shape, dtype):
    B, T, H, D = shape
    R = int(share * D)
    cos, sin = rope_tables(2 * T, R, device=DEVICE)
    # the second an expanded view, whose memory is one row
    pos = {"none": None, "each": words(2 * T, B, T).int(), "expanded": words(2 * T, T).expand(B, T)}[positions]
    qkv = draw(B, T, 3, H, D, dtype=dtype)
    upstream = [draw(B, T, H, D, dtype=dtype, salt=i).transpose(1, 2) for i in range(3)]  # strided, as SDPA's are
    compare(
        lambda x: rope_qkv_(x.clone(), cos, sin, interleaved, pos), lambda x: turn(x, R, interleaved, pos),
        [qkv], upstream, [EPS[dtype], EPS[dtype], 0, EPS[dtype]],
    )  # fmt: skip


def test_rope_refuses_what_it_could_only_get_wrong():
    cos, sin = rope_tables(8, 4, device=DEVICE)
    with pytest.raises(ValueError, match="contiguous"):
        rope_qkv_(draw(2, 3, 8, 2, 8).transpose(1, 2), cos, sin)
    with pytest.raises(ValueError, match="8 positions and 9"):
        rope_qkv_(draw(2, 9, 3, 2, 8), cos, sin)
    with pytest.raises(ValueError, match="cannot turn 4 channels"):
        rope_qkv_(draw(2, 8, 3, 2, 2), cos, sin)
    wide_cos, wide_sin = (torch.stack((t, -t), -1)[..., 0] for t in (cos, sin))  # every other value of its memory
    qkv = draw(2, 8, 3, 2, 8)
    strided, plain = rope_qkv_(qkv.clone(), wide_cos, wide_sin), rope_qkv_(qkv.clone(), cos, sin)
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


def test_rope_writes_in_place_only_what_turns_and_its_backward_undoes_it():
    B, T, H, D, R = (4, 2048, 12, 64, 16) if GPU else (2, 9, 2, 16, 4)
    cos, sin = rope_tables(T, R, device=DEVICE)
    original = draw(B, T, 3, H, D)
    qkv = original.clone()
    heads = rope_qkv_(qkv, cos, sin)
    assert all(head.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr() for head in heads)
    assert torch.equal(qkv[..., R:], original[..., R:]) and torch.equal(qkv[:, :, 2], original[:, :, 2])
    back = torch.ops.nanocrystal.rope_pack(*heads, cos, sin, None, False)
    assert_close(back, original.double(), 5e-7)
    different = [heads[0].contiguous(), heads[1], heads[2]]
    assert_same(torch.ops.nanocrystal.rope_pack(*different, cos, sin, None, False), back)


# ---------------------------------------------------------------------------------------------------------- linear_ce


def ce_oracle(target, logit_scale, z_coef, vocab_real, divisor):
    def oracle(x, weight):
        logits = x @ weight[:vocab_real].T * logit_scale
        valid = target != -1
        lse = torch.logsumexp(logits, 1) * valid
        loss = (lse - logits.gather(1, target.clamp_min(0)[:, None])[:, 0]) * valid
        n = valid.sum().clamp_min(1) if divisor is None else divisor
        return (loss.sum() + z_coef * lse.square().sum()) / n, loss, lse.square().sum()

    return oracle


CE = {  # x scale, logit_scale, z_coef, padding, divisor, ignored rows
    "plain": (1.0, 1.0, 0.0, 0, None, 0),
    "Crystal: scale, z-loss, padding, fixed divisor, ignored rows": (1.0, 0.13875, 1e-3, 45, 64.0, 5),
    "logits of hundreds": (100.0, 1.0, 1e-4, 0, None, 1),
    "divisor on the device": (1.0, 2.22, 0.0, 7, "tensor", 2),
}


# no fp16 over 50,304 words: a gradient of 1e-9 is none there
@sizes([(40, 24, 1000)], [(4001, 768, 50304)], [(16384, 2048, 50304)], DTYPES[::2] if GPU else DTYPES)
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("case", CE)
def test_linear_ce_forward_and_backward(case, chunks, shape, dtype):
    scale, logit_scale, z_coef, padding, divisor, ignored = CE[case]
    N, d, V = shape
    x, weight = draw(N, d, dtype=dtype, scale=scale), draw(V, d, scale=d**-0.5)
    target = words(V - padding, N)
    target[torch.arange(ignored) * 3] = -1
    given = torch.tensor(37.0, device=DEVICE) if divisor == "tensor" else divisor
    budget = x.itemsize * V * -(-N // chunks)

    def ours(x, weight):
        return linear_ce(x, weight, target, logit_scale, z_coef, -1, V - padding, given, budget)

    # logits of the size of a hundred, rounded to 8 bits, are half a nat off: the loss is exact, for those logits
    rough = 10 if scale > 1 and dtype != torch.float32 else 1
    loss = max(1e-6, EPS[dtype] / 8) * rough
    grad = max(3e-6, EPS[dtype] * 2) * rough
    with torch.no_grad():
        rounded = weight.to(dtype).float()  # the products are made of the weight in x's dtype
    compare(
        ours, ce_oracle(target, logit_scale, z_coef, V - padding, given), [x, rounded], [draw(1)[0], None, None],
        [loss, loss * 4, loss * 4, grad, grad],
    )  # fmt: skip


def test_linear_ce_scales_its_gradients_by_the_loss_above_it_and_takes_strided_targets():
    """A third is no bf16 number: to multiply by its neighbour would make dx, but not dW, 0.15% too large."""
    x, weight = draw(40, 16, dtype=torch.bfloat16), draw(64, 16)
    targets = words(64, 40, 2)
    grads = []
    for scale in (1.0, 1 / 3):
        upstream = [torch.tensor(scale, device=DEVICE), None, None]
        grads.append(gradients(lambda x, w: linear_ce(x, w, targets[:, 0]), [x, weight], upstream)[1])
    for whole, third in zip(*grads, strict=True):
        whole, third = whole.double().flatten(), third.double().flatten()
        assert abs(3 * (third @ whole) / (whole @ whole) - 1) < 5e-4
    with torch.no_grad():
        assert_close(linear_ce(x, weight, targets[:, 1])[1], linear_ce(x, weight, targets[:, 1].clone())[1].double(), 0)


def test_a_target_outside_the_vocabulary_makes_the_loss_nan_and_reads_nothing():
    x, weight = draw(4, 16), draw(32, 16)
    for outside in (32, 31, -7):  # beyond the rows, among the padding, negative but not the ignored one
        target = torch.tensor([1, outside, 2, -1], device=DEVICE)
        loss, losses, _ = linear_ce(x, weight, target, vocab_real=31)
        assert loss.isnan() and losses.isnan().tolist() == [False, True, False, False]


def test_linear_ce_of_ignored_rows_only_is_zero_with_zero_gradients():
    x, weight = draw(8, 16), draw(100, 16)
    target = torch.full((8,), -1, device=DEVICE)
    outputs, grads = gradients(lambda x, w: linear_ce(x, w, target, z_coef=1e-2), [x, weight], [draw(1)[0], None, None])
    assert all(not t.any() for t in (*outputs, *grads))  # NaN would be true


def test_a_target_that_is_nearly_certain_keeps_its_gradient_in_bf16():
    """softmax = 1 - 4e-4 of the target rounds to 1 in bf16; its gradient is not 0."""
    d, V = 16, 64
    x, weight = torch.zeros(16, d, dtype=torch.bfloat16, device=DEVICE), torch.zeros(V, d, device=DEVICE)
    x[:, 0], weight[3, 0] = 1.0, 12.0
    target = torch.full((16,), 3, device=DEVICE)
    inputs, upstream = [x, weight], [torch.ones((), device=DEVICE), None, None]
    _, (dx, _) = gradients(lambda x, w: linear_ce(x, w, target), inputs, upstream)
    _, (want, _) = gradients(ce_oracle(target, 1.0, 0.0, V, None), [t.double() for t in inputs], upstream)
    assert want[:, 0].abs().min() > 0 and (dx[:, 0].double() / want[:, 0] - 1).abs().max() < 2e-2


def test_the_weights_gradient_is_no_worse_from_16_chunks_than_from_one():
    """Sums of chunks in 16 bits would be several times as far off (Liger-Kernel#1391)."""
    N, d, V, dtype = (16384, 768, 50304, torch.bfloat16) if GPU else (64, 24, 300, torch.float16)
    x, weight = draw(N, d, dtype=dtype), draw(V, d, scale=d**-0.5).to(dtype).float()
    target = words(V, N)
    upstream = [torch.ones((), device=DEVICE), None, None]
    _, (_, want) = gradients(ce_oracle(target, 1.0, 0.0, V, None), [x.double(), weight.double()], upstream)
    errors = []
    for chunks in (1, 16):
        budget = x.itemsize * V * (N // chunks)
        _, (_, dw) = gradients(lambda x, w, b=budget: linear_ce(x, w, target, max_logit_bytes=b), [x, weight], upstream)
        assert dw.dtype == torch.float32
        errors.append((dw - want).norm() / want.norm())
    assert errors[1] < 1.1 * errors[0] < 1e-2, errors


def test_evaluation_has_the_losses_of_training_and_keeps_no_gradients():
    N, V = (3001, 32128) if GPU else (20, 300)
    x, weight = draw(N, 32), draw(V, 32).requires_grad_()
    target = words(V, N)
    trained = linear_ce(x, weight, target, z_coef=1e-3)
    with torch.no_grad():
        evaluated = linear_ce(x, weight, target, z_coef=1e-3)
        *_, dx, dw = torch.ops.nanocrystal.linear_ce(x, weight, target, 1.0, 0.0, -1, V, None, N, False)
    assert trained[0].requires_grad and not evaluated[0].requires_grad and dx.numel() == dw.numel() == 0
    assert not trained[1].requires_grad
    for a, b in zip(trained, evaluated, strict=True):
        assert_same(b, a.detach())


def test_linear_ce_holds_no_more_logits_than_its_budget(monkeypatch):
    """Sizes of all products with V columns, over budgets from one row to more than the batch."""
    x, weight, target = draw(40, 8), draw(96, 8), torch.zeros(40, dtype=torch.long, device=DEVICE)
    rows, real = [], torch.mm

    def mm(a, b, **out):
        rows.append(len(a))
        return real(a, b, **out)

    monkeypatch.setattr(torch, "mm", mm)
    for budget in (1, 96 * 4, 96 * 4 * 7 + 3, 1 << 30):
        rows.clear()
        with torch.no_grad():
            linear_ce(x, weight, target, max_logit_bytes=budget)
        assert sum(rows) == 40 and max(rows) == max(1, min(40, budget // (96 * 4)))


@pytest.mark.skipif(not GPU, reason="6.6 GB of logits")
def test_offsets_beyond_two_to_the_31():
    N, V = 65536, 50304
    torch.manual_seed(SEED)
    x, weight = (torch.randn(n, 64, device=DEVICE).bfloat16().requires_grad_() for n in (N, V))
    target = words(V, N)
    loss, losses, _ = linear_ce(x, weight, target, 0.1, max_logit_bytes=16 << 30)
    (dx,) = torch.autograd.grad(loss, x)
    oracle = ce_oracle(target[-64:], 0.1, 0.0, V, N)
    outputs, grads = gradients(oracle, [x[-64:].double(), weight.double()], [torch.ones((), device=DEVICE), None, None])
    assert_close(losses[-64:], outputs[1], 2e-3)
    assert_close(dx[-64:], grads[0], 1e-2)
    del loss, losses, dx
    gate_up = torch.randn(400_000, 2 * 4096, device=DEVICE, dtype=torch.bfloat16)
    gate, up = gate_up[-1].double().chunk(2)
    assert_close(swiglu(gate_up)[-1], gate / (1 + (-gate).exp()) * up, 3e-3)


# ---------------------------------------------------------------------------------------------------------- attention

WHICH = ["causal", "prefix", "document", "prefix and document"]


def draw_masks(T, which, device=DEVICE):
    """prefix, doc (3, T) or None each."""
    prefix, t = torch.zeros(3, T, dtype=torch.int32, device=device), torch.arange(T, device=device)[None]
    prefix[0, : T // 3], prefix[1, 2:5], prefix[1, 7:11], prefix[2] = 1, 1, 2, 1
    doc = t // torch.tensor([[T // 5], [6], [T]], device=device)
    return prefix if "prefix" in which else None, doc if "document" in which else None


@sizes(  # on a CPU plain products in one part and in two, and torch's own; on a GPU each is a compilation of seconds
    [(3, 2, T, 8) for T in (33, 200, 1100)], [(3, 2, 200, 64)], [(3, 2, 1100, 64), (3, 6, 2048, 128)],
    [torch.float32, torch.bfloat16],
)  # fmt: skip
@pytest.mark.parametrize("which", WHICH)
def test_attention_under_every_mask(which, shape, dtype):
    B, H, T, D = shape
    q, k, v = (draw(B, H, T, D, dtype=dtype, salt=i) for i in range(3))
    prefix, doc = draw_masks(T, which)
    seen = attention_mask(T, T, prefix, doc, DEVICE)

    def oracle(q, k, v):
        return [(q @ k.mT / D).masked_fill(~seen, -math.inf).softmax(-1) @ v]

    mask = batch_mask(T, prefix, doc, dtype)
    tolerance = 5e-3 if dtype == torch.bfloat16 else 1e-4 if GPU else 2e-6  # some backends make fp32 of three tf32
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # beyond it FlexAttention would run unfused
        compare(
            lambda *qkv: [attention(*qkv, scale=1 / D, mask=mask)], oracle,
            [q, k, v], [draw(B, H, T, D, dtype=dtype, salt=9)], [tolerance, *[tolerance * 4] * 3],
        )  # fmt: skip


@pytest.mark.parametrize("which", WHICH)
def test_a_mask_is_its_rule_pair_by_pair(which):
    T = 24
    prefix, doc = draw_masks(T, which, "cpu")
    seen = torch.zeros(3, 1, T, T, dtype=torch.bool)
    for b, q, k in itertools.product(range(3), range(T), range(T)):
        both = prefix is not None and prefix[b, q] == prefix[b, k] != 0
        seen[b, 0, q, k] = (k <= q or both) and not (doc is not None and doc[b, q] != doc[b, k])
    assert torch.equal(attention_mask(T, T, prefix, doc).expand_as(seen), seen)
    assert torch.equal(attention_mask(5, T, prefix, doc).expand(3, 1, 5, T), seen[:, :, -5:])
    rule = visible(prefix, doc)
    assert torch.equal(create_mask(rule, 3, 1, T, T, "cpu"), seen)
    if which != "causal":
        assert torch.equal(batch_mask(T, prefix, doc).bias == 0, seen)
    q, k, v = draw(3, 3, 2, T, 8).cpu()
    with torch.no_grad():  # FlexAttention has no backward on a CPU
        block_mask = create_block_mask(rule, 3, None, T, T, "cpu")
        got = flex_attention(q, k, v, block_mask=block_mask, scale=0.125)
        assert torch.allclose(got, attention(q, k, v, scale=0.125, mask=batch_mask(T, prefix, doc)), atol=1e-6)


def draw_batch(which, T, seed):
    """prefix, doc (2, T) or None each: one prefix and documents of random lengths."""
    g = torch.Generator().manual_seed(seed)
    doc = (torch.rand(2, T, generator=g) < 0.02).cumsum(1).to(DEVICE)
    prefix = (torch.arange(T)[None] < torch.randint(0, T, (2, 1), generator=g)).int().to(DEVICE)
    return prefix if "prefix" in which else None, doc if "document" in which else None


@pytest.mark.parametrize("which", WHICH[1:])
def test_masks_of_new_batches_need_no_new_compilation(which):
    T, counter = 256, CompileCounter()
    compiled = torch.compile(attention, backend="inductor" if GPU else counter, dynamic=False)
    for seed in range(4):
        given = draw_batch(which, T, seed)
        masks = [batch_mask(T, *given)]  # on a GPU a BlockMask
        if not GPU:
            masks.append(create_block_mask(visible(*given), 2, None, T, T, DEVICE, BLOCK_SIZE=128))
        q, k, v = (draw(2, 2, T, 64, salt=seed + i) for i in range(3))
        with torch.no_grad():
            for mask in masks:
                with torch._dynamo.config.patch(error_on_recompile=seed > 0):
                    got = compiled(q, k, v, mask=mask)
                assert torch.allclose(got, attention(q, k, v, mask=masks[0]), atol=1e-2 if GPU else 1e-5)
    assert GPU or counter.frame_count == 2  # of DenseMask and of BlockMask


def test_a_model_that_is_not_compiled_compiles_flexattention_once_for_each_kind_of_mask(monkeypatch):
    """Batch after batch, in one process. After the eighth compilation Dynamo would run it unfused without a word."""
    T, counter = 256, CompileCounter()
    compiled = torch.compile(flex_attention, backend=counter, dynamic=False)
    monkeypatch.setattr(sys.modules["kernels.attention"], "compiled_flex_attention", lambda: compiled)
    for which, seed in itertools.product(WHICH[1:], range(4)):
        mask = create_block_mask(visible(*draw_batch(which, T, seed)), 2, None, T, T, DEVICE, BLOCK_SIZE=128)
        q, k, v = (draw(2, 2, T, 64, salt=seed + i) for i in range(3))
        with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            attention(q, k, v, mask=mask)
    assert counter.frame_count == len(WHICH[1:])


# ------------------------------------------------------------------------------------------------ how they fit in torch


def op_arguments():
    """(op, arguments) for every op, with and without what is optional."""
    x, w = draw(4, 6, 16).requires_grad_(), draw(16).requires_grad_()
    cos, sin = rope_tables(6, 4, device=DEVICE)
    heads = [draw(4, 2, 6, 8, salt=i) for i in range(3)]
    target = torch.arange(10, device=DEVICE) * 3
    rows, weight = draw(10, 16).requires_grad_(), draw(32, 16).requires_grad_()
    mean, rstd = draw(24), draw(24, salt=1).abs()
    divisor = torch.tensor(10.0, device=DEVICE)
    ops = torch.ops.nanocrystal
    return [
        (ops.add_norm, (x, draw(4, 6, 16, salt=1).requires_grad_(), w, w.detach(), 1e-5, False, 1.0)),
        (ops.add_norm, (x, None, w, None, 1e-5, True, 0.5)),
        (ops.add_norm_backward, (x.detach(), x.detach(), x.detach(), w.detach(), mean, rstd, False, True)),
        (ops.add_norm_backward, (x.detach(), None, x.detach(), w.detach(), mean[:0], rstd, True, False)),
        (ops.swiglu, (x, True)),
        (ops.swiglu_backward, (draw(4, 6, 8), x.detach(), False)),
        (ops.rope_rotate_, (draw(4, 6, 3, 2, 8), cos, sin, None, False)),
        (ops.rope_pack, (*heads, cos, sin, torch.zeros(4, 6, dtype=torch.int32, device=DEVICE), True)),
        (ops.linear_ce, (rows, weight, target, 1.0, 1e-3, -1, 30, None, 4, True)),
        (ops.linear_ce, (rows, weight, target, 1.0, 0.0, -1, 32, divisor, 10, True)),
        (ops.accumulate_, (draw(8, 16), draw(10, 8, dtype=torch.bfloat16), draw(10, 16, dtype=torch.bfloat16))),
    ]


@pytest.mark.parametrize("index", range(11))
def test_ops_keep_the_rules_of_custom_operators(index):
    """Schema, autograd registration, fake tensors and AOT dispatch, each checked by torch."""
    op, arguments = op_arguments()[index]
    torch.library.opcheck(op.default, arguments)


KNOBS = dict(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=96)
STEP = 2e-5 if GPU else 5e-6  # of two ways to compute a step in fp32; a GPU's attention multiplies in three tf32 parts


def step(model, salt=0):
    """Loss and gradients of a small model on fixed tokens, divisor and z-loss as in training."""
    g = torch.Generator().manual_seed(salt)
    tokens = torch.randint(90, (2, 17), generator=g).to(DEVICE)
    loss, token_loss, _ = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 1e-3, 32)
    model.zero_grad()
    loss.backward()
    return [loss.detach(), token_loss, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("knobs", [{}, {"parallel": True, "norm": "rmsnorm", "tie": False}, {"bias": True}])
def test_the_model_takes_the_same_step_with_kernels_and_without(knobs):
    model = GPT(GPTConfig(**KNOBS | knobs, vocab_real=90)).to(DEVICE)
    init_weights(model, 1)
    fused = step(model)
    for a, b in zip(step(model), fused, strict=True):
        assert_same(a, b)
    backend.using.update(dict.fromkeys(backend.using, "torch"))
    for a, b in zip(fused, step(model), strict=True):
        assert_close(a, b.double(), STEP)


@pytest.mark.parametrize("backend_name", ["aot_eager", *(["inductor"] if GPU else [])])
def test_the_model_compiles_in_one_graph_with_the_kernels_inside(backend_name):
    model = GPT(GPTConfig(**KNOBS, vocab_real=90)).to(DEVICE)
    init_weights(model, 1)
    want = step(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend_name)
    for a, b in zip(step(compiled), want, strict=True):
        assert_close(a, b.double(), STEP)


# ---------------------------------------------------------------------------------------------------------- benchmark


def test_the_benchmark_times_the_kernel_that_training_runs():
    from measure.kernels import entropy

    x, weight, target = draw(12, 16), draw(300, 16, salt=1), words(300, 12)
    logits = x @ weight.T
    entropy(logits, target)  # leaves the gradients of a sum, with a z-loss of 1e-4
    args = [x, weight], [torch.ones((), device=DEVICE), None, None]
    _, (dx, dw) = gradients(lambda x, w: linear_ce(x, w, target, z_coef=1e-4, divisor=1.0), *args)
    assert_close(logits @ weight, dx.double(), 1e-6)
    assert_close(logits.T @ x, dw.double(), 1e-6)


@pytest.mark.skipif(GPU, reason="takes minutes; python bench.py --gpu --only tune")
def test_tuning_tries_every_kernel():
    from measure.kernels import tune

    before = dict(backend.TILES)
    rows = list(tune())
    assert not any(r["failed"] for r in rows)
    assert {r["key"][0] for r in rows} == {
        "norm", "norm_backward", "rope", "rope_pack", "swiglu", "swiglu_backward", "linear_ce",
    }  # fmt: skip
    backend.TILES.clear()
    backend.TILES.update(before)


# ------------------------------------------------------------------------------------------------------------- choice


def test_auto_is_the_table_on_a_gpu_and_torch_elsewhere_and_triton_needs_a_reason_to_work(monkeypatch):
    assert "interpreter" in backend.choose("auto", "cpu", False) or GPU
    monkeypatch.setattr(backend, "INTERPRET", False)
    assert "device is cpu" in backend.choose("auto", "cpu", False) and set(backend.using.values()) == {"torch"}
    with pytest.raises(ValueError, match="device is cpu"):
        backend.choose("triton", "cpu", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for compiled in (False, True):
        backend.choose("auto", "cuda", compiled)
        assert backend.using == {op: ways[compiled] for op, ways in backend.AUTO.items()}
    backend.choose("torch", "cuda", False)
    assert set(backend.using.values()) == {"torch"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "Ampere" in backend.choose("auto", "cuda", False) and set(backend.using.values()) == {"torch"}


def test_without_triton_everything_runs_on_the_references():
    code = """
import sys; sys.modules["triton"] = None
import torch
from kernels import backend
from model import GPT, GPTConfig, init_weights
assert not backend.HAS_TRITON and "not installed" in backend.choose("auto", "cpu", False)
model = GPT(GPTConfig()); init_weights(model, 1)
tokens = torch.zeros(1, 8, dtype=torch.long)
model(tokens, tokens)[0].backward()
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", ["float32", *(["bfloat16"] if GPU else [])])
def test_training_with_kernels_follows_training_without_and_resumes_bit_for_bit_in_fp32(dtype, tmp_path, capsys):
    """In bf16, on a GPU, it resumes to within 1%: cuDNN's attention does not add up its gradients in a fixed order. In
    fp32 16 positions are one block of another attention kernel, so that even there the order is fixed."""
    rng = np.random.default_rng(0)
    (tmp_path / "data/text").mkdir(parents=True)
    for split, n in (("train", 4000), ("val", 200)):  # each token is the one before plus 1 or 2: something to learn
        (np.cumsum(rng.integers(1, 3, n)) % 90).astype(np.uint16).tofile(tmp_path / f"data/text/{split}.bin")
    (tmp_path / "phase.py").write_text("mix = {'text': 1.0}\n")
    model = [f"--{k}={v}" for k, v in KNOBS.items()]
    common = [tmp_path / "phase.py", f"--data={tmp_path}/data", *model, "--batch=32", "--log_every=1", "--save_every=3",
              "--eval_tokens=32", f"--device={DEVICE}", "--compile=no", f"--dtype={dtype}"]  # fmt: skip

    def run(out, kernels):
        assert train.main([*map(str, common), "--budget=256", f"--out={tmp_path}/{out}", f"--kernels={kernels}"]) == 0
        lines = (tmp_path / out / "phase/log.jsonl").read_text().splitlines()
        return [record["loss"] for line in lines if "loss" in (record := json.loads(line))]

    plain, fused = run("plain", "torch"), run("fused", "triton")
    assert "triton: linear_ce, rope, norm, swiglu" in capsys.readouterr().out
    tolerance = 2e-2 if dtype == "bfloat16" else 2e-3 if GPU else 2e-5  # attention in tf32 parts
    assert len(fused) == 8 and np.allclose(plain, fused, rtol=tolerance) and fused != plain
    shutil.rmtree(tmp_path / "fused/phase/checkpoints/step-00000008")  # as if it had been killed after step 6
    resumed = run("fused", "triton")
    assert resumed == fused if dtype == "float32" else np.allclose(resumed, fused, rtol=1e-2)


# ---------------------------------------------------------------------------------------------- compiled, without a GPU

COMPILE = '''
"""Compile the kernels as for an A100 and an H100, at training's shapes, and print a line of JSON about each."""
import json, subprocess, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Driver:
    get_current_target = lambda self: GPUTarget("cuda", generation, 32)
    get_current_device = lambda self: generation  # by which Triton keeps what it compiled
    get_current_stream = lambda self, device=None: 0

triton.runtime.driver.set_active(Driver())
real = JITFunction.run

def compile_only(self, *args, grid, warmup, **kwargs):
    kernel = real(self, *args, grid=grid, warmup=True, **kwargs)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        used, code = (subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
                      for flag in ("-res-usage", "-sass"))
    registers, stack = (int(used.split(name + ":")[1].split()[0]) for name in ("REG", "STACK"))
    memory = [word for word in code.split() if word.startswith(("LDG", "STG", "LDL", "STL"))]
    print(json.dumps(dict(
        kernel=f"{self.fn.__module__}.{self.__name__}", shape=shape, generation=generation, registers=registers,
        stack=stack, shared=kernel.metadata.shared, warps=kernel.metadata.num_warps, programs=grid[0], memory=memory,
    )))

JITFunction.run = compile_only
bf16 = torch.bfloat16
ops = torch.ops.nanocrystal
import kernels
for generation in (80, 90):
    for d in (768, 1024, 2048, 4096, 8192):
        shape = f"d {d}"
        x, w = torch.empty(64, d, dtype=bf16), torch.empty(d)
        y, r, mean, rstd = ops.add_norm(x, x, w, w, 1e-5, False, 1.0)
        for with_bias in (True, False):
            ops.add_norm_backward(y, r, r, w, mean, rstd, False, with_bias)
    for f in (2048, 2752):  # 5,504 and 11,008 take the same registers as 2,752
        shape = f"f {f}"
        gate_up = torch.empty(4, 2 * f, dtype=bf16)
        ops.swiglu_backward(ops.swiglu(gate_up, True), gate_up, True)
    for H, D in ((12, 64), (6, 128), (16, 128)):
        shape = f"{H} heads of {D}"
        cos, sin = kernels.rope_tables(64, D // 4)
        qkv = torch.empty(2, 64, 3, H, D, dtype=bf16)
        ops.rope_rotate_(qkv, cos, sin, None, False)
        ops.rope_pack(*qkv.permute(2, 0, 3, 1, 4), cos, sin, None, False)
    for V, words in ((50304, 50257), (32128, 32032), (8192, 8192)):
        shape = f"V {V}"
        x, w, target = torch.empty(8, 32, dtype=bf16), torch.empty(V, 32, dtype=bf16), torch.zeros(8, dtype=torch.long)
        ops.linear_ce(x, w, target, 1.0, 1e-3, -1, words, None, 8, True)
'''
# warps that a multiprocessor must hold, of 64: enough that some read while others compute or wait for each other
LEAST_WARPS = {"kernels.norm.backward_kernel": 24}  # which keeps sums in registers; the others 32
SHARED = {80: 164 << 10, 90: 228 << 10}  # bytes of a multiprocessor, of which the system takes 1,024 a program


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_keeps_to_registers_and_reads_16_bytes_at_a_time(compiled):
    """As far as can be seen without a GPU: no local memory, and no narrow access to anything but scalars."""
    assert len({entry["kernel"] for entry in compiled}) == 7
    for entry in compiled:
        words = entry["memory"]
        assert entry["stack"] == 0 and not any(word.startswith(("LDL", "STL")) for word in words), entry
        wide = [word for word in words if "128" in word and word.startswith(("LDG", "STG"))]
        assert {word[:3] for word in wide} == {"LDG", "STG"}, entry
        # what is left: statistics, targets, divisors, in single words; and the one logit that a target picks
        assert sum(word in ("LDG.E.U16", "STG.E.U16", "STG.E.64") for word in words) <= 1, entry


def resident_warps(entry):
    """Warps of a kernel that a multiprocessor holds at once, of 64: the CUDA programming guide's compute capabilities.

    Each of four partitions has 16,384 registers and gives them to whole warps, by the 256.
    """
    registers = -(-entry["registers"] * 32 // 256) * 256
    by_registers = 16384 // registers * 4 // entry["warps"]
    by_memory = SHARED[entry["generation"]] // (entry["shared"] + 1024)
    return min(32, 64 // entry["warps"], by_registers, by_memory) * entry["warps"]


def test_a_multiprocessor_holds_enough_warps_of_every_kernel(compiled):
    for entry in compiled:
        warps, least = resident_warps(entry), LEAST_WARPS.get(entry["kernel"], 32)
        what = "sm_{generation} {kernel}, {shape}: {registers} registers, {shared} bytes".format(**entry)
        assert entry["shared"] <= SHARED[entry["generation"]] - 1024, what
        assert warps >= least, f"{what}: {warps} warps"
        if entry["kernel"] == "kernels.norm.backward_kernel" and entry["generation"] == 90:
            # its programs have equally many rows: one that came after the others would double the time
            assert entry["programs"] * entry["warps"] <= warps, f"{what}: {entry['programs']} programs"
