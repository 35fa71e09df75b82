"""What the parts of nanoCrystal reach on this machine, beside what the machine allows and what was aimed at.

    python bench.py                         # every section that this machine can
    python bench.py --only mix model        # some of mix, tokenizer, model, objectives, processes
    python bench.py --only model --nanogpt=../nanoGPT     # beside a clone of github.com/karpathy/nanoGPT, same shape
    python bench.py --gpu --minutes=8       # a GPU's first minutes: is everything right, how fast is it, and why
    python bench.py --gpu --only speed tune # some of its stages: facts, right, run, speed, why, sharded, kernels, tune
    python bench.py --json bench.json       # the numbers for a program; without it, on a GPU, in results/<device>.json

Rates are medians over rounds in which all ways take turns, so that what else runs on the machine falls on all alike;
"of limit" is the median of the ratios within a round. A rate per CPU-second leaves out time the process had to wait.

--gpu runs the stages of measure/gpu.py, the most telling first, each in a process of its own with its own limit, on
sources text and code in --data (the default corpus, if there are none). It keeps what was measured after every row and
all output in a .log beside it, leaves stages out from the end when the minutes are over, and exits with 1 if anything
that must hold does not. tune, for launch parameters, runs only if it is named.
A section is a function that returns rows (see measure/table.py); add it to SECTIONS.
"""

import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import platform
import re
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

import corpus
import errors
import files
import infill
import mix
import prepare
import readers
import tokenizer
import train
from kernels import backend
from measure import gpu
from measure.apart import apart
from measure.processes import bench_processes
from measure.table import line, milliseconds, rate_rows, row, take_turns, write
from measure.train import RANDOM, training
from mix import Mix, Source
from model import GPT, PRESETS, GPTConfig, init_weights

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
        return [*mix_rates(folders), *mix_starts(folders, huge), *mix_order()]


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


def mix_order():
    """What the order costs."""
    size, index, key = 195_312, np.arange(8192), np.full(8192, 7, np.uint64)
    for n in (size, 10**12):
        cost = milliseconds(lambda n=n: mix.permute(index, n, key), 50) * 1e6 / len(index)
        yield row(f"permutation of {n:.3g} windows", cost, "ns/index")
    cost = milliseconds(lambda: np.random.default_rng(0).permutation(size)) * 1e6 / size
    yield row("    numpy's, stored, of 1.95e+05", cost, "ns/index")


# --------------------------------------------------------------------------------------------------------- tokenizer


def bench_tokenizer(args):
    """Megabytes of UTF-8 a second: a worker of prepare.py, from documents to a run on disk, beside plain tiktoken."""
    with multiprocessing.get_context("spawn").Pool(1, prepare.start_worker, (tokenizer.load(), "text", 0)) as pool:
        return pool.apply(tokenizer_rates)


def tokenizer_rates(megabytes=readers.PIECE >> 20):
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
        takes = {name: stack.enter_context(training(cfg)).take for name, cfg in configs.items()}
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


# ------------------------------------------------------------------------------------------------------------- table


# functions of the command line that return rows, or yield them as they are measured
SECTIONS = {
    "mix": bench_mix,
    "tokenizer": bench_tokenizer,
    "model": bench_model,
    "objectives": bench_objectives,
    "processes": lambda args: bench_processes(),
}
HEADER = f"{'':<58}{'measured':>12} {'':<11}{'per CPU-s':>10}{'of limit':>10}"


def machine():
    """What the numbers were measured on, {name: text}; "lack" is why --gpu cannot run, "" if it can."""
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
        "lack": backend.lack() or ("the interpreter is for tests" if backend.INTERPRET else ""),
    }


def read_arguments(argv, lack):
    parser = errors.Parser(__doc__)
    parser.add_argument("--only", choices=[*SECTIONS, *gpu.STAGES], nargs="+", help="some sections, or stages of --gpu")
    parser.add_argument("--json", type=errors.path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--nanogpt", type=errors.path, metavar="FOLDER", help="model: a clone of it to compare with")
    parser.add_argument("--rounds", type=int, default=7, help="model: steps to time")
    parser.add_argument("--gpu", action="store_true", help="a GPU's first minutes, stage by stage")
    parser.add_argument("--minutes", type=float, default=8, help="--gpu: that it may take")
    parser.add_argument("--data", type=errors.path, default="data", help="--gpu: prepared sources text and code")
    args = parser.parse_args(argv)
    every = gpu.STAGES if args.gpu else SECTIONS
    args.only = args.only or [name for name in every if name != "tune"]  # which takes longer than all the others
    if others := sorted({*args.only} - {*every}):
        parser.error(f"{', '.join(others)}: {'not a stage of' if args.gpu else 'a stage of'} --gpu")
    if args.gpu and lack:
        parser.error(f"--gpu needs an NVIDIA GPU: {lack}")
    return args


@errors.command
def main(argv, setting=None):
    """setting: of measure/gpu.py, for a rehearsal of its stages."""
    (about,) = apart(lambda: [machine()])  # another process: one that has asked CUDA anything must not be forked
    lack = about.pop("lack")
    args = read_arguments(argv, "" if setting else lack)
    path = args.json
    if not (path or lack):
        path = Path("results") / f"{re.sub(r'[^a-z0-9]+', '-', about['device'].lower())}.json"
    tables = files.read_json(path) if path and path.exists() and not args.json else {}

    def keep(section, rows):
        tables[section] = {"machine": about, "rows": rows}
        if path:  # with what was measured before of this device; after every row, in case this run is cut off
            write(path, tables)

    print("\n".join(f"{name:<9} {text}" for name, text in about.items()))
    if args.gpu:
        log = path.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        return gpu.first_minutes(args.only, 60 * args.minutes, args.data, keep, log, setting)
    for section in args.only:
        print(f"\n{section}\n{HEADER}")
        rows = []
        for r in apart(functools.partial(SECTIONS[section], args)):
            rows.append(r)
            print(line(r), flush=True)
            keep(f"{section}, unfinished", rows)
        tables.pop(f"{section}, unfinished", None)
        keep(section, rows)
    return 0


if __name__ == "__main__":
    errors.run(main)
