"""Files and folders that are whole or absent, JSON that everybody can read, and locks.

What is made appears under its name when it is complete and on the disk, and nothing half-made stays behind.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
from pathlib import Path

from errors import UserError

WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list",
         dict: "an object", type(None): "null"}  # fmt: skip


def sync(path):
    """Wait until a file or folder is on the disk, not only in the operating system's memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path):
    """Of all that is in a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path, content):
    """Write bytes and sync; the name appears only with the whole content behind it. Makes folders that are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path, value):
    """`write` of strict JSON."""
    write(path, (strict(value, indent=1) + "\n").encode())


def strict(value, **how):
    """json.dumps without the words that JSON has not: NaN and infinities are null."""
    try:
        return json.dumps(value, allow_nan=False, **how)
    except ValueError:
        return json.dumps(finite(value), allow_nan=False, **how)


def finite(value):
    """Nested dicts and lists with None for every float that is no number."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path, shape=None):
    """The object, a dict, in a JSON file, of a shape as `misfit` has it. UserError names the file and what is wrong."""
    try:
        value = json.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if wrong := misfit(value, shape or {}):
        raise UserError(f"{path}: {wrong}")
    return value


def misfit(value, shape, place=""):
    """What keeps a value out of a JSON file from having a shape, such as "tasks.quiz.n is null, not a whole number";
    None if nothing does.

    A shape is a type, where int and float are no bool and float is any number; None; a function that says whether a
    value will do; several shapes in a tuple, one of which must fit; a dict of the shapes of members, or {...: shape} or
    [shape] of all of them. Members of an object that the shape does not name may be anything.
    """
    place = place or "it"
    if isinstance(shape, tuple):
        found = [misfit(value, one, place) for one in shape]
        return None if None in found else found[0]
    if callable(shape) and not isinstance(shape, type):
        return None if shape(value) else f"{place} is {shown(value)}, which cannot be"
    kind = type(shape) if shape is None or isinstance(shape, (dict, list)) else shape
    known = (int, float) if kind is float else kind
    if not isinstance(value, known) or (isinstance(value, bool) and kind is not bool):
        return f"{place} is {shown(value)}, not {WORDS[kind]}"
    if isinstance(shape, dict):
        every = dict.fromkeys(value, shape[...]) if ... in shape else {}
        named = {name: inner for name, inner in shape.items() if name is not ...}
        if lacking := [name for name in named if name not in value]:
            return f"{place} lacks {lacking[0]!r}"
        within = "" if place == "it" else f"{place}."
        members = [(f"{within}{name}", value[name], inner) for name, inner in (every | named).items()]
    elif isinstance(shape, list):
        members = [(f"{place}[{at}]", one, shape[0]) for at, one in enumerate(value)]
    else:
        members = []
    found = (misfit(one, inner, name) for name, one, inner in members)
    return next(filter(None, found), None)


def shown(value):
    return json.dumps(value, default=repr)[:60]


def real(value):
    """Whether a value out of a JSON file is a number that a float can hold."""
    return type(value) in (int, float) and abs(value) < 1e300


def number(value):
    """Whether it is one, or null or one of the words that stand for none."""
    return value is None or real(value) or (type(value) is float and not math.isfinite(value))


@contextlib.contextmanager
def new_folder(target):
    """An empty folder beside `target`, which gets that name when the block ends well and is removed when it does not.
    UserError if there is something of that name already."""
    target = Path(target)
    if os.path.lexists(target):
        raise UserError(f"{target} exists; name a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~umask())
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def umask():
    """The permissions that new files do not get; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def lock(file, wait=False):
    """Lock an open file until it is closed: True; False if another process has it; None if its file system has no
    locks (NFS without them), so that nobody can tell."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True
