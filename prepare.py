"""
Files of text and code -> uint16 token shards, one folder per source.

    python prepare.py                                     # default corpus: see corpus.py; nothing is downloaded
    python prepare.py text=books/ code='src/**/*.py'      # your own: folders, files, globs; several by commas or spaces
    python prepare.py web=crawl/*.jsonl.zst --field=content --workers=16
    python prepare.py web=hf:HuggingFaceFW/fineweb:sample-10BT
    python prepare.py web=crawl/ --shard=0/4              # machine 0 of 4 that share --out, or copy it together later
    python prepare.py synthetic --problems=50000          # problems, solutions and asserts that pass: see synthetic.py

The same command goes on where it was stopped, by whatever death, and does nothing when all is done. It writes to --out

    <source>/train-00000.bin ..., val-00000.bin ...       little-endian uint16, an end-of-text id after each document
    <source>/meta.json                                    what is in them and what was left out; written last

Preparing is an external sort of the documents by a seeded hash of their bytes. The input is cut into pieces that do not
depend on the number of workers; each is encoded and written as a run, sorted by hash. Then each shard collects its
range of hashes from all runs. So documents come out shuffled, equal ones meet and one is kept, the hash decides between
train and val, memory is a few pieces per worker however long the input, runs survive a crash, and any
number of workers and machines writes the same bytes.
"""

import argparse
import contextlib
import glob
import gzip
import hashlib
import io
import json
import lzma
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tqdm import tqdm

import corpus
import synthetic
import tokenizer

PIECE = 8 << 20  # bytes of input that a worker holds at a time; a longer file of text is cut at line ends
LONGEST_LINE = 64 << 20  # bytes; no line end is waited for beyond that
SHARD = 16 << 20  # tokens, about
STRETCH = 1 << 18  # characters encoded in one call: white space of a million characters overflows the regex's stack
SAFE_CUT = re.compile(r"[A-Za-z0-9](?=[ \n])")  # no token spans the end of a word, so a cut there changes no id
# what is taken from a folder; a file that is named, or matches a glob, is read whatever it is called
SUFFIXES = set(
    """.txt .md .rst .tex .org .adoc .py .pyi .pyx .ipynb .c .h .cc .cpp .cxx .hpp .hh .cu .cuh .m .cs .java .kt .scala
    .go .rs .swift .zig .d .nim .js .jsx .mjs .ts .tsx .vue .svelte .html .css .scss .less .php .rb .pl .pm .lua .r .jl
    .hs .ml .mli .fs .ex .exs .erl .clj .el .lisp .scm .f .f90 .v .sv .vhd .asm .s .sh .bash .ps1 .sql .proto .cmake .mk
    .toml .yaml .yml .jsonl .jsonl.gz .jsonl.xz .jsonl.zst .parquet""".split()  # noqa: SIM905
)
DEFAULT_VOCAB = 8192  # ids for the default corpus: what suits 15 M tokens and the small models they can train
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
BAR = {"unit": "B", "unit_scale": True, "disable": None}  # no bar where stderr is no terminal
PACKAGES = {".zst": "zstandard", ".parquet": "pyarrow", "hf:": "datasets"}  # optional, for such inputs only


class Mistake(Exception):
    """Something the person at the keyboard can put right: printed as one line, exit code 2."""


# ----------------------------------------------------------------------------------------------------------------------
# inputs -> units of work -> pieces


def find_inputs(named):
    """The files, or the hf: name, that one argument stands for, in a fixed order. Raises Mistake."""
    path = Path(named).expanduser()
    if is_hf(named):
        inputs = [named]
    elif path.is_dir():
        files = (Path(top, file) for top, _, names in os.walk(path) for file in names)
        inputs = [f for f in files if is_known(f) and not any(p.startswith(".") for p in f.relative_to(path).parts)]
    else:
        matches = [path] if path.is_file() else map(Path, glob.glob(str(path), recursive=True))
        inputs = [f for f in matches if f.is_file()]
    if not inputs:
        raise Mistake(f"nothing to read in {named!r}: no such file, no match, or a folder without text or source files")
    for mark, package in PACKAGES.items():
        if any(str(f).startswith(mark) or str(f).endswith(mark) for f in inputs) and not find_spec(package):
            raise Mistake(f"reading {named!r} takes one more package: pip install {package}")
    return sorted(inputs)


def is_known(path):
    return path.suffix.lower() in SUFFIXES or "".join(path.suffixes[-2:]).lower() in SUFFIXES


def is_hf(source):
    return str(source).startswith("hf:")


def is_stream(source):
    """Whether an input can only be read front to back: then the main process reads it and deals out the pieces."""
    return is_hf(source) or source.suffix in (".gz", ".xz", ".zst", ".parquet")


def cut_into_units(inputs):
    """
    [("stream", input) | ("range", path, start, stop) | ("files", path, ...)] of at most PIECE bytes but for streams.
    A unit's place in the list names its runs and decides which machine of --shard has it.
    """
    units, files = [], []
    for source in inputs:
        if is_stream(source):
            units.append(("stream", source))
        elif source.suffix == ".jsonl" or (size := source.stat().st_size) > PIECE:
            units += [("range", source, at, at + PIECE) for at in range(0, source.stat().st_size, PIECE)]
        else:
            files.append((source, size))
    while files:
        group, room = [], PIECE
        while files and files[-1][1] <= room:
            room -= files[-1][1]
            group.append(files.pop()[0])
        units.append(("files", *group))
    return units


def bytes_on_disk(unit):
    kind, source, *rest = unit
    if kind == "files":
        return sum(path.stat().st_size for path in unit[1:])
    size = 0 if is_hf(source) else source.stat().st_size
    return min(size, rest[1]) - rest[0] if kind == "range" else size


def read_pieces(unit, field):
    """
    Yields (piece, its bytes on disk). A stream is read here, a ("lines", name, bytes) or ("texts", name, list) at a
    time; other units are read by the worker. Raises Mistake.
    """
    kind, source = unit[:2]
    if kind != "stream":
        yield unit, bytes_on_disk(unit)
    elif is_hf(source) or source.suffix == ".parquet":
        texts, size = [], 0
        for text in hf_rows(source, field) if is_hf(source) else parquet_rows(source, field):
            texts.append(text)
            size += len(text) if isinstance(text, str) else 0
            if size >= PIECE:
                yield ("texts", source, texts), size
                texts, size = [], 0
        yield ("texts", source, texts), size
    else:
        with open(source, "rb") as raw, decompress(raw, source.suffix) as f:
            done = 0
            try:
                while lines := f.read(PIECE) + f.readline(LONGEST_LINE):
                    yield ("lines", source, lines), raw.tell() - done
                    done = raw.tell()
            except (OSError, EOFError, lzma.LZMAError, zlib.error, RuntimeError) as e:
                yield ("damaged", source, e), 0


def decompress(raw, suffix):
    if suffix == ".zst":
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    return gzip.open(raw) if suffix == ".gz" else lzma.open(raw)


def parquet_rows(path, field):
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    if field not in file.schema_arrow.names:
        raise Mistake(f"{path} has no column {field!r}; --field is one of: {', '.join(file.schema_arrow.names)}")
    for batch in file.iter_batches(batch_size=256, columns=[field]):
        yield from batch.column(0).to_pylist()


def hf_rows(name, field):
    from datasets import load_dataset

    path, _, config = name.removeprefix("hf:").partition(":")
    for row in load_dataset(path, config or None, split="train", streaming=True):
        if field not in row:
            raise Mistake(f"{name} has no column {field!r}; --field is one of: {', '.join(row)}")
        yield row[field]


# ----------------------------------------------------------------------------------------------------------------------
# in the workers: a piece -> a run


def start_worker(encoding, field, seed):
    """Runs once in every worker process."""
    global ENCODING, EOT, BYTES, FIELD, KEY
    ENCODING, EOT, BYTES = encoding, tokenizer.eot(encoding), tokenizer.byte_lengths(encoding)
    FIELD, KEY = field, str(seed).encode()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    parent = multiprocessing.parent_process()  # workers do not outlive a main process that was killed
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def read_documents(piece, report):
    """Yields (name, bytes or str) for every document of a piece; report(problem, name) for what is none."""
    kind, source, *rest = piece
    if kind == "files":
        for path in piece[1:]:
            try:
                yield path, path.read_bytes()
            except OSError as e:
                report(f"unreadable ({e.strerror})", path)
    elif kind == "texts":
        yield from ((f"{source}: {str(text)[:40]!r}", text) for text in rest[0])
    elif kind == "damaged":
        report(f"damaged, read up to there ({rest[0]})", source)
    elif kind == "range" and source.suffix != ".jsonl":
        report("huge, cut into parts", f"{source} from byte {rest[0]:,}")
        yield source, read_range(source, *rest)
    else:
        for line in (rest[0] if kind == "lines" else read_range(source, *rest)).split(b"\n"):
            try:
                if line.strip():
                    yield f"{source}: {line[:40]}", json.loads(line)[FIELD]
            except (ValueError, TypeError, KeyError, RecursionError):
                report(f"not a JSON object with {FIELD!r}", f"{source}: {line[:40]}")


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
    return at + next(i for i in range(4) if line[1 + i] & 0xC0 != 0x80)


def encode(text):
    """uint16 ids of a document, end-of-text last. A special token spelt out in `text` is plain bytes."""
    ids, start = [], 0
    while start < len(text):
        cut = SAFE_CUT.search(text, start + STRETCH, start + 2 * STRETCH)
        stop = cut.end() if cut else start + 2 * STRETCH
        ids.append(ENCODING.encode_to_numpy(text[start:stop], disallowed_special=()))
        start = stop
    return np.concatenate([*ids, [EOT]], dtype="<u2", casting="unsafe")  # tokenizer.load has seen that ids fit


def write_run(piece, run):
    """
    Encodes a piece and writes its documents sorted by hash: run.ids, their tokens; run.npy, uint64 (3, documents), the
    two halves of each hash and where its tokens end; run.json, last, the counts and the names of what was left out.
    """
    hashes, documents, n_bytes, problems = [], [], 0, {}

    def report(problem, name):
        problems.setdefault(problem, []).append(str(name))

    for name, document in read_documents(piece, report):
        try:
            text = document.decode("utf-8-sig") if isinstance(document, bytes) else document or ""
            data = text.encode()
        except (UnicodeError, AttributeError):
            report("not UTF-8 text", name)
            continue
        if not text.strip():
            report("empty", name)
        elif isinstance(document, bytes) and "\0" in text:
            report("not UTF-8 text", name)  # a zero byte: a binary format, or UTF-16
        else:
            hashes.append(hashlib.blake2b(data, digest_size=16, key=KEY).digest())
            documents.append(encode(text))
            n_bytes += len(data)
    keys = np.frombuffer(b"".join(hashes), ">u8").reshape(-1, 2).T.astype(np.uint64)
    order = np.lexsort(keys[::-1])
    ends = np.cumsum([len(documents[i]) for i in order], dtype=np.uint64)
    index = io.BytesIO()
    np.save(index, np.vstack([keys[:, order], ends]))
    counts = {"documents": len(documents), "bytes": n_bytes, "tokens": sum(map(len, documents)), "problems": problems}
    write(run.with_suffix(".ids"), b"".join(documents[i].tobytes() for i in order))
    write(run.with_suffix(".npy"), index.getvalue())
    write(run.with_suffix(".json"), json.dumps(counts).encode())


def write(path, data):
    """Writes a file whole or not at all, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# in the workers: a range of hashes from all runs -> a shard


def merge_runs(runs, low, high):
    """The documents with low <= first half of hash < high, once each, in the order of their hashes: uint16 arrays."""
    keys, lengths, ids = [np.empty((2, 0), np.uint64)], [np.empty(0, np.uint64)], [np.empty(0, "<u2")]
    for run in sorted(runs.glob("*.npy")):
        index = np.load(run, mmap_mode="r")
        a, b = hashes_below(index, low), hashes_below(index, high)
        start, stop = tokens_before(index, a), tokens_before(index, b)
        keys.append(np.array(index[:2, a:b]))
        lengths.append(np.diff(index[2, a:b], prepend=np.uint64(start)))
        ids.append(np.fromfile(run.with_suffix(".ids"), "<u2", count=stop - start, offset=2 * start))
    keys, lengths, ids = np.concatenate(keys, axis=1), np.concatenate(lengths).astype(np.int64), np.concatenate(ids)
    order, ends = np.lexsort(keys[::-1]), np.cumsum(lengths)
    new = np.ones(len(order), bool)
    new[1:] = (keys[:, order[1:]] != keys[:, order[:-1]]).any(axis=0)
    return [ids[ends[i] - lengths[i] : ends[i]] for i in order[new]]


def hashes_below(index, bound):
    return int(np.searchsorted(index[0], np.uint64(bound - 1), side="right")) if bound else 0


def tokens_before(index, document):
    return int(index[2, document - 1]) if document else 0


def write_shard(runs, path, low, high, tail):
    """
    Writes one shard and returns its entry for meta.json. `tail` is 0 where val takes whole documents, else the part of
    every document, at its end, that is val and not train.
    """
    entry = runs / f"{path.stem}.shard"
    if entry.exists():
        return json.loads(entry.read_text())
    documents = merge_runs(runs, low, high)
    cuts = [int(len(ids) * (1 - tail)) for ids in documents] if tail else []
    if cuts and path.name.startswith("val"):
        documents = [ids[cut:] for ids, cut in zip(documents, cuts, strict=True)]
    elif cuts:
        documents = [np.append(ids[:cut], np.uint16(EOT)) for ids, cut in zip(documents, cuts, strict=True) if cut]
    ids = np.concatenate([np.empty(0, "<u2"), *documents])
    write(runs / path.name, ids.data)
    (runs / path.name).replace(path)
    shard = {"file": path.name, "tokens": len(ids), "documents": len(documents)}
    shard |= {"bytes": int(BYTES[ids].sum(dtype=np.int64)), "sha256": hashlib.sha256(ids.data).hexdigest()}
    write(entry, json.dumps(shard).encode())
    return shard


# ----------------------------------------------------------------------------------------------------------------------
# one source


def prepare_source(name, inputs, encoding, pool, args):
    """Prepares a source, or goes on with it. Returns its meta.json; None while other machines are to finish it."""
    folder = args.out / name
    files = [[str(f)] if is_hf(f) else [str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in inputs]
    settings = {"seed": args.seed, "val": args.val, "field": args.field, "tokenizer": tokenizer.digest(encoding)}
    fingerprint = hashlib.sha256(json.dumps([1, files, settings, PIECE, SHARD]).encode()).hexdigest()
    if args.fresh and folder.exists():
        shutil.rmtree(folder)
    if meta := read_meta(folder):
        if meta.get("fingerprint") != fingerprint:
            raise Mistake(
                f"{folder} was prepared from other inputs or settings; --fresh replaces it, --out=... keeps it"
            )
        print(f"{name}: {folder} is already prepared, nothing to do")
        return meta
    runs = folder / f"runs-{fingerprint[:12]}"
    write_runs(name, cut_into_units(inputs), runs, pool, args)
    missing = [k for k in range(args.shard[1]) if not (runs / f"part-{k}-of-{args.shard[1]}").exists()]
    if missing:
        print(f"{name}: done here; the machine that finds all parts in {runs} writes the shards, {missing} are missing")
        return None
    read = count_runs(runs)
    if not read["documents"]:
        shutil.rmtree(runs)
        with contextlib.suppress(OSError):  # no trace, unless there was something before
            folder.rmdir()
            args.out.rmdir()
        raise Mistake(f"{name}: no documents in it; {'; '.join(describe(read['problems']))}")
    plan, tail = plan_shards(runs, args.val, read["tokens"])
    jobs = [pool.submit(write_shard, runs, folder / file, low, high, tail) for file, low, high in plan]
    shards = [job.result() for job in jobs]
    about = {"name": args.tokenizer, "vocab_size": encoding.n_vocab, "sha256": settings["tokenizer"]}
    meta = {"format": 1, "tokenizer": about | {"eot": tokenizer.eot(encoding)}}
    meta |= {split: total([s for s in shards if s["file"].startswith(split)]) for split in ("train", "val")}
    unique = meta["val"]["documents"] + (0 if tail else meta["train"]["documents"])
    meta |= {"duplicates": read["documents"] - unique, "val_is": "the end of every document" if tail else "by hash"}
    meta |= {"read": read, "inputs": len(inputs), "settings": settings, "fingerprint": fingerprint}
    write(folder / "meta.json", json.dumps(meta, indent=1).encode())
    for old in folder.glob("runs-*"):
        shutil.rmtree(old)
    return meta


def read_meta(folder):
    """A source's meta.json; None if it is unfinished or its shards are not all there."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        shards = meta["train"]["shards"] + meta["val"]["shards"]
        return meta if all((folder / s["file"]).stat().st_size == 2 * s["tokens"] for s in shards) else None
    except (OSError, ValueError, KeyError):
        return None


def write_runs(name, units, runs, pool, args):
    """Has every piece of this machine's units encoded that is not there yet, under a bar over the bytes on disk."""
    machine, machines = args.shard
    mine = range(machine, len(units), machines)
    known = not any(is_hf(units[u][1]) or units[u][1].suffix == ".parquet" for u in mine)  # those count bytes of text
    pending = deque()  # few at a time: pieces of a stream must not pile up in memory
    with tqdm(total=sum(bytes_on_disk(units[u]) for u in mine) if known else None, **BAR, desc=name) as bar:
        for u in mine:
            for k, (piece, size) in enumerate(read_pieces(units[u], args.field)):
                run = runs / f"{u:06d}-{k:06d}.json"
                if not run.exists():
                    pending.append((pool.submit(write_run, piece, run), size))
                while len(pending) > 2 * args.workers:
                    finish(pending, bar)
        while pending:
            finish(pending, bar)
    write(runs / f"part-{machine}-of-{machines}", b"")


def finish(pending, bar):
    encoded, size = pending.popleft()
    encoded.result()
    bar.update(size)


def count_runs(runs):
    """Documents, bytes and tokens in all runs, and of each problem how many and the first names."""
    counts = {"documents": 0, "bytes": 0, "tokens": 0, "problems": {}}
    for path in sorted(runs.glob("*.json")):
        run = json.loads(path.read_text())
        for key in ("documents", "bytes", "tokens"):
            counts[key] += run[key]
        for problem, names in run["problems"].items():
            known = counts["problems"].setdefault(problem, {"count": 0, "first": []})
            known["count"] += len(names)
            known["first"] = (known["first"] + names)[:10]
    return counts


def describe(problems):
    for problem, found in sorted(problems.items()):
        yield f"{found['count']} {problem}: {', '.join(found['first'])}{', ...' if found['count'] > 10 else ''}"


def plan_shards(runs, val, tokens):
    """
    [(file name, lowest hash, end)], and `tail` of write_shard. val is the lowest hashes. Where documents are so few
    that this misses the asked fraction of the tokens by a factor of 3, val is the end of every document instead.
    """
    border = int(val * 2**64)
    indexes = [np.load(run, mmap_mode="r") for run in runs.glob("*.npy")]
    val_tokens = sum(tokens_before(index, hashes_below(index, border)) for index in indexes)
    tail = 0 if val / 3 <= val_tokens / tokens <= val * 3 else val
    splits = {"train": (0 if tail else border, 2**64, tokens), "val": (0, 2**64 if tail else border, val * tokens)}
    plan = []
    for split, (low, high, size) in splits.items():
        n = math.ceil(size / SHARD)
        edges = [low + (high - low) * k // max(n, 1) for k in range(n + 1)]
        plan += [(f"{split}-{k:05d}.bin", edges[k], edges[k + 1]) for k in range(n)]
    return plan, tail


def total(shards):
    return {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents", "bytes")} | {"shards": shards}


def print_table(metas):
    print(
        f"{'source':<16}{'split':<7}{'documents':>12}{'duplicates':>12}{'bytes':>17}{'tokens':>17}{'bytes/token':>13}"
    )
    for name, meta in metas.items():
        for split, duplicates in (("train", f"{meta['duplicates']:,}"), ("val", "")):
            n = meta[split]
            rate = n["bytes"] / max(n["tokens"] - n["documents"], 1)
            print(
                f"{name:<16}{split:<7}{n['documents']:>12,}{duplicates:>12}{n['bytes']:>17,}{n['tokens']:>17,}{rate:>13.2f}"
            )
    for name, meta in metas.items():
        if meta["val_is"] != "by hash":
            print(f"{name}: its documents are too few or too long to hold some out, so val is {meta['val_is']}")
        for line in describe(meta["read"]["problems"]):
            print(f"{name}: {line}")


# ----------------------------------------------------------------------------------------------------------------------
# command line


def prepare_default(out="data", vocab_size=DEFAULT_VOCAB):
    """
    Prepares the default corpus, in a process of its own because one that has torch's threads should not fork.
    Raises subprocess.CalledProcessError.
    """
    subprocess.run([sys.executable, __file__, f"--out={out}", f"--vocab_size={vocab_size}"], check=True)


def collect_default(folder, pool):
    """{source: [.jsonl file]} of the default corpus, collected once and then kept in `folder`, where it can be read."""
    sources = {name: [folder / f"{name}.jsonl"] for name in ("text", "code")}
    if not all(path.exists() for [path] in sources.values()):
        print(f"collecting the default corpus from {sys.prefix} into {folder}")
        for name, documents in corpus.collect(pool).items():
            write(folder / f"{name}.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in documents).encode())
    return sources


def collect_synthetic(folder, seed, problems):
    """[.jsonl file, ...] of verified programs, made once and then kept in `folder`, and says what was left out."""
    if sys.platform != "linux":
        raise Mistake("synthetic programs are run before they are kept, which needs Linux")
    paths, fates = [], Counter()
    for chunk in tqdm(range(-(-problems // synthetic.CHUNK)), desc="synthetic", disable=None):
        paths.append(folder / f"synthetic-{seed}-{chunk:05}.jsonl")
        counts = paths[-1].with_suffix(".json")  # written last
        if not counts.exists():
            kept, of_these = synthetic.programs(seed, chunk)
            write(paths[-1], "".join(json.dumps({"text": program}) + "\n" for program in kept).encode())
            write(counts, json.dumps(of_these).encode())
        fates += json.loads(counts.read_text())
    total, kept = sum(fates.values()), fates.pop("kept", 0)
    out = ", ".join(f"{count:,} {fate}" for fate, count in sorted(fates.items()) if count)
    print(f"synthetic: {kept:,} of {total:,} problems kept, {100 * (1 - kept / total):.2f}% rejected: {out}")
    return paths


def parse_sources(words):
    """{name: [input, ...]} from NAME=INPUT,INPUT INPUT ... Raises Mistake."""
    sources, name = {}, None
    for word in words:
        found = re.fullmatch(r"([\w.-]+)=(.+)", word)
        if not found and not name:
            raise Mistake(f"{word!r} has no name: text={word} prepares it as the source 'text'")
        name, named = found.groups() if found else (name, word)
        sources.setdefault(name, []).extend(source for one in named.split(",") for source in find_inputs(one))
    return sources


def parse_arguments():
    about = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **about)
    parser.error = fail
    parser.add_argument("sources", nargs="*", metavar="NAME=INPUT,...", help="folder, file, glob or hf:NAME[:config]")
    parser.add_argument("--out", default="data", type=Path, help="folder to write to (data)")
    parser.add_argument("--tokenizer", default="nanocrystal", help="nanocrystal, or a tiktoken encoding such as gpt2")
    parser.add_argument("--vocab_size", type=int, help="ids of nanocrystal (32,064; 8,192 for the default corpus)")
    parser.add_argument("--val", type=float, help="fraction held out (0.01; 0.03 of the default corpus)")
    parser.add_argument("--field", default="text", help="where .jsonl, .parquet and hf: hold the document (text)")
    parser.add_argument("--problems", default=20_000, type=int, help="made up for the source `synthetic` (20000)")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="this is machine I of N, from 0 (0/1)")
    parser.add_argument("--workers", default=CORES, type=int, help="processes (one per core)")
    parser.add_argument("--seed", default=0, type=int, help="of the shuffle and the split (0)")
    parser.add_argument("--fresh", action="store_true", help="replace what was prepared before")
    args = parser.parse_intermixed_args()
    if not args.sources and args.tokenizer == "nanocrystal" and args.vocab_size is None:
        args.vocab_size = DEFAULT_VOCAB
    if args.val is None:
        args.val = 0.01 if args.sources else 0.03
    machine = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    args.shard = tuple(map(int, machine.groups())) if machine else (0, 0)
    if args.shard[0] >= args.shard[1]:
        fail("--shard is I/N with I from 0 to N-1, such as --shard=0/4")
    if not 0 <= args.val < 1:
        fail(f"--val={args.val} is no fraction; 0.01 holds out one token in a hundred")
    if args.workers < 1 or args.problems < 1:
        fail("--workers and --problems are at least 1")
    return args


def fail(message, code=2):
    """Ends the program at once, workers included: whatever they write is whole or absent."""
    os.write(2, f"prepare.py: {message}\n".encode())  # unlike print, also from a signal's handler
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)


def main():
    args, began = parse_arguments(), time.time()
    tqdm.monitor_interval = 0  # its thread would be there when the workers are forked
    # a KeyboardInterrupt is lost if Python happens to be in a callback
    signal.signal(signal.SIGINT, lambda *_: fail("stopped; the same command goes on from here", code=130))
    try:
        encoding = tokenizer.load(args.tokenizer, args.vocab_size)
        sources = parse_sources([word for word in args.sources if word != "synthetic"])
        start = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        pool = ProcessPoolExecutor(args.workers, start, start_worker, (encoding, args.field, args.seed))
        if "synthetic" in args.sources:
            sources["synthetic"] = collect_synthetic(args.out / "corpus", args.seed, args.problems)
        sources = sources or collect_default(args.out / "corpus", pool)
        metas = {name: prepare_source(name, inputs, encoding, pool, args) for name, inputs in sources.items()}
        pool.shutdown()
    except (Mistake, tokenizer.TokenizerError, OSError) as e:
        fail(e)
    except Exception:
        traceback.print_exc()
        fail("an error of its own, see above", code=1)
    print_table({name: meta for name, meta in metas.items() if meta})
    print(f"{time.time() - began:.1f} s")


if __name__ == "__main__":
    main()
