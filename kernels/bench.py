"""How long the five operations take on a GPU: ours, eager PyTorch, torch.compile, Liger if it is installed.

`python bench.py --only kernels` and `--only tune` run this. Device times are medians of launches with the L2 cache
flushed before each and the launch already queued, and of rounds in which the ways take turns. The limit of an operation
is what it must move or multiply, at the rate of a copy or of cuBLAS measured in the same run; a bar is a share of that
limit. Predictions are written down here, before anything was run, for an H200 that copies 4.3 TB/s.
On a machine without a GPU the same code runs on toy shapes, and times mean nothing: a rehearsal for the tests.
"""

import functools
import importlib.util
import itertools
import math
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

GPU = not backend.lack() and not backend.INTERPRET
DEVICE = "cuda" if GPU else "cpu"
ROWS = (8192, 32768) if GPU else (32,)
WIDTHS = {768: 64, 1024: 64, 2048: 128, 4096: 128} if GPU else {32: 16}  # d: head_dim
MLP = (2048, 2816, 5504, 11008) if GPU else (64,)
VOCABULARIES = {768: 50304, 1024: 50304, 2048: 50304, 4096: 32128} if GPU else {32: 96}  # d: V
COPY, H200_COPY = {}, 4.3e12  # bytes/s: measured, and assumed by the predictions


def randn(*shape):
    """Random bf16: zeros would run faster in a product."""
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


@functools.cache
def flush_buffer():
    return torch.empty(1 << 28, dtype=torch.int8, device=DEVICE)  # several times the L2 cache


def device_us(way, enough=50e3):
    """Median of as many launches as fill `enough` microseconds, but 10 to 50."""
    if not GPU:
        start = time.perf_counter()
        way()
        return 1e6 * (time.perf_counter() - start)

    def launches(n):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
        for start, end in events:
            flush_buffer().zero_()
            torch.cuda._sleep(2_000_000)  # a millisecond, in which the host queues all of the way's kernels
            start.record()
            way()
            end.record()
        torch.cuda.synchronize()
        return 1e3 * median(start.elapsed_time(end) for start, end in events)

    return launches(min(50, max(10, int(enough / launches(3)))))


def host_us(way, calls=30):
    """Time until `way` has been given to the device, on shapes so small that the device keeps up."""
    way()
    if GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls if GPU else 1):
        way()
    spent = time.perf_counter() - start
    if GPU:
        torch.cuda.synchronize()
    return 1e6 * spent / (calls if GPU else 1)


def extra_megabytes(way):
    """Peak memory of a call beyond what it found allocated."""
    if not GPU:
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def in_turns(ways, clock=device_us, rounds=3):
    """{name: (make, kernels)} -> {name: median of rounds}, {name: [least, most]}, {name: error}.

    make() returns the function to time, of no arguments; kernels is what `backend.using` says meanwhile. What fails is
    left out.
    """
    made, times, failed = {}, {}, {}
    for i in range(rounds + 1):
        for name, (make, kernels) in ways.items():
            backend.use(kernels)
            try:
                if i == 0:
                    made[name] = make()
                    made[name]()  # compiles
                elif name in made:
                    times.setdefault(name, []).append(clock(made[name]))
            except Exception as error:  # a rival that does not run must not cost the other results
                failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                made.pop(name, None)
                times.pop(name, None)
        if i == 0 and GPU:
            torch.cuda.empty_cache()
    backend.use("torch")
    return {n: median(t) for n, t in times.items()}, {n: [min(t), max(t)] for n, t in times.items()}, failed


def time_forward(function, *inputs):
    """A way to call function, for `in_turns`; so are the next two."""
    return lambda: lambda: function(*inputs)


def time_backward(function, *inputs):
    """Only the backward, over the graph of one forward."""

    def make():
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.requires_grad]
        upstream = [torch.randn_like(y) for y in outputs]
        return lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)

    return make


def time_both(function, *inputs):
    """Forward and backward of a function that returns one scalar."""

    def make():
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        return lambda: torch.autograd.grad(function(*leaves), leaves)

    return make


def compiled(function, mode=None):
    return torch.compile(function, dynamic=False, backend="inductor" if GPU else "aot_eager", mode=mode)


def kernel_row(op, what, shape, ways, work, unit, limit_us, predicted_us, bar):
    """One line of the table. work: bytes or FLOP, as unit GB/s or TFLOP/s says; limit_us: what the device allows;
    bar: the share of the limit that is asked of "ours", or None."""
    torch._dynamo.reset()  # a rival compiles for each shape anew, and does not give up after the eighth
    us, spread, failed = in_turns(ways)
    megabytes, _, _ = in_turns(ways, extra_megabytes, 1) if op == "linear_ce" else ({}, None, None)
    rate = work / us["ours"] / {"GB/s": 1e3, "TFLOP/s": 1e6}[unit] if "ours" in us else None
    result = dict(op=op, what=what, shape=shape, limit_us=limit_us, predicted_us=predicted_us, bar=bar, us=us,
                  rate=rate, unit=unit, spread=spread, extra_mb=megabytes, failed=failed)  # fmt: skip
    print_kernel_row(result)
    return result


def moves(n_bytes):
    """work, unit, limit and prediction of an operation that moves n_bytes: at a copy's rate; at 90% of an H200's."""
    return n_bytes, "GB/s", n_bytes / COPY["rate"] * 1e6, n_bytes / (0.9 * H200_COPY) * 1e6


def liger(name, module="liger_kernel.transformers.functional"):
    """A function of Liger's, or None without it or in a version that has no such function."""
    if not GPU or not importlib.util.find_spec("liger_kernel"):
        return None
    return getattr(importlib.import_module(module), name, None)


def all_ways(pass_, ours, plain, eager, rival, *inputs, largest=False):
    """pass_: time_forward, time_backward or time_both. The functions of the inputs: ours, what torch.compile gets, what
    runs eagerly, and Liger's or None. largest: the largest shape of its operation, on which Inductor may search too."""
    ways = {
        "eager": (pass_(eager, *inputs), "torch"),
        "compile": (pass_(compiled(plain), *inputs), "torch"),
        "ours": (pass_(ours, *inputs), "triton"),
    }
    if rival:
        ways["liger"] = pass_(rival, *inputs), "torch"
    if GPU and largest:
        ways["compile, autotuned"] = pass_(compiled(plain, "max-autotune-no-cudagraphs"), *inputs), "torch"
    return ways


def bench_norm():
    def ours(x, residual, weight):
        return add_norm(x, residual, weight)

    def plain(x, residual, weight):
        return norm_reference(x, residual, weight, None, 1e-5, False, 1.0)

    def eager(x, residual, weight):  # the fastest way to write it: the weight rounded, no cast of the stream
        r = residual + x
        return F.layer_norm(r, weight.shape, weight.to(r.dtype)), r

    layer_norm = liger("liger_layer_norm")

    def rival(x, residual, weight):
        r = residual + x
        return layer_norm(r, weight, torch.zeros_like(weight), 1e-5), r

    for M, d in itertools.product(ROWS, WIDTHS):
        inputs = randn(M, d), randn(M, d), torch.ones(d, device=DEVICE)
        for what, pass_ in (("forward", time_forward), ("backward", time_backward)):
            largest = (M, d) == (ROWS[-1], max(WIDTHS))
            ways = all_ways(pass_, ours, plain, eager, layer_norm and rival, *inputs, largest=largest)
            yield kernel_row("norm", what, f"{M} x {d}", ways, *moves(8 * d * M), bar=0.9)


def bench_swiglu():
    packed = liger("LigerFusedGateUpSiLUMulFunction", "liger_kernel.ops.swiglu")
    rival = packed and (lambda gate_up: packed.apply(gate_up, False))
    plain = functools.partial(swiglu_reference, gate_first=True)
    for M, f in itertools.product(ROWS, MLP):
        gate_up, largest = randn(M, 2 * f), (M, f) == (ROWS[-1], MLP[-1])
        for what, pass_, n_bytes in (("forward", time_forward, 6), ("backward", time_backward, 10)):
            ways = all_ways(pass_, swiglu, plain, plain, rival, gate_up, largest=largest)
            yield kernel_row("swiglu", what, f"{M} x {f}", ways, *moves(n_bytes * f * M), bar=0.9)


def bench_rope():
    def plain(qkv):  # as one writes it without in-place operations
        R, turned, c, s = 2 * cos.shape[1], [], cos[:, None], sin[:, None]
        for x in qkv[:, :, :2].unbind(2):
            a, b = x[..., : R // 2].float(), x[..., R // 2 : R].float()
            both_halves = torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)
            turned.append(torch.cat((both_halves, x[..., R:]), -1).transpose(1, 2))
        return *turned, qkv[:, :, 2].transpose(1, 2)

    def ours(qkv):
        return rope_qkv_(qkv, cos, sin)

    for M, (d, D) in itertools.product(ROWS, WIDTHS.items()):
        T = min(2048, M)
        qkv, largest = randn(M // T, T, 3, d // D, D), (M, d) == (ROWS[-1], max(WIDTHS))
        cos, sin = rope_tables(T, D // 4, device=DEVICE)
        # a quarter of q and k, read and written; at D = 64 that is 32 bytes a head, where DRAM gives 64
        touched = 2 * d * M * (2 if D == 64 else 1)
        for what, pass_, work, bar in (
            ("forward", time_forward, moves(touched), None),
            ("backward", time_backward, moves(12 * d * M), 0.9),
        ):
            ways = all_ways(pass_, ours, plain, plain, None, qkv, largest=largest)
            yield kernel_row("rope", what, f"{M} x {d}, D {D}", ways, *work, bar=bar)


def bench_linear_ce():
    def plain(x, weight):
        logits = (x @ weight.T).float()
        lse = torch.logsumexp(logits, 1)
        return (lse - logits.gather(1, target[:, None])[:, 0] + 1e-4 * lse.square()).mean()

    def ours(x, weight, max_logit_bytes=None):
        return linear_ce(x, weight, target, z_coef=1e-4, max_logit_bytes=max_logit_bytes)[0]

    fused = liger("liger_fused_linear_cross_entropy")

    def rival(x, weight):
        return fused(x, weight, target, lse_square_scale=1e-4, accum_dtype=torch.float32)

    def torchs(x, weight):
        return F.linear_cross_entropy(x, weight, target, options=torch.nn.LinearCrossEntropyOptions())

    def products(x, weight, logits):  # what cuBLAS takes for the three products alone
        torch.mm(x, weight.T, out=logits)
        torch.mm(logits, weight)
        torch.mm(logits.T, x)

    for N, (d, V) in itertools.product(ROWS, VOCABULARIES.items()):
        x, weight, target = randn(N, d), randn(V, d) * d**-0.5, torch.randint(V, (N,), device=DEVICE)
        logits = torch.empty(N, V, dtype=x.dtype, device=DEVICE)
        limit = limit_us(products, x, weight, logits)
        shape, work = f"{N} x {d} x {V}", (6 * N * d * V, "TFLOP/s", limit)
        predicted = {(8192, 768): 3800, (8192, 4096): 9300}.get((N, d))  # for an H200
        ways = all_ways(time_both, ours, plain, plain, fused and rival, x, weight)
        ways["chunked torch"] = time_both(ours, x, weight), "torch"
        if GPU and hasattr(F, "linear_cross_entropy"):
            ways["torch.nn's, no z-loss"] = time_both(torchs, x, weight), "torch"
        yield kernel_row("linear_ce", "both", shape, ways, *work, predicted, bar=1 / 1.1)
        ways = {"ours": (time_forward(entropy, logits, target), "triton")}
        yield kernel_row("linear_ce", "softmax part", shape, ways, *moves(4 * V * N), bar=0.85)
        if (N, d) == (ROWS[-1], min(WIDTHS)):  # as train.py calls it: the weight is cast, its gradient fp32
            for chunks in (1, 4):
                chunked = functools.partial(ours, max_logit_bytes=-(-N // chunks) * V * x.itemsize)
                ways = {"ours": (time_both(chunked, x, weight.float()), "triton")}
                yield kernel_row("linear_ce", f"fp32, {chunks} chunks", shape, ways, *work, None, bar=None)


def entropy(logits, target):
    """The kernel between the products: logits (N, V) to their gradients, in place."""
    divisor, losses = torch.ones((), device=DEVICE), torch.empty(2, len(logits), device=DEVICE)
    V = logits.shape[1]
    BLOCK, warps, stages = backend.tile("linear_ce", V, logits.dtype, linear_ce_formula(V))
    cross_entropy_kernel[(len(logits),)](
        logits, target, divisor, *losses, 1.0, 1e-4, -1, V, V, BLOCK, stages, True, num_warps=warps
    )  # fmt: skip


def bench_attention():
    """Causal attention as torch chooses and by its two fast backends, and two other masks; 2,048 positions."""

    def by(kind, q, k, v):
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    rates = {("forward", 64): 380e12, ("backward", 64): 270e12, ("forward", 128): 540e12, ("backward", 128): 315e12}
    n = 8192 if GPU else 32
    product = limit_us(torch.mm, randn(n, n), randn(n, n))
    T = 2048 if GPU else 32
    for B, H, D in ((16, 12, 64), (16, 16, 64), (16, 16, 128), (4, 32, 128)) if GPU else ((1, 2, 16),):
        q, k, v = (randn(B, T, H, D).transpose(1, 2) for _ in range(3))
        t = torch.arange(T, device=DEVICE).expand(B, T)
        prefix_mask, document_mask = (
            batch_mask(T, *which, dtype=torch.bfloat16) for which in ((t < T // 4, None), (None, t // (T // 4)))
        )
        for what, pass_, products in (("forward", time_forward, 2), ("backward", time_backward, 5)):
            flops = products * B * H * T * T * D  # half of the square, 2 FLOP a multiply-add
            ways = {"ours": (pass_(attention, q, k, v), "torch")}
            for name, mask in (("prefix mask", prefix_mask), ("document mask", document_mask)):
                ways[name] = pass_(functools.partial(attention, mask=mask), q, k, v), "torch"
            for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION") if GPU else ():
                one = functools.partial(by, getattr(SDPBackend, name))
                ways[name.split("_")[0].lower()] = pass_(one, q, k, v), "torch"
            limit, predicted = flops / (2 * n**3) * product, flops / rates.get((what, D), 1e12) * 1e6
            yield kernel_row(
                "attention", what, f"{B}x{H} heads x {T}, D {D}", ways, flops, "TFLOP/s", limit, predicted, None
            )


def bench_host():
    """Host time of a call, forward and backward, where the device has next to nothing to do: 64 rows."""
    d, V = (768, 512) if GPU else (32, 96)
    x, gate_up, target = randn(64, d), randn(64, 2 * d), torch.zeros(64, dtype=torch.long, device=DEVICE)
    weight, head = torch.ones(d, device=DEVICE), randn(V, d)
    cos, sin = rope_tables(64, 4, device=DEVICE)
    ways = {
        "norm": time_both(lambda x, w: add_norm(x, x, w)[0].sum(), x, weight),
        "swiglu": time_both(lambda x: swiglu(x).sum(), gate_up),
        "rope": time_both(lambda x: rope_qkv_(x.view(1, 64, 3, -1, 16) * 1, cos, sin)[0].sum(), randn(64, 3 * d)),
        "linear_ce": time_both(lambda x, w: linear_ce(x, w, target)[0], x, head),
    }
    for op, make in ways.items():
        us, spread, failed = in_turns({"eager": (make, "torch"), "ours": (make, "triton")}, host_us)
        result = dict(op=op, what="host time", shape="64 rows", limit_us=None, predicted_us=None, bar=None, us=us,
                      rate=None, unit="", spread=spread, extra_mb={}, failed=failed)  # fmt: skip
        print_kernel_row(result)
        yield result


HEADER = f"""\
| {"operation":<24} | {"shape":<22} | limit | predicted | eager | compile | Liger | ours | rate | of limit | bar |
|{"-" * 26}|{"-" * 24}|---:|---:|---:|---:|---:|---:|---:|---:|---|"""


def print_kernel_row(r):
    """A line of the README's table, in microseconds."""

    def number(us):
        return "" if us is None else f"{us:,.0f}"

    ours, limit = r["us"].get("ours"), r["limit_us"]
    share = f"{limit / ours:.2f}" if ours and limit else ""
    met = "" if not (r["bar"] and share) else f"{r['bar']:.2f} " + ("met" if limit / ours >= r["bar"] else "MISSED")
    rate = f"{r['rate']:,.0f} {r['unit']}" if r["rate"] else ""
    known = ("eager", "compile", "liger", "ours")
    cells = " | ".join([number(limit), number(r["predicted_us"]), *(number(r["us"].get(way)) for way in known)])
    notes = [f"{name} {us:,.0f}" for name, us in r["us"].items() if name not in known]
    notes += [f"{name} +{mb:,.0f} MB" for name, mb in r["extra_mb"].items()]
    notes += [f"{name} failed: {error}" for name, error in r["failed"].items()]
    comment = f"  <!-- {'; '.join(notes)} -->" if notes else ""
    print(
        f"| {r['op'] + ', ' + r['what']:<24} | {r['shape']:<22} | {cells} | {rate} | {share} | {met} |{comment}",
        flush=True,
    )


def bench_kernels():
    """All rows, one by one, so that what is measured is kept when the time is over."""
    source = randn(1 << 29 if GPU else 1 << 10)
    copied = limit_us(torch.empty_like(source).copy_, source)
    COPY["rate"] = 2 * source.nbytes / copied * 1e6
    del source
    print(f"a copy moves {COPY['rate'] / 1e12:.3g} TB/s; all times in microseconds\n{HEADER}")
    rows = []
    with torch._functorch.config.patch(donated_buffer=False):  # a compiled backward is to run more than once
        for section in (bench_linear_ce, bench_rope, bench_norm, bench_swiglu, bench_attention, bench_host):
            for result in section():
                rows.append(result)
                yield result
    flush_buffer.cache_clear()
    print(f"\nThe faster by these times, for backend.py:\nAUTO = {choices(rows)}")


def limit_us(function, *inputs):
    """Time of what sets the limit: a copy, or products."""
    us, _, failed = in_turns({"limit": (time_forward(function, *inputs), "torch")})
    if failed:
        raise RuntimeError(f"the limit could not be measured: {failed['limit']}")
    return us["limit"]


def choices(rows):
    """The table `AUTO` of backend.py that these rows ask for: ours unless it is more than 2% slower than a rival."""
    table = {}
    for op in backend.AUTO:
        of_op = [r["us"] for r in rows if r["op"] == op and r["what"] != "host time" and "ours" in r["us"]]
        table[op] = tuple(
            "torch" if not of_op or mean_ratio(of_op, rival) > 1 / 0.98 else "triton" for rival in ("eager", "compile")
        )
    return table


def mean_ratio(times, rival):
    """Geometric mean of ours over a rival's; 0 if it never ran."""
    logs = [math.log(us["ours"] / us[rival]) for us in times if rival in us]
    return math.exp(sum(logs) / len(logs)) if logs else 0.0


# --------------------------------------------------------------------------------------------------------------- tune


def tune():
    """Launch parameters that beat the formulas: printed as lines of `TILES` in backend.py, and used in this process.

    Yields {"key", "tile", "us", "formula_us", "failed"}.
    """
    M, warps = (16384, (2, 4, 8, 16)) if GPU else (8, (4,))
    for d in (1024, 2048, 4096) if GPU else (32,):
        x, residual, weight = randn(M, d), randn(M, d), torch.ones(d, device=DEVICE)
        tiles = [(rows, w, stages) for rows in (1, 2, 4, 8) for w in warps for stages in (1, 2, 3) if rows * d <= 8192]
        yield fastest("norm", d, [tile for tile in tiles if tile[2] == 1], time_forward(add_norm, x, residual, weight))
        yield fastest("norm_backward", d, tiles, time_backward(lambda x, r, w: add_norm(x, r, w), x, residual, weight))
    for D in (64, 128) if GPU else (16,):
        T = min(M, 2048)
        qkv, tables = randn(M // T, T, 3, 1024 // D, D), rope_tables(T, D // 4, device=DEVICE)
        tiles = [(heads, w, 1) for heads in (16, 32, 64, 128, 256) for w in warps]
        yield fastest("rope", D // 8, tiles, time_forward(rope_qkv_, qkv, *tables))
        yield fastest("rope_pack", D, tiles, time_backward(lambda qkv, tables=tables: rope_qkv_(qkv, *tables), qkv))
    for f in MLP:
        tiles = [(columns, w, 1) for columns in (512, 1024, 2048, 4096) for w in warps]
        yield fastest("swiglu", f, tiles, time_forward(swiglu, randn(M, 2 * f)))
        yield fastest("swiglu_backward", f, tiles, time_backward(swiglu, randn(M, 2 * f)))
    for V in (32128, 50304) if GPU else (96,):
        tiles = [(columns, w, stages) for columns in (2048, 4096, 8192, 16384) for w in (4, 8, 16, 32)
                 for stages in (1, 2, 3) if 8 <= columns // (32 * w) <= 32]  # fmt: skip
        u, target = randn(M // 2, V), torch.zeros(M // 2, dtype=torch.long, device=DEVICE)
        yield fastest("linear_ce", V, tiles, time_forward(entropy, u, target))


def fastest(op, width, tiles, make):
    key = op, backend.next_power_of_2(width), 2
    backend.use("triton")
    function = make()

    def launch(tile):
        def run():
            backend.TILES.pop(key, None)
            if tile:
                backend.TILES[key] = tile
            return function()

        return lambda: run

    kept, tiles = backend.TILES.get(key), tiles if GPU else tiles[:2]
    us, _, failed = in_turns({tile: (launch(tile), "triton") for tile in (None, *tiles)})
    backend.TILES.pop(key, None)
    if kept:
        backend.TILES[key] = kept
    best, by_formula = min(us, key=us.get, default=None), us.get(None, math.inf)
    if best and us[best] < 0.98 * by_formula:
        backend.TILES[key] = best  # for what is measured after it in this process
        print(f"    {key}: {best},  # {us[best]:,.0f} us instead of {by_formula:,.0f}", flush=True)
    else:
        print(f"    # {key}: nothing beats the formula, {by_formula:,.0f} us; {len(failed)} of {len(tiles)} failed")
    return dict(key=key, tile=best, us=us.get(best), formula_us=us.get(None), failed=sorted(map(str, failed)))
