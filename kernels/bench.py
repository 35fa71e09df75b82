"""How long the five operations take on a GPU: ours, eager PyTorch, torch.compile, Liger if it is installed.

`python bench.py --only kernels` and `--only tune` run this. Device times are medians of launches with the L2 cache
flushed before each and the launch already queued, and of rounds in which the ways take turns. The limit of an operation
is what it must move or multiply, at the rate of a copy or of cuBLAS measured in the same run; a bar is a share of that
limit. Predictions are written down here, before anything was run, for an H200 that copies 4.3 TB/s.
On a machine without a GPU the same code runs on toy shapes, and times mean nothing: a rehearsal for the tests.
"""

import functools
import importlib.util
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

GPU = torch.cuda.is_available() and not backend.INTERPRET
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
    """Median of launches: 10 to 50 of them, or as many as fill `enough` microseconds."""
    if not GPU:
        start = time.perf_counter()
        way()
        return 1e6 * (time.perf_counter() - start)

    def launches(n):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
        for start, end in events:
            flush_buffer().zero_()
            torch.cuda._sleep(1_000_000)  # half a millisecond, in which the host queues all of the way's kernels
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

    make() returns the function to time; kernels is what `backend.using` says meanwhile. What fails is left out.
    """
    made, times, failed = {}, {}, {}
    for i in range(rounds + 1):
        for name, (make, kernels) in ways.items():
            backend.using.update(dict.fromkeys(backend.using, kernels))
            try:
                if i == 0:
                    made[name] = make()
                    made[name]()  # compiles
                elif name in made:
                    times.setdefault(name, []).append(clock(made[name]))
            except Exception as error:  # a rival that does not run must not cost the other results
                failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
                made.pop(name, None)
        if i == 0 and GPU:
            torch.cuda.empty_cache()
    backend.using.update(dict.fromkeys(backend.using, "torch"))
    return {n: median(t) for n, t in times.items()}, {n: [min(t), max(t)] for n, t in times.items()}, failed


def compiled(function, mode=None):
    """As a rival would be: static shapes, nothing left from the shape before."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, backend="inductor" if GPU else "aot_eager", mode=mode)


def forward(function, *inputs):
    return lambda: lambda: function(*inputs)


def backward(function, *inputs):
    """Only the backward, over the graph of one forward."""

    def make():
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.requires_grad]
        upstream = [torch.randn_like(y) for y in outputs]
        return lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)

    return make


def row(op, what, shape, ways, work, unit, limit_us, predicted_us, bar, memory=False):
    """One line of the table. work: bytes or FLOP, as unit GB/s or TFLOP/s says; limit_us: what the device allows;
    bar: the share of the limit that is asked of "ours", or None."""
    us, spread, failed = in_turns(ways)
    rate = work / us["ours"] / {"GB/s": 1e3, "TFLOP/s": 1e6}[unit] if "ours" in us else None
    result = dict(op=op, what=what, shape=shape, limit_us=limit_us, predicted_us=predicted_us, bar=bar, us=us,
                  rate=rate, unit=unit, spread=spread, failed=failed)  # fmt: skip
    if memory:
        result["extra_mb"] = {
            name: in_turns({name: way}, extra_megabytes, 1)[0].get(name) for name, way in ways.items()
        }
    print_row(result)
    return result


def moves(n_bytes):
    """work, unit, limit and prediction of an operation that moves n_bytes: at a copy's rate; at 90% of an H200's."""
    return n_bytes, "GB/s", n_bytes / COPY["rate"] * 1e6, n_bytes / (0.9 * H200_COPY) * 1e6


def liger(name, module="liger_kernel.transformers.functional"):
    """A function of Liger's, or None without it or in a version that has no such function."""
    if not GPU or not importlib.util.find_spec("liger_kernel"):
        return None
    return getattr(importlib.import_module(module), name, None)


def all_ways(pass_, ours, plain, rival, *inputs, largest=False):
    """pass_ is `forward` or `backward`; plain and rival are functions of the same inputs, rival may be None.

    largest: the largest shape of its operation, on which Inductor is also given time to search.
    """
    ways = {
        "eager": (pass_(plain, *inputs), "torch"),
        "compile": (lambda: pass_(compiled(plain), *inputs)(), "torch"),
        "ours": (pass_(ours, *inputs), "triton"),
    }
    if rival:
        ways["liger"] = pass_(rival, *inputs), "torch"
    if GPU and largest:
        searched = functools.partial(compiled, mode="max-autotune-no-cudagraphs")
        ways["compile, autotuned"] = (lambda: pass_(searched(plain), *inputs)(), "torch")
    return ways


def bench_norm():
    for M in ROWS:
        for d in WIDTHS:
            x, residual, weight = randn(M, d), randn(M, d), torch.ones(d, device=DEVICE)
            layer_norm, zeros = liger("liger_layer_norm"), torch.zeros(d, device=DEVICE)
            rival = layer_norm and (lambda x, r, w, f=layer_norm, b=zeros: (f(s := r + x, w, b, 1e-5), s))
            three = lambda x, r, w: add_norm(x, r, w)
            plain = functools.partial(norm_reference, bias=None, eps=1e-5, rms=False, alpha=1.0)
            for what, pass_ in (("forward", forward), ("backward", backward)):
                largest = (M, d) == (ROWS[-1], max(WIDTHS))
                ways = all_ways(pass_, three, plain, rival, x, residual, weight, largest=largest)
                ways["eager"] = pass_(rounded_norm, x, residual, weight), "torch"
                yield row("norm", what, f"{M} x {d}", ways, *moves(8 * d * M), bar=0.9)


def rounded_norm(x, residual, weight):
    """The fastest way to write it in eager PyTorch: with the weight in bf16."""
    r = residual + x
    return F.layer_norm(r, weight.shape, weight.to(r.dtype)), r


def bench_swiglu():
    for M in ROWS:
        for f in MLP:
            gate_up, rival = randn(M, 2 * f), liger("LigerFusedGateUpSiLUMulFunction", "liger_kernel.ops.swiglu")
            packed = rival and (lambda x, g=rival: g.apply(x, False))
            plain = functools.partial(swiglu_reference, gate_first=True)
            for what, pass_, n_bytes in (("forward", forward, 6), ("backward", backward, 10)):
                ways = all_ways(pass_, swiglu, plain, packed, gate_up, largest=(M, f) == (ROWS[-1], MLP[-1]))
                yield row("swiglu", what, f"{M} x {f}", ways, *moves(n_bytes * f * M), bar=0.9)


def bench_rope():
    for M in ROWS:
        for d, D in WIDTHS.items():
            T, H = min(2048, M), d // D
            qkv = randn(M // T, T, 3, H, D)
            cos, sin = rope_tables(T, D // 4, device=DEVICE)

            def plain(qkv, cos=cos, sin=sin):  # as one writes it without in-place operations
                R, turned = 2 * cos.shape[1], []
                for x in qkv[:, :, :2].unbind(2):
                    a, b = x[..., : R // 2].float(), x[..., R // 2 : R].float()
                    c, s = cos[:, None], sin[:, None]
                    both = torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)
                    turned.append(torch.cat((both, x[..., R:]), -1).transpose(1, 2))
                return *turned, qkv[:, :, 2].transpose(1, 2)

            def ours(qkv, cos=cos, sin=sin):
                return rope_qkv_(qkv, cos, sin)

            # a quarter of q and k, read and written; at D = 64 that is 32 bytes a head, where DRAM gives 64
            largest = (M, d) == (ROWS[-1], max(WIDTHS))
            ways = all_ways(forward, ours, plain, None, qkv, largest=largest)
            yield row("rope", "forward", f"{M} x {d}, D {D}", ways, *moves(2 * d * M * (2 if D == 64 else 1)), bar=None)
            ways = all_ways(backward, ours, plain, None, qkv, largest=largest)
            yield row("rope", "backward", f"{M} x {d}, D {D}", ways, *moves(12 * d * M), bar=0.9)


def bench_linear_ce():
    for N in ROWS:
        for d, V in VOCABULARIES.items():
            x, weight, target = randn(N, d), randn(V, d) * d**-0.5, torch.randint(V, (N,), device=DEVICE)

            def plain(x, weight, target=target):
                logits = (x @ weight.T).float()
                lse = torch.logsumexp(logits, 1)
                return (lse - logits.gather(1, target[:, None])[:, 0] + 1e-4 * lse.square()).mean()

            def both(function, x=x, weight=weight):
                def make():
                    leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
                    return lambda: torch.autograd.grad(function(*leaves), leaves)

                return make

            def ours(x, weight, target=target):
                return linear_ce(x, weight, target, z_coef=1e-4)[0]

            u = torch.empty(N, V, dtype=x.dtype, device=DEVICE)

            def products(x=x, weight=weight, u=u):  # what cuBLAS takes for the three products alone
                torch.mm(x, weight.T, out=u)
                torch.mm(u, weight)
                torch.mm(u.T, x)

            rival = liger("liger_fused_linear_cross_entropy")
            limit = in_turns({"": (forward(products), "torch")})[0][""]
            shape, ways = f"{N} x {d} x {V}", {
                "eager": (both(plain), "torch"),
                "compile": (lambda plain=plain, both=both: both(compiled(plain))(), "torch"),
                "chunked torch": (both(ours), "torch"),
                "ours": (both(ours), "triton"),
            }  # fmt: skip
            if rival:
                ways["liger"] = (
                    both(lambda x, w, t=target, f=rival: f(x, w, t, lse_square_scale=1e-4, accum_dtype=torch.float32)),
                    "torch",
                )
            if GPU and hasattr(F, "linear_cross_entropy"):
                chunked = functools.partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())
                ways["torch.nn's"] = both(lambda x, w, t=target, f=chunked: f(x, w, t)), "torch"
            predicted = {(8192, 768): 3800, (8192, 4096): 9300}.get((N, d))  # kernel bars for an H200
            yield row(
                "linear_ce", "both", shape, ways, 6 * N * d * V, "TFLOP/s", limit, predicted, 1 / 1.1, memory=True
            )
            ways = {"ours": (forward(entropy, u, target), "triton")}
            if (N, d) == (ROWS[-1], min(WIDTHS)):  # as train.py calls it: the weight cast, its gradient in fp32
                for chunks in (1, 4):

                    def trained(x, weight, target=target, budget=-(-N // chunks) * V * x.itemsize):
                        return linear_ce(x, weight, target, z_coef=1e-4, max_logit_bytes=budget)[0]

                    ways = {"ours": (both(trained, weight=weight.float()), "triton")}
                    what = f"fp32 weight, {chunks} chunk{'s' * (chunks > 1)}"
                    yield row("linear_ce", what, shape, ways, 6 * N * d * V, "TFLOP/s", limit, None, None, memory=True)
            yield row("linear_ce", "softmax part", shape, ways, *moves(4 * V * N), bar=0.85)
            del u, products, ways


def entropy(u, target):
    """The kernel between the products: logits u (N, V) to their gradients, in place."""
    divisor, losses = torch.ones((), device=DEVICE), torch.empty(2, len(u), device=DEVICE)
    V = u.shape[1]
    BLOCK, warps, stages = backend.tile("linear_ce", V, u.dtype, linear_ce_formula(V))
    cross_entropy_kernel[(len(u),)](
        u, target, divisor, *losses, 1.0, 1e-4, -1, V, V, BLOCK, stages, True, num_warps=warps
    )  # fmt: skip


def sdpa_by(kind):
    def function(q, k, v):
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return function


def bench_attention():
    """Causal attention by each backend of PyTorch, as torch chooses, and a prefix mask; 2048 positions."""
    predicted = {("forward", 64): 380e12, ("backward", 64): 270e12, ("forward", 128): 540e12, ("backward", 128): 315e12}
    shapes = ((16, 12, 64), (16, 16, 64), (16, 16, 128), (4, 32, 128)) if GPU else ((1, 2, 16),)
    T = 2048 if GPU else 32
    peak = in_turns({"": (forward(torch.mm, randn(8192, 8192), randn(8192, 8192)), "torch")})[0][""] if GPU else 1.0
    for B, H, D in shapes:
        q, k, v = (randn(B, T, H, D).transpose(1, 2) for _ in range(3))
        prefix = torch.full((B,), T // 4, device=DEVICE)
        mask = batch_mask(T, "prefix", prefix)

        for what, pass_, products in (("forward", forward, 2), ("backward", backward, 5)):
            flops = products * B * H * T * T * D  # half of the square, 2 FLOP a multiply-add
            ways = {"ours": (pass_(attention, q, k, v), "triton")}
            if GPU:
                for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
                    ways[name.split("_")[0].lower()] = (pass_(sdpa_by(getattr(SDPBackend, name)), q, k, v), "torch")
            masked = functools.partial(attention, mode="prefix", mask=mask)
            ways["prefix mask"] = (pass_(masked, q, k, v), "torch")
            limit = flops / (2 * 8192**3 / peak) if GPU else None
            shape = f"{B} x {H} heads x {T}, D {D}"
            time = flops / predicted.get((what, D), 1e12) * 1e6
            yield row("attention", what, shape, ways, flops, "TFLOP/s", limit, time, bar=None)


def bench_host():
    """Host time of a call, forward and backward, where the device has next to nothing to do: 64 rows."""
    d, V = (768, 512) if GPU else (32, 96)
    x, gate_up, target = randn(64, d), randn(64, 2 * d), torch.zeros(64, dtype=torch.long, device=DEVICE)
    weight, head = torch.ones(d, device=DEVICE), randn(V, d)
    cos, sin = rope_tables(64, 4, device=DEVICE)

    def both(function, *inputs):
        def make():
            leaves = [t.detach().clone().requires_grad_() for t in inputs]
            return lambda: torch.autograd.grad(function(*leaves).sum(), leaves)

        return make

    functions = {
        "norm": both(lambda x, w: add_norm(x, x, w)[0], x, weight),
        "swiglu": both(swiglu, gate_up),
        "rope": both(lambda x: rope_qkv_(x.view(1, 64, 3, -1, 16) * 1, cos, sin)[0], randn(64, 3 * d)),
        "linear_ce": both(lambda x, w: linear_ce(x, w, target)[0], x, head),
    }
    for op, make in functions.items():
        us, _, failed = in_turns({"eager": (make, "torch"), "ours": (make, "triton")}, host_us)
        result = dict(op=op, what="host time", shape="64 rows", limit_us=None, predicted_us=None, bar=None, us=us,
                      rate=None, unit="", spread={}, failed=failed)  # fmt: skip
        print_row(result)
        yield result


HEADER = f"""\
| {"operation":<24} | {"shape":<22} | limit | predicted | eager | compile | Liger | ours | rate | of limit | bar |
|{"-" * 26}|{"-" * 24}|---:|---:|---:|---:|---:|---:|---:|---:|---|"""


def print_row(r):
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
    notes += [f"{name} +{mb:,.0f} MB" for name, mb in r.get("extra_mb", {}).items() if mb is not None]
    comment = f"  <!-- {'; '.join(notes)} -->" if notes else ""
    print(
        f"| {r['op'] + ', ' + r['what']:<24} | {r['shape']:<22} | {cells} | {rate} | {share} | {met} |{comment}",
        flush=True,
    )
    for name, error in r["failed"].items():
        print(f"<!-- {name} failed: {error} -->")


def bench_kernels():
    """All rows, one by one, so that what is measured is kept when the time is over."""
    torch._functorch.config.donated_buffer = False  # a compiled backward is to run more than once
    source = randn(1 << 29 if GPU else 1 << 10)
    target = torch.empty_like(source)
    copied = in_turns({"": (forward(target.copy_, source), "torch")})[0][""]
    COPY["rate"] = 2 * source.nbytes / copied * 1e6
    del source, target
    print(f"a copy moves {COPY['rate'] / 1e12:.3g} TB/s; all times in microseconds\n{HEADER}")
    rows = []
    for section in (bench_linear_ce, bench_rope, bench_norm, bench_swiglu, bench_attention, bench_host):
        for result in section():
            rows.append(result)
            yield result
    print(f"\nThe faster by these times (norm, rope and SwiGLU: forward + backward):\nAUTO = {choices(rows)}")


def choices(rows):
    """The table `AUTO` of backend.py that these rows ask for: ours where it takes 1/0.98 of a rival's time or less."""
    table = {}
    for op in backend.AUTO:
        best = []
        for rival in ("eager", "compile"):
            ratios = [math.log(r["us"]["ours"] / r["us"][rival]) for r in rows
                      if r["op"] == op and r["what"] != "host time" and {"ours", rival} <= set(r["us"])]  # fmt: skip
            best.append("triton" if ratios and math.exp(sum(ratios) / len(ratios)) <= 1 / 0.98 else "torch")
        table[op] = tuple(best)
    return table


# --------------------------------------------------------------------------------------------------------------- tune


def tune():
    """Launch parameters beside the formulas, for `TILES` in backend.py; yields {"key", "tile", "us", "formula_us"}."""
    M, warps = (16384, (2, 4, 8, 16)) if GPU else (32, (4,))
    for d in (1024, 2048, 4096) if GPU else (32,):
        x, residual, weight = randn(M, d), randn(M, d), torch.ones(d, device=DEVICE)
        tiles = [(rows, w, stages) for rows in (1, 2, 4, 8) for w in warps for stages in (1, 2, 3) if rows * d <= 8192]
        yield fastest("norm", d, [tile for tile in tiles if tile[2] == 1], forward(add_norm, x, residual, weight))
        yield fastest("norm_backward", d, tiles, backward(lambda x, r, w: add_norm(x, r, w), x, residual, weight))
    for D in (64, 128) if GPU else (16,):
        T = min(M, 2048)
        qkv, tables = randn(M // T, T, 3, 1024 // D, D), rope_tables(T, D // 4, device=DEVICE)
        tiles = [(heads, w, 1) for heads in (16, 32, 64, 128, 256) for w in warps]
        yield fastest("rope", D // 8, tiles, forward(rope_qkv_, qkv, *tables))
        yield fastest("rope_pack", D, tiles, backward(lambda qkv, tables=tables: rope_qkv_(qkv, *tables), qkv))
    for f in MLP:
        tiles = [(columns, w, 1) for columns in (512, 1024, 2048, 4096) for w in warps]
        yield fastest("swiglu", f, tiles, forward(swiglu, randn(M, 2 * f)))
        yield fastest("swiglu_backward", f, tiles, backward(swiglu, randn(M, 2 * f)))
    for V in (32128, 50304) if GPU else (96,):
        tiles = [(columns, w, stages) for columns in (2048, 4096, 8192, 16384) for w in (4, 8, 16, 32)
                 for stages in (1, 2, 3) if 8 <= columns // (32 * w) <= 32]  # fmt: skip
        u, target = randn(M // 2, V), torch.zeros(M // 2, dtype=torch.long, device=DEVICE)
        yield fastest("linear_ce", V, tiles, forward(entropy, u, target))


def fastest(op, width, tiles, make):
    key = op, backend.next_power_of_2(width), 2
    backend.using.update(dict.fromkeys(backend.using, "triton"))
    function = make()

    def launch(tile):
        def run():
            backend.TILES.pop(key, None)
            if tile:
                backend.TILES[key] = tile
            return function()

        return lambda: run

    kept = backend.TILES.get(key)
    us, _, failed = in_turns({tile: (launch(tile), "triton") for tile in (None, *tiles)})
    backend.TILES.pop(key, None)
    if kept:
        backend.TILES[key] = kept
    best = min((tile for tile in us if tile), key=us.get)
    print(f"    {key}: {best},  # {us[best]:,.0f} us; the formula {us[None]:,.0f}; {len(failed)} failed", flush=True)
    return dict(key=key, tile=best, us=us[best], formula_us=us[None])
