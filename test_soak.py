"""Two processes, killed and stopped at random moments of three phases, end with the log of a run that was left alone.

    python test_soak.py --deaths=30 --seed=1        # prints every death; the suite runs four of them

Losses of every step must agree to the last bit, which they do not if a sample is lost or repeated or if a torn
checkpoint is loaded.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import PHASES, ROOT, losses, prepare_data, write_phases
from test_processes import trained

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
MOMENTS = ("any time", "a save", "an evaluation", "a phase change", "the start")
WAYS = (
    "kill -9 of one rank",
    "kill -9 of all ranks",
    "kill -9 of torchrun",
    "a signal to one rank",
    "SIGTERM to torchrun",
)


def progress(out):
    """Steps of the whole run, and the sizes of its logs, one of which changes as soon as a process trains."""
    steps, sizes = 0, []
    for path in sorted(out.glob("*/log.jsonl")):
        with open(path, "rb") as f:
            sizes.append(f.seek(0, os.SEEK_END))
            f.seek(max(0, sizes[-1] - 4096))
            lines = f.read().rpartition(b"\n")[0].splitlines()  # the last one may be half there
        steps += json.loads(lines[-1])["step"] if lines else 0
    return steps, sizes


def is_now(moment, step, out):
    return {"a save": any(out.glob("*/checkpoints/*.tmp")), "an evaluation": step % 8 == 0}.get(moment, True)


def workers(agent):
    """Process numbers of torchrun's two workers."""
    found = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


def strike(way, agent, ranks, dice):
    """Name of the signal that was sent."""
    targets, number = {
        "kill -9 of one rank": ([dice.choice(ranks)], signal.SIGKILL),
        "kill -9 of all ranks": (ranks, signal.SIGKILL),
        "kill -9 of torchrun": ([agent.pid], signal.SIGKILL),
        "a signal to one rank": ([dice.choice(ranks)], dice.choice(SIGNALS)),
        "SIGTERM to torchrun": ([agent.pid], signal.SIGTERM),
    }[way]
    for pid in targets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return number.name


def strike_when(due, moment, way, agent, out, dice):
    """Wait for step `due` and the moment, and strike: -> (step, signal), or None if torchrun ended before."""
    end, (_, before) = time.monotonic() + 120, progress(out)
    wait = dice.uniform(0, {"the start": 6, "a save": 0.01}.get(moment, 0.05))
    while agent.poll() is None:
        assert time.monotonic() < end, f"{moment} from step {due} on did not come"
        step, sizes = progress(out)
        if moment == "the start" or (sizes != before and step >= due and is_now(moment, step, out)):
            time.sleep(wait)
            if len(ranks := workers(agent)) == 2:
                sent = strike(way, agent, ranks, dice)
                while agent.poll() is None and (set(ranks) & set(now := workers(agent)) or len(now) < 2):
                    assert time.monotonic() < end, f"neither an end nor a restart after {way}"
                    time.sleep(0.02)
                return step, sent
        time.sleep(0.005)
    return None


def plan_deaths(deaths, ends, dice):
    """[(step from which on to strike, moment, way)] in order; ends: the last step of every phase, in the run."""
    plan = []
    for n in range(deaths):
        moment, way = MOMENTS[n % len(MOMENTS)], dice.choice(WAYS)
        plan.append(
            (dice.choice(ends[:-1]) if moment == "a phase change" else dice.randrange(ends[-1] - 40), moment, way)
        )
    return sorted(plan)


def soak(command, out, plan, dice):
    """Run `command` under torchrun, anew whenever it has ended, through all deaths of the plan and to its end."""

    def launch():
        restarts = f"--max-restarts={dice.choice((0, 1))}"
        return subprocess.Popen(
            [sys.executable, *TORCHRUN, restarts, "train.py", *command],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    agent = launch()
    for n, (due, moment, way) in enumerate(plan, 1):
        struck = strike_when(due, moment, way, agent, out, dice)
        assert struck, f"it ended too early: {agent.communicate()[1]}"
        print(f"{n:>3}  step {struck[0]:>4}  {moment:<14}  {way} ({struck[1]})", flush=True)
        if agent.poll() is not None:
            agent.communicate(timeout=120)  # until its workers have ended too: they hold the pipe
            agent = launch()
    said = agent.communicate(timeout=300)[1]
    assert agent.returncode == 0, said


def check(folder, phases, deaths, seed):
    """phases: function from knobs to a command line, as in conftest.py."""
    steps, dice = 80 * math.ceil(deaths / 4), random.Random(seed)  # so that phases are multiples of eval_every
    budget = steps * 512
    trained(phases(out="straight", budget=budget))
    ends = list(itertools.accumulate(round(share * steps) for share in (0.3, 0.5, 0.2)))
    # a worker whose torchrun is killed before it can be told waits for so long
    soak(phases(budget=budget, timeout=40), folder / "out", plan_deaths(deaths, ends, dice), dice)
    assert losses(folder / "out") == losses(folder / "straight")
    assert not [path for name in PHASES for path in (folder / "out" / name / "checkpoints").glob("*.old")]


def test_a_run_through_random_deaths_is_the_uninterrupted_one_bit_for_bit(phases, tmp_path):
    check(tmp_path, phases, deaths=4, seed=5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deaths", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        check(folder, write_phases(folder, prepare_data(folder / "corpus")), args.deaths, args.seed)
    print(f"{args.deaths} deaths in {time.monotonic() - start:.0f} s: log complete, every loss the same")
