"""What sharding and saving cost a training step."""

import itertools
import multiprocessing
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

import checkpoint
import processes
import train
from kernels import backend
from measure.table import row
from measure.train import RANDOM, training
from model import GPT, PRESETS, GPTConfig


def bench_processes(rounds=15, speed=None, memory=None):
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


SAVINGS = {"beside": "and the checkpoint written beside it", "before": "after it has waited for one"}


def step_rows(knobs, worlds, rounds, savings=tuple(SAVINGS), saves=None):
    """Tokens/s ("of limit": over one process); then what a checkpoint adds, in so many rounds, or `saves`."""
    groups = {name: start_group(world, knobs) for name, world in worlds.items()}
    (one, *_), answers = groups, in_rounds(groups, ("",), rounds)
    for name in groups:
        plain = answers[name, ""]
        rate = knobs["batch"] / median(wall for wall, *_ in plain)
        yield row(f"{name}, {knobs['size']}", rate, "tokens/s", of_limit=ratio(answers[one, ""], plain))
        if worlds[name] == 1:  # more processes drew other weights
            summed, alone = plain[-1][-1], answers[one, ""][-1][-1]
            off = abs(summed - alone)
            what = f"{name}: all losses, apart from those of one"
            yield row(what, off, "nats", note=f"of {alone:,.0f}", must=off < 2e-3 * alone)
    answers = in_rounds(groups, ("", *savings), saves or rounds)
    for name in groups:
        _, still, n_bytes, *_ = answers[name, savings[0]][-1]
        yield row(f"{name}: training stands still for a checkpoint, {n_bytes / 1e6:.0f} MB", 1e3 * still, "ms")
        for saving in savings:
            times = ratio(answers[name, saving], answers[name, ""])
            yield row(f"{name}: a step {SAVINGS[saving]}, over a step", times, "x")
    for group in groups.values():
        ask(group, None)


def in_rounds(groups, savings, rounds):
    """{(name, saving): [answer of each round]}, as `ask` has them, of a group: the longest time, the sum of bytes."""
    answers = {(name, saving): [] for saving in savings for name in groups}
    for i in range(rounds + 1):
        for (name, saving), so_far in answers.items():
            wall, still, n_bytes, peak, losses = zip(*ask(groups[name], saving), strict=True)
            if i:  # the first round warms up
                so_far.append((max(wall), max(still), sum(n_bytes), max(peak), losses[0]))
    return answers


def ratio(some, others):
    return median(a / b for (a, *_), (b, *_) in zip(some, others, strict=True))


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
            peak = max(n_bytes for *_, n_bytes, _ in ask(group, ""))
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
    """[(seconds of a step, of these before it began, bytes of the process's shards, of its memory's peak, losses summed
    up so far), ...].

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
        cfg = train.Config(**RANDOM, **knobs)
        device, _, compiled = train.find_device(cfg)
        backend.choose("auto", device, compiled)
        with training(cfg) as run:
            saver, tensors = checkpoint.Saver(), train.tensors_of(run.model, run.optimizer)
            while (saving := pipe.recv()) is not None:
                start = time.perf_counter()
                if saving:
                    saver.save(folder, next(step), tensors, {}, 1)
                if saving == "before":
                    saver.wait()
                still = time.perf_counter() - start
                run.take(1)
                saver.wait()
                seconds = time.perf_counter() - start
                peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM") - before
                pipe.send((seconds, still, checkpoint.local_bytes(tensors), peak, run.sums[0].sum().item()))
        processes.from_first(shutil.rmtree, folder)
    pipe.send(None)


def resident(what="VmRSS"):
    """Bytes of memory that this process has, or with "VmHWM" had at most (Linux)."""
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))
