"""How one window of tokens is rearranged: fill-in-the-middle, span corruption, prefix-LM. Functions of ids and a key.

    vocabulary = Vocabulary(tokenizer.load())  # ids of the marks, and where words may be cut
    rows = fim(windows, keys, Fim(0.9), vocabulary)  # uint16 (n, W), uint64 (n,) -> uint16 (n, W)
    unfim(rows[0], vocabulary)  # the window again, less what made room for the marks

In a config file: objective = {"code": fim(0.9, spm=0.5)}, or {"*": codegen2(0.5)} for every source, or these as text.

| law        | what a document becomes                                                               | arXiv      |
|------------|---------------------------------------------------------------------------------------|------------|
| `Fim`      | PRE prefix SUF suffix MID middle EOT (PSM), or                                        | 2207.14255 |
|            | PRE SUF suffix MID prefix middle EOT (SPM, variant 2), or                             |            |
|            | SUF suffix PRE prefix MID middle EOT (SPM, variant 1)                                 |            |
| `Codegen2` | body with MASK_1 .. MASK_N for its spans, EOT SEP, MASK_1 span EOM .. MASK_N span EOM | 2305.02309 |
| `Prefix`   | what it was, but its first part sees itself from both sides and is not trained on     | 1910.10683 |

A window holds documents, and parts of the two that it cuts. Each is rearranged by itself (level "document"), or all of
them as one ("row"). Marks need room, which is taken from the window's end before anything moves: what a row trains has
its whole middle, all marks, and the end mark that says stop. Draws follow from the window's key and a document's number
in it, never from what was drawn before; mix.py makes the key of (seed, source, epoch, window).
"""

import ast
import bisect
import functools
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: multiples of it lie far apart
WORD = 2**64 - 1


class InfillError(ValueError):
    """An objective that cannot be meant, or that this tokenizer has no marks for."""


# ------------------------------------------------------------------------------------------------------------- draws


def scramble(x):
    """The mixing function of splitmix64 (Steele, Lea, Flood 2014), a bijection of [0, 2^64): int, or uint64 (n,)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


def below(x, size):
    """Scrambled int or uint64 (n,) -> in [0, size), size < 2^32, by the high half: low bits of a product are poor."""
    return ((x >> 32) * size) >> 32


def draws(key, number, n):
    """n <= 4 scrambled numbers for document `number` of the window with this key; -1 for the window itself.

    Two ints -> ints; uint64 (P,) both, or such keys and an int -> uint64 (P,) each.
    """
    start = key + (4 * (number + 1) * GOLDEN & WORD)
    return [scramble(start + (i * GOLDEN & WORD) & WORD) for i in range(n)]


def chance(x, rate):
    return x < rate * 2.0**64


def two_below(low, high, x, y):
    """Two different ints in [low, high), in order, any two with equal chance, from two scrambled ints."""
    a, b = low + below(x, high - low), low + below(y, high - low - 1)
    return (b, a) if b < a else (a, b + 1)


# -------------------------------------------------------------------------------------------------------------- laws


@dataclass(frozen=True)
class Law:
    rate: float = 0.5  # of documents that are rearranged; for codegen2 of windows

    level: str = "document"  # or row: a window is one piece, whatever ends in it
    redraw: bool = True  # in every epoch; otherwise epochs repeat the first one's rows, in another order

    def __post_init__(self):
        choices = {"level": ("document", "row"), "cut": ("character", "token", "line"), "spm_variant": (1, 2)}
        for f in fields(self):
            value = getattr(self, f.name)
            known = choices.get(f.name, (True, False) if f.type is bool else None)
            if known and value not in known:
                raise InfillError(f"{f.name} = {value!r} is none of {', '.join(map(repr, known))}")
            if f.type is float and not (type(value) in (int, float) and 0 <= value <= 1):
                raise InfillError(f"{f.name} = {value!r} is not a number from 0 to 1")

    def __str__(self):
        """As in a config file, without what is left at its default: one law, one text."""
        changed = [f"{f.name}={v!r}" for f in fields(self)[1:] if (v := getattr(self, f.name)) != f.default]
        rate = repr(float(self.rate)).removesuffix(".0")
        return f"{type(self).__name__.lower()}({', '.join([rate, *changed])})"


@dataclass(frozen=True)
class Fim(Law):
    """Fill-in-the-middle. Two cuts, any two with equal chance, so that none of the three parts is empty."""

    spm: float = 0.5  # share of rearranged documents in an SPM order
    spm_variant: int = 2
    cut: str = "character"  # or token, or line: where cuts may fall
    faithful: bool = False  # as Crystal did it; see `crystal_fim`

    def __post_init__(self):
        super().__post_init__()
        if self.faithful and (self.level, self.cut) != ("document", "character"):
            raise InfillError("faithful goes with level='document' and cut='character'")


@dataclass(frozen=True)
class Codegen2(Law):
    """Span corruption. Of a document a share, drawn from U(ratio), is masked, in spans of U{span} tokens."""

    ratio: tuple = (0.05, 0.5)
    span: tuple = (1, 128)

    def __post_init__(self):
        super().__post_init__()
        for name, kind, least, most in (("ratio", (int, float), 0, 1), ("span", (int,), 1, 2**16)):
            law = getattr(self, name)
            if not (type(law) is tuple and len(law) == 2 and all(type(bound) in kind for bound in law)
                    and least <= law[0] <= law[1] <= most):  # fmt: skip
                raise InfillError(f"{name} = {law!r} is not (least, most) between {least} and {most:,}")


@dataclass(frozen=True)
class Prefix(Law):
    """Prefix-LM. The first U{0 .. most * n} of a document's n tokens are its prefix."""

    most: float = 0.5


OBJECTIVES = {"fim": Fim, "codegen2": Codegen2, "prefix": Prefix}


def parse(objective):
    """A law, or its text, "fim(0.9, cut='line')" -> the law; None for "causal", which is none. InfillError."""
    if isinstance(objective, Law) or objective == "causal":
        return objective if isinstance(objective, Law) else None
    try:
        call = ast.parse(objective, mode="eval").body
        law = OBJECTIVES[call.func.id]
        arguments = [ast.literal_eval(value) for value in call.args]
        return law(*arguments, **{word.arg: ast.literal_eval(word.value) for word in call.keywords})
    except InfillError as error:
        raise InfillError(f"{objective}: {error}") from None
    except (SyntaxError, ValueError, TypeError, AttributeError, KeyError):
        names = ", ".join(f"{name}(0.5)" for name in OBJECTIVES)
        raise InfillError(f"objective {objective!r} is none of causal, {names} with knobs of infill.py") from None


# -------------------------------------------------------------------------------------------------------- vocabulary


class Vocabulary:
    """Ids of the marks, and how words may be cut, of a tiktoken.Encoding.

    eot, pre, mid, suf, pad, sep, eom: ids, -1 where the encoding has none; masks: of MASK_1 and after the last MASK.
    words: the bytes of every id, none for special ones, which are never cut. Raises InfillError for lack of a mark that
    one of `laws` needs.
    """

    def __init__(self, encoding, laws=()):
        specials = {name: encoding.encode_single_token(name) for name in encoding.special_tokens_set}
        names = ("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<sep>", "<eom>")
        self.eot, self.pre, self.mid, self.suf, self.pad, self.sep, self.eom = (specials.get(n, -1) for n in names)
        masks = [specials[f"<mask_{i}>"] for i in range(1, 100) if f"<mask_{i}>" in specials]
        self.masks = (masks[0], masks[-1] + 1) if masks else (-1, -1)
        needed = {Fim: names[:5], Codegen2: (names[0], *names[4:], "<mask_1>"), Prefix: names[:1]}
        for law in laws:
            if lacking := [name for name in needed[type(law)] if name not in specials]:
                raise InfillError(
                    f"{law}: {encoding.name} has no {', '.join(lacking)}; prepare the data with the shipped tokenizer"
                )
        self.encoding, self.ids = encoding, np.arange(encoding.n_vocab, dtype=np.uint16)
        ordinary = set(range(encoding.n_vocab)) - set(specials.values())
        self.words = [encoding.decode_single_token_bytes(i) if i in ordinary else b"" for i in range(encoding.n_vocab)]
        self.halves = functools.lru_cache(2**16)(self.halves)
        self.marks = {name: self.ids[i : i + 1] for name, i in vars(self).items() if type(i) is int}  # to concatenate

    def encode(self, part):
        """Bytes of a part of a word, at least one, which may end inside a character -> uint16 (n,)."""
        first, *more = self.encoding._encode_single_piece(part)
        return np.array([first, *more], np.uint16) if more else self.ids[first : first + 1]

    def halves(self, word, byte):
        """What an id becomes when it is cut before a byte: uint16 (n,) before and after the cut."""
        if not byte:
            return self.ids[:0], self.ids[word : word + 1]
        return self.encode(self.words[word][:byte]), self.encode(self.words[word][byte:])

    @functools.cache  # noqa: B019
    def cuts(self, unit):
        """Where characters, tokens or lines begin: how many in each word, int64 (n_vocab,), and at which bytes of it.

        A line may begin after a word's last byte.
        """
        begins = {
            "token": lambda word: [0][: len(word)],
            "character": lambda word: [i for i, byte in enumerate(word) if byte & 0xC0 != 0x80],
            "line": lambda word: [i + 1 for i, byte in enumerate(word) if byte == ord("\n")],
        }
        offsets = [begins[unit](word) for word in self.words]
        return np.array([len(some) for some in offsets]), offsets


def beginnings(rows, level, vocabulary):
    """Where pieces begin that are rearranged by themselves: bool (n, W). The end mark of a document belongs to it."""
    begins = np.zeros(rows.shape, bool)
    begins[:, :1] = True
    if level == "document":
        begins[:, 1:] = rows[:, :-1] == vocabulary.eot
    return begins


def pieces(row, level, vocabulary):
    """[(begin, end)] of the pieces of one row."""
    return list(pairwise([*beginnings(row[None], level, vocabulary)[0].nonzero()[0].tolist(), len(row)]))


# --------------------------------------------------------------------------------------------------------------- fim


def fim(rows, keys, law, vocabulary):
    """Windows, uint16 (n, W), with keys, uint64 (n,) -> with `law.rate` of their documents in an order for infilling.

    A document that the window's end cuts off is cut once more, at any place, in two pieces. Otherwise the middles of
    long documents would all end where windows end, and a model learns to stop there and not where the suffix begins. A
    pad after the first one's end mark says that the document goes on.
    """
    if law.faithful:
        return np.stack([crystal_fim(row, key, law, vocabulary) for row, key in zip(rows, keys.tolist(), strict=True)])
    (n, W), flat = rows.shape, rows.ravel()
    begins = beginnings(rows, law.level, vocabulary)
    if law.level == "document":
        (open_end,) = (rows[:, -1] != vocabulary.eot).nonzero()
        last = W - 1 - begins[open_end, ::-1].argmax(1)
        (x,) = draws(keys[open_end], -1, 1)
        begins[open_end, last + below(x, (W - last).astype(np.uint64)).astype(np.int64)] = True
    begin = begins.ravel().nonzero()[0]
    end = np.append(begin[1:], n * W)
    number = begins.cumsum(1).ravel()[begin] - 1
    flip, x, y = draws(keys[begin // W], number.astype(np.uint64), 3)
    spm = chance(x << np.uint64(32), law.spm) * law.spm_variant  # by the half that chooses no cut
    ended = flat[end - 1] == vocabulary.eot
    ends = vocabulary.cuts(law.cut)[0].take(flat).cumsum()
    out, marks, room = [], vocabulary.marks, 0
    about = (begin, end, ended, chance(flip, law.rate), spm, x, y)
    for begin, end, ended, moved, variant, *where in zip(*(array.tolist() for array in about), strict=True):
        if begin % W == 0:
            room = W
        parts, length = None, min(end - begin, room)
        if moved and room > 4:  # marks
            stop = min(end - ended, begin + room - 4)
            parts, length = three_parts(flat, begin, stop, ends, room - 4, law.cut, where, vocabulary) or (None, length)
        if parts:
            out += in_order(*parts, variant, marks)
            room -= length + 4
            if room and not ended and end % W:
                out.append(marks["pad"])
                room -= 1
        elif room:
            out.append(flat[begin : begin + length])
            room -= length
    return np.concatenate(out).reshape(n, W)


def three_parts(ids, begin, end, ends, room, cut, where, vocabulary):
    """ids[begin:end] -> (prefix, middle, suffix), lists of arrays, none of them empty; how many ids, at most `room`. Or
    None.

    ends: how many places to cut there are in ids up to each. where: two scrambled ints. A word that a cut goes through
    is encoded anew by itself, and becomes longer; the suffix then makes room at its end.
    """
    places = two_cuts(ids, begin, end, ends, cut, where, vocabulary)
    if not places:
        return None
    (i, o), (j, p) = places
    (head, first), (last, tail) = vocabulary.halves(ids.item(i), o), vocabulary.halves(ids.item(j), p)
    middle = [first, ids[i + 1 : j], last] if i < j else [vocabulary.encode(vocabulary.words[ids[i]][o:p])]
    prefix, suffix = [ids[begin:i], head], [tail, ids[j + 1 : end]]
    length = i - begin + len(head) + sum(map(len, middle)) + len(tail) + end - j - 1
    if length <= room:
        return (prefix, middle, suffix), length
    suffix = np.concatenate(suffix)
    if length - room < len(suffix):
        return (prefix, middle, [suffix[: room - length]]), room
    if end - begin < 3:
        return None
    i, j = two_below(begin + 1, end, *where)  # between words, which makes none longer
    return ([ids[begin:i]], [ids[i:j]], [ids[j:end]]), end - begin


def two_cuts(ids, begin, end, ends, unit, where, vocabulary):
    """[(token, byte in it)] of two different places inside ids[begin:end], in order; None if it has less than two."""
    if begin >= end:
        return None
    offsets, words = vocabulary.cuts(unit)[1], vocabulary.words
    last = ids.item(end - 1)
    low = (ends.item(begin - 1) if begin else 0) + (offsets[ids.item(begin)][:1] == [0])
    high = ends.item(end - 1) - (offsets[last][-1:] == [len(words[last])])
    if high - low < 2:
        return None
    pair, places = two_below(low, high, *where), []
    for k, token in zip(pair, ends.searchsorted(pair, "right").tolist(), strict=True):
        word = ids.item(token)
        byte = offsets[word][k - ends.item(token)]  # counted from the end
        places.append((token, byte) if byte < len(words[word]) else (token + 1, 0))
    return places


def in_order(prefix, middle, suffix, variant, marks):
    """Lists of arrays -> one such list with the marks. variant 0: PSM, 1 and 2: SPM."""
    pre, suf, mid, eot = marks["pre"], marks["suf"], marks["mid"], marks["eot"]
    if variant == 2:
        return [pre, suf, *suffix, mid, *prefix, *middle, eot]
    if variant == 1:
        return [suf, *suffix, pre, *prefix, mid, *middle, eot]
    return [pre, *prefix, suf, *suffix, mid, *middle, eot]


def unfim(row, vocabulary, level="document"):
    """What `fim` made a row of, as far as it had room: the beginning of the window, uint16 (n,).

    Where words were cut, their parts stay. An end mark that ends the row is dropped if it ends a middle: it may have
    been put there, as one has been that a pad follows.
    """
    v, out, at = vocabulary, [row[:0]], 0
    while at < len(row):
        begin = row[at]
        moved = begin in (v.pre, v.suf)
        mid = at + find(row[at:], v.mid) if moved else at
        end = len(row) - moved
        if level == "document":
            end = mid + (find(row[mid:], v.eot) if moved else find(row[mid:], v.eot, v.pre, v.suf))
        if moved:
            inner = row[at + 1 : mid]
            other = find(inner, v.suf if begin == v.pre else v.pre)
            parts = [inner[:other], inner[other + 1 :]]
            prefix, suffix = parts if begin == v.pre else parts[::-1]
            out += [prefix, row[mid + 1 : end], suffix]
        else:
            out.append(row[at:end])
        at = end + 1
        if moved and at < len(row) and row[at] == v.pad:
            at += 1
        elif not moved and end < len(row) and row[end] != v.eot:  # text that goes on in another order
            at = end
        elif not moved or at < len(row):
            out.append(row[end:at])
    return np.concatenate(out)


def find(row, *marks):
    """Where the first of these marks stands; len(row) if there is none."""
    found = np.isin(row, marks).nonzero()[0] if len(marks) > 1 else (row == marks[0]).nonzero()[0]
    return int(found[0]) if len(found) else len(row)


def crystal_fim(row, key, law, vocabulary):
    """As Crystal did it, to compare with (its released data scripts; recipe of BigCode's Megatron): uint16 (W,).

    After packing, for every piece of a document in a window: decoded, where a character that the window cuts becomes
    U+FFFD; cut at two characters that may be the same, so that parts may be empty; the three parts encoded anew; an end
    mark after each; and then the tail cut off, with the end of the last middle, or fim_pad in what is left. The end
    mark at the beginning of a window is dropped. Its spaces before every part came from another kind of tokenizer.
    """
    out = []
    for number, (begin, end) in enumerate(pieces(row, "document", vocabulary)):
        body = row[begin : end - (row[end - 1] == vocabulary.eot)]
        if not len(body) and not number:
            continue
        flip, order, *where = draws(key, number, 4)
        parts = [body]
        if chance(flip, law.rate):
            text = vocabulary.encoding.decode(body.tolist(), errors="replace")
            a, b = sorted(below(x, len(text) + 1) for x in where)
            parts = [[np.array(vocabulary.encoding.encode_ordinary(part), np.uint16)]
                     for part in (text[:a], text[a:b], text[b:])]  # fmt: skip
            parts = in_order(*parts, chance(order, law.spm) * law.spm_variant, vocabulary.marks)[:-1]
        out += [*parts, vocabulary.marks["eot"]]
    out.append(np.full(len(row), vocabulary.pad, np.uint16))
    return np.concatenate(out)[: len(row)]


# ---------------------------------------------------------------------------------------------------- span corruption


def corrupt(row, key, law, vocabulary):
    """A window, with chance `law.rate`, with its documents' spans masked and told after them: uint16 (W,) -> (W,).

    Up to three places at the end, which nothing fits into, hold pad.
    """
    if not chance(draws(key, -1, 1)[0], law.rate):
        return row
    out, room = [row[:0]], len(row)
    for number, (begin, end) in enumerate(pieces(row, law.level, vocabulary)):
        ended = law.level == "document" and row[end - 1] == vocabulary.eot
        n, parts = told(row[begin : end - ended], room, draws(key, number, 2), law, vocabulary)
        parts = parts or [row[begin : min(end, begin + room)]]
        out += parts
        room -= sum(map(len, parts))
        if not room or n < end - ended - begin:
            break
    out.append(np.full(room, vocabulary.pad, np.uint16))
    return np.concatenate(out)


def told(body, room, key, law, vocabulary):
    """How much of a body fits with its marks, and that with spans masked and told, [arrays]; all of it and None where
    none would be masked. key: two scrambled ints, for the ratio and for all else."""
    low, high = law.ratio
    ratio = low + (high - low) * (key[0] / 2**64)
    most = vocabulary.masks[1] - vocabulary.masks[0]
    dice = scramble(key[1] + np.arange(1, len(body) + most + 2, dtype=np.uint64) * GOLDEN)
    lengths = (law.span[0] + below(dice[:most], law.span[1] - law.span[0] + 1)).astype(np.int64)
    ends = lengths.cumsum()

    def spans(n):
        """(masked tokens, number of spans) of n tokens. Spans are as many as reach that total, in the order drawn, but
        there is a mark for each and a token between each two."""
        masked = int(ratio * n + 0.5)
        return masked, min(int(ends.searchsorted(masked)) + 1, most, n - masked + 1) if masked else 0

    n = bisect.bisect_right(range(len(body) + 1), room - 2, key=lambda n: n + 3 * spans(n)[1]) - 1
    masked, count = spans(max(n, 0))
    if not masked:
        return len(body), None
    ends = ends[:count]
    if ends[-1] < masked:  # marks or gaps ran out: all spans become longer
        ends = ends * masked // ends[-1]
    ends[-1] = masked
    slots = n - masked + 1  # before each token that stays, and after the last
    slot = np.sort(np.argpartition(dice[most : most + slots], count - 1)[:count])  # distinct, so no two spans touch
    starts = np.concatenate(([0], ends[:-1]))
    parts, answers, at = [], [], 0
    for i, (begin, length) in enumerate(zip((slot + starts).tolist(), (ends - starts).tolist(), strict=True)):
        mask = vocabulary.ids[vocabulary.masks[0] + i :][:1]
        parts += [body[at:begin], mask]
        answers += [mask, body[begin : begin + length], vocabulary.marks["eom"]]
        at = begin + length
    return n, [*parts, body[at:n], vocabulary.marks["eot"], vocabulary.marks["sep"], *answers]


def uncorrupt(row, vocabulary, level="document"):
    """What `corrupt` made a row of, as far as it had room: the beginning of the window. Of the row's last document the
    end mark is dropped if spans of it were masked: it may have been put there."""
    v, out, at = vocabulary, [row[:0]], 0
    row = row[: find(row, v.pad)]
    while at < len(row):
        end = at + find(row[at:], v.eot if level == "document" else v.sep) - (level != "document" and v.sep in row)
        after = end + 1
        body = row[at:end]
        if after < len(row) and row[after] == v.sep:
            inner, after = [], after + 1
            for mask in body[(body >= v.masks[0]) & (body < v.masks[1])]:
                place, stop = find(body, mask), after + find(row[after:], v.eom)
                inner += [body[:place], row[after + 1 : stop]]
                body, after = body[place + 1 :], stop + 1
            out += [*inner, body]
            if after == len(row):
                break
        else:
            out.append(body)
        out.append(row[end : end + 1])
        at = after
    return np.concatenate(out)


# ------------------------------------------------------------------------------------------------- prefixes, documents


def prefix(row, key, law, vocabulary):
    """Which prefix each token of a window is in: uint16 (W,), 0 for none, else the document's number from 1 on."""
    inside = np.zeros(len(row), np.uint16)
    for number, (begin, end) in enumerate(pieces(row, law.level, vocabulary)):
        flip, length = draws(key, number, 2)
        if chance(flip, law.rate):
            inside[begin : begin + below(length, int(law.most * (end - begin)) + 1)] = number + 1
    return inside


def documents(rows, vocabulary):
    """Number of the document that each token belongs to, and its place in it: int64 (B, W) both.

    An end mark, as a target the end of one document, is as an input the beginning of the next: what stands before its
    first word. What `corrupt` tells after the end mark of a document still belongs to that.
    """
    v, begins = vocabulary, np.zeros(rows.shape, bool)
    begins[:, 1:-1] = (rows[:, 1:-1] == v.eot) & (rows[:, 2:] != v.sep)
    goes_on = (rows[:, 1:] > v.masks[0]) & (rows[:, 1:] < v.masks[1])  # no document begins with a mask but the first
    begins[:, 1:] |= (rows[:, :-1] == v.eom) & (v.eom >= 0) & ~goes_on
    place = np.arange(rows.shape[1])
    return begins.cumsum(1), place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)


# ------------------------------------------------------------------------------------------------------------- batches


def rearrange(rows, keys, law, vocabulary):
    """Rows, uint16 (n, W), each under its key, uint64 (n,) -> rows, and what `prefix` says of them or None."""
    if isinstance(law, Fim):
        return fim(rows, keys, law, vocabulary), None
    move = prefix if isinstance(law, Prefix) else corrupt
    new = np.stack([move(row, key, law, vocabulary) for row, key in zip(rows, keys.tolist(), strict=True)])
    return (rows, new) if isinstance(law, Prefix) else (new, None)


def hole(row, key, cut, vocabulary):
    """Prefix, middle and suffix, uint16 (n,) each, of the longest document in a window; together W - 6 at most, so that
    `prompt` and middle fit. None where that has less than two places to cut."""
    begin, end = max(pieces(row, "document", vocabulary), key=lambda piece: piece[1] - piece[0])
    room = len(row) - 6
    end = min(end - (row[end - 1] == vocabulary.eot), begin + room)
    ends = vocabulary.cuts(cut)[0].take(row).cumsum()
    found = three_parts(row, begin, end, ends, room, cut, draws(key, 0, 2), vocabulary)
    return found and [np.concatenate(part) for part in found[0]]


LAYOUTS = ("psm", "spm1", "spm2", "codegen2")


def layout(law):
    """Which of LAYOUTS a law trains holes to be filled in, PSM if it trains both; None if none."""
    if isinstance(law, Fim):
        return f"spm{law.spm_variant}" if law.spm == 1 else "psm"
    return "codegen2" if isinstance(law, Codegen2) else None


def prompt(before, after, layout, vocabulary):
    """ids before and after a hole, uint16 (n,) each -> ids whose continuation is the hole's, after an end mark, as in
    training before a document. Marks are five at most."""
    v = vocabulary
    if layout == "codegen2":
        mask = v.ids[v.masks[0] :][:1]
        return np.concatenate([v.marks["eot"], before, mask, after, v.marks["eot"], v.marks["sep"], mask])
    parts = in_order([before], [], [after], LAYOUTS.index(layout), v.marks)
    return np.concatenate([v.marks["eot"], *parts[:-1]])


def survey(rows, prefix, level, vocabulary):
    """Of rows (n, W), with `prefix` (n, W) or None: share of their documents, or at level "row" of rows, that are
    rearranged, and share of targets that are trained on."""
    v, many = vocabulary, len(rows)
    if level == "document":
        number = np.where(rows == v.pad, 0, documents(rows, v)[0])
        many += number[:, :-1].max(1).sum()
        for row in rows:  # a document whose second part alone was moved has two; each has two of these marks
            begins = np.isin(row, [i for i in (v.pre, v.suf) if i >= 0]).nonzero()[0][::2]
            many += sum(begin > 0 and row[begin - 1] not in (v.eot, v.pad) for begin in begins)
    moved = np.isin(rows, [i for i in (v.mid, v.sep) if i >= 0]).sum()
    untrained = rows[:, 1:] == v.pad
    if prefix is not None:
        moved += sum(len(np.unique(row[row > 0])) for row in prefix)
        untrained |= prefix[:, 1:] > 0
    return moved / many, 1 - untrained.mean()
