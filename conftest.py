"""What several test files share: real data, three tiny phases, and what their uninterrupted run logged."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two busy processes on shared cores make OpenMP crawl; before torch

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import train

ROOT = Path(__file__).parent
torch.set_num_threads(1)


def run(*args, cwd=ROOT, **kwargs):
    """A command line of the project -> CompletedProcess with text output."""
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, **kwargs)


def prepare_data(folder):
    """Prepared sources `text` and `code`, 512 ids, from this Python's help topics and library."""
    from pydoc_data.topics import topics

    folder.mkdir(exist_ok=True)
    for name in ("text", "code"):
        (folder / name).mkdir()
    for name, topic in topics.items():
        (folder / "text" / f"{name}.txt").write_text(topic)
    for path in sorted(Path(json.__file__).parent.parent.glob("[a-d]*.py")):
        shutil.copy(path, folder / "code")
    sources = [f"{name}={folder / name}" for name in ("text", "code")]
    run("prepare.py", *sources, f"--out={folder / 'data'}", "--vocab_size=512", "--val=0.05", check=True)
    return folder / "data"


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return prepare_data(tmp_path_factory.mktemp("corpus"))


PHASES = ("a", "b", "c")


def write_phases(folder, data):
    """Three tiny phases, a.py b.py c.py, into a folder -> function to a command line that trains them there."""
    common = (
        "n_layer, n_head, n_embd, block_size = 1, 2, 64, 32\nbudget = 60 * 512\nbatch = 512\nlr, warmup = 1e-2, 3\n"
        "dtype, device = 'float32', 'cpu'\nlog_every, eval_every, save_every = 1, 8, 5\neval_tokens = 2048\n"
    )
    for i, name in enumerate(PHASES):
        mix = {"text": 0.9 - 0.4 * i, "code": 0.1 + 0.4 * i}
        extra = {"b": "beta1, weight_decay = 0.8, 0.2\n", "c": "carry_optimizer = True\nlog_every = 3\n"}.get(name, "")
        (folder / f"{name}.py").write_text(f"{common}{extra}mix = {mix}\nshare = {[0.3, 0.5, 0.2][i]}\nlr_end = 1e-3\n")

    def command(*names, out="out", **knobs):
        files = [str(folder / f"{name}.py") for name in names or PHASES]
        return [*files, f"--data={data}", f"--out={folder / out}", *(f"--{k}={v}" for k, v in knobs.items())]

    return command


@pytest.fixture
def phases(tmp_path, data):
    return write_phases(tmp_path, data)


def losses(folder, names=PHASES):
    """Every training and evaluation record of a run, in file order, without what depends on the clock."""
    records = []
    for name in names:
        for line in (folder / name / "log.jsonl").read_text().splitlines():
            record = json.loads(line)
            if "event" not in record:
                records.append({k: v for k, v in record.items() if k not in ("tok_per_s", "mfu")})
    return records


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    return {}


@pytest.fixture
def straight(phases, tmp_path, uninterrupted):
    """The records of a run of all three phases that nothing interrupted."""
    if "records" not in uninterrupted:
        assert train.main(phases(out="straight")) == 0
        uninterrupted["records"] = losses(tmp_path / "straight")
    return uninterrupted["records"]


def tensors_in(folder):
    """All tensors of a checkpoint, whole, by name: model.wte.weight, optimizer.wte.weight.exp_avg, ..."""
    found = checkpoint.Reader(folder).metadata.state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in found.items()}
    checkpoint.load(folder, tensors)
    return tensors
