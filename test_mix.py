"""Promises of mix.py, each against something that does not share its code."""

import hashlib
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import mix
from mix import Mix, MixError, Source, check_identity

HERE = Path(__file__).parent
CRYSTAL = {"arxiv": "0.03", "books": ".04467", "c4": ".08", "code": ".53346", "wiki": ".31186"}  # sums to 0.99999


def write_source(root, name, *shards, split="train", tokenizer="tok"):
    """data/<name>/ as prepare.py writes it; shards are arrays of tokens."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "meta.json"
    empty = {"format": 1, "train": {"tokens": 0, "shards": []}, "val": {"tokens": 0, "shards": []}}
    meta = json.loads(record.read_text()) if record.exists() else empty
    meta["tokenizer"] = {"name": tokenizer, "vocab_size": 65536, "sha256": tokenizer, "eot": 0}
    entries = []
    for i, tokens in enumerate(shards):
        raw = np.asarray(tokens, "<u2").tobytes()
        (folder / f"{split}-{i:05d}.bin").write_bytes(raw)
        sha256 = hashlib.sha256(raw).hexdigest()
        entries.append(
            {"file": f"{split}-{i:05d}.bin", "tokens": len(tokens), "documents": 1, "bytes": 9, "sha256": sha256}
        )
    meta[split] = {"tokens": sum(map(len, shards)), "documents": 1, "bytes": 9, "shards": entries}
    record.write_text(json.dumps(meta))
    return folder


def random_tokens(seed, n):
    return np.random.default_rng(seed).integers(0, 65536, n, dtype=np.uint16)


@pytest.fixture
def sources(tmp_path):
    write_source(tmp_path, "text", random_tokens(0, 40_123), random_tokens(1, 3_333))
    write_source(tmp_path, "code", random_tokens(2, 7_000))
    return {name: Source(tmp_path / name, "train", 64) for name in ("text", "code")}


def counts(mixed, n):
    """(n + 1, K): how often each source was drawn in every prefix of the first n samples."""
    drawn = np.cumsum(mixed.plan(0, n)[0][:, None] == np.arange(len(mixed.names)), axis=0)
    return np.vstack([np.zeros_like(drawn[:1]), drawn])


def random_mixes(number):
    """{name: integer weight}, 2 to 50 sources, even and very uneven."""
    rng = np.random.default_rng(7)
    for _ in range(number):
        k = int(rng.integers(2, 51))
        weights = rng.integers(1, 40, k) if rng.random() < 0.5 else np.ceil(rng.pareto(0.6, k) * 2).clip(1, 700)
        yield {f"s{i:02d}": int(weight) for i, weight in enumerate(weights)}


# ------------------------------------------------------------------------------------------------------------- ratio


def worst_error(drawn, weights):
    """Largest |drawn - n w / W| over prefixes and sources as (numerator, W), in integers."""
    total = sum(weights)
    n = np.arange(len(drawn))[:, None]
    return int(np.abs(drawn * total - n * np.array(weights)).max()), total


def test_every_prefix_holds_every_ratio():
    greedy_fails = 0
    for weights in random_mixes(200):
        mixed = Mix(dict.fromkeys(weights, 1000), weights, 10**9, seed=1)
        error, total = worst_error(counts(mixed, 3 * mixed.period), list(weights.values()))
        assert error < total, weights  # |drawn - n w| < 1 sample
        if total < 300:  # the rule of other mixers, furthest behind goes first, must not pass for this
            drawn, path = [0] * len(weights), []
            for n in range(total):
                s = max(range(len(drawn)), key=lambda s: n * weights[mixed.names[s]] - drawn[s] * total)
                drawn[s] += 1
                path.append(list(drawn))
            error, total = worst_error(np.array([[0] * len(drawn), *path]), list(weights.values()))
            greedy_fails += error >= total
    assert greedy_fails


def test_turns_follow_the_definition_of_earliest_deadline_first():
    for weights in list(random_mixes(60))[::3]:
        w, total = list(weights.values()), sum(weights.values())
        todo = [(s, -(-(j + 1) * total // ws), j * total // ws) for s, ws in enumerate(w) for j in range(ws)]
        expected = []
        for slot in range(min(total, 150)):
            item = min((item for item in todo if item[2] <= slot), key=lambda item: (item[1], item[0]))
            todo.remove(item)
            expected.append(item[0])
        g = math.gcd(*w)
        assert mix.turns([ws // g for ws in w])[:150].tolist() == expected[: total // g], weights


def test_weights_are_exact_decimals_and_long_ones_are_rounded_to_what_is_shown():
    windows = dict.fromkeys("abc", 10)
    assert Mix(windows, {"a": 0.63, "b": 0.37}, 1, 1).quota == {"a": 63, "b": 37}
    assert Mix(windows, {"a": "1/3", "b": "2/3"}, 1, 1).quota == {"a": 1, "b": 2}
    assert Mix(windows, {"a": 30, "b": 10, "c": 0}, 1, 1).quota == {"a": 3, "b": 1}
    crystal = Mix(dict.fromkeys(CRYSTAL, 10), CRYSTAL, 10**9, 1)
    assert crystal.period <= 100_000
    for name, weight in CRYSTAL.items():
        assert abs(crystal.quota[name] / crystal.period - float(weight) / 0.99999) < 1e-5
    long = {"a": 0.1234567890123456, "b": 0.3333333333333333, "c": 0.5432098776543211}
    rounded = Mix(windows, long, 10**9, 1)
    assert rounded.quota == {"a": 12346, "b": 33333, "c": 54321} and rounded.period == 100_000  # largest remainder
    for mixed in (crystal, rounded):
        error, total = worst_error(counts(mixed, 20_000), list(mixed.quota.values()))
        assert error < total


# ------------------------------------------------------------------------------------------------------------ phases


def test_phases_continue_where_the_sources_were_left():
    windows = {"code": 5_000, "text": 9_000, "web": 70}
    one = Mix(windows, {"text": 0.95, "code": 0.05}, 7_001, seed=3)
    two = Mix(windows, {"text": 0.37, "code": 0.63}, 2_503, seed=3, start=one.drawn(7_001))
    three = Mix(windows, {"text": 1, "web": 1}, 100, seed=3, start=two.drawn(two.samples))
    total, seen = dict.fromkeys(windows, 0), {name: [] for name in windows}
    for phase in (one, two, three):
        assert phase.drawn(0) == total
        source, epoch, window = phase.plan(0, phase.samples)
        for s, name in enumerate(phase.names):
            total[name] += int((source == s).sum())
            seen[name] += window[(source == s) & (epoch == 0)].tolist()
        assert phase.drawn(phase.samples) == total
        assert phase.epochs(phase.samples) == {name: total[name] / windows[name] for name in windows}
    for name in windows:  # no window twice over all phases, and together they are one phase's order
        alone = Mix(windows, {name: 1}, len(seen[name]), seed=3)
        assert len(set(seen[name])) == len(seen[name]) == min(total[name], windows[name])
        assert alone.plan(0, alone.samples)[2].tolist() == seen[name]


def test_a_new_source_or_weight_leaves_the_order_inside_the_others_alone():
    def order(weights, name):
        mixed = Mix(dict.fromkeys(weights, 500), weights, 3000, seed=5)
        source, epoch, window = mixed.plan(0, 3000)
        mine = source == mixed.names.index(name)
        return list(zip(epoch[mine].tolist(), window[mine].tolist(), strict=True))[:600]

    base = order({"code": 1, "text": 1}, "text")
    assert order({"text": 1, "code": 1}, "text") == base
    assert order({"code": 2, "text": 3}, "text") == base
    assert order({"aaa": 1, "code": 1, "text": 2, "zzz": 1}, "text") == base
    assert order({"code": 1, "text": 1}, "code") != base


# ------------------------------------------------------------------------------------------------------------- order


def keys(key, n):
    return np.full(n, key, np.uint64)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 97, 1000, 195_312])
def test_an_epoch_visits_every_window_once(size):
    epochs = [mix.permute(np.arange(size), size, keys(key, size)) for key in (0, 1, 2**64 - 1)]
    for order in epochs:
        assert np.array_equal(np.sort(order), np.arange(size))
    if size > 20:
        assert len({order.tobytes() for order in epochs}) == 3
    both = mix.permute(np.tile(np.arange(size), 2), size, np.repeat(np.array([0, 1], np.uint64), size))
    assert np.array_equal(both, np.concatenate(epochs[:2]))  # a key each: a batch may span epochs


def test_no_epoch_no_source_and_no_seed_repeats_the_order_of_another():
    orders = set()
    for seed in (1, 2):
        for name in "ab":
            epoch, window = Mix({name: 97}, {name: 1}, 970, seed).plan(0, 970)[1:]
            assert np.array_equal(epoch, np.arange(970) // 97)
            orders |= {tuple(window[epoch == e].tolist()) for e in range(10)}
    assert len(orders) == 40


def test_an_order_of_10_to_the_12_is_never_written_down():
    index = np.concatenate([np.arange(200_000), 10**12 - 1 - np.arange(200_000)])
    order = mix.permute(index, 10**12, keys(9, 400_000))
    assert order.min() >= 0 and order.max() < 10**12 and len(np.unique(order)) == 400_000
    assert abs(order.mean() / 10**12 - 0.5) < 0.005


def shuffle_statistics(order):
    """Three chi2 of a permutation over their degrees of freedom; 1.0 for a true shuffle, float64 (3,).

    How evenly batches of 512 draw from 64 slices; pairs of slices drawn one after another; their low three bits.
    """
    n = len(order)
    batches = (order[: n // 512 * 512] * 64 // n).reshape(-1, 512)
    composition = np.mean([((np.bincount(batch, minlength=64) - 8) ** 2 / 8).sum() / 63 for batch in batches])

    def pairs(digit, base):  # the margins are those of a permutation, so (base - 1)^2 degrees of freedom are left
        table = np.bincount(digit[:-1] * base + digit[1:], minlength=base * base)
        return ((table - n / base**2) ** 2).sum() / (n / base**2) / (base - 1) ** 2

    return np.array([composition, pairs(order * 32 // n, 32), pairs(order % 8, 8)])


def test_the_order_is_as_random_as_a_shuffle():
    size = 195_312

    def medians(order):
        return np.median([shuffle_statistics(order(seed)) for seed in range(5)], axis=0)

    epochs = [Mix({"a": size}, {"a": 1}, size, seed).plan(0, size)[2] for seed in range(5)]
    for order in (epochs.__getitem__, lambda seed: np.random.default_rng(seed).permutation(size)):
        ratios = medians(order)
        assert ((ratios > 0.7) & (ratios < 1.3)).all(), ratios
    affine = medians(lambda seed: (np.arange(size) * 120_721 + seed) % size)  # what must not pass for a shuffle
    assert ((affine < 0.7) | (affine > 1.3)).all(), affine


def test_a_sample_depends_on_its_number_alone():
    mixed = Mix({"text": 300, "code": 70}, {"text": 0.63, "code": 0.37}, 10**16, seed=11)
    for first in (0, 10**15):
        whole = np.array(mixed.plan(first, first + 500))
        one_by_one = [np.array(mixed.plan(first + i, first + i + 1))[:, 0] for i in reversed(range(500))]
        assert np.array_equal(whole, np.array(one_by_one[::-1]).T)
        cut = [np.array(mixed.plan(first + i, first + min(i + 37, 500))) for i in range(0, 500, 37)]
        assert np.array_equal(whole, np.hstack(cut))
    assert not np.array_equal(
        whole, np.array(Mix(mixed.windows, mixed.quota, 10**16, seed=12).plan(first, first + 500))
    )
    longer = Mix(mixed.windows, mixed.quota, 2 * 10**16, seed=11)
    assert np.array_equal(whole, np.array(longer.plan(first, first + 500)))


def test_sample_10_to_the_15_costs_what_sample_0_costs():
    mixed = Mix({"text": 10**12, "code": 10**9}, {"text": 0.63, "code": 0.37}, 10**15 + 64, seed=1)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        source, epoch, window = mixed.plan(10**15, 10**15 + 64)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.010
    assert epoch[source == 0].min() == 37 * 10**13 // 10**9 and epoch[source == 1].max() == 630
    assert (window >= 0).all() and (window < 10**12).all()


def one_at_a_time(windows, weights, seed, numbers):
    """plan() in Python's own integers, which cannot overflow: [(source, epoch, window)]. weights: coprime integers."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def scramble(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    names, table, plan = sorted(weights), mix.turns([weights[name] for name in sorted(weights)]).tolist(), []
    for n in numbers:
        s, name = table[n % len(table)], names[table[n % len(table)]]
        before = n // len(table) * weights[name] + table[: n % len(table)].count(s)
        epoch, index = divmod(before, windows[name])
        word = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        key = scramble(int.from_bytes(word, "little") + epoch * golden & mask)
        sides = [math.isqrt(windows[name] - 1) + 1, 0]
        sides[1] = -(-windows[name] // sides[0])
        while True:
            half = list(divmod(index, sides[1]))
            for r in range(6):
                dice = scramble(half[1 - r % 2] + key + r * golden & mask) >> 32
                half[r % 2] = (half[r % 2] + (dice * sides[r % 2] >> 32)) % sides[r % 2]
            index = half[0] * sides[1] + half[1]
            if index < windows[name]:
                break
        plan.append((s, epoch, index))
    return plan


def test_the_plan_equals_its_definition_in_unbounded_integers():
    for windows in ({"text": 1000, "code": 333}, {"text": 10**12 + 7, "code": 2}, {"text": 1, "code": 10**9}):
        for first in (0, 10**15 - 100):
            plan = Mix(windows, {"text": 0.63, "code": 0.37}, 2 * 10**15, seed=7).plan(first, first + 200)
            expected = one_at_a_time(windows, {"text": 63, "code": 37}, 7, range(first, first + 200))
            assert np.array_equal(np.array(plan).T, np.array(expected))


def test_the_order_of_samples_never_changes_between_versions(tmp_path):
    weights = {"text": 0.5, "code": 0.3, "math": 0.2}
    plan = Mix({"text": 1000, "code": 333, "math": 77}, weights, 10_000, seed=1337).plan(0, 10_000)
    triples = np.stack(plan, axis=1).astype("<i8")
    assert (
        hashlib.sha256(triples.tobytes()).hexdigest()
        == "38cb2e65dc5c0ac341dadfe18dafcfc9d80dc59255953e922d70826b9752ca43"
    )
    sources = {name: Source(write_source(tmp_path, name, np.arange(9_999)), "train", 64) for name in weights}
    rows, _, _ = Mix(sources, weights, 1_500, seed=1337).batch(0, 1_500)  # five epochs of text, each cut elsewhere
    assert (
        hashlib.sha256(rows.astype("<u2").tobytes()).hexdigest()
        == "f4519f609b735dd96342960c31392336bf7bf58395387d2d7d84e227985c0339"
    )


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16, 64])
def test_any_number_of_processes_and_micro_batches_makes_the_same_steps(sources, world):
    step = 64
    mixed = Mix(sources, {"text": 0.63, "code": 0.37}, 10 * step, seed=1)
    whole = mixed.batch(0, 10 * step)
    fresh = Mix(sources, {"text": 0.63, "code": 0.37}, 10 * step, seed=1)
    backwards = [fresh.batch(n, n + 3)[0] for n in range(9 * step, -1, -3)][::-1]
    assert np.array_equal(np.concatenate(backwards), whole[0][: 9 * step + 3])
    for micro in (m for m in (1, 2, 4, 8, 16, 32, 64) if m * world <= step):
        ranks = [Mix(sources, {"text": 0.63, "code": 0.37}, 10 * step, seed=1) for _ in range(min(world, 2))]
        share = step // world
        for n in (0, 3, 9):
            rows = []
            for rank in range(world):
                first = n * step + rank * share
                rows += [ranks[rank % 2].batch(i, i + micro) for i in range(first, first + share, micro)]
                of_rank = np.concatenate([source for _, source, _ in rows[-share // micro :]])
                assert abs((of_rank == 1).sum() - 0.63 * share) < 2  # contiguous slices keep the ratio on every rank
            assert np.array_equal(np.concatenate([r for r, _, _ in rows]), whole[0][n * step : (n + 1) * step])
            assert np.array_equal(np.concatenate([s for _, s, _ in rows]), whole[1][n * step : (n + 1) * step])


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_new_process_goes_on_with_the_same_bytes(sources, tmp_path):
    stop = 12_345
    mixed = Mix(sources, {"text": "0.7", "code": "0.3"}, 10**6, seed=2)
    mixed.batch(0, 32)
    digest = hashlib.sha256()
    for i in range(100):
        for array in mixed.batch(stop + 32 * i, stop + 32 * (i + 1))[:2]:
            digest.update(array.tobytes())
    code = f"""
import hashlib
from mix import Mix, Source
sources = {{name: Source({str(tmp_path)!r} + "/" + name, "train", 64) for name in ("code", "text")}}
mixed = Mix(sources, {{"code": 3, "text": 7}}, 10**7, seed=2)
digest = hashlib.sha256()
for i in range(100):
    for array in mixed.batch({stop} + 32 * i, {stop} + 32 * (i + 1))[:2]:
        digest.update(array.tobytes())
print(digest.hexdigest())
"""
    assert run_python(code) == digest.hexdigest()


def test_skipped_samples_are_jumped_over_and_nothing_else_changes():
    plain = np.array(Mix({"a": 50, "b": 20}, {"a": 2, "b": 1}, 2_000, seed=1).plan(0, 2_000)).T.tolist()
    mixed = Mix({"a": 50, "b": 20}, {"a": 2, "b": 1}, 1_000, seed=1, skip=[(100, 140), (300, 350), (120, 125)])
    log = plain
    for a, b in [(100, 140), (300, 350), (120, 125)]:  # each counts as the log did when it was added
        log = log[:a] + log[b:]
    assert np.array(mixed.plan(0, 1_000)).T.tolist() == log[:1_000]
    last = plain.index(log[999], 1_000)
    before = Mix({"a": 50, "b": 20}, {"a": 2, "b": 1}, 2_000, seed=1)
    assert mixed.drawn(1_000) == before.drawn(last + 1) and mixed.drawn(100) == before.drawn(100)


# ------------------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("lengths", [[1000], [1024], [65], [700, 64, 10, 1025, 129]])
def test_each_epoch_reads_each_token_once(tmp_path, lengths):
    block = 64
    ids = np.arange(sum(lengths), dtype=np.uint16)  # a token's id is its place, so that rows show where they are from
    shards = np.split(ids, np.cumsum(lengths)[:-1])
    source = Source(write_source(tmp_path, "a", *shards), "train", block)
    assert source.tokens == len(ids) and source.windows == sum(len(s) // block for s in shards if len(s) > block)
    epochs = 6
    mixed = Mix({"a": source}, {"a": 1}, epochs * source.windows, seed=4)
    firsts = set()
    for epoch in range(epochs):
        rows, _, _ = mixed.batch(epoch * source.windows, (epoch + 1) * source.windows)
        assert len(np.unique(rows[:, :-1])) == source.windows * block  # inputs: none twice
        by_file = np.searchsorted(np.cumsum(lengths), rows, side="right")
        assert (by_file == by_file[:, :1]).all()  # no window crosses files
        for f, shard in enumerate(shards):
            mine = rows[by_file[:, 0] == f]
            assert len(mine) == (len(shard) // block if len(shard) > block else 0)
            for row in mine:
                where = np.flatnonzero(shard == row[0])[0]
                assert np.array_equal(row, np.roll(shard, -where)[: block + 1])
        first_tokens = np.sort(rows[:, 0])
        firsts.add(first_tokens.tobytes())
        if epoch == 0:
            assert first_tokens.tolist() == [t for s in shards for t in s[::block][: len(s) // block] if len(s) > block]
    assert len(firsts) > 2  # every epoch is cut elsewhere, but chance may repeat a cut


def test_windows_are_slices_of_the_file(sources, tmp_path):
    raw = [np.fromfile(path, "<u2") for path in sorted((tmp_path / "text").glob("train*.bin"))]
    expected = [shard[i : i + 65] for shard in raw for i in range(0, len(shard) - 64, 64)]
    text = sources["text"]
    assert np.array_equal(text.rows(text.windows), np.stack(expected))
    n = text.windows - 7  # at equal distances, in both files
    assert np.array_equal(text.rows(n), np.stack(expected)[[i * text.windows // n for i in range(n)]])
    assert np.array_equal(text.rows(3), np.stack(expected)[[0, text.windows // 3, 2 * text.windows // 3]])
    rows, source, _ = Mix(sources, {"text": 1, "code": 1}, 500, seed=1).batch(100, 300)
    place = {row.tobytes(): i for i, row in enumerate(expected)}
    windows = Mix(sources, {"text": 1, "code": 1}, 500, seed=1).plan(100, 300)[2]
    assert rows.dtype == np.uint16 and rows.shape == (200, 65) and source.dtype == np.int64
    for row, window in zip(rows[source == 1], windows[source == 1], strict=True):
        assert place[row.tobytes()] == window


def test_many_shards_do_not_use_up_the_file_descriptors(tmp_path):
    shards = np.split(random_tokens(0, 300 * 130), 300)
    source = Source(write_source(tmp_path, "a", *shards), "train", 64)
    rows, _, _ = Mix({"a": source}, {"a": 1}, 600, seed=1).batch(0, 600)
    expected = sorted(shard[i : i + 65].tobytes() for shard in shards for i in (0, 64))
    assert sorted(row.tobytes() for row in rows) == expected


def test_all_sources_together_keep_within_the_limit_of_descriptors(tmp_path):
    shards = np.split(random_tokens(0, 64 * 130), 64)
    sources = {name: Source(write_source(tmp_path, name, *shards), "train", 64) for name in "abcdef"}
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 128, limit[1]))
    try:
        rows, source, _ = Mix(sources, dict.fromkeys(sources, 1), 768, seed=1).batch(0, 768)
        assert sum(len(one.opened) for one in sources.values()) <= mix.open_files() < 128 + 64
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    expected = sorted(shard[i : i + 65].tobytes() for shard in shards for i in (0, 64))
    assert all(sorted(row.tobytes() for row in rows[source == s]) == expected for s in range(6))


def test_nanogpts_folders_are_read_as_they_are(tmp_path):
    (tmp_path / "owt").mkdir()
    tokens = random_tokens(0, 100_000)
    tokens.tofile(tmp_path / "owt" / "train.bin")
    source = Source(tmp_path / "owt", "train", 256)
    assert source.meta is None and source.windows == 390
    assert np.array_equal(source.rows(source.windows)[3], tokens[768:1025])
    tokens[0] += 1
    tokens.tofile(tmp_path / "owt" / "train.bin")
    assert Source(tmp_path / "owt", "train", 256).sha256 != source.sha256


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory use from /proc")
def test_a_corpus_of_10_to_the_12_tokens_needs_no_memory(tmp_path):
    write_source(tmp_path, "a", *[[0]] * 4)
    meta = json.loads((tmp_path / "a" / "meta.json").read_text())
    try:
        for shard in meta["train"]["shards"]:
            shard["tokens"] = 250 * 10**9
            with open(tmp_path / "a" / shard["file"], "wb") as file:
                file.truncate(2 * shard["tokens"])  # sparse: takes no room on the disk
    except OSError as error:
        pytest.skip(f"no sparse files of 500 GB here: {error}")
    (tmp_path / "a" / "meta.json").write_text(json.dumps(meta))
    code = f"""
import numpy as np
from mix import Mix, Source
def anonymous():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024
before = anonymous()
a = Source({str(tmp_path / "a")!r}, "train", 1024)
one = Mix({{"a": a, "b": a}}, {{"a": "0.63", "b": "0.37"}}, 10**9, seed=1)
two = Mix({{"a": a, "b": a}}, {{"a": "0.2", "b": "0.8"}}, 3 * 10**9, seed=1, start=one.drawn(10**9))
for phase in (one, two):
    for n in (0, 10**6, 999_999_000):
        rows, _, _ = phase.batch(n, n + 32)
print(a.tokens, rows.shape, anonymous() - before)
"""
    tokens, shape, megabytes = run_python(code).replace("(32, 1025)", "32x1025").split()
    assert tokens == "1000000000000" and shape == "32x1025" and float(megabytes) < 20


# ---------------------------------------------------------------------------------------------------------- mistakes


def test_a_plan_beyond_the_epochs_allowed_is_refused_with_the_sample_that_breaks_it(sources):
    weights, start = {"text": 0.63, "code": 0.37}, {"code": 100}
    limit = 3 * sources["code"].windows
    free = Mix(sources, weights, 5_000, seed=1, start=start)
    n = next(n for n in range(5_000) if free.drawn(n + 1)["code"] > limit)  # sample n would be the first too many
    Mix(sources, weights, n, seed=1, start=start, epochs_max=3)
    with pytest.raises(MixError, match=rf"code .*3\.\d+ times.* 64 tokens short, from sample {n:,} of"):
        Mix(sources, weights, n + 1, seed=1, start=start, epochs_max=3)
    short = (free.drawn(5_000)["code"] - limit) * 64
    with pytest.raises(MixError, match=rf" {short:,} tokens short, from sample {n:,} of"):
        Mix(sources, weights, 5_000, seed=1, start=start, epochs_max=3)
    with pytest.raises(MixError, match="windows short, from sample 0 of"):
        Mix({"code": 10}, {"code": 1}, 5, seed=1, start={"code": 50}, epochs_max=3)
    Mix({"code": 10}, {"code": 1}, 25, seed=1, epochs_max=2.5)
    with pytest.raises(MixError, match="from sample 25 of 26"):
        Mix({"code": 10}, {"code": 1}, 26, seed=1, epochs_max=2.5)


def test_another_run_is_told_from_the_same_run(sources, tmp_path):
    weights = {"text": 0.6, "code": 0.4}
    saved = json.loads(json.dumps(Mix(sources, weights, 1_000, seed=1).identity()))

    def now(sources=sources, weights=weights, samples=1_000, seed=1, **knobs):
        return json.loads(json.dumps(Mix(sources, weights, samples, seed, **knobs).identity()))

    check_identity(saved, now())
    check_identity(saved, now(samples=2_000))  # a phase may be lengthened
    check_identity(saved, now(weights={"code": "2/5", "text": "3/5"}))
    check_identity(saved, now(skip=[(700, 800)]), n=640)
    write_source(tmp_path, "more", random_tokens(5, 999))
    more = {**sources, "more": Source(tmp_path / "more", "train", 64)}
    check_identity(saved, now(sources=more))  # a source that this run does not draw

    def refuses(field, other, n=math.inf):
        with pytest.raises(MixError, match=field):
            check_identity(saved, other, n)

    refuses("samples was 1000 .* is 900 now", now(samples=900))
    refuses("seed was 1 .* is 2 now", now(seed=2))
    refuses("weights", now(weights={"text": 0.61, "code": 0.39}))
    refuses("weights", now(sources=more, weights={**weights, "more": 0.1}))
    refuses("start", now(start={"text": 1}))
    refuses("skip", now(skip=[(700, 800)]))
    refuses("skip", now(skip=[(600, 800)]), n=640)
    refuses("block_size was 64", now(sources={name: Source(tmp_path / name, "train", 32) for name in sources}))
    refuses("algorithm", {**now(), "algorithm": 2})
    tokens = np.fromfile(tmp_path / "code" / "train-00000.bin", "<u2")
    for field, value, tokenizer in (
        ("sha256", tokens ^ 1, "tok"),
        ("tokens", tokens[:-1], "tok"),
        ("tokenizer", tokens, "other"),
    ):
        write_source(tmp_path, "code", value, tokenizer=tokenizer)
        refuses(f"{field} of code", now(sources={name: Source(tmp_path / name, "train", 64) for name in sources}))


def test_damaged_or_missing_data_is_named_before_anything_is_read(tmp_path):
    def refuses(pattern, folder, split="train", block=64):
        with pytest.raises(MixError, match=pattern) as error:
            Source(folder, split, block)
        assert "\n" not in str(error.value)

    folder = write_source(tmp_path, "a", random_tokens(0, 1_000), random_tokens(1, 500))
    refuses(r"1,500 train tokens.*block_size \+ 1 = 1,025", folder, block=1024)
    refuses("0 val tokens", folder, split="val")
    shard = folder / "train-00001.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    refuses(r"train-00001.bin: 997 bytes.*1,000.*prepare.py a=", folder)
    shard.unlink()
    refuses(r"train-00001.bin: missing.*prepare.py a=", folder)
    shard.write_bytes(whole)
    Source(folder, "train", 64)
    meta = json.loads((folder / "meta.json").read_text())
    for broken in ("{", "[]", b"\xff", "[" * 100_000, *map(json.dumps, (
        {"format": 1}, meta | {"format": 2}, {k: v for k, v in meta.items() if k != "val"}, meta | {"train": []},
        meta | {"tokenizer": meta["tokenizer"] | {"vocab_size": 70_000}}, meta | {"val": {"tokens": 1, "shards": [3]}},
    ))):  # fmt: skip
        (folder / "meta.json").write_bytes(broken if isinstance(broken, bytes) else broken.encode())
        refuses("meta.json", folder)
    outside = {"file": "../a/train-00001.bin", "tokens": 500, "sha256": ""}
    (folder / "meta.json").write_text(json.dumps(meta | {"train": {"tokens": 500, "shards": [outside]}}))
    refuses(r"\.\./a/train-00001.bin: missing", folder)
    refuses(f"neither meta.json nor train.bin.*prepare.py b=FILES --out={tmp_path}$", tmp_path / "b")
    refuses("prepare.py nowhere=FILES$", Path("data/nowhere"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "train.bin").write_bytes(b"x" * 1001)
    refuses("train.bin: 1,001 bytes", tmp_path / "b")
    (tmp_path / "b" / "train.bin").write_bytes(b"x" * 128)
    refuses("64 train tokens", tmp_path / "b")


CHANGED = {
    "one bit": lambda raw: raw[:500] + bytes([raw[500] ^ 1]) + raw[501:],
    "its tokens reversed": lambda raw: np.frombuffer(raw, "<u2")[::-1].tobytes(),
    "a part that was never copied": lambda raw: raw[:600] + bytes(len(raw) - 600),
    "another file of its size": lambda raw: random_tokens(7, len(raw) // 2).tobytes(),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_shard_that_changed_after_it_was_prepared_is_named_before_training(change, tmp_path):
    folder = write_source(tmp_path, "a", random_tokens(0, 1_000), random_tokens(1, 500))
    shard = folder / "train-00001.bin"
    written = (folder / "meta.json").stat().st_mtime_ns
    os.utime(shard, ns=(written + 1, written + 1))
    assert Source(folder, "train", 64).windows == 15 + 7  # newer, and still what was prepared
    shard.write_bytes(CHANGED[change](shard.read_bytes()))
    os.utime(shard, ns=(written + 1, written + 1))
    with pytest.raises(MixError, match=r"train-00001.bin: not what was prepared"):
        Source(folder, "train", 64)


@pytest.mark.parametrize("kind", ["<u4", "<i8", ">i4", ">u8", ".npy"])
def test_a_bare_file_that_holds_no_uint16_is_refused_with_the_way_to_convert_it(kind, tmp_path):
    folder, ids = tmp_path / "a", random_tokens(0, 1_000)
    folder.mkdir()
    if kind == ".npy":
        with open(folder / "train.bin", "wb") as f:
            np.save(f, ids)
    else:
        ids.astype(kind).tofile(folder / "train.bin")
    with pytest.raises(MixError, match=r"train.bin.*astype\('<u2'\)"):
        Source(folder, "train", 64)
    for content in (ids, np.zeros(1_000, "<u2"), np.repeat(ids[:3], 8), ids % 2):  # odd, but uint16
        content.astype("<u2").tofile(folder / "train.bin")
        Source(folder, "train", 8)
    (128 * np.arange(1_000)).astype("<i8" if kind in ("<i8", ">u8") else "<u4").tofile(folder / "train.bin")
    with pytest.raises(MixError, match=r"train.bin.*cannot hold those above 65,535"):
        Source(folder, "train", 64)


@pytest.mark.parametrize("where", ["a window", "the last token", "the held-out rows"])
def test_an_id_beyond_the_vocabulary_is_named_when_it_is_met(where, tmp_path):
    ids = random_tokens(0, 40_001) % 65
    ids[{"a window": 101 * 64 + 37}.get(where, 40_000)] = 70
    folder = write_source(tmp_path, "a", ids[:64_00] % 65, ids)
    for limit in (71, 66):
        source = Source(folder, "train", 64)
        source.ids = limit
        read = Mix({"a": source}, {"a": 1}, source.windows * 3, seed=1).batch  # later epochs are cut elsewhere
        if limit == 71:
            assert read(0, source.windows * 3)[0].max() == 70
            continue
        with pytest.raises(MixError, match=r"train-00001.bin: id 70 .* beyond the 66 ids"):
            source.rows(source.windows) if where == "the held-out rows" else read(0, source.windows * 3)


def test_a_mix_that_cannot_be_had_is_refused():
    windows = {"text": 10, "code": 10}
    for pattern, weights in (
        ("no source cod, math; there are: code, text", {"cod": 1, "math": 1, "text": 1}),
        ("not a number", {"text": "much"}),
        ("not a number", {"text": float("nan")}),
        ("not a number", {"text": "1e999999999"}),
        ("not a number", {"text": True}),
        ("must be positive", {"text": -1, "code": 2}),
        ("must be positive", {"text": 0}),
        ("must be positive", {}),
        ("rounds to nothing", {"text": 1, "code": 1e-7}),
    ):
        with pytest.raises(MixError, match=pattern):
            Mix(windows, weights, 10, seed=1)
    mixed = Mix(windows, {"text": 1}, 10, seed=1)
    with pytest.raises(IndexError, match="samples 8 to 11 of a phase of 10"):
        mixed.plan(8, 11)
