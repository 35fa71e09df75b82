"""The processes of one run: who they are, what they agree on, how they stop and end together.

torchrun starts them and says in the environment who is who (RANK, WORLD_SIZE, MASTER_ADDR ...). Without it there is
one process, and everything here is trivial. What a person did wrong may be seen by one process only, so all come to
know it, all stop, and one of them says it. Knows nothing of models and data.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

# Process groups for what is not the model's: decisions, which the host waits for while the device works on, and
# checkpoints, written by a thread of their own. Messages of two threads must not mix in one group.
control, saving = None, None


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def local():
    """Number of this process on its machine, and how many of the run are on it."""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@contextlib.contextmanager
def joined(seconds):
    """Inside, this process is one of torchrun's, and only rank 0 prints. An answer is waited for so many seconds.

    PeerError if another process dies, hangs or does not come.
    """
    global control, saving
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    if dist.is_torchelastic_launched():
        with contextlib.suppress(OSError, AttributeError):  # Linux: when torchrun is killed, be told to stop
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    timeout = timedelta(seconds=seconds)
    claim_gpu()
    try:
        store, me, many = next(iter(dist.rendezvous("env://", timeout=timeout)))
        store = fresh(store, me, many, seconds)
        # longer than the host waits, which can say who hangs, unless it waits for the device itself
        backend, patience = ("cpu:gloo,cuda:nccl", timedelta(seconds=60)) if has_gpu() else ("gloo", timedelta())
        dist.init_process_group(backend, store=store, rank=me, world_size=many, timeout=timeout + patience)
        control, saving = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    except RuntimeError as error:
        what = f"process {os.environ['RANK']} could not meet the others (--timeout={seconds:g})"
        raise PeerError(f"{what}: {str(error).splitlines()[0]}") from error
    try:
        with contextlib.ExitStack() as stack:
            if me:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            try:
                yield
            except RuntimeError as error:
                timed_out = "Timed out" in str(error)
                if timed_out or "by peer" in str(error) or "Broken pipe" in str(error):
                    raise PeerError(who_is_gone(store, me, many, seconds, timed_out)) from error
                raise
        meet(store, many)
        dist.destroy_process_group()
    finally:
        control = saving = None


def has_gpu():
    """Whether every process of the run on this machine has a GPU of its own."""
    return torch.cuda.is_available() and local()[1] <= torch.cuda.device_count()


def claim_gpu():
    """Make the process's GPU the current one of this thread; every thread begins with the machine's first."""
    if (number := local()[0]) and has_gpu():
        torch.cuda.set_device(number)


def fresh(store, me, many, seconds):
    """The part of torchrun's store that belongs to this start of `many` processes, by a word that they all heard.

    Over a restart the store may keep the addresses of those who died, and after a machine is replaced each torchrun
    has its own count of restarts. So rank 0 sends its word to whoever asks under a name never used before, and goes on
    when all of this start have heard it; who asked in an earlier start is answered in vain.
    """
    word = uuid.uuid4().hex
    if me:
        store.set(f"asks/{me}", word)
        word = store.get(f"answer/{word}").decode()  # waits
        store.set(f"heard/{word}/{me}", "")
        return dist.PrefixStore(word, store)
    end = time.monotonic() + seconds
    while missing := [n for n in range(1, many) if not store.check([f"heard/{word}/{n}"])]:
        if time.monotonic() > end:
            raise PeerError(
                f"process {', '.join(map(str, missing))} of {many} did not come in {seconds:g} s (--timeout)"
            )
        for n in missing:
            if store.check([f"asks/{n}"]):
                store.set(f"answer/{store.get(f'asks/{n}').decode()}", word)
        time.sleep(0.05)
    return dist.PrefixStore(word, store)


class PeerError(Exception):
    """Another process of the run is gone; the message says what is known of it."""


def who_is_gone(store, me, many, seconds, timed_out):
    """Say what is known of the process that this one lost: it timed out, or its connection was closed.

    All who lost one say so in torchrun's store, and who has not after a while is at fault. The first to time out closes
    all of its connections (gloo does), so that others hear of a process that hangs as they would of one that died.
    """
    missing = []
    with contextlib.suppress(RuntimeError):  # nobody timed out, or the store is gone, too
        store.set(f"lost one/{me}", "")
        if timed_out:
            store.set("timed out", "")
        store.wait(["timed out"], timedelta(seconds=2))
        timed_out = True
        time.sleep(5)
        missing = [str(n) for n in range(many) if not store.check([f"lost one/{n}"])]
        meet(store, many - len(missing))  # the first to leave may be the store's host
    if not timed_out:
        return f"process {me}: another one died, torchrun knows which"
    what = f"process {', '.join(missing)} of {many} has" if missing else "the network between the processes has"
    return f"process {me}: {what} not answered for {seconds:g} s (--timeout); the last checkpoint is good"


def meet(store, many, patience=10):
    """Wait until all processes are here, so that the first to leave does not look like a death to the others."""
    end = time.monotonic() + patience
    with contextlib.suppress(RuntimeError):  # the store is gone, so the others are
        here = store.add("here", 1)
        while here < many and time.monotonic() < end:
            time.sleep(0.01)
            here = store.add("here", 0)


def all_reduce(sums):
    """Add a tensor up over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(sums)


def gather(value, group=None):
    """[value of every process], by rank, on all of them; any value that pickles, such as an exception."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group or control)
    return values


@contextlib.contextmanager
def together(group=None):
    """Leave this block alike: if it raises a person's mistake in one process, or a disk's, all raise the first."""
    mine = None
    try:
        yield
    except (ValueError, OSError) as error:
        mine = error
    if first := next((error for error in gather(mine, group) if error), None):
        first.by_all = True  # so that one of them is enough to say it
        raise first


def from_first(function, *args):
    """What function(*args) returns, or raises, in rank 0; the others wait."""
    result = None
    with together():
        if rank() == 0:
            result = function(*args)
    return gather(result)[0]


class Stopped(Exception):
    """A signal came where nothing needs saving; the message is its name."""


class Stop:
    """SIGINT, SIGTERM or SIGUSR1 in any process, noted until all of them ask; a second Ctrl-C interrupts at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    FAILED = 1000  # no signal's number

    def __enter__(self):
        self.number, self.failed, self.pending = 0, False, None
        self.before = {number: signal.signal(number, self.note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        self.number = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def here(self):
        """Wait until all processes are here; raise Stopped in all of them if one was told to stop."""
        if number := max(gather(self.number)):
            raise Stopped(signal.Signals(number).name)

    def agreed(self, failed=False):
        """Why all processes stop now: a signal's name, "failed" if one of them ever asked with failed=True, or None.

        Every process asks equally often. Many get the answer to what they asked the time before, so that nobody waits.
        """
        self.failed |= failed
        answer = torch.tensor(self.FAILED if self.failed else self.number)
        if dist.is_initialized():
            work = dist.all_reduce(answer, dist.ReduceOp.MAX, group=control, async_op=True)
            before, self.pending = self.pending, (answer, work)
            if not before:
                return None
            answer, work = before
            work.wait()
        number = int(answer)
        return "failed" if number == self.FAILED else signal.Signals(number).name if number else None


def leave(code):
    """End this process. With many, without tearing down threads of gloo, which sometimes abort at exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    if "WORLD_SIZE" in os.environ:
        os._exit(code)
    sys.exit(code)
