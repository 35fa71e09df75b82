"""Work in a process of its own: what crashes, hangs or meets a compiler's error costs itself alone."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time

FORK = multiprocessing.get_context("fork")  # nothing is imported again; the parent must not have asked CUDA anything


class Ended(Exception):
    """The process did not come to its end; the message says how it went."""


class OutOfTime(Ended):
    """It was killed."""


def apart(function, seconds=1e6, log=None):
    """Yield what function() yields, which runs in a forked process and has so many seconds. Raises Ended.

    log: file that its output goes to. When it is over, nothing that it has started is left.
    """
    answers, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=serve, args=(function, theirs, log))
    process.start()
    theirs.close()
    end, over = time.monotonic() + seconds, False
    try:
        while not over and answers.poll(max(0.0, end - time.monotonic())):
            over, answer = answers.recv()
            if not over:
                yield answer
    except EOFError:  # it died
        process.join()
        raise Ended(f"crashed, exit code {process.exitcode}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    if not over:
        raise OutOfTime(f"killed after {seconds:.0f} s")
    if answer:
        raise Ended(answer)


def serve(function, pipe, log):
    os.setpgrp()  # with all its descendants one group, that can be ended as one
    if log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # lest a death take a line with it
    try:
        for answer in function():
            pipe.send((False, answer))
        pipe.send((True, ""))
    except Exception as error:
        sys.excepthook(*sys.exc_info())
        pipe.send((True, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))


def exit_code(function, *args):
    """Of function(*args) in a process of its own, which is waited for."""
    process = FORK.Process(target=lambda: sys.exit(function(*args)))
    process.start()
    process.join()
    return process.exitcode
