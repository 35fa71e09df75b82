"""Run Python programs that nobody has read: each in a process of its own, for a few seconds, with nothing to break.

    verdicts = run(["assert 1 + 1 == 2", "while True: pass"])  # ["passed", "timed out"]

A program is judged as `python program.py` would: it is the module `__main__`, a file in a folder of its own, and what
stands under its main guard runs. A small server process without our environment forks once per program, which costs
milliseconds where a new interpreter costs tens. What confines a program, on Linux:

| against                     | what                                                                                |
|-----------------------------|-------------------------------------------------------------------------------------|
| running on                  | a process namespace: with its first process, which is killed, die all of it         |
| fork bombs, big files       | rlimits on processes, file size, open files; a folder and a /dev/shm of 32 MB each  |
| memory                      | an rlimit on each address space; what all processes of a program hold is looked at  |
|                             | every 50 ms; for root no System V shared memory                                     |
| writing elsewhere           | a mount namespace: all is read-only but that folder, which is memory and goes       |
| reading our environment     | the server is started without one, and /proc shows the program's own processes      |
| the network                 | a network namespace without any device                                              |
| getting rights back         | no capabilities, no new privileges; /dev has null, zero, full, random and urandom;  |
|                             | /run and /tmp are empty                                                             |

Otherwise than for Python, SystemExit is a failure, lest a program end before its tests: only a main guard at the end of
the file may close with `sys.exit(main())` or `unittest.main()`. Nor may a trace function set the line to go on with. As
for Python, asserts in other threads, or in generators that nobody runs, fail nothing.

What it cannot do is stop a program from

- reading what its user can read, locking files that it can read, writing to named pipes and sockets that lie in the
  user's own folders, and calling all of the kernel, io_uring and keyctl included;
- taking more memory than its limit for a twentieth of a second, or out of sight: 16 MB in each of 64 open files of
  each process, what the kernel keeps for pipes and sockets, System V shared memory where its user is not root;
- starting as many processes as there can be where it is root's and Linux older than 6.14: rlimits do not bind root;
- being called correct if it sets out to be. That its end was reached it proves with a word that has no name while it
  runs, and that is not in the memory of forked processes; but nothing in a process is safe from the process: it can
  read its own memory (ctypes, /proc/self/mem), rewrite the functions that run it, and change what its tests call. This
  protects the machine from models, not the score from people.

Where the kernel allows no user namespaces (`isolated()` says), rlimits, the limit on memory, the empty environment and
killing of all descendants remain. A program can then write, signal and connect wherever its user can, so one that kills
the server may outlive it.
"""

import ast
import atexit
import builtins
import contextlib
import ctypes
import functools
import hashlib
import importlib
import json
import math
import mmap
import os
import re
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NEW = {"mount": 0x0002_0000, "ipc": 0x0800_0000, "user": 0x1000_0000, "process": 0x2000_0000, "network": 0x4000_0000}
READ_ONLY, REMOUNT, BIND, MOVE, RECURSIVE, PRIVATE = 0x1, 0x20, 0x1000, 0x2000, 0x4000, 0x4_0000  # flags of mount
PRELOADED = ("collections", "heapq", "itertools", "math", "random", "re", "string", "typing")  # what many programs need
FAILED = b"failed"
LIBC = ctypes.CDLL(None, use_errno=True)
STARTUP = 30.0  # seconds that namespaces and limits may take on a machine that is very busy
TEMPORARY = {"/tmp", tempfile.gettempdir()}  # hidden from programs
PYTHONS = {path for path in (sys.prefix, sys.base_prefix) if TEMPORARY & {str(above) for above in Path(path).parents}}
LINUX = tuple(int(n) for n in re.findall(r"\d+", os.uname().release)[:2])
WATCH = 0.05  # seconds between two looks at the memory of a program's processes


# ------------------------------------------------------------------------------------------------------------- outside


def run(programs, seconds=3.0, memory=2**30, workers=None):
    """Source texts -> what became of each: "passed" (it ran to its end), "failed" (an exception, also SystemExit),
    "timed out" or "died" (killed, or left by os._exit). memory: bytes that each may have, in all its processes."""
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
    env = {"PATH": os.defpath}
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd="/", start_new_session=True
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
    try:
        return json.loads(server.stdout.readline())
    except ValueError as error:
        raise OSError("the server of programs is gone") from error


# -------------------------------------------------------------------------------------------------------------- server


def serve():
    """Answer jobs from standard input until it ends."""
    for name in PRELOADED:
        importlib.import_module(name)
    forbid_jumps()
    libc_call("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans become children of this process
    libc_call("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: who has no rights over us gets at our pipes by no /proc
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
            libc_call("prctl", 4, 1, 0, 0, 0)
            isolate(tempfile.gettempdir())
            if inner := os.fork():
                wait_for(inner)
            hide()
            drop_rights()
            os._exit(0)
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def judge(program, seconds, memory, isolated):
    """Run one program in a child and say what became of it, or "not started".

    It proves that its end was reached by a random word, which it finds in `answer`, memory that we share with it, takes
    away and puts back. We keep only the word's hash: the program sees all that we knew when it was forked.
    """
    folder = tempfile.mkdtemp(prefix="program-")
    answer = mmap.mmap(-1, 32)
    answer.write(os.urandom(32))
    digest = hashlib.sha256(answer).digest()
    report, to_report = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(report)
            confine_and_run(program, seconds, memory, folder, answer, to_report, isolated)
        finally:
            os._exit(1)
    os.close(to_report)
    try:
        verdict = watch(report, seconds, memory)
        if verdict == "ended":
            status = os.waitpid(child, 0)[1]
            if status == 0 and hashlib.sha256(answer).digest() == digest:
                verdict = "passed"
            else:
                verdict = "failed" if answer[: len(FAILED)] == FAILED else "died"
    finally:
        kill_all_children()
        os.close(report)
        answer.close()
        shutil.rmtree(folder, ignore_errors=True)
    return verdict


def watch(report, seconds, memory):
    """Wait for those who have the other end of the pipe: they say when the program starts, and leave when it has ended.
    -> "ended", "timed out", "died" (of too much memory) or "not started"."""
    started, deadline = False, time.monotonic() + STARTUP
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([report], [], [], min(left, WATCH))[0]:
            if memory_of_children(memory, deadline) > memory:
                return "died"
        elif not os.read(report, 1):
            return "ended" if started else "not started"
        elif not started:
            started, deadline = True, time.monotonic() + seconds
    return "timed out" if started else "not started"


def memory_of_children(limit, deadline):
    """Bytes that our children and theirs have, counted until they are above the limit, or it is late: the kernel lets
    us wait for those that fork."""
    total, processes = 0, children("self")
    while processes and total <= limit and time.monotonic() < deadline:
        process = processes.pop()
        processes += children(process)
        with contextlib.suppress(OSError):  # it has ended
            total += memory_of(process)
    return total


def memory_of(process):
    """Bytes that a process has; what it shares with others is divided among them (PSS), where we may know that."""
    try:
        pss = re.findall(r"^Pss: *(\d+)", Path(f"/proc/{process}/smaps_rollup").read_text(), re.M)
        return 1024 * int(pss[0]) if pss else 0
    except OSError:
        return mmap.PAGESIZE * int(Path(f"/proc/{process}/statm").read_text().split()[1])


def children(process):
    found = []
    with contextlib.suppress(OSError):  # it has ended
        for path in Path(f"/proc/{process}/task").glob("*/children"):
            found += path.read_text().split()
    return found


def kill_all_children():
    """And theirs: those whose parents die become ours. Returns when none is left."""
    while True:
        for process in children("self"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


# ------------------------------------------------------------------------------------------------------- a program's


def confine_and_run(program, seconds, memory, folder, answer, report, isolated):
    """In the child: never returns. The program gets a process below this one, which waits for it."""
    libc_call("prctl", 4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: have a /proc/self
    os.setsid()
    os.nice(19)  # a fork bomb would leave the server no time to end it
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    if isolated:
        isolate(folder)
        if first := os.fork():  # the first process in the namespace is the next one
            wait_for(first)
        hide()
    drop_rights()
    os.write(report, b"r")
    if process := os.fork():  # signals do not reach a namespace's first process, so that must not be the program's
        wait_for(process)
    os.close(report)
    os.chdir(folder)
    limits = {"AS": memory, "FSIZE": 2**24, "NOFILE": 64, "NPROC": 64, "CORE": 0, "CPU": math.ceil(seconds) + 1}
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    run_program(program, answer)


def wait_for(process):
    """And for orphans that come here, until it has ended; then end as it did, well or not."""
    while True:
        ended, status = os.wait()
        if ended == process:
            os._exit(int(status != 0))


def run_program(program, answer):
    """As `python program.py` in the current folder, to the exit code with which that would end this process. In
    `answer` is said how: by the word that was there at first, or FAILED."""
    process = os.getpid()
    answer.madvise(mmap.MADV_DONTFORK)  # processes that the program forks have no way to it
    folder = os.environ["HOME"] = os.environ["TMPDIR"] = tempfile.tempdir = os.getcwd()
    path = f"{folder}/program.py"
    sys.argv[:] = [path]
    sys.path.insert(0, folder)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__, main.__builtins__ = path, builtins
    said = FAILED
    try:
        source = program.encode()
        with open(path, "wb") as file:
            file.write(source)
        # Until the program has ended, the word is an operand of an unfinished expression, which nothing refers to.
        word, _ = take(answer), exec(compiled(source, path), vars(main))
        said, status = word, 0
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        status = 1
    if os.getpid() == process:
        answer[: len(said)] = said
    # Leave as Python does, but for clearing away, which takes longer than most programs.
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    os._exit(status & 255)


def take(answer):
    """The word in `answer`, which is then empty."""
    word = answer[:]
    answer[:] = bytes(len(word))
    return word


def compiled(source, path):
    """The code of a program. Where a main guard ends it, its last statement may ask for the exit code 0."""
    if b"__main__" not in source:
        return compile(source, path, "exec", dont_inherit=True)
    tree = ast.parse(source)
    last = tree.body[-1] if tree.body else None
    if isinstance(last, ast.If) and ast.unparse(last.test) in ("__name__ == '__main__'", "'__main__' == __name__"):
        last.body[-1] = check_of_exit(last.body[-1])
    return compile(tree, path, "exec", dont_inherit=True)


def check_of_exit(statement):
    """`sys.exit(main())` -> `assert not main()`; unittest.main() without its SystemExit if all tests pass; any other
    statement as it is. SystemExit in a function that is called there remains one."""
    call = getattr(statement, "value", None) or getattr(statement, "exc", None)
    name = ast.unparse(call.func) if isinstance(call, ast.Call) else None
    if name in ("exit", "quit", "sys.exit", "SystemExit"):
        check = ast.parse("assert not None").body[0]
        check.test.operand = call.args[0] if call.args else check.test.operand
        return check
    if name == "unittest.main":
        check = ast.parse("try: pass\nexcept SystemExit as _exit: assert not _exit.code").body[0]
        check.body = [statement]
        return check
    return statement


def forbid_jumps():
    """A trace function may set the line that a frame goes on with, and so skip tests: make it read-only, in the table
    of CPython that names what sets it (struct PyGetSetDef: name, getter, setter, ...)."""
    pointer = ctypes.sizeof(ctypes.c_void_p)
    line = types.FrameType.f_lineno
    entry = ctypes.c_void_p.from_address(id(line) + type(line).__basicsize__ - pointer).value
    if ctypes.string_at(ctypes.c_void_p.from_address(entry).value) == b"f_lineno":
        ctypes.c_void_p.from_address(entry + 2 * pointer).value = None


def isolate(folder):
    """Namespaces of its own for this process and those that it will fork; nothing to write to but a new `folder`, which
    hides all that lies in temporary folders: sockets of others, too. OSError where the kernel allows it not."""
    uid, gid = os.getuid(), os.getgid()
    libc_call("unshare", sum(NEW.values()))
    for name, text in {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    mount(None, "/", flags=RECURSIVE | PRIVATE)
    read_only = struct.pack("4Q", 1, 0, 0, 0)  # struct mount_attr: set MOUNT_ATTR_RDONLY
    libc_call("syscall", 442, -100, b"/", 0x8000, read_only, 32)  # mount_setattr of / and, AT_RECURSIVE, all below

    # empty temporary folders, but for a Python that lies in one
    kept = {path: os.open(path, os.O_PATH) for path in PYTHONS}
    for path in TEMPORARY:
        mount("none", path, "tmpfs", data="size=32m")
    for path, fd in kept.items():
        os.makedirs(path, exist_ok=True)
        mount(f"/proc/self/fd/{fd}", path, flags=BIND | RECURSIVE)
        os.close(fd)
    os.makedirs(folder, exist_ok=True)

    # /dev, made in the folder and moved
    mount("none", folder, "tmpfs", data="size=4k,mode=755")
    for name in ("null", "zero", "full", "random", "urandom"):
        os.close(os.open(f"{folder}/{name}", os.O_CREAT))
        mount(f"/dev/{name}", f"{folder}/{name}", flags=BIND)
    for name, opened in {"fd": "", "stdin": "0", "stdout": "1", "stderr": "2"}.items():
        os.symlink(f"/proc/self/fd/{opened}", f"{folder}/{name}")
    os.mkdir(f"{folder}/shm")
    mount("none", f"{folder}/shm", "tmpfs", data="size=32m")
    mount(folder, "/dev", flags=MOVE)
    mount(None, "/dev", flags=REMOUNT | BIND | READ_ONLY)


def hide():
    """In the first process of the process namespace: what /proc and /run tell of others."""
    try:
        mount("none", "/proc", "proc")
    except OSError:  # containers that hide parts of /proc allow no other; an empty one, then
        mount("none", "/proc", "tmpfs", READ_ONLY, "size=4k")
    else:
        limits = {"shmall": "0", "msgmni": "0"}  # System V shared memory and messages, which no rlimit is for
        if LINUX >= (6, 14):  # before, this was the whole machine's
            limits["pid_max"] = "301"  # the least
        for name, most in limits.items():
            with contextlib.suppress(OSError), open(f"/proc/sys/kernel/{name}", "w") as file:
                file.write(most)
        mount(None, "/proc", flags=REMOUNT | BIND | READ_ONLY)
    if os.path.isdir("/run"):  # sockets of services
        mount("none", "/run", "tmpfs", READ_ONLY, "size=4k")


def drop_rights():
    libc_call("capset", struct.pack("2I", 0x2008_0522, 0), bytes(24))  # none
    libc_call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS


def mount(source, target, kind=None, flags=0, data=None):
    libc_call("mount", *(text and os.fsencode(text) for text in (source, target, kind)), flags, data and data.encode())


def libc_call(name, *args):
    if getattr(LIBC, name)(*args) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    serve()
