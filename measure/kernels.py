"""How long the five operations take on a GPU: ours, eager PyTorch, torch.compile, Liger if it is installed.

`python bench.py --gpu --only kernels tune` runs this alone, at the shapes of 124M and 1.3B. Device times are medians of
Triton's do_bench, which flushes the L2 cache before every launch, and of rounds in which the ways take turns. The limit
of an operation is what it must move or multiply, at the rate of a copy or of cuBLAS measured in the same run. On a
machine without a GPU the same code runs on toy shapes, and times mean nothing: a rehearsal for the tests.
"""

import functools
import importlib.util
import time
from statistics import median

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import add_norm, attention, backend, batch_mask, linear_ce, rope_qkv_, rope_tables, swiglu
from kernels.linear_ce import cross_entropy_kernel
from kernels.linear_ce import formula as linear_ce_formula
from kernels.norm import reference as norm_reference
from kernels.swiglu import reference as swiglu_reference
from measure.table import row
from model import PRESETS, GPTConfig


@functools.cache  # asked for when something runs, not at import: a process that has asked CUDA must not be forked
def gpu():
    return not backend.lack() and not backend.INTERPRET


def shapes():
    """{size: (tokens of a micro-batch, GPTConfig)} of what a GPU trains; a toy for a rehearsal."""
    if not gpu():
        return {"toy": (32, GPTConfig(n_head=2, n_embd=32, n_inner=64, block_size=32, vocab_size=96))}
    known = {"block_size": 2048, "vocab_size": 50_304}
    return {size: (n, GPTConfig(**PRESETS[size] | known)) for size, n in {"124M": 32_768, "1.3B": 16_384}.items()}


def randn(*shape):
    """Random bf16: zeros would run faster in a product."""
    return torch.randn(*shape, device="cuda" if gpu() else "cpu", dtype=torch.bfloat16)


def device_us(function):
    if gpu():
        return 1e3 * backend.triton.testing.do_bench(function, warmup=5, rep=30, return_mode="median")
    start = time.perf_counter()
    function()
    return 1e6 * (time.perf_counter() - start)


def in_turns(ways, rounds=3):
    """{name: (make, kernels)} -> {name: median microseconds of rounds}, {name: error}.

    make() returns the function to time, of no arguments; kernels is what `backend.use` is given meanwhile. What fails
    is left out: a rival that does not run must not cost the other results.
    """
    made, times, failed = {}, {}, {}
    for _ in range(rounds):
        for name, (make, kernels) in ways.items():
            if name in failed:
                continue
            backend.use(kernels)
            try:
                if name not in made:
                    made[name] = make()
                    made[name]()  # compiles
                times.setdefault(name, []).append(device_us(made[name]))
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    backend.use("torch")
    return {name: median(us) for name, us in times.items() if name not in failed}, failed


def forward(function, *inputs):
    return functools.partial(function, *inputs)


def backward(function, *inputs):
    """Only the backward, over the graph of one forward."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.requires_grad]
    upstream = [torch.randn_like(y) for y in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)


def both(function, *inputs):
    """Forward and backward of a function that returns one scalar."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(function(*leaves), leaves)


def ways_of(time_of, inputs, ours, plain, eager=None, liger=None):
    """For `in_turns`. time_of: forward, backward or both; plain: what torch.compile gets; eager: plain if None."""
    compiled = torch.compile(plain, dynamic=False, backend="inductor" if gpu() else "aot_eager")
    functions = {"ours": ours, "eager": eager or plain, "compile": compiled} | ({"liger": liger} if liger else {})
    return {
        name: (functools.partial(time_of, function, *inputs), "triton" if name == "ours" else "torch")
        for name, function in functions.items()
    }


def kernel_row(op, what, size, ways, work, unit, limit_us, least=None):
    """Time of "ours", with the rivals' in the note.

    work: bytes or FLOP, as unit GB/s or TFLOP/s says; limit_us: what the device allows; least: share of that to reach.
    """
    torch._dynamo.reset()  # a rival compiles for each shape anew, and does not give up after the eighth
    us, failed = in_turns(ways)
    more, notes = {"op": op, "us": us, "failed": failed}, [f"{name} failed: {why}" for name, why in failed.items()]
    if "ours" not in us:
        return row(f"{op} {what}, {size}", None, "us", note=", ".join(notes), must=False) | more
    ours = us["ours"]
    rate = f"{work / ours / {'GB/s': 1e3, 'TFLOP/s': 1e6}[unit]:,.0f} {unit}"
    notes = [rate, *(f"{name} {t / ours:.2f}x" for name, t in us.items() if name != "ours"), *notes]
    target, note = least and (0, limit_us / least), ", ".join(notes)
    return row(f"{op} {what}, {size}", ours, "us", of_limit=limit_us / ours, target=target, note=note) | more


def limit_us(function, *inputs):
    """Time of what sets the limit: a copy, or products."""
    us, failed = in_turns({"limit": (functools.partial(forward, function, *inputs), "torch")})
    if failed:
        raise RuntimeError(f"the limit could not be measured: {failed['limit']}")
    return us["limit"]


@functools.cache
def copy_rate():
    """Bytes/s, read and written, of a copy of a gigabyte."""
    source = randn(1 << 29 if gpu() else 1 << 10)
    return 2 * source.nbytes / limit_us(torch.empty_like(source).copy_, source) * 1e6


@functools.cache
def product_rate(n):
    """FLOP/s of a product of two n x n matrices in bf16."""
    return 2 * n**3 / limit_us(torch.mm, randn(n, n), randn(n, n)) * 1e6


def moves(n_bytes):
    """work, unit and limit of an operation that moves n_bytes."""
    return n_bytes, "GB/s", n_bytes / copy_rate() * 1e6


def liger(name, module="liger_kernel.transformers.functional"):
    """A function of Liger's, or None without it or in a version that has no such function."""
    there = gpu() and importlib.util.find_spec("liger_kernel")
    return getattr(importlib.import_module(module), name, None) if there else None


def bench_norm(size, M, c):
    def ours(x, residual, weight):
        return add_norm(x, residual, weight)

    def plain(x, residual, weight):
        return norm_reference(x, residual, weight, None, 1e-5, False, 1.0)

    def eager(x, residual, weight):  # the fastest way to write it: the weight rounded, no cast of the stream
        r = residual + x
        return F.layer_norm(r, weight.shape, weight.to(r.dtype)), r

    def rival(x, residual, weight):
        r = residual + x
        return layer_norm(r, weight, torch.zeros_like(weight), 1e-5), r

    layer_norm, inputs = liger("liger_layer_norm"), (randn(M, c.n_embd), randn(M, c.n_embd), randn(c.n_embd).float())
    for time_of in (forward, backward):
        ways = ways_of(time_of, inputs, ours, plain, eager, layer_norm and rival)
        yield kernel_row("norm", time_of.__name__, size, ways, *moves(8 * c.n_embd * M), least=0.9)


def bench_swiglu(size, M, c):
    packed = liger("LigerFusedGateUpSiLUMulFunction", "liger_kernel.ops.swiglu")
    rival = packed and (lambda gate_up: packed.apply(gate_up, False))
    plain, inputs = functools.partial(swiglu_reference, gate_first=True), (randn(M, 2 * c.n_inner),)
    for time_of, n_bytes in ((forward, 6), (backward, 10)):
        ways = ways_of(time_of, inputs, swiglu, plain, liger=rival)
        yield kernel_row("swiglu", time_of.__name__, size, ways, *moves(n_bytes * c.n_inner * M), least=0.9)


def bench_rope(size, M, c):
    def ours(qkv):
        return rope_qkv_(qkv, cos, sin)

    def plain(qkv):  # as one writes it without in-place operations
        turned, half, c, s = [], cos.shape[1], cos[:, None], sin[:, None]
        for x in qkv[:, :, :2].unbind(2):
            a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
            both_halves = torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)
            turned.append(torch.cat((both_halves, rest), -1).transpose(1, 2))
        return *turned, qkv[:, :, 2].transpose(1, 2)

    inputs = (randn(M // c.block_size, c.block_size, 3, c.n_head, c.head_dim),)
    cos, sin = rope_tables(c.block_size, c.rotary_dim, device=inputs[0].device)
    # forward, a quarter of q and k is read and written
    for time_of, n_bytes, least in ((forward, 2, None), (backward, 12, 0.9)):
        ways = ways_of(time_of, inputs, ours, plain)
        yield kernel_row("rope", time_of.__name__, size, ways, *moves(n_bytes * c.n_embd * M), least=least)


def bench_linear_ce(size, M, c):
    def ours(x, weight):
        return linear_ce(x, weight, target, z_coef=1e-4)[0]

    def plain(x, weight):
        logits = (x @ weight.T).float()
        lse = torch.logsumexp(logits, 1)
        return (lse - logits.gather(1, target[:, None])[:, 0] + 1e-4 * lse.square()).mean()

    def rival(x, weight):
        return fused(x, weight, target, lse_square_scale=1e-4, accum_dtype=torch.float32)

    def products(x, weight, logits):  # what cuBLAS takes for the three products alone
        torch.mm(x, weight.T, out=logits)
        torch.mm(logits, weight)
        torch.mm(logits.T, x)

    d, V, fused = c.n_embd, c.vocab_size, liger("liger_fused_linear_cross_entropy")
    x, weight, logits = randn(M, d), randn(V, d) * d**-0.5, randn(M, V)
    target, limit = torch.randint(V, (M,), device=x.device), limit_us(products, x, weight, logits)
    ways = ways_of(both, (x, weight), ours, plain, liger=fused and rival)
    yield kernel_row("linear_ce", "both", size, ways, 6 * M * d * V, "TFLOP/s", limit, least=1 / 1.1)
    ways = {"ours": (functools.partial(forward, entropy, logits, target), "triton")}
    yield kernel_row("linear_ce", "softmax part", size, ways, *moves(4 * V * M), least=0.85)


def entropy(logits, target):
    """The kernel between the products: logits (N, V) to their gradients, in place."""
    divisor, losses = torch.ones((), device=logits.device), torch.empty(2, len(logits), device=logits.device)
    V = logits.shape[1]
    BLOCK, warps, stages = backend.tile("linear_ce", V, logits.dtype, linear_ce_formula(V))
    cross_entropy_kernel[(len(logits),)](
        logits, target, divisor, *losses, 1.0, 1e-4, -1, V, V, BLOCK, stages, True, num_warps=warps
    )  # fmt: skip


def bench_attention(size, M, c):
    """Causal attention as torch chooses and by its two fast backends, and two other masks."""

    def by(kind, q, k, v):
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    T = c.block_size
    inputs = [randn(M // T, T, c.n_head, c.head_dim).transpose(1, 2) for _ in range(3)]
    t = torch.arange(T, device=inputs[0].device).expand(M // T, T)
    masks = {"prefix mask": batch_mask(T, t < T // 4, None, torch.bfloat16),
             "document mask": batch_mask(T, None, t // (T // 4), torch.bfloat16)}  # fmt: skip
    functions = {"ours": attention} | {name: functools.partial(attention, mask=mask) for name, mask in masks.items()}
    if gpu():
        functions["cudnn"] = functools.partial(by, SDPBackend.CUDNN_ATTENTION)
        functions["flash"] = functools.partial(by, SDPBackend.FLASH_ATTENTION)
    for time_of, products in ((forward, 2), (backward, 5)):
        ways = {name: (functools.partial(time_of, function, *inputs), "torch") for name, function in functions.items()}
        flops = products * M * T * c.n_embd  # half of the square, 2 FLOP a multiply-add
        limit = flops / product_rate(8192 if gpu() else 32) * 1e6
        yield kernel_row("attention", time_of.__name__, size, ways, flops, "TFLOP/s", limit)


def bench_kernels():
    """All rows, one by one, so that what is measured is kept when the time is over."""
    with torch._functorch.config.patch(donated_buffer=False):  # a compiled backward is to run more than once
        for section in (bench_linear_ce, bench_attention, bench_rope, bench_norm, bench_swiglu):
            for size, (M, c) in shapes().items():
                yield from section(size, M, c)


# --------------------------------------------------------------------------------------------------------------- tune


def tune():
    """Rows: launch parameters that beat the formulas, as lines of `TILES` in backend.py."""
    warps = (2, 4, 8, 16) if gpu() else (4,)
    backend.use("triton")
    for M, c in shapes().values():
        d, T, V = c.n_embd, c.block_size, c.vocab_size
        norm = randn(M, d), randn(M, d), randn(d).float()
        qkv, gate_up = randn(M // T, T, 3, c.n_head, c.head_dim), randn(M, 2 * c.n_inner)
        cos, sin = rope_tables(T, c.rotary_dim, device=qkv.device)
        logits, target = randn(M // 2, V), torch.zeros(M // 2, dtype=torch.long, device=qkv.device)
        turn = functools.partial(rope_qkv_, cos=cos, sin=sin)
        rows = [(n, w, stages) for n in (1, 2, 4, 8) for w in warps for stages in (1, 2, 3) if n * d <= 8192]
        heads = [(n, w, 1) for n in (16, 32, 64, 128, 256) for w in warps]
        columns = [(n, w, 1) for n in (512, 1024, 2048, 4096) for w in warps]
        words = [(n, w, stages) for n in (2048, 4096, 8192) for w in (4, 8, 16, 32) for stages in (1, 2, 3)
                 if 8 <= n // (32 * w) <= 32]  # fmt: skip
        yield fastest("norm", d, [tile for tile in rows if tile[2] == 1], forward(add_norm, *norm))
        yield fastest("norm_backward", d, rows, backward(lambda *inputs: add_norm(*inputs), *norm))
        yield fastest("rope", c.rotary_dim // 2, heads, forward(turn, qkv))
        yield fastest("rope_pack", c.head_dim, heads, backward(turn, qkv))
        yield fastest("swiglu", c.n_inner, columns, forward(swiglu, gate_up))
        yield fastest("swiglu_backward", c.n_inner, columns, backward(swiglu, gate_up))
        yield fastest("linear_ce", V, words, forward(entropy, logits, target))


def fastest(op, width, tiles, function):
    key, us, failed = (op, backend.next_power_of_2(width), 2), {}, []
    kept = backend.TILES.pop(key, None)
    formula = device_us(function)
    for tile in tiles if gpu() else tiles[:2]:
        backend.TILES[key] = tile
        try:
            us[tile] = device_us(function)
        except Exception:  # too large for the device
            failed.append(tile)
    backend.TILES.pop(key, None)
    if kept:
        backend.TILES[key] = kept
    best = min(us, key=us.get)
    note = f"{key}: {best}, instead of {formula:,.0f} us" if us[best] < 0.98 * formula else "nothing beats the formula"
    more = {"key": key, "failed": failed}
    return row(f"tune {op}, width {width:,}", us[best], "us", note=f"{note}; {len(failed)} tiles failed") | more
