"""What the person at the keyboard can put right, and how a command begins and ends.

    class MixError(UserError): ...          a mistake: one line on stderr that says what to do, exit code 2

    @errors.command                         main(argv) -> exit code, for tests and for the shell alike
    def main(argv): ...

    if __name__ == "__main__":
        errors.run(main)
"""

import argparse
import errno
import functools
import io
import math
import os
import sys
from pathlib import Path


class UserError(ValueError):
    """What the person at the keyboard can put right; the message, one line, says what was wrong and what to do."""


def command(main):
    """Decorates main(argv) -> exit code: of a mistake, or of what the operating system refuses, one line and 2; of
    Ctrl-C 130. Whatever else is raised is an error of ours and keeps its trace."""

    @functools.wraps(main)
    def ending(argv, *rest):
        try:
            return main(argv, *rest) or 0
        except (UserError, OSError) as error:
            say(main, error)
            return 2
        except KeyboardInterrupt:
            return 130

    return ending


def say(main, error):
    """The error in one line on stderr, after the name of the script that `main` belongs to."""
    script = getattr(main, "__wrapped__", main).__globals__["__file__"]
    lines = [line.strip() for line in str(error).splitlines()]
    text = f"{Path(script).name}: {'; '.join(filter(None, lines))}"
    print(text.encode(errors="backslashreplace").decode(), file=sys.stderr)  # names of files may be no UTF-8


def run(main, leave=sys.exit):
    """Run a command with the words of the shell, and end the process with leave(code)."""
    sys.stdout, sys.stderr = (terminal(fd) for fd in (1, 2))
    code = main(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:
        say(main, error)
        code = 2
    leave(code)


class Terminal(io.FileIO):
    """Standard output or error. When nobody reads it any more, what is written is dropped and the work goes on; where
    it goes to a full disk, that is said once."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: the terminal is gone
                raise
            return len(data)


def terminal(fd):
    """A text stream in the encoding of the person's terminal, in which what it cannot show is spelt as an escape."""
    stream = sys.stdout if fd == 1 else sys.stderr
    if stream is None:  # closed before we began, as by >&-
        return open(os.devnull, "w")
    raw = io.BufferedWriter(Terminal(fd, "w", closefd=False))
    return io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=True)  # a log is as new as the run


class Parser(argparse.ArgumentParser):
    """argparse's, with the docstring as it is for help, no abbreviations, and mistakes like all others."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise UserError(message)


def path(text):
    """The path that a person typed, with ~ as the home folder: a shell leaves it alone in --out=~/here."""
    return Path(os.path.expanduser(text))  # leaves ~name as it is if nobody is called so, where pathlib's raises


def number(kind, least, most=math.inf):
    """For the type of an argument: a function that reads an int or a float between two, which are both allowed."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            limits = f"of at least {least:,}" if most == math.inf else f"from {least:,} to {most:,}"
            raise argparse.ArgumentTypeError(f"{text} is no {'whole ' if kind is int else ''}number {limits}")
        return value

    return read
