"""Save, find and load checkpoints that a crash, a full disk or a flipped bit cannot turn into a wrong run.

    out/<phase>/checkpoints/step-00001500/
        model.pt  optimizer.pt     tensors, written and read by torch (weights_only: a checkpoint is data, never code)
        state.json                 everything else: phase, step, tokens, positions in the data, configuration
        complete.json              sha256 of the other files; written last, so a folder without it does not count

A checkpoint is written under another name and renamed when it is on the disk. Knows neither model nor data.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch

MARKER = "complete.json"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or could not be written; the message says which and what to do."""


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sync(path):
    """Wait until a file or folder is on the disk, not only in the operating system's memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path, value):
    """Write and sync; the name appears only with the whole content behind it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    sync(temporary)
    temporary.rename(path)


def save(root, step, tensors, state, keep):
    """Write root/step-XXXXXXXX and delete all but the newest `keep` complete ones. Returns its path.

    tensors: {"model": state dict, "optimizer": ...}, one file each. state: JSON-able dict. If anything goes wrong, what
    was there before is still there, and CheckpointError says why.
    """
    root = Path(root)
    final, temporary = root / f"step-{step:08d}", root / f"step-{step:08d}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, value in tensors.items():
            with open(temporary / f"{name}.pt", "wb") as f:
                torch.save(value, f)
                f.flush()
                os.fsync(f.fileno())
        write_json(temporary / "state.json", state)
        write_json(temporary / MARKER, {path.name: sha256(path) for path in sorted(temporary.iterdir())})
        sync(temporary)
        if final.exists():  # the same step again; under the name .old it still counts if we die before the next line
            final.rename(final.with_suffix(".old"))
        temporary.rename(final)
        sync(root)
        shutil.rmtree(final.with_suffix(".old"), ignore_errors=True)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        failure = error if isinstance(error, OSError) else error.__context__  # torch wraps a failed write
        if not isinstance(failure, OSError):
            raise
        raise CheckpointError(
            f"could not save {final}: {failure.strerror}; free some space and run the same command again,"
            " it continues from the last checkpoint"
        ) from error
    for old in complete(root)[:-keep]:
        shutil.rmtree(old)
    return final


def complete(root):
    """Folders under root whose marker exists, oldest first."""
    return sorted(marker.parent for marker in Path(root).glob("step-*/" + MARKER) if marker.parent.suffix != ".tmp")


def damage(folder):
    """Why a complete checkpoint cannot be used, or None: names the first file that is missing or changed."""
    try:
        expected = json.loads((folder / MARKER).read_text())
        for name, digest in expected.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if sha256(folder / name) != digest:
                return f"{name} is not what was written (sha256 differs)"
    except (OSError, ValueError) as error:
        return f"{MARKER} is unreadable ({error})"
    return None


def latest(root):
    """Newest undamaged checkpoint under root, or None. Damaged ones are named on stderr and passed over."""
    for folder in reversed(complete(root)):
        if not (why := damage(folder)):
            return folder
        print(f"checkpoint {folder}: {why}; using the one before", file=sys.stderr)
    return None


def find(path):
    """A checkpoint from what a person types: a step folder, or an out/<phase> folder (then its newest)."""
    path = Path(path)
    if path.name.startswith("step-"):
        if not (path / MARKER).is_file():
            raise CheckpointError(f"{path} is not a complete checkpoint (no {MARKER} in it)")
        if why := damage(path):
            raise CheckpointError(f"checkpoint {path}: {why}")
        return path
    if (folder := latest(path / "checkpoints")) is None:
        phases = sorted({str(marker.parents[2]) for marker in path.glob(f"*/checkpoints/step-*/{MARKER}")})
        hint = f"; there are {', '.join(phases)}" if phases else ""
        raise CheckpointError(f"no checkpoint under {path}{hint}")
    return folder


def weights_sha256(folder):
    """What tells the weights of a complete checkpoint from any others."""
    return json.loads((Path(folder) / MARKER).read_text())["model.pt"]


def load_state(folder):
    return json.loads((Path(folder) / "state.json").read_text())


def load_tensors(folder, name, device="cpu"):
    """What `save` got as tensors[name], on `device`."""
    return torch.load(Path(folder) / f"{name}.pt", map_location=device, weights_only=True)
