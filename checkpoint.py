"""Save, find and load checkpoints that a crash, a full disk or a flipped bit cannot turn into a wrong run.

    out/<phase>/checkpoints/step-00001500/
        __0_0.distcp  __1_0.distcp ...  .metadata   tensors, in the layout of torch.distributed.checkpoint: every
                                                    process writes its shards, any number of processes reads them
        state.json                                  phase, step, tokens, positions in the data, configuration
        complete.json                               sha256 of the other files; written last: a folder without it does
                                                    not count

A checkpoint is written under another name, by a thread beside the training, and renamed when it is on the disk. It is
data: reading it runs none of its code. Knows neither model nor data.
"""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

import files
import processes
from errors import UserError
from processes import gather, rank, together

warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")  # as intended
MARKER, TENSORS = "complete.json", "*.distcp"
STEP = re.compile(r"step-\d{8,}(\.old)?")  # what a complete checkpoint is called; copies by other names are a person's
OURS = re.compile(r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|(state|complete)\.json(\..+\.tmp)?")  # files in it
STATE = {  # of state.json, what everybody reads; how to go on with training says train.py
    "phase": str, "step": int, "tokens": int, "model": {}, "config": {"data": str, "mix": {}, "objective": {}},
    "tokenizer": (None, {"name": str, "vocab_size": int, "sha256": str}), "start": {...: int}, "drawn": {...: int},
    "first_token": int, "sample": int, "mix": {"sources": {...: {"sha256": str}}},
}  # fmt: skip


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or could not be written; the message says which and what to do."""


def for_all(message):
    """The error, to be raised, of something that all processes did together: one of them is enough to say it."""
    error = CheckpointError(message)
    error.by_all = True
    return error


# ------------------------------------------------------------------------------------------------------------- saving


def save(root, step, tensors, state, keep, group=None):
    """Write root/step-XXXXXXXX and keep the newest `keep` - 1 others; called by all processes at once.

    tensors: nested dicts of tensors and DTensors. state: JSON-able dict, rank 0's is written. group: of processes. If
    anything goes wrong, what was there before is still there, and all processes raise CheckpointError, which says why.
    """
    final, first = Path(root) / f"step-{step:08d}", rank() == 0
    temporary = final.with_suffix(".tmp")
    try:
        with together(group):
            if first:
                for left in Path(root).glob("step-*.tmp"):
                    if re.fullmatch(r"step-\d{8,}\.tmp", left.name):
                        remove(left)
                temporary.mkdir(parents=True, exist_ok=True)
        with together(group):
            if not temporary.is_dir():
                raise CheckpointError(f"{root} is not the same folder for all processes; --out must be a shared one")
        dcp.save(tensors, storage_writer=Writer(temporary), process_group=group, no_dist=not dist.is_initialized())
        with together(group):
            digests = {path.name: files.sha256(path) for path in temporary.glob(f"__{rank()}_{TENSORS}")}
        digests = {name: digest for one in gather(digests, group) for name, digest in one.items()}
        with together(group):
            if first:
                files.write_json(temporary / "state.json", state)
                digests |= {name: files.sha256(temporary / name) for name in (".metadata", "state.json")}
                files.write_json(temporary / MARKER, digests)
                publish(temporary, final)
                others = [folder for folder in complete(root) if folder != final]
                for old in others[: max(0, len(others) + 1 - keep)]:
                    remove(old)
    except (OSError, RuntimeError, CheckpointError, CheckpointException) as error:
        if first:
            remove(temporary)
        if not (problem := disk_problem(error)):
            raise
        full = problem.errno in (errno.ENOSPC, errno.EDQUOT)
        raise for_all(
            f"could not save {final}: {problem.strerror}; {'free some space and ' if full else ''}run the same command"
            " again, it continues from the last checkpoint"
        ) from error
    return final


def publish(temporary, final):
    """Give a written checkpoint its name; a death at any line leaves a complete one."""
    files.sync(temporary)
    old = final.with_suffix(".old")
    if final.exists():  # the same step again; as .old it still counts
        remove(old)
        final.rename(old)
    temporary.rename(final)
    files.sync(final.parent)
    remove(old)


def remove(folder):
    """Delete what a checkpoint consists of, its marker first. What a person has put beside that stays where it is."""
    names = os.listdir(folder) if folder.is_dir() else []
    for name in sorted(filter(OURS.fullmatch, names), key=lambda name: name != MARKER):
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    with contextlib.suppress(OSError):  # not empty, or not there
        folder.rmdir()


class Writer(dcp.FileSystemWriter):
    """The library's, which syncs its files, but says what the disk said, where that is buried in torch.save's error."""

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def disk_problem(error):
    """The operating system's error, in whichever process; None if something else went wrong."""
    inner = [e for e, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    return next((e for e in inner if isinstance(e, OSError)), None)


class Saver:
    """Saves in a thread, one checkpoint at a time, while training changes the tensors."""

    def __init__(self):
        self.thread, self.pending = ThreadPoolExecutor(1, initializer=processes.claim_gpu), None

    def save(self, root, step, tensors, state, keep):
        """Like `save`, of the tensors as they are now: at once if memory has room for a copy, else it waits."""
        self.wait()
        if any(gather(local_bytes(tensors) > free_memory())):
            save(root, step, tensors, state, keep, processes.saving)
        else:
            self.pending = self.thread.submit(save, root, step, copied(tensors), state, keep, processes.saving)

    def failed(self):
        return bool(self.pending and self.pending.done() and self.pending.exception())

    def wait(self):
        """Until the last checkpoint is on the disk; raises what saving it raised."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()


def copied(tensors):
    if isinstance(tensors, dict):
        return {name: copied(value) for name, value in tensors.items()}
    return tensors.detach().to("cpu", copy=True)  # a DTensor's own shard


def local_bytes(tensors):
    """Bytes that this process holds of nested dicts of tensors."""
    if isinstance(tensors, dict):
        return sum(map(local_bytes, tensors.values()))
    return (tensors.to_local() if isinstance(tensors, DTensor) else tensors).nbytes


def free_memory():
    """Bytes that this process may still take: its part of what the machine, or its control groups (v2), have left."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:  # not Linux
        return float("inf")
    free = 1024 * int(lines["MemAvailable"].split()[0])
    with contextlib.suppress(OSError, LookupError, ValueError):
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().strip().rpartition("0::/")[2]
        for limit in (folder / "memory.max" for folder in (group, *group.parents)):
            if limit.exists() and (most := limit.read_text().strip()) != "max":
                used = int(limit.with_name("memory.current").read_text())
                kinds = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
                free = min(free, int(most) - used + int(kinds["file"]) - int(kinds["shmem"]))  # cached files may go
    return free // processes.local()[1]


# ------------------------------------------------------------------------------------------------------------ finding


def complete(root):
    """Folders under root whose marker exists, oldest first; what a newer save of the same step replaces, before it."""
    folders = [marker.parent for marker in Path(root).glob("step-*/" + MARKER) if STEP.fullmatch(marker.parent.name)]
    return sorted(folders, key=lambda folder: (int(folder.stem[5:]), not folder.suffix))


def damage(folder):
    """Why a complete checkpoint cannot be used, or None: names the first file that is missing or changed."""
    try:
        expected = files.read_json(folder / MARKER, {...: str})
        names = list(dict.fromkeys([".metadata", "state.json", *expected]))
        for name in names:
            if name not in expected:
                return f"{MARKER} does not list {name}"
            if Path(name).name != name or not (folder / name).is_file():
                return f"{name} is missing"
        with ThreadPoolExecutor(8) as pool:  # hashing lets other threads run
            for name, digest in zip(names, pool.map(files.sha256, [folder / name for name in names]), strict=True):
                if digest != expected[name]:
                    return f"{name} is not what was written (sha256 differs)"
    except (OSError, ValueError, TypeError) as error:
        return f"{MARKER} is unreadable ({error})"
    return None


def latest(root):
    """Newest undamaged checkpoint under root, None if there was never one. Damaged ones are named and passed over."""
    damaged = {}
    for folder in reversed(complete(root)):
        if not (why := damage(folder)):
            for bad, why in damaged.items():
                print(f"checkpoint {bad}: {why}; using {folder.name}, the one before", file=sys.stderr)
            return folder
        damaged[folder] = why
    if damaged:
        newest, why = next(iter(damaged.items()))
        raise CheckpointError(f"checkpoint {newest}: {why}, and there is no other good one")
    return None


def find(path):
    """A checkpoint from what a person types: a step folder, or an out/<phase> folder (then its newest). What is in a
    folder tells which, not its name: a phase may be called step-1."""
    path = Path(path)
    if (path / MARKER).is_file():
        if why := damage(path):
            raise CheckpointError(f"checkpoint {path}: {why}")
        return path
    if (path / "state.json").is_file() or any(path.glob(TENSORS)):
        raise CheckpointError(f"{path} is not a complete checkpoint (no {MARKER} in it)")
    if (folder := latest(path / "checkpoints")) is None:
        phases = sorted({str(marker.parents[2]) for marker in path.glob(f"*/checkpoints/step-*/{MARKER}")})
        hint = f"; there are {', '.join(phases)}" if phases else ""
        raise CheckpointError(f"no checkpoint under {path}{hint}")
    return folder


# ------------------------------------------------------------------------------------------------------------ loading


def weights_sha256(folder):
    """What tells the tensors of a complete checkpoint from any others."""
    digests = json.loads((Path(folder) / MARKER).read_text())
    return hashlib.sha256(
        json.dumps(sorted(v for k, v in digests.items() if k.endswith(".distcp"))).encode()
    ).hexdigest()


def load_state(folder, shape=None):
    """state.json, of a shape as files.misfit has it. CheckpointError."""
    try:
        return files.read_json(Path(folder) / "state.json", shape)
    except UserError as error:
        raise CheckpointError(str(error)) from None


def shapes(folder):
    """{name: torch.Size} of all tensors of a checkpoint: model.wte.weight, optimizer.wte.weight.exp_avg, ..."""
    return {name: entry.size for name, entry in Reader(folder).metadata.state_dict_metadata.items()}


def load(folder, tensors, group=None):
    """Fill tensors, nested dicts like those that were saved or a part of them, in place, from shards of any number.

    Called by all processes at once, or by one that is alone. Raises CheckpointError.
    """
    with together(group):
        reader = Reader(folder)
    try:
        with warnings.catch_warnings():  # about pickles that are no tensors
            warnings.simplefilter("ignore")
            dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=not dist.is_initialized())
    except (CheckpointException, ValueError, OSError) as error:
        failures = error.failures if isinstance(error, CheckpointException) else {0: (error, None)}
        why = str(next(iter(failures.values()))[0]).strip().split("\n")[0]
        raise for_all(f"checkpoint {folder}: {why}") from error


class Reader(dcp.FileSystemReader):
    """Reads tensors and nothing else; the library's own would unpickle `.metadata` and whatever that calls bytes."""

    def __init__(self, folder):
        super().__init__(folder)
        try:
            with open(Path(folder) / ".metadata", "rb") as f:
                self.metadata = PlainUnpickler(f).load()
            if strange := [
                n for n, e in self.metadata.state_dict_metadata.items() if type(e) is not TensorStorageMetadata
            ]:
                raise CheckpointError(f"{strange[0]} is not a tensor")
            hashed = json.loads((Path(folder) / MARKER).read_text())
            if strange := {info.relative_path for info in self.metadata.storage_data.values()} - set(hashed):
                raise CheckpointError(f"{strange.pop()} is not one of its files")
        except Exception as error:  # a pickle may raise any
            raise CheckpointError(f"checkpoint {folder}: {error}") from error

    def read_metadata(self, *args, **kwargs):
        return self.metadata


class PlainUnpickler(pickle.Unpickler):
    """Builds what describes tensors; any other class or function is refused before it is looked up."""

    METADATA = ("Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata",
                "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")  # fmt: skip
    ADMITTED = frozenset(
        {
            *(("torch.distributed.checkpoint.metadata", name) for name in METADATA),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            *(("torch", name) for name in ("Size", "float32", "float64", "bfloat16")),
        }
    )

    def find_class(self, module, name):
        if name == "PosixPath" and module in ("pathlib", "pathlib._local"):  # where it was written, of no use here
            return PurePosixPath
        if (module, name) not in self.ADMITTED:
            raise CheckpointError(f".metadata asks for {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)
