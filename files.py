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


def read_json(path):
    """The object, a dict, in a JSON file. UserError names the file and what is wrong with it."""
    try:
        value = json.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object but {type(value).__name__}")
    return value


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
