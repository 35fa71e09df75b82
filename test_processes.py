"""Promises about several processes: the same training as in one, agreement, and death. On a CPU, over gloo.

Processes are forked from this one, with torchrun's environment, which costs half a second where torchrun takes four.
"""

import contextlib
import functools
import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import checkpoint
import processes
import train
from conftest import ROOT, losses, tensors_in
from model import GPT, GPTConfig, init_weights


def kill_all(children):
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def fork(world, function, seconds=120):
    """function(rank) in `world` processes -> [(exit code, what it printed and complained)], by rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children, outputs = [], [os.memfd_create(f"rank{n}") for n in range(world)]
    sys.stdout.flush(), sys.stderr.flush()
    for me in range(world):
        if not (child := os.fork()):
            os.environ.update(RANK=f"{me}", WORLD_SIZE=f"{world}", LOCAL_RANK=f"{me}", LOCAL_WORLD_SIZE=f"{world}",
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")  # fmt: skip
            os.dup2(outputs[me], 1), os.dup2(outputs[me], 2)
            sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
            code = 70
            try:
                code = function(me)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code or 0)
        children.append(child)
    watch = threading.Timer(seconds, kill_all, [children])
    watch.start()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    watch.cancel()
    texts = []
    for fd in outputs:
        os.lseek(fd, 0, os.SEEK_SET)
        with open(fd) as f:
            texts.append(f.read())
    return list(zip(codes, texts, strict=True))


def trained(command, world=2, code=0, before=lambda rank: None):
    """Train with a command line in many processes, after before(rank) in each -> what they printed, by rank."""

    def function(rank):
        before(rank)
        return train.main(command)

    results = fork(world, function)
    assert [c for c, _ in results] == [code] * world, "\n".join(text[-3000:] for _, text in results)
    return [text for _, text in results]


def assert_same_run(got, want, tolerance=1e-12):
    """Two logs tell of the same steps and samples, and of the same losses to a relative tolerance."""
    assert [(r["phase"], r["step"], "val" in r) for r in got] == [(r["phase"], r["step"], "val" in r) for r in want]
    for a, b in zip(got, want, strict=True):
        assert a["tokens"] == b["tokens"] and a.get("epochs") == b.get("epochs") and a.get("lr") == b.get("lr")
        if "val" in a:
            a, b = ({name: (v["loss"], v["tokens"]) for name, v in r["val"].items()} for r in (a, b))
            assert a.keys() == b.keys() and all(a[name] == pytest.approx(b[name], rel=tolerance) for name in a)
        else:
            assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
            assert a["loss_by_source"] == pytest.approx(b["loss_by_source"], rel=tolerance)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * tolerance)


@pytest.fixture
def halves(phases, tmp_path, uninterrupted):
    """The records of one process that takes every batch in two parts, as two processes do."""
    if "halves" not in uninterrupted:
        assert train.main(phases(out="halves", micro_batch=8)) == 0
        uninterrupted["halves"] = losses(tmp_path / "halves")
    return uninterrupted["halves"]


def only(phase, records):
    return [r for r in records if r["phase"] == phase]


def at_step(step, rank, action):
    """-> for trained(before=...): in this rank, do action() when the update of this step (of any phase) begins."""

    def before(me):
        real = train.train_step

        def train_step(model, optimizer, feeder, phase, n, *rest):
            if (phase.name, n) == step and me == rank:
                action()
            return real(model, optimizer, feeder, phase, n, *rest)

        train.train_step = train_step

    return before


def signal_self(number):
    return lambda: os.kill(os.getpid(), number)


# ---------------------------------------------------------------------------------------------------- the same training


@pytest.mark.parametrize("knobs", [{}, {"reshard_after_forward": False}, {"recompute": True}], ids=str)
def test_two_processes_train_as_one_that_takes_the_same_parts_of_a_batch(knobs, phases, tmp_path, halves):
    """To the last bits, over 60 steps. In other parts a sum rounds otherwise, in one process as in two."""
    trained(phases(**knobs))
    assert_same_run(losses(tmp_path / "out"), halves)


@pytest.mark.parametrize(
    "world, micro, knobs", [(2, 2, {}), (2, 2, {"reshard_after_forward": False}), (4, 1, {}), (8, 2, {})], ids=str
)
def test_any_number_of_processes_and_micro_batches_trains_as_one(world, micro, knobs, phases, tmp_path, straight):
    """The held-out windows do not divide by eight."""
    trained(phases("a", micro_batch=micro, **knobs), world)
    assert_same_run(losses(tmp_path / "out", "a"), only("a", straight), 1e-5)


def test_from_two_to_one_to_two_processes_in_the_middle_of_phases(phases, tmp_path, halves):
    trained(phases(), before=at_step(("a", 8), 1, signal_self(signal.SIGTERM)))
    stopped = checkpoint.load_state(checkpoint.find(tmp_path / "out/a"))["step"]
    assert 8 <= stopped <= 9
    with pytest.MonkeyPatch.context() as patch:
        real = train.train_step
        patch.setattr(train, "train_step", real)
        at_step(("b", 12), 0, signal_self(signal.SIGUSR1))(0)
        assert train.main(phases(micro_batch=8)) == 0
    assert 12 <= checkpoint.load_state(checkpoint.find(tmp_path / "out/b"))["step"] <= 13
    trained(phases())
    assert_same_run(losses(tmp_path / "out"), halves)


def test_two_processes_repeat_themselves_bit_for_bit_also_after_a_stop(phases, tmp_path):
    trained(phases("a", out="straight"))
    trained(phases("a"), before=at_step(("a", 7), 0, signal_self(signal.SIGINT)))
    trained(phases("a"))
    assert losses(tmp_path / "out", "a") == losses(tmp_path / "straight", "a")


def test_bf16_in_two_processes_is_as_good_as_in_one(phases, tmp_path):
    """Only norms differ: their weights are gathered in bf16, which 18 steps at so high a rate blow up to 1%."""
    assert train.main(phases("a", out="one", dtype="bfloat16", micro_batch=8)) == 0
    trained(phases("a", dtype="bfloat16"))
    assert_same_run(losses(tmp_path / "out", "a"), losses(tmp_path / "one", "a"), tolerance=2e-2)


def test_a_process_reads_its_slice_of_every_batch(phases, tmp_path):
    def note_reads(rank):
        real = train.Feeder.read

        def read(self, lo, hi):
            with open(tmp_path / f"reads-{rank}", "a") as f:
                print(lo, hi, file=f)
            return real(self, lo, hi)

        train.Feeder.read = read

    trained(phases("a", micro_batch=4), before=note_reads)
    for rank in (0, 1):
        reads = [tuple(map(int, line.split())) for line in (tmp_path / f"reads-{rank}").read_text().splitlines()]
        assert reads == [(lo, lo + 4) for step in range(18) for lo in (16 * step + 8 * rank, 16 * step + 8 * rank + 4)]


def test_every_shard_is_born_with_the_values_of_one_process_and_holds_its_part(tmp_path):
    knobs = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=64, bias=True)
    whole = GPT(GPTConfig(**knobs))
    init_weights(whole, 3)

    def function(rank):
        with processes.joined(30):
            with torch.device("meta"):
                model = GPT(GPTConfig(**knobs))
            train.parallelize(model, train.Config(device="cpu", dtype="float32"))
            model.to_empty(device="cpu")
            init_weights(model, 3, train.my_shard, threads=4)
            optimizer = train.make_optimizer(model, train.Config(), "cpu")
            for p, q in zip(model.parameters(), whole.parameters(), strict=True):
                assert torch.equal(p.full_tensor(), q)
            assert torch.equal(model.cos, whole.cos) and torch.equal(model.sin, whole.sin)
            # 3 of 4 numbers are moments; counters of updates are not shared out
            counters = 4 * len(list(model.parameters()))
            assert (
                checkpoint.local_bytes(train.tensors_of(model, optimizer)) == 3 * 4 * whole.num_params() / 2 + counters
            )
        return 0

    assert [code for code, _ in fork(2, function)] == [0, 0]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("again", [False, True])
def test_compiled_blocks_give_the_losses_of_eager_ones(again, world, phases, tmp_path, straight, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
        trained(phases("a", compile="yes", recompute=again, budget=60 * 512), world)
    assert_same_run(losses(tmp_path / "out", "a"), only("a", straight), 1e-5)


def test_bad_numbers_in_one_process_leave_the_update_out_in_all(phases, tmp_path):
    def poison(value):
        def before(rank):
            real, calls = GPT.forward, [-2]

            def forward(self, *args, **kwargs):
                out = real(self, *args, **kwargs)
                calls[0] += torch.is_grad_enabled()
                bad = torch.is_grad_enabled() and calls[0] == 5 and rank == 1
                return (out[0] * value, *out[1:]) if bad else out

            GPT.forward = forward

        return before

    def leave_out(rank):
        real, calls = torch.optim.AdamW.step, [0]

        def step(self, *args):
            calls[0] += 1
            return None if calls[0] == 5 else real(self, *args)

        torch.optim.AdamW.step = step

    trained(phases("a", out="left_out"), before=leave_out)
    trained(phases("a"), before=poison(math.nan))
    got, want = losses(tmp_path / "out", "a"), losses(tmp_path / "left_out", "a")
    assert [r["step"] for r in got if r.get("loss", 0) is None] == [5]
    assert [r for r in got if r["step"] != 5] == [r for r in want if r["step"] != 5]
    a, b = (tensors_in(checkpoint.find(tmp_path / out / "a")) for out in ("out", "left_out"))
    assert a["optimizer.wte.weight.step"] == 17
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------------------- agreement


def one_message(results, *words):
    """All ended with code 2, one of them said one line, and it has these words."""
    assert [code for code, _ in results] == [2] * len(results), results
    said = [line for _, text in results for line in text.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1 and all(word in said[0] for word in words), results
    assert not any("Traceback" in text for _, text in results), results


def test_a_mistake_gets_one_message_from_all_processes_and_writes_nothing(phases, tmp_path, data):
    def refused(*knobs, words, command=None, only_1=lambda: None):
        def function(rank):
            if rank == 1:
                only_1()
            return train.main([*(command or phases("a")), *knobs])

        one_message(fork(2, function), *words)
        assert not (tmp_path / "out").exists()

    other_config = [str(tmp_path / "other" / "a.py"), *phases("a")[1:]]
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "a.py", tmp_path / "other" / "a.py")
    with open(tmp_path / "other" / "a.py", "a") as f:
        f.write("import os\nif os.environ['RANK'] == '1':\n    lr = 0.5\n")
    other_data = tmp_path / "other-data"
    shutil.copytree(data, other_data)
    meta = json.loads((other_data / "code" / "meta.json").read_text())
    meta["train"]["shards"][0]["sha256"] = "0" * 64
    (other_data / "code" / "meta.json").write_text(json.dumps(meta))

    def with_data(folder):
        real = train.Source
        train.Source = lambda path, *knobs: real(Path(folder) / path.name, *knobs)

    refused("--lerning_rate=1", words=["lerning_rate"])
    refused("--batch=480", words=["rows of 32 are not a multiple of 2 processes"])
    refused("--micro_batch=16", words=["micro_batch = 16 rows on each of 2 processes; 8 would be"])
    refused("--init_from=nowhere", words=["no checkpoint under nowhere"])
    refused(command=other_config, words=["a.lr is 0.01 in process 0 but 0.5 in process 1"])
    refused(only_1=lambda: with_data(other_data), words=["data.a.sources.code.sha256", "process 1"])
    refused(only_1=lambda: with_data(tmp_path / "nowhere"), words=["nowhere/code", "prepare.py"])


def test_a_checkpoint_of_something_else_gets_one_message_and_stays(phases, tmp_path):
    trained(phases("a"))
    records = losses(tmp_path / "out", "a")
    for knobs, words in (
        (["--n_embd=128"], ["n_embd = 64"]),
        (["--seed=2"], ["seed was 1"]),
        (["--batch=1024"], ["batch"]),
    ):
        one_message(fork(2, lambda rank, knobs=knobs: train.main([*phases("a"), *knobs])), *words)
    assert losses(tmp_path / "out", "a") == records


def test_processes_that_see_other_checkpoints_do_not_train(phases, tmp_path):
    """Two machines with a disk each, and on one of them weights of another run."""
    trained(phases("a", out="0/out"), before=at_step(("a", 7), 0, signal_self(signal.SIGINT)))
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    newest = checkpoint.find(tmp_path / "1/out/a")
    state, other = checkpoint.load_state(newest), {name: x + 1 for name, x in tensors_in(newest).items()}
    checkpoint.save(newest.parent, state["step"], other, state, keep=9)

    def function(rank):
        os.chdir(tmp_path / str(rank))
        return train.main([*phases("a"), "--out=out"])

    one_message(fork(2, function), "checkpoint is", "must agree")


def test_a_damaged_checkpoint_is_named_once_and_the_one_before_is_used(phases, tmp_path):
    trained(phases("a", out="straight"))
    trained(phases("a"))
    newest = sorted((tmp_path / "out/a/checkpoints").iterdir())[-1]
    for name, harm in (("__1_0.distcp", "flip"), (".metadata", "cut"), ("state.json", "gone")):
        path = newest / name
        blob = bytearray(path.read_bytes())
        if harm == "gone":
            path.unlink()
        else:
            blob[len(blob) // 2] ^= 1
            path.write_bytes(blob if harm == "flip" else blob[:-1])
        said = "".join(trained(phases("a")))
        assert said.count(f"{newest}: {name} is ") == 1 and said.count("the one before") == 1
        assert losses(tmp_path / "out", "a") == losses(tmp_path / "straight", "a")
        assert checkpoint.damage(newest) is None  # written again


def test_fresh_moves_the_old_run_aside_once_and_not_again_after_a_restart(phases, tmp_path):
    trained(phases("a"))
    trained([*phases("a"), "--fresh"])
    restarted = [*phases("a"), "--fresh"]
    # of two machines only one has seen the death
    trained(restarted, before=lambda rank: os.environ.update(TORCHELASTIC_RESTART_COUNT=f"{rank}"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "a.old-1"]


# ------------------------------------------------------------------------------------------------------------ stopping


@pytest.mark.parametrize(
    ("moment", "rank", "number"),
    [
        ("rehearse", 0, signal.SIGINT),
        ("rehearse", 1, signal.SIGTERM),
        ("evaluate", 0, signal.SIGINT),
        ("evaluate", 1, signal.SIGTERM),
        ("save", 0, signal.SIGTERM),
        ("save", 1, signal.SIGUSR1),
        ("step", 0, signal.SIGTERM),
        ("step", 1, signal.SIGINT),
    ],
)
def test_a_signal_to_one_process_stops_all_of_them_with_a_checkpoint(moment, rank, number, phases, tmp_path, halves):
    command, calls = phases("a"), []

    def before(me):
        where = checkpoint if moment == "save" else train
        name = "train_step" if moment == "step" else moment
        real = getattr(where, name)

        def function(*args):
            calls.append(1)
            if me == rank and len(calls) == (2 if moment in ("evaluate", "save") else 1):
                os.kill(os.getpid(), number)
            return real(*args)

        setattr(where, name, function)

    start = time.time()
    said = trained(command, before=before)
    assert time.time() - start < 30
    if moment == "rehearse":
        assert f"{number.name}: stopped before this start made a step" in said[0] and not said[1]
        assert not (tmp_path / "out/a/checkpoints").exists()
        trained(command)
        assert_same_run(losses(tmp_path / "out", "a"), only("a", halves))
        return
    assert f"{number.name}: stopped and saved at step" in said[0] and not said[1]
    state = checkpoint.load_state(checkpoint.find(tmp_path / "out/a"))
    low = {"evaluate": 8, "save": 10, "step": 1}[moment]
    assert low <= state["step"] <= low + 2 and state["evaluated"] == {"evaluate": 0}.get(moment, state["step"] // 8 * 8)
    assert not list((tmp_path / "out/a/checkpoints").glob("*.tmp"))
    trained(command)
    assert_same_run(losses(tmp_path / "out", "a"), only("a", halves))


def test_a_process_that_hangs_is_named_by_the_others(phases, tmp_path):
    def hang():
        os.kill(os.getpid(), signal.SIGSTOP)

    def function(rank):
        at_step(("a", 6), 1, hang)(rank)
        at_step(("a", 6), 3, lambda: time.sleep(2))(rank)  # hears of it from those who waited before it did
        return train.main(phases("a", timeout=15))  # less, and a slow machine's others seem to hang too

    start = time.time()
    results = fork(4, function, seconds=60)
    assert time.time() - start < 62
    assert [code for code, _ in results] == [1, -signal.SIGKILL, 1, 1]
    for rank in (0, 2, 3):
        assert f"process {rank}: process 1 of 4 has not answered for 15 s" in results[rank][1], results


def test_torchrun_brings_a_killed_process_back_and_nothing_is_lost(phases, tmp_path):
    trained(phases("a", out="straight"))
    killer = tmp_path / "killer.py"
    killer.write_text(
        "import os, signal, sys\nimport train\nreal = train.train_step\n"
        "def train_step(model, optimizer, feeder, phase, n, *rest):\n"
        "    if n == 13 and os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(model, optimizer, feeder, phase, n, *rest)\n"
        "train.train_step = train_step\n"
        "train.processes.leave(train.main(sys.argv[1:]))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    done = subprocess.run(
        [*torchrun, killer, *phases("a")], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 5 of a" in done.stdout or "step 10 of a" in done.stdout  # which may not have been written by then
    assert losses(tmp_path / "out", "a") == losses(tmp_path / "straight", "a")


def test_workers_of_a_killed_torchrun_save_and_end(phases, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    agent = subprocess.Popen([*torchrun, *phases("a", budget="1M", save_every=100_000)], cwd=ROOT,
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    for line in agent.stdout:
        if line.startswith("a ") and "loss" in line:
            agent.kill()
            break
    end = time.time() + 30
    while time.time() < end and not (tmp_path / "out/a/checkpoints").is_dir():
        time.sleep(0.1)
    rest = agent.stdout.read()  # until the workers have ended
    agent.wait()
    assert "SIGTERM: stopped and saved" in rest
    assert checkpoint.find(tmp_path / "out/a")


def test_processes_of_one_start_meet_in_a_store_that_remembers_others():
    """As on several machines, where torchrun keeps its store and nothing else says which start it is."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def start(ranks):
        stores = {n: dist.TCPStore("127.0.0.1", server.port, timeout=timedelta(seconds=2)) for n in ranks}
        with ThreadPoolExecutor(len(ranks)) as pool:
            return [pool.submit(processes.fresh, store, n, 3, 2) for n, store in stores.items()]

    for ranks in [(0, 1), (0, 1, 2), (1, 2), (0, 1, 2)]:  # some died before all were there
        found = start(ranks)
        if len(ranks) < 3:
            assert isinstance(found[0].exception(), (processes.PeerError, dist.DistError))
            continue
        stores = [one.result() for one in found]
        assert not stores[0].check(["turn"])
        stores[0].set("turn", "")
        assert all(store.check(["turn"]) for store in stores)


# -------------------------------------------------------------------------------------------------------------- saving


def test_a_disk_that_is_full_for_one_process_stops_all_with_one_message_and_keeps_the_last_checkpoint(phases, tmp_path):
    trained(phases("a", out="straight"))

    def function(rank):
        real = checkpoint.save

        def save(root, step, *rest):
            if rank == 1 and step == 15:  # tensors do not fit, the log of the other process does
                resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
            return real(root, step, *rest)

        checkpoint.save = save
        return train.main(phases("a"))

    one_message(fork(2, function), "could not save", "step-00000015: File too large; run the same command again")
    assert sorted(p.name for p in (tmp_path / "out/a/checkpoints").iterdir()) == ["step-00000005", "step-00000010"]
    trained(phases("a"))
    assert losses(tmp_path / "out", "a") == losses(tmp_path / "straight", "a")


def test_training_goes_on_while_a_checkpoint_is_written_and_cannot_change_it(phases, tmp_path, monkeypatch):
    assert train.main(phases("a", out="straight", keep=9)) == 0
    real, steps, at_save = checkpoint.save, [], {}

    def train_step(*args):
        steps.append(args[4])
        return real_step(*args)

    def slow_save(root, step, *args):
        time.sleep(0.1)
        at_save[step] = len(steps)
        return real(root, step, *args)

    real_step = train.train_step
    monkeypatch.setattr(train, "train_step", train_step)
    monkeypatch.setattr(checkpoint, "save", slow_save)
    assert train.main(phases("a", keep=9)) == 0
    assert all(at_save[step] > step for step in (5, 10, 15))  # steps were made while it waited
    for step in (5, 10, 15, 18):
        a, b = (tensors_in(tmp_path / out / f"a/checkpoints/step-{step:08d}") for out in ("straight", "out"))
        assert all(torch.equal(a[name], b[name]) for name in b)
    steps.clear()
    monkeypatch.setattr(checkpoint, "free_memory", lambda: 1000)  # no room for a copy: training waits
    assert train.main([*phases("a"), "--fresh"]) == 0
    assert all(at_save[step] == step for step in (5, 10, 15))


def test_only_a_second_ctrl_c_interrupts():
    with train.Stop() as stop:
        for number in (signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.agreed() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_goes_wrong_in_one_process_only_is_said_by_that_one(phases):
    def read(self, lo, hi):
        raise OSError(5, "Input/output error", "train-00000.bin")

    def function(rank):
        if rank == 1:
            train.Feeder.read = read
        return train.main(phases("a"))

    (_, first), (code, second) = fork(2, function)
    assert code == 2 and "train-00000.bin" in second and "another one died" in first


def test_an_answer_is_agreed_one_question_later_and_by_all():
    def function(rank):
        with processes.joined(10), train.Stop() as stop:
            answers = []
            for turn in range(6):
                if turn == 1 and rank == 1:
                    os.kill(os.getpid(), signal.SIGUSR1)
                answers.append(stop.agreed(failed=turn == 3 and rank == 0))
            # a failure stays, whoever asks next: a loop inside the loop may get the answer
            assert answers == [None, None, "SIGUSR1", "SIGUSR1", "failed", "failed"], answers
            with pytest.raises(train.ConfigError, match="only here"), processes.together():
                if rank == 1:
                    raise train.ConfigError("only here")
            assert processes.gather(rank) == [0, 1]
            assert processes.from_first(lambda: dist.get_rank()) == 0
        return 0

    assert [code for code, _ in fork(2, function)] == [0, 0]
