"""What the parts of nanoCrystal reach on this machine, beside what the machine allows and what was aimed at.

    python bench.py                         # every section that this machine can
    python bench.py --only mix model        # some of mix, tokenizer, model, objectives, processes; on a GPU tune,
                                            # kernels, train
    python bench.py --only model --nanogpt=../nanoGPT     # beside a clone of github.com/karpathy/nanoGPT, same shape
    python bench.py --only train --size 124M    # one size of model
    python bench.py --json bench.json       # the numbers for a program; without it, on a GPU, in results/<device>.json

Rates are medians over rounds in which all ways take turns, so that what else runs on the machine falls on all alike;
"of limit" is the median of the ratios within a round. A rate per CPU-second leaves out time the process had to wait.
A section is a function that returns rows (see row, or kernels/bench.py); add it to SECTIONS or GPU_SECTIONS.
"""

import argparse
import contextlib
import functools
import gc
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch: rates here are those of one core

import numpy as np
import tiktoken
import torch
from torch.distributed.tensor import DTensor

import checkpoint
import corpus
import infill
import mix
import prepare
import processes
import tokenizer
import train
from kernels import backend
from kernels import bench as kernel_bench
from mix import Mix, Source
from model import GPT, PRESETS, GPTConfig, init_weights


def row(what, value, unit, per_cpu=None, of_limit=None, target=None):
    """One line of the table. per_cpu: units per CPU-second, or None; of_limit: the limit's share reached, or None.

    target: (least, most) for per_cpu, or for value where there is none; most may be None.
    """
    measured = value if per_cpu is None else per_cpu
    met = target and bool(measured >= target[0] and (target[1] is None or measured < target[1]))
    return dict(what=what, value=value, unit=unit, per_cpu=per_cpu, of_limit=of_limit, target=target, met=met)


def take_turns(ways, rounds):
    """{name: function} called in turn, round by round -> {name: [(wall seconds, CPU seconds) of each round]}."""
    seconds = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            if i:  # the first round warms up
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return seconds


def rate_rows(seconds, amounts, unit, limit, targets):
    """Rows from take_turns. amounts: {name: units of work in a call}; limit: a name; targets: {name: (least, most)}."""
    rows = []
    for name, rounds in seconds.items():
        rates = [amounts[name] / wall for wall, _ in rounds]
        ratios = [rate / (amounts[limit] / wall) for rate, (wall, _) in zip(rates, seconds[limit], strict=True)]
        per_cpu = median(amounts[name] / cpu for _, cpu in rounds)
        rows.append(row(name, median(rates), unit, per_cpu, median(ratios), targets.get(name)))
    return rows


def milliseconds(way, repeats=7):
    return 1e3 * median(wall for wall, _ in take_turns({"": way}, repeats)[""])


# --------------------------------------------------------------------------------------------------------------- mix

BLOCK, BATCH, CALLS = 1024, 32, 150
WEIGHTS = {"text": 0.5, "code": 0.3, "math": 0.2}


def bench_mix(args):
    with tempfile.TemporaryDirectory() as folder:
        folders = {name: Path(folder) / name for name in WEIGHTS}
        rng = np.random.default_rng(0)
        for path, millions in zip(folders.values(), (200, 120, 80), strict=True):
            path.mkdir()
            rng.integers(0, 32_000, millions * 10**6, dtype=np.uint16).tofile(path / "train.bin")
        huge = {name: Path(folder) / f"huge-{name}" for name in WEIGHTS}
        for path in huge.values():
            path.mkdir()
            with open(path / "train.bin", "wb") as file:
                file.truncate(2 * 10**12 // 3 // 2 * 2)  # sparse: no room on the disk, 10^12 tokens over the three
        return [*mix_rates(folders), *mix_starts(folders, huge), *mix_ratio(), *mix_order()]


def open_mix(folders, samples=10**10):
    return Mix({name: Source(path, "train", BLOCK) for name, path in folders.items()}, WEIGHTS, samples, seed=1)


def mix_rates(folders):
    """Tokens a second into int64 batches, and the rival and the floors that it stands between."""
    mixed, first = open_mix(folders), iter(range(0, 10**9, BATCH * CALLS))
    _, runs = mixed.sources["text"].map_file(0)
    rng = np.random.default_rng(0)
    source, target = np.ones((2, 1 << 26), np.uint16)

    def nano_crystal(dtype):
        start = next(first)
        for n in range(start, start + BATCH * CALLS, BATCH):
            mixed.batch(n, n + BATCH)[0].astype(dtype, copy=False)

    def gather():
        for begin in rng.integers(0, len(runs), (CALLS, BATCH)):
            runs[begin].astype(np.int64)

    def nano_gpt():  # its loader: map the file anew, draw places at random, widen and stack inputs and targets
        for _ in range(CALLS // 10):
            data = np.memmap(folders["text"] / "train.bin", dtype=np.uint16, mode="r")
            places = torch.randint(len(data) - BLOCK, (BATCH,)).tolist()
            torch.stack([torch.from_numpy(data[i : i + BLOCK].astype(np.int64)) for i in places])
            torch.stack([torch.from_numpy(data[i + 1 : i + 1 + BLOCK].astype(np.int64)) for i in places])

    ways = {
        "mix.py, 3 sources, int64 out": lambda: nano_crystal(np.int64),
        "mix.py, 3 sources, uint16 out": lambda: nano_crystal(np.uint16),
        "nanoGPT's get_batch, 1 source": nano_gpt,
        "limit of reading: runs[places], int64 out": gather,
        "limit: memory copy, 128 MB of uint16": lambda: np.copyto(target, source),
    }
    amounts = dict.fromkeys(ways, CALLS * BATCH * BLOCK / 1e6)
    amounts["nanoGPT's get_batch, 1 source"] /= 10
    amounts["limit: memory copy, 128 MB of uint16"] = len(source) / 1e6
    seconds = take_turns(ways, rounds=12)
    rows = rate_rows(seconds, amounts, "M tokens/s", [*ways][-1], {"mix.py, 3 sources, int64 out": (500, None)})
    ours, theirs = (seconds[name] for name in ("mix.py, 3 sources, int64 out", "nanoGPT's get_batch, 1 source"))
    times = median(10 * b[1] / a[1] for a, b in zip(ours, theirs, strict=True))
    return [*rows, row("mix.py over nanoGPT, CPU time of equal work", times, "x", target=(5, None))]


def mix_starts(folders, huge):
    """Start and resume: open the sources, build the mix, read the first batch. Nothing is written."""

    def two_phases(n):
        first = open_mix(huge, 10**9)
        Mix(first.sources, WEIGHTS, 4 * 10**9, seed=1, start=first.drawn(10**9)).batch(n, n + BATCH)

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        anonymous = [pool.apply(memory_of, (some,)) for some in (folders, huge)]
    state = len(json.dumps(open_mix(folders).identity()))
    return [
        row("start, 400 M tokens", milliseconds(lambda: open_mix(folders).batch(0, BATCH)), "ms", target=(0, 20)),
        row(
            "resume at sample 1 M",
            milliseconds(lambda: open_mix(folders).batch(10**6, 10**6 + BATCH)),
            "ms",
            target=(0, 20),
        ),
        row("start, 1 T tokens (sparse), phase 2", milliseconds(lambda: two_phases(0)), "ms", target=(0, 50)),
        row("resume at sample 3 G of it", milliseconds(lambda: two_phases(3 * 10**9)), "ms", target=(0, 50)),
        row("state in a checkpoint", state, "bytes", target=(0, 1024)),
        row("anonymous memory, 400 M tokens", anonymous[0], "MB", target=(0, 20)),
        row("anonymous memory, 1 T tokens", anonymous[1], "MB", target=(0, 20)),
    ]


def memory_of(folders):
    """Megabytes of memory that are not pages of files, taken by a mix and 1,000 batches. Linux only, else nan."""

    def anonymous():
        status = Path("/proc/self/status")
        return int(status.read_text().split("RssAnon:")[1].split()[0]) / 1024 if status.exists() else float("nan")

    before, mixed = anonymous(), open_mix(folders)
    for n in range(0, 1000 * BATCH, BATCH):
        mixed.batch(n, n + BATCH)
    return anonymous() - before


def mix_ratio():
    """Worst |drawn - weight * n| over all prefixes of 3 periods of random mixes of 3 to 40 sources."""
    rng, worst = np.random.default_rng(0), 0
    for _ in range(100):
        weights = rng.integers(1, 200, rng.integers(3, 41))
        table = mix.turns(list(mix.quotas({f"{s:02d}": int(w) for s, w in enumerate(weights)}).values()))
        drawn = np.cumsum(np.tile(table, 3)[:, None] == np.arange(len(weights)), axis=0)
        exact = np.arange(1, len(drawn) + 1)[:, None] * weights
        worst = max(worst, np.abs(drawn * weights.sum() - exact).max() / weights.sum())
    return [row("worst error of a ratio, any prefix, 100 mixes", worst, "samples", target=(0, 1))]


def shuffle_statistics(order):
    """Three chi2 of a permutation over their degrees of freedom; 1.0 for a true shuffle, float64 (3,).

    How evenly batches of 512 draw from 64 slices; pairs of slices drawn one after another; their low three bits.
    """
    n = len(order)
    batches = (order[: n // 512 * 512] * 64 // n).reshape(-1, 512)
    composition = np.mean([((np.bincount(batch, minlength=64) - 8) ** 2 / 8).sum() / 63 for batch in batches])

    def pairs(digit, base):  # the margins are those of a permutation, so (base - 1)^2 degrees of freedom are left
        table = np.bincount(digit[:-1] * base + digit[1:], minlength=base * base)
        return ((table - n / base**2) ** 2).sum() / (n / base**2) / (base - 1) ** 2

    return np.array([composition, pairs(order * 32 // n, 32), pairs(order % 8, 8)])


def mix_order():
    """Is the order a shuffle, and what does it cost?"""
    size, index, key = 195_312, np.arange(8192), np.full(8192, 7, np.uint64)
    ours = [Mix({"a": size}, {"a": 1}, size, seed).plan(0, size)[2] for seed in range(10)]
    numpys = [np.random.default_rng(seed).permutation(size) for seed in range(10)]
    ratios = [np.median([shuffle_statistics(order) for order in orders], axis=0) for orders in (ours, numpys)]
    rows = []
    for i, what in enumerate(("64 slices in batches of 512", "pairs of 32 slices", "pairs of low 3 bits")):
        rows.append(row(f"shuffle, chi2 of {what}", ratios[0][i], "", target=(0.7, 1.3)))
        rows.append(row("    the same of numpy's permutation", ratios[1][i], ""))
    for n in (size, 10**12):
        cost = milliseconds(lambda n=n: mix.permute(index, n, key), 50) * 1e6 / len(index)
        rows.append(row(f"permutation of {n:.3g} windows", cost, "ns/index"))
    cost = milliseconds(lambda: np.random.default_rng(0).permutation(size)) * 1e6 / size
    return [*rows, row("    numpy's, stored, of 1.95e+05", cost, "ns/index")]


# --------------------------------------------------------------------------------------------------------- tokenizer


def bench_tokenizer(args):
    """Megabytes of UTF-8 a second: a worker of prepare.py, from documents to a run on disk, beside plain tiktoken."""
    with multiprocessing.get_context("spawn").Pool(1, prepare.start_worker, (tokenizer.load(), "text", 0)) as pool:
        return pool.apply(tokenizer_rates)


def tokenizer_rates(megabytes=prepare.PIECE >> 20):
    with ThreadPoolExecutor(1) as pool:
        documents = corpus.collect(pool, megabytes * 10**6, megabytes * 10**6)
    encoding, rows = tokenizer.load(), []
    with tempfile.TemporaryDirectory() as folder:
        for kind, texts in documents.items():
            ours, theirs = f"prepare.py, one worker, {kind}", f"limit: tiktoken, one thread, {kind}"
            ways = {
                ours: lambda texts=texts: prepare.write_run(("texts", "bench", texts), Path(folder) / "run"),
                theirs: lambda texts=texts: [encoding.encode_ordinary(text) for text in texts],
            }
            seconds = take_turns(ways, rounds=7)
            amounts = dict.fromkeys(ways, sum(len(text.encode()) for text in texts) / 1e6)
            times = median(b[1] / a[1] for a, b in zip(seconds[ours], seconds[theirs], strict=True))
            rows += rate_rows(seconds, amounts, "MB/s", theirs, {})
            rows.append(row(f"prepare.py over tiktoken, CPU time of equal work, {kind}", times, "x", target=(1, None)))
    return rows


# ------------------------------------------------------------------------------------------------------------- model

ROWS, SHAPE = 12, {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}


def bench_model(args, vocab_size=8192):
    """Training steps on the CPU at 6 layers x 384, 12 rows of 256, each way in a process of its own, in turn.

    args.nanogpt: folder of a clone, whose model and optimizer then take the same steps on the same tokens.
    """
    nanogpt, rounds = args.nanogpt, args.rounds
    rng = np.random.default_rng(0)
    found = sorted(Path("data/text").glob("train-*.bin"))
    tokens = np.fromfile(found[0], "<u2") if found else rng.integers(0, vocab_size, 10**6, dtype=np.uint16)
    places = rng.integers(0, len(tokens) - 257, (rounds + 1, ROWS))
    batches = tokens[places[..., None] + np.arange(257)].astype(np.int64)
    _, best, _ = train.find_device(train.Config(device="cpu"))
    ways = {
        "ours, float32": (our_step, torch.float32, vocab_size),
        f"ours, {str(best)[6:]}, the default here": (our_step, best, vocab_size),
        "limit: matmul 1024 x 1024, float32": (matmul_step, torch.float32),
        f"limit: matmul 1024 x 1024, {str(best)[6:]}": (matmul_step, best),
    }
    if nanogpt:
        ways["nanoGPT, as it ships"] = (nanogpt_step, nanogpt, vocab_size)
    pipes = {name: start_process(*way) for name, way in ways.items()}
    seconds, losses = {name: [] for name in ways}, {name: [] for name in ways}
    for i, batch in enumerate(batches):
        for name, pipe in pipes.items():
            pipe.send(torch.from_numpy(batch))
            wall, cpu, loss = pipe.recv()
            losses[name].append(loss)
            if i:  # the first step warms up
                seconds[name].append((wall, cpu))
    for pipe in pipes.values():
        pipe.send(None)
    with torch.device("meta"):
        flops = GPT(GPTConfig(**SHAPE, vocab_size=vocab_size)).flops_per_token()
    amounts = {name: 20 * 2 * 1024**3 / flops if "limit" in name else ROWS * 256 for name in ways}
    rows = rate_rows(seconds, amounts, "tokens/s", [*ways][3], {})
    if nanogpt:
        theirs = [wall for wall, _ in seconds["nanoGPT, as it ships"]]
        for name, target in zip([*ways][:2], ((1.15, None), (2.5, None)), strict=True):
            times = median(b / a for (a, _), b in zip(seconds[name], theirs, strict=True))
            rows.append(row(f"tokens/s over nanoGPT's: {name}", times, "x", target=target))
    last = max(1, rounds // 10)
    for name in (name for name in ways if "limit" not in name):
        rows.append(
            row(f"loss, mean of the last {last} of {rounds + 1} steps: {name}", np.mean(losses[name][-last:]), "")
        )
    return rows


def start_process(make, *arguments):
    """A process that makes a step function and, for every batch sent, answers (wall seconds, CPU seconds, loss)."""
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, make, *arguments), daemon=True).start()
    return ours


def serve(pipe, make, *arguments):
    step = make(*arguments)
    while (batch := pipe.recv()) is not None:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()).item()
        pipe.send((time.perf_counter() - wall, time.process_time() - cpu, loss))


def our_step(dtype, vocab_size):
    train.keep_memory()
    model = GPT(GPTConfig(**SHAPE, vocab_size=vocab_size), dtype)
    init_weights(model, 1)
    cfg, steps = train.Config(lr=6e-3, warmup=20), iter(range(1, 10**9))
    optimizer = train.make_optimizer(model, cfg, "cpu")

    def step(x, y):
        loss, _, _ = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = train.lr_at(min(next(steps), 20), 20, cfg) * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def nanogpt_step(folder, vocab_size):
    """A step of nanoGPT's train.py on a CPU: float32, its own model, optimizer and learning rate (character config)."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    nanogpt = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    torch.manual_seed(1337)
    model = nanogpt.GPT(nanogpt.GPTConfig(**SHAPE, vocab_size=vocab_size, dropout=0.0, bias=False))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")

    def step(x, y):
        _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def matmul_step(dtype):
    a, b = torch.randn(2, 1024, 1024, dtype=dtype)

    def step(x, y):
        for _ in range(20):
            c = a @ b
        return c[0, 0]

    return step


# ------------------------------------------------------------------------------------------------------------- train

# Tokens/s on an H200, planned before anything ran and asked for, and rows of 2,048 tokens a micro-step. Planned: the
# time of all products at 790 TFLOP/s, derated to 72, 78 and 88% for their sizes, of attention at 380 forward and 270
# backward (540 and 315 with heads of 128), and of the bytes that fused operations move at 90% of 4.3 TB/s.
GPU_SIZES = {"124M": (496e3, 460e3, 16), "350M": (188e3, 172e3, 8), "1.3B": (68.5e3, 60e3, 8)}


def bench_train(args, steps=50, **shape):
    """Steps of train.py on random tokens, of every size compiled and eager, and with each kernel switched off in turn.

    "of limit" is MFU, by train.py's formula and peak. shape: knobs instead of the GPU's, for a rehearsal.
    """
    shape = shape or {"block_size": 2048, "batch": 65_536, "vocab_size": 50_304}
    ops, measured = list(backend.using), set()
    ways = {f"all {way}": dict.fromkeys(ops, way) for way in ("triton", "torch")}
    ways |= {f"without {op}": dict.fromkeys(ops, "triton") | {op: "torch"} for op in ops}
    for name in ("auto", *ways):  # what matters most of every size first
        for size, mode in itertools.product(args.size or GPU_SIZES, ("compiled", "eager")):
            using = ways.get(name, {op: choice[mode == "compiled"] for op, choice in backend.AUTO.items()})
            if (key := (size, mode, *using.values())) not in measured:  # auto is one of the others
                measured.add(key)
                backend.use(using)
                yield train_row(size, mode, name, steps, shape)


def train_row(size, mode, name, steps, shape):
    planned, asked, micro = GPU_SIZES[size]
    what, target = f"{size}, {mode}, {name}", (asked, None) if mode == "compiled" and name == "auto" else None
    try:
        rate, mfu, gigabytes = measure_steps(size, mode == "compiled", micro, steps, shape)
    except Exception as error:  # also a compiler's; the other rows must not be lost
        why = (
            "out of memory"
            if isinstance(error, torch.OutOfMemoryError)
            else f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        )
        return row(f"{what}: {why}", 0.0, "tokens/s", target=target) | {"planned": planned}
    return row(f"{what}, {gigabytes:.1f} GB", rate, "tokens/s", None, mfu, target) | {"planned": planned}


def measure_steps(size, compiled, micro, steps, shape):
    """(median tokens/s, MFU, peak GB) of train.train_step, feeder and optimizer included."""
    mode = "yes" if compiled else "no"
    cfg = train.Config(size=size, micro_batch=micro, compile=mode, **RANDOM, **PRESETS[size] | shape)
    device, dtype, _ = train.find_device(cfg)
    torch._dynamo.reset()
    gc.collect()  # a compiled model is part of a cycle, and would count as this one's memory
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with training(cfg) as (take, model, _):
        take(3)  # compiles
        once = median(take(2))
        take(min(15, int(5 / once)))
        times = take(max(5, min(steps, int(15 / once))))  # a slow model gets fewer steps, not more time
    _, peak = train.describe(device, dtype, compiled)
    rate = cfg.batch / median(times)
    gigabytes = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
    return rate, rate * model.flops_per_token() / peak, gigabytes


RANDOM = {"mix": {"random": 1.0}, "budget": 10**12}


@contextlib.contextmanager
def training(cfg):
    """A model in training on random tokens: (take, model, optimizer); take(n) -> seconds of each of n steps."""
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
        for p in model.parameters():
            torch.nn.init.normal_(p.to_local() if isinstance(p, DTensor) else p, std=0.02)
        optimizer = train.make_optimizer(model, cfg, device)
        feeder, sums = train.Feeder(phase, 0, device, dtype), torch.zeros(2, 1, dtype=torch.float64, device=device)
        skips = torch.zeros(2, dtype=torch.long, device=device)
        number = itertools.count(1)

        def take(steps):
            marks = [now(device == "cuda")]
            for _ in range(steps):
                train.train_step(model, optimizer, feeder, phase, next(number), sums, skips)
                marks.append(now(device == "cuda"))
            return seconds_between(marks, device == "cuda")

        try:
            yield take, model, optimizer
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


# -------------------------------------------------------------------------------------------------------- objectives

OBJECTIVES = ("fim(0.9)", "codegen2(0.5)", "prefix(1)")


def bench_objectives(args, rounds=15, knobs=None):
    """What rearranging costs the loader, on code of this Python, and what it and masks cost a training step on random
    documents of 900 words. knobs: of the steps, instead of those here, for a rehearsal."""
    yield from rearrange_rates()
    gpu = {"size": "350M", **PRESETS["350M"], "batch": 65_536, "micro_batch": 8}
    cpu = {"size": "nano", **PRESETS["nano"], "device": "cpu", "batch": 4096}
    knobs = knobs or (gpu if torch.cuda.is_available() else cpu)
    ways = {"causal": {}, "doc_mask": {"doc_mask": True}}
    ways |= {objective: {"objective": {"*": objective}} for objective in OBJECTIVES}
    ways["prefix(1), doc_mask"] = ways["doc_mask"] | ways["prefix(1)"]
    with contextlib.ExitStack() as stack:
        configs = {name: train.Config(**RANDOM, **knobs, vocab_size=tokenizer.VOCAB_SIZE, **way)
                   for name, way in ways.items()}  # fmt: skip
        takes = {name: stack.enter_context(training(cfg))[0] for name, cfg in configs.items()}
        seconds = {name: [] for name in ways}
        for i in range(rounds + 1):
            for name, take in takes.items():
                (one,) = take(1)
                if i:  # the first one warms up
                    seconds[name].append(one)
    for name, some in seconds.items():
        ratio = median(a / b for a, b in zip(some, seconds["causal"], strict=True))
        target = (0, 1.02) if name == "fim(0.9)" else None
        yield row(f"a step, {knobs['size']}, {name}", 1e3 * median(some), "ms", of_limit=1 / ratio)
        yield row(f"a step, {knobs['size']}, {name}, over causal", ratio, "x", target=target)


def rearrange_rates(megabytes=8):
    encoding = tokenizer.load()
    vocabulary = infill.Vocabulary(encoding)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code"
        path.mkdir()
        with ThreadPoolExecutor(1) as pool:
            documents = corpus.collect(pool, 0, megabytes * 10**6)["code"]
        ids = [[*encoding.encode_ordinary(text), vocabulary.eot] for text in documents]
        np.concatenate(ids).astype(np.uint16).tofile(path / "train.bin")
        source, first = Source(path, "train", BLOCK), iter(range(0, 10**9, BATCH * CALLS))

        def read(mixed):
            start = next(first)
            for n in range(start, start + BATCH * CALLS, BATCH):
                mixed.batch(n, n + BATCH)[0].astype(np.int64)

        def mix(objective):
            known = {"code": infill.parse(objective)}
            return Mix({"code": source}, {"code": 1}, 10**10, 1, objectives=known, vocabulary=vocabulary)

        ways = {"mix.py alone": mix("causal")}
        ways |= {f"mix.py + {objective}": mix(objective) for objective in (*OBJECTIVES, "fim(0.9, cut='token')")}
        seconds = take_turns({name: functools.partial(read, mixed) for name, mixed in ways.items()}, rounds=7)
    amounts = dict.fromkeys(ways, CALLS * BATCH * BLOCK / 1e6)
    return rate_rows(seconds, amounts, "M tokens/s", "mix.py alone", {"mix.py + fim(0.9)": (30, None)})


# --------------------------------------------------------------------------------------------------------- processes


def bench_processes(args, rounds=15, speed=None, memory=None):
    """What sharding and saving cost: steps in one process, in one through FSDP2, and in as many as there are GPUs.

    On a CPU two processes of one thread. speed, memory: knobs instead of those here, for a rehearsal.
    """
    cuda = torch.cuda.is_available()
    many = torch.cuda.device_count() if cuda else 2
    worlds = {"one process": 0, "one process, FSDP2": 1} | ({f"{many} processes": many} if many > 1 else {})
    gpu = {"size": "350M", **PRESETS["350M"], "vocab_size": 50_304, "batch": 65_536 * many, "micro_batch": 8}
    cpu = {"size": "nano", **PRESETS["nano"], "vocab_size": 8192, "device": "cpu", "dtype": "float32", "batch": 2048}
    yield from step_rows(speed or (gpu if cuda else cpu), worlds, rounds)
    cpu |= {"size": "124M", **PRESETS["124M"], "vocab_size": 32_064}
    short = {"block_size": 64, "micro_batch": 1}  # activations are not in the arithmetic
    yield from memory_rows(memory or (gpu if cuda else cpu) | short, worlds)


def step_rows(knobs, worlds, rounds):
    """Tokens/s ("of limit": over one process), and what a checkpoint adds."""
    groups = {name: start_group(world, knobs) for name, world in worlds.items()}
    seconds = {(name, saving): [] for saving in ("", "beside", "before") for name in groups}
    for i in range(rounds + 1):
        for (name, saving), so_far in seconds.items():
            answers = ask(groups[name], saving)
            if i:  # the first round warms up
                so_far.append(tuple(max(column) for column in zip(*answers, strict=True)))
            size = sum(n_bytes for *_, n_bytes, _ in answers)
    for group in groups.values():
        ask(group, None)
    (one, *_), median_of = groups, lambda pairs: median(a / b for (a, *_), (b, *_) in pairs)
    for name in groups:
        plain, beside, before = (seconds[name, saving] for saving in ("", "beside", "before"))
        ratio = median_of(zip(seconds[one, ""], plain, strict=True))
        yield row(
            f"{name}, {knobs['size']}", knobs["batch"] / median(wall for wall, *_ in plain), "tokens/s", of_limit=ratio
        )
        still = median(stood for _, stood, *_ in beside)
        yield row(f"{name}: training stands still for a checkpoint, {size / 1e6:.0f} MB", 1e3 * still, "ms")
        for more, what in ((beside, "and the checkpoint written beside it"), (before, "after it has waited for one")):
            ratio = median_of(zip(more, plain, strict=True))
            yield row(f"{name}: a step {what}, over a step", ratio, "x")


def memory_rows(knobs, worlds):
    """Peak memory of a process over what was there before the model; "of limit": over the arithmetic's."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**{k: v for k, v in knobs.items() if k in train.MODEL_KNOBS}))
    weights, root = model.num_params(), model.wte.weight.numel()
    for name, world in worlds.items():
        # fp32 weight, gradient, two moments; sharded, the embedding is whole at the end of the backward pass, three
        # times: itself, its gradient, and the copy of that which is sent
        expected = 16 * weights / max(1, world) + (12 * root if world else 0)
        group = start_group(world, knobs | {"batch": knobs["block_size"] * max(1, world)}, exact=True)
        for _ in range(2):
            peak = max(n_bytes for *_, n_bytes in ask(group, ""))
        ask(group, None)
        yield row(f"{name}, {knobs['size']}: peak of a process", peak / 1e9, "GB", of_limit=peak / expected)


def start_group(world, knobs, exact=False):
    """Processes that train together, FSDP2's if world > 0, and do what `ask` says: their pipes.

    exact: on a CPU, give memory back as soon as it is free, so that the peak is that of what was in use.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context, pipes = multiprocessing.get_context("spawn"), []
    for rank in range(max(1, world)):
        ours, theirs = multiprocessing.Pipe()
        arguments = theirs, rank, world, port, knobs, exact
        context.Process(target=train_in_group, args=arguments, daemon=True).start()
        pipes.append(ours)
    return pipes


def ask(group, saving):
    """[(seconds of a step, of these before it began, bytes of the process's shards, of its memory's peak), ...].

    saving: with a checkpoint "beside" the step or "before" it, or "" for none; None ends the group.
    """
    for pipe in group:
        pipe.send(saving)
    return [pipe.recv() for pipe in group]


def train_in_group(pipe, rank, world, port, knobs, exact):
    if world:
        os.environ.update(RANK=f"{rank}", WORLD_SIZE=f"{world}", LOCAL_RANK=f"{rank}", LOCAL_WORLD_SIZE=f"{world}",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")  # fmt: skip
    cuda, step = torch.cuda.is_available() and knobs.get("device") != "cpu", itertools.count(1)
    if not cuda:
        train.keep_memory(1 << 20 if exact else 1 << 30)
    with processes.joined(600):
        folder = Path(processes.from_first(tempfile.mkdtemp))
        before = resident()
        with training(train.Config(**RANDOM, **knobs)) as (take, model, optimizer):
            saver, tensors = checkpoint.Saver(), train.tensors_of(model, optimizer)
            while (saving := pipe.recv()) is not None:
                start = time.perf_counter()
                if saving:
                    saver.save(folder, next(step), tensors, {}, 1)
                if saving == "before":
                    saver.wait()
                still = time.perf_counter() - start
                take(1)
                saver.wait()
                seconds = time.perf_counter() - start
                peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM") - before
                pipe.send((seconds, still, checkpoint.local_bytes(tensors), peak))
        processes.from_first(shutil.rmtree, folder)
    pipe.send(None)


def resident(what="VmRSS"):
    """Bytes of memory that this process has, or with "VmHWM" had at most (Linux)."""
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))


# ------------------------------------------------------------------------------------------------------------- table


# functions of the command line that return rows, or yield them as they are measured
SECTIONS = {
    "mix": bench_mix,
    "tokenizer": bench_tokenizer,
    "model": bench_model,
    "objectives": bench_objectives,
    "processes": bench_processes,
}
GPU_SECTIONS = {
    "tune": lambda args: kernel_bench.tune(),
    "kernels": lambda args: kernel_bench.bench_kernels(),
    "train": bench_train,
}


def machine():
    """What the numbers were measured on, {name: text}."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(": ")[1] for line in info.read_text().splitlines() if line.startswith("model name")), cpu
        )
    packages = ", ".join(f"{p.__name__} {p.__version__}" for p in (torch, np, tiktoken))
    return {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only",
        "CPU": f"{cpu}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else cpu,
        "versions": f"Python {platform.python_version()}, {packages}",
    }


def verdict(r):
    if not r["target"]:
        return ""
    least, most = r["target"]
    asked = f">= {least}" if most is None else f"< {most}" if not least else f"{least} to {most}"
    return f"{asked}: {'met' if r['met'] else 'MISSED'}" + (f"; planned {r['planned']:,.0f}" if "planned" in r else "")


def print_row(r):
    numbers = [f"{r[key]:,.4g}" if r[key] is not None else "" for key in ("value", "per_cpu")]
    share = "" if r["of_limit"] is None else f"{r['of_limit']:.3f}x"
    print(f"{r['what']:<58}{numbers[0]:>12} {r['unit']:<11}{numbers[1]:>10}{share:>10}  {verdict(r)}", flush=True)


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*SECTIONS, *GPU_SECTIONS]
    parser.add_argument("--only", choices=known, nargs="+", help="some sections; all that this machine can if left out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--nanogpt", metavar="FOLDER", help="model: a clone of nanoGPT to compare with")
    parser.add_argument("--rounds", type=int, default=7, help="model: steps to time")
    parser.add_argument("--size", choices=GPU_SIZES, nargs="+", help="train: sizes of model")
    args = parser.parse_args()
    lack = backend.lack() or ("the interpreter is for tests" if backend.INTERPRET else "")
    wanted = [name for name in args.only or () if name in GPU_SECTIONS]
    args.only = args.only or [*SECTIONS, *([] if lack else GPU_SECTIONS)]
    if wanted and lack:
        parser.exit(2, f"bench.py: {', '.join(wanted)} cannot run here: {lack}\n")
    if args.size and "train" not in args.only:
        parser.exit(2, "bench.py: --size is for the section train, which needs an NVIDIA GPU\n")
    return args


def main():
    args, about, tables = read_arguments(), machine(), {}
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower())
    path = args.json or (None if backend.lack() else Path("results") / f"{device}.json")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not args.json:  # other sections of this device were measured before
            tables = json.loads(path.read_text())
    print("\n".join(f"{name:<9} {text}" for name, text in about.items()))
    for section in args.only:
        shows_itself = section in ("kernels", "tune")
        columns = f"{'measured':>12} {'':<11}{'per CPU-s':>10}{'of limit':>10}  target"
        print(f"\n{section:<58}{'' if shows_itself else columns}")
        name, rows = " ".join([section, *(args.size or ())]) if section == "train" else section, []
        for r in (SECTIONS | GPU_SECTIONS)[section](args):
            rows.append(r)
            if not shows_itself:
                print_row(r)
            if path:  # after every row, so that a run that is cut off keeps what it has measured
                write(path, tables | {f"{name}, unfinished": {"machine": about, "rows": rows}})
        tables[name] = {"machine": about, "rows": rows}
        if path:
            write(path, tables)


def write(path, tables):
    """Replaced as a whole, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(tables, indent=1, default=float) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    main()
