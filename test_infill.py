"""What infill.py promises, and what training, evaluation and sampling make of it."""

import hashlib
import json
import math
import os
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

import eval as evaluation
import infill
import sample
import tokenizer
import train
from conftest import ROOT, losses, run
from infill import Codegen2, Fim, InfillError, Prefix, Vocabulary, corrupt, prefix, uncorrupt, unfim
from kernels import batch_mask
from kernels.attention import attention_mask
from mix import Mix, MixError, Source, check_identity
from model import GPT, GPTConfig, init_weights
from test_processes import assert_same_run, trained

ENCODING = tokenizer.load(vocab_size=4096)
V = Vocabulary(ENCODING)
W = 65
KEYS = infill.scramble(np.arange(10_000, dtype=np.uint64)).tolist()

# A row as a string, a letter a token: x for ordinary words
LETTERS = np.full(ENCODING.n_vocab, "x")
LETTERS[V.masks[0] : V.masks[1]] = "m"
NAMES = ("eot", "pre", "suf", "mid", "pad", "sep", "eom")
LETTERS[[getattr(V, name) for name in NAMES]] = [*"EPSM_|e"]
PSM, SPM1, SPM2 = r"P(x+)S(x+)M(x+)E", r"S(x+)P(x+)M(x+)E", r"PS(x+)M(x{2,})E"


def random_text(dice, most):
    """Up to so many characters: line ends and tabs, ASCII, and letters of two to four bytes."""
    ranges = ((9, 14), (32, 127), (32, 127), (160, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000))
    return "".join(chr(dice.randrange(*dice.choice(ranges))) for _ in range(dice.randint(0, most)))


def fim(row, key, objective, vocabulary):
    return infill.fim(row[None], np.array([key], np.uint64), objective, vocabulary)[0]


def letters(row):
    return "".join(LETTERS[row])


def spelt(ids):
    """The bytes of ordinary ids; sentinels spell none."""
    return b"".join(V.token_bytes[i] for i in ids)


def arranged(row):
    """What `fim` rearranged in a row: [(order, prefix, middle, suffix)] as ids; of SPM 2 prefix and middle are one."""
    found = []
    for match in re.finditer(f"{PSM}|{SPM2}|{SPM1}", letters(row)):
        a, b, c, tail, both, d, e, f = (row[slice(*match.span(i))] for i in range(1, 9))
        found.append(
            ("psm", a, c, b) if match[1] else ("spm 2", both[:0], both, tail) if match[4] else ("spm 1", e, f, d)
        )
    return found


@pytest.fixture(scope="module")
def windows():
    """10,000 windows of documents of 0 to about 300 words: Python with CRLF and tabs, and letters of many bytes."""
    rng = np.random.default_rng(0)
    code = Path(json.__file__).read_text().replace("\n", "\r\n").replace("    ", "\t")
    words = "naïve Straße ελληνικά 日本語のテキスト 👩‍👩‍👧 \t\u2028 = x+1 'Ω' def f(): \r\n return".split(" ")  # noqa: SIM905
    stream = []
    while len(stream) < 200_000:
        begin = rng.integers(len(code))
        length = int(rng.choice([0, 1, 2, 5, 40, 400, 900]))
        text = " ".join(rng.choice(words, length // 8)) if rng.random() < 0.5 else code[begin : begin + length]
        stream += [*ENCODING.encode_ordinary(text), V.eot]
    stream = np.array(stream, np.uint16)
    return stream[rng.integers(0, len(stream) - W, 10_000)[:, None] + np.arange(W)]


# ------------------------------------------------------------------------------------------------------------- undoing


@pytest.mark.parametrize("cut", ["character", "token", "line"])
@pytest.mark.parametrize("level", ["document", "row"])
def test_unfim_returns_the_window_less_the_room_of_the_marks(windows, level, cut):
    for i, (row, key) in enumerate(zip(windows, KEYS, strict=True)):
        new = fim(row, key, Fim(0.8, level, cut=cut, spm_variant=1 + i % 2), V)
        back = unfim(new, V, level)
        assert new.dtype == np.uint16 and len(new) == W
        assert spelt(row).startswith(spelt(back))
        if cut == "token":
            assert np.array_equal(back, row[: len(back)])
        text = letters(new)
        moved = text.count("M")  # each with three sentinels, one perhaps with an end of text and pad
        assert W - len(back) - 3 * moved - 2 * text.count("_") in (0, int(moved and new[-1] == V.eot))


@pytest.mark.parametrize("level", ["document", "row"])
def test_uncorrupt_returns_the_window_less_the_room_of_the_marks(windows, level):
    few = [np.array(ids, np.uint16) for ids in ([5], [V.eot], [5, 6], [5, V.eot], [V.eot, V.eot], [5, 6, 7], [])]
    for row, key in zip([*few, *windows], [*KEYS[: len(few)], *KEYS], strict=True):
        for objective in (Codegen2(0.8, level), Codegen2(0.8, level, ratio=(0, 1), span=(1, 4))):
            new = corrupt(row, key, objective, V)
            back = uncorrupt(new, V, level)
            assert new.dtype == np.uint16 and len(new) == len(row) and np.array_equal(back, row[: len(back)])
            text = letters(new)  # room for mask, mask and eom of every span, sep, an end of text, and what is left over
            assert len(row) - len(back) <= 3 * text.count("e") + text.count("|") * 2 + text.count("_")


# -------------------------------------------------------------------------------------------------------------- draws


def within(count, n, share, sigmas=3):
    return abs(count - n * share) < sigmas * math.sqrt(n * share * (1 - share))


@pytest.mark.parametrize("rate, spm", [(0.9, 0.5), (0.3, 0.1)])
def test_documents_are_rearranged_at_the_rate_and_in_the_orders_asked_for(rate, spm):
    row = np.tile(np.append(V.ids[300:312], V.eot), 5).astype(np.uint16)  # of five documents four always have room
    pieces = [
        piece for key in KEYS for piece in letters(fim(row, key, Fim(rate, spm=spm, spm_variant=1), V)).split("E")[:4]
    ]
    moved = [piece for piece in pieces if "M" in piece]
    assert within(len(moved), len(pieces), rate)
    assert within(sum(piece[0] == "S" for piece in moved), len(moved), spm)
    assert within(sum(V.sep in corrupt(row, key, Codegen2(rate), V) for key in KEYS), len(KEYS), rate)
    assert within(sum(prefix(row, key, Prefix(rate, most=1), V)[13] > 0 for key in KEYS), len(KEYS), rate * 13 / 14)


def test_cuts_are_any_two_places_between_characters_with_equal_chance():
    text = "naïve 日本語 text = 1"
    row = np.array([*ENCODING.encode_ordinary(text), *[V.eot] * 20], np.uint16)
    counts = dict.fromkeys(((a, b) for a in range(1, len(text)) for b in range(a + 1, len(text))), 0)
    for key in range(20_000):
        ((_, before, _, after),) = arranged(fim(row, infill.scramble(key), Fim(1, spm=0), V))
        counts[len(spelt(before).decode()), len(text) - len(spelt(after).decode())] += 1  # another pair: KeyError
    expected = 20_000 / len(counts)
    chi2 = sum((n - expected) ** 2 / expected for n in counts.values())
    assert abs(chi2 - len(counts)) < 4 * math.sqrt(2 * len(counts))


def test_spans_have_a_total_within_the_ratio_do_not_touch_and_follow_in_order():
    for ratio, span in (((0.05, 0.5), (1, 128)), ((0.15, 0.15), (3, 3)), ((0.9, 1.0), (1, 2)), ((0.5, 0.5), (1, 1))):
        objective, shares = Codegen2(1, ratio=ratio, span=span), []
        for n, key in zip([*range(500)] * 4, KEYS, strict=False):
            took, parts = infill.corrupt_document(V.ids[300 : 300 + n], 10**6, infill.draws(key, 0, 2), objective, V)
            assert took == n
            if parts is None:
                assert ratio[0] * n < 0.5
                continue
            row = np.concatenate(parts)
            body, answers = re.fullmatch(r"((?:x*m)(?:x+m)*x*)E\|((?:mx+e)+)", letters(row)).groups()
            masked = answers.count("x")
            assert body.count("x") == n - masked and ratio[0] * n - 0.5 <= masked <= ratio[1] * n + 0.5
            masks = row[(row >= V.masks[0]) & (row < V.masks[1])] - V.masks[0]
            assert masks.tolist() == 2 * [*range(len(masks) // 2)]
            assert np.array_equal(uncorrupt(row, V), V.ids[300 : 300 + n])
            if n >= 100:
                shares.append(masked / n)
        assert abs(np.mean(shares) - sum(ratio) / 2) < 0.01
        assert abs(np.std(shares) - (ratio[1] - ratio[0]) / math.sqrt(12)) < 0.01


def test_spans_cross_documents_only_at_the_level_of_rows(windows):
    answered = {
        level: "\n".join(
            letters(corrupt(row, key, Codegen2(1, level), V)) for row, key in zip(windows, KEYS, strict=True)
        )
        for level in ("document", "row")
    }
    inside = {level: re.findall(r"m([xE]+)e", text) for level, text in answered.items()}
    assert len(inside["document"]) > 5_000 and not any("E" in span for span in inside["document"])
    assert sum("E" in span for span in inside["row"]) > 100


def test_prefixes_are_first_parts_of_documents_with_the_law_of_their_length(windows):
    assert (prefix(windows[0], 1, Prefix(0), V) == 0).all()
    row, lengths = np.append(V.ids[300:320], V.eot), []
    for key in KEYS:
        inside = prefix(row, key, Prefix(1, most=0.5), V)
        lengths.append(int((inside == 1).sum()))
        assert inside[: lengths[-1]].all() and not inside[lengths[-1] :].any()
    counts = np.bincount(lengths)
    assert len(counts) == 11 and abs(((counts - 10_000 / 11) ** 2).sum() * 11 / 10_000 - 10) < 4 * math.sqrt(20)
    for row, key in zip(windows[:500], KEYS, strict=False):
        inside = prefix(row, key, Prefix(1, most=1), V)
        for i, (begin, end) in enumerate(infill.pieces(row, "document", V), 1):
            part = inside[begin:end].tolist()
            assert part == sorted(part, reverse=True) and {*part} <= {0, i}


# --------------------------------------------------------------------------------------------------------------- bytes


def test_character_cuts_keep_every_byte_and_every_character():
    dice = random.Random(0)
    for key in KEYS[:2_000]:
        texts = [random_text(dice, 60) + "\tend\r\n" for _ in range(dice.randint(1, 5))]
        ids = [word for text in texts for word in [*ENCODING.encode_ordinary(text), V.eot]]
        row = np.array([*ids, *[V.eot] * 8 * len(texts)], np.uint16)  # with room for all sentinels and parts of words
        found = arranged(fim(row, key, Fim(1, spm_variant=1), V))
        assert [b"".join(map(spelt, parts)) for _, *parts in found] == [text.encode() for text in texts]
        for _, *parts in found:
            for part in parts:
                spelt(part).decode()  # raises where a character was cut


def test_only_the_words_that_are_cut_are_encoded_anew():
    text = "def return_value(argument):\n    return argument + value\n" * 2
    row = np.array([*ENCODING.encode_ordinary(text), *[V.eot] * 20], np.uint16)

    def spans(ids):
        ends = np.cumsum([len(V.token_bytes[i]) for i in ids]).tolist()
        return set(zip([0, *ends], ends, strict=False))

    cut_words = 0
    for key in KEYS[:500]:
        ((_, *parts),) = arranged(fim(row, key, Fim(1, spm=0), V))
        a = len(spelt(parts[0]))
        b = a + len(spelt(parts[1]))
        gone = spans(row[:-20]) - spans(np.concatenate(parts))
        assert all(begin < a < end or begin < b < end for begin, end in gone)
        cut_words += len(gone)
    assert cut_words > 500


def test_ordinary_text_never_becomes_a_mark():
    dice = random.Random(0)
    for special in tokenizer.SPECIALS * 20:
        text = random_text(dice, 20)
        for written in (text, special, text + special + text, special[:-1], special * 2):
            ids = ENCODING.encode_ordinary(written)
            assert {*letters(np.array(ids, int))} <= {"x"} and spelt(ids) == written.encode()


def test_spm_variant_2_with_an_empty_prefix_is_psm():
    middle, suffix, none = V.ids[300:310], V.ids[400:405], V.ids[:0]
    psm, spm = (np.concatenate(infill.in_order([none], [middle], [suffix], variant, V.sentinels)) for variant in (0, 2))
    assert psm.tolist() == spm.tolist() == [V.pre, V.suf, *suffix, V.mid, *middle, V.eot]
    assert [*infill.prompt(none, suffix, "spm2", V), *middle, V.eot] == [V.eot, *psm]


def test_prompts_are_rows_up_to_the_hole():
    before, after, middle, mask = V.ids[300:302], V.ids[400:403], V.ids[500:501], V.masks[0]
    for name, sentinels in (
        ("psm", [V.pre, 300, 301, V.suf, 400, 401, 402, V.mid]),
        ("spm1", [V.suf, 400, 401, 402, V.pre, 300, 301, V.mid]),
        ("spm2", [V.pre, V.suf, 400, 401, 402, V.mid, 300, 301]),
        ("codegen2", [300, 301, mask, 400, 401, 402, V.eot, V.sep, mask]),
    ):
        ids = infill.prompt(before, after, name, V)
        assert ids.tolist() == [V.eot, *sentinels]
        undo, end = (uncorrupt, V.eom) if name == "codegen2" else (unfim, V.eot)
        assert undo(np.array([*sentinels, *middle, end], np.uint16), V).tolist() == [300, 301, 500, 400, 401, 402]
    laid_out = {Fim(): "psm", Fim(spm=1): "spm2", Fim(spm=1, spm_variant=1): "spm1", Codegen2(): "codegen2"}
    for objective, name in (laid_out | dict.fromkeys((Prefix(), Fim(0), Codegen2(0)))).items():
        assert infill.layout(objective) == name


# ---------------------------------------------------------------------------- five defects of other implementations


def megatron_fim(row, dice):
    """A window as BigCode's and NVIDIA's Megatron rearrange it, with their defects: draws from one stream, the
    tail cut off, no end of text after the last piece, empty parts; what pad they leave is trained on."""
    out = []
    for piece in re.finditer("x*(E|$)", letters(row)):
        body, end = row[piece.start() : piece.end() - len(piece[1])], row[piece.end() - len(piece[1]) : piece.end()]
        if dice.random() < 0.9:
            a, b = sorted(dice.randint(0, len(body)) for _ in range(2))
            body = [V.pre, *body[:a], V.suf, *body[b:], V.mid, *body[a:b]]
        out += [*body, *end]
    return np.array([*out, *[V.pad] * W][:W], np.uint16)


def defects_of_row(raw, row):
    """Names of what is wrong with a row that was made of a window by fill-in-the-middle."""
    text, found = letters(row), set()
    if re.search("M[^E]*$", text) or re.search("[PS][^M]*$", text):
        found.add("no end of text")
    if re.search("PSM|SM|SPM|PM|M(E|_|$)|PSx+MxE", text):
        found.add("sentinels around nothing")
    for match in re.finditer(r"P(x+)S(x*)M(x*)|PS(x*)M(x*)|S(x*)P(x*)M(x*)", text):
        a, b, c, tail, both, d, e, f = (spelt(row[slice(*match.span(i))]) for i in range(1, 9))
        whole = a + c + b if match[1] else both + tail if match[4] is not None else e + f + d
        if whole not in spelt(raw):
            found.add("cut middle")
    return found


def defects(rearrange, targets_of, windows):
    """Names of what is wrong with a way to rearrange windows (n, W), and with its rows' targets (n, W - 1)."""
    rows = rearrange(windows)
    found = set().union(*map(defects_of_row, windows, rows))
    if not np.array_equal(rearrange(windows[:40])[20:], rearrange(windows[20:40], first=20)):
        found.add("draws that depend on others")
    if (targets_of(rows) == V.pad).any():
        found.add("pad that is trained on")
    return found


def our_targets(rows):
    mix = SimpleNamespace(batch=lambda lo, hi: (rows, rows[:, 0] * 0, None), vocabulary=V, objectives={"code": Fim()})
    return train.read_batch(SimpleNamespace(mix=mix, cfg=train.Config()), 0, len(rows))["targets"].numpy()


def test_rows_have_none_of_the_five_defects_of_others(windows):
    dice, of_rows = random.Random(0), {"no end of text", "sentinels around nothing", "cut middle"}

    def megatrons(windows, first=0):
        return np.stack([megatron_fim(row, dice) for row in windows])

    def ours(objective):
        def rearrange(windows, first=0):
            return infill.fim(windows, np.array(KEYS[first : first + len(windows)], np.uint64), objective, V)

        return rearrange

    def all_targets(rows):
        return rows[:, 1:]

    assert defects(megatrons, our_targets, windows[:2_000]) == of_rows | {"draws that depend on others"}
    crystals = ours(Fim(0.9, faithful=True))
    assert defects(crystals, our_targets, windows) == of_rows
    letter_by_letter = [ENCODING.encode_single_token(bytes([byte])) for byte in b"return the value of it " * 3][:W]
    shorter = np.tile(np.array(letter_by_letter, np.uint16), (100, 1))  # which leaves room for pad
    assert "pad that is trained on" in defects(crystals, all_targets, shorter) - defects(crystals, our_targets, shorter)
    for cut in ("character", "token", "line"):
        for variant in (1, 2):
            assert defects(ours(Fim(0.9, cut=cut, spm_variant=variant)), our_targets, windows) == set()


def test_middles_end_anywhere_in_a_window_also_where_it_holds_one_document():
    """They would all end with the window, and a model would learn to stop there."""
    row, ends = np.arange(300, 300 + W).astype(np.uint16), np.zeros(W, int)
    for key in KEYS:
        ends += fim(row, key, Fim(0.9), V) == V.eot
    assert (ends[20:-1] > 50).all() and ends.sum() > 15_000


def test_a_row_is_its_grammar(windows):
    for row, key in zip(windows, KEYS, strict=True):
        assert re.fullmatch(f"(x*({PSM}|{SPM2})_?|x*E)*x*", letters(fim(row, key, Fim(0.9), V)))
        assert re.fullmatch(r"((x*m)(x+m)*x*E\|(mx+e)+|x*E)*x*_{0,3}", letters(corrupt(row, key, Codegen2(0.9), V)))


@pytest.mark.parametrize(
    "objective, digest",
    [
        (Fim(0.9), "f84814a36b9d5fa0"),
        (Fim(0.5, "row", cut="line", spm_variant=1), "3a9bb5f542e02b8e"),
        (Fim(0.9, faithful=True), "231658ae6aa6771b"),
        (Codegen2(0.5), "2d266a60273cb6ff"),
        (Prefix(0.5), "cb2d5d3fed309260"),
    ],
)
def test_rows_are_what_they_have_always_been(objective, digest):
    """Otherwise a run would not go on as it began: change ALGORITHM of mix.py together with these."""
    rows = infill.below(infill.scramble(np.arange(500 * W, dtype=np.uint64)), 4_000).reshape(500, W).astype(np.uint16)
    rows[rows < 80] = V.eot
    moved, inside = infill.rearrange(rows, np.array(KEYS[:500], np.uint64), objective, V)
    assert hashlib.sha256(moved if inside is None else inside).hexdigest()[:16] == digest


@pytest.fixture
def source(data):
    return Source(data / "code", "train", 64)


def mix_of(source, objective, samples=10_000, seed=1):
    vocabulary = Vocabulary(tokenizer.load(vocab_size=512))
    return Mix({"code": source}, {"code": 1}, samples, seed, objectives={"code": objective}, vocabulary=vocabulary)


@pytest.mark.parametrize("objective", [Fim(0.9), Codegen2(0.9), Prefix(0.9), Fim(0.9, faithful=True)])
def test_draws_depend_on_seed_source_epoch_window_and_document_alone(source, objective):
    def rows(mixed, lo, hi):
        rows, _, prefix = mixed.batch(lo, hi)
        return rows if prefix is None else np.concatenate((rows, prefix), axis=1)

    n = source.windows
    whole = rows(mix_of(source, objective), 0, 64)
    backwards = mix_of(source, objective)  # another order and other micro-batches: nothing is carried along
    assert np.array_equal(np.concatenate([rows(backwards, i, i + 4) for i in range(60, -4, -4)][::-1]), whole)
    assert np.array_equal(rows(mix_of(source, objective, 20 * n), 32, 64), whole[32:])  # resumed
    keys = [mix_of(source, objective, 2 * n, seed).places(0, 2 * n)[3] for seed in (1, 2)]
    other = Mix({"text": source}, {"text": 1}, 2 * n, 1, objectives={"text": objective}).places(0, 2 * n)[3]
    assert len(np.unique([*keys, other])) == 6 * n  # every window of every epoch, seed and source has its own
    fixed = mix_of(source, infill.parse(str(objective)[:-1] + ", redraw=False)"), 3 * n)
    redrawn, plain = mix_of(source, objective, 3 * n), mix_of(source, None, 3 * n)
    one, two = (sorted(map(bytes, rows(fixed, i * n, i * n + n))) for i in (0, 1))
    assert one == two and one == sorted(map(bytes, rows(redrawn, 0, n)))  # the same rows, in another order
    assert not np.array_equal(rows(fixed, 0, n), rows(fixed, n, 2 * n))
    assert len({*one} & {*map(bytes, rows(redrawn, n, 2 * n))}) < n / 4
    assert not np.array_equal(rows(plain, 0, 64)[:, :65], whole[:, :65]) or isinstance(objective, Prefix)


def test_only_the_source_that_asks_is_rearranged_and_the_run_knows_how(data):
    sources = {name: Source(data / name, "train", 64) for name in ("text", "code")}
    vocabulary = Vocabulary(tokenizer.load(vocab_size=512))
    mixed = {}
    for text in ("causal", "fim(0.9)", "fim(0.3)"):
        known = {"code": infill.parse(text)}
        mixed[text] = Mix(sources, {"text": 1, "code": 1}, 500, 1, objectives=known, vocabulary=vocabulary)
    (plain, source, _), (rows, _, prefix) = (mixed[text].batch(0, 500) for text in ("causal", "fim(0.9)"))
    code = source == mixed["causal"].names.index("code")
    assert (
        prefix is None and np.array_equal(rows[~code], plain[~code]) and (rows[code] != plain[code]).any(1).mean() > 0.8
    )
    saved = mixed["fim(0.9)"].identity()
    check_identity(saved, json.loads(json.dumps(saved)))
    with pytest.raises(MixError, match=r"objective was .*fim\(0.9\).* and is .*fim\(0.3\)"):
        check_identity(saved, mixed["fim(0.3)"].identity())
    check_identity(
        {k: v for k, v in mixed["causal"].identity().items() if k != "objective"}, mixed["causal"].identity()
    )


# --------------------------------------------------------------------------------------------------------------- masks


def tiny_model(**knobs):
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=512, **knobs)
    model = GPT(config)
    init_weights(model, seed=1)
    return model


@pytest.mark.parametrize("parallel", [False, True])
def test_a_prefix_sees_itself_from_both_sides_and_nothing_after_it(parallel):
    model, tokens = tiny_model(parallel=parallel), torch.randint(0, 500, (2, 24))
    inside = torch.zeros(2, 24, dtype=torch.long)
    inside[0, :9], inside[1, 4:10] = 1, 2
    mask = batch_mask(24, prefix=inside)

    def states(change=None):
        changed = tokens.clone()
        if change is not None:
            changed[:, change] = (changed[:, change] + 7) % 500
        return model.hidden(changed, mask=mask)

    for late in (12, 23):
        differs = (states(late) != states()).any(-1)
        assert not differs[:, :12].any() and differs[:, late].all()
    seen = (states(8) != states()).any(-1)
    assert seen[0, :9].all() and not seen[1, :4].any() and seen[1, 4:10].all()  # both of them hold token 8


@pytest.mark.parametrize("objective", [None, Fim(0.9), Codegen2(1.0, ratio=(0.2, 0.5), span=(1, 5))])
def test_loss_of_a_packed_row_is_the_mean_over_its_documents_run_alone(objective):
    vocabulary, model, rng = Vocabulary(tokenizer.load(vocab_size=512)), tiny_model(), np.random.default_rng(0)
    lengths = [9, 1, 17, 20, 14]
    row = np.concatenate([np.append(rng.integers(0, 400, n), vocabulary.eot) for n in lengths])[:65].astype(np.uint16)
    if objective:
        row = infill.rearrange(row[None], np.array([3], np.uint64), objective, vocabulary)[0][0]
        assert (row == (vocabulary.mid if isinstance(objective, Fim) else vocabulary.sep)).sum() >= 3
    alone = 0
    for begin, end in own_documents(row, vocabulary):
        end += end < 65 and row[end] == vocabulary.eot  # which as an input begins the next
        part = torch.from_numpy(row[begin:end].astype(np.int64))[None]
        goal = part[:, 1:].masked_fill(part[:, 1:] == vocabulary.pad, -1)
        if len(part[0]) > 1:
            alone += model(part[:, :-1], goal)[1].sum()
    batch = row[None], np.zeros(1, int), None
    mix = SimpleNamespace(batch=lambda lo, hi: batch, vocabulary=vocabulary, objectives={"code": objective})
    phase = SimpleNamespace(mix=mix, cfg=train.Config(doc_mask=True))
    tokens, targets, _, how = train.to_device(train.read_batch(phase, 0, 1), "cpu", torch.float32)
    packed = model(tokens, targets, **how)[1].sum()
    assert packed.item() == pytest.approx(alone.item(), rel=1e-6)
    assert model(tokens, targets)[1].sum().item() != pytest.approx(alone.item(), rel=1e-3)
    assert model(tokens, targets, mask=how["mask"])[1].sum().item() == pytest.approx(alone.item(), rel=1e-5)  # rotary


def own_documents(row, vocabulary):
    """[(begin, end)] of a row's documents: one begins with the end mark before it, if any, and ends where
    the next begins, or with the last span that is answered of it."""
    ids = {getattr(vocabulary, name): letter for name, letter in zip(NAMES, "EPSM_|e", strict=True)}
    ids |= dict.fromkeys(range(*vocabulary.masks), "m")
    text = "".join(ids.get(i, "x") for i in row.tolist())
    spans = [match.span() for match in re.finditer(r"(E_?)?[xPSMm]*(E\|(mx+e)+)?|_+", text) if match[0]]
    return [span for span in spans if span[0] < len(row) - 1]  # the last token is no input


def test_a_document_is_what_stands_between_ends_of_text_and_its_spans_after_them(windows):
    for row, key in zip(windows[:3_000], KEYS, strict=False):
        for objective in (Codegen2(1), Fim(0.9)):
            new = infill.rearrange(row[None], np.array([key], np.uint64), objective, V)[0]
            number, place = infill.documents(new, V)
            for i, (begin, end) in enumerate(own_documents(new[0], V)):
                end = min(end, W - 1)
                assert (number[0, begin:end] == i).all() and place[0, begin:end].tolist() == [*range(end - begin)]


# ------------------------------------------------------------------------------------------------------------ training

OBJECTIVE = "{'code': 'fim(0.9)', 'text': 'codegen2(0.8)'}"
KNOBS = [{"objective": OBJECTIVE, "doc_mask": True}, {"objective": "{'*': 'prefix(0.9)'}"}]


@pytest.mark.parametrize("knobs", KNOBS, ids=["infilling", "prefixes"])
def test_a_run_with_objectives_and_masks_that_died_goes_on_as_if_it_had_not(knobs, phases, tmp_path, monkeypatch):
    assert train.main(phases("a", out="straight", **knobs)) == 0
    real = train.train_step

    def train_step(model, optimizer, feeder, phase, step, *rest):
        if step == 13:
            raise KeyError("a bug")
        return real(model, optimizer, feeder, phase, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", train_step)
        with pytest.raises(KeyError, match="a bug"):
            train.main(phases("a", **knobs))
    assert train.main(phases("a", **knobs)) == 0
    assert losses(tmp_path / "out", "a") == losses(tmp_path / "straight", "a")


@pytest.mark.parametrize("knobs", KNOBS, ids=["infilling", "prefixes"])
def test_two_processes_train_objectives_and_masks_as_one(knobs, phases, tmp_path):
    trained(phases("a", **knobs))
    assert train.main(phases("a", out="one", micro_batch=8, **knobs)) == 0
    assert_same_run(losses(tmp_path / "out", "a"), losses(tmp_path / "one", "a"))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compile", ["no", "yes"])
def test_masks_reach_every_block_also_compiled_and_recomputed(phases, tmp_path, monkeypatch, compile, recompute):
    knobs = {"objective": "{'*': 'prefix(1, most=0.9)'}", "doc_mask": True, "budget": 3 * 512, "share": 1.0}
    assert train.main(phases("a", out="plain", **knobs)) == 0
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: real(function, backend="aot_eager", **how))
    assert train.main(phases("a", compile=compile, recompute=recompute, **knobs)) == 0
    assert_same_run(losses(tmp_path / "out", "a"), losses(tmp_path / "plain", "a"), 1e-5)


def test_pad_and_prefixes_and_what_no_document_foretells_are_no_targets():
    m = V.masks[0]
    rows = [[300, m, V.eot, V.sep, m, 301, V.eom, 302, 303, V.pad], [*range(300, 305), V.eot, *range(305, 309)]]
    prefixes = [[0] * 10, [1] * 3 + [0] * 3 + [2] * 2 + [0] * 2]
    batch = np.array(rows, np.uint16), np.array([1, 0]), np.array(prefixes, np.uint16)
    mix = SimpleNamespace(batch=lambda lo, hi: batch, vocabulary=V, objectives={"text": Prefix(), "code": Codegen2()})
    phase = SimpleNamespace(mix=mix, cfg=train.Config(doc_mask=True))
    tokens, targets, source, how = train.to_device(train.read_batch(phase, 0, 2), "cpu", torch.float32)
    assert tokens.tolist() == [row[:-1] for row in rows] and source.tolist() == [1, 0]
    assert targets[0].tolist() == [m, V.eot, V.sep, m, 301, V.eom, -1, 303, -1]
    assert targets[1].tolist() == [-1, -1, *rows[1][3:6], -1, -1, 307, 308]
    assert how["pos"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1], [0, 1, 2, 3, 4, 0, 1, 2, 3]]
    doc = torch.tensor([[0] * 7 + [1] * 2, [0] * 5 + [1] * 4])
    seen = attention_mask(9, 9, torch.tensor(prefixes)[:, :-1], doc)
    assert torch.equal(how["mask"].bias == 0, seen)
    sums = torch.zeros(2, 2, dtype=torch.float64)
    train.add_losses(sums, torch.where(targets < 0, 0.0, 1.0), targets, source)
    assert sums.tolist() == [[5, 7], [5, 7]]


def opened(command):
    """(named, sources, encoding, vocabulary) of a command line, as train() would open it."""
    named = train.read_command_line(command, train.Config, train.PRESETS, (), infill.OBJECTIVES)[0]
    cfg = named[0][1]
    sources = {name: Source(Path(cfg.data) / name, "train", cfg.block_size) for name in cfg.mix}
    encoding = train.the_tokenizer(sources)[1]
    return named, sources, encoding, train.the_vocabulary(named, encoding)


def test_bits_of_middles_are_those_of_holes_in_held_out_documents(phases, tmp_path):
    command = phases("a", objective=OBJECTIVE, share=0.1)
    assert train.main(command) == 0
    logged = [r["val"] for r in losses(tmp_path / "out", "a") if "val" in r][-1]
    model, encoding, _ = sample.load_model(tmp_path / "out/a")
    sets = train.held_out(*opened(command))
    assert logged.keys() == sets.keys() == {
        *logged, "code", "text", "code middle", "text middle", "code middle, prefix only", "text middle, prefix only"
    }  # fmt: skip
    v = Vocabulary(encoding)
    for name, before, after, end in (("code", v.pre, v.suf, v.mid), ("text", None, v.masks[0], v.masks[0])):
        held_out = b"|".join(b"".join(v.token_bytes[i] for i in row) for row in sets[name][0])
        (rows, goals, n_bytes), (alone, alone_goals, _) = sets[f"{name} middle"], sets[f"{name} middle, prefix only"]
        bits = np.zeros(2)
        for row, goal, without, its_goal in zip(rows, goals, alone, alone_goals, strict=True):
            (at,), (its_at,) = (goal >= 0).nonzero(), (its_goal >= 0).nonzero()
            middle, ids = goal[at], row[: at[0] + 1].tolist()
            assert np.array_equal(row[at + 1], middle) and np.array_equal(its_goal[its_at], middle)
            assert at.tolist() == [*range(at[0], at[0] + len(at))] and ids[0] == v.eot and ids[-1] == end
            prefix = ids[1 + (before is not None) : ids.index(after)]
            suffix = [i for i in ids[ids.index(after) + 1 : -1] if i not in (v.eot, v.sep)]
            assert len(prefix) and len(suffix) and without[: its_at[0] + 1].tolist() == [v.eot, *prefix]
            spelt_out = b"".join(v.token_bytes[i] for i in [*prefix, *middle, *suffix])
            assert spelt_out in held_out
            for k, prompt in enumerate((row[: at[0] + 1], without[: its_at[0] + 1])):
                (nats,), _ = evaluation.log_likelihoods(model, [(prompt.tolist(), [middle.tolist()])])
                bits[k] -= nats / math.log(2)
        assert n_bytes == sum(len(v.token_bytes[i]) for i in goals[goals >= 0])
        got = [logged[f"{name} middle{kind}"]["bpb"] for kind in ("", ", prefix only")]
        assert got == pytest.approx([*(bits / n_bytes)], rel=1e-5)


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.9])
def test_the_survey_counts_tokens_that_are_rearranged_and_trained_on(rate):
    rng = np.random.default_rng(0)
    rows = rng.integers(300, 4_000, (3_000, 257)).astype(np.uint16)  # windows inside of long documents
    rows[::3, 100] = rows[::3, 180] = V.eot
    keys = np.array(KEYS[:3_000], np.uint64)
    for level, objective in (("document", Fim(rate)), ("row", Fim(rate, "row")), ("document", Codegen2(rate))):
        new = infill.rearrange(rows, keys, objective, V)[0]
        moved, trained = infill.survey(new, None, level, V)
        assert abs(moved - rate) < 0.02 and 1 - trained == pytest.approx((new[:, 1:] == V.pad).mean())
    inside = infill.rearrange(rows, keys, Prefix(rate, most=0.5), V)[1]
    moved, trained = infill.survey(rows, inside, "document", V)
    assert abs(moved - rate) < 0.02 and 1 - trained == pytest.approx((inside[:, 1:] > 0).mean())
    whole = infill.survey(*infill.rearrange(rows, keys, Prefix(1, "row", most=1), V), "row", V)
    assert whole[0] == pytest.approx(1, abs=0.01) and whole[1] == pytest.approx(0.5, abs=0.02)


def test_the_plan_shows_what_an_objective_comes_to(phases, tmp_path, capsys):
    command = phases("a", objective="{'text': 'prefix(1, most=1.0)', '*': 'fim(0.5, cut=\"token\")'}")
    assert train.main([*command, "--plan"]) == 0
    shown = re.findall(r"(\S+\(.*\)): (\S+)% of tokens rearranged, (\S+)% trained on", capsys.readouterr().out)
    named, sources, _, vocabulary = opened(command)
    mix = train.build_phases(named, sources, {}, 0, vocabulary)[0].mix
    rows, source, prefix = mix.batch(0, 288)
    for (text, *percent), name in zip(shown, ("text", "code"), strict=True):
        mine = source == mix.names.index(name)
        assert text == str(mix.objectives[name])
        shares = infill.survey(rows[mine], prefix[mine], "document", vocabulary)
        assert [float(p) for p in percent] == pytest.approx([100 * share for share in shares], abs=0.06)
    elsewhere = [f"--data={tmp_path}", "--source_tokens={'text': 1000000, 'code': 1000000}"]
    assert train.main([*command, "--plan", *elsewhere]) == 0
    assert "fim(0.5, cut='token')\n" in capsys.readouterr().out  # without the data


@pytest.mark.parametrize(
    "objective, word",
    [
        ("{'code': 'film(0.9)'}", "'film(0.9)' is none of causal, fim"),
        ("{'code': 'fim(2)'}", "fim(2): rate = 2 is not a number from 0 to 1"),
        ("{'code': 'fim(0.9, cut=\"word\")'}", "cut = 'word' is none of 'character', 'token', 'line'"),
        ("{'code': 'fim(0.9, colour=1)'}", "is none of causal"),
        ("{'code': 'codegen2(0.5, ratio=(0.5, 0.1))'}", "ratio = (0.5, 0.1) is not (least, most)"),
        ("{'code': 'codegen2(0.5, span=(0, 3))'}", "span = (0, 3) is not (least, most)"),
        ("{'cod': 'fim(0.9)'}", "objective names cod, but mix only"),
        ("{'code': 'fim(0.9, level=\"row\")'}", "doc_mask keeps documents apart"),
        ("{'code': 3}", "is none of causal"),
        ("{'code': 'fim(0.9, cut=\"line\", faithful=True)'}", "faithful goes with level='document'"),
    ],
)
def test_an_objective_that_cannot_be_meant_is_refused_in_one_line(objective, word, phases, tmp_path, capsys):
    assert train.main(phases("a", objective=objective, doc_mask=True)) == 2
    err = capsys.readouterr().err
    assert word in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_data_without_marks_is_refused(phases, tmp_path, capsys):
    for name in ("text", "code"):
        (tmp_path / "bare" / name).mkdir(parents=True)
        for split in ("train", "val"):
            np.zeros(10_000, np.uint16).tofile(tmp_path / "bare" / name / f"{split}.bin")
    for knobs in ({"objective": "{'code': 'fim(0.9)'}"}, {"doc_mask": True}):
        assert train.main([*phases("a", **knobs), f"--data={tmp_path / 'bare'}", "--vocab_size=512"]) == 2
        assert "names no tokenizer" in capsys.readouterr().err
    import tiktoken

    bare = tiktoken.Encoding("bare", pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)},
                             special_tokens={"<|endoftext|>": 256})  # fmt: skip
    assert Vocabulary(bare, [Prefix()]).pre == -1
    number, place = infill.documents(np.array([[1, 2, 256, 3, 4]], np.uint16), Vocabulary(bare))
    assert number.tolist() == [[0, 0, 1, 1, 1]] and place.tolist() == [[0, 1, 0, 1, 2]]
    for objective in (Fim(), Codegen2()):
        with pytest.raises(InfillError, match="bare has no <"):
            Vocabulary(bare, [objective])


def test_a_config_file_names_objectives_as_functions_or_text(tmp_path):
    (tmp_path / "a.py").write_text(
        "mix = {'a': 1, 'b': 1, 'c': 1}\nobjective = {'a': fim(0.9), 'b': 'causal', '*': codegen2(0.5)}\n"
    )
    ((_, cfg),) = train.read_command_line([str(tmp_path / "a.py")], train.Config, train.PRESETS, (), infill.OBJECTIVES)[
        0
    ]
    assert cfg.objectives() == {"a": Fim(0.9), "c": Codegen2(0.5)}
    assert cfg.objective == {"a": "fim(0.9)", "b": "causal", "*": "codegen2(0.5)"}
    for objective in (
        Fim(0.25, spm=1, faithful=True),
        Codegen2(1, ratio=(0.1, 0.2), redraw=False),
        Prefix(1, "row", most=0.1),
    ):
        assert infill.parse(str(objective)) == objective


def test_holes_that_fit_nowhere_are_left_out(phases, tmp_path):
    assert train.main(phases("a", objective="{'*': 'fim(0.9, cut=\"line\")'}", share=0.1, block_size=4)) == 0
    record = json.loads((tmp_path / "out/a/log.jsonl").read_text().splitlines()[0])
    assert record["val"].keys() == {"text", "code"} and record["val"]["text"]["bpb"] > 0


def test_the_configs_of_codegen2_can_be_read(data, tmp_path):
    shutil.copytree(data / "code", tmp_path / "few")
    for path in sorted((ROOT / "config/codegen2").glob("*.py")):
        done = run(
            "train.py",
            path.relative_to(ROOT),
            "--plan",
            f"--data={tmp_path}",
            "--source_tokens={'code': 9000000, 'text': 9000000}",
        )
        assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------------- filling


class Scripted:
    """Stands in for a GPT that always goes on as in a script: after any context its next word, or the best allowed."""

    generate = GPT.generate

    def __init__(self, script, block_size=64):
        self.config, self.script, self.read = SimpleNamespace(block_size=block_size), list(script), []
        self.wte = SimpleNamespace(weight=torch.zeros(1))

    def hidden(self, tokens, cache):
        self.read += tokens[0].tolist()
        cache.used += tokens.shape[1]
        return tokens

    def logits(self, x):
        scores = torch.zeros(1, ENCODING.n_vocab)
        scores[0, self.script.pop(0)] = 1.0
        return scores


def test_filling_stops_at_the_end_mark_of_the_layout():
    after = ENCODING.encode_ordinary(" + 1")
    for layout, stop in (("psm", V.eot), ("spm2", V.eot), ("codegen2", V.eom)):
        model = Scripted([300, 301, stop, 302])
        ((answer, stopped),) = sample.fill(model, V, [("x =", " + 1")], layout, 20, heal=False, temperature=0)
        assert stopped and answer == V.token_bytes[300] + V.token_bytes[301]
        assert (
            model.read[:-2]
            == infill.prompt(np.array(ENCODING.encode_ordinary("x =")), np.array(after), layout, V).tolist()
        )
    ((answer, stopped),) = sample.fill(Scripted([300] * 99), V, [("x =", " + 1")], "psm", 20, False, temperature=0)
    assert not stopped and answer == V.token_bytes[300] * 20


def test_healing_takes_the_last_token_back_and_spells_it_again():
    before = ENCODING.encode_ordinary("f():\n ret")
    last = V.token_bytes[before[-1]]
    longer = next(i for i, word in enumerate(V.token_bytes) if word.startswith(last) and len(word) > len(last))
    for heal, first, answer in ((True, longer, V.token_bytes[longer][len(last) :]), (False, 300, V.token_bytes[300])):
        model = Scripted([first, 301, V.eot])
        (got,) = sample.fill(model, V, [("f():\n ret", "\n")], "psm", 20, heal=heal, temperature=0)
        assert got == (answer + V.token_bytes[301], True)
        assert model.read[2 : model.read.index(V.suf)] == (before[:-1] if heal else before)
    script = Scripted([300] * 8 + [V.eot])
    ((answer, stopped),) = sample.fill(script, V, [("f():\n ret", "\n")], "psm", 20, temperature=0)
    assert (
        stopped and not V.token_bytes[300].startswith(last) and answer.endswith(V.token_bytes[300])
    )  # 300 had to wait
    allow = sample.spelling(b" ret", V.token_bytes)
    for made, left in (((), b" ret"), (ENCODING.encode_ordinary(" "), b"ret"), (ENCODING.encode_ordinary(" re"), b"t")):
        words = [V.token_bytes[i] for i in allow(made).nonzero().flatten()]
        assert words == [word for word in V.token_bytes if word and (left.startswith(word) or word.startswith(left))]
    assert allow(ENCODING.encode_ordinary(" ret")) is None and allow(ENCODING.encode_ordinary(" return")) is None


def test_holes_filled_side_by_side_get_the_answers_that_each_gets_alone():
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=V.ids.size)).eval()
    init_weights(model, seed=3)
    holes = [("def f(x):\n    ret", "\n"), ("", "x"), ("a b c " * 30, "d e f"), ("x = (1 + 2", ")\nprint(x)\n" * 9)]
    for layout in ("psm", "spm2", "codegen2"):
        together = sample.fill(model, V, holes, layout, 12, temperature=0)
        assert together == [sample.fill(model, V, [hole], layout, 12, temperature=0)[0] for hole in holes]
        assert len({answer for answer, _ in together}) > 1


def test_what_has_no_room_is_left_out_at_the_outer_ends():
    before, after = "a b c d e f g h " * 20 + "LAST", "FIRST" + " h g f e d c b a" * 20
    model = Scripted([V.eot])
    sample.fill(model, V, [(before, after)], "psm", 200, heal=False, temperature=0)
    text = spelt(model.read).decode()
    assert len(model.read) <= 32 and "LASTFIRST" in text
    model = Scripted([V.eot])
    sample.fill(model, V, [("x", after)], "psm", 200, heal=False, temperature=0)
    assert spelt(model.read).decode().startswith("xFIRST") and 28 < len(model.read) <= 32


def test_sample_and_eval_fill_holes_from_the_command_line(phases, tmp_path):
    assert train.main(phases("a", objective=OBJECTIVE, share=0.1)) == 0
    (tmp_path / "before.txt").write_bytes("café\r\n".encode())
    done = run("sample.py", tmp_path / "out/a", "--infill", f"@{tmp_path / 'before.txt'}", "END", "--tokens=5")
    assert done.returncode == 0 and "END" in done.stdout
    done = run("eval.py", tmp_path / "out/a", "--generate", "--limit=3", "--layout=codegen2")
    assert done.returncode == 0 and re.search(r"^text_spans +\d+ .*stops [\d.]+ ", done.stdout, re.M)
    assert train.main(phases("b", out="causal", share=0.1)) == 0
    for wrong, word in (
        (("sample.py", tmp_path / "causal/b", "--infill", "a", "b"), "was not trained to infill"),
        (("eval.py", tmp_path / "nothing"), "nothing"),
        (("eval.py", tmp_path / "out/a", f"--sources={tmp_path / 'poetry'}"), "poetry"),
    ):
        done = run(*wrong)
        assert done.returncode == 2 and word in done.stderr and "Traceback" not in done.stderr
