"""Steps of train.py: how many tokens a second, beside what arithmetic says that they should be."""

import contextlib
import gc
import itertools
import math
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from torch.distributed.tensor import DTensor

import tokenizer
import train
from kernels import backend
from measure.table import row
from mix import Source
from model import GPT, PRESETS

SHAPE = {"block_size": 2048, "batch": 65_536, "vocab_size": 50_304}
GOALS = {"124M": 0.45, "350M": 0.48, "1.3B": 0.55}  # MFU on an H100 or H200
H100 = 3.0e12, 790e12  # bytes/s that a copy moves and bf16 FLOP/s of an 8,192 product, for which the goals are meant
RANDOM = {"mix": {"random": 1.0}, "budget": 10**12}


def on_paper(c, tokens, micro_steps, copy, product):
    """{part: seconds} of a step of so many tokens on a GPU that moves `copy` bytes/s and multiplies `product` FLOP/s.

    c: GPTConfig. Assumed, not measured: a product of width 768 reaches 72% of the large one's rate, of 2,048 88%;
    attention with heads of 128 reaches 68% forward and 40% backward, of 64 48 and 34%; the rest moves its bytes at 90%
    of a copy's rate. A host that is slower than the device is not in it.
    """
    d, f, T, V, L = c.n_embd, c.n_inner, c.block_size, c.vocab_size, c.n_layer
    weights = L * (4 * d * d + 3 * d * f)  # of matrices
    reached = min(0.9, 0.72 + 0.113 * math.log2(d / 768))
    forward, backward = (0.68, 0.40) if c.head_dim >= 128 else (0.48, 0.34)
    moved = {
        "norms, rotation, SwiGLU": tokens * L * (48 * d + 16 * f),
        "cross-entropy": tokens * 4 * V,
        # in one micro-step rounded to bf16, and gradients rounded and cast; in several as model.accumulating does it
        "weights": weights * (14 if micro_steps == 1 else 10 + 8 * micro_steps),
        "embedding": V * d * 32 * micro_steps + tokens * 24 * d,
        "AdamW, norm, clip": (weights + V * d) * 40,
    }
    return {
        "products of the blocks": 6 * weights * tokens / (product * reached),
        "products of the head": 6 * V * d * tokens / (product * reached),
        "attention": tokens * L * T * d * (2 / forward + 5 / backward) / product,  # half of the square, 7 products
        **{part: n_bytes / (0.9 * copy) for part, n_bytes in moved.items()},
    }


def bench_train(copy=None, product=None, steps=50, shape=SHAPE):
    """Whole steps on random tokens: every size as train.py runs by default, then 124M without kernels, and eager.

    "of limit" is MFU, by train.py's formula and peak. The goals are scaled to the rates that were measured in the same
    run, if copy and product say them.
    """
    ways = [(size, "compiled", "auto") for size in GOALS]
    ways += [("124M", "compiled", "torch"), ("124M", "eager", "auto")]
    for size, mode, kernels in ways:
        what = f"{size}, {mode}, kernels {kernels}"
        try:
            yield measure_steps(what, size, mode, kernels, (copy, product) if product else H100, steps, shape)
        except Exception as error:  # also a compiler's; the other rows must not be lost
            why, fits = f"{type(error).__name__}: {error}", not isinstance(error, torch.OutOfMemoryError)
            yield row(f"{what}: failed", None, "tokens/s", note=" ".join(why.split()), must=False if fits else None)


def measure_steps(what, size, mode, kernels, rates, steps, shape):
    """A row: median tokens/s of train.train_step, feeder and optimizer included; MFU; peak memory."""
    cfg = train.Config(size=size, compile="yes" if mode == "compiled" else "no", **RANDOM, **PRESETS[size] | shape)
    device, dtype, compiled = train.find_device(cfg)
    backend.choose(kernels, device, compiled)
    torch._dynamo.reset()
    gc.collect()  # a compiled model is part of a cycle, and would count as this one's memory
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with training(cfg) as run:
        run.take(3)  # compiles
        once = median(run.take(2))
        run.take(min(15, int(3 / once)))
        times = run.take(max(5, min(steps, int(10 / once))))  # a slow model gets fewer steps, not more time
    _, peak = train.describe(device, dtype, compiled)
    rate, flops, micro_steps = cfg.batch / median(times), run.model.flops_per_token(), run.phase.micro_steps
    shape = run.model.config, cfg.batch, micro_steps
    predicted, meant = (sum(on_paper(*shape, *given).values()) for given in (rates, H100))
    goal = GOALS[size] * peak / flops * meant / predicted if kernels == "auto" and compiled else None
    gigabytes = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    return row(
        f"{what}, {micro_steps} x {cfg.batch // micro_steps:,} tokens, {gigabytes:.1f} GiB", rate, "tokens/s",
        of_limit=rate * flops / peak, target=goal and (round(goal), None), must=bool(rate > 0),
        note=f"{cfg.batch / predicted:,.0f} on paper",
    )  # fmt: skip


@contextlib.contextmanager
def training(cfg):
    """A model in training on random tokens: an object with model, optimizer, phase, sums of train.train_step, and
    take(n) -> seconds of each of n steps; `host` is then how long it took the host to hand these out, in seconds."""
    device, dtype, _ = train.find_device(cfg)
    with tempfile.TemporaryDirectory() as folder:
        path, rng, encoding = Path(folder) / "random", np.random.default_rng(0), tokenizer.load()
        path.mkdir()
        tokens = rng.integers(0, cfg.vocab_size, 10**7, dtype=np.uint16)
        if vocabulary := train.the_vocabulary([("bench", cfg)], encoding):  # documents of 900 words on average
            tokens %= tokenizer.RANKS
            tokens[rng.random(len(tokens)) < 1 / 900] = vocabulary.eot
        tokens.tofile(path / "train.bin")
        sources = {"random": Source(path, "train", cfg.block_size)}
        (phase,) = train.build_phases([("bench", cfg)], sources, {}, 0, vocabulary)
        with torch.device("meta"):
            model = GPT(train.model_config(cfg, cfg.vocab_size), dtype)
        train.parallelize(model, cfg)
        model.to_empty(device=device)
        model.init_tables()
        torch.manual_seed(0)
        for p in model.parameters():
            torch.nn.init.normal_(p.to_local() if isinstance(p, DTensor) else p, std=0.02)
        optimizer = train.make_optimizer(model, cfg, device)
        feeder, sums = train.Feeder(phase, 0, device, dtype), torch.zeros(2, 1, dtype=torch.float64, device=device)
        skips = torch.zeros(2, dtype=torch.long, device=device)
        run, number = SimpleNamespace(model=model, optimizer=optimizer, phase=phase, sums=sums), itertools.count(1)

        def take(steps):
            start, marks = time.perf_counter(), [now(device == "cuda")]
            for _ in range(steps):
                train.train_step(model, optimizer, feeder, phase, next(number), sums, skips)
                marks.append(now(device == "cuda"))
            run.host = time.perf_counter() - start
            return seconds_between(marks, device == "cuda")

        run.take = take
        try:
            yield run
        finally:
            feeder.thread.shutdown()


def now(cuda):
    """A moment on the device, or on the clock."""
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(marks, cuda):
    if cuda:
        torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 if cuda else b - a for a, b in itertools.pairwise(marks)]
