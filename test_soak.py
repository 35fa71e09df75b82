"""Two processes, killed and stopped at random moments of three phases, end with the log of a run that was left alone.

    python test_soak.py --deaths=30 --seed=1        # prints every death; the suite runs four of them

Losses of every step must agree to the last bit, which they do not if a sample is lost or repeated or if a torn
checkpoint is loaded.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import PHASES, ROOT, losses

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


def workers(agent):
    """Process numbers of torchrun's two workers, which lead sessions of their own."""
    found = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


def has_come(moment, out, before):
    """Whether a run under way has got to a moment that it had not reached `before` (what snapshot() said then)."""
    now = snapshot(out)
    return {
        "any time": now["steps"] > before["steps"] + 2,
        "a save": any(out.glob("*/checkpoints/*.tmp")) and now["steps"] > before["steps"],
        "an evaluation": now["steps"] > before["steps"] and now["steps"] % 8 == 0,
        "a phase change": now["phases"] > before["phases"],
        "the start": True,
    }[moment]


def snapshot(out):
    logs = [path.read_bytes().count(b'"grad_norm"') for path in out.glob("*/log.jsonl")]
    return {"steps": sum(logs), "phases": len(logs)}


def strike(way, agent, dice):
    ranks = workers(agent)
    targets = {
        "kill -9 of one rank": [(dice.choice(ranks), signal.SIGKILL)] if ranks else [],
        "kill -9 of all ranks": [(pid, signal.SIGKILL) for pid in ranks],
        "kill -9 of torchrun": [(agent.pid, signal.SIGKILL)],
        "a signal to one rank": [(dice.choice(ranks), dice.choice(SIGNALS))] if ranks else [],
        "SIGTERM to torchrun": [(agent.pid, signal.SIGTERM)],
    }[way]
    for pid, number in targets:
        with_it = number.name
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return ""
    return f"{way} ({with_it})" if targets else ""


def soak(command, out, deaths, seed):
    """Run `command` under torchrun until it ends, through so many deaths; returns them as (way, moment, steps done)."""
    dice, struck = random.Random(seed), []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(20 * deaths + 5):
        launch = [sys.executable, *TORCHRUN, f"--max-restarts={dice.choice((0, 1))}", "train.py", *command]
        agent = subprocess.Popen(launch, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        way, moment, before = dice.choice(WAYS), dice.choice(MOMENTS), snapshot(out)
        delay, patience = dice.uniform(0, 6 if moment == "the start" else 0.05), time.monotonic() + 90
        while agent.poll() is None and time.monotonic() < patience and len(struck) < deaths:
            late = snapshot(out)["steps"] > before["steps"] + 40
            if (late or has_come(moment, out, before)) and (moment == "the start" or workers(agent)):
                time.sleep(delay)
                if done := agent.poll() is None and strike(way, agent, dice):
                    struck.append((done, moment, snapshot(out)["steps"]))
                    print(f"{len(struck):>3}  {done} at {moment}, {struck[-1][2]} steps logged", flush=True)
                break
            time.sleep(0.002)
        agent.communicate(timeout=90)  # until its workers have ended too: they hold the pipe
        if agent.returncode == 0 and len(struck) == deaths:
            return struck
    raise AssertionError(f"no end after {len(struck)} deaths; torchrun's code was {agent.returncode}")


def check(folder, phases, deaths, seed):
    """phases: function from knobs to a command line, as in conftest.py."""
    steps = 60 * max(3, deaths)  # some twenty of them pass between two deaths
    command = [sys.executable, *TORCHRUN, "train.py", *phases(out="straight", budget=steps * 512)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    straight = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert straight.returncode == 0, straight.stderr[-2000:]
    struck = soak(phases(budget=steps * 512), folder / "out", deaths, seed)
    assert losses(folder / "out") == losses(folder / "straight")
    assert not [path for name in PHASES for path in (folder / "out" / name / "checkpoints").glob("*.old")]
    return struck


def test_a_run_through_random_deaths_is_the_uninterrupted_one_bit_for_bit(phases, tmp_path):
    assert len(check(tmp_path, phases, deaths=4, seed=5)) == 4


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deaths", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    from conftest import prepare_data, write_phases

    with tempfile.TemporaryDirectory() as name:
        start = time.time()
        struck = check(
            Path(name), write_phases(Path(name), prepare_data(Path(name) / "corpus")), args.deaths, args.seed
        )
    print(f"{len(struck)} deaths in {time.time() - start:.0f} s: log complete, every loss the same")
