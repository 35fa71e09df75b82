"""Every promise of this repository, checked on a CPU in a few minutes.   pip install pytest && pytest

A test is named after the promise it keeps and compares with something independent: a closed form, float64, another
implementation, an uninterrupted run.
"""

import contextlib
import dataclasses
import errno
import importlib.util
import json
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

import checkpoint
import files
import infill
import tokenizer
import train
from configurator import read_command_line
from conftest import PHASES, ROOT, losses, run, tensors_in
from kernels import add_norm, attention, dense_mask, linear_ce, rope_qkv_, rope_tables, swiglu
from mix import Source
from model import GPT, PRESETS, GPTConfig, Linear, accumulating, init_weights, kind, param_groups


def read_phases(argv):
    return read_command_line(argv, train.Config, PRESETS, ("plan",), infill.OBJECTIVES)[0]


# ------------------------------------------------------------------------------------------------------------ kernels


def test_the_kernels_in_tritons_interpreter_or_on_a_gpu():
    """kernels/test_kernels.py in a process of its own, because Triton asks for its interpreter when it is imported."""
    if not importlib.util.find_spec("triton"):
        pytest.skip("triton is not installed")
    interpreter = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    test = run("-m", "pytest", "kernels/test_kernels.py", env=os.environ | interpreter)
    assert test.returncode == 0, test.stdout[-5000:] + test.stderr[-1000:]


def reference_attention(q, k, v, mask, scale):
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v


def test_causal_attention_over_several_blocks_equals_dense_softmax_in_float64():
    q, k, v = torch.randn(3, 1, 2, 300, 8, dtype=torch.float64, requires_grad=True)
    expected = reference_attention(q, k, v, torch.ones(300, 300).tril().bool(), 8**-0.5)
    got = attention(q, k, v)
    assert torch.allclose(got, expected, atol=1e-12)
    upstream = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), upstream) for y in (got, expected)), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_attention_with_a_cache_sees_what_a_full_pass_sees():
    q, k, v = torch.randn(3, 2, 3, 12, 8, dtype=torch.float64)
    whole = attention(q, k, v)
    for new in (1, 5):
        assert torch.allclose(attention(q[:, :, -new:], k, v), whole[:, :, -new:], atol=1e-12)


def test_attention_that_meets_new_shapes_all_the_time_never_asks_cudnn_for_a_plan_of_each(monkeypatch):
    """Decoding, whose keys grow, and the dense masks of packed requests; training's causal attention may."""
    asked, real = [], F.scaled_dot_product_attention

    def spy(*args, **kwargs):
        asked.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q = torch.randn(1, 2, 1100, 8)  # longer than what a CPU multiplies itself
    attention(q, q, q)
    assert asked == [True]
    mask = dense_mask(torch.ones(1, 1, 1100, 1100).tril().bool(), torch.float32, True)
    for inputs, how in (((q[:, :, -1:], q, q), {}), ((q[:, :, -3:], q, q), {}), ((q, q, q), {"mask": mask})):
        attention(*inputs, **how)
    assert asked == [True, False, False, False] and torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(AssertionError, match=r"float32.*bfloat16"):  # which some backends would misread
        attention(*[q.bfloat16()] * 3, mask=mask)


def far_angles(length, R):
    return np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, R, 2) / R)


def rotated(qkv, *args, **kwargs):
    """rope_qkv_ on a copy, its heads packed again: (B, T, 3, H, D)."""
    return torch.stack([head.transpose(1, 2) for head in rope_qkv_(qkv * 1, *args, **kwargs)], dim=2)


def test_rotary_is_a_complex_multiplication_and_leaves_the_other_channels_alone():  # M3
    assert torch.equal(rope_tables(2048, 32)[0], torch.from_numpy(np.cos(far_angles(2048, 32))).float())
    B, T, H, D, R = 2, 9, 3, 16, 8
    qkv = torch.randn(B, T, 3, H, D)
    cos, sin = rope_tables(64, R)
    out = rotated(qkv, cos, sin, interleaved=True)
    angle = torch.arange(T).double()[:, None] * 10000.0 ** (-torch.arange(0, R, 2).double() / R)
    turn = torch.polar(torch.ones_like(angle), angle)[None, :, None, None]
    pairs = torch.view_as_complex(qkv[:, :, :2, :, :R].double().reshape(B, T, 2, H, R // 2, 2).contiguous())
    expected = torch.view_as_real(pairs * turn).flatten(-2)
    assert (out[:, :, :2, :, :R] - expected).abs().max() < 1e-6
    assert torch.equal(out[..., R:], qkv[..., R:]) and torch.equal(out[:, :, 2], qkv[:, :, 2])
    # half-split is the same rotation after a permutation of the channels
    order = torch.cat((torch.arange(0, R, 2), torch.arange(1, R, 2), torch.arange(R, D)))
    half = rotated(qkv[..., order], cos, sin)
    assert torch.allclose(half, out[..., order], atol=1e-6)
    # the product of q and k depends on their distance only
    later = rotated(qkv[..., order], cos, sin, pos=torch.arange(T).expand(B, T) + 20)
    scores, shifted = (torch.einsum("bihd,bjhd->bhij", a[:, :, 0], a[:, :, 1]) for a in (half, later))
    assert torch.allclose(scores, shifted, atol=1e-4) and not torch.allclose(half, later, atol=0.1)


def test_the_gradient_of_the_rotation_is_right():
    cos, sin = (table.double() for table in rope_tables(5, 4))
    qkv = torch.randn(1, 5, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    for interleaved in (False, True):
        out = rotated(qkv, cos, sin, interleaved)
        grad = torch.randn_like(out)
        (got,) = torch.autograd.grad(out, qkv, grad)
        # a rotation is orthogonal: turning the gradient's gradient forward again gives the gradient
        assert torch.allclose(rotated(got, cos, sin, interleaved), grad, atol=1e-6)


@pytest.mark.parametrize("rms", [False, True])
def test_add_norm_equals_its_formula_also_for_rows_far_from_zero_and_constant_rows(rms):
    x, r = torch.randn(2, 6, 32, dtype=torch.float64)
    r[0] += 1e4
    x[1], r[1] = 0, 3.0
    w, b = torch.randn(2, 32, dtype=torch.float64)
    s = r + 0.5 * x
    centred = s if rms else s - s.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w + (0 if rms else b)
    y, kept = add_norm(x, r, w, None if rms else b, rms=rms, alpha=0.5)
    assert torch.allclose(y, expected, atol=1e-9) and torch.equal(kept, s)
    y32, _ = add_norm(x[2:].float(), r[2:].float(), w.float(), None if rms else b.float(), rms=rms, alpha=0.5)
    assert (y32 - expected[2:]).norm() / expected[2:].norm() < 1e-6
    # in bf16, the weight's gradient over many rows is still a sum in fp32
    rows, weight = torch.randn(4096, 32).bfloat16(), w.float().requires_grad_()
    add_norm(rows, None, weight, rms=rms)[0].float().sum().backward()
    exact = add_norm(rows.double(), None, torch.ones(32, dtype=torch.float64), rms=rms)[0].sum(0)
    assert (weight.grad - exact).norm() / exact.norm() < 1e-2


def test_swiglu_gates_the_half_it_is_told_to():
    a, b = torch.randn(2, 5, 8, dtype=torch.float64)
    packed = torch.cat((a, b), dim=-1)
    assert torch.allclose(swiglu(packed), a / (1 + (-a).exp()) * b)
    assert torch.allclose(swiglu(packed, gate_first=False), b / (1 + (-b).exp()) * a)


@pytest.mark.parametrize(
    "case", ["plain", "z_loss", "ignored", "all ignored", "padded", "large logits", "fixed divisor"]
)
def test_linear_ce_equals_cross_entropy_on_full_logits_in_float64(case):  # T6
    N, V, d = 23, 50, 16
    g = torch.Generator().manual_seed(3)
    x = torch.randn(N, d, generator=g, dtype=torch.float64)
    w = torch.randn(V, d, generator=g, dtype=torch.float64)
    target = torch.randint(0, 40, (N,), generator=g)
    real, z_coef, divisor, scale = 40 if case == "padded" else V, 1e-2 if case == "z_loss" else 0.0, None, 0.3
    if case == "ignored":
        target[::3] = -1
    if case == "all ignored":
        target[:] = -1
    if case == "large logits":
        scale = 30.0
    if case == "fixed divisor":
        target[::3], divisor = -1, 64
    x.requires_grad_(), w.requires_grad_()
    logits = (x @ w.T * scale)[:, :real]
    token = F.cross_entropy(logits, target, ignore_index=-1, reduction="none")
    lse_sq = (logits.logsumexp(-1).square() * (target >= 0)).sum()
    expected = (token.sum() + z_coef * lse_sq) / (divisor or max(1, (target >= 0).sum()))
    gx, gw = torch.autograd.grad(expected * 3, (x, w))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        if case == "large logits" and dtype == torch.bfloat16:
            continue  # logits of +-300 have no three digits in bf16
        for chunk_bytes in (4 * V * 7, None):  # chunks of 7 rows, which do not divide 23; one chunk
            a, b = x.detach().to(dtype).requires_grad_(), w.detach().float().requires_grad_()
            loss, token_loss, got_lse = linear_ce(
                a, b, target, scale, z_coef, vocab_real=real, divisor=divisor, max_logit_bytes=chunk_bytes
            )
            assert abs(loss.item() - expected.item()) <= tolerance * max(1, abs(expected.item()))
            assert torch.allclose(token_loss.double(), token, rtol=tolerance, atol=tolerance * 5)
            assert torch.allclose(got_lse.double(), lse_sq, rtol=tolerance)
            (loss * 3).backward()
            for got, want in ((a.grad, gx), (b.grad, gw)):
                assert torch.isfinite(got).all()
                assert (got.double() - want).norm() <= tolerance * want.norm()
            assert not b.grad[real:].any()


def test_linear_ce_in_bf16_loses_no_more_than_the_rounding_of_the_logits():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 32, generator=g).bfloat16(), torch.randn(500, 32, generator=g).bfloat16()
    target = torch.randint(0, 500, (64,), generator=g)
    logits = (x @ w.T).double()  # rounded to bf16
    _, token_loss, _ = linear_ce(x, w, target)
    assert (token_loss - F.cross_entropy(logits, target, reduction="none")).abs().max() < 1e-4


# -------------------------------------------------------------------------------------------------------------- model


def tiny(dtype=torch.float32, seed=1, **knobs):
    knobs = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=64) | knobs
    model = GPT(GPTConfig(**knobs), dtype)
    init_weights(model, seed)
    return model


def test_crystal_7b_has_exactly_the_parameters_of_the_release():  # M1
    with torch.device("meta"):
        model = GPT(GPTConfig(**PRESETS["7B"]))
    assert model.num_params() == 6_575_278_720
    assert sum(p.numel() for p in model.blocks[0].parameters()) == 201_377_108
    with torch.device("meta"):
        assert 4.5e6 < GPT(GPTConfig(**PRESETS["nano"])).num_params() < 5.5e6


def test_the_mlp_is_eight_thirds_wide():  # M2
    assert PRESETS["7B"]["n_inner"] == 8 * 4096 // 3 == 10922
    assert GPTConfig(n_embd=768, n_head=12).n_inner == 2048 and GPTConfig(n_embd=256).n_inner == 704


def reference_forward(model, tokens):
    """The model written again, plainly and in float64, from the paper's description: logits (B, T, V)."""
    c, p = model.config, {name: p.double() for name, p in model.named_parameters()}
    B, T = tokens.shape
    D, R = c.n_embd // c.n_head, int(c.n_embd // c.n_head * c.rotary)

    def norm(x, name):
        if c.norm == "rmsnorm":
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[name + ".weight"]
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[name + ".weight"] + p.get(name + ".bias", 0)

    def linear(x, name):
        return x @ p[name + ".weight"].T + p.get(name + ".bias", 0)

    def rotate(x):  # (B, H, T, D), half-split
        angle = torch.arange(T).double()[:, None] * 10000.0 ** (-torch.arange(0, R, 2).double() / R)
        a, b, rest = x[..., : R // 2], x[..., R // 2 : R], x[..., R:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest), -1)

    x = p["wte.weight"][tokens] * (14.6 if c.mup_base else 1)
    for i in range(c.n_layer):
        at = f"blocks.{i}."
        y = norm(x, at + "ln_1")
        q, k, v = (z.view(B, T, c.n_head, D).transpose(1, 2) for z in linear(y, at + "qkv").chunk(3, -1))
        scale = 1 / D if c.mup_base else D**-0.5  # M4
        heads = reference_attention(rotate(q), rotate(k), v, torch.ones(T, T).tril().bool(), scale)
        attended = linear(heads.transpose(1, 2).reshape(B, T, -1), at + "attn_out")
        if not c.parallel:
            x = x + attended
            y = norm(x, at + "ln_2")
        gate, up = linear(y, at + "gate_up").chunk(2, -1)
        x = x + linear(gate / (1 + (-gate).exp()) * up, at + "mlp_out") + (attended if c.parallel else 0)
    head = p["wte.weight"] if c.tie else p["head.weight"]
    return norm(x, "ln_f") @ head.T * (2.22 * c.mup_base / c.n_embd if c.mup_base else 1)


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"bias": True, "tie": False},
        {"parallel": True},
        {"norm": "rmsnorm", "rotary": 1.0, "bias": True},
        {"mup_base": 0, "rotary": 0.5},
    ],
    ids=str,
)
def test_the_model_is_the_papers_formulas_in_float64(knobs):  # M4, M5
    model = tiny(dtype=torch.float64, n_embd=64, **knobs).double()
    for name, p in model.named_parameters():  # biases that are zero would hide
        if kind(name) == "other":
            torch.nn.init.normal_(p, mean=1.0 if name.endswith("weight") else 0.0, std=0.3)
    tokens = torch.randint(0, 64, (3, 16))
    expected = reference_forward(model, tokens)
    assert torch.allclose(model(tokens).double(), expected, atol=1e-5)  # logits are handed out in fp32
    targets = torch.randint(0, 64, (3, 16))
    assert abs(model(tokens, targets)[0].item() - F.cross_entropy(expected.flatten(0, 1), targets.flatten())) < 1e-5


def test_crystals_multipliers_at_its_own_width():  # M5
    with torch.device("meta"):
        model = GPT(GPTConfig(**PRESETS["7B"]))
    assert (model.embedding_scale, model.logit_scale) == (14.6, 0.13875)
    assert model.blocks[0].scale == 1 / 128


def test_init_has_the_three_truncated_deviations_of_the_release_from_meta_too():  # M6
    with torch.device("meta"):
        model = GPT(GPTConfig(**PRESETS["7B"] | {"n_layer": 1, "vocab_size": 512, "n_inner": 512}))
    model.config.n_layer = 32  # the depth that scales the output matrices; one layer of it is enough to look at
    model = model.to_empty(device="cpu")
    init_weights(model, 1)
    for name, std in (("wte", 0.073), ("blocks.0.qkv", 0.01825), ("blocks.0.gate_up", 0.01825),
                      ("blocks.0.attn_out", 0.00228125), ("blocks.0.mlp_out", 0.00228125)):  # fmt: skip
        w = model.get_parameter(name + ".weight")
        assert w.abs().max() <= 2 * std and abs(w.std() / std - 0.8796) < 0.003, name
    assert not model.blocks[0].qkv.bias.any() and (model.ln_f.weight == 1).all()
    assert torch.equal(model.cos, rope_tables(2048, 32)[0])


def test_weights_depend_on_seed_and_name_only():
    a, b, c = tiny(seed=1), tiny(seed=1, n_layer=3), tiny(seed=2)
    assert torch.equal(a.wte.weight, b.wte.weight) and not torch.equal(a.wte.weight, c.wte.weight)
    assert torch.equal(a.blocks[1].qkv.weight, b.blocks[1].qkv.weight)
    assert not torch.equal(a.blocks[0].qkv.weight, a.blocks[1].qkv.weight)


def test_every_parameter_is_in_one_optimizer_group_with_crystals_rates():  # M7
    for tie in (True, False):
        model = tiny(n_embd=512, n_head=8, bias=True, tie=tie)
        groups = param_groups(model, 0.1)
        assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
        for name, p in model.named_parameters():
            (group,) = (g for g in groups if any(p is q for q in g["params"]))
            matrix, embedding = p.ndim == 2, name in ("wte.weight", "head.weight")
            assert group["lr_scale"] == (0.5 if matrix and not embedding else 1.0), name
            assert group["weight_decay"] == (0.1 if matrix else 0.0), name
    assert [len(g["params"]) for g in groups] == [8, 2, 18]
    assert all(g["lr_scale"] == 1 for g in param_groups(tiny(n_embd=256, n_head=4), 0.1))


def activation_size(width, mup_base, steps=8):
    """Mean |output of the last block| after some Adam steps at one learning rate, on data that can be learnt."""
    model = tiny(n_embd=width, n_head=width // 32, block_size=32, mup_base=mup_base)
    optimizer = torch.optim.AdamW(param_groups(model, 0.0), lr=5e-3)
    for group in optimizer.param_groups:
        group["lr"] = 5e-3 * group["lr_scale"]
    g = torch.Generator().manual_seed(0)
    seen = []
    hook = model.ln_f.register_forward_pre_hook(lambda m, args: seen.append((args[0] + args[1]).abs().mean().item()))
    for _ in range(steps):
        tokens = torch.randint(0, 64, (8, 1), generator=g) + torch.arange(33)
        model(tokens[:, :-1] % 64, tokens[:, 1:] % 64)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    hook.remove()
    return seen[-1]


def test_activations_keep_their_size_over_widths_under_mup_and_grow_without():  # M8
    widths = (128, 256, 512, 1024)
    mup = [activation_size(w, 128) for w in widths]
    plain = [activation_size(w, 0) for w in widths]
    assert max(mup) / min(mup) < 1.35, mup
    assert plain[-1] / plain[0] > 2, plain


def test_padding_of_the_vocabulary_is_never_predicted():
    model = tiny(vocab_size=64, vocab_real=50)
    tokens = torch.randint(0, 50, (2, 16))
    assert model(tokens).shape[-1] == 50
    model(tokens, tokens)[0].backward()
    assert not model.wte.weight.grad[50:].any()


def generated(model, prompts, *args, **how):
    """What a model made of each prompt, up to its stop."""
    steps = list(model.generate(prompts, *args, **how))
    return [[ids[i] for ids in steps if ids[i] is not None] for i in range(len(prompts))]


def test_generation_with_a_cache_takes_the_same_tokens_as_without():
    model = tiny(block_size=32)
    prompt = torch.randint(0, 64, (1, 5))
    (with_cache,) = generated(model, prompt.tolist(), 20, temperature=0)
    tokens = prompt
    for _ in range(20):
        tokens = torch.cat((tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)), 1)
    assert with_cache == tokens[0, 5:].tolist()
    assert len(generated(model, prompt.tolist(), 100, temperature=0)[0]) == 100  # longer than the context
    stop = with_cache[3]
    assert generated(model, prompt.tolist(), 20, temperature=0, stop=stop) == [with_cache[: with_cache.index(stop)]]
    generator = torch.Generator().manual_seed(1)
    assert generated(model, prompt.tolist(), 20, top_p=1e-6, generator=generator) == [with_cache]


def test_prompts_side_by_side_are_continued_as_each_alone():
    model = tiny(block_size=32).double()
    model.dtype = torch.float64
    prompts = [torch.randint(0, 64, (n,)).tolist() for n in (1, 5, 12, 30, 32, 40)]
    alone = [generated(model, [prompt], 50, temperature=0)[0] for prompt in prompts[:3]]
    assert generated(model, prompts[:3], 20, temperature=0) == [tokens[:20] for tokens in alone]
    alone = [generated(model, [prompt], 1, temperature=0)[0] for prompt in prompts]
    assert generated(model, prompts, 1, temperature=0) == alone
    stop = generated(model, prompts[:3], 20, temperature=0)[1][2]
    stopped = [
        tokens[: tokens.index(stop)] if stop in tokens else tokens
        for tokens in generated(model, prompts[:3], 20, temperature=0)
    ]
    assert generated(model, prompts[:3], 20, temperature=0, stop=stop) == stopped


def test_a_context_that_overflows_is_read_again_from_its_later_half():
    model, prompt = tiny(block_size=8), torch.randint(0, 64, (1, 8))
    (words,) = generated(model, prompt.tolist(), 4, temperature=0)
    assert words[1] == model(torch.cat((prompt[:, 5:], torch.tensor([words[:1]])), 1))[:, -1].argmax().item()


def test_selective_recomputation_of_the_qkv_product_is_refused_and_any_other_changes_nothing():
    """Rotation is in place: a saved product would be rotated again, which must be an error, not a wrong gradient."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    model, x = tiny(), torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    block = model.blocks[0]

    def gradient(*saved, **kwargs):
        def policy(ctx, op, *args, **kwargs):
            return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

        leaf = x.clone().requires_grad_()
        contexts = {"context_fn": lambda: create_selective_checkpoint_contexts(policy)} if saved else {}
        out = checkpoint(block, leaf, None, model.cos[:16], model.sin[:16], use_reentrant=False, **contexts)
        return torch.autograd.grad(out[0].square().sum(), leaf)[0]

    leaf = x.clone().requires_grad_()
    plain = torch.autograd.grad(block(leaf, None, model.cos[:16], model.sin[:16])[0].square().sum(), leaf)[0]
    assert torch.equal(gradient(), plain) and torch.equal(gradient(torch.ops.aten.silu.default), plain)
    with pytest.raises(RuntimeError, match="mutated"):
        gradient(torch.ops.aten.mm.default)


def test_sampling_follows_temperature_and_top_p():
    from model import sample

    g = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 3)
    sharp = torch.bincount(sample(logits, 0.5, 1.0, g)[:, 0], minlength=3) / 20_000
    assert torch.allclose(sharp, torch.tensor([0.25, 0.09, 0.04]) / 0.38, atol=0.02)
    assert (sample(logits, 1.0, 0.5, g) == 0).all()
    assert set(sample(logits, 1.0, 0.51, g)[:, 0].tolist()) == {0, 1}


def test_flops_are_the_stated_formula_on_counted_weights():
    L, d, T, V = 2, 32, 16, 64
    block = 4 * d * d + 3 * d * 128 + 2 * d  # attention, MLP of width 128, two norms
    for tie in (True, False):
        assert tiny(tie=tie).flops_per_token() == 6 * (L * block + d + V * d) + 12 * L * d * T


def test_the_model_compiles_in_one_graph_to_the_same_loss_and_gradients():
    model, tokens = tiny(), torch.randint(0, 64, (2, 17))
    loss = model(tokens[:, :-1], tokens[:, 1:])[0]
    loss.backward()
    expected, model.wte.weight.grad = model.wte.weight.grad, None
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    again = compiled(tokens[:, :-1], tokens[:, 1:])[0]
    again.backward()
    assert torch.allclose(loss, again) and torch.allclose(model.wte.weight.grad, expected, atol=1e-6)
    with torch.no_grad():  # evaluation too
        assert torch.allclose(compiled(tokens[:, :-1], tokens[:, 1:])[0], loss)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_gradients_summed_by_their_products_are_not_rounded_to_bf16(backend):
    g = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(4, 3, 7, n, generator=g).bfloat16() for n in (48, 32))
    exact = dy.double().flatten(0, 2).T @ x.double().flatten(0, 2)
    layer = Linear(48, 32)
    forward = torch.compile(layer, backend=backend, fullgraph=True)

    def micro_steps():
        """Outputs and gradients of the inputs."""
        results = []
        for inputs, gradient in zip(x, dy, strict=True):
            leaf = inputs.clone().requires_grad_()
            output = forward(leaf)
            output.backward(gradient)
            results += [output.detach(), leaf.grad]
        return results

    def error(gradient):
        return (gradient.double() - exact).norm() / exact.norm()

    expected = micro_steps()
    by_autograd, bias_gradient = layer.weight.grad, layer.bias.grad
    layer.zero_grad()
    with accumulating(layer, torch.bfloat16):
        results = micro_steps()
    assert error(layer.weight.grad) < 1e-6 and 1e-4 < error(by_autograd) < 2**-8
    assert torch.equal(layer.bias.grad, bias_gradient)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_changed_weight_is_never_computed_with_its_old_copy(backend, monkeypatch):
    """The losses of every step, and of evaluation before it, are those of a model that is given the weights anew."""
    monkeypatch.setattr(train, "summing", lambda model, phase: accumulating(model, model.dtype))
    model = tiny(dtype=torch.bfloat16)
    counter = CompileCounterWithBackend(backend or "eager")
    if backend:
        for block in model.blocks:
            block.forward = torch.compile(block.forward, backend=counter, dynamic=False)
    phase = SimpleNamespace(cfg=train.Config(batch=64, lr=1e-2, warmup=0), rows=4, micro=2, micro_steps=2, steps=10)
    optimizer = train.make_optimizer(model, phase.cfg, "cpu")
    rows = torch.randint(0, 64, (2, 2, 17), generator=torch.Generator().manual_seed(0))
    micro_batches = [(r[:, :-1], r[:, 1:], torch.zeros(2, dtype=torch.long), {}) for r in rows]

    @torch.no_grad()
    def evaluate(model):
        sums = torch.zeros(2, 1)
        for tokens, targets, source, _ in micro_batches:
            train.add_losses(sums, model(tokens, targets)[1], targets, source)
        return sums

    compilations, losses = [], []
    for step in (1, 2, 3):
        fresh = GPT(model.config, torch.bfloat16)
        fresh.load_state_dict(model.state_dict())
        sums, feed = torch.zeros(2, 1), iter(micro_batches)
        assert torch.equal(evaluate(model), evaluate(fresh))

        def feeder(feed=feed):
            compilations.append(counter.frame_count)
            return next(feed)

        train.train_step(model, optimizer, feeder, phase, step, sums, torch.zeros(2).long())
        assert torch.equal(sums, evaluate(fresh))
        losses.append(sums[0].item())
    assert losses[0] > losses[1] > losses[2]
    assert len(set(compilations[1:])) == 1  # none after the first micro-step


# ----------------------------------------------------------------------------------------------- learning rates, plans


CRYSTAL = [f"config/crystal7b/phase{i}.py" for i in (1, 2, 3)]


def test_the_seven_named_learning_rates_of_crystal():  # T2
    (_, p1), (_, p2), (_, p3) = read_phases(CRYSTAL)
    for cfg, steps, points in (
        (p1, 79_721, {43: 0.006, 86: 0.012, 79_721: 0.0087869}),
        (p2, 214_387, {86: 0.0087825, 214_387: 0.00013679}),
        (p3, 27_728, {276: 0.002, 27_728: 0.0002}),
    ):
        assert round(cfg.share * cfg.budget / cfg.batch) == steps
        for step, lr in points.items():
            assert train.lr_at(step, steps, cfg) == pytest.approx(lr, rel=1e-5)
    # phase 2 goes on along phase 1's line: their slopes agree to 0.02%
    slope1 = (p1.lr - p1.lr_end) / (79_721 - 86)
    slope2 = (p2.lr - p2.lr_end) / (214_387 - 86)
    assert slope1 == pytest.approx(slope2, rel=2e-4)
    cosine = train.Config(lr=1.0, lr_end=0.1, decay="cosine", warmup=10)
    assert train.lr_at(55, 100, cosine) == pytest.approx(0.55) and train.lr_at(100, 100, cosine) == pytest.approx(0.1)
    assert train.lr_at(50, 100, train.Config(lr=2.0, decay="constant", warmup=0.1)) == 2.0
    for warmup in (0.95, 10, 20):  # nearly, just and never over
        late = train.Config(lr=1.0, lr_end=0.1, warmup=warmup)
        assert train.lr_at(10, 10, late) == pytest.approx({0.95: 0.1, 10: 1.0, 20: 0.5}[warmup])
    for decay in ("cosine", "linear"):  # one curve over two phases
        whole = train.Config(lr=1.0, lr_end=0.1, decay=decay, warmup=0)
        halves = [dataclasses.replace(whole, decay_part=part) for part in ([0, 0.5], [0.5, 1])]
        apart = [train.lr_at(step, 50, half) for half in halves for step in range(1, 51)]
        assert apart == pytest.approx([train.lr_at(step, 100, whole) for step in range(1, 101)])
    assert train.lr_at(5, 50, train.Config(lr=1.0, decay_part=[0.5, 1.0], warmup=10)) == pytest.approx(0.25)


def test_the_laptop_phases_keep_crystals_proportions():  # T3
    (_, p1), (_, p2), (_, p3) = read_phases([f"config/phase{i}.py" for i in (1, 2, 3)])
    assert [p.share for p in (p1, p2, p3)] == [0.2477, 0.6661, 0.0862]
    peak = p1.lr_peak
    assert p1.lr == peak
    assert p1.lr_end == p2.lr == pytest.approx(0.7319 * peak) and p2.lr_end == pytest.approx(0.0114 * peak)
    assert (p3.lr, p3.lr_end) == (pytest.approx(peak / 6), pytest.approx(peak / 60))
    assert [p.mix["code"] for p in (p1, p2, p3)] == [0.05, 0.63, 0.83]


def test_the_full_scale_plan_prints_crystals_tokens_and_epochs_without_the_data():  # X1
    done = run("train.py", *CRYSTAL, "--plan", check=True).stdout
    assert [line.split()[1] for line in done.splitlines() if line.startswith("phase")] == ["344.8B", "927.3B", "119.9B"]
    epochs = {}
    for line in done.splitlines():
        if "epochs" in line and "->" in line:
            epochs.setdefault(line.split()[0], []).append(line.split()[-1])
    assert epochs["starcoderdata"] == ["2.00", "2.01"] and epochs["starcoder_python"] == ["3.00"]
    assert epochs["slimpajama_c4"] == ["0.50", "1.00", "1.01"]


def test_a_config_file_may_compute_and_build_on_another_and_the_command_line_wins(tmp_path):
    config = tmp_path / "config"
    config.mkdir()
    (config / "a.py").write_text("import math\nlr_end = lr / 60\n_half = 0.5\nshare = _half\nmix = {'x': 1}\n")
    (config / "b.py").write_text("from config.a import *\nlr_end = 2 * lr_end\nbudget = '2.5B'\n")
    code = "from test_smoke import read_phases; print(read_phases(['config/b.py', '--lr=0.6', '--batch=512K'])[0][1])"
    out = run("-c", code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True).stdout
    for part in ("lr=0.6,", "lr_end=0.02,", "share=0.5,", "budget=2500000000,", "batch=512000,", "mix={'x': 1}"):
        assert part in out


# ----------------------------------------------------------------------------------------------------------- training


def test_three_phases_train_and_every_source_gets_better(straight):
    steps = [(r["phase"], r["step"]) for r in straight if "loss" in r]
    every = [
        *(("a", s) for s in range(1, 19)),
        *(("b", s) for s in range(1, 31)),
        *(("c", s) for s in (1, 3, 6, 9, 12)),
    ]
    assert steps == every
    assert [r["tokens"] // 512 for r in straight if "loss" in r] == [*range(1, 50), 51, 54, 57, 60]
    first, last = ([r["val"] for r in straight if "val" in r][i] for i in (0, -1))
    for name in ("text", "code"):
        assert last[name]["bpb"] < 0.7 * first[name]["bpb"]
        assert last[name]["loss"] < first[name]["loss"]


def test_phases_one_after_the_other_are_the_phases_in_one_run(phases, tmp_path, straight):  # T4
    assert train.main(phases("a")) == 0
    for before, name in (("a", "b"), ("b", "c")):
        assert train.main(phases(name, init_from=tmp_path / "out" / before)) == 0
    assert losses(tmp_path / "out") == straight


def test_killed_at_random_moments_the_run_is_the_uninterrupted_one_bit_for_bit(phases, tmp_path, straight):
    import random

    dice, deaths = random.Random(7), 0
    for _ in range(30):
        process = subprocess.Popen([sys.executable, "train.py", *phases()], cwd=ROOT, stdout=subprocess.DEVNULL)
        seen = sum(1 for _ in (tmp_path / "out").glob("*/checkpoints/step-*[0-9]"))
        patience, wait = time.time() + 60, dice.choice([0.0, 0.0, 0.05, 0.2, 0.4])
        while process.poll() is None and time.time() < patience:  # until it has got somewhere new, and a little longer
            if deaths < 5 and sum(1 for _ in (tmp_path / "out").glob("*/checkpoints/step-*")) > seen:
                time.sleep(wait)
                process.kill()
            time.sleep(0.005)
        deaths += process.wait() == -signal.SIGKILL
        if process.returncode == 0:
            break
    assert process.returncode == 0 and deaths >= 4
    assert losses(tmp_path / "out") == straight


def test_sigterm_finishes_the_step_saves_and_the_same_command_continues(phases, tmp_path, straight):
    process = subprocess.Popen([sys.executable, "train.py", *phases()], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("b ") and "loss" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=30) == 0 and "the same command continues" in rest
    assert train.main(phases()) == 0
    assert losses(tmp_path / "out") == straight


def test_moments_start_anew_in_a_phase_unless_they_are_carried(phases, tmp_path):
    assert train.main(phases()) == 0
    updates = {}
    for name in PHASES:
        updates[name] = int(tensors_in(checkpoint.find(tmp_path / "out" / name))["optimizer.wte.weight.step"])
    assert updates == {"a": 18, "b": 30, "c": 42}


@pytest.mark.parametrize("last", [False, True])
def test_ctrl_c_in_an_evaluation_stops_at_once_and_the_evaluation_is_made_up_for(last, phases, tmp_path, monkeypatch):
    command, evaluate, calls = phases("a", budget=4 * 512, share=1.0), train.evaluate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 1 + last:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", interrupted)
        assert train.main(command) == 0
    state = checkpoint.load_state(checkpoint.find(tmp_path / "out" / "a"))
    assert (state["step"], state["evaluated"]) == ((4, 0) if last else (0, -1))
    assert train.main(command) == 0
    assert [r["step"] for r in losses(tmp_path / "out", ["a"]) if "val" in r] == [0, 4]
    assert checkpoint.load_state(checkpoint.find(tmp_path / "out" / "a"))["evaluated"] == 4


def test_a_step_is_adamw_with_clipping_and_crystals_groups_written_out_in_float64():  # T1
    knobs = dict(n_layer=1, n_head=1, n_embd=64, block_size=8, vocab_size=32, mup_base=16, bias=True)
    model, twin = (GPT(GPTConfig(**knobs)) for _ in range(2))
    init_weights(model, 1), init_weights(twin, 1)
    cfg = train.Config(
        **{k: knobs[k] for k in ("n_embd",)}, batch=32, lr=1e-2, warmup=2, clip=0.01, z_loss=1e-2, beta1=0.8
    )
    optimizer, twin = train.make_optimizer(model, cfg, "cpu"), twin.double()
    twin.dtype = torch.float64
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 32, (2, 4, 9), generator=g)
    phase = SimpleNamespace(cfg=cfg, rows=4, micro=2, micro_steps=2, steps=10)
    feed = iter([(r[:, :-1], r[:, 1:], torch.zeros(2, dtype=torch.long), {}) for step in rows for r in step.split(2)])
    m, v = ({n: torch.zeros_like(p) for n, p in twin.named_parameters()} for _ in range(2))
    for step in (1, 2):
        train.train_step(model, optimizer, lambda: next(feed), phase, step, *(torch.zeros(2, 1), torch.zeros(2).long()))
        logits = twin.logits(twin.hidden(rows[step - 1][:, :-1])).double()
        loss = F.cross_entropy(logits.flatten(0, 1), rows[step - 1][:, 1:].flatten())
        loss = loss + 1e-2 * logits.logsumexp(-1).square().mean()
        grads = dict(
            zip(dict(twin.named_parameters()), torch.autograd.grad(loss, list(twin.parameters())), strict=True)
        )
        norm = torch.stack([x.norm() for x in grads.values()]).norm()
        assert norm > 0.1
        with torch.no_grad():
            for name, p in twin.named_parameters():
                matrix = p.ndim == 2
                lr = 1e-2 * step / 2 * (16 / 64 if matrix and name != "wte.weight" else 1)
                grad = grads[name] * 0.01 / norm
                m[name] = 0.8 * m[name] + 0.2 * grad
                v[name] = 0.95 * v[name] + 0.05 * grad**2
                p *= 1 - lr * 0.1 * matrix
                p -= lr * (m[name] / (1 - 0.8**step)) / ((v[name] / (1 - 0.95**step)).sqrt() + 1e-9)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p - q).norm() < 2e-3 * (p - q.mean()).norm(), name


def poisoned(monkeypatch, steps, value):
    """Multiply the loss of these training steps by `value`; the first two calls with gradients are the rehearsal."""
    real, calls = GPT.forward, [-2]

    def forward(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        calls[0] += torch.is_grad_enabled()
        return (out[0] * value, *out[1:]) if torch.is_grad_enabled() and calls[0] in steps else out

    monkeypatch.setattr(GPT, "forward", forward)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_leaves_weights_moments_and_sums_as_if_it_had_not_been(
    value, phases, tmp_path, monkeypatch
):
    real, calls = torch.optim.AdamW.step, [0]

    def left_out(self, *args):
        calls[0] += 1
        return None if calls[0] == 5 else real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", left_out)
        assert train.main(phases("a", out="left_out")) == 0
    poisoned(monkeypatch, {5}, value)
    assert train.main(phases("a")) == 0
    plain, got = losses(tmp_path / "left_out", "a"), losses(tmp_path / "out", "a")
    at = next(i for i, record in enumerate(got) if record["step"] == 5)
    assert got[at]["loss"] is None and got[at]["loss_by_source"] == {} and got[at]["grad_norm"] is None
    assert got[:at] + got[at + 1 :] == plain[:at] + plain[at + 1 :]
    skipped, left_out = (tensors_in(checkpoint.find(tmp_path / out / "a")) for out in ("out", "left_out"))
    assert int(skipped["optimizer.wte.weight.step"]) == 17 and skipped.keys() == left_out.keys()
    assert all(torch.equal(skipped[name], left_out[name]) for name in skipped)
    events = [json.loads(line) for line in (tmp_path / "out/a/log.jsonl").read_text().splitlines() if "event" in line]
    assert [(e["event"], e["step"], e["steps"], e["in_a_row"]) for e in events] == [("skipped_step", 5, 1, 1)]


def test_too_many_bad_steps_in_a_row_stop_with_their_samples_and_skip_goes_on_without_them(
    phases, tmp_path, capsys, monkeypatch
):
    with monkeypatch.context() as patch:
        poisoned(patch, {3, *range(8, 99)}, math.nan)
        assert train.main(phases("a", max_skips=3)) == 1  # 8, 9, 10, 11; in 10 a checkpoint
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "samples 112 to 175" in err and "step-00000010" in err and "(160, 176)" in err
    read, real = set(), train.Feeder.read
    monkeypatch.setattr(
        train.Feeder, "read",
        lambda self, lo, hi: (read.update(self.phase.mix.position(n) for n in range(lo, hi)), real(self, lo, hi))[1],
    )  # fmt: skip
    assert train.main(phases("a", max_skips=3, skip="[(160, 176)]")) == 0
    assert read == set(range(176, 18 * 16 + 16))
    assert [record["step"] for record in losses(tmp_path / "out", "a") if "lr" in record] == list(range(1, 19))


def test_a_second_process_on_the_same_folder_is_refused(phases, tmp_path, capsys):
    assert train.main(phases("a", budget=4 * 512, share=1.0)) == 0
    held = train.Log(SimpleNamespace(folder=tmp_path / "out/a", cfg=train.Config()), 10**9)
    assert train.main(phases("a", budget=8 * 512, share=1.0)) == 2
    assert "another process" in capsys.readouterr().err
    held.file.close()


def test_the_arithmetic_is_bf16_where_the_hardware_has_it_and_never_fp16(monkeypatch):
    for flags, dtype in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False)
        assert train.find_device(train.Config(device="cpu"))[1] is dtype


def test_a_finished_run_says_so_and_fresh_moves_it_aside(phases, tmp_path, capsys):
    short = phases("a", budget=6 * 512, share=1.0)
    assert train.main(short) == 0
    records = losses(tmp_path / "out", ["a"])
    assert train.main(short) == 0
    assert "finished" in capsys.readouterr().out and losses(tmp_path / "out", ["a"]) == records
    assert train.main([*short, "--fresh"]) == 0
    assert losses(tmp_path / "out", ["a"]) == records == losses(tmp_path / "out", ["a.old-1"])
    longer = phases("a", budget=9 * 512, share=1.0, lr=0.02)
    capsys.readouterr()
    assert train.main(longer) == 0
    assert "lr 0.01 -> 0.02" in capsys.readouterr().out
    assert [r["step"] for r in losses(tmp_path / "out", ["a"]) if "loss" in r] == list(range(1, 10))


def test_a_phase_trained_anew_alone_is_not_followed_by_the_old_ones(phases, tmp_path, capsys):
    assert train.main(phases()) == 0
    assert train.main(phases("a")) == 0 and train.main(phases()) == 0  # nothing is left to do, in either
    assert train.main([*phases("a"), "--fresh"]) == 0  # the same weights again, bit for bit
    assert train.main(phases()) == 0
    assert train.main([*phases("a"), "--fresh", "--seed=2"]) == 0
    capsys.readouterr()
    assert train.main([*phases(), "--seed=2"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "b did not begin with the weights that" in err and "a has now" in err
    assert train.main([*phases(), "--seed=2", "--fresh"]) == 0


def test_micro_batches_are_slices_of_the_same_samples_in_the_same_steps(phases, data):
    named = read_phases(phases("a"))
    sources = {name: Source(data / name, "train", 32) for name in ("text", "code")}
    rows = {}
    for micro in (1, 2, 4, 8, 16):
        phase = train.build_phases([("a", train.dataclasses.replace(named[0][1], micro_batch=micro))], sources, {}, 0)[
            0
        ]
        feeder = train.Feeder(phase, 2, "cpu", torch.float32)
        taken = [feeder() for _ in range(64 // micro)]  # from step 2 to the end of step 5
        rows[micro] = [torch.cat(parts) for parts in [*zip(*taken, strict=True)][:3]]
        feeder.thread.shutdown()
    for micro in (1, 2, 4, 8):
        assert all(torch.equal(a, b) for a, b in zip(rows[micro], rows[16], strict=True))
    expected, source, _ = phase.mix.batch(32, 96)
    assert np.array_equal(rows[16][1].numpy(), expected[:, 1:]) and np.array_equal(rows[16][2].numpy(), source)


def test_a_size_above_nano_has_a_batch_that_is_worth_a_gpu_unless_one_is_given():
    for arguments, batch in (
        ([], 4096), (["--size=30M"], 65_536), (["--size=124M"], 524_288), (["--size=124M", "--batch=65536"], 65_536)
    ):  # fmt: skip
        ((_, cfg),) = read_phases([str(ROOT / "config/phase1.py"), "--budget=100M", *arguments])
        assert cfg.batch == batch and cfg.batch % cfg.block_size == 0, arguments


def test_micro_batches_that_do_not_fit_are_refused_in_one_line(phases, tmp_path, monkeypatch, capsys):
    def forward(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(GPT, "forward", forward)
    for knobs, advice in (({}, "--micro_batch=8"), ({"micro_batch": 1}, "--recompute=True")):
        assert train.main(phases("a", **knobs)) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "do not fit" in err and err.endswith(f"try {advice}\n"), err


def test_on_a_gpu_masks_beyond_dynamos_limit_are_an_error_and_not_slow(monkeypatch):
    limits = torch._dynamo.config
    for compiled in (False, True):
        with limits.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
            monkeypatch.setattr(train, "find_device", lambda cfg, c=compiled: ("cuda", torch.bfloat16, c))
            train.parallelize(tiny(), train.Config())
            assert limits.recompile_limit >= 64 and limits.fail_on_recompile_limit_hit


def test_float32_is_never_tf32(phases):
    assert train.main(phases("a", budget=4 * 512, share=1.0)) == 0
    assert torch.get_float32_matmul_precision() == "highest"


def test_accumulation_gives_the_loss_of_the_whole_batch(phases, tmp_path, straight):
    assert train.main(phases("a", micro_batch=2)) == 0
    got = [r["loss"] for r in losses(tmp_path / "out", ["a"]) if "loss" in r]
    want = [r["loss"] for r in straight if "loss" in r and r["phase"] == "a"]
    assert got == pytest.approx(want, rel=1e-5)


def test_wandb_gets_the_records_of_the_log(phases, tmp_path, monkeypatch):
    sent = []
    run = SimpleNamespace(log=lambda record, step: sent.append((step, record)), finish=lambda: None)
    fake = SimpleNamespace(init=lambda **how: run, __spec__=True)
    assert train.main(phases("a", wandb="project")) == 2  # not installed: said before anything is written
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert train.main(phases("a", wandb="project")) == 0
    logged = [json.loads(line) for line in (tmp_path / "out/a/log.jsonl").read_text().splitlines()]
    assert sent == [(record["tokens"], record) for record in logged]


def test_losses_by_source_are_the_means_over_their_rows():
    token_loss, source = torch.rand(6, 5, dtype=torch.float32), torch.tensor([0, 2, 0, 2, 2, 0])
    targets = torch.arange(30).view(6, 5) % 7 - 1  # -1, not trained on, once or twice a row
    token_loss[targets < 0] = 0
    sums = torch.zeros(2, 3, dtype=torch.float64)
    train.add_losses(sums, token_loss[:3], targets[:3], source[:3])
    train.add_losses(sums, token_loss[3:], targets[3:], source[3:])
    for s in (0, 2):
        trained = (targets >= 0) & (source == s)[:, None]
        assert sums[0, s] / sums[1, s] == pytest.approx(token_loss[trained].double().mean().item())
    assert sums[:, 1].tolist() == [0, 0]


def test_bits_per_byte_count_the_bytes_that_the_targets_spell(phases, data, tmp_path):
    assert train.main(phases("a", budget=3 * 512, share=1.0)) == 0
    from sample import load_model

    model, encoding, _ = load_model(tmp_path / "out" / "a")
    logged = [r["val"] for r in losses(tmp_path / "out", ["a"]) if "val" in r][-1]
    for name in ("text", "code"):
        tokens = np.fromfile(next((data / name).glob("val-*.bin")), "<u2").astype(np.int64)
        count = len(tokens) // 32  # windows, of which 2,048 tokens are 64, at equal distances
        begins = [32 * (i * count // min(64, count)) for i in range(min(64, count))]
        rows = torch.from_numpy(np.stack([np.append(tokens, tokens[0])[b : b + 33] for b in begins]))
        x, y, n = rows[:, :-1], rows[:, 1:], 32 * len(begins)
        with torch.no_grad():
            nats = -model(x).double().log_softmax(-1).gather(-1, y[..., None]).sum().item()
        words = [t for t in y.flatten().tolist() if t != tokenizer.eot(encoding)]
        n_bytes = sum(len(encoding.decode_single_token_bytes(t)) for t in words)
        assert logged[name]["tokens"] == n
        assert logged[name]["bpb"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


# ---------------------------------------------------------------------------------------------------- when things break


def test_a_full_disk_while_saving_leaves_the_previous_checkpoint_good(phases, tmp_path, straight):
    def small_files():  # a checkpoint's model.pt does not fit, a log line does
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    assert train.main(phases("a", budget=60 * 512, share=0.1)) == 0  # steps 1 to 6: a checkpoint exists
    before = sorted(p.name for p in (tmp_path / "out/a/checkpoints").iterdir())
    failed = run("train.py", *phases(), preexec_fn=small_files)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "File too large; run the same" in failed.stderr
    assert sorted(p.name for p in (tmp_path / "out/a/checkpoints").iterdir()) == before
    assert train.main(phases()) == 0
    assert [(r["phase"], r["step"]) for r in losses(tmp_path / "out") if "loss" in r] == [
        (r["phase"], r["step"]) for r in straight if "loss" in r
    ]


@pytest.mark.parametrize("how", ["a flipped bit", "truncated", "missing", "no marker"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(how, phases, tmp_path, capsys, straight):
    assert train.main(phases()) == 0
    newest = sorted((tmp_path / "out/c/checkpoints").iterdir())[-1]
    path = newest / "__0_0.distcp"
    if how == "a flipped bit":
        blob = bytearray(path.read_bytes())
        blob[len(blob) // 2] ^= 4
        path.write_bytes(blob)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "missing":
        path.unlink()
    else:
        (newest / "complete.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=newest.name):
        checkpoint.find(newest)
    assert train.main(phases()) == 0
    assert how == "no marker" or str(newest) in capsys.readouterr().err
    assert losses(tmp_path / "out") == straight


@pytest.mark.parametrize("moment", ["before the new name", "while the old one is deleted"])
def test_a_death_while_a_checkpoint_is_replaced_leaves_one_of_the_two(moment, tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"model": {"x": torch.ones(1)}}, {"n": 1}, keep=2)
    rename, unlink = Path.rename, Path.unlink

    def dying_rename(path, to):
        if path.suffix == ".tmp" and path.is_dir():
            raise KeyboardInterrupt
        return rename(path, to)

    def dying_unlink(path, **knobs):
        if path.parent.suffix == ".old" and path.name != "complete.json":
            raise KeyboardInterrupt
        return unlink(path, **knobs)

    before = moment == "before the new name"
    monkeypatch.setattr(*((Path, "rename", dying_rename) if before else (Path, "unlink", dying_unlink)))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 1, {"model": {"x": torch.zeros(1)}}, {"n": 2}, keep=2)
    assert checkpoint.load_state(checkpoint.latest(tmp_path)) == {"n": 1 if before else 2}
    monkeypatch.undo()
    checkpoint.save(tmp_path, 1, {"model": {"x": torch.zeros(1)}}, {"n": 3}, keep=2)
    assert checkpoint.load_state(checkpoint.latest(tmp_path)) == {"n": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_disk_that_is_full_asks_for_space_and_leaves_nothing(tmp_path, monkeypatch):
    def write_data(self, plan, planner):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.Writer, "write_data", write_data)
    with pytest.raises(checkpoint.CheckpointError, match="No space left on device; free some space and run the same"):
        checkpoint.save(tmp_path, 1, {"model": {"x": torch.ones(1)}}, {}, keep=1)
    assert not list(tmp_path.iterdir())


def test_a_new_checkpoint_outlives_damaged_ones_of_later_steps_and_what_a_death_left(tmp_path):
    def save(step):
        return checkpoint.save(tmp_path, step, {"model": {"x": torch.ones(1)}}, {}, keep=2)

    for step in (10, 15):
        (save(step) / "state.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"step-00000015: state\.json is missing, and there is"):
        checkpoint.latest(tmp_path)
    (tmp_path / "step-00000007.tmp").mkdir()
    assert save(5) == checkpoint.latest(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000015"]


@pytest.mark.parametrize("where", ["metadata", "a value", "a tensor"])
def test_a_checkpoint_cannot_run_code(where, tmp_path):
    """With the library's own reader, the first two of these files do."""
    tensors = {"model": {"x": torch.ones(3), "y": torch.ones(1000)}}
    folder = checkpoint.save(tmp_path / "checkpoints", 1, tensors, {}, keep=1)

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    reader = checkpoint.Reader(folder)
    metadata, shard = reader.metadata, folder / "__0_0.distcp"
    if where == "metadata":
        metadata.planner_data = Hostile()
    else:
        (info,) = (info for index, info in metadata.storage_data.items() if index.fqn == "model.x")
        if where == "a value":
            metadata.state_dict_metadata["model.x"] = BytesStorageMetadata()
            metadata.storage_data[MetadataIndex("model.x")] = info
        payload = pickle.dumps(Hostile())
        blob = bytearray(shard.read_bytes())
        blob[info.offset : info.offset + len(payload)] = payload
        shard.write_bytes(blob)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    digests = {path.name: files.sha256(path) for path in folder.iterdir() if path.name != "complete.json"}
    (folder / "complete.json").write_text(json.dumps(digests))
    x = {"model": {"x": torch.zeros(3)}}
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load(checkpoint.find(tmp_path), x)
    assert not (tmp_path / "ran").exists()
    if where != "a tensor":  # the file is one that would have
        with contextlib.suppress(Exception, dcp.api.CheckpointException):
            dcp.load(x, checkpoint_id=folder, no_dist=True)
        assert (tmp_path / "ran").exists()


def test_a_checkpoints_description_is_checked_before_it_is_followed(tmp_path):
    checkpoint.save(tmp_path / "other", 1, {"model": {"x": torch.ones(3)}}, {}, keep=1)
    folder = checkpoint.save(tmp_path, 1, {"model": {"x": torch.zeros(3)}}, {}, keep=1)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (index, info), *_ = metadata.storage_data.items()
    outside = dataclasses.replace(info, relative_path="../other/step-00000001/__0_0.distcp")
    metadata.storage_data[index] = outside
    strange = {pickle.dumps(metadata): "not one of its files", pickle.dumps(torch.Size([3])): "", b"": "", b"x": ""}
    for text, why in strange.items():
        (folder / ".metadata").write_bytes(text)
        with pytest.raises(checkpoint.CheckpointError, match=f"step-00000001.*{why}"):
            checkpoint.load(folder, {"model": {"x": torch.zeros(3)}})
    for text in ("{}", "[]", '""', "3", '{".metadata": 3}', "[" * 100_000):
        (folder / "complete.json").write_text(text)
        assert checkpoint.damage(folder)


def test_keep_keeps_the_newest_checkpoints_and_every_phase_its_end(phases, tmp_path):
    assert train.main(phases(keep=2)) == 0
    kept = {name: sorted(p.name[-2:] for p in (tmp_path / f"out/{name}/checkpoints").iterdir()) for name in PHASES}
    assert kept == {"a": ["15", "18"], "b": ["25", "30"], "c": ["10", "12"]}
    for step in range(1, 9):
        checkpoint.save(tmp_path / "more", step, {"model": {"x": torch.ones(1)}}, {}, keep=5)
        kept = [int(path.name[-1]) for path in checkpoint.complete(tmp_path / "more")]
        assert kept == list(range(max(1, step - 4), step + 1))


MISTAKES = {
    "an unknown knob, with the nearest": (["--leraning_rate=1", "--epochs_mx=2"], "leraning_rate"),
    "a near miss": (["--epochs_mx=2"], "did you mean 'epochs_max'"),
    "a wrong type": (["--lr=fast"], "lr = 'fast' is not of type float"),
    "no such choice": (["--decay=exponential"], "linear, cosine, constant"),
    "no part of a decay": (["--decay_part=[0.5, 0.2]"], "decay_part = [0.5, 0.2] is not two numbers"),
    "a config that does not exist": (["nowhere.py"], "there is no config file nowhere.py"),
    "more epochs than allowed": (["--epochs_max=0.01"], "epochs_max"),
    "a batch that does not divide": (["--batch=500"], "not a multiple of block_size = 32: write 512"),
    "a micro-batch that does not divide": (["--micro_batch=7"], "micro_batch = 7"),
    "heads that do not divide": (["--n_head=3"], "n_embd = 64 is not a multiple of n_head = 3"),
    "a source that is not there": (["--mix={'text': 1, 'poems': 1}"], "poems"),
    "a vocabulary too small for the data": (["--vocab_size=256"], "512"),
    "weights from nowhere": (["--init_from=nowhere"], "no checkpoint under nowhere"),
    "a phase twice": (["a.py"], "two phases of one name"),
    "zero steps between checkpoints": (["--save_every=0"], "save_every = 0 is not above 0"),
    "a skip that is no range": (["--skip=[(5, 5)]"], "skip = [(5, 5)] is not a list of"),
    "a beta of one": (["--beta1=1"], "beta1 = 1.0 is not below 1"),
    "no source": (["--mix={}"], "names no sources"),
    "fresh with another mistake": (["--fresh", "--init_from=nowhere"], "no checkpoint under nowhere"),
    "kernels for a GPU that is not there": (["--kernels=triton", "--device=cpu"], "kernels = triton, but"),
    "a device of which there is none": (["--device=cuda:7"], "device = 'cuda:7' is none of auto, cuda, mps, cpu"),
    "a device of another name": (["--device=gpu"], "device = 'gpu' is none of auto, cuda, mps, cpu"),
    "a model beyond the memory": (["--n_embd=1048576"], "GB of a memory of"),
    "a model beyond reason": (["--n_layer=1000000000"], "n_layer = 1,000,000,000"),
    "an out folder that is a file": ([f"--out={__file__}"], "test_smoke.py"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_exit_code_2_and_writes_nothing(mistake, phases, tmp_path, capsys):
    arguments, words = MISTAKES[mistake]
    arguments = [str(tmp_path / "a.py") if argument == "a.py" else argument for argument in arguments]
    assert train.main([*phases("a"), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err and not (tmp_path / "out").exists()


def test_a_folder_is_told_by_what_is_in_it_and_copies_are_a_persons(phases, tmp_path):
    for name in ("step-1", "step-00000005", "checkpoints", "a b"):
        shutil.copy(tmp_path / "a.py", tmp_path / f"{name}.py")
        assert train.main(phases(name, budget=2 * 512, share=1.0, save_every=1, keep=1)) == 0
        folder = tmp_path / "out" / name
        newest = folder / "checkpoints/step-00000002"
        assert checkpoint.find(folder) == checkpoint.find(newest) == newest
        shutil.copytree(newest, folder / "checkpoints/step-00000001-kept")
        (folder / "checkpoints/step-mine.tmp").mkdir()
        (newest / "notes.md").write_text("mine")
        assert train.main(phases(name, budget=4 * 512, share=1.0, save_every=1, keep=1)) == 0
        left = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert left == ["step-00000001-kept", "step-00000002", "step-00000004", "step-mine.tmp"]
        assert [path.name for path in newest.iterdir()] == ["notes.md"]
    (newest.parent / "step-00000004" / "complete.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="not a complete checkpoint"):
        checkpoint.find(newest.parent / "step-00000004")


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, fsync, rename = [], os.fsync, Path.rename

    def synced(handle):
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def renamed(path, to):
        done.append(("name", Path(path)))
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    checkpoint.save(tmp_path, 1, {"model": {"x": torch.ones(1)}}, {"step": 1}, keep=1)
    names = [path for what, path in done if what == "name"][-3:]
    assert [path.name.split(".")[0] for path in names] == ["state", "complete", "step-00000001"]
    for path in names:
        assert done.index(("sync", path)) < done.index(("name", path))
    assert done[-1] == ("sync", tmp_path)


def test_a_log_that_somebody_shortened_is_gone_on_with_and_not_filled_with_zeros(phases, tmp_path):
    assert train.main(phases("a", budget=2 * 512, share=1.0)) == 0
    log = tmp_path / "out/a/log.jsonl"
    log.write_text("")
    assert train.main(phases("a", budget=4 * 512, share=1.0)) == 0
    assert "\0" not in log.read_text() and [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("wrong", [{"sums": [[1.0]]}, {"sums": []}, {"skips": [0]}, {"skips": [0, "1"]}])
def test_a_state_that_does_not_fit_its_sources_is_refused(wrong, phases, tmp_path, capsys):
    assert train.main(phases("a", budget=2 * 512, share=1.0)) == 0
    step = checkpoint.find(tmp_path / "out/a")
    files.write_json(step / "state.json", files.read_json(step / "state.json") | wrong)
    digests = files.read_json(step / checkpoint.MARKER) | {"state.json": files.sha256(step / "state.json")}
    files.write_json(step / checkpoint.MARKER, digests)
    capsys.readouterr()
    assert train.main(phases("a", budget=4 * 512, share=1.0)) == 2
    err = capsys.readouterr().err
    assert "state.json" in err and err.count("\n") == 1


WANDB = """
class UsageError(Exception): pass
class Gone:
    def log(self, *_, **__): raise SystemExit('gone')
    finish = log
def init(**_):
"""
REFUSALS = {
    "no login": ("raise UsageError('No API key configured. Use `wandb login` to log in.')", "wandb login"),
    "no network": ("raise SystemError('no\\nnetwork')", "'project': SystemError: no; network"),
    "no such project": ("raise PermissionError(13, 'denied')", "denied"),
    "an exit": ("raise SystemExit('log in')", "SystemExit: log in"),
    "no words": ("raise UsageError", "UsageError"),
}


@pytest.mark.parametrize("refusal", [*REFUSALS, "a loss on the way"])
def test_wandb_that_refuses_is_one_line_and_on_the_way_costs_nothing(refusal, phases, tmp_path, capsys, monkeypatch):
    body, words = REFUSALS.get(refusal, ("return Gone()", ""))
    (tmp_path / "wandb.py").write_text(f"{WANDB}    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    code = train.main(phases("a", budget=2 * 512, share=1.0, wandb="project"))
    monkeypatch.delitem(sys.modules, "wandb")
    out, err = capsys.readouterr()
    if words:
        assert code == 2 and words in err and err.count("\n") == 1
    else:
        assert code == 0 and "wandb has failed" in out and len(losses(tmp_path / "out", ["a"])) == 4


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EWOULDBLOCK])
def test_a_file_system_without_locks_is_no_folder_in_use(number, phases, monkeypatch, capsys):
    def flock(*_):
        raise OSError(number, "as asked")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    code, (out, err) = train.main(phases("a", budget=2 * 512, share=1.0)), capsys.readouterr()
    if number == errno.EWOULDBLOCK:
        assert code == 2 and "another process is training" in err
    else:
        assert code == 0 and "without locks" in out and not err


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_id_beyond_the_vocabulary_of_a_bare_file_ends_training_in_one_line(split, phases, tmp_path, capsys):
    ids = np.random.default_rng(0).integers(0, 65, 40_000).astype("<u2")
    for name in ("text", "code"):
        (tmp_path / "bare" / name).mkdir(parents=True)
        ids.tofile(tmp_path / "bare" / name / "train.bin")
        ids[:4_000].tofile(tmp_path / "bare" / name / "val.bin")
    knobs = {"budget": 40 * 2048, "batch": 2048, "share": 1.0, "vocab_size": 66, "eval_tokens": 4096}
    command = [*phases("a", **knobs), f"--data={tmp_path / 'bare'}"]
    ids[39_000] = ids[3_333] = 70  # the first look at a hundred windows sees neither
    ids[: {"train": 40_000, "val": 4_000}[split]].tofile(tmp_path / "bare" / "code" / f"{split}.bin")
    assert train.main(command) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"code/{split}.bin: id 70" in err and "66 ids" in err


def test_a_folder_with_things_in_it_is_never_filled_with_the_default_corpus(tmp_path, capsys):
    for at in ("text/mine.txt", "corpus/notes.md", "thesis.tex"):
        folder = tmp_path / at.replace("/", "-")
        (folder / at).parent.mkdir(parents=True)
        (folder / at).write_text("mine")
        assert train.main(["config/phase1.py", f"--data={folder}", f"--out={tmp_path / 'out'}"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and at.split("/")[-1] in err
        assert [p for p in folder.rglob("*") if p.is_file()] == [folder / at] and not (tmp_path / "out").exists()
    (tmp_path / "link").symlink_to("nowhere")
    for folder in (__file__, f"{__file__}/data", tmp_path / "link/data"):
        assert train.main(["config/phase1.py", f"--data={folder}", f"--out={tmp_path / 'out'}"]) == 2
        assert "is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_python_imports_is_a_stop_like_any_other(number, phases):
    process = subprocess.Popen([sys.executable, "train.py", *phases()], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.005)
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0


def test_phases_of_one_run_must_agree_on_the_model_and_the_data(phases, tmp_path, capsys):
    with open(tmp_path / "b.py", "a") as f:
        f.write("seed = 5\n")
    assert train.main(phases()) == 2
    assert "seed = 5 in b but 1 in a" in capsys.readouterr().err


def test_broken_or_foreign_data_are_refused_and_named(phases, data, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    assert train.main(phases("a", budget=6 * 512, share=1.0)) == 0
    capsys.readouterr()

    def refused(*knobs, words):
        assert train.main([*phases("a", budget=9 * 512, share=1.0), *knobs]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and words in err, err
        assert len(losses(tmp_path / "out", ["a"])) == 8  # six steps and two evaluations: nothing lost, nothing new

    shard = next((other / "code").glob("train-*.bin"))
    blob = shard.read_bytes()
    shard.write_bytes(blob[:-10])
    refused(f"--data={other}", words=shard.name)
    shard.write_bytes(blob)
    meta = json.loads((other / "code" / "meta.json").read_text())
    meta["train"]["shards"][0]["sha256"] = "0" * 64
    (other / "code" / "meta.json").write_text(json.dumps(meta))
    refused(f"--data={other}", words="code")  # other data than the checkpoint's
    refused(
        f"--data={other}", f"--init_from={tmp_path / 'out' / 'a'}", f"--out={tmp_path / 'new'}", words="another name"
    )
    for name, words in (("code", "one tokenizer"), ("text", "another nanocrystal")):
        meta = json.loads((other / name / "meta.json").read_text())
        meta["tokenizer"]["sha256"] = "0" * 64
        (other / name / "meta.json").write_text(json.dumps(meta))
        refused(f"--data={other}", words=words)
    shutil.rmtree(other)
    sources = [f"{name}={data.parent / name}" for name in ("text", "code")]
    run("prepare.py", *sources, f"--out={other}", "--vocab_size=500", "--val=0.05", check=True)
    refused(f"--data={other}", words="vocab_real")
    for shard in (data / "code").glob("val-*.bin"):
        shutil.rmtree(other)
        shutil.copytree(data, other)
        (other / "code" / shard.name).write_bytes(shard.read_bytes()[:-10])
        refused(f"--data={other}", words=shard.name)
    refused("--batch=256", words="batch")
    refused("--block_size=16", words="block_size")  # a checkpoint of another model
    refused("--n_embd=128", words="n_embd")
    refused("--seed=2", words="seed")
    refused("--block_size=4194304", "--batch=4194304", "--budget=10M", "--out=" + str(tmp_path / "new"), words="window")
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------ looking at the result


def test_sample_and_plot_work_on_what_training_left(phases, tmp_path):
    assert train.main(phases("a")) == 0
    out = run("sample.py", tmp_path / "out" / "a", "--prompt", "def f(x):", "--tokens", 20, "--n", 2, check=True).stdout
    assert out.count("def f(x):") == 2
    again = run(
        "sample.py", tmp_path / "out" / "a", "--prompt", "def f(x):", "--tokens", 20, "--n", 2, check=True
    ).stdout
    assert out == again
    wrong = run("sample.py", tmp_path / "out")
    assert wrong.returncode == 2 and str(tmp_path / "out" / "a") in wrong.stderr
    pytest.importorskip("matplotlib")
    run("plot.py", tmp_path / "out", check=True)
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
