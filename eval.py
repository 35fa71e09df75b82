"""How good a checkpoint is: bits per byte of held-out text, and tasks read from files, with what chance would get.

    python eval.py out/phase3                                     # held-out parts of its sources, and holes in them
    python eval.py out/phase3 --tasks=code_spans --generate       # fill the holes, and see what is right
    python eval.py out/phase3 --data=eval                         # and quick ones of the task files in a folder
    python eval.py out/phase3 --data=eval --tasks=humaneval,mbpp --run-code --samples_per_task=20
    python eval.py --compare a.json b.json                        # item by item, with intervals
    python eval.py out/phase?/eval-*.json --plot=curves.png       # earlier results, over tokens

Results go to eval-<step>.json beside the checkpoints, or --out, after every task; the same command goes on from there.

| kind       | fields                                | what is scored                                                  |
|------------|---------------------------------------|-----------------------------------------------------------------|
| choice     | context, sep, choices, answer (index) | which sep + choice is likeliest after the context               |
| schema     | contexts, sep, continuation, answer   | after which context sep + continuation is likeliest             |
| completion | context, sep, answer                  | whether every token of sep + answer is the likeliest; its bits  |
| code       | prompt, solution, tests               | bits of the solution; --run-code: share of samples that pass    |
| infill     | prompt, suffix, answer, maybe tests   | bits of the answer, in the order that was trained; --generate   |
| text       | text                                  | bits                                                            |

Conventions are lm-evaluation-harness': context and continuation are encoded together and cut where the context's ids
end; white space at a context's end moves to the continuation; acc_norm divides log-likelihoods by characters of the
choice without sep; what is too long loses its beginning. Before every context stands what documents begin after: an end
of text, or what a foreign tokenizer puts there.
"""

import bisect
import collections
import dataclasses
import gzip
import hashlib
import itertools
import json
import lzma
import math
import re
import reprlib
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import checkpoint
import errors
import files
import infill
import sandbox
import tokenizer
from errors import UserError
from kernels import dense_mask
from machine import device_named, keep_memory
from mix import Source, find_shards
from plot import label, pyplot, save
from processes import all_reduce, rank, world
from sample import SEED, TEMPERATURE, TOP_P, fill, load_model, trained_layout, trim, vocabulary_for

ALGORITHM = 2  # raise it when the examples of held-out parts change: study.py then evaluates again
QUICK = (
    "blimp", "lambada", "hellaswag", "piqa", "arc_easy", "sciq", "basic_skills", "py_minpairs", "py_ident",
    "code_brackets", "mt_mbpp", "conala",
)  # fmt: skip
SCORES = ("acc", "acc_norm", "p", "suffix_gain", "stops", "exact")
FUNCTION_ENDS = ("\nclass", "\ndef", "\n#", "\n@", "\nif", "\nprint", "\n```")  # where a begun function is over
PROGRAM_ENDS = ("\nassert", '\n"""', "\nif", "\nprint", "\n```")  # where one is that a text asked for


class EvalError(UserError):
    """The user's mistake, in one line."""


# --------------------------------------------------------------------------------------------------------------- tasks


class Field(NamedTuple):
    """What a field of an example holds."""

    wanted: str
    fits: Callable  # (value, example, whose fields before this one have been looked at) -> bool
    needed: bool = True


def is_text(value, _=None):
    """A string that has a form in UTF-8; JSON can also spell halves of characters."""
    return isinstance(value, str) and not HALF.search(value)


def is_answer(value, _=None):
    return is_text(value) and value != ""


def several(is_member):
    return lambda value, _: isinstance(value, list) and len(value) > 1 and all(map(is_member, value))


def index_into(field):
    return Field(f"the place of one of the {field}, from 0 on",
                 lambda value, example: type(value) is int and 0 <= value < len(example[field]))  # fmt: skip


HALF = re.compile("[\ud800-\udfff]")
TEXT, ANSWER = Field("a text", is_text), Field("a text that is not empty", is_answer)
CHOICES = Field("a list of two or more texts that are not empty", several(is_answer))
OPTIONAL = {"tests": ANSWER._replace(needed=False), "lang": TEXT._replace(needed=False)}
FIELDS = {
    "choice": {"context": TEXT, "sep": TEXT, "choices": CHOICES, "answer": index_into("choices")},
    "schema": {"contexts": Field("a list of two or more texts", several(is_text)), "sep": TEXT, "continuation": ANSWER,
               "answer": index_into("contexts")},
    "completion": {"context": TEXT, "sep": TEXT, "answer": ANSWER},
    "code": {"prompt": TEXT, "solution": ANSWER} | OPTIONAL,
    "infill": {"prompt": TEXT, "suffix": TEXT, "answer": TEXT} | OPTIONAL,
    "text": {"text": ANSWER},
}  # fmt: skip
OPENED_BY = {".jsonl": open, ".jsonl.gz": gzip.open, ".jsonl.xz": lzma.open}  # task files, by how their names end


@dataclasses.dataclass
class Task:
    name: str
    kind: str  # of FIELDS
    group: str
    examples: list  # of dicts
    sha256: str  # of all examples
    places: list = ()  # "quiz.jsonl, line 3" of every example that was read from a file


def ending(path):
    """Which of OPENED_BY the name of a task file ends in, in upper case or lower; "" of other files, as quiz.jsonl~,
    and of hidden ones."""
    fits = (end for end in OPENED_BY if path.name.lower().endswith(end))
    return "" if path.name.startswith(".") else next(fits, "")


def read_tasks(folder, names, limit):
    """Tasks of a folder of <name>.jsonl, also .gz or .xz, their first `limit` examples. names: of tasks, or of groups
    that tasks.json there knows, "quick" or "all". EvalError."""
    if not folder.is_dir():
        raise EvalError(f"there is no folder {folder} of task files")
    paths = collections.defaultdict(list)
    for path in sorted(folder.iterdir()):
        if end := ending(path):
            paths[path.name[: -len(end)]].append(path)
    group_of = read_groups(folder / "tasks.json", paths)
    wanted = []
    for name in names:
        group = [task for task in paths if group_of.get(task) == name]
        known = {name: group, "quick": [task for task in QUICK if task in paths], "all": [*paths]}
        found = [name] if name in paths else known[name]
        if not found:
            raise EvalError(f"{folder} has no task or group {name!r}; it has {', '.join(paths) or 'no .jsonl files'}")
        wanted += found
    for name in wanted:
        if len(paths[name]) > 1:
            raise EvalError(f"{' and '.join(map(str, paths[name]))} are both the task {name}; move one away")
    return [read_task(name, *paths[name], group_of.get(name, "other"), limit) for name in dict.fromkeys(wanted)]


def read_groups(path, tasks):
    """{task: its group} from a tasks.json, if there is one; it may tell more, and of other tasks. EvalError."""
    about = files.read_json(path) if path.exists() else {}
    about = {task: about[task] for task in tasks if task in about}
    if wrong := files.misfit(about, {...: dict}) or files.misfit(about, {...: has_group}):
        raise EvalError(f"{path}: {wrong}; it has to be an object, whose group is text")
    return {task: of["group"] for task, of in about.items() if of.get("group") is not None}


def has_group(about):
    return about.get("group") is None or isinstance(about["group"], str)


def read_task(name, path, group, limit):
    """The first `limit` examples of a task file, each of them checked. Blank lines are nothing, and so is a null.
    EvalError names the line."""
    lines, examples, places, kind = [], [], [], None
    try:
        with OPENED_BY[ending(path)](path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                lines.append(line)
                places.append(f"{path}, line {number}")
                examples.append(parse_line(line, places[-1]))
                kind = kind or examples[-1].get("kind")
                if wrong := mistake(examples[-1], kind):
                    raise EvalError(f"{places[-1]}{wrong}")
                if len(examples) == limit:
                    break
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise EvalError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except UnicodeDecodeError as error:
        raise EvalError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from None
    if not examples:
        raise EvalError(f"{path} has no examples in it")
    sha256 = hashlib.sha256("".join(lines).encode()).hexdigest()
    return Task(name, kind, group, examples, sha256, places)


def parse_line(line, place):
    """A line of a task file as a dict of what is not null. EvalError."""
    try:
        example = json.loads(line)
    except (ValueError, RecursionError) as error:
        where = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise EvalError(f"{place}{where}, is not JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(example, dict):
        raise EvalError(f"{place}, holds no JSON object but {reprlib.repr(example)}")
    return {field: value for field, value in example.items() if value is not None}


def mistake(example, kind):
    """What is wrong with an example of a file of a kind, to be said after its place; None if it can be scored."""
    if kind not in [*FIELDS]:
        return f", has kind {reprlib.repr(kind)}, which is none of {', '.join(FIELDS)}"
    if example.get("kind", kind) != kind:
        return f", has kind {reprlib.repr(example['kind'])}, the lines before it {kind!r}; a file has one kind"
    for name, field in FIELDS[kind].items():
        if name not in example and field.needed:
            return f", lacks {name}, which kind {kind} needs"
        if name in example and not field.fits(example[name], example):
            return f": {name} is {reprlib.repr(example[name])}; it has to be {field.wanted}"
    return None


# ------------------------------------------------------------------------------------------------------ log-likelihoods


def texts_of(example, kind):
    """[(context, what may go on after it), ...] of an example, and which of them is right."""
    e = example
    if kind == "choice":
        return [(e["context"], e["sep"] + choice) for choice in e["choices"]], e["answer"]
    if kind == "schema":
        return [(context, e["sep"] + e["continuation"]) for context in e["contexts"]], e["answer"]
    if kind == "completion":
        return [(e["context"], e["sep"] + e["answer"])], 0
    if kind == "text":
        return [("", e["text"])], 0
    return [(e["prompt"], e["solution" if kind == "code" else "answer"])], 0


def split(encode, context, continuation):
    """Ids of a context without white space at its end, and of what goes on after it.

    Encoded as one text and cut where the context's own ids end, which is elsewhere if a token would reach over the
    border: "):" and "):\\n" may be one token each, and then the line's end counts to neither, as in
    lm-evaluation-harness.
    """
    whole, head = encode(context + continuation), encode(context.rstrip())
    return head, whole[len(head) :]


def requests(example, kind, encode, start, layout, vocabulary, block_size):
    """What is to be scored of an example: [(context ids, [continuation ids, ...])]."""
    if kind == "text":
        ids, made = [start, *encode(example["text"])] if "text" in example else example["ids"], []
        for begin in range(0, len(ids) - 1, block_size):  # every token once, the last ones after a full context
            end = min(begin + block_size, len(ids) - 1)
            first = max(0, end - block_size)
            made.append((ids[first : begin + 1], [ids[begin + 1 : end + 1]]))
        return made
    if kind == "infill":
        answer = encode(example["answer"])
        head, tail = (np.array(encode(example[part]), np.uint16) for part in ("prompt", "suffix"))
        head, tail = trim(head, tail, block_size - len(answer) - 5)
        return [(infill.prompt(head, tail, layout, vocabulary).tolist(), [answer]), ([start, *head.tolist()], [answer])]
    made = []
    for context, continuation in texts_of(example, kind)[0]:
        head, rest = split(encode, context, continuation)
        if made and made[-1][0] == [start, *head]:  # choices after one context
            made[-1][1].append(rest)
        else:
            made.append(([start, *head], [rest]))
    return made


def ask(task, encoding, layout, vocabulary, block_size):
    """`requests` of every example of a task. EvalError if a text has no token of its own, as "rn" after "retu" where
    "return" is one token: it would be certain. The middle of a hole may be empty. Holes take a
    layout."""
    if task.kind == "infill" and not layout:
        raise EvalError(f"{task.name}: {encoding.name} has no sentinels for holes; name other --tasks")
    encode, start = encoding.encode_ordinary, tokenizer.start(encoding)
    asked = [requests(e, task.kind, encode, start, layout, vocabulary, block_size) for e in task.examples]
    for n, some in enumerate(asked):
        continuations = [ids for _, after_one in some for ids in after_one]
        if task.kind != "infill" and not (continuations and all(continuations)):
            raise EvalError(f"{task.places[n]}: a text to be scored has no token of its own after what is before it")
    return asked


def size_of(context, continuations):
    """Tokens that a request is read as: the last of a continuation is only predicted."""
    return len(context) + sum(max(0, len(ids) - 1) for ids in continuations)


def pack(requests, length):
    """Requests -> rows of at most `length` tokens, as many in each as fit; each row is [(context, [(number of the
    continuation, its ids), ...]), ...].

    Continuations of one context follow it side by side. A request that is too long is taken apart, then loses its
    beginning.
    """
    pieces, number = [], 0
    for context, continuations in requests:
        numbered = [*enumerate(continuations, number)]
        number += len(numbered)
        if size_of(context, continuations) <= length:
            pieces.append((context, numbered))
        else:
            for n, ids in numbered:
                whole, ids = [*context, *ids][-length - 1 :], ids[-length:]
                pieces.append((whole[: -len(ids)], [(n, ids)]))
    sizes = [size_of(context, [ids for _, ids in numbered]) for context, numbered in pieces]
    rows, room = [], []  # room: sorted (tokens left, row)
    for i in sorted(range(len(pieces)), key=lambda i: -sizes[i]):
        at = bisect.bisect_left(room, (sizes[i], -1))
        left, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(pieces[i])
        bisect.insort(room, (left - sizes[i], row))
    return rows


def lay_out(rows, length):
    """Rows of `pack` -> tokens, piece, branch, pos, int64 (B, length) each: the piece of its row that a token belongs
    to, from 1 on; the continuation in it, from 1 on, 0 for the context; its position in context and continuation. And
    (row, column, id, number): in which state which id is predicted, for which continuation, int64 (N,) each."""
    tokens, piece, branch, pos = np.zeros((4, len(rows), length), np.int64)
    asked = []
    for r, row in enumerate(rows):
        at = 0
        for n, (context, numbered) in enumerate(row, 1):
            last, end = at + len(context) - 1, at + len(context)
            tokens[r, at:end], pos[r, at:end] = context, range(len(context))
            for k, (number, ids) in enumerate(numbered, 1):
                columns = [last, *range(end, end + len(ids) - 1)][: len(ids)]  # of nothing, none
                asked += [(r, column, token, number) for column, token in zip(columns, ids, strict=True)]
                stop = end + max(0, len(ids) - 1)
                tokens[r, end:stop], branch[r, end:stop] = ids[:-1], k
                pos[r, end:stop] = range(len(context), len(context) + len(ids) - 1)
                end = stop
            piece[r, at:end] = n
            at = end
    return (tokens, piece, branch, pos), np.array(asked, np.int64).reshape(-1, 4).T


@torch.no_grad()
def log_likelihoods(model, requests, tokens_per_batch=16_384):
    """Of every continuation, in order: the sum of its tokens' log-probabilities in nats, float64, and whether each was
    the likeliest, bool. The processes share the work.

    Rows have one length and hold several requests; each token sees its own context and continuation, so this is what a
    request alone gives, to rounding.
    """
    device, length = model.wte.weight.device, model.config.block_size
    rows, total = pack(requests, length), sum(len(continuations) for _, continuations in requests)
    exact = torch.float32 if device.type == "mps" else torch.float64
    sums, misses = torch.zeros(2, total, dtype=exact, device=device)
    many = max(1, tokens_per_batch // length)
    for at in range(rank() * many, rank() * many + len(rows), many * world()):  # equally often everywhere
        some = rows[at : at + many]
        arrays, asked = lay_out(some + [[]] * (many - len(some)), length)  # of one shape, so compiled once
        tokens, piece, branch, pos = (torch.from_numpy(array).to(device) for array in arrays)
        seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        seen = seen & (piece[:, :, None] == piece[:, None])
        seen &= (branch[:, None] == 0) | (branch[:, :, None] == branch[:, None])
        row, column, target, number = (torch.from_numpy(array).to(device) for array in asked)
        states = model.hidden(tokens, mask=dense_mask(seen[:, None], model.dtype, True), pos=pos)[row, column]
        for x, goal, n in zip(*(part.split(4096) for part in (states, target, number)), strict=True):
            logits = model.logits(x)
            picked = logits.gather(1, goal[:, None])[:, 0]
            sums.index_add_(0, n, (picked - logits.logsumexp(1)).to(exact))
            misses.index_add_(0, n, (logits.argmax(1) != goal).to(exact))
    all_reduce(sums)
    all_reduce(misses)
    return sums.cpu().numpy(), (misses == 0).cpu().numpy()


# ------------------------------------------------------------------------------------------------------------ measures


def score(task, model, encoding, layout, vocabulary, tokens_per_batch):
    """Measures of every example that need only log-likelihoods: {name: [value, ...]}.

    "bits" and "bytes" of what was right; "acc", "acc_norm", "p" of the right choice; "given", the place of the answer
    given; "suffix_gain", bits per byte that the suffix of a hole saves; "logs", nats of each continuation.
    """
    kind, asked = task.kind, ask(task, encoding, layout, vocabulary, model.config.block_size)
    logs, greedy = log_likelihoods(model, [*itertools.chain(*asked)], tokens_per_batch)
    made, at = collections.defaultdict(list), 0
    for example, some in zip(task.examples, asked, strict=True):
        end = at + sum(len(continuations) for _, continuations in some)
        mine, at = logs[at:end], end
        made["logs"].append(mine.tolist())
        if kind == "text" and "text" not in example:  # a held-out window
            right, n_bytes = 0, example["bytes"]
        else:
            texts, right = texts_of(example, kind)
            n_bytes = len(texts[right][1].encode())
        made["bits"].append(-float(mine.sum() if kind == "text" else mine[right]) / math.log(2))
        made["bytes"].append(n_bytes)
        if kind in ("choice", "schema"):
            made["acc"].append(share_of_best(mine, right))
            if kind == "choice":
                made["acc_norm"].append(share_of_best(mine / [len(choice) for choice in example["choices"]], right))
            made["p"].append(float(np.exp(mine[right] - np.logaddexp.reduce(mine))))
            made["given"].append(int(mine.argmax()))
        elif kind == "infill":
            made["suffix_gain"].append((mine[0] - mine[1]) / math.log(2) / max(1, n_bytes))
        elif kind == "completion":
            made["acc"].append(float(greedy[end - 1]))
    return dict(made)


def share_of_best(values, right):
    """1 if one value is the largest and the right one, 1/k if k are, else 0."""
    return float((values == values.max())[right] / (values == values.max()).sum())


def mean(values):
    """(mean, its standard error)."""
    values = np.array(values, float)  # None becomes nan
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def bits_of(items, kind):
    """Bits per byte of every example, a float64 array: of its answer; of texts, whose mean is to be the ratio of sums,
    that ratio and what the example moves it by."""
    bits, n_bytes = np.array(items["bits"], float), np.maximum(np.array(items["bytes"], float), 1)
    if kind != "text":
        return bits / n_bytes
    ratio = bits.sum() / n_bytes.sum()
    return ratio + (bits - ratio * n_bytes) / n_bytes.mean()


def pass_at(k, n, c):
    """Chance that one of k samples is right, of which c of n were: 1 - C(n-c, k) / C(n, k), without bias (Codex, arXiv
    2107.03374, section 2.1)."""
    return 1.0 - math.prod((n - c - i) / (n - i) for i in range(k))


def summary(task, items):
    """What results say of a task: "scores", {measure: {"mean", "se"}}, what they have to beat, and its items."""
    scores = {"bpb": mean(bits_of(items, task.kind))}
    scores |= {name: mean(items[name]) for name in items if name in SCORES or name.startswith("pass@")}
    made = {"kind": task.kind, "group": task.group, "n": len(task.examples), "sha256": task.sha256}
    made["scores"] = {name: {"mean": float(m), "se": float(se)} for name, (m, se) in scores.items()}
    if task.kind in ("choice", "schema"):
        sizes = [len(e["choices" if task.kind == "choice" else "contexts"]) for e in task.examples]
        answers = np.bincount([e["answer"] for e in task.examples])
        given = np.bincount(items["given"]) / len(task.examples)
        made["chance"] = float(np.mean([1 / size for size in sizes]))
        made["constant"] = float(answers.max() / answers.sum())  # who always gives the commonest place
        made["entropy"] = float(-sum(p * math.log2(p) for p in given if p)) + 0.0  # of the places given, in bits
    subs = collections.defaultdict(list)
    per_byte = np.divide(items["bits"], np.maximum(items["bytes"], 1))  # of an empty middle, 0
    for example, value in zip(task.examples, items.get("acc", per_byte), strict=True):
        subs[str(example.get("sub"))].append(value)
    if len(subs) > 1:
        made["subs"] = {sub: float(np.mean(values)) for sub, values in subs.items()}
    return made | {"ids": [str(e.get("id", n)) for n, e in enumerate(task.examples)], "items": items}


# ---------------------------------------------------------------------------------------------------------- generation


def write_programs(task, model, encoding, args):
    """args.samples_per_task continuations of every prompt of a code task -> [[program, ...], ...] with tests appended.

    A prompt loses the white space at its end, as the tokenizer joins line ends with what follows them; the model writes
    it. A continuation is over at a line that the function which the prompt has begun cannot have (FUNCTION_ENDS), or if
    it has begun none, at one that tries it out (PROGRAM_ENDS).
    """
    n, eot = args.samples_per_task, tokenizer.eot(encoding)
    prompts = [e["prompt"].rstrip() for e in task.examples for _ in range(n)]
    ids = [[tokenizer.start(encoding), *encoding.encode_ordinary(prompt)] for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    ends = [FUNCTION_ENDS if re.search(r"^\s*(async )?def ", prompt, re.M) else PROGRAM_ENDS for prompt in prompts]
    bodies = [""] * len(ids)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    for at in range(0, len(order), 64):
        some = order[at : at + 64]
        texts, over = [b""] * len(some), [False] * len(some)
        how = args.max_new_tokens, or_else(args.temperature, 0.2), or_else(args.top_p, 0.95), eot, generator
        steps = model.generate([ids[i] for i in some], *how)
        for tokens in steps:
            for k, token in enumerate(tokens):
                if token is None:
                    over[k] = True
                elif not over[k]:
                    texts[k] += encoding.decode_single_token_bytes(token)
                    over[k] = any(end.encode() in texts[k][-200:] for end in ends[some[k]])
            if all(over):
                break
        for i, text in zip(some, texts, strict=True):
            body = text.decode(errors="replace")
            bodies[i] = body[: min([body.find(end) for end in ends[i] if end in body], default=len(body))]
    tests = [e["tests"] for e in task.examples for _ in range(n)]
    programs = [with_tests(prompt + body, test) for prompt, body, test in zip(prompts, bodies, tests, strict=True)]
    return [programs[i : i + n] for i in range(0, len(programs), n)]


def fill_holes(task, model, vocabulary, layout, args):
    """Measures of an infill task that need answers: "stops", whether the model ended its answer by itself, "exact",
    whether that is what stood there but for white space around it; and the programs, [[program], ...], if there are
    tests."""
    generator, made = torch.Generator(args.device).manual_seed(args.seed), collections.defaultdict(list)
    how = {"temperature": or_else(args.temperature, 1.0), "top_p": or_else(args.top_p, 1.0), "generator": generator}
    holes, filled = [(e["prompt"], e["suffix"]) for e in task.examples], {}
    order = sorted(range(len(holes)), key=lambda i: sum(map(len, holes[i])))
    for at in range(0, len(order), 16):  # few, because the longest around a hole leaves the least room for all answers
        some = [holes[i] for i in order[at : at + 16]]
        answers = fill(model, vocabulary, some, layout, args.max_new_tokens, not args.no_healing, **how)
        filled |= zip(order[at : at + 16], answers, strict=True)
    programs = []
    for i, e in enumerate(task.examples):
        answer, stopped = filled[i]
        text = answer.decode(errors="replace")
        made["stops"].append(float(stopped))
        made["exact"].append(float(stopped and text.strip() == e["answer"].strip()))
        programs.append([with_tests(e["prompt"] + text + e["suffix"], e.get("tests", ""))])
    return dict(made), programs


def or_else(value, default):
    return default if value is None else value


def with_tests(code, tests):
    """One program. The blank line is for code that ends in a backslash: that would take in the tests' first line."""
    return f"{code}\n\n{tests}"


def run_programs(programs, seconds, ks=(1, 10, 100)):
    """{"pass@k": [...] for every k in ks that as many samples allow}."""
    verdicts = iter(sandbox.run(itertools.chain(*programs), seconds))
    passed = [sum(next(verdicts) == "passed" for _ in some) for some in programs]
    return {f"pass@{k}": [pass_at(k, len(some), c) for some, c in zip(programs, passed, strict=True)]
            for k in ks if all(k <= len(some) for some in programs)}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ held-out parts


def has_held_out(folder, block_size):
    """Whether a source has a held-out window. MixError if what it has is damaged."""
    if not any((folder / name).exists() for name in ("meta.json", "val.bin")):
        return False
    _, shards = find_shards(folder, "val")
    return any(tokens > block_size for _, tokens, _ in shards)


def held_out(folder, block_size, vocabulary, limit, seed, fills):
    """Tasks from the held-out part of a source: its windows as text, and if the model `fills` any two kinds of holes in
    their longest documents, a span between any two characters and a line, in as much as half a context holds."""
    source, rng = Source(folder, "val", block_size), np.random.default_rng(seed)
    source.ids = len(vocabulary.token_bytes)
    source.check_bare()
    if source.tokenizer not in (None, tokenizer.digest(vocabulary.encoding)):
        raise EvalError(f"{folder} holds ids of another tokenizer than {vocabulary.encoding.name}")
    rows = source.rows(limit)
    sha256 = hashlib.sha256(rows).hexdigest()
    windows = [{"ids": row.tolist(), "bytes": sum(len(vocabulary.token_bytes[i]) for i in row[1:])} for row in rows]
    made = [Task(folder.name, "text", "held out", windows, sha256)]
    for place in (span, line) if fills else ():
        holes = []
        for row in rows:
            begin, end = infill.longest_document(row, vocabulary)
            ids = row[begin : min(end, begin + block_size // 2 - 8)]  # leaves half a context for an answer
            text = b"".join(vocabulary.token_bytes[i] for i in ids).decode(errors="ignore")
            if hole := place(text, rng):
                holes.append(dict(zip(("prompt", "answer", "suffix"), hole, strict=True)))
        if holes:
            sha256 = hashlib.sha256(json.dumps(holes).encode()).hexdigest()
            made.append(Task(f"{folder.name}_{place.__name__}s", "infill", "infilling", holes, sha256))
    return made


def span(text, rng):
    """(before, middle, after) a hole between any two characters, or None."""
    if len(text) < 3:
        return None
    a, b = sorted(rng.choice(len(text) - 1, 2, replace=False) + 1)
    return text[:a], text[a:b], text[b:]


def line(text, rng):
    """(before, middle, after) a line that is not blank and has lines around it; or None."""
    lines = text.splitlines(keepends=True)
    inner = [i for i in range(1, len(lines) - 1) if lines[i].strip()]
    if not inner:
        return None
    i = rng.choice(inner)
    return "".join(lines[:i]), lines[i], "".join(lines[i + 1 :])


# -------------------------------------------------------------------------------------------------------------- output


def floor(task):
    """What knows nothing gets: chance, or who always gives the commonest place."""
    return max(task["chance"], task["constant"])


def noise(task):
    """Whether the accuracy is less than two standard errors above the floor."""
    return "chance" in task and task["scores"]["acc"]["mean"] < floor(task) + 2 * task["scores"]["acc"]["se"]


def groups(tasks):
    """{group: {"acc": mean of (acc - chance) / (1 - chance), "bpb": mean, "tasks": names}}, tasks weighing the same."""
    made = {}
    for group in dict.fromkeys(task["group"] for task in tasks.values()):
        mine = {name: task for name, task in tasks.items() if task["group"] == group}
        choices = [t for t in mine.values() if t.get("chance", 1) < 1]
        made[group] = {"tasks": [*mine], "bpb": float(np.mean([t["scores"]["bpb"]["mean"] for t in mine.values()]))}
        if choices:
            centred = [(t["scores"]["acc"]["mean"] - t["chance"]) / (1 - t["chance"]) for t in choices]
            made[group]["acc"] = float(np.mean(centred))
    return made


def print_task(name, task):
    def show(measure, scale=100, form="6.1f"):
        if measure not in task["scores"]:
            return " " * 14
        score = task["scores"][measure]
        return f"{scale * score['mean']:{form}} ±{scale * score['se']:<6{form[1:]}}"

    others = "  ".join(
        f"{key} {score['mean']:+.3f} ±{score['se']:.3f}" if key == "suffix_gain" else
        f"{key} {100 * score['mean']:.1f} ±{100 * score['se']:.1f}"
        for key, score in task["scores"].items() if key not in ("acc", "acc_norm", "bpb", "p")
    )  # fmt: skip
    known = " " * 23
    if "chance" in task:
        known = f"{100 * task['chance']:6.1f} {100 * task['constant']:8.1f} {task['entropy']:7.2f}"
    text = f"{name:<20} {task['n']:>6} {show('acc')} {show('acc_norm')} {known}  {show('bpb', 1, '6.3f')} {others}"
    grey, plain = ("\033[90m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"{grey}{text}  ~{plain}" if noise(task) else text)


def compare(a, b):
    """Print how two result files differ, paired by item: mean and 95% interval of b - a."""
    names = [name for name in a["tasks"] if name in b["tasks"]]
    if not names:
        print("the two have no task in common")
    for name in names:
        one, two = a["tasks"][name], b["tasks"][name]
        if (one["sha256"], one["n"]) != (two["sha256"], two["n"]):
            print(f"{name:<20} not the same examples")
            continue
        for measure in ("acc", "acc_norm", "pass@1", "exact", "stops", "bpb"):
            x, y = (bits_of(t["items"], t["kind"]) if measure == "bpb" else t["items"].get(measure) for t in (one, two))
            if x is not None and y is not None:
                m, se = mean(np.array(y, float) - np.array(x, float))
                print(f"{name:<20} {measure:<8} {m:+8.4f}  [{m - 1.96 * se:+.4f}, {m + 1.96 * se:+.4f}]  n {len(x)}")


def plot(results, to):
    """One result: its scores, with what they have to beat. Several: every group's over tokens."""
    plt = pyplot(to)
    if len(results) == 1:
        tasks = {name: task for name, task in results[0]["tasks"].items() if "chance" in task}
        figure, axis = plt.subplots(figsize=(8, 0.35 * len(tasks) + 1.5), layout="constrained")
        scores = [task["scores"]["acc"] for task in tasks.values()]
        colours = ["lightgrey" if noise(task) else "C0" for task in tasks.values()]
        axis.barh([*map(label, tasks)], [s["mean"] for s in scores], xerr=[2 * s["se"] for s in scores], color=colours)
        for y, task in enumerate(tasks.values()):
            axis.plot([floor(task)] * 2, [y - 0.4, y + 0.4], color="black")
        axis.set(title="accuracy, two standard errors; lines: chance or the commonest answer")
    else:
        figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
        results = sorted(results, key=lambda result: result["meta"]["tokens"])
        names = [*dict.fromkeys(name for result in results for name in result["groups"])]
        for axis, measure in zip(axes, ("bpb", "acc"), strict=True):
            for colour, name in enumerate(names):
                points = [(r["meta"]["tokens"] / 1e6, r["groups"].get(name, {}).get(measure)) for r in results]
                if points := [point for point in points if point[1] is not None]:
                    how = {"marker": "o", "markersize": 4, "label": label(name), "color": f"C{colour}"}
                    axis.plot(*zip(*points, strict=True), **how)
            title = {"bpb": "bits a byte of right answers", "acc": "accuracy, 0 chance, 1 perfect"}[measure]
            axis.set(title=title, xlabel="tokens seen, millions")
            axis.grid(alpha=0.2)
            if axis.lines:
                axis.legend()
    save(figure, to)


# ------------------------------------------------------------------------------------------------------------- command


def meta_of(folder, state, model, encoding, layout):
    """Where results come from; `key` decides whether results that are there already are of the same thing."""
    key = {"weights": checkpoint.weights_sha256(folder), "tokenizer": tokenizer.digest(encoding), "layout": layout,
           "dtype": str(model.dtype)}  # fmt: skip
    return {
        "key": key, "checkpoint": str(folder), "phase": state["phase"], "step": state["step"],
        "tokens": state["tokens"], "parameters": model.num_params(), "config": state["config"],
        "separator": tokenizer.start(encoding), "torch": torch.__version__,
    }  # fmt: skip


def runs(task, args):
    """Whether what the model writes for a task is to be run: Python with tests."""
    python = all("tests" in e and e.get("lang", "python") == "python" for e in task.examples)
    return args.run_code and task.kind in ("code", "infill") and python


def generation(task, args):
    """Settings that a task's answers depend on, None if none are asked for."""
    if not (runs(task, args) or (task.kind == "infill" and args.generate)):
        return None
    run = {"seconds": args.seconds, "samples": args.samples_per_task} if runs(task, args) else {}
    names = ("max_new_tokens", "temperature", "top_p", "no_healing", "seed")
    return run | {name: getattr(args, name) for name in names}


def evaluate(task, model, encoding, layout, vocabulary, args):
    """-> summary of a task, with what came of every example."""
    items, programs = score(task, model, encoding, layout, vocabulary, args.tokens_per_batch), None
    if settings := generation(task, args):
        if task.kind == "infill":
            made, programs = fill_holes(task, model, vocabulary, layout, args)
            items |= made
        else:
            programs = write_programs(task, model, encoding, args)
        if runs(task, args):
            items |= run_programs(programs, args.seconds)
        items["programs"] = programs
    return summary(task, items) | {"generation": settings}


def parse(argv):
    parser = errors.Parser(__doc__)
    count = errors.number(int, 1)
    parser.add_argument(
        "checkpoint", nargs="*", type=errors.path, help="out/<phase>, one of its checkpoints/step-...; or result files"
    )
    parser.add_argument("--data", type=errors.path, help="a folder of task files; default: held-out parts alone")
    parser.add_argument("--tasks", help="names or groups, with commas; quick, all, held_out; default held_out,quick")
    parser.add_argument("--limit", type=count, help="examples of each task, the first ones; of held-out windows 256")
    parser.add_argument("--sources", type=errors.path, help="folder of prepared sources; default: those trained on")
    parser.add_argument("--layout", choices=infill.LAYOUTS, help="of holes; default: what was trained, else psm")
    parser.add_argument("--generate", action="store_true", help="fill holes too, and count what ends and what is exact")
    parser.add_argument("--run-code", action="store_true", help="run what the model writes, against its tests")
    parser.add_argument("--seconds", type=errors.number(float, 0.01, 3600), default=3.0, help="that a program may take")
    parser.add_argument("--samples_per_task", type=count, default=1, help="programs written for each problem")
    parser.add_argument("--max_new_tokens", type=count, default=256)
    parser.add_argument("--temperature", type=TEMPERATURE, help="0 takes the likeliest token; default 0.2, of holes 1")
    parser.add_argument("--top_p", type=TOP_P, help="default 0.95, of holes 1, as ends are rare tokens")
    parser.add_argument("--no_healing", action="store_true", help="keep the last token before a hole as it is")
    parser.add_argument("--seed", type=SEED, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--tokens_per_batch", type=errors.number(int, 1, 2**24), help="at a time; default 4,096, on a GPU 32,768"
    )
    parser.add_argument("--out", type=errors.path, help="result file; default: eval-<step>.json in the phase's folder")
    parser.add_argument("--fresh", action="store_true", help="do not take over what the result file has")
    parser.add_argument("--samples", type=errors.path, help="write every example with its scores to this .jsonl")
    parser.add_argument("--compare", type=errors.path, nargs=2, metavar=("A", "B"), help="two results, paired by item")
    parser.add_argument("--plot", type=errors.path, help="picture of the results, needs matplotlib")
    args = parser.parse_args(argv)
    args.device = device_named(args.device)
    if args.run_code and sys.platform != "linux":
        parser.error("--run-code needs Linux")
    if not args.checkpoint and not args.compare:
        parser.error("which checkpoint? python eval.py out/phase1")
    if args.samples and args.samples == args.out:
        parser.error("--samples and --out are two files")
    args.tokens_per_batch = args.tokens_per_batch or (32_768 if args.device.type == "cuda" else 4096)
    return args


def is_count(value):
    return type(value) is int and 0 <= value < 2**63


SCORE = {"mean": files.number, "se": files.number}
TASK = {"kind": str, "group": str, "n": is_count, "sha256": str, "scores": {"bpb": dict},
        "items": {"bits": list, "bytes": list}}  # fmt: skip
CHOICE = {"chance": files.real, "constant": files.real, "entropy": files.real, "scores": {"acc": dict},
          "items": {"acc": list}}  # fmt: skip
RESULTS = {"meta": {"key": dict, "tokens": is_count}, "tasks": {...: TASK}}  # the shape of a result file


def load_results(path):
    """What `run` has written, scores that are null as nan. UserError names the file."""
    results = files.read_json(path, RESULTS)
    for name, task in results["tasks"].items():
        measured = {measure: of for measure, of in task["items"].items() if measure not in ("logs", "programs")}
        wrong = files.misfit(task["scores"], {...: SCORE}) or files.misfit(measured, {...: [files.number]})
        if task["kind"] in ("choice", "schema"):
            wrong = wrong or files.misfit(task, CHOICE)
        if wrong or any(len(of) != task["n"] for of in measured.values()):
            raise EvalError(f"{path}, of {name}: {wrong or 'items are not as many as n'}")
        for score in task["scores"].values():
            score.update({key: math.nan for key in SCORE if score[key] is None})
    return results | {"groups": groups(results["tasks"])}


def gather_tasks(args, model, state, vocabulary, layout):
    """The tasks that args.tasks names: held-out parts of the sources it was trained on, and those in --data."""
    folder, sources, own = Path(args.sources or state["config"]["data"]), [*state["config"]["mix"]], {}
    if args.sources:
        named = [path for path in folder.glob("*/*") if path.name in ("meta.json", "val.bin", "train.bin")]
        if not (sources := sorted({path.parent.name for path in named})):
            raise EvalError(f"{folder} has no prepared sources; see prepare.py")
    names = ["held_out"] * bool(sources) + ["quick"] * bool(args.data)
    if args.tasks:
        names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise EvalError("on what? say --data, a folder of task files, or --sources, one of prepared sources")
    left_out = set()
    for source in sources:
        its_tasks = {source, f"{source}_spans", f"{source}_lines"}
        if not {"held_out", *its_tasks} & {*names}:
            continue
        if has_held_out(folder / source, model.config.block_size):
            how = vocabulary, args.limit or 256, args.seed, layout
            tasks = held_out(folder / source, model.config.block_size, *how)
            own |= {task.name: task for task in tasks}
        else:
            print(f"{source} has no held-out part of one window in {folder}/, so it is left out")
            left_out |= its_tasks
    tasks = [task for name, task in own.items() if name in names or "held_out" in names]
    if rest := [name for name in names if name not in {"held_out", *own, *left_out}]:
        if not args.data:
            others = f", or one of {', '.join(own)}" if own else ""
            raise EvalError(f"{', '.join(rest)}: say --data, a folder of task files{others}")
        tasks += read_tasks(args.data, rest, args.limit)
    if not tasks:
        raise EvalError(
            f"{folder}/ has no held-out part of {', '.join(sources)}; say --sources=FOLDER, or --data and other --tasks"
        )
    for name, count in collections.Counter(task.name for task in tasks).items():
        if count > 1:
            raise EvalError(f"{name} is a held-out part and a file in {args.data}; rename the file, or name --tasks")
    return tasks


def run(args):
    """Evaluate one checkpoint; its results, {"meta", "tasks", "groups"}, written after every task."""
    if len(args.checkpoint) > 1:
        raise EvalError("one checkpoint at a time; several result files go with --plot")
    folder = checkpoint.find(args.checkpoint[0])
    model, encoding, state = load_model(folder, args.device, getattr(torch, args.dtype))
    if encoding is None:
        raise EvalError(f"{folder} was trained on data that names no tokenizer, so texts have no ids")
    layout = args.layout or trained_layout(state["config"]) or "psm"
    try:
        vocabulary = vocabulary_for(layout, encoding)
    except infill.InfillError:  # no holes then, but everything else
        vocabulary, layout = infill.Vocabulary(encoding), None
    tasks = gather_tasks(args, model, state, vocabulary, layout)
    meta = meta_of(folder, state, model, encoding, layout)
    to = args.out or folder.parents[1] / f"eval-{state['step']:08d}.json"
    results = {"meta": meta, "tasks": earlier_tasks(to, meta, args.fresh), "groups": {}}
    todo = [task for task in tasks if not is_done(task, results["tasks"].get(task.name), args)]
    for task in todo:  # a mistake in the last one is said before the first is scored
        ask(task, encoding, layout, vocabulary, model.config.block_size)
    if args.samples:
        begin_samples(args.samples)
    about = f"{meta['tokens']:,} tokens seen; {encoding.name}, {layout}, {args.dtype}, {args.device}"
    print(f"{meta['checkpoint']}: {about}")
    if args.run_code and not sandbox.isolated():
        print("this kernel grants no namespaces: programs have limits but could write files and use the network")
    print(f"{'task':<20} {'n':>6} {'acc':>6} {'':>7} {'acc_norm':>8} {'':>5} chance constant entropy  bits/byte")
    for task in tasks:
        if task in todo:
            start = time.perf_counter()
            results["tasks"][task.name] = evaluate(task, model, encoding, layout, vocabulary, args)
            results["tasks"][task.name]["seconds"] = round(time.perf_counter() - start, 2)
            files.write_json(to, results | {"groups": groups(results["tasks"])})
        if args.samples:
            write_samples(args.samples, task, results["tasks"][task.name]["items"])
        print_task(task.name, results["tasks"][task.name])
    results["groups"] = groups(results["tasks"])
    for name, group in results["groups"].items():
        acc = f"acc over chance {group['acc']:6.3f}" if "acc" in group else " " * 22
        print(f"{name:<20} {acc}   bits/byte {group['bpb']:.3f}   of {', '.join(group['tasks'])}")
    print(f"~ less than two standard errors above chance or the commonest answer; results in {to}")
    return results


def earlier_tasks(path, meta, fresh):
    """The tasks of a result file that is there already, none if `fresh`. EvalError if it is of another checkpoint or no
    result file at all, which is never replaced, or if nothing can be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise EvalError(f"nothing can be written to {path}: {error.strerror}; name another --out") from None
    if not path.exists():
        return {}
    try:
        before = load_results(path)
    except UserError as error:
        raise EvalError(f"{error}; move it away, or name another --out") from None
    if fresh:
        return {}
    if before["meta"]["key"] != meta["key"]:
        raise EvalError(f"{path} has results of other weights or settings; use --out, or --fresh to replace them")
    return before["tasks"]


def is_done(task, before, args):
    """Whether a result, None if there is none, is of this task as it is now, and its answers as they are asked for."""
    return before and before["sha256"] == task.sha256 and generation(task, args) in (None, before.get("generation"))


def begin_samples(path):
    """Make or empty a file for `write_samples`. EvalError if what is there was not written by it."""
    if path.is_file() and path.stat().st_size:
        with open(path, "rb") as file:
            try:
                ours = {"task", "logs"} <= {*json.loads(file.readline())}
            except (ValueError, TypeError):
                ours = False
        if not ours:
            raise EvalError(f"{path} holds no samples of an evaluation; name another file for --samples")
    open(path, "wb").close()


def write_samples(path, task, items):
    """Append every example of a task with what came of it, a line each."""
    with open(path, "a", encoding="utf-8") as f:
        for n, example in enumerate(task.examples):
            f.write(files.strict({"task": task.name, **example, **{name: items[name][n] for name in items}}) + "\n")


@errors.command
def main(argv):
    args = parse(argv)
    if args.device.type == "cpu":
        keep_memory()
    if args.plot:
        pyplot(args.plot)  # what it lacks is said before the work
    if args.compare:
        compare(*map(load_results, args.compare))
        return 0
    if all(path.suffix == ".json" for path in args.checkpoint):
        if not args.plot:
            raise EvalError("what about these results? --plot=PICTURE, or --compare of two")
        results = [load_results(path) for path in args.checkpoint]
    else:
        results = [run(args)]
    if args.plot:
        plot(results, args.plot)
    return 0


if __name__ == "__main__":
    errors.run(main)
