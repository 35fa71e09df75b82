"""Run Python programs that nobody has read: each in a process of its own, for a few seconds, with nothing to break.

    verdicts = run(["assert 1 + 1 == 2", "while True: pass"])  # ["passed", "timed out"]

A small server process without our environment forks once per program, which costs milliseconds where a new interpreter
costs tens. What confines a program, on Linux:

| against                        | what                                                                             |
|--------------------------------|----------------------------------------------------------------------------------|
| running on                     | a process namespace: with its first process, which is killed, die all of it      |
| fork bombs, memory, big files  | rlimits on processes, address space, file size, open files; a folder of 32 MB    |
| writing elsewhere              | a mount namespace: all is read-only but that folder, which is memory and goes    |
| reading our environment        | the server is started without one, and /proc is empty                            |
| the network                    | a network namespace without any device                                           |
| getting rights back            | no capabilities, no new privileges; /dev, /run and /tmp are empty                |

It can read what its user can read, and talk to services whose sockets lie in the user's own folders. Where the kernel
allows no user namespaces (`isolated()` says), rlimits, the empty environment and killing of all descendants remain. A
program that wants to be called correct can arrange that: it runs in the process that reports. This protects the machine
from models, not the score from people.
"""

import contextlib
import ctypes
import functools
import importlib
import json
import math
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NEW = {"mount": 0x0002_0000, "ipc": 0x0800_0000, "user": 0x1000_0000, "process": 0x2000_0000, "network": 0x4000_0000}
PRELOADED = ("collections", "heapq", "itertools", "math", "random", "re", "string", "typing")  # what many programs need
STARTUP = 30.0  # seconds that namespaces and limits may take on a machine that is very busy


# ------------------------------------------------------------------------------------------------------------- outside


def run(programs, seconds=3.0, memory=2**30, workers=None):
    """Source texts -> what became of each: "passed" (it ran to its end), "failed" (an exception, also SystemExit),
    "timed out" or "died" (killed, or left by os._exit). memory: bytes of address space."""
    programs = list(programs)
    workers = min(workers or len(os.sched_getaffinity(0)), len(programs) or 1)
    verdicts, numbers = [None] * len(programs), iter(range(len(programs)))  # next() of a range is atomic

    def work(_):
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(serving())
            for n in numbers:
                try:
                    verdicts[n] = ask(server, {"program": programs[n], "seconds": seconds, "memory": memory})
                except OSError:  # the server itself was killed, for want of memory perhaps
                    verdicts[n], server = "died", stack.enter_context(serving())

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
    if "not started" in verdicts:
        raise OSError("programs could not be started in their sandbox")
    return verdicts


@functools.cache
def isolated():
    """Whether programs get namespaces of their own here."""
    if sys.platform != "linux":
        return False
    with serving() as server:
        return ask(server, None)


@contextlib.contextmanager
def serving():
    command = [sys.executable, "-I", __file__]  # -I: no PYTHON variables, no user's packages, no current folder
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={}, cwd="/", start_new_session=True
    )
    try:
        yield server
    finally:
        server.stdin.close()
        server.stdout.close()
        server.kill()
        server.wait()


def ask(server, job):
    server.stdin.write(json.dumps(job).encode() + b"\n")
    server.stdin.flush()
    if not (answer := server.stdout.readline()):
        raise OSError("the server of programs is gone")
    return json.loads(answer)


# -------------------------------------------------------------------------------------------------------------- server


def serve():
    """Answer jobs from standard input until it ends."""
    for name in PRELOADED:
        importlib.import_module(name)
    libc_call("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans become children of this process
    able = can_isolate()
    for line in sys.stdin.buffer:
        job = json.loads(line)
        sys.stdout.write(json.dumps(judge(**job, isolated=able) if job else able) + "\n")
        sys.stdout.flush()


def can_isolate():
    """Whether all of it succeeds here, tried in a child: kernels and their guards refuse some of it in many ways."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            isolate(tempfile.gettempdir())
            if inner := os.fork():
                os._exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]))
            hide_and_drop_rights()
            os._exit(0)
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def judge(program, seconds, memory, isolated):
    """Run one program in a child and say what became of it, or "not started"."""
    folder = tempfile.mkdtemp(prefix="program-")
    report, to_report = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(report)
            confine_and_run(program, seconds, memory, folder, to_report, isolated)
        finally:
            os._exit(1)
    os.close(to_report)
    verdict, deadline = "not started", time.monotonic() + STARTUP
    try:
        while verdict in ("not started", "died"):
            left = max(0.0, deadline - time.monotonic())
            if not select.select([report], [], [], left)[0]:
                verdict = "timed out" if verdict == "died" else verdict
                break
            if not (said := os.read(report, 1)):  # all who could say more are gone
                break
            if verdict == "not started":
                verdict, deadline = "died", time.monotonic() + seconds  # unless it says how it ended
            else:
                verdict = {b"p": "passed", b"f": "failed"}.get(said, "died")
    finally:
        kill_all_children()
        os.close(report)
        shutil.rmtree(folder, ignore_errors=True)
    return verdict


def kill_all_children():
    """And theirs: those whose parents die become ours. Returns when none is left."""
    while True:
        for path in Path("/proc/self/task").glob("*/children"):
            for pid in path.read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def confine_and_run(program, seconds, memory, folder, report, isolated):
    """In the child: never returns, and says on the pipe `report`: r runs, then p passed or f failed."""
    os.setsid()
    os.nice(19)  # a fork bomb would leave the server no time to end it
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if isolated:
        isolate(folder)
        if os.fork():  # the first process in the namespace is the next one
            wait_for_child(report)
        hide_and_drop_rights()
        if os.fork():  # which signals of its own do not reach, so it only waits, and takes all with it when it ends
            wait_for_child(report)
    os.chdir(folder)
    limits = {"AS": memory, "FSIZE": 2**24, "NOFILE": 64, "NPROC": 64, "CORE": 0, "CPU": math.ceil(seconds) + 1}
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    os.write(report, b"r")
    verdict = b"f"
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "program"})
        verdict = b"p"
    finally:  # whatever it raised
        os.write(report, verdict)
        os._exit(0)


def wait_for_child(report):
    os.close(report)
    os.wait()
    os._exit(0)


def isolate(folder):
    """Namespaces of its own for this process and those that it will fork; nothing to write to but a new `folder`, which
    hides all that lies in temporary folders: sockets of others, too. OSError where the kernel allows it not."""
    uid, gid = os.getuid(), os.getgid()
    libc_call("unshare", sum(NEW.values()))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    libc_call("mount", None, b"/", None, 0x4000 | 0x4_0000, None)  # MS_REC | MS_PRIVATE
    read_only = (ctypes.c_uint64 * 4)(1, 0, 0, 0)  # struct mount_attr: set MOUNT_ATTR_RDONLY
    libc_call("syscall", 442, -100, b"/", 0x8000, read_only, 32)  # mount_setattr of / and, AT_RECURSIVE, all below
    for path in {"/tmp", tempfile.gettempdir()}:
        libc_call("mount", b"none", path.encode(), b"tmpfs", 0, b"size=32m")
    os.makedirs(folder, exist_ok=True)


def hide_and_drop_rights():
    """In the first process of the process namespace, which may say how many there can be since Linux 6.14."""
    with contextlib.suppress(OSError):
        libc_call("mount", b"none", b"/proc", b"proc", 0, None)
        Path("/proc/sys/kernel/pid_max").write_text("301")  # the least
    for path in ("/proc", "/dev", "/run"):  # other processes, disks, and sockets of services
        if os.path.isdir(path):
            libc_call("mount", b"none", path.encode(), b"tmpfs", 1, b"size=4k")  # MS_RDONLY
    header, none = (ctypes.c_uint32 * 2)(0x2008_0522, 0), (ctypes.c_uint32 * 6)()
    libc_call("capset", header, none)
    libc_call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS


def libc_call(name, *args):
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    serve()
