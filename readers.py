"""
How what a person names becomes documents: files, folders, globs, archives of rows, data sets of Hugging Face.

    found = find(["books/", "crawl/*.jsonl.zst"])     # what there is to read, and what is left out, with the reasons
    for unit in cut_into_units(found.inputs):         # of about PIECE bytes, whoever reads them
        for piece, size in read_pieces(unit, field):  # in the main process: streams can only be read front to back
            read_documents(piece, field, report)      # in a worker

What cannot be read (a damaged file, a link to nothing, a row without text) is reported by name, and all the rest is
read. Only what leaves nothing to read, or what a person has to decide, is a UserError.
"""

import bz2
import contextlib
import errno
import fnmatch
import glob
import io
import json
import logging
import lzma
import os
import re
import stat
import zlib
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from errors import UserError

PIECE = 8 << 20  # bytes of input that a worker holds at a time; a longer file of text is cut at line ends
LONGEST_LINE = 64 << 20  # bytes; no line end is waited for beyond that
LONGEST_JSON = 1 << 30  # bytes of a JSON array, which has to be read as a whole
CHUNK = 1 << 17  # bytes that are decompressed at a time

# What a name says. A file that is named, or matches a glob, is read whatever it is called: see look_inside.
TEXT = """.txt .md .rst .tex .org .adoc .py .pyi .pyx .ipynb .c .h .cc .cpp .cxx .hpp .hh .cu .cuh .m .cs .java .kt
    .scala .go .rs .swift .zig .d .nim .js .jsx .mjs .ts .tsx .vue .svelte .html .css .scss .less .php .rb .pl .pm .lua
    .r .jl .hs .ml .mli .fs .ex .exs .erl .clj .el .lisp .scm .f .f90 .v .sv .vhd .asm .s .sh .bash .ps1 .sql .proto
    .cmake .mk .toml .yaml .yml"""
FORMATS = dict.fromkeys(TEXT.split(), "text")
FORMATS |= {".jsonl": "lines", ".ndjson": "lines", ".jsonlines": "lines", ".json": "json", ".parquet": "parquet"}
ARCHIVES = (".tar", ".tgz", ".zip", ".7z", ".rar")
PACKAGES = {".zst": "zstandard", "parquet": "pyarrow", "hf": "datasets"}  # optional, for such inputs only
OTHER_BYTES = {  # how files begin that are neither UTF-8 text nor JSON lines, whatever they are called
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"{\0": "UTF-16",
    b"\0{": "UTF-16",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"PAR1": "parquet",
    b"PK\x03\x04": "zip",
}
NO_FILES = {stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}


class Input(NamedTuple):
    """One file, or one data set, in which case `path` is its hf: name."""

    path: Path | str
    format: str  # text, lines (of JSON), json (one value), parquet or hf
    compression: str = ""  # its ending
    size: int = 0
    modified: int = 0  # ns


class Fault(NamedTuple):
    """Comes out of a reader instead of what it cannot read."""

    problem: str
    reason: str


@dataclass
class Found:
    """What the words for one source stand for."""

    inputs: list = field(default_factory=list)  # Input, in a fixed order
    folders: set = field(default_factory=set)  # (device, inode) of those that were named and of all below them
    problems: dict = field(default_factory=dict)  # {problem: [name, with the reason]}
    left_out: Counter = field(default_factory=Counter)  # {ending: files that their names left out}

    def report(self, problem, path, reason=""):
        self.problems.setdefault(problem, []).append(with_reason(path, reason))

    def add(self, other):
        self.inputs += other.inputs
        self.folders |= other.folders
        self.left_out += other.left_out
        for problem, names in other.problems.items():
            self.problems.setdefault(problem, []).extend(names)


# ----------------------------------------------------------------------------------------------------------------------
# what there is


def find(words):
    """Found, for files, folders, globs, hf: names. Several may stand in one word, with commas. Raises UserError."""
    found = Found()
    for word in words:
        one = "," not in word or expand(word, Found().report)  # a folder may have a comma in its name
        for named in [word] if one else filter(None, word.split(",")):
            found.add(find_inputs(named))
    return found


def expand(named, report):
    """The paths that a name stands for, in a fixed order: its own, if there is one, or what it matches as a glob;
    report(problem, path, reason) for folders below ** that are not read."""
    path = Path(os.path.expanduser(named))
    if os.path.lexists(path):
        return [path]
    parts = list(path.parts)
    base = Path()
    while parts and os.path.lexists(base / parts[0]):  # a folder may be called data[1]
        base /= parts.pop(0)
    if "**" not in parts:
        return sorted(map(Path, glob.glob(str(Path(glob.escape(str(base)), *parts)))))
    hidden = any(part.startswith(".") for part in parts)
    below = walk(base, report, hidden=hidden)
    return sorted(path for path in below if matches(path.relative_to(base).parts, parts))


def matches(names, pattern):
    """Whether the parts of a path match those of a glob, where ** is any number of folders."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return matches(names, pattern[1:]) or (bool(names) and names[0][0] != "." and matches(names[1:], pattern))
    if not names or (names[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatch.fnmatchcase(names[0], pattern[0]) and matches(names[1:], pattern[1:])


def find_inputs(named):
    """Found, for one file, folder, glob or hf: name. Raises UserError."""
    found = Found()
    if named.startswith("hf:"):
        found.inputs = [Input(named, "hf")]
    elif os.path.isdir(os.path.expanduser(named)):
        read_folder(Path(os.path.expanduser(named)), found)
    else:
        for path in expand(named, found.report):
            if path.is_dir():
                found.report("folders among the matches of a glob, not read", path)
            else:
                look_at(path, found)

    if not found.inputs:
        reasons = [*describe(counted(found.problems)), *describe_left_out(found.left_out)]
        why = "; ".join(reasons) or "no such file, no match, or a folder without text or source files"
        why += "; what a glob matches is read whatever it is called" if found.left_out else ""
        raise UserError(f"nothing to read in {printable(named)!r}: {why}")
    for mark in {file.format for file in found.inputs} | {file.compression for file in found.inputs}:
        if mark in PACKAGES and not find_spec(PACKAGES[mark]):
            raise UserError(f"reading {printable(named)!r} takes one more package: pip install {PACKAGES[mark]}")
    if named.startswith("hf:"):
        hf_data(named)  # whether it can be had is known before anything else is prepared
    return found


def read_folder(folder, found):
    """Add to Found what is read of a folder and all below it; its files are chosen by their names."""
    found.folders.add(identity(folder))
    for path in walk(folder, found.report, found.folders):
        look_at(path, found, choose=True)
    found.inputs.sort()


def walk(top, report, seen=None, hidden=False):
    """Paths of all that is no folder in a folder and below it. Linked folders too, but each once."""
    seen = {identity(top)} if seen is None else seen
    for folder, folders, names in os.walk(top, followlinks=True, onerror=lambda e: report(*unreadable(e.filename, e))):
        below = sorted(name for name in folders if hidden or name[0] != ".")
        folders[:] = [name for name in below if is_new(Path(folder, name), seen, report)]
        yield from (Path(folder, name) for name in names if hidden or name[0] != ".")


def is_new(folder, seen, report):
    """Whether a folder is to be read: not one that was, by another name perhaps, nor one above, through a link."""
    try:
        this = identity(folder)
    except OSError as error:
        report(*unreadable(folder, error))
        return False
    parent = folder.parent.resolve()
    if folder.is_symlink() and folder.resolve() in (parent, *parent.parents):
        report("links to folders above them, not followed", folder)
        return False
    if this in seen:
        return False
    seen.add(this)
    return True


def identity(path):
    entry = os.stat(path)
    return entry.st_dev, entry.st_ino


def look_at(path, found, choose=False):
    """Add to Found the Input that a path is, or the reason why it is none. `choose`: by its name."""
    try:
        entry = os.stat(path)
        if not stat.S_ISREG(entry.st_mode):
            kinds = [kind for is_kind, kind in NO_FILES.items() if is_kind(entry.st_mode)]
            found.report("unreadable", path, *kinds)
            return
        form, compression = what_a_name_says(path.name)
        if choose and (not form or (form == "json" and not compression)):  # a .json is mostly a program's settings
            found.left_out[ending(path.name)] += 1
            return
        if any(mark in ARCHIVES for mark in map(str.lower, path.suffixes[-2:])):
            found.report("archives, not read: unpack them and name the folder", path)
            return
        if not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        found.report(*unreadable(path, error))
        return

    if form in (None, "json") and entry.st_size:
        form = look_inside(path, form, compression)
    if form in ("lines", "json") and not compression and not entry.st_size:
        found.report("empty", path)  # there will be no line of it to say so
    found.inputs.append(Input(path, form or "text", compression, entry.st_size, entry.st_mtime_ns))


def unreadable(path, error):
    dangling = os.path.islink(path) and isinstance(error, FileNotFoundError)
    return "unreadable", path, "a link to nothing" if dangling else error.strerror


def what_a_name_says(name):
    """(format or None, compression or "") of a file, in whatever case."""
    name, last = os.path.splitext(name.lower())
    if last in DECOMPRESSORS:
        return FORMATS.get(os.path.splitext(name)[1]), last
    return FORMATS.get(last), ""


def ending(name):
    """.xml, .tar.gz, or "" if there is none that looks like one."""
    shown = re.search(r"(?:\.\w{1,8})?\.\w{1,12}$" if what_a_name_says(name)[1] else r"\.\w{1,12}$", name)
    return shown.group().lower() if shown and shown.start() else ""


def look_inside(path, form, compression):
    """The format of a file that is called .json (form "json"), or by a name that says nothing (None)."""
    try:
        with open(path, "rb") as raw:
            file = decompress(raw, compression) if compression else raw
            line = file.readline(PIECE)
            while line and not line.strip():
                line = file.readline(PIECE)
    except Exception:
        return "lines" if compression else form  # damaged: the reader will say so
    if line.startswith(b"PAR1"):
        return "parquet"
    try:
        if isinstance(json.loads(line), dict):
            return "lines"
    except (ValueError, RecursionError):
        pass
    return form or "text"


def reads_as_before(file):
    """Whether a file was read in the same way by the first version, which looked at the last ending only, in lower
    case. Where it was not, sources that were prepared from it then are not taken for finished."""
    compression = file.path.suffix if file.path.suffix in (".gz", ".xz", ".zst") else ""
    form = {".jsonl": "lines", ".parquet": "parquet"}.get(file.path.suffix, "lines" if compression else "text")
    return (file.format, file.compression) == (form, compression)


# ----------------------------------------------------------------------------------------------------------------------
# inputs -> units of work -> pieces


def cut_into_units(inputs):
    """
    [("stream", input) | ("range", input, start, stop) | ("whole", input) | ("files", input, ...)] of at most PIECE
    bytes but for streams and wholes. A unit's place in the list names its runs and decides which machine of --shard
    has it.
    """
    units, files = [], []
    for file in inputs:
        if file.compression or file.format in ("parquet", "hf"):
            units.append(("stream", file))
        elif file.format == "json":
            units.append(("whole", file))
        elif file.format == "lines" or file.size > PIECE:
            units += [("range", file, at, at + PIECE) for at in range(0, file.size, PIECE)]
        else:
            files.append(file)
    while files:
        group, room = [], PIECE
        while files and files[-1].size <= room:
            room -= files[-1].size
            group.append(files.pop())
        units.append(("files", *group))
    return units


def bytes_on_disk(unit):
    kind, file, *rest = unit
    if kind == "files":
        return sum(file.size for file in unit[1:])
    return min(file.size, rest[1]) - rest[0] if kind == "range" else file.size


def read_pieces(unit, column):
    """
    Yields (piece, its bytes). A stream is read here, a ("lines" | "text" | "whole", name, bytes) or ("texts", name,
    list of values) at a time; other units are read by the worker. Raises UserError.
    """
    kind, file = unit[:2]
    if kind != "stream":
        yield unit, bytes_on_disk(unit)
    elif file.format == "hf":
        yield from gather(file.path, hf_rows(file.path, column))
    elif file.format == "parquet":
        yield from gather(file.path, until_damaged(parquet_rows(file, column)))
    else:
        yield from decompressed(file)


def gather(name, values):
    """Pieces of about PIECE characters out of single values, which end, if they have to, with a Fault."""
    texts, size = [], 0
    for value in values:
        if isinstance(value, Fault):
            yield ("fault", name, value), 0
            continue
        texts.append(value)
        size += len(value) if isinstance(value, str) else 0
        if size >= PIECE:
            yield ("texts", name, texts), size
            texts, size = [], 0
    yield ("texts", name, texts), size


def until_damaged(items):
    """All items that can be read, then a Fault for whatever exception ended them: a library has many kinds of it."""
    try:
        yield from items
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # the operating system's, not the library's
            yield Fault("unreadable", error.strerror)
        else:
            yield Fault("damaged, read up to there", in_one_line(error))


def decompressed(file):
    """Pieces of a compressed file."""
    kind = "whole" if file.format == "json" else file.format
    at = 0
    for n, item in enumerate(until_damaged(cut_stream(file, LONGEST_JSON if kind == "whole" else PIECE))):
        if isinstance(item, Fault):
            yield ("fault", file.path, item), 0
            continue
        data, end = item
        if n == 0 and kind == "lines" and (other := other_bytes(data)):
            yield ("fault", file.path, Fault("not UTF-8 text", other)), 0
            return
        if n > 0 and kind == "text":
            yield ("fault", file.path, Fault("huge, cut into parts", f"part {n + 1}")), 0
        yield (kind, file.path, data), end - at
        at = end


def cut_stream(file, longest):
    """Yields (decompressed bytes, where in the file that ends), `longest` bytes and on to the end of the line; before
    an exception all whole lines that could be read."""
    if not file.size:
        raise EOFError("no bytes in it")
    with open(file.path, "rb") as raw, decompress(raw, file.compression) as stream:
        while True:
            parts, room = [], longest
            try:
                while room and (part := stream.read1(min(room, CHUNK))):
                    parts.append(part)
                    room -= len(part)
                parts.append(stream.readline(LONGEST_LINE))
            except Exception:
                read = b"".join(parts)
                if lines := read[: read.rfind(b"\n") + 1]:
                    yield lines, raw.tell()
                raise
            if not any(parts):
                return
            yield b"".join(parts), raw.tell()


def decompress(raw, compression):
    """A buffered reader of what a compressed file holds."""
    return io.BufferedReader(Members(raw, DECOMPRESSORS[compression]), CHUNK)


def zstd_decompressor():
    import zstandard

    # dumps have windows of 2 GiB: python-zstandard issue 157
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


DECOMPRESSORS = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    ".zst": zstd_decompressor,
}


class Members(io.RawIOBase):
    """What a compressed file holds: of all members, streams or frames that were written one after the other. Python's
    readers pass over a second one that is damaged, zstandard's over a last one that is cut off; here both raise."""

    def __init__(self, raw, decompressor):
        self.raw, self.decompressor = raw, decompressor
        self.member = None
        self.rest = b""  # of the file, not decompressed yet
        self.content = memoryview(b"")  # decompressed, not read yet

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.content:
            if not self.decompress_more():
                return 0
        n = min(len(buffer), len(self.content))
        buffer[:n] = self.content[:n]
        self.content = self.content[n:]
        return n

    def decompress_more(self):
        """Whether there was more in the file."""
        data = self.rest or self.raw.read(CHUNK // 8)  # a small part of the file may be a large one of what it holds
        self.rest = b""
        if not data and self.member:
            raise EOFError("cut off")
        if not self.member:
            data = data.lstrip(b"\0")  # padding
        if data:
            self.member = self.member or self.decompressor()
            self.content = memoryview(self.member.decompress(data))
            if self.member.eof:
                self.rest, self.member = self.member.unused_data, None
            return True
        return self.raw.peek(1) != b""


def parquet_rows(file, column):
    from pyarrow import parquet

    if file.compression:
        yield Fault("compressed parquet files, not read: decompress them", "")
        return
    with open(file.path, "rb") as raw:
        table = parquet.ParquetFile(raw)
        columns = table.schema_arrow.names
        if column not in columns:
            yield Fault(f"without a column {column!r}", f"it has {', '.join(columns)}")
            return
        for batch in table.iter_batches(batch_size=256, columns=[column]):
            yield from values_of(batch.column(0))


def values_of(column):
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # of one value: bytes, which will be reported as such
        return [value.as_buffer().to_pybytes() if value.is_valid else None for value in column]


def hf_data(name):
    """A data set, of which rows will be read as they come. Raises UserError with what there is in it."""
    path, _, config = name.removeprefix("hf:").partition(":")
    try:
        from datasets import load_dataset

        logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it logs what it raises
        return load_dataset(os.path.expanduser(path), config or None, split="train", streaming=True)
    except Exception as error:
        raise UserError(f"{name} (hf:NAME:CONFIGURATION, of which `train` is read): {in_one_line(error)}") from None


def hf_rows(name, column):
    rows = iter(hf_data(name))
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise UserError(f"{name} ended in an error, the same command goes on: {in_one_line(error)}") from None
        if row is None:
            return
        if column not in row:
            raise UserError(f"{name} has no column {column!r}; --field is one of: {', '.join(row)}")
        yield row[column]


# ----------------------------------------------------------------------------------------------------------------------
# pieces -> documents


def read_documents(piece, column, report):
    """Yields (name, value) for every document of a piece: bytes of a file, or what a row has in its column;
    report(problem, name) for what is none."""
    kind, source, *rest = piece
    if kind == "fault":
        report(rest[0].problem, with_reason(source, rest[0].reason))
    elif kind == "texts":
        yield from ((f"{source}: {str(value)[:40]!r}", value) for value in rest[0])
    elif kind == "text":
        yield source, rest[0]
    elif kind == "lines":
        yield from rows_of_lines(source, rest[0], column, report)
    elif kind == "whole" and rest:
        yield from rows_of_json(source, rest[0], column, report)
    else:
        for file in piece[1:] if kind == "files" else [source]:
            try:
                yield from documents_of_file(kind, file, rest, column, report)
            except OSError as error:
                report("unreadable", with_reason(file.path, error.strerror))


def documents_of_file(kind, file, place, column, report):
    """As read_documents, of a file that a worker reads by itself, or of a range of it."""
    if kind == "files":
        yield file.path, file.path.read_bytes()
    elif kind == "range" and file.format == "text":
        report("huge, cut into parts", f"{file.path} from byte {place[0]:,}")
        yield file.path, read_range(file.path, *place)
    elif kind == "range":
        with open(file.path, "rb") as f:
            other = other_bytes(f.read(8))
        if not other:
            yield from rows_of_lines(file.path, read_range(file.path, *place), column, report)
        elif place[0] == 0:  # said once
            report("not UTF-8 text", with_reason(file.path, other))
    elif file.size > LONGEST_JSON:
        report("a JSON array too large to be read: make it JSON lines", file.path)
    else:
        yield from rows_of_json(file.path, file.path.read_bytes(), column, report)


def other_bytes(start):
    """What a file is that begins so, if that is certainly neither UTF-8 text nor JSON; else None."""
    return next((name for begin, name in OTHER_BYTES.items() if start.startswith(begin)), None)


def rows_of_lines(name, lines, column, report):
    """(name, value) of every line that is a JSON object with such a column."""
    for line in lines.split(b"\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except UnicodeDecodeError:
            report("not UTF-8 text", f"{name}: {line[:40]}")
            continue
        except (ValueError, RecursionError):
            row = None
        yield from value_of(row, column, f"{name}: {line[:40]}", report)


def rows_of_json(name, data, column, report):
    """(name, value) of every object in a file that is one JSON array, or one object, or JSON lines after all."""
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError):
        if other := other_bytes(data):
            report("not UTF-8 text", with_reason(name, other))
        else:
            yield from rows_of_lines(name, data, column, report)
        return
    for n, row in enumerate(rows if isinstance(rows, list) else [rows]):
        yield from value_of(row, column, f"{name}: item {n}", report)


def value_of(row, column, name, report):
    if isinstance(row, dict) and column in row:
        yield name, row[column]
    else:
        report(f"not a JSON object with {column!r}", name)


def text_of(value, name, column, report):
    """The text of a document; None, and a report, where there is none."""
    if isinstance(value, bytes):
        try:
            text = value.decode("utf-8-sig")
        except UnicodeDecodeError:
            report("not UTF-8 text", with_reason(name, other_bytes(value)))
            return None
        if "\0" in text:
            report("not UTF-8 text", with_reason(name, "zero bytes"))
            return None
        if looks_like_json(text) and ".ipynb" not in str(name).lower():
            report("JSON, read as plain text: for its rows, call it .json and name the file", name)
    elif isinstance(value, str):
        text = value
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, as JSON can spell it
            report("not UTF-8 text", name)
            return None
    else:
        report(f"no string in {column!r}", name)
        return None
    if not text.strip():
        report("empty", name)
        return None
    return text


def looks_like_json(text):
    """Whether a text, or its first line, is a JSON object or array."""
    text = text.lstrip()
    if text[:1] not in ("{", "["):
        return False
    for part, kinds in ((text.partition("\n")[0], dict), (text, (dict, list))):
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(json.loads(part), kinds):
                return True
    return False


def read_range(path, start, stop):
    """The lines of a file that begin in [start, stop), so that ranges that tile the file tile its lines."""
    with open(path, "rb") as f:
        first, end = line_start(f, start), line_start(f, stop)
        f.seek(first)
        return f.read(end - first)


def line_start(f, at):
    """Where the first line from byte `at` on begins; in a line of more than LONGEST_LINE the next character."""
    f.seek(max(at - 1, 0))
    line = f.readline(LONGEST_LINE) if at else b""
    if len(line) < LONGEST_LINE:
        return at - 1 + len(line) if at else 0
    return at + next((i for i in range(4) if line[1 + i] & 0xC0 != 0x80), 0)


# ----------------------------------------------------------------------------------------------------------------------
# words


def counted(problems):
    """{problem: [name, ...]} -> {problem: {"count": how many, "first": the first ten}}."""
    return {problem: {"count": len(names), "first": names[:10]} for problem, names in problems.items()}


def describe(problems):
    """One line for each problem that was counted: how many and the first names."""
    for problem, found in sorted(problems.items()):
        yield f"{found['count']:,} {problem}: {', '.join(found['first'])}{', ...' if found['count'] > 10 else ''}"


def describe_left_out(endings):
    """One line, if anything was left out: 322 left out by their names: 314 .xml, 6 .srt, 2 without ending."""
    ordered = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{count:,} {end or 'without ending'}" for end, count in ordered]
    if named:
        more = ", ..." if len(named) > 10 else ""
        yield f"{sum(endings.values()):,} left out by their names: {', '.join(named[:10])}{more}"


def with_reason(name, reason):
    return printable(name) + (f" ({reason})" if reason else "")


def printable(path):
    """A path in one line that any terminal and any file can hold, also where its bytes are no UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


def in_one_line(error):
    return " ".join(str(error).split()) or type(error).__name__
