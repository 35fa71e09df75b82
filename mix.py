"""Which window of which source is sample n: a pure function, answered at once for any n.

    sources = {name: Source(f"data/{name}", "train", 1024) for name in ("text", "code")}
    phase1 = Mix(sources, {"text": 0.95, "code": 0.05}, samples=100_000, seed=1)
    phase2 = Mix(sources, {"text": 0.37, "code": 0.63}, samples=50_000, seed=1, start=phase1.drawn(phase1.samples))
    rows, source, _ = phase2.batch(0, 32)  # uint16 (32, 1025), int64 (32,)

- Ratio: one period of an integer quota table says whose turn it is. After any n samples every source has been drawn
  within one sample of weight * n.
- Order: within an epoch a keyed bijection says which window comes next. Every window once, none twice, and nothing is
  shuffled, stored or carried along: sample 10^12 costs what sample 0 costs.
- Phases: each begins where `start` says its sources were left, so a second phase reads what the first did not.
- Processes: a step is samples [step * B, (step + 1) * B); ranks and micro-batches take contiguous slices of it. The
  state of a run is n. Integers alone decide, so the order is the same on any machine and any number of processes.
"""

import bisect
import hashlib
import heapq
import math
import mmap
import re
import resource
import shlex
import weakref
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np

import files
from errors import UserError
from infill import GOLDEN, Prefix, below, rearrange, scramble

ALGORITHM = 1  # raise it when samples, or what infill.py makes of them, change: runs under way then refuse to go on
PERIOD = 100_000  # longest quota table; finer weights are rounded to multiples of 1 / PERIOD
CHUNK = 8192  # samples planned at a time: enough to hide what a call costs, few enough for the cache
SOURCES = weakref.WeakSet()  # all of this process, whose open files share its limit of descriptors
WEIGHT = re.compile(r"[-+.\d_/ ]{1,99}([eE][-+]?\d{1,3})?")  # 1e999999999 would fill the memory
LARGE = 2**30  # tokens of a source from which the system shall not read ahead: megabytes around each window of 2 KB


class MixError(UserError):
    """This data or this mix cannot be had: one line for the person at the keyboard."""


# ------------------------------------------------------------------------------------------------------------- order


def epoch_keys(seed, name, epoch):
    """Keys for epochs of a source: int64 (n,) -> uint64 (n,). By name: the order of a source is its own affair."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")
    return scramble(key + epoch.astype(np.uint64) * GOLDEN)


def permute(index, size, key):
    """Where the shuffle of range(size) under key puts each index: int64 (n,) below size, uint64 (n,) -> int64 (n,).

    Six Feistel rounds on pairs (left, right) of [0, a) x [0, b), where a * b >= size. The few pairs from size on, fewer
    than one in sqrt(size), go through again until they fall inside (Black and Rogaway 2002). For size up to 2^62.
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    left, right = np.divmod(index.astype(np.uint64), b)
    round_key = key
    for _ in range(3):
        left += below(scramble(right + round_key), a)
        left = np.minimum(left, left - a)  # modulo a: where left < a, left - a wraps around to a huge number
        right += below(scramble(left + (round_key + GOLDEN)), b)
        right = np.minimum(right, right - b)
        round_key = round_key + 2 * GOLDEN % 2**64
    out = (left * b + right).astype(np.int64)
    again = np.flatnonzero(out >= size)
    if again.size:
        out[again] = permute(out[again], size, key[again])
    return out


# ------------------------------------------------------------------------------------------------------------- ratio


def quotas(weights):
    """{name: weight}, exact decimals or fractions of any sum -> {name: samples in one period}, by name, coprime."""
    try:
        if wild := [name for name, weight in weights.items() if not WEIGHT.fullmatch(str(weight))]:
            raise ValueError(f"{wild[0]} has {str(weights[wild[0]])[:40]!r}")
        exact = {name: Fraction(str(weight)) for name, weight in sorted(weights.items())}
    except (ValueError, ZeroDivisionError) as error:
        raise MixError(f"mix: a weight is not a number: {error}") from error
    total = sum(exact.values())
    if total <= 0 or min(exact.values()) < 0:
        raise MixError(f"mix: weights must be positive, or zero to leave a source out: {weights}")
    share = {name: weight / total for name, weight in exact.items() if weight}
    period = min(PERIOD, math.lcm(*(part.denominator for part in share.values())))
    quota = {name: math.floor(part * period) for name, part in share.items()}
    by_remainder = sorted(quota, key=lambda name: quota[name] - share[name] * period)
    for name in by_remainder[: period - sum(quota.values())]:
        quota[name] += 1
    if not all(quota.values()):
        raise MixError(f"mix: less than {1 / PERIOD:f} of the sum rounds to nothing; leave it out: {weights}")
    divisor = math.gcd(*quota.values())
    return {name: count // divisor for name, count in quota.items()}


def turns(quota):
    """Samples of each source in one period, (K,) -> whose turn it is in each of its slots, int64 (sum(quota),).

    With w of W slots, item j of a source may stand in slots floor(j W / w) to ceil((j + 1) W / w) - 1. Taking the
    earliest deadline first meets them all, and then |drawn - n w / W| < 1 after any n slots (Pfair scheduling, Baruah
    et al. 1996).
    """
    period, drawn = sum(quota), [0] * len(quota)
    table = np.empty(period, np.int64)
    waiting, ready = [(0, s) for s in range(len(quota))], []  # heaps of (first slot, source) and (deadline, source)
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, s = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(drawn[s] + 1) * period // quota[s]), s))
        _, s = heapq.heappop(ready)
        table[slot] = s
        drawn[s] += 1
        heapq.heappush(waiting, (drawn[s] * period // quota[s], s))
    return table


# ------------------------------------------------------------------------------------------------------------ tokens


class Source:
    """One split of data/<name>/, as windows of block_size + 1 tokens that share one token with the next.

    The tokens of a file form a circle: wherever the first window is cut, a file of L tokens has L // block_size of
    them. Windows never cross files. Opening reads meta.json and file sizes, however large the corpus.

    name, tokens, windows, sha256 (of the content), tokenizer (its sha256), meta (meta.json as a dict), ids (that there
    may be, 65,536 unless meta or the caller says). A bare nanoGPT folder, train.bin and val.bin, has neither tokenizer
    nor meta: both are None. Raises MixError, also where an id is met that there may not be.
    """

    def __init__(self, folder, split, block_size):
        folder = Path(folder)
        self.name, self.block_size = folder.name, block_size
        self.meta, shards = find_shards(folder, split)
        self.tokenizer = self.meta and self.meta["tokenizer"]["sha256"]
        self.ids = self.meta["tokenizer"]["vocab_size"] if self.meta else 1 << 16
        self.sha256 = hashlib.sha256("".join(sha256 for _, _, sha256 in shards).encode()).hexdigest()
        self.files = [path for path, _, _ in shards]
        self.tokens = sum(tokens for _, tokens, _ in shards)
        windows = [tokens // block_size if tokens > block_size else 0 for _, tokens, _ in shards]
        self.windows = sum(windows)
        self.ends = np.cumsum(windows, dtype=np.int64)  # of each file, counted in windows of the source
        self.begins = self.ends - windows
        self.opened = {}
        SOURCES.add(self)
        if not self.windows:
            need = f"one window needs block_size + 1 = {block_size + 1:,}"
            raise MixError(f"{folder}: {self.tokens:,} {split} tokens, {need}; add data or lower block_size")

    def map_file(self, f):
        """File f -> its tokens, uint16 (L,), and all runs of T + 1 of them, a view (L - T, T + 1), T = block_size."""
        if sum(len(source.opened) for source in SOURCES) >= open_files():
            for source in SOURCES:
                source.opened.clear()
        with open(self.files[f], "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self.tokens > LARGE and hasattr(memory, "madvise"):
            memory.madvise(mmap.MADV_RANDOM)
        tokens = np.frombuffer(memory, "<u2")
        self.opened[f] = tokens, np.lib.stride_tricks.sliding_window_view(tokens, self.block_size + 1)
        return self.opened[f]

    def locate(self, window, offset):
        """Windows, each cut offset < block_size tokens later -> file number and first token in it; int64 (n,) all."""
        file = np.searchsorted(self.ends, window, side="right")
        return file, (window - self.begins[file]) * self.block_size + offset

    def read(self, file, begin, rows, at):
        """Fill rows[at], of uint16 (B, block_size + 1), with the runs of tokens that locate() found; int64 (n,) all."""
        for f in set(file.tolist()):
            tokens, runs = self.opened.get(f) or self.map_file(f)
            here = (file == f).nonzero()[0]
            first, to = begin[here], at[here]
            rows[to] = runs[np.minimum(first, len(runs) - 1)]
            for i in (first >= len(runs)).nonzero()[0]:  # the last window of a file may go around its end
                rows[to[i]] = np.take(tokens, np.arange(first[i], first[i] + self.block_size + 1), mode="wrap")

    def rows(self, count):
        """`count` windows at equal distances, all if there are fewer, uint16 (n, block_size + 1): for evaluation,
        always the same, and of many documents; the first ones may be one book."""
        n = min(count, self.windows)
        rows = np.empty((n, self.block_size + 1), np.uint16)
        places = self.locate(np.arange(n) * self.windows // n, 0)
        self.read(*places, rows, np.arange(n))
        self.check_ids(rows, *places)
        return rows

    def check_bare(self):
        """MixError if a file that no meta.json describes, read whole, has an id that there may not be: an evaluation
        reads few windows, and always the same."""
        if self.meta is None:
            (tokens, _), step = self.opened.get(0) or self.map_file(0), 1 << 20
            for at in range(0, len(tokens), step):
                self.check_ids(tokens[None, at : at + step], [0], [at])

    def check_ids(self, rows, file, begin):
        """MixError if rows, uint16 (n, block_size + 1), read from these places have an id that there may not be."""
        if rows.size and rows.max() >= self.ids:
            row, column = np.argwhere(rows >= self.ids)[0]
            path, at = self.files[file[row]], begin[row] + column
            raise MixError(
                f"{path}: id {rows[row, column]:,} near token {at:,} is beyond the {self.ids:,} ids of the vocabulary;"
                " prepare it again, or for a bare .bin say a larger --vocab_size"
            )


def command_for(folder):
    """What to type for a source's folder to be prepared."""
    out = [] if folder.parent == Path("data") else [f"--out={folder.parent}"]
    return shlex.join(["python", "prepare.py", f"{folder.name}=FILES", *out])


SPLIT = {"tokens": int, "shards": [{"file": str, "tokens": int, "sha256": str}]}
META = {"format": int, "tokenizer": {"name": str, "vocab_size": int, "sha256": str}, "train": SPLIT, "val": SPLIT}


def find_shards(folder, split):
    """The files of a split -> meta.json or None, [(path, tokens, sha256)]. MixError if one is damaged.

    A shard that is newer than meta.json, which is written last, is read whole to see that it is what was prepared.
    """
    record, make = folder / "meta.json", f"run {command_for(folder)}"
    if not record.exists():
        path = folder / f"{split}.bin"  # nanoGPT's layout
        if not path.exists():
            alone = " (or nothing, for the default corpus)" if folder.name in ("text", "code") else ""
            raise MixError(f"{folder}: neither meta.json nor {split}.bin; {make}{alone}")
        return None, [bare_file(path)]
    try:
        meta = files.read_json(record, META)
    except UserError as error:
        raise MixError(f"{error}; move {folder} away, and {make}") from None
    if meta["format"] != 1 or not 0 < meta["tokenizer"]["vocab_size"] <= 1 << 16:
        what = f"format {meta['format']} with {meta['tokenizer']['vocab_size']:,} ids is not what this reads"
        raise MixError(f"{record}: {what}; move {folder} away, and {make}")
    shards = [(folder / shard["file"], shard["tokens"], shard["sha256"]) for shard in meta[split]["shards"]]
    newer = []
    for path, tokens, sha256 in shards:
        found = path.stat() if path.parent == folder and path.is_file() else None
        if not found or not found.st_size or found.st_size != 2 * tokens:
            size = found.st_size if found else 0
            what = f"{size:,} bytes where meta.json says {2 * tokens:,}: truncated or replaced"
            raise MixError(f"{path}: {what if size else 'missing or empty'}; {make} --fresh")
        if found.st_mtime_ns > record.stat().st_mtime_ns:
            newer.append((path, sha256))
    with ThreadPoolExecutor(8) as pool:  # hashing lets other threads run
        for (path, sha256), content in zip(newer, pool.map(files.sha256, [path for path, _ in newer]), strict=True):
            if content != sha256:
                raise MixError(f"{path}: not what was prepared (sha256 differs from meta.json's); {make} --fresh")
    return meta, shards


def bare_file(path):
    """(path, tokens, sampled sha256) of a .bin that no meta.json describes. MixError if it does not hold uint16 ids."""
    size = path.stat().st_size
    if size % 2:
        raise MixError(f"{path}: {size:,} bytes are no whole number of uint16 tokens: truncated; copy it again")
    with open(path, "rb") as file:
        start = file.read(1 << 16)
    if start.startswith(b"\x93NUMPY"):
        raise MixError(f"{path} is a .npy file: np.load(FILE).astype('<u2').tofile({path.name!r}) writes what is read")
    ids = np.frombuffer(start[: len(start) // 8 * 8], "<u2").reshape(-1, 4)
    for high in (0, 3) if len(ids) >= 16 else ():  # the halves of an id above the lowest 16 bits: ids below 262,144
        small = (ids <= high).all(axis=0).tolist()
        wide = {(0, 1, 1, 1): "<u8", (0, 1, 0, 1): "<u4", (1, 0, 1, 0): ">u4", (1, 1, 1, 0): ">u8"}.get(tuple(small))
        if wide:
            read = f"np.fromfile({path.name!r}, {wide!r}).astype('<u2').tofile(...) converts it"
            do = "which cannot hold those above 65,535: another tokenizer has fewer" if high else read
            raise MixError(f"{path} holds ids of {8 * int(wide[2])} bits, and what is read is uint16: {do}")
    return path, size // 2, sampled_sha256(path, size)


def open_files():
    """Files that all sources together may keep open: half of what the system grants this process."""
    return min(1024, max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))


def sampled_sha256(path, size, blocks=16, length=4096):
    """sha256 of a file's size and of blocks spread over it from first to last, at the same cost for any size."""
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(blocks):
            file.seek(max(size - length, 0) * i // (blocks - 1))
            digest.update(file.read(length))
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------------------- mix


class Mix:
    """One phase: so many samples from sources, in proportion to weights.

    sources     {name: Source}; or {name: windows} to plan without data, 0 where the size is unknown
    weights     {name: number or string}, exact decimals or fractions of any sum
    start       {name: windows drawn before}: drawn(samples) of the phase before
    epochs_max  refuse to read a source more often than this, earlier phases included; 0: no limit
    skip        [(a, b)]: jump over samples a to b - 1 as the log numbers them; a later skip is appended
    objectives  {name: Objective of infill.py} for sources whose windows are rearranged, and their `vocabulary`

    names: what is drawn, as plan() and batch() number it. quota, {name: samples in one period}, and period, their sum:
    the weights as realised. Raises MixError.
    """

    def __init__(
        self, sources, weights, samples, seed, start=None, epochs_max=0, skip=(), objectives=None, vocabulary=None
    ):
        unknown = sorted({*weights} - {*sources})
        if unknown:
            raise MixError(f"mix: there is no source {', '.join(unknown)}; there are: {', '.join(sorted(sources))}")
        self.sources, self.samples, self.seed, self.skip = sources, samples, seed, [list(pair) for pair in skip]
        self.start = dict.fromkeys(sources, 0) | (start or {})
        self.windows = {name: getattr(source, "windows", source) for name, source in sources.items()}
        self.quota = quotas(weights)
        self.names, self.period = list(self.quota), sum(self.quota.values())
        self.objectives = {name: some for name, some in (objectives or {}).items() if some and name in self.quota}
        self.vocabulary = vocabulary
        self.block_size = getattr(sources[self.names[0]], "block_size", 0)
        self.table = turns(list(self.quota.values()))
        self.rank = np.empty_like(self.table)  # of a turn among those of its source in one period
        for s, count in enumerate(self.quota.values()):
            self.rank[self.table == s] = np.arange(count)
        self.chunk = 0, 0, ()  # samples [lo, hi) and where they are
        if epochs_max:
            self.check_epochs(epochs_max)

    def check_epochs(self, epochs_max):
        """MixError if this phase would take a source beyond epochs_max epochs; it names the sample that would."""
        drawn = self.drawn(self.samples)
        for name in self.names:
            limit = math.floor(Fraction(str(epochs_max)) * self.windows[name])
            if self.windows[name] and drawn[name] > limit:
                first = bisect.bisect_right(range(self.samples), limit, key=lambda n: self.drawn(n)[name]) - 1
                epochs, unit = drawn[name] / self.windows[name], "tokens" if self.block_size else "windows"
                raise MixError(
                    f"mix: {name} would be read {epochs:.4g} times, and epochs_max is {epochs_max}: "
                    f"{(drawn[name] - limit) * max(self.block_size, 1):,} {unit} short, from sample {max(first, 0):,} "
                    f"of {self.samples:,} on; add data, lower its weight or the budget, or raise epochs_max"
                )

    def position(self, n):
        """Sample number, int or int64 (n,) -> its place in the stream, skipped samples counted."""
        for a, b in reversed(self.skip):
            n = n + (n >= a) * (b - a)
        return n

    def drawn(self, n):
        """{name: windows drawn or skipped} after n samples of this phase, earlier phases included."""
        periods, slots = divmod(self.position(n - 1) + 1 if n else 0, self.period)
        now = np.bincount(self.table[:slots], minlength=len(self.names)).tolist()
        now = {name: periods * self.quota[name] + count for name, count in zip(self.names, now, strict=True)}
        return {name: count + now.get(name, 0) for name, count in self.start.items()}

    def epochs(self, n):
        """{name: epochs read} after n samples of this phase, earlier phases included, where the size is known."""
        return {name: count / self.windows[name] for name, count in self.drawn(n).items() if self.windows.get(name)}

    def plan(self, lo, hi):
        """Samples lo to hi - 1 -> source (a number in names), epoch, window: int64 (hi - lo,) each."""
        if not 0 <= lo <= hi <= self.samples:
            raise IndexError(f"samples {lo:,} to {hi:,} of a phase of {self.samples:,}")
        period, slot = np.divmod(self.position(np.arange(lo, hi)), self.period)
        source, rank = self.table[slot], self.rank[slot]
        epoch, window = np.empty((2, hi - lo), np.int64)
        for s, (name, quota) in enumerate(self.quota.items()):
            mine = (source == s).nonzero()[0]
            drawn = self.start[name] + period[mine] * quota + rank[mine]
            epoch[mine], index = np.divmod(drawn, self.windows[name])
            window[mine] = permute(index, self.windows[name], epoch_keys(self.seed, name, epoch[mine]))
        return source, epoch, window

    def places(self, lo, hi):
        """Samples lo to hi - 1 -> source, file number in it, first token in that, int64 (hi - lo,) each; and for the
        draws of infill.py a key, uint64 (hi - lo,)."""
        source, epoch, window = self.plan(lo, hi)
        file, begin = np.empty((2, hi - lo), np.int64)
        key = np.zeros(hi - lo, np.uint64)
        for s, name in enumerate(self.names):
            mine = (source == s).nonzero()[0]
            objective = self.objectives.get(name)
            if objective and not objective.redraw:
                epoch[mine] = 0
            keys = scramble(~epoch_keys(self.seed, name, epoch[mine]))
            offset = below(keys, self.block_size).astype(np.int64)
            offset[epoch[mine] == 0] = 0  # later epochs are cut elsewhere: their tokens appear in other contexts
            file[mine], begin[mine] = self.sources[name].locate(window[mine], offset)
            if objective:
                key[mine] = scramble(scramble(keys) + window[mine].astype(np.uint64) * GOLDEN)
        return source, file, begin, key

    def batch(self, lo, hi):
        """Samples lo to hi - 1 -> rows, uint16 (hi - lo, block_size + 1), rearranged where a source has an objective;
        source, int64 (hi - lo,); and if one is Prefix which prefix a token is in, uint16 like rows, else None."""
        first, last, places = self.chunk
        if lo < first or hi > last:
            first, last = lo, max(hi, min(lo + CHUNK, self.samples))
            places = self.places(first, last)
            self.chunk = first, last, places
        source, file, begin, key = (part[lo - first : hi - first] for part in places)
        rows = np.empty((hi - lo, self.block_size + 1), np.uint16)
        mine = [(source == s).nonzero()[0] for s in range(len(self.names))]
        for name, at in zip(self.names, mine, strict=True):
            self.sources[name].read(file[at], begin[at], rows, at)
        if rows.size and rows.max() >= min(self.sources[name].ids for name in self.names):
            for name, at in zip(self.names, mine, strict=True):
                self.sources[name].check_ids(rows[at], file[at], begin[at])
        prefixed = any(isinstance(objective, Prefix) for objective in self.objectives.values())
        prefix = np.zeros_like(rows) if prefixed else None
        for name, at in zip(self.names, mine, strict=True):
            if name in self.objectives and len(at):
                rows[at], inside = rearrange(rows[at], key[at], self.objectives[name], self.vocabulary)
                if inside is not None:
                    prefix[at] = inside
        return rows, source, prefix

    def identity(self):
        """All that the samples depend on, by name, as a dict for JSON."""
        fields = ("tokens", "sha256", "tokenizer")
        sources = {name: {field: getattr(self.sources[name], field, None) for field in fields} for name in self.names}
        start = {name: self.start[name] for name in self.names}
        objective = {name: str(objective) for name, objective in sorted(self.objectives.items())}
        return dict(algorithm=ALGORITHM, seed=self.seed, block_size=self.block_size, weights=self.quota, start=start,
                    samples=self.samples, skip=self.skip, objective=objective, sources=sources)  # fmt: skip


def check_identity(saved, now, n=math.inf):
    """Both from Mix.identity(): raises MixError, naming what differs, unless `now` continues the run that was `saved`.

    A phase may be lengthened. Skips may be appended that begin at n, the samples drawn by then, or later.
    """
    pairs = {field: (saved[field], now[field]) for field in ("algorithm", "seed", "block_size", "weights", "start")}
    pairs["objective"] = saved.get("objective", {}), now["objective"]
    for name, source in saved["sources"].items():
        other = now["sources"].get(name, {})
        pairs |= {f"{field} of {name}": (value, other.get(field)) for field, value in source.items()}
    if now["samples"] < saved["samples"]:
        pairs["samples"] = saved["samples"], now["samples"]
    kept = len(saved["skip"])
    if now["skip"][:kept] != saved["skip"] or any(a < n for a, _ in now["skip"][kept:]):
        pairs["skip"] = saved["skip"], now["skip"]
    for field, (old, new) in pairs.items():
        if old != new:
            raise MixError(
                f"mix: {field} was {old} when this run was saved and is {new} now; change it back, or --fresh"
            )
