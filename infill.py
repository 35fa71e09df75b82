"""How one window of tokens is rearranged: fill-in-the-middle, span corruption, prefix-LM. Functions of ids and a key.

    vocabulary = Vocabulary(tokenizer.load())  # ids of the sentinels, and where tokens may be cut
    rows = fim(windows, keys, Fim(0.9), vocabulary)  # uint16 (n, W), uint64 (n,) -> uint16 (n, W)
    unfim(rows[0], vocabulary)  # the window again, less what made room for the sentinels

In a config file: objective = {"code": fim(0.9, spm=0.5)}, or {"*": codegen2(0.5)} for every source, or these as text.

| objective  | what a document becomes                                                               | arXiv      |
|------------|---------------------------------------------------------------------------------------|------------|
| `Fim`      | PRE prefix SUF suffix MID middle EOT (PSM), or                                        | 2207.14255 |
|            | PRE SUF suffix MID prefix middle EOT (SPM, variant 2), or                             |            |
|            | SUF suffix PRE prefix MID middle EOT (SPM, variant 1)                                 |            |
| `Codegen2` | body with MASK_1 .. MASK_N for its spans, EOT SEP, MASK_1 span EOM .. MASK_N span EOM | 2305.02309 |
| `Prefix`   | what it was, but its first part sees itself from both sides and is not trained on     | 1910.10683 |

A window holds documents, and parts of the two that it cuts. Each is rearranged by itself (level "document"), or all of
them as one ("row"). Sentinels need room, which is taken from the window's end before anything moves: what a row trains
has its whole middle, all sentinels, and the end of text that says stop. Draws follow from the window's key and a
document's number in it, never from what was drawn before; mix.py makes the key of (seed, source, epoch, window).
"""

import ast
import bisect
import functools
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np

from errors import UserError

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: multiples of it lie far apart
WORD = 2**64 - 1


class InfillError(UserError):
    """An objective that cannot be meant, or that this tokenizer has no sentinels for."""


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

    Two ints -> [ints]; uint64 (P,) both, or such keys and an int -> uint64 (n, P).
    """
    start = key + (4 * (number + 1) * GOLDEN & WORD)
    if isinstance(start, np.ndarray):
        return scramble(start + np.arange(n, dtype=np.uint64)[:, None] * GOLDEN)
    return [scramble(start + i * GOLDEN & WORD) for i in range(n)]


def chance(x, rate):
    return x < rate * 2.0**64


def two_below(low, high, x, y):
    """Two different ints in [low, high), in order, any two with equal chance, from two scrambled ints; or (P,) all."""
    size = np.uint64(high - low)
    a, b = low + np.int64(below(x, size)), low + np.int64(below(y, size - np.uint64(1)))
    return np.minimum(a, b), np.maximum(a, b + 1)


# -------------------------------------------------------------------------------------------------------- objectives


@dataclass(frozen=True)
class Objective:
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
        """As in a config file, without what is left at its default: one objective, one text."""
        changed = [f"{f.name}={v!r}" for f in fields(self)[1:] if (v := getattr(self, f.name)) != f.default]
        rate = repr(float(self.rate)).removesuffix(".0")
        return f"{type(self).__name__.lower()}({', '.join([rate, *changed])})"


@dataclass(frozen=True)
class Fim(Objective):
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
class Codegen2(Objective):
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
class Prefix(Objective):
    """Prefix-LM. The first U{0 .. most * n} of a document's n tokens are its prefix."""

    most: float = 0.5


OBJECTIVES = {"fim": Fim, "codegen2": Codegen2, "prefix": Prefix}


def parse(objective):
    """An Objective, or its text, "fim(0.9, cut='line')" -> the Objective; None for "causal". InfillError."""
    if isinstance(objective, Objective) or objective == "causal":
        return objective if isinstance(objective, Objective) else None
    try:
        call = ast.parse(objective, mode="eval").body
        arguments = [ast.literal_eval(value) for value in call.args]
        knobs = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
        return OBJECTIVES[call.func.id](*arguments, **knobs)
    except InfillError as error:
        raise InfillError(f"{objective}: {error}") from None
    except (SyntaxError, ValueError, TypeError, AttributeError, KeyError):
        names = ", ".join(f"{name}(0.5)" for name in OBJECTIVES)
        raise InfillError(f"objective {objective!r} is none of causal, {names} with knobs of infill.py") from None


# -------------------------------------------------------------------------------------------------------- vocabulary


class Vocabulary:
    """Ids of the sentinels, and how tokens may be cut, of a tiktoken.Encoding.

    eot, pre, mid, suf, pad, sep, eom: ids, -1 where the encoding has none; masks: of MASK_1 and after the last MASK;
    sentinels: {"eot": uint16 (1,), ...} of those it has. token_bytes: of every id, none of special ones, which are
    never cut. Raises InfillError for lack of a sentinel that one of `objectives` needs.
    """

    def __init__(self, encoding, objectives=()):
        specials = {name: encoding.encode_single_token(name) for name in encoding.special_tokens_set}
        names = ("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<sep>", "<eom>")
        self.eot, self.pre, self.mid, self.suf, self.pad, self.sep, self.eom = (specials.get(n, -1) for n in names)
        masks = [specials[f"<mask_{i}>"] for i in range(1, 100) if f"<mask_{i}>" in specials]
        self.masks = (masks[0], masks[-1] + 1) if masks else (-1, -1)
        needed = {Fim: names[:5], Codegen2: (names[0], *names[4:], "<mask_1>"), Prefix: names[:1]}
        for objective in objectives:
            if lacking := [name for name in needed[type(objective)] if name not in specials]:
                raise InfillError(
                    f"{objective}: {encoding.name} has no {', '.join(lacking)};"
                    " prepare the data with the shipped tokenizer"
                )
        self.encoding, self.ids = encoding, np.arange(encoding.n_vocab, dtype=np.uint16)
        short = ("eot", "pre", "mid", "suf", "pad", "sep", "eom")
        self.sentinels = {name: self.ids[i : i + 1] for name in short if (i := getattr(self, name)) >= 0}
        ordinary = set(range(encoding.n_vocab)) - set(specials.values())
        self.token_bytes = [encoding.decode_single_token_bytes(i) if i in ordinary else b"" for i in self.ids.tolist()]
        self.halves, self.cuts = functools.lru_cache(2**16)(self.halves), functools.cache(self.cuts)

    def encode(self, part):
        """A part of a token, at least a byte, which may end inside a character -> uint16 (n,)."""
        return np.array(self.encoding._encode_single_piece(part), np.uint16)  # the public methods want whole characters

    def halves(self, token, byte):
        """What an id becomes when it is cut before a byte, or after its last one: uint16 (n,) before and after."""
        parts = self.token_bytes[token][:byte], self.token_bytes[token][byte:]
        return tuple(self.encode(part) if part else self.ids[:0] for part in parts)

    def cuts(self, unit):
        """Where characters, tokens or lines begin in tokens; a line may begin after a token's last byte.

        (n_vocab,) each: how many in a token, whether one before its first byte, whether one after its last, and which
        of all is its first; and at which byte of its token each is, (number of all,).
        """
        begins = {
            "token": lambda token: [0][: len(token)],
            "character": lambda token: [i for i, byte in enumerate(token) if byte & 0xC0 != 0x80],
            "line": lambda token: [i + 1 for i, byte in enumerate(token) if byte == ord("\n")],
        }
        offsets = [begins[unit](token) for token in self.token_bytes]
        many = np.array([len(some) for some in offsets], np.int16)  # of all, to be summed for every token of a batch
        opens = np.array([some[:1] == [0] for some in offsets])
        closes = np.array([some[-1:] == [len(token)] for some, token in zip(offsets, self.token_bytes, strict=True)])
        return many, opens, closes, many.cumsum(dtype=np.int64) - many, np.concatenate(offsets).astype(np.int64)


def beginnings(rows, level, vocabulary):
    """Where pieces begin that are rearranged by themselves: bool (n, W). A document's end of text belongs to it."""
    begins = np.zeros(rows.shape, bool)
    begins[:, :1] = True
    if level == "document":
        begins[:, 1:] = rows[:, :-1] == vocabulary.eot
    return begins


def pieces(row, level, vocabulary):
    """[(begin, end)] of the pieces of one row."""
    return list(pairwise([*beginnings(row[None], level, vocabulary)[0].nonzero()[0].tolist(), len(row)]))


# --------------------------------------------------------------------------------------------------------------- fim


def fim(rows, keys, objective, vocabulary):
    """uint16 (n, W), with keys, uint64 (n,) -> with `objective.rate` of their documents in an order for infilling.

    A document that the window's end cuts off is cut once more, at any place, in two pieces. Otherwise the middles of
    long documents would all end where windows end, and a model learns to stop there and not where the suffix begins. A
    pad after the first one's end of text says that the document goes on.
    """
    if objective.faithful:
        return np.stack(
            [crystal_fim(row, key, objective, vocabulary) for row, key in zip(rows, keys.tolist(), strict=True)]
        )
    (n, W), flat = rows.shape, rows.ravel()
    begin = beginnings(rows, objective.level, vocabulary).ravel().nonzero()[0]
    if objective.level == "document":
        (open_end,) = (rows[:, -1] != vocabulary.eot).nonzero()
        row_end = (open_end + 1) * W
        last = begin[begin.searchsorted(row_end) - 1]
        (x,) = draws(keys[open_end], -1, 1)
        begin = np.unique(np.append(begin, last + below(x, (row_end - last).astype(np.uint64)).astype(np.int64)))
    end, row = np.append(begin[1:], n * W), begin // W
    ended = flat[end - 1] == vocabulary.eot
    first = begin.searchsorted(np.arange(n) * W)[row]  # piece of the row
    number = (np.arange(len(begin)) - first).astype(np.uint64)
    flip, order, x, y = draws(keys[row], number, 4)
    moved = chance(flip, objective.rate)
    spm = chance(order, objective.spm) * objective.spm_variant
    marked = (4 + ~ended) * moved
    before = marked.cumsum() - marked
    room = W - 4 - begin % W - (before - before[first])  # roughly: tokens that are cut become longer
    stop = np.minimum(end - ended, begin + room)
    (some,) = (moved & (stop > begin)).nonzero()
    found, places = two_cuts(flat, begin[some], stop[some], objective.cut, x[some], y[some], vocabulary)
    places = dict(zip(some[found].tolist(), places.T.tolist(), strict=True))

    out, sentinels, room = [], vocabulary.sentinels, 0
    about = zip(*(array.tolist() for array in (begin, end, ended, spm, x, y)), strict=True)
    for piece, (begin, end, ended, variant, *where) in enumerate(about):
        if begin % W == 0:
            room = W
        parts, length = None, min(end - begin, room)
        if piece in places:
            cut = three_parts(flat, begin, end - ended, places[piece], room - 4, where, vocabulary)
            parts, length = cut or (None, length)
        if parts:
            out += in_order(*parts, variant, sentinels)
            room -= length + 4
            if room and not ended and end % W:
                out.append(sentinels["pad"])
                room -= 1
        elif room:
            out.append(flat[begin : begin + length])
            room -= length
    return np.concatenate(out).reshape(n, W)


def two_cuts(ids, begin, end, unit, x, y, vocabulary):
    """Two different places inside ids[begin:end], both int64 (P,), from scrambled x and y, uint64 (P,).

    -> int64 (Q,), which of the P have so many; (4, Q), token and byte in it of the first and of the second place.
    """
    many, opens, closes, first, offsets = vocabulary.cuts(unit)
    before = np.zeros(len(ids) + 1, np.int64)
    many.take(ids).cumsum(out=before[1:])
    low, high = before[begin] + opens[ids[begin]], before[end] - closes[ids[end - 1]]
    (found,) = (high - low >= 2).nonzero()
    pair = np.stack(two_below(low[found], high[found], x[found], y[found]))
    token = before.searchsorted(pair, "right") - 1
    byte = offsets[first[ids[token]] + pair - before[token]]
    return found, np.stack([token[0], byte[0], token[1], byte[1]])


def three_parts(ids, begin, end, places, room, where, vocabulary):
    """As much as fits of ids[begin:end], cut at `places` -> (prefix, middle, suffix), lists of arrays, none of them
    empty; how many ids, at most `room`. Or None.

    A token that a cut goes through is encoded anew by itself, as more than one; the suffix then makes room at its end.
    where: two scrambled ints, for other places if it has none.
    """
    (i, o, j, p), end = places, min(end, begin + room)
    if j < end:
        (head, first), (last, tail) = vocabulary.halves(ids.item(i), o), vocabulary.halves(ids.item(j), p)
        middle = [first, ids[i + 1 : j], last] if i < j else [vocabulary.encode(vocabulary.token_bytes[ids[i]][o:p])]
        prefix, suffix = [ids[begin:i], head], [tail, ids[j + 1 : end]]
        length = i - begin + len(head) + sum(map(len, middle)) + len(tail) + end - j - 1
        if length <= room:
            return (prefix, middle, suffix), length
        suffix = np.concatenate(suffix)
        if length - room < len(suffix):
            return (prefix, middle, [suffix[: room - length]]), room
    if end - begin < 3:
        return None
    i, j = two_below(begin + 1, end, *map(np.uint64, where))  # between tokens, so that none is cut
    return ([ids[begin:i]], [ids[i:j]], [ids[j:end]]), end - begin


def in_order(prefix, middle, suffix, variant, sentinels):
    """Lists of arrays -> one such list with the sentinels. variant 0: PSM, 1 and 2: SPM."""
    pre, suf, mid, eot = sentinels["pre"], sentinels["suf"], sentinels["mid"], sentinels["eot"]
    if variant == 2:
        return [pre, suf, *suffix, mid, *prefix, *middle, eot]
    if variant == 1:
        return [suf, *suffix, pre, *prefix, mid, *middle, eot]
    return [pre, *prefix, suf, *suffix, mid, *middle, eot]


def unfim(row, vocabulary, level="document"):
    """What `fim` made a row of, as far as it had room: the beginning of the window, uint16 (n,).

    Where tokens were cut, their parts stay. An end of text that ends the row is dropped if it ends a middle: it may
    have been put there, as one has been that a pad follows.
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


def find(row, *sentinels):
    """Where the first of these sentinels stands; len(row) if there is none."""
    found = np.isin(row, sentinels).nonzero()[0] if len(sentinels) > 1 else (row == sentinels[0]).nonzero()[0]
    return int(found[0]) if len(found) else len(row)


def crystal_fim(row, key, objective, vocabulary):
    """As Crystal did it, to compare with (its released data scripts; recipe of BigCode's Megatron): uint16 (W,).

    After packing, for every piece of a document in a window: decoded, where a character that the window cuts becomes
    U+FFFD; cut at two characters that may be the same, so that parts may be empty; the three parts encoded anew; an end
    of text after each; and then the tail cut off, with the end of the last middle, or fim_pad in what is left. The end
    of text at the beginning of a window is dropped. Its spaces before every part came from another kind of tokenizer.
    """
    out = []
    for number, (begin, end) in enumerate(pieces(row, "document", vocabulary)):
        body = row[begin : end - (row[end - 1] == vocabulary.eot)]
        if not len(body) and not number:
            continue
        flip, order, *where = draws(key, number, 4)
        parts = [body]
        if chance(flip, objective.rate):
            text = vocabulary.encoding.decode(body.tolist(), errors="replace")
            a, b = sorted(below(x, len(text) + 1) for x in where)
            parts = [[np.array(vocabulary.encoding.encode_ordinary(part), np.uint16)]
                     for part in (text[:a], text[a:b], text[b:])]  # fmt: skip
            parts = in_order(*parts, chance(order, objective.spm) * objective.spm_variant, vocabulary.sentinels)[:-1]
        out += [*parts, vocabulary.sentinels["eot"]]
    out.append(np.full(len(row), vocabulary.pad, np.uint16))
    return np.concatenate(out)[: len(row)]


# ---------------------------------------------------------------------------------------------------- span corruption


def corrupt(row, key, objective, vocabulary):
    """uint16 (W,) -> with chance `objective.rate` the same, spans of its documents masked and spelt out after each.

    Up to three places at the end, which nothing fits into, hold pad.
    """
    if not chance(draws(key, -1, 1)[0], objective.rate):
        return row
    out, room = [row[:0]], len(row)
    for number, (begin, end) in enumerate(pieces(row, objective.level, vocabulary)):
        ended = objective.level == "document" and row[end - 1] == vocabulary.eot
        n, parts = corrupt_document(row[begin : end - ended], room, draws(key, number, 2), objective, vocabulary)
        parts = parts or [row[begin : min(end, begin + room)]]
        out += parts
        room -= sum(map(len, parts))
        if not room or n < end - ended - begin:
            break
    out.append(np.full(room, vocabulary.pad, np.uint16))
    return np.concatenate(out)


def corrupt_document(body, room, key, objective, vocabulary):
    """How much of a body fits with its sentinels; that with spans masked, and the spans, [arrays]. All of it and None
    where none would be masked. key: two scrambled ints, for the ratio and for all else."""
    low, high = objective.ratio
    ratio = low + (high - low) * (key[0] / 2**64)
    most = vocabulary.masks[1] - vocabulary.masks[0]
    random = scramble(key[1] + np.arange(1, len(body) + most + 2, dtype=np.uint64) * GOLDEN)
    lengths = (objective.span[0] + below(random[:most], objective.span[1] - objective.span[0] + 1)).astype(np.int64)
    ends = lengths.cumsum()

    def spans(n):
        """(masked tokens, number of spans) of n tokens. Spans are as many as reach that total, in the order drawn, but
        there is a sentinel for each and a token between each two."""
        masked = int(ratio * n + 0.5)
        return masked, min(int(ends.searchsorted(masked)) + 1, most, n - masked + 1) if masked else 0

    n = bisect.bisect_right(range(len(body) + 1), room - 2, key=lambda n: n + 3 * spans(n)[1]) - 1
    masked, count = spans(max(n, 0))
    if not masked:
        return len(body), None
    ends = ends[:count]
    if ends[-1] < masked:  # sentinels or gaps ran out: all spans become longer
        ends = ends * masked // ends[-1]
    ends[-1] = masked
    slots = n - masked + 1  # before each token that stays, and after the last
    slot = np.sort(np.argpartition(random[most : most + slots], count - 1)[:count])  # distinct, so no two spans touch
    starts = np.concatenate(([0], ends[:-1]))
    parts, answers, at = [], [], 0
    for i, (begin, length) in enumerate(zip((slot + starts).tolist(), (ends - starts).tolist(), strict=True)):
        mask = vocabulary.ids[vocabulary.masks[0] + i :][:1]
        parts += [body[at:begin], mask]
        answers += [mask, body[begin : begin + length], vocabulary.sentinels["eom"]]
        at = begin + length
    return n, [*parts, body[at:n], vocabulary.sentinels["eot"], vocabulary.sentinels["sep"], *answers]


def uncorrupt(row, vocabulary, level="document"):
    """What `corrupt` made a row of, as far as it had room: the beginning of the window. Of the row's last document the
    end of text is dropped if spans of it were masked: it may have been put there."""
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


def prefix(row, key, objective, vocabulary):
    """Which prefix each token of a window is in: uint16 (W,), 0 for none, else the document's number from 1 on."""
    inside = np.zeros(len(row), np.uint16)
    for number, (begin, end) in enumerate(pieces(row, objective.level, vocabulary)):
        flip, length = draws(key, number, 2)
        if chance(flip, objective.rate):
            inside[begin : begin + below(length, int(objective.most * (end - begin)) + 1)] = number + 1
    return inside


def documents(rows, vocabulary):
    """Number of the document that each token belongs to, and its place in it: int64 (B, W) both.

    An end of text, as a target the end of one document, is as an input the beginning of the next: what stands before
    its first token. The spans that `corrupt` puts after a document's end of text still belong to that.
    """
    v, begins = vocabulary, np.zeros(rows.shape, bool)
    begins[:, 1:-1] = (rows[:, 1:-1] == v.eot) & (rows[:, 2:] != v.sep)
    goes_on = (rows[:, 1:] > v.masks[0]) & (rows[:, 1:] < v.masks[1])  # no document begins with a mask but the first
    begins[:, 1:] |= (rows[:, :-1] == v.eom) & ~goes_on
    place = np.arange(rows.shape[1])
    return begins.cumsum(1), place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)


# ------------------------------------------------------------------------------------------------------------- batches


def rearrange(rows, keys, objective, vocabulary):
    """Rows, uint16 (n, W), each under its key, uint64 (n,) -> rows, and what `prefix` says of them or None."""
    if isinstance(objective, Fim):
        return fim(rows, keys, objective, vocabulary), None
    move = prefix if isinstance(objective, Prefix) else corrupt
    new = np.stack([move(row, key, objective, vocabulary) for row, key in zip(rows, keys.tolist(), strict=True)])
    return (rows, new) if isinstance(objective, Prefix) else (new, None)


def longest_document(row, vocabulary):
    """(begin, end) of the longest document in a window, without its end of text."""
    begin, end = max(pieces(row, "document", vocabulary), key=lambda piece: piece[1] - piece[0])
    return begin, end - (row[end - 1] == vocabulary.eot)


def hole(row, key, cut, vocabulary):
    """Prefix, middle and suffix, uint16 (n,) each, of the longest document in a window; together W - 6 at most, so that
    `prompt` and middle fit. None where that has less than two places to cut."""
    (begin, end), room = longest_document(row, vocabulary), len(row) - 6
    stop = min(end, begin + room)
    if stop <= begin:
        return None
    x, y = draws(np.array([key], np.uint64), 0, 2)
    found, places = two_cuts(row, np.array([begin]), np.array([stop]), cut, x, y, vocabulary)
    if not len(found):
        return None
    parts = three_parts(row, begin, stop, places[:, 0].tolist(), room, (x.item(), y.item()), vocabulary)
    return parts and [np.concatenate(part) for part in parts[0]]


LAYOUTS = ("psm", "spm1", "spm2", "codegen2")


def layout(objective):
    """Which of LAYOUTS an objective trains holes to be filled in, PSM if it trains both; None if none."""
    if objective is None or not objective.rate or isinstance(objective, Prefix):
        return None
    if isinstance(objective, Codegen2):
        return "codegen2"
    return f"spm{objective.spm_variant}" if objective.spm == 1 else "psm"


def prompt(before, after, layout, vocabulary):
    """ids before and after a hole, uint16 (n,) each -> ids whose continuation is the hole's, after an end of text, as
    in training before a document. Sentinels are five at most."""
    v = vocabulary
    if layout == "codegen2":
        mask = v.ids[v.masks[0] :][:1]
        return np.concatenate([v.sentinels["eot"], before, mask, after, v.sentinels["eot"], v.sentinels["sep"], mask])
    parts = in_order([before], [], [after], LAYOUTS.index(layout), v.sentinels)
    return np.concatenate([v.sentinels["eot"], *parts[:-1]])


def survey(rows, prefix, level, vocabulary):
    """Of the targets in rows (n, W), with `prefix` (n, W) or None: the share in documents, or at level "row" in rows,
    that are rearranged, and the share that is trained on."""
    v, targets = vocabulary, rows[:, 1:]
    number = np.zeros(targets.shape, int) + np.arange(len(rows))[:, None] * rows.shape[1]
    if level == "document":
        begins = np.isin(rows, [v.pre, v.suf])  # in pairs; a pair's first also begins a piece where text goes on
        begins &= begins.cumsum(1) % 2 == 1
        number += documents(rows, v)[0][:, :-1] + begins.cumsum(1)[:, 1:]
    rearranged, untrained = np.isin(targets, [v.mid, v.sep]), targets == v.pad
    if prefix is not None:
        rearranged |= prefix[:, 1:] > 0
        untrained |= prefix[:, 1:] > 0
    return np.isin(number, number[rearranged]).mean(), 1 - untrained.mean()
