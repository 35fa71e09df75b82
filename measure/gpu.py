"""A GPU's first ten minutes: is everything right, how fast is it, and why. `python bench.py --gpu` runs these stages.

In order of what their answers are worth, each in a process of its own with its own limit. A stage is a function of a
Setting that yields rows; `must` in a row is what has to hold on any GPU.
"""

import functools
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import eval as evaluation
import sample
import train
from checkpoint import complete
from measure import kernels
from measure.apart import FORK, Ended, OutOfTime, apart, exit_code
from measure.processes import step_rows
from measure.table import line, row
from measure.train import RANDOM, SHAPE, bench_train, training
from model import PRESETS

ROOT = Path(__file__).parent.parent
FIRST = "forward_and_backward or under_every_mask or no_new_compilation"  # of the kernels' tests, for pytest's -k
LIFE = 'mix = {"text": 0.6, "code": 0.4}\nobjective = {"code": fim(0.5)}\nwarmup = 0.1\n'
PLAIN = 'mix = {"text": 0.6, "code": 0.4}\n'
FP32 = {"dtype": "float32", "compile": "no"}
WAYS = {  # of the same training, {what: knobs}; the first is what the others are compared with
    "on the CPU": FP32 | {"device": "cpu", "kernels": "torch"},
    "fp32, torch": FP32 | {"kernels": "torch"},
    "fp32, triton": FP32 | {"kernels": "triton"},
    "fp32, compiled": FP32 | {"compile": "yes"},
    "bf16, compiled": {"dtype": "bfloat16", "compile": "yes"},
}
MASKS = {
    "fim": 'objective = {"*": fim(0.9)}\n',
    "spans": 'objective = {"*": codegen2(0.5)}\n',
    "prefix": 'objective = {"*": prefix(1)}\n',
    "documents": "doc_mask = True\n",
    "prefix_documents": 'objective = {"*": prefix(1)}\ndoc_mask = True\n',
}


@dataclass
class Setting:
    data: Path  # prepared sources text and code
    work: Path  # a folder for what is trained, thrown away
    known: dict = field(default_factory=dict)  # {what: value} of the rows so far
    # sizes; a rehearsal has its own
    steps: int = 90
    sides: tuple = (8192, 4096, 2048, 1024)  # of square products
    tests: tuple = (FIRST, f"not ({FIRST})")
    small: dict = field(default_factory=lambda: {"size": "nano", "batch": 8192})
    large: dict = field(default_factory=lambda: {"size": "124M", "batch": 65_536})
    ways: tuple = tuple(WAYS)
    shape: dict = field(default_factory=lambda: SHAPE)


def facts(setting):
    if shutil.which("nvidia-smi"):
        asked = "name,driver_version,memory.total,clocks.max.sm,power.limit"
        said = subprocess.run(["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"], capture_output=True)
        yield row("nvidia-smi", None, "", note=said.stdout.decode().strip())
    versions = f"torch {torch.__version__}, triton {kernels.backend.triton.__version__}, CUDA {torch.version.cuda}"
    yield row("versions", None, "", note=versions)
    yield row("copy", kernels.copy_rate(), "bytes/s")
    for n in setting.sides:
        yield row(f"product of {n:,}", kernels.product_rate(n), "FLOP/s")


def right(setting):
    """The kernels' tests: against float64, forward and backward, and the masks first; then the others."""
    for chosen in setting.tests:
        command = [sys.executable, "-m", "pytest", "kernels/test_kernels.py", "-vvk", chosen, "-p", "no:cacheprovider"]
        tests = subprocess.Popen([*command, "--tb=short"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        failed = 0
        for name, cases in itertools.groupby(outcomes(tests.stdout), key=lambda outcome: outcome[0]):
            passed = 0
            for _, case, good in cases:
                passed += good
                if not good:  # at once, in case the time is over before the test's last case
                    failed += 1
                    yield row(f"{name}{case}", None, "failed", must=False)
            yield row(name, passed, "passed", must=True if passed else None)
        if tests.wait() != bool(failed):  # pytest itself has failed, or what it said was not understood
            yield row(f"pytest -k '{chosen}'", tests.returncode, "exit code", must=False)


def outcomes(lines):
    """Yield (test, its case, whether it passed) as pytest says them."""
    for text in lines:
        print(text, end="")
        if found := re.match(r"\S+::(\w+)(.*) (PASSED|FAILED|ERROR)", text):
            yield found[1], found[2], found[3] == "PASSED"


def run(setting):
    yield from life(setting, "small", setting.small)
    yield from life(setting, "large", setting.large)
    yield from parity(setting)
    yield from masks(setting)


def command(setting, name, texts, knobs):
    """Command line of train.py for phases {file name: its text}, and the logs that it will write."""
    folder = setting.work / name
    folder.mkdir(parents=True, exist_ok=True)
    for phase, text in texts.items():
        (folder / f"{phase}.py").write_text(text)
    knobs = {"data": setting.data, "out": folder, "log_every": 1, "eval_tokens": 16_384} | knobs
    argv = [*(f"{folder}/{phase}.py" for phase in texts), *(f"--{knob}={value}" for knob, value in knobs.items())]
    return argv, [folder / phase / "log.jsonl" for phase in texts]


def losses(log):
    """[loss a step] of a log, as far as it is written; NaN for updates that were left out."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [math.nan if r["loss"] is None else r["loss"] for r in records if "lr" in r]


def life(setting, what, knobs):
    """train.py as it is by default; killed without warning after a checkpoint, resumed, sampled from, evaluated."""
    steps, name = setting.steps, knobs["size"]
    length = {"budget": steps * knobs["batch"], "save_every": steps // 5}
    argv, (log,) = command(setting, what, {"life": LIFE}, knobs | length)
    process = FORK.Process(target=train.main, args=(argv,))
    process.start()
    while process.is_alive() and not complete(log.parent / "checkpoints"):
        time.sleep(0.005)
    in_time = process.is_alive()
    process.kill()
    process.join()
    code, curve = exit_code(train.main, argv), losses(log)
    resumed = log.exists() and '"event": "resume"' in log.read_text()
    good = code == 0 and len(curve) == steps and all(map(math.isfinite, curve)) and curve[-1] < curve[0]
    good = good and (resumed or not in_time)
    how = "resumed" if resumed else "not resumed" if in_time else "over before it could be killed"
    note = f"{how}, exit code {code}, {len(curve)} steps, {curve[:1]} -> {curve[-1:]}"
    yield row(f"{name}: trained, killed, resumed", None, "", must=good, note=note)
    trained = str(log.parent)
    uses = {
        "a continuation": (sample.main, [trained, "--prompt", "def ", "--tokens=40"]),
        "a filled hole": (sample.main, [trained, "--infill", "def area(r):", "    return a", "--tokens=40"]),
        "an evaluation": (evaluation.main, [trained, "--limit=20", "--generate"]),
    }
    for use, (main, argv) in uses.items():
        yield row(f"{name}: {use}", None, "", must=exit_code(main, argv) == 0)


def parity(setting, steps=20):
    """Losses in fp32, without TF32, with kernels and without, against a CPU's of the same seed; then in bf16."""
    batch, curves = setting.small["batch"] // 4, {}
    for way in setting.ways:
        knobs = setting.small | {"batch": batch, "budget": steps * batch} | WAYS[way]
        argv, (log,) = command(setting, way.replace(", ", "-").replace(" ", "-"), {"plain": PLAIN}, knobs)
        exit_code(with_more_cores, argv)
        curves[way] = losses(log)
    for way, curve in list(curves.items())[1:]:
        off = [abs(a - b) / b for a, b in zip(curve, curves["on the CPU"], strict=False)]
        what, bound = f"{way} against the CPU, worst of {steps} losses", 1e-4 if way.startswith("fp32") else 2e-2
        if len(off) < steps or math.isnan(sum(off)):
            note = f"{len(curve)} losses beside {len(curves['on the CPU'])}, or not all are finite"
            yield row(what, None, "", note=note, must=False)
        else:
            must = max(off) < bound if way.startswith("fp32") else None
            yield row(what, max(off), "", target=(0, bound), note=" ".join(f"{x:.0e}" for x in off), must=must)


def with_more_cores(argv):
    torch.set_num_threads(min(4, os.cpu_count() // 2 or 1))  # bench.py says one; for the run on the CPU
    return train.main(argv)


def masks(setting, steps=10):
    """Every objective and mask, one phase after the other in one process."""
    batch = setting.small["batch"]
    length = {"budget": len(MASKS) * steps * batch, "share": 1 / len(MASKS)}
    argv, logs = command(setting, "masks", {name: PLAIN + text for name, text in MASKS.items()}, setting.small | length)
    exit_code(train.main, argv)
    for name, log in zip(MASKS, logs, strict=True):
        curve = losses(log)
        good = len(curve) == steps and all(map(math.isfinite, curve))
        yield row(f"{steps} steps of {name}", curve[-1] if good else None, "nats", must=good)


def speed(setting):
    product = setting.known.get(f"product of {setting.sides[0]:,}")
    yield from bench_train(setting.known.get("copy"), product, shape=setting.shape)


def why(setting, steps=5):
    """Where the time of a step goes: idle, launches, waiting, and the kernels that take most of it."""
    for size in ("124M", "350M"):
        cfg = train.Config(size=size, **RANDOM, **PRESETS[size] | setting.shape)
        kernels.backend.choose("auto", *train.find_device(cfg)[::2])
        with training(cfg) as trained:
            trained.take(3)
            step, host = median(trained.take(steps)), []
            for _ in range(steps):  # one at a time, lest the host wait for room in the device's queue
                trained.take(1)
                host.append(trained.host)
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                trained.take(steps)
        events = profiler.key_averages()
        # kernels and copies alone: an operation on the host, and a range that was annotated, has their time once more
        on_device = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        took = {e.key: e.self_device_time_total / 1e6 / steps for e in on_device}

        def times(*names, events=events):
            return sum(e.count for e in events if e.key.startswith(names))

        launches, waits = times("cudaLaunchKernel", "cuLaunchKernel"), times("cudaStreamSync", "cudaEventSync")
        idle, known = 100 * (1 - sum(took.values()) / step), launches > 0  # else there was nothing to profile with
        yield row(f"{size}: the GPU is idle", idle, "% of a step", target=(-5, 5) if known else None)
        yield row(f"{size}: the host needs", 1e3 * median(host), "ms a step", of_limit=median(host) / step)
        yield row(f"{size}: launches", launches / steps, "a step")
        yield row(f"{size}: synchronisations", waits, f"in {steps} steps", must=waits == 0 if known else None)
        for name in sorted(took, key=took.get, reverse=True)[:15]:
            yield row(f"    {name[:52]}", 100 * took[name] / step, "% of a step")


def sharded(setting):
    """One process beside one that FSDP2 shares out to itself, over NCCL; from the first step at the whole rate, so that
    wrong gradients show in the losses, and in micro-batches of which two fit side by side."""
    knobs = {"size": "124M", **PRESETS["124M"], "warmup": 0, "micro_batch": 8, **setting.shape}
    yield from step_rows(knobs, {"one process": 0, "one process, FSDP2": 1}, rounds=5, savings=("beside",), saves=1)


STAGES = {  # {name: (seconds at most, stage)}
    "facts": (45, facts),
    "right": (130, right),
    "run": (180, run),
    "speed": (180, speed),
    "why": (60, why),
    "sharded": (90, sharded),
    "kernels": (600, lambda setting: kernels.bench_kernels()),
    "tune": (1200, lambda setting: kernels.tune()),
}


def first_minutes(names, seconds, data, keep, log, setting=None):
    """Run stages while there is time; print rows as they come and a table at the end. -> exit code.

    keep(name, rows) is called after every row. log: the file that all output of stages goes to. setting: for a
    rehearsal, instead of a GPU's.
    """
    end, tables = time.monotonic() + seconds, {}
    with tempfile.TemporaryDirectory() as work:
        setting = setting or Setting(data, Path(work) / "runs")
        setting.work.mkdir()
        for name in names:
            limit, stage = STAGES[name]
            tables[name], left = [], end - time.monotonic()
            if left < min(limit, 15):
                continue
            print(f"\n{name}", flush=True)
            for r in rows_of(stage, setting, limit, left, log):
                print(line(r), flush=True)
                tables[name].append(r)
                keep(f"gpu: {name}", tables[name])
                setting.known[r["what"]] = r["value"]
    return summary(tables)


def rows_of(stage, setting, limit, left, path):
    """Yield the rows of a stage, and if it broke off one that says why. path: of its output."""
    with open(path, "a+", errors="replace") as log:
        begin = log.tell()
        try:
            yield from apart(functools.partial(stage, setting), min(limit, left), log)
        except Ended as error:
            log.seek(begin)
            last = "\n".join(log.read().strip().splitlines()[-15:])
            print(last)
            cut_off = isinstance(error, OutOfTime) and left < limit  # all had too little time, which is nobody's fault
            yield row(str(error), None, "", note=last, must=None if cut_off else False)


def summary(tables):
    """Print at most 40 lines: every stage, what does not hold, what missed, what was aimed at. -> exit code."""
    wrong = {name: [r for r in rows if r["must"] is False] for name, rows in tables.items()}
    lines, room = [], 39 // len(tables) - 1
    for name, rows in tables.items():
        held = sum(r["must"] is True for r in rows)
        lines.append(f"{name:<12} {f'{held} hold, {len(wrong[name])} do not' if rows else 'no time was left'}")
        aimed = [r for r in rows if r["target"] and r not in wrong[name]]
        worth = [*wrong[name], *sorted(aimed, key=lambda r: r["met"])] or rows
        lines += [f"  {line(r)[:150]}" for r in worth[:room]]
    print("\n" + "\n".join(lines))
    return int(any(wrong.values()))
