"""Files and folders that are whole or absent, JSON that everybody can read, and locks.

What is made appears under its name when it is complete and on the disk. Nothing is ever written over or removed that
this project did not write itself.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
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


def write(path, content):
    """Write bytes and sync; the name appears only with the whole content behind it. Makes folders that are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
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


def misfit(value, shape, name=""):
    """What keeps a JSON value from having a shape, in words; None if nothing does.

    shape: a type, float for any number; a tuple of shapes, one of which it has; None; [shape] of all items of a list;
    {str: shape} of all values of an object; {"name": shape, ...} of the values that an object must have, others it may.
    """
    if isinstance(shape, tuple):
        found = [misfit(value, one, name) for one in shape]
        return None if None in found else found[0]
    kind = type(shape) if isinstance(shape, (list, dict)) or shape is None else shape
    known = (int, float) if kind is float else kind
    if not isinstance(value, known) or (isinstance(value, bool) and kind is not bool):
        return f"{name or 'it'} is {json.dumps(value, default=repr)[:60]}, not {WORDS[kind]}"
    if kind is list:
        inner = [(f"{name}[{i}]", one, shape[0]) for i, one in enumerate(value) if shape]
    elif kind is dict:
        if lacking := [key for key in shape if isinstance(key, str) and key not in value]:
            return f"{name or 'it'} lacks {lacking[0]!r}"
        inner = [(f"{name}.{key}".lstrip("."), one, shape.get(key, shape.get(str)))
                 for key, one in value.items() if key in shape or str in shape]  # fmt: skip
    else:
        inner = []
    return next((wrong for key, one, part in inner if (wrong := misfit(one, part, key))), None)


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
