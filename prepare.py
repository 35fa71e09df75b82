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

import contextlib
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

import corpus
import errors
import files
import readers
import synthetic
import tokenizer
from errors import UserError

SHARD = 16 << 20  # tokens, about
STRETCH = 1 << 18  # characters encoded in one call: white space of a million characters overflows the regex's stack
SAFE_CUT = re.compile(r"[A-Za-z0-9](?=[ \n])")  # no token spans the end of a word, so a cut there changes no id
DEFAULT_VOCAB = 8192  # ids for the default corpus: what suits 15 M tokens and the small models they can train
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
BAR = {"unit": "B", "unit_scale": True, "disable": None}  # no bar where stderr is no terminal
# the names of all that is written here; `.tmp` is what a death left of a file
SHARD_FILE = re.compile(r"(train|val)-\d{5,}\.bin")
RUNS_FOLDER = re.compile(r"runs-[0-9a-f]{12}")
RUNS_FILE = re.compile(
    r"(\d{6,}-\d{6,}\.(ids|npy|json)|part-\d+-of-\d+(\.lock)?|shards\.lock|tokenizer\.json"
    r"|(train|val)-\d{5,}\.(bin|shard))(\..+\.tmp)?"
)
LEFT_FILE = re.compile(r"(train|val)-\d{5,}\.bin|tokenizer\.json|meta\.json\..+\.tmp")
CORPUS_FILE = re.compile(r"((text|code)\.jsonl|synthetic-(-?\d+)-\d{5,}(-first-\d+)?\.jsonl?)(\..+\.tmp)?")


# ----------------------------------------------------------------------------------------------------------------------
# in the workers: a piece -> a run


def set_up(encoding, field, seed):
    """What write_run and write_shard work with, in the process that does."""
    global ENCODING, EOT, BYTES, FIELD, KEY
    ENCODING, EOT, BYTES = encoding, tokenizer.eot(encoding), tokenizer.byte_lengths(encoding)
    FIELD, KEY = field, str(seed).encode()


def start_worker(*settings):
    """Runs once in every worker process."""
    set_up(*settings)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    parent = multiprocessing.parent_process()  # workers do not outlive a main process that was killed
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def encode(text):
    """uint16 ids of a document, end-of-text last. A special token spelt out in `text` is plain bytes."""
    ids, start = [], 0
    while start < len(text):
        cut = SAFE_CUT.search(text, start + STRETCH, start + 2 * STRETCH)
        stop = cut.end() if cut else start + 2 * STRETCH
        further = start and getattr(ENCODING, "encode_further", None)
        part = text[start:stop]
        ids.append(further(part) if further else ENCODING.encode_to_numpy(part, disallowed_special=()))
        start = stop
    ids = np.concatenate([*ids, [EOT]], dtype="<u2", casting="unsafe")  # tokenizer.load has seen that ids fit
    if isinstance(ENCODING, tokenizer.FileEncoding):  # its samples cannot show all that a normalizer may change
        ENCODING.check(text, ids[:-1].tolist())
    return ids


def write_run(piece, run):
    """
    Encodes a piece and writes its documents sorted by hash: run.ids, their tokens; run.npy, uint64 (3, documents), the
    two halves of each hash and where its tokens end; run.json, last, the counts and the names of what was left out.
    """
    hashes, documents, n_bytes, problems = [], [], 0, {}

    def report(problem, name):
        problems.setdefault(problem, []).append(readers.printable(name))

    for name, value in readers.read_documents(piece, FIELD, report):
        text = readers.text_of(value, name, FIELD, report)
        if text is None:
            continue
        try:
            ids = encode(text)
        except tokenizer.TokenizerError as error:
            report("that the tokenizer does not give back, left out", f"{name} ({error})")
            continue
        data = text.encode()
        hashes.append(hashlib.blake2b(data, digest_size=16, key=KEY).digest())
        documents.append(ids)
        n_bytes += len(data)
    keys = np.frombuffer(b"".join(hashes), ">u8").reshape(-1, 2).T.astype(np.uint64)
    order = np.lexsort(keys[::-1])
    ends = np.cumsum([len(documents[i]) for i in order], dtype=np.uint64)
    index = io.BytesIO()
    np.save(index, np.vstack([keys[:, order], ends]))
    counts = {"documents": len(documents), "bytes": n_bytes, "tokens": sum(map(len, documents)), "problems": problems}
    files.write(run.with_suffix(".ids"), b"".join(documents[i].tobytes() for i in order))
    files.write(run.with_suffix(".npy"), index.getvalue())
    files.write(run.with_suffix(".json"), json.dumps(counts).encode())


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


def write_shard(runs, name, low, high, tail):
    """
    Writes one shard beside the runs, unless it was before, and returns its entry for meta.json. `tail` is 0 where val
    takes whole documents, else the part of every document, at its end, that is val and not train.
    """
    entry = (runs / name).with_suffix(".shard")
    if entry.exists():
        shard = json.loads(entry.read_text())
        if is_whole(runs, shard):
            return shard
    documents = merge_runs(runs, low, high)
    cuts = [int(len(ids) * (1 - tail)) for ids in documents] if tail else []
    if cuts and name.startswith("val"):
        documents = [ids[cut:] for ids, cut in zip(documents, cuts, strict=True)]
    elif cuts:
        documents = [np.append(ids[:cut], np.uint16(EOT)) for ids, cut in zip(documents, cuts, strict=True) if cut]
    ids = np.concatenate([np.empty(0, "<u2"), *documents])
    files.write(runs / name, ids.data)
    shard = {"file": name, "tokens": len(ids), "documents": len(documents)}
    shard |= {"bytes": int(BYTES[ids].sum(dtype=np.int64)), "sha256": hashlib.sha256(ids.data).hexdigest()}
    files.write(entry, json.dumps(shard).encode())
    return shard


def is_whole(folder, shard):
    """Whether a shard is there, by its size: to read all shards for their sha256 would take minutes at every start."""
    path = folder / shard["file"]
    return path.is_file() and path.stat().st_size == 2 * shard["tokens"]


# ----------------------------------------------------------------------------------------------------------------------
# what is in --out, and whose it is


def read_meta(folder):
    """A source's meta.json, None if there is none. UserError if it is not one that prepare.py wrote."""
    path = folder / "meta.json"
    if not path.exists():
        return None
    try:
        meta = files.read_json(path)
        right = meta["format"] == 1 and "fingerprint" in meta and set(meta.get("files", [])) <= {"tokenizer.json"}
        for shard in shards_of(meta):
            right = right and bool(SHARD_FILE.fullmatch(shard["file"])) and shard["tokens"] >= 0
    except (UserError, KeyError, TypeError):
        right = False
    if not right:
        raise UserError(f"{path} is damaged or was not written by prepare.py; move {folder} away, or use another --out")
    return meta


def shards_of(meta):
    return meta["train"]["shards"] + meta["val"]["shards"]


def files_of(meta):
    """Names of all that stands beside a meta.json."""
    return [shard["file"] for shard in shards_of(meta)] + meta.get("files", [])


def prepared(folder, fingerprint):
    """The meta.json of a source for which nothing is left to do, else None."""
    meta = read_meta(folder)
    if meta and meta["fingerprint"] == fingerprint and all(is_whole(folder, shard) for shard in shards_of(meta)):
        return meta
    return None


def check_replaceable(folder, fingerprint, fresh):
    """UserError if a folder holds another preparation, and `fresh` does not say to replace it, or what is not ours."""
    meta = read_meta(folder)
    if meta and meta["fingerprint"] != fingerprint and not fresh:
        raise UserError(f"{folder} was prepared from other inputs or settings; --fresh replaces it, --out=... keeps it")
    check_folder(folder)


def check_folder(folder):
    """UserError if a source's folder holds anything that is not known, by name and record, to be prepare.py's."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder} is no folder; use another --out or another name for the source")
    if names := strangers(folder):
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        raise UserError(
            f"{folder} holds {readers.printable(names[0])}{more}, which prepare.py did not write; use another --out or"
            " another name for the source"
        )


def strangers(folder):
    """Names of what prepare.py did not write in a source's folder. Hidden files are nobody's concern."""
    names = {path.name for path in folder.iterdir() if path.name[0] != "."} if folder.is_dir() else set()
    return sorted(names - written(folder))


def written(folder):
    """Names in a source's folder that are prepare.py's: what meta.json records; where there is none but there are runs,
    which are begun in clean folders only, all that a death can have left."""
    meta = read_meta(folder)
    runs = {path.name for path in runs_in(folder)}
    if meta:
        return runs | {"meta.json", *files_of(meta)}
    left = {path.name for path in folder.glob("*") if LEFT_FILE.fullmatch(path.name)}
    return runs | left if runs else set()


def runs_in(folder):
    """The folders of runs in a source's folder that hold nothing but what is written there."""
    for runs in sorted(folder.glob("runs-*")):
        named = RUNS_FOLDER.fullmatch(runs.name) and runs.is_dir() and not runs.is_symlink()
        if named and all(RUNS_FILE.fullmatch(name) for name in os.listdir(runs)):
            yield runs


def remove_runs(folder, name="runs-*"):
    """Remove runs that are of no more use, but for those that somebody works on."""
    for runs in runs_in(folder):
        if runs.match(name) and not any(is_locked(lock) for lock in runs.glob("part-*.lock")):
            shutil.rmtree(runs)


def is_locked(path):
    with open(path) as file:
        return files.lock(file) is False


def check_corpus(out, sources):
    """UserError if the default or the synthetic corpus would be written among somebody's files. `sources`: names."""
    folder = out / "corpus"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name] * folder.exists()
    others = [name for name in names if name[0] != "." and not CORPUS_FILE.fullmatch(name)]
    if others:
        other = readers.printable(min(others))
        raise UserError(f"{folder} holds {other}, which prepare.py did not write; use another --out")
    if "corpus" in sources:
        raise UserError(f"{folder} is where what is collected goes; give the source another name than corpus")


def check_default(out):
    """UserError if a folder holds anything that prepare.py did not write: it is not filled with the default corpus."""
    out = Path(out)
    nearest = next(path for path in (out, *out.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise UserError(f"{nearest} is no folder; use another --out")
    for path in sorted(out.iterdir()) if out.is_dir() else []:
        if path.name[0] == "." or path.name == "corpus":
            continue
        others = [path / name for name in strangers(path)] if path.is_dir() else [path]
        if others:
            raise UserError(
                f"{readers.printable(others[0])} is in the way: the default corpus takes a folder of its own,"
                " --out=FOLDER; to prepare files of your own, name them: text=FILES"
            )
    check_corpus(out, [])


def check_apart(folder, sources):
    """UserError if a source's output folder is or lies in a folder that is read, by whatever name. `sources`: {name:
    Found}."""
    here = Path(os.path.realpath(folder))
    above = {readers.identity(path) for path in (here, *here.parents) if path.exists()}
    if any(above & found.folders for found in sources.values()):
        raise UserError(f"{folder}, where the output goes, is or lies in a folder that is read; use another --out")


@contextlib.contextmanager
def at_work(folder, runs, part):
    """Holds the lock of one machine's part of the runs; waits for another process that has it. UserError if one works
    in this folder with other settings. A mistake leaves no folder that was not there before."""
    absent = [path for path in (folder, folder.parent) if not path.exists()]
    runs.mkdir(parents=True, exist_ok=True)
    with open(runs / f"{part}.lock", "w") as file:
        if files.lock(file) is False:
            print(f"{folder}: waiting for another prepare.py that is at work on this", flush=True)
            files.lock(file, wait=True)
        try:
            if any(is_locked(lock) for lock in folder.glob("runs-*/part-*.lock") if lock.parent != runs):
                raise UserError(
                    f"another prepare.py is at work in {folder} with other inputs or settings; wait for it, or use"
                    " another --out"
                )
            yield
        except UserError:
            if runs.exists() and all(name.endswith(".lock") for name in os.listdir(runs)):
                shutil.rmtree(runs)
            with contextlib.suppress(OSError):  # not empty
                for path in absent:
                    path.rmdir()
            raise


def publish(folder, runs, meta, fresh):
    """
    Put complete shards, and then their meta.json, in the place of what was prepared before. Without a meta.json nobody
    reads shards, so it goes first and comes last; after a death in between, this is done again.
    """
    check_replaceable(folder, meta["fingerprint"], fresh)  # others may have been here meanwhile
    (folder / "meta.json").unlink(missing_ok=True)
    for name in files_of(meta):
        (runs / name).replace(folder / name)
    for name in written(folder) - {*files_of(meta)}:
        if LEFT_FILE.fullmatch(name):
            (folder / name).unlink()
    files.sync(folder)
    files.write(folder / "meta.json", json.dumps(meta, indent=1).encode())


# ----------------------------------------------------------------------------------------------------------------------
# one source


def fingerprint_of(found, settings):
    """sha256 of all that decides a source's shards: names, sizes and times of the files it is made from, and settings.
    A rerun looks at these, not at what the files hold."""
    inputs = []
    for file in found.inputs:
        if file.format == "hf":
            inputs.append([file.path])
        else:
            how = [] if readers.reads_as_before(file) else [file.format]
            inputs.append([os.path.realpath(file.path), file.size, file.modified, *how])
    return hashlib.sha256(json.dumps([1, inputs, settings, readers.PIECE, SHARD]).encode()).hexdigest()


def prepare_source(name, found, fingerprint, settings, encoding, pool, args):
    """Prepares a source, or goes on with it. Returns its meta.json; None while other machines are to finish it."""
    folder = args.out / name
    runs = folder / f"runs-{fingerprint[:12]}"
    machine, machines = args.shard
    with at_work(folder, runs, f"part-{machine}-of-{machines}"):
        if not runs.exists():
            return finished_elsewhere(folder)
        write_runs(name, readers.cut_into_units(found.inputs), runs, pool, args)
        missing = [k for k in range(machines) if not (runs / f"part-{k}-of-{machines}").exists()]
        if missing:
            who = f"the machine that finds all parts in {runs} writes the shards"
            print(f"{name}: done here; {who}, {missing} are missing")
            return None

        # one machine writes the shards; another that came here at the same time finds them written
        with open(runs / "shards.lock", "w") as lock:
            files.lock(lock, wait=True)
            if not runs.exists():
                return finished_elsewhere(folder)
            read = count_runs(runs, found)
            if not read["documents"]:
                shutil.rmtree(runs)
                more = f" and {len(found.inputs) - 1:,} more" if len(found.inputs) > 1 else ""
                none = f"{name}: no documents in {readers.printable(found.inputs[0].path)}{more}"
                raise UserError("; ".join([none, *describe(read)]))
            plan, tail = plan_shards(runs, args.val, read["tokens"])
            jobs = [pool.submit(write_shard, runs, file, low, high, tail) for file, low, high in plan]
            shards = [job.result() for job in jobs]

            meta = {"format": 1, "tokenizer": about_tokenizer(encoding, args.tokenizer)}
            meta |= about_shards(shards, read, tail)
            meta |= {"read": read, "inputs": len(found.inputs), "settings": settings, "fingerprint": fingerprint}
            if isinstance(encoding, tokenizer.FileEncoding):  # that file may be moved or changed, the shards stay
                files.write(runs / "tokenizer.json", encoding._pat_str.encode())
                meta |= {"files": ["tokenizer.json"]}
            publish(folder, runs, meta, args.fresh)
            shutil.rmtree(runs)
    remove_runs(folder)
    return meta


def finished_elsewhere(folder):
    """The meta.json that another process has written while this one waited for it."""
    if meta := read_meta(folder):
        return meta
    raise UserError(f"{folder}: the other prepare.py came to no end; run this again")


def about_tokenizer(encoding, name):
    about = {"name": name, "vocab_size": encoding.n_vocab, "sha256": tokenizer.digest(encoding)}
    return about | {"eot": tokenizer.eot(encoding)}


def about_shards(shards, read, tail):
    train, val = (total([s for s in shards if s["file"].startswith(split)]) for split in ("train", "val"))
    unique = val["documents"] + (0 if tail else train["documents"])
    duplicates = read["documents"] - unique
    val_is = "the end of every document" if tail else "by hash"
    return {"train": train, "val": val, "duplicates": duplicates, "val_is": val_is}


def write_runs(name, units, runs, pool, args):
    """Has every piece of this machine's units encoded that is not there yet, under a bar over the bytes on disk."""
    machine, machines = args.shard
    mine = range(machine, len(units), machines)
    known = not any(units[u][1].format in ("hf", "parquet") for u in mine)  # those count bytes of text
    pending = deque()  # few at a time: pieces of a stream must not pile up in memory
    with tqdm(total=sum(readers.bytes_on_disk(units[u]) for u in mine) if known else None, **BAR, desc=name) as bar:
        for u in mine:
            for k, (piece, size) in enumerate(readers.read_pieces(units[u], args.field)):
                run = runs / f"{u:06d}-{k:06d}.json"
                if not run.exists():
                    pending.append((pool.submit(write_run, piece, run), size))
                while len(pending) > 2 * args.workers:
                    finish(pending, bar)
        while pending:
            finish(pending, bar)
    files.write(runs / f"part-{machine}-of-{machines}", b"")


def finish(pending, bar):
    encoded, size = pending.popleft()
    encoded.result()
    bar.update(size)


def count_runs(runs, found):
    """Documents, bytes and tokens in all runs, and of each problem, `found` ones too, how many and the first names."""
    counts = {"documents": 0, "bytes": 0, "tokens": 0, "problems": readers.counted(found.problems)}
    for path in sorted(runs.glob("*-*.json")):
        run = json.loads(path.read_text())
        for key in ("documents", "bytes", "tokens"):
            counts[key] += run[key]
        for problem, names in run["problems"].items():
            known = counts["problems"].setdefault(problem, {"count": 0, "first": []})
            known["count"] += len(names)
            known["first"] = (known["first"] + names)[:10]
    return counts | {"left_out": dict(found.left_out)}


def describe(read):
    """Lines on what was read and left out."""
    yield from readers.describe(read["problems"])
    yield from readers.describe_left_out(read.get("left_out", {}))


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
        for line in describe(meta["read"]):
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
    """{source: Found} of the default corpus, collected once and then kept in `folder`, where it can be read."""
    paths = [folder / f"{name}.jsonl" for name in ("text", "code")]
    if not all(path.exists() for path in paths):
        print(f"collecting the default corpus from {sys.prefix} into {folder}")
        for name, documents in corpus.collect(pool).items():
            if not (folder / f"{name}.jsonl").exists():
                write_rows(folder / f"{name}.jsonl", documents)
    return {path.stem: found_files([path]) for path in paths}


def collect_synthetic(folder, seed, problems):
    """[.jsonl file, ...] of verified programs, made once and then kept in `folder`, and says what was left out."""
    if sys.platform != "linux":
        raise UserError("synthetic programs are run before they are kept, which needs Linux")
    paths, fates = [], Counter()
    for chunk in tqdm(range(-(-problems // synthetic.CHUNK)), desc="synthetic", disable=None):
        size = min(synthetic.CHUNK, problems - chunk * synthetic.CHUNK)
        part = "" if size == synthetic.CHUNK else f"-first-{size}"
        paths.append(folder / f"synthetic-{seed}-{chunk:05}{part}.jsonl")
        counts = paths[-1].with_suffix(".json")  # written last
        if not counts.exists():
            kept, of_these = synthetic.programs(seed, chunk, size)
            write_rows(paths[-1], kept)
            files.write(counts, json.dumps(of_these).encode())
        fates += json.loads(counts.read_text())
    total, kept = sum(fates.values()), fates.pop("kept", 0)
    out = ", ".join(f"{count:,} {fate}" for fate, count in sorted(fates.items()) if count)
    print(f"synthetic: {kept:,} of {total:,} problems kept, {100 * (1 - kept / total):.2f}% rejected: {out or 'none'}")
    return paths


def write_rows(path, documents):
    files.write(path, "".join(json.dumps({"text": text}) + "\n" for text in documents).encode())


def found_files(paths):
    found = readers.Found()
    for path in paths:
        readers.look_at(path, found)
    return found


def parse_sources(words):
    """{name: [word for an input, ...]} from NAME=INPUT,INPUT INPUT ... Raises UserError."""
    sources, name = {}, None
    for word in words:
        before, sign, after = word.partition("=")
        if name and (not sign or os.path.lexists(os.path.expanduser(word))):  # a folder may be called lang=en
            sources[name].append(word)
        elif not sign:
            raise UserError(f"{word!r} has no name: text={word} prepares it as the source 'text'")
        elif name and "/" in before:
            sources[name].append(word)
        elif not re.fullmatch(r"[\w.-]+", before) or not before.strip(".") or len(os.fsencode(before)) > 255:
            raise UserError(
                f"{before!r} cannot be the name of a source, which becomes a folder: letters, digits, _, - and .,"
                " 255 bytes at most"
            )
        elif not after.strip(","):
            raise UserError(f"{word!r} names nothing to read: {before}=FILES")
        else:
            name = before
            sources.setdefault(name, []).append(after)
    return sources


def parse_arguments(argv):
    parser = errors.Parser(__doc__)
    parser.add_argument("sources", nargs="*", metavar="NAME=INPUT,...", help="folder, file, glob or hf:NAME[:config]")
    parser.add_argument("--out", default="data", type=errors.path, help="folder to write to (data)")
    tokenizers = "nanocrystal, a tiktoken encoding such as gpt2, or a tokenizer.json"
    parser.add_argument("--tokenizer", default="nanocrystal", type=os.path.expanduser, help=tokenizers)
    parser.add_argument("--vocab_size", type=int, help="ids of nanocrystal (32,064; 8,192 for the default corpus)")
    parser.add_argument("--val", type=float, help="fraction held out (0.01; 0.03 of the default corpus)")
    parser.add_argument("--field", default="text", help="where .jsonl, .parquet and hf: hold the document (text)")
    natural = errors.number(int, 1)
    parser.add_argument("--problems", default=20_000, type=natural, help="made up for the source `synthetic` (20000)")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="this is machine I of N, from 0 (0/1)")
    parser.add_argument("--workers", default=CORES, type=natural, help="processes (one per core)")
    seed = errors.number(int, -(2**63), 2**63 - 1)
    parser.add_argument("--seed", default=0, type=seed, help="of the shuffle and the split (0)")
    parser.add_argument("--fresh", action="store_true", help="replace what was prepared, when the new is complete")
    args = parser.parse_intermixed_args(argv)
    if not args.sources and args.tokenizer == "nanocrystal" and args.vocab_size is None:
        args.vocab_size = DEFAULT_VOCAB
    if args.val is None:
        args.val = 0.01 if args.sources else 0.03
    machine = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    args.shard = tuple(map(int, machine.groups())) if machine else (0, 0)
    if args.shard[0] >= args.shard[1]:
        raise UserError("--shard is I/N with I from 0 to N-1, such as --shard=0/4")
    if not 0 <= args.val < 1:
        raise UserError(f"--val={args.val} is no fraction; 0.01 holds out one token in a hundred")
    return args


class Here(Executor):
    """For --workers=1: what is submitted is done at once, in this process."""

    def submit(self, function, *rest):
        future = Future()
        future.set_result(function(*rest))
        return future


@contextlib.contextmanager
def start_pool(workers, *settings):
    """An executor that has `workers` processes."""
    if workers == 1:
        set_up(*settings)
        yield Here()
        return
    start = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, start, start_worker, settings)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def stop(*_):
    """On Ctrl-C: end at once, workers included. Whatever they write is whole or absent, and what is done stays."""
    os.write(2, b"prepare.py: stopped; the same command goes on from here\n")  # unlike print, also from a handler
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(130)


@contextlib.contextmanager
def interruptible():
    """Ctrl-C stops: a KeyboardInterrupt is lost if Python happens to be in a callback."""
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@errors.command
def main(argv):
    began = time.time()
    args = parse_arguments(argv)
    tqdm.monitor_interval = 0  # its thread would be there when the workers are forked
    encoding = tokenizer.load(args.tokenizer, args.vocab_size)
    try:
        with interruptible(), start_pool(args.workers, encoding, args.field, args.seed) as pool:
            metas = prepare_all(args, encoding, pool)
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed, for want of memory perhaps; the same command goes on, with fewer --workers in less"
        ) from None
    print_table({name: meta for name, meta in metas.items() if meta})
    print(f"{time.time() - began:.1f} s")


def prepare_all(args, encoding, pool):
    """{source: its meta.json}. Whatever can be a mistake is looked at in all sources before anything is written."""
    words = parse_sources([word for word in args.sources if word != "synthetic"])
    collected = {"synthetic"} if "synthetic" in args.sources else set() if words else {"text", "code"}
    if words.keys() & collected:
        raise UserError("the source synthetic is made here; give your own another name")
    sources = {name: readers.find(inputs) for name, inputs in words.items()}
    for name in sources:
        check_apart(args.out / name, sources)
    if not args.sources:
        check_default(args.out)
    if collected:
        check_corpus(args.out, sources)
    for name in collected:
        check_folder(args.out / name)

    # what is made here
    if "synthetic" in collected:
        sources["synthetic"] = found_files(collect_synthetic(args.out / "corpus", args.seed, args.problems))
    elif collected:
        sources = collect_default(args.out / "corpus", pool)

    settings = {"seed": args.seed, "val": args.val, "field": args.field, "tokenizer": tokenizer.digest(encoding)}
    fingerprints = {name: fingerprint_of(found, settings) for name, found in sources.items()}
    metas = {}
    for name, fingerprint in fingerprints.items():
        metas[name] = None if args.fresh else prepared(args.out / name, fingerprint)
        if not metas[name]:
            check_replaceable(args.out / name, fingerprint, args.fresh)
    for name, found in sources.items():
        if metas[name]:
            print(f"{name}: {args.out / name} is already prepared, nothing to do")
            remove_runs(args.out / name, f"runs-{fingerprints[name][:12]}")  # a death may have left them
        else:
            metas[name] = prepare_source(name, found, fingerprints[name], settings, encoding, pool, args)
    return metas


if __name__ == "__main__":
    errors.run(main)
