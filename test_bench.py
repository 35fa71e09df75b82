"""Promises of bench.py: that nothing measured is lost, and that the GPU's benchmarks run, rehearsed on a CPU."""

import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench
import train
from conftest import ROOT, run
from measure import gpu, processes
from measure.apart import Ended, apart
from measure.table import row, write
from measure.train import GOALS, H100, SHAPE, on_paper
from model import GPT, PRESETS, GPTConfig

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU these are the real benchmarks")
TINY = {"n_layer": 1, "n_head": 2, "n_embd": 32}


@pytest.fixture
def rehearsal(tmp_path, data, monkeypatch):
    """A Setting of toy sizes for a CPU, where "ours" is the reference: the code runs, the times mean nothing."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # for the kernels' tests, which have a process of their own
    small = {"size": "nano", **TINY, "block_size": 32, "batch": 512, "device": "cpu"}
    return gpu.Setting(
        data, tmp_path / "runs", sides=(32,), tests=("swiglu",), small=small, large=small,
        ways=("on the CPU", "fp32, torch"),
        shape={**TINY, "block_size": 16, "batch": 32, "micro_batch": 1, "vocab_size": 96, "device": "cpu"},
    )  # fmt: skip


@no_gpu
def test_a_gpus_first_minutes_run_to_the_end_though_a_stage_crashes_and_another_hangs(
    rehearsal, tmp_path, monkeypatch, capsys
):
    sleepers = tmp_path / "sleepers"

    def crashes(setting):
        yield row("before the crash", 1.0, "")
        os.kill(os.getpid(), signal.SIGKILL)

    def hangs(setting):
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        sleepers.write_text(str(sleeper.pid))
        yield row("before the hang", 1.0, "")
        time.sleep(600)

    stages = {name: stage for name, stage in gpu.STAGES.items() if name != "tune"}  # tested with the kernels
    stages = {"crashes": (20, crashes), "hangs": (1, hangs)} | stages
    monkeypatch.setattr(gpu, "STAGES", stages)
    assert bench.main(["--gpu", "--minutes=5", "--json", str(tmp_path / "gpu.json")], rehearsal) == 1
    saved = {name[5:]: table["rows"] for name, table in json.loads((tmp_path / "gpu.json").read_text()).items()}
    assert [*saved] == [*stages]
    wrong = [r["what"] for rows in saved.values() for r in rows if r["must"] is False]
    # and the softmax part alone, which has no reference to run in its place
    assert wrong == ["crashed, exit code -9", "killed after 1 s", "linear_ce softmax part, toy"], wrong
    assert [(r["what"], r["value"]) for r in saved["right"]] == [
        ("test_swiglu_forward_and_backward", 6),
        ("test_swiglu_saturates_without_nan_and_leaves_unaligned_widths_to_torch", 1),
    ]
    assert saved["crashes"][0]["what"] == "before the crash" and saved["hangs"][0]["what"] == "before the hang"
    assert not os.path.exists(f"/proc/{sleepers.read_text()}")
    assert len(saved["run"]) == 4 + 1 + len(gpu.MASKS) + 4
    assert {r["op"] for r in saved["kernels"]} == {"linear_ce", "rope", "norm", "swiglu", "attention"}
    table = capsys.readouterr().out.rpartition("\n\n")[2].splitlines()
    assert len(table) <= 40 and {line.split("  ")[0] for line in table if line[0] != " "} == {*stages}


@no_gpu
def test_stages_are_left_out_from_the_end_when_the_time_is_over(rehearsal, monkeypatch, tmp_path):
    def takes_its_time(setting):
        time.sleep(0.5)
        yield row("done", 1.0, "", must=True)

    monkeypatch.setattr(gpu, "STAGES", dict.fromkeys(("first", "second", "third"), (20, takes_its_time)))
    path = tmp_path / "gpu.json"
    assert bench.main(["--gpu", f"--minutes={15.2 / 60}", "--json", str(path)], rehearsal) == 0
    assert [*json.loads(path.read_text())] == ["gpu: first"]


def test_a_failing_test_of_a_kernel_is_named_whatever_its_parameters_look_like():
    lines = ["kernels/test_kernels.py::test_a[(3, 4097)-torch.float32] PASSED [ 10%]\n", "collected 3 items\n",
             "kernels/test_kernels.py::test_a[prefix and document] FAILED [ 20%]\n",
             "kernels/test_kernels.py::test_b ERROR [ 30%]\n"]  # fmt: skip
    expected = [("test_a", "[(3, 4097)-torch.float32]", True), ("test_a", "[prefix and document]", False)]
    assert list(gpu.outcomes(lines)) == [*expected, ("test_b", "", False)]


def test_what_a_process_of_its_own_does_is_told_and_leaves_nothing_behind():
    assert list(apart(lambda: iter([1, 2]))) == [1, 2]
    with pytest.raises(Ended, match="ZeroDivisionError: division by zero"):
        list(apart(lambda: (1 / n for n in (1, 0))))


@no_gpu
def test_a_failing_size_costs_its_own_row_alone(monkeypatch):
    from measure import train as steps

    monkeypatch.setattr(steps, "measure_steps", lambda what, *rest: 1 / 0 if "350M" in what else row(what, 1.0, ""))
    rows = list(steps.bench_train())
    assert len(rows) == 5
    assert [r["what"] for r in rows if r["must"] is False] == ["350M, compiled, kernels auto: failed"]


def test_what_a_step_costs_on_paper_is_what_the_formula_for_mfu_counts_and_the_bytes():
    """At infinite bandwidth and full rates only the multiplications remain: 6 N, and half of the attention's square."""
    c = GPTConfig(**PRESETS["1.3B"] | {"vocab_size": 50_304})
    with torch.device("meta"):
        model = GPT(c)
    parts = on_paper(c, 1000, 1, copy=1e30, product=1e12)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    reached = 0.72 + 0.113 * 1.415
    products = parts["products of the blocks"] + parts["products of the head"]
    assert products == pytest.approx(6 * matrices * 1000 / (1e12 * reached), rel=1e-3)
    assert parts["attention"] * 1e12 < 24 * 2048 * 2048 * 1000 * 6 * 2.7  # 7 products of half a square, below peak
    whole = [sum(on_paper(c, 65_536, micro, *H100).values()) for micro in (1, 4)]
    assert whole[0] < whole[1] < 1.1 * whole[0]


def test_the_readmes_predictions_are_what_arithmetic_says():
    readme, shares = (ROOT / "README.md").read_text(), {}
    lines = readme.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if re.match(r"\| [0-9.]+[MB] \| \d x", line)]
    assert [size for size, *_ in rows] == [*GOALS]
    for size, batches, flop, moved, _, _, rate, mfu, goal in rows:
        c = GPTConfig(**PRESETS[size] | {k: SHAPE[k] for k in ("block_size", "vocab_size")})
        with torch.device("meta"):
            flops = GPT(c).flops_per_token()
        parts = on_paper(c, 65_536, int(batches.split()[0]), *H100)
        *products, attention, elementwise = (100 * x / sum(parts.values()) for x in list(parts.values())[:4])
        shares[size] = [f"{x:.0f}" for x in (sum(products), attention, elementwise)]
        assert moved == f"{sum(list(parts.values())[3:]) * 0.9 * H100[0] / 1e9:.0f} GB"
        tokens = 65_536 / sum(parts.values())
        assert float(rate.replace(",", "")) == pytest.approx(tokens, rel=2e-3)
        assert (flop, mfu) == (f"{65_536 * flops / 1e12:.0f}T", f"{100 * tokens * flops / 989e12:.0f}%")
        assert goal == f"{100 * GOALS[size]:.0f}%"
    large, small = "products are to take {}%, attention {}%, norms, rotation and SwiGLU {}%", "124M {}, {} and {}%"
    assert large.format(*shares["1.3B"]) in readme and small.format(*shares["124M"]) in readme


def test_micro_batches_on_a_gpu_are_as_large_as_memory_allows(monkeypatch):
    """Against peaks of torch's allocator at known sizes, compiled: 14.6, 20.0 and 48.6 GiB."""

    def rows(size, gigabytes, **knobs):
        memory = SimpleNamespace(total_memory=gigabytes * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: memory)
        knobs = PRESETS[size] | {"block_size": 2048, "vocab_size": 50_304} | knobs
        return train.micro_rows("x", train.Config(size=size, **knobs))

    monkeypatch.setattr(train, "find_device", lambda cfg: ("cuda", torch.bfloat16, cfg.compile != "no"))
    # what the allocator saw must be allowed, and with less than nine tenths of it not
    for size, micro, peak in (("124M", 16, 14.6), ("350M", 8, 20.0), ("1.3B", 8, 48.6)):
        assert rows(size, peak / 0.9 * 1.2) >= micro and rows(size, peak) < micro, size
    assert [rows(size, 79.2) for size in ("30M", "124M", "350M", "1.3B")] == [32, 32, 32, 8]
    assert rows("nano", 79.2, block_size=256) == 32  # its whole batch
    assert rows("1.3B", 79.2, recompute=True) > 8
    assert rows("350M", 40.0, compile="no") < rows("350M", 40.0)
    assert rows("7B", 79.2, vocab_size=32_032) == 1  # and then says that it does not fit


def test_the_benchmark_of_processes_runs_to_the_end():
    tiny = {"size": "nano", **TINY, "block_size": 16, "batch": 64, "vocab_size": 96, "device": "cpu"}
    tiny |= {"dtype": "float32"}
    rows = list(processes.bench_processes(rounds=1, speed=tiny, memory=tiny))
    units = ["tokens/s", "tokens/s", "nats", "tokens/s", *3 * ["ms", "x", "x"], *3 * ["GB"]]
    assert [r["unit"] for r in rows] == units
    assert all(r["value"] > 0 for r in rows if r["unit"] == "tokens/s")
    assert all(r["must"] is not False for r in rows)


def test_the_benchmarks_numbers_survive_a_death_and_other_sections(tmp_path, monkeypatch):
    path = tmp_path / "deep/results/bench.json"

    def rows(args, dies):
        yield bench.row("first", 1.0, "x")
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        yield bench.row("second", 2.0, "x")

    def measure(section, dies, *arguments):
        monkeypatch.setattr(bench, "SECTIONS", {section: lambda args: rows(args, dies)})
        if dies:
            with pytest.raises(Ended, match="-9"):
                bench.main(["--only", section, *arguments])
        else:
            assert bench.main(["--only", section, *arguments]) == 0

    measure("mix", False, "--json", str(path))
    measure("mix", True, "--json", str(path))
    saved = json.loads(path.read_text())
    assert len(saved["mix, unfinished"]["rows"]) == 1 and saved["mix, unfinished"]["machine"]["versions"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "machine", lambda: {"device": "NVIDIA X 9", "lack": ""})
    measure("mix", False), measure("model", False), measure("mix", True)
    saved = json.loads((tmp_path / "results/nvidia-x-9.json").read_text())
    assert {name: len(t["rows"]) for name, t in saved.items()} == {"mix": 2, "model": 2, "mix, unfinished": 1}


@no_gpu
def test_a_benchmark_that_needs_a_gpu_says_so_in_one_line():
    for arguments in (["--only", "kernels"], ["--gpu"]):
        done = run("bench.py", *arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--gpu" in done.stderr, done.stderr


def test_the_parent_of_the_stages_never_asks_cuda_anything():
    """A process that has cannot be forked: the modules must be importable, and the plan be made, without."""
    code = """
import torch
def asked(*args): raise SystemExit("CUDA was asked")
for name in ("is_available", "device_count", "get_device_name", "get_device_capability", "get_device_properties"):
    setattr(torch.cuda, name, asked)
torch.version.cuda = "13.0"
import bench
bench.read_arguments(["--gpu"], "")
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_numbers_for_programs_are_strict_json(tmp_path):
    write(tmp_path / "new/bench.json", {"mix": [math.nan, np.float32(0.5), np.float32("inf"), np.int64(3), 1.0]})
    assert json.loads((tmp_path / "new/bench.json").read_text()) == {"mix": [None, 0.5, None, 3.0, 1.0]}
