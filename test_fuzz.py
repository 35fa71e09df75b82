"""Whatever a file or a command line holds: what is right comes out of it, or one line that says what is wrong.

    python test_fuzz.py 300                      # 300 mutations of every kind, a table, and every distinct fault
    python test_fuzz.py 300 shards configs       # of these kinds alone
    python test_fuzz.py shards/17                # this one again, with all that it printed; its folder is kept

The suite tries a few of each. A mutation is drawn from a generator seeded with its name, such as shards/17, so every
fault can be had again alone. Each is tried in a fork of one process that has imported everything, in a folder of its
own; what it is judged by:

    right     exit code 0, and where it can be told, with the right numbers
    refused   exit code 2 and one line on stderr
    trace     an exception that reached the top, or a death
    hang      more than 20 seconds
    wrong     a success with wrong numbers, more than one line, another exit code, code of the input that ran, a file
              that was there before and is gone or changed, something half-written left behind

Memory is limited to 2 GB more than at the start, so who takes more ends in a MemoryError.
"""

import collections
import contextlib
import copy
import gzip
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent
SHORT = 4  # mutations of each kind in the suite
SECONDS = 20
DOCUMENTS = 12  # in each file of inputs
MEMORY = 2 << 30  # bytes
STEP = "out/tiny/checkpoints/step-00000002"

PHASE = """n_layer, n_head, n_embd, block_size = 1, 2, 32, 32
budget, batch, lr_peak, decay, warmup = 1024, 512, 0.01, "constant", 0.0
mix = {"text": 0.5, "code": 0.5}
norm, rotary, mup_base = "rmsnorm", 1.0, 0
save_every, log_every, eval_tokens, keep = 1, 1, 128, 3
device, dtype = "cpu", "float32"
"""
STUDY = """def _mixed(share):
    return [("tiny.py", {"mix": {"text": share, "code": 1 - share}})]
variants = {f"{share} text": _mixed(share) for share in (0.2, 0.5, 0.8)}
baseline = "0.5 text"
seeds = (1,)
tasks = "choice"
"""
TASKS = {
    "choice": [
        {"context": "I saw", "sep": " ", "choices": ["a lamp", "a river", "the moon"], "answer": 1, "sub": "a"},
        {"context": "In winter", "sep": " ", "choices": ["it snows", "it burns"], "answer": 0, "sub": "b"},
    ],
    "schema": [
        {"contexts": ["The lamp", "The river", "A stone"], "sep": " ", "continuation": "runs", "answer": 1},
        {"contexts": ["Ice", "Fire"], "sep": " ", "continuation": "is cold", "answer": 0},
    ],
    "completion": [{"context": "The garden has a", "sep": " ", "answer": word} for word in ("river", "lamp")],
    "code": [{"prompt": "def f(x):\n", "solution": "    return x\n", "tests": "assert f(2) == 2"}] * 2,
    "infill": [{"prompt": "def f(x):\n", "answer": "    y = x\n", "suffix": "    return y\n"}] * 2,
    "text": [{"text": "A river runs through the garden. " * 5}, {"text": "Snow fell.", "id": "snow"}],
}


@dataclass
class Case:
    """A command to try, on files that were mutated before."""

    words: list  # of the command: its module, then its arguments
    note: str  # what was changed
    changes: tuple = ()  # names in the folder that the command may write over
    check: object = None  # function to what is wrong with a success, None if nothing is
    then: tuple = ()  # words of a command that must work after a success


# ----------------------------------------------------------------------------------------------------------- mutations


MAGIC = b"\xef\xbb\xbf", b"\xff\xfe", b"PK\x03\x04", b"\x80\x04", b"\x1f\x8b", b"\0", b"\x93NUMPY"


def mutate_bytes(dice, data):
    """Other bytes than `data`, and how they were made."""
    if not data:
        return b"x", "one byte instead of none"
    way = dice.choice(("flip", "cut", "insert", "duplicate", "zero", "swap", "magic", "replace"))
    begin = dice.randrange(len(data))
    size = min(len(data) - begin, dice.choice((1, 2, 8, 64, 512)))
    end = begin + size
    if way == "flip":
        made = data[:begin] + bytes([data[begin] ^ 1 << dice.randrange(8)]) + data[begin + 1 :]
    elif way == "cut":
        made = dice.choice((data[:begin], data[end:], data[:begin] + data[end:]))
    elif way == "insert":
        made = data[:begin] + dice.randbytes(size) + data[begin:]
    elif way == "duplicate":
        made = data[:begin] + data[begin:end] * 2 + data[end:]
    elif way == "zero":
        made = data[:begin] + bytes(size) + data[end:]
    elif way == "swap":
        other = dice.randrange(len(data) - size + 1)
        low, high = sorted((begin, other))
        first, second = data[low:high][:size], data[high : high + size]
        made = data[:low] + second + data[low + size : high] + first + data[high + size :]
    elif way == "magic":
        made = dice.choice(MAGIC) + data[dice.choice((0, 4)) :]
    else:
        noise = dice.randbytes(len(data))
        made = dice.choice((b"", bytes(len(data)), b"\xff" * len(data), b"null", b"[]", b"{}", noise))
    if made == data:
        made, way = data[:-1], "cut the last byte"
    return made, f"bytes {begin}:{end}, {way}"


# What may stand in JSON where something else should; None stands for nothing at all.
ODD = (
    "null", "true", "false", "0", "-1", "1", "1.5", "-0.0", "NaN", "Infinity", "-Infinity", "1e999", "1e308", "1e-320",
    "9" * 5000, "1" + "0" * 18, "9223372036854775808", "-9223372036854775809", "65535", "65536", "4294967296", '""',
    '"x"', '" "', '"1"', '"nan"', '"\\ud800"', '"\\u0000"', '"../../x"', '"/dev/null"', '"~"', '"\\n"',
    json.dumps("x" * 100_000), '"int64"', "[]", "{}", "[null]", "[[]]", "[[1], 2]", "[1, 2, 3]", '["a"]', '{"": null}',
    '{"a": {"a": {"a": 1}}}', "[" * 90 + "]" * 90, "[" * 100_000 + "]" * 100_000,
    '{"a":' * 100_000 + "1" + "}" * 100_000,
)  # fmt: skip
MARK = "a value that is put in as it is"


def mutate_json(dice, value):
    """Text of almost the JSON of `value`, and what was done to it."""
    value = copy.deepcopy(value)
    path, at = [], value
    while isinstance(at, (dict, list)) and at and (not path or dice.random() < 0.7):
        key = dice.choice([*at]) if isinstance(at, dict) else dice.randrange(len(at))
        path.append((at, key))
        at = at[key]
    spelt = ".".join(str(key) for _, key in path)
    raw = dice.choice(ODD)
    way = dice.choice(("odd", "odd", "odd", "drop", "near", "rename", "again", "more", "wrap", "whole"))
    if not path or way == "whole":
        return raw, f"all of it = {raw[:40]}"
    holder, key = path[-1]
    if way == "drop":
        del holder[key]
    elif way == "near":
        holder[key] = near(dice, at)
        raw = json.dumps(holder[key])
    elif way == "rename" and isinstance(holder, dict):
        holder[dice.choice((key.upper(), key + "s", "", "x"))] = holder.pop(key)
    elif way == "again" and isinstance(holder, dict):  # a key that is there twice: the last one counts
        holder[MARK] = at
        text = json.dumps(value).replace(json.dumps(MARK) + ":", f"{json.dumps(key)}: {raw}, {json.dumps(key)}:", 1)
        return text, f"{spelt} twice"
    elif way == "again":
        holder.insert(key, at)
    elif way == "more" and isinstance(at, dict):
        at["more"] = MARK
    elif way == "more" and isinstance(at, list):
        at.append(MARK)
    elif way == "wrap":
        holder[key] = dice.choice(([at], {"a": at}, str(at)))
    else:
        way, holder[key] = "=", MARK
    return json.dumps(value).replace(json.dumps(MARK), raw), f"{spelt} {way} {raw[:40]}"


def near(dice, value):
    """A value like this one."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return dice.choice((value + 1, value - 1, -value, value * 2, value * 1000, value / 2, str(value), 2**31, 2**63))
    if isinstance(value, str):
        return dice.choice((value[:-1], value * 2, value.upper(), f"{value}/x", f"{value}\n", f"é{value}", f" {value}"))
    return [*value] if isinstance(value, dict) else dict(enumerate(value))


def mutate_file(dice, path):
    """Change a file, as JSON or JSON lines if it is, else its bytes -> what was done."""
    data = path.read_bytes()
    if path.suffix == ".jsonl" and dice.random() < 0.7:
        lines = data.decode().splitlines()
        n = dice.randrange(len(lines))
        lines[n], note = mutate_json(dice, json.loads(lines[n]))
        made, note = "\n".join(lines).encode() + b"\n", f"line {n + 1}, {note}"
    elif path.suffix == ".json" and dice.random() < 0.7:
        text, note = mutate_json(dice, json.loads(data))
        made = text.encode()
    elif dice.random() < 0.05:
        path.unlink()
        return f"{path} missing"
    else:
        made, note = mutate_bytes(dice, data)
    path.write_bytes(made)
    return f"{path}: {note}"


class Bomb:
    """A pickle of it calls a function."""

    def __init__(self, function, *words):
        self.call = function, words

    def __reduce__(self):
        return self.call


def hostile_pickle(dice):
    """A pickle that makes a file called canary if it is allowed to run code."""
    bombs = (
        Bomb(os.system, "touch canary"), Bomb(open, "canary", "w"), Bomb(exec, "open('canary', 'w')"),
        Bomb(Path.touch, Path("canary")), Bomb(subprocess.call, ["touch", "canary"]), Bomb(os.mkdir, "canary"),
    )  # fmt: skip
    bomb = dice.choice(bombs)
    return pickle.dumps(dice.choice((bomb, {"a": bomb}, [bomb])), protocol=dice.randrange(6))


# --------------------------------------------------------------------------------------------------------------- kinds

LINES = {
    "train": ["tiny.py", "--data=data", "--out=new", "--budget=1K", "--lr=0.01", "--mix={'text': 0.5, 'code': 0.5}",
              "--objective={'code': 'fim(0.5)'}", "--skip=[(1, 2)]", "--decay_part=[0, 1]", "--seed=2", "--clip=1"],
    "eval": ["out/tiny", "--data=tasks", "--tasks=choice,text", "--limit=2", "--out=new.json", "--dtype=float32",
             "--samples=new.jsonl", "--sources=data", "--layout=psm", "--seed=1", "--top_p=0.9", "--temperature=0.5",
             "--tokens_per_batch=64"],
    "sample": ["out/tiny", "--prompt=The river", "--tokens=3", "--n=2", "--temperature=0.5", "--top_p=0.9", "--seed=1"],
    "study": ["study.py", "--out=studies", "--eval_tasks=tasks", "--eval_examples=2", "--budget=1024"],
    "convert": ["out/tiny", "new", "--dtype=bfloat16"],
    "plot": ["out", "--to=new.png"],
    "mixture": ["studies", "--goal=text=1,code=2"],
    "prepare": ["text=src/text", "code=src/code/1.py", "--out=new", "--vocab_size=320", "--val=0.1", "--workers=1",
                "--field=text", "--shard=0/1", "--seed=3"],
}  # fmt: skip
FIXED = {"train": ["--plan"], "study": ["--dry"], "eval": ["--device=cpu"], "sample": ["--device=cpu"]}
WORDS = (
    "", " ", "-1", "0", "1", "2", "1.5", "nan", "inf", "-inf", "1e999", "1e-320", "0x10", "1_0", "١", "None", "True",
    "true", "[1]", "{'a'", "{}", "[]", "{'text': nan}", "{'text': 1e400}", "{'text': '1/3'}", "é", "木", "\udce9",
    "x" * 5000, "~", "~nobody/x", ".", "..", "out/tiny", "src", "tiny.py", "src/text/0.txt", "data", "hf", "/dev/null",
    "/dev/null/x", "/proc/self/mem", "a\nb", "-", "--", "=", "@", "@tiny.py", "@nothing", "@hf/bin/pytorch_model.bin",
    "*", "[", "a,b", ",", "%s", "{0}", "cuda:0", "meta", "mps", "fim(2)", "__import__('os')", "(" * 300, "lambda: 0",
)  # fmt: skip
HUGE = ("1000000000", "9" * 30, "10B", "1e18", "9" * 5000)
SLOW = ("--n=", "--tokens=", "--workers=", "--seconds=")  # what is asked of these is done
OPTIONS = (
    "--help", "-h", "--fresh", "--table", "--plan", "--dry", "--generate", "--no_healing", "--nothing", "--out",
    "--infill", "--compare", "--plot=new.png", "--baseline=0.2 text", "--goal", "--prompt", "--size=7B",
    "--layout=spm", "--device=cuda:0", "--device=meta", "--init_from=out/tiny", "--n_layer=2", "--vocab_size=77",
    "--doc_mask=true", "--mix=text=1", "--epochs_max=0.001", "--eval_tasks=tasks",
)  # fmt: skip


def command_lines(dice):
    module = dice.choice([*LINES])
    argv = list(LINES[module])
    for _ in range(dice.choice((1, 1, 2, 3))):
        i = dice.randrange(len(argv)) if argv else 0
        way = dice.choice(("value", "value", "value", "drop", "again", "swap", "apart", "typo", "option", "word"))
        if way == "option" or not argv:
            argv.insert(i, dice.choice(OPTIONS))
        elif way == "value":
            name, equals, _ = argv[i].partition("=")
            words = WORDS if (name + equals).startswith(SLOW) else WORDS + HUGE
            argv[i] = name * bool(equals) + equals + dice.choice(words)
        elif way == "drop":
            del argv[i]
        elif way == "again":
            argv.append(argv[i])
        elif way == "swap":
            dice.shuffle(argv)
        elif way == "apart":
            argv[i : i + 1] = argv[i].split("=", 1)
        elif way == "typo":
            argv[i] = argv[i][: dice.randrange(len(argv[i]) + 1)] + argv[i][dice.randrange(len(argv[i]) + 1) :]
        else:
            argv.insert(i, dice.choice(WORDS))
    if module == "prepare" and all(word.startswith("-") for word in argv):
        argv.append("text=src/text")  # or it would collect this machine's Python
    return Case([module, *argv, *FIXED.get(module, [])], "", ("new", "new.json", "new.jsonl", "new.png"))


NUMBERS = (
    "10**9", "10**30", "10**400", "2**31", "2**63", "-1", "0", "1", "2", "3", "33", "1000", "1.5", "0.1", "1e308",
    "1e-320", "float('nan')", "float('inf')", "True", "'1K'", "'1e400'", "'nanB'", "'7'",
    "__import__('numpy').int64(64)",
)  # fmt: skip
VALUES = (
    *NUMBERS, "None", "''", "'x'", "'1K'", "'1e400'", "'nanB'", "b'x'", "[]", "{}", "()", "set()", "[1]",
    "{'text': 0}", "{'text': -1}", "{'text': float('nan')}", "{'text': float('inf')}", "{'text': 1e-9, 'code': 1}",
    "{'text': 'a'}", "{'text': None}", "{1: 1}", "{'': 1}", "{'..': 1}", "{'text/x': 1}", "{'text': 10**400}",
    "{f's{i}': 1 for i in range(300_000)}", "{'text': '1/3', 'code': 1}", "mix", "[mix]", "lambda: 1", "print", "int",
    "object()", "range(3)", "(x for x in [1])", "1j", "'\\ud800'", "'a' * 10**6", "'\\n'", "'a\\0b'",
    "__import__('numpy').zeros(3)", "__import__('numpy').str_('x')", "__import__('torch').tensor(3)", "[(0, 10**30)]",
    "[(1, 2), (1, 2)]", "[[5, 1]]", "[(0, 1)] * 1000", "{'*': 'fim(2)'}", "{'code': 'fim('}", "{'code': fim(0.5)}",
    "{'code': 5}", "{'*': codegen2}", "{'code': 'prefix(1, 2, 3)'}", "type('N', (int,), {})(3)", "out", "12", "33",
)  # fmt: skip
STATEMENTS = (
    "exit()", "quit(0)", "import sys; sys.exit(3)", "raise SystemExit", "1 / 0", "assert False", "x = 1", "_x = 1",
    "lr: 0.003", "lr: float = 0.003", "lr", "0.5", "mix['text'] = mix", "mix['x'] = 10**400", "mix.clear()", "del mix",
    "del lr", "globals().clear()", "from tiny import *", "from config.phase1 import *", "from config.nothing import *",
    "import config.phase1", "import nothing", "from phase import *", "import phase", "from .tiny import *", "return",
    "yield 1", "await x", "def f(:", "for name in mix: pass", "[x for x in mix]", "def f(): return f()\nf()",
    "class A: pass", "with open('tiny.py') as f: _text = f.read()", "print('said')", "raise Exception",
    "raise Exception('two\\nlines')", "raise BaseException('x')", "raise StopIteration", "raise OSError(28, 'full')",
    "raise MemoryError", "_ = " + "(" * 300 + ")" * 300, "_ = " + "-" * 100_000 + "1", "_ = " + "1+" * 50_000 + "1",
    "_ = [[]]\nfor _i in range(10**5): _ = [_]", "\tlr = 1", "  lr = 1", "# -*- coding: latin-1 -*-",
    "# -*- coding: nothing -*-", "lr = 0,01", "lr = 0.01;", "\x0c", "\0", "é = 1", "lr = ０.1", "lr = 1_0.0",
    "__name__ = 'x'", "__builtins__ = {}", "locals()['lr'] = 0.5", "lr += 1", "budget *= 2", "lr_end = lr / 0",
    "assert (lr := 0.5)", "import numpy as np; lr = np.float32(0.1)", "batch = budget", "batch = np.int64(512)",
    "from math import *", "type = 1", "size = 'nan'", "async def g(): pass", "global lr", "nonlocal lr", "a = b = 1",
    "import torch; torch.set_default_dtype(torch.float64)", "match lr:\n case _: pass",
)  # fmt: skip


IDLE = ("lr: 0.003", "lr", "0.5")  # they set nothing
SIZES = (
    "size", "n_layer", "n_head", "n_embd", "n_inner", "block_size", "vocab_size", "eval_tokens",
)  # fmt: skip


def configs(dice):
    import study
    import train

    fields = [field for field in train.Config.__dataclass_fields__.values() if field.name not in SIZES]
    numbers = [field.name for field in fields if field.type in (int, float)]
    text, is_study = PHASE, dice.random() < 0.15
    if is_study:
        text, names = STUDY, [*study.OWN]
    size = idle = False
    for _ in range(dice.choice((1, 1, 2))):
        way = dice.choice(("number", "size", "knob", "statement", "statement", "statement", "yaml", "line"))
        size |= way == "size"
        if is_study and way in ("number", "size", "knob"):
            line = f"{dice.choice(names)} = {dice.choice(VALUES)}"
        elif way == "size":
            line = f"{dice.choice(SIZES)} = {dice.choice(NUMBERS)}"
        elif way == "number":
            line = f"{dice.choice(numbers)} = {dice.choice(NUMBERS)}"
        elif way == "knob":
            line = f"{dice.choice(fields).name} = {dice.choice(VALUES)}"
        elif way == "statement":
            line = dice.choice(STATEMENTS)
            idle |= line in IDLE
        elif way == "yaml":
            text, line, idle = re.sub(r"(?m)^(\w+) = ", r"\1: ", text), "", True
        else:
            line = dice.choice(text.splitlines())[dice.randrange(6) :]
        lines = text.splitlines()
        lines.insert(dice.choice((0, len(lines))), line)
        text = "\n".join(lines) + "\n"
    data = text.encode("utf-8", "surrogatepass")
    if dice.random() < 0.15:
        endings = data.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + data, text.encode("utf-16"), b"# \xe9\n" + data
        data = dice.choice((*endings, mutate_bytes(dice, data)[0]))
        idle = False
    Path("phase.py").write_bytes(data)
    note = "\n".join(line for line in text.splitlines() if line not in (PHASE + STUDY).splitlines())
    if is_study:
        return Case(["study", "phase.py", "--dry"], note)
    words = ["train", "phase.py", "--plan", *dice.choice(([], ["tiny.py"], ["--budget=2K"]))]
    if not size and dice.random() < 0.3:
        words = ["train", "phase.py", "--data=data", "--out=new", "--budget=1024", "--batch=512"]
    return Case(words, note, check=lambda: "lines that do nothing were obeyed" if idle else None)


def metas(dice):
    note = mutate_file(dice, Path(dice.choice(("data/text", "data/code")), "meta.json"))
    commands = (
        ["train", "tiny.py", "--plan"], ["train", "tiny.py", "--out=new"], ["train", "tiny.py", "--budget=1536"],
        ["eval", "out/tiny", "--tasks=held_out", "--out=new.json"], ["study", "study.py", "--dry"],
    )  # fmt: skip
    words = dice.choice(commands)
    checks = {"--out=new": lambda: other_losses("new/tiny"), "--budget=1536": lambda: other_losses("out/tiny"),
              "--out=new.json": other_scores}  # fmt: skip
    return Case(words, note, ("out",), checks.get(words[-1]))


def other_losses(folder):
    """Says so if the log of a phase has other training losses than a run of three steps that nothing disturbed."""
    expected = json.loads(Path("losses.json").read_text())
    losses = training_losses(folder)
    return None if losses == {step: expected[step] for step in losses} else f"losses {losses} instead of {expected}"


def other_scores():
    """Says so if new.json has other bits per byte of the held-out windows than there are."""
    new, old = (json.loads(Path(name).read_text())["tasks"] for name in ("new.json", "out/tiny/eval-00000002.json"))
    for name in {"text", "code"} & set(new):  # a source may have lost its held-out part, which is said
        if new[name]["items"] != old[name]["items"]:
            return f"other scores of {name}"
    return None


def checkpoints(dice, rehash=False):
    step = Path(STEP)
    path = dice.choice([path for path in sorted(step.iterdir()) if not (rehash and path.name == "complete.json")])
    if dice.random() < 0.1 and path.suffix in ("", ".distcp"):
        path.write_bytes(hostile_pickle(dice))
        note = f"{path}: a hostile pickle"
    elif dice.random() < 0.1:
        shutil.copy(step.with_name("step-00000001") / path.name, path)
        note = f"{path}: of the step before"
    elif rehash and path.name == "state.json":
        text, note = mutate_json(dice, json.loads(path.read_text()))
        path.write_text(text)
    else:
        note = mutate_file(dice, path)
    if rehash:
        digests = {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in sorted(step.iterdir())}
        (step / "complete.json").write_text(json.dumps({k: v for k, v in digests.items() if k != "complete.json"}))
    elif dice.random() < 0.1 and path.exists():  # and the one before is no better
        shutil.copy(path, step.with_name("step-00000001"))
    return with_checkpoint(dice, note, not rehash)


def with_checkpoint(dice, note, judged):
    """A command on the checkpoint. judged: its numbers must be those of the last or of the first step."""

    def exported():
        made = Path("new/model.safetensors").read_bytes()
        originals = [Path(f"exports/{n}/model.safetensors").read_bytes() for n in (1, 2)]
        return None if made in originals else "other weights"

    def continued():
        return other_losses("out/tiny")

    commands = (
        (["convert", "out/tiny", "new"], exported), (["train", "tiny.py", "--budget=1536"], continued),
        (["train", "tiny.py", "--out=other", "--init_from=out/tiny"], None), (["train", "tiny.py", "--plan"], None),
        (["sample", "out/tiny", "--tokens=3"], None), (["sample", STEP, "--infill", "a", "b", "--layout=psm"], None),
        (["eval", "out/tiny", "--out=new.json"], None),
    )  # fmt: skip
    words, check = dice.choice(commands)
    return Case(words, note, ("out",) if words[0] == "train" else (), check if judged else None)


def rehashed(dice):
    return checkpoints(dice, rehash=True)


def training_losses(folder):
    """{step: loss} of the log of a phase."""
    records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return {str(record["step"]): record["loss"] for record in records if "loss" in record}


def shards(dice):
    split, source = dice.choice(("train", "train", "val")), dice.choice(("text", "code"))
    bare = dice.random() < 0.3
    path = Path("bare", source, f"{split}.bin") if bare else Path("data", source, f"{split}-00000.bin")
    data = path.read_bytes()
    made, note = mutate_bytes(dice, data)
    if dice.random() < 0.5:  # of the same size
        made = (made + data)[: len(data)]
    if made == data:
        made, note = data[2:] + data[:2], "turned by a token"
    path.write_bytes(made)

    def noticed():
        return None if bare else "a changed shard was taken for a good one"

    where = ["--data=bare", "--vocab_size=320"] if bare else []
    commands = [["train", "tiny.py", "--out=new", *where], ["train", "tiny.py", "--out=new", "--doc_mask=True", *where]]
    if not bare:
        commands += [["train", "tiny.py", "--budget=1536"]]
    if not bare and split == "val":
        commands += [["eval", "out/tiny", "--out=new.json"]]
    return Case(dice.choice(commands), f"{path}: {note}, {len(data)} -> {len(made)} bytes", ("out",), noticed)


def task_files(dice):
    path, damaged = dice.choice(sorted(Path("tasks").glob("*.jsonl"))), None
    if dice.random() < 0.2:
        ending, library = dice.choice(((".gz", gzip), (".xz", lzma)))
        data, note = mutate_bytes(dice, library.compress(path.read_bytes()))
        path.unlink()
        Path(f"{path}{ending}").write_bytes(data)
        note = f"{path}{ending}: {note}"
        try:
            library.decompress(data)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            damaged = f"taken although damaged: {error}"
    else:
        note = mutate_file(dice, path)
    if dice.random() < 0.2:
        others = ["train", "tiny.py", "--out=new"], ["study", "study.py", "--dry"]
        return Case([*dice.choice(others), "--eval_tasks=tasks"], note)
    options = dice.choice(([], [], [], ["--generate"], ["--limit=1"], ["--samples=new.jsonl"]))
    if options == ["--limit=1"]:
        damaged = None  # what comes after the first example is not looked at
    words = ["eval", "out/tiny", "--data=tasks", "--tasks=all", "--out=new.json", *options]
    return Case(words, note, check=lambda: damaged or strict_json("new.json"))


def strict_json(path):
    """What is wrong with a result file."""

    def refuse(word):
        raise ValueError(word)

    try:
        json.loads(Path(path).read_text(), parse_constant=refuse)
    except ValueError as error:
        return f"{path} is no JSON: {error}"


def task_groups(dice):
    note = mutate_file(dice, Path("tasks/tasks.json"))
    tasks = dice.choice(("all", "reading", "quick", "choice"))
    words = ["eval", "out/tiny", "--data=tasks", f"--tasks={tasks}", "--out=new.json", "--limit=1"]
    return Case(words, note, check=lambda: strict_json("new.json"))


def results(dice):
    path = Path("out/tiny/eval-00000002.json")
    shutil.copy(path, "other.json")
    note = mutate_file(dice, path)
    commands = (
        ["--compare", str(path), "other.json"], ["--compare", "other.json", str(path)], [str(path), "--plot=new.png"],
        [str(path), "other.json", "--plot=new.png"], ["out/tiny", "--data=tasks"],
        ["out/tiny", "--data=tasks", "--samples=new.jsonl"],
    )  # fmt: skip
    words = ["eval", *dice.choice(commands)]
    again = "--data=tasks" in words
    return Case(words, note, ("out",) * again, (lambda: strict_json(path)) if again else None)


def study_results(dice):
    note = mutate_file(dice, dice.choice(sorted(Path("studies").glob("*/*.json"))))
    study = ["study", "study.py", "--eval_tasks=tasks"]
    return Case(dice.choice(([*study, "--table"], [*study, "--dry"], ["mixture", "studies"])), note, ("studies",))


def logs(dice):
    note = mutate_file(dice, Path("out/tiny/log.jsonl"))
    if dice.random() < 0.7:
        return Case(["plot", dice.choice(("out", "out/tiny")), "--to=new.png"], note)
    return Case(["train", "tiny.py", "--budget=1536"], note, ("out",))


def hugging_face(dice):
    """config.json, weights in any of three forms and what lies beside them."""
    folder = Path("hf", dice.choice(("whole", "parts", "bin")))
    path = dice.choice([path for path in sorted(folder.iterdir()) if not path.name.startswith("tokenizer")])
    judged = False
    if path.suffix == ".safetensors" and dice.random() < 0.7:
        note, judged = mutate_safetensors(dice, path), True
    elif path.suffix == ".bin" and dice.random() < 0.4:
        note = f"{path}: a hostile pickle"
        path.write_bytes(hostile_pickle(dice) if dice.random() < 0.5 else in_zip(path, hostile_pickle(dice)))
    else:
        note = mutate_file(dice, path)

    def same_weights():
        return None if weights_of("new") == weights_of("imported") else "other weights"

    words, then = ["convert", str(folder), "new"], ["sample", "new", "--tokens=3"]
    return Case(words, note, check=same_weights if judged else None, then=then)


def mutate_safetensors(dice, path):
    """Change the length or the header of a file -> what was done."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    way = dice.choice(("length", "offsets", "offsets", "shape", "dtype", "json", "json", "bytes", "more", "names"))
    names = [name for name in header if name != "__metadata__"]
    name, other = dice.sample(names, 2)
    about, end = header[name], len(rest)
    if way == "length":
        length = dice.choice((0, 1, size - 1, size + 1, size + 8, len(data), 1 << 31, (1 << 63) - 1, (1 << 64) - 1))
        path.write_bytes(length.to_bytes(8, "little") + data[8:])
        return f"{path}: length {length} instead of {size}"
    if way == "offsets":
        begin, stop = about["data_offsets"]
        about["data_offsets"] = dice.choice((
            [begin + 2, stop + 2], [begin - 4, stop - 4], [begin, stop - 1], [stop, begin], [begin], [], None, [0, 0],
            header[other]["data_offsets"], [-1000, stop - begin - 1000], [end, end + stop - begin], [begin, 10**30],
            [begin + 0.5, stop + 0.5], ["0", "4"], [True, stop], [begin, stop, stop], [float("nan"), stop],
        ))  # fmt: skip
        note = f"{name} at {about['data_offsets']} instead of {[begin, stop]}"
    elif way == "shape":
        first, *others = shape = about["shape"]
        about["shape"] = dice.choice((
            [-1, *others], shape[::-1], [*shape, 1], [1, *shape], [], [0], None, "x", [first * 2, *others], [10**18],
            [float(first), *others], [str(first), *others], [None], [-n for n in shape], [True, *shape], shape[:-1],
        ))  # fmt: skip
        note = f"{name} of shape {about['shape']} instead of {shape}"
    elif way == "dtype":
        about["dtype"] = dice.choice(("F16", "BF16", "F64", "I32", "U8", "F8_E4M3", "f32", "", None, 3, [], "BOOL"))
        note = f"{name} in {about['dtype']}"
    elif way == "names":
        header[dice.choice((other, "", "x", "lm_head.weight", name + ".bias", "__metadata__"))] = header.pop(name)
        note = f"{name} under another name"
    elif way == "more":
        rest = rest + bytes(dice.choice((1, 4, 1 << 20)))
        note = f"{len(rest) - end} bytes more"
    text = json.dumps(header).encode()
    if way == "json":
        text, note = mutate_json(dice, header)
        text = text.encode()
    elif way == "bytes":
        text, note = mutate_bytes(dice, text)
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    return f"{path}: {note}"


def in_zip(path, data):
    """The bytes of a torch.save file with another data.pkl."""
    made = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w") as new:
        for info in old.infolist():
            new.writestr(info, data if info.filename.endswith("data.pkl") else old.read(info))
    return made.getvalue()


def weights_of(path):
    """{name: bytes} of the parameters in a checkpoint."""
    from sample import load_model

    model, _, _ = load_model(path)
    return {name: p.detach().numpy().tobytes() for name, p in model.named_parameters()}


def tokenizer_files(dice):
    folder = Path("hf/whole")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("nanocrystal_tokenizer", "_"))
    note = mutate_file(dice, dice.choice(sorted(folder.glob("tokenizer*.json"))))
    if dice.random() < 0.5:
        return Case(["convert", str(folder), "new"], note, then=["sample", "new", "--prompt=A river", "--tokens=3"])

    def given_back():
        import tokenizer

        encoding = tokenizer.load(f"{folder}/tokenizer.json")
        for source in ("text", "code"):
            ids = np.fromfile(f"new/{source}/train-00000.bin", "<u2")
            ends = np.flatnonzero(ids == tokenizer.eot(encoding)) + 1
            documents = {encoding.decode(part[:-1].tolist()) for part in np.split(ids, ends)[:-1]}
            if documents != {path.read_text() for path in Path("src", source).iterdir()}:
                return f"the documents of {source} are not given back"
        return None

    words = ["prepare", "text=src/text", "code=src/code", "--out=new", f"--tokenizer={folder}/tokenizer.json"]
    then = ["train", "tiny.py", "--data=new", "--out=other"]
    return Case([*words, "--val=0", "--workers=1"], note, check=given_back, then=then)


def inputs(dice):
    """What prepare.py reads. The documents of all files but one must be there, whatever happened to that one."""
    paths = sorted(Path("in").iterdir())
    path = dice.choice(paths)
    note = mutate_file(dice, path)

    def others():
        n = json.loads(Path("new/s/meta.json").read_text())["read"]["documents"]
        return None if n >= (len(paths) - 1) * DOCUMENTS else f"{n} documents of {len(paths)} files of {DOCUMENTS}"

    words = ["prepare", "s=in", "--out=new", "--vocab_size=320", "--val=0.1", "--workers=1"]
    return Case(words, note, check=others)


KINDS = {
    kind.__name__: kind
    for kind in (command_lines, configs, metas, checkpoints, rehashed, shards, task_files, task_groups, results,
                 study_results, logs, hugging_face, tokenizer_files, inputs)
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ what is mutated


def build():
    """Fill the working folder: data, a run of two steps, the losses of one of three, exports, results, a study."""
    import torch

    import convert
    import eval as evaluation
    import study
    import train
    from convert import read_safetensors, write_safetensors

    words = ("river", "stone", "lamp", "garden", "winter", "clock", "paper", "bridge", "copper", "violet", "hollow")
    for name, ending in (("text", "txt"), ("code", "py")):
        Path("src", name).mkdir(parents=True)
        for i in range(8):
            dice = random.Random(f"{name} {i}")
            body = [" ".join(dice.choices(words, k=150)), f"def f{i}(x):\n    return x * {i}\n" * 20][name == "code"]
            Path("src", name, f"{i}.{ending}").write_text(body + "\n")
    Path("in").mkdir()
    for k, ending in enumerate((".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet")):
        texts = [f"{ending} {i}. " + " ".join(random.Random(f"{k} {i}").choices(words, k=9)) for i in range(DOCUMENTS)]
        with contextlib.suppress(ImportError):
            Path("in", f"file{k}{ending}").write_bytes(packed(texts, ending))
    Path("tiny.py").write_text(PHASE)
    Path("study.py").write_text(STUDY)
    Path("tasks").mkdir()
    for name, examples in TASKS.items():
        lines = [json.dumps({"kind": name} | example) + "\n" for example in examples]
        Path("tasks", f"{name}.jsonl").write_text("".join(lines))
    shutil.copy("tasks/choice.jsonl", "tasks/sciq.jsonl")  # one of the quick ones, which training may read
    Path("tasks/tasks.json").write_text(json.dumps({name: {"group": "reading"} for name in TASKS}))
    command = ["text=src/text", "code=src/code", "--out=data", "--vocab_size=320", "--val=0.1", "--workers=1"]
    subprocess.run([sys.executable, str(ROOT / "prepare.py"), *command], check=True, stdout=subprocess.DEVNULL)
    for source in ("text", "code"):
        Path("bare", source).mkdir(parents=True)
        for split in ("train", "val"):
            shutil.copy(f"data/{source}/{split}-00000.bin", f"bare/{source}/{split}.bin")

    def do(module, *argv):
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            assert module.main([*argv]) == 0, argv

    do(train, "tiny.py")
    do(train, "tiny.py", "--out=longer", "--budget=1536")
    Path("losses.json").write_text(json.dumps(training_losses("longer/tiny")))
    shutil.rmtree("longer")
    for n in (1, 2):
        do(convert, f"out/tiny/checkpoints/step-{n:08}", f"exports/{n}")
    do(convert, "exports/2", "imported")
    for name in ("whole", "parts", "bin"):
        shutil.copytree("exports/2", f"hf/{name}")
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(Path("exports/2/model.safetensors")).items()}
    torch.save(tensors, "hf/bin/pytorch_model.bin")
    os.unlink("hf/bin/model.safetensors")
    os.unlink("hf/parts/model.safetensors")
    index = {}
    for n in (0, 1):
        name = f"model-{n}.safetensors"
        write_safetensors(Path("hf/parts", name), dict([*tensors.items()][n::2]))
        index |= dict.fromkeys([*tensors][n::2], name)
    Path("hf/parts/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    do(evaluation, "out/tiny", "--data=tasks", "--tasks=choice,code,held_out", "--generate")

    def in_this_process(self, command, log, claim):
        do({"train.py": train, "eval.py": evaluation}[Path(command[0]).name], *command[1:])

    study.Worker.do = in_this_process
    do(study, "study.py", "--eval_tasks=tasks")
    for folder in Path("studies").glob("*/*/checkpoints"):  # large, and not read again
        shutil.rmtree(folder)


def packed(texts, ending):
    """The bytes of a file that holds documents. ImportError."""
    if ending == ".parquet":
        from pyarrow import BufferOutputStream, parquet, table

        parquet.write_table(table({"text": texts}), made := BufferOutputStream())
        return made.getvalue().to_pybytes()
    lines = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts).encode()
    if ending.endswith("zst"):
        import zstandard

        return zstandard.compress(lines)
    return {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.xz": lzma.compress}[ending](lines)


def warm_up():
    """Import what commands import late, so that no fork has to."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader  # noqa: F401

    import convert  # noqa: F401
    import mixture  # noqa: F401
    import plot  # noqa: F401
    import prepare  # noqa: F401
    import study  # noqa: F401
    from model import GPT, GPTConfig

    torch.set_num_threads(1)
    with torch.device("meta"):
        GPT(GPTConfig())
    with contextlib.suppress(ImportError):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot


# --------------------------------------------------------------------------------------------------------------- trying


class Hang(BaseException):
    pass


class Left(BaseException):
    """Whoever ends the process itself, instead of returning from main; its argument is the exit code."""


@dataclass
class Outcome:
    verdict: str
    what: str = ""
    where: str = ""
    case: Case = field(default_factory=lambda: Case([], ""))


def attempt(name, to):
    """In a fork, in a folder of its own: mutate, run, judge; the outcome goes to a file as JSON."""
    os.setpgid(0, 0)
    os.environ["HOME"] = os.getcwd()
    case = KINDS[name.partition("/")[0]](random.Random(name))
    before = contents()
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"../{stream}", os.O_WRONLY | os.O_CREAT), number)
    outcome = judge(case, *run(case))
    if outcome.verdict in ("right", "refused") and (what := harm(case, before)):
        outcome = Outcome("wrong", what)
    about = vars(outcome) | {"case": {k: v for k, v in vars(case).items() if k != "check"}}
    Path(to).write_text(json.dumps(about))
    os._exit(0)


def run(case):
    """(exit code, None), or (None, what was raised)."""
    import errors

    def late(*_):
        raise Hang

    def leave(code):
        if os.getpid() != me:
            at_once(code)
        raise Left(code)

    here, me, at_once = os.getcwd(), os.getpid(), os._exit
    os._exit = leave
    sys.stdout, sys.stderr = errors.terminal(1), errors.terminal(2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    code = 0
    try:
        for module, *argv in filter(None, (case.words, case.then)):
            code = code or sys.modules[module].main(argv) or 0
        return code, None
    except Left as error:
        return error.args[0], None
    except BaseException as error:
        return None, error
    finally:
        signal.alarm(0)
        os._exit = at_once
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.chdir(here)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()


def judge(case, code, error):
    """Outcome of a command that has ended."""
    said = Path("../stderr").read_text(errors="replace")
    if isinstance(error, SystemExit) and error.code in (0, None) and {"-h", "--help"} & {*case.words}:
        return Outcome("right")
    if error is not None:
        trace = "".join(traceback.format_exception(error))
        print(trace, file=sys.stderr, flush=True)
        return Outcome("hang" if isinstance(error, Hang) else "trace", *last_frame(trace))
    if "Traceback" in said:
        return Outcome("trace", *last_frame(said))
    if code == 0:
        what = case.check() if case.check else None
        return Outcome("wrong", what) if what else Outcome("right")
    if code != 2:
        return Outcome("wrong", f"exit code {code}: {said[:160]}")
    lines = [line for line in said.splitlines() if line.strip() and not is_warning(line)]
    if len(lines) != 1:
        return Outcome("wrong", f"{len(lines)} lines on stderr: {said[:160]}")
    return Outcome("refused", lines[0])


def last_frame(trace):
    """(what was raised, file:function) of the last trace in a text, in the last of this project's functions."""
    places = re.findall(rf'File "{ROOT}/([\w/]+\.py)", line \d+, in (\S+)', trace)
    raised = re.findall(r"(?m)^(?:\w+\.)*(\w*(?:Error|Exception|Exit|Interrupt|Iteration|Hang|Warning)\b.*)", trace)
    places = [f"{file}:{function}" for file, function in places if file != Path(__file__).name]
    return (raised or [trace])[-1][:200], (places or [""])[-1]


def is_warning(line):
    """A line of Python's, or of a library's, warnings, or of the code that it quotes."""
    return re.search(r"Warning\b|^\[?W\d{4}", line) or line.startswith("  ")


def contents():
    """{path: digest} of all files under the working folder."""
    paths = [path for path in Path().rglob("*") if path.is_file() and not path.is_symlink()]
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in paths}


def harm(case, before):
    """What a command did to the files that it found, or left lying about; None if nothing."""
    if Path("canary").exists():
        return "code of the input has run"
    after = contents()
    for path, digest in before.items():
        if path.parts[0] not in case.changes and after.get(path) != digest:
            return f"{path} was {'changed' if path in after else 'removed'}"
    for path in {*after} - {*before}:
        if path.suffix == ".tmp" or any(part.startswith(".") and part != ".metadata" for part in path.parts):
            return f"{path} was left behind"
    return None


def explore(name, world, keep=False):
    """Try one mutation -> Outcome."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    here = folder / "here"
    shutil.copytree(world, here, copy_function=shutil.copyfile)
    process = fork(here, attempt, name, folder / "outcome")
    process.join(SECONDS + 20)
    if process.is_alive():
        outcome = Outcome("hang", "deaf to signals")
    elif (folder / "outcome").exists():
        about = json.loads((folder / "outcome").read_text())
        outcome = Outcome(**about | {"case": Case(**about["case"])})
    else:
        outcome = Outcome("trace", f"died with exit code {process.exitcode}")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    if keep:
        for stream in ("stdout", "stderr"):
            print(f"---- {stream}\n{(folder / stream).read_text(errors='replace')[-6000:]}")
        print(f"---- in {here}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def fork(folder, function, *args):
    """A process that calls a function in a folder."""

    def there():
        os.chdir(folder)
        function(*args)

    process = multiprocessing.get_context("fork").Process(target=there)
    process.start()
    return process


def main(words):
    """Prints the table, or what came of one mutation; 1 if there is a fault."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false",
                   "MALLOC_ARENA_MAX": "2"}  # fmt: skip
    warm_up()
    with tempfile.TemporaryDirectory() as world:
        builder = fork(world, build)
        builder.join()
        if builder.exitcode:
            return 1
        if "/" in words[0]:
            outcome = explore(words[0], world, keep=True)
            print(f"{words[0]}: {outcome}")
            return outcome.verdict not in ("right", "refused")
        kinds = words[1:] or KINDS
        return report((kind, [explore(f"{kind}/{n}", world) for n in range(int(words[0]))]) for kind in kinds)


def report(outcomes):
    """Print (kind, [Outcome, ...]), ... -> whether there is a fault."""
    verdicts = ("right", "refused", "trace", "hang", "wrong")
    print(f"{'mutated':<16}{'n':>6}" + "".join(f"{verdict:>9}" for verdict in verdicts))
    faults = collections.defaultdict(list)
    for kind, tried in outcomes:
        counts = collections.Counter(outcome.verdict for outcome in tried)
        print(f"{kind:<16}{len(tried):>6}" + "".join(f"{counts[verdict]:>9}" for verdict in verdicts), flush=True)
        for n, outcome in enumerate(tried):
            if outcome.verdict not in ("right", "refused"):
                what = re.sub(r"\d+|'[^']*'", "_", outcome.what.partition(":")[0])
                faults[kind, outcome.verdict, outcome.where or outcome.what[:60], what].append((n, outcome))
    for (kind, verdict, where, _), some in faults.items():
        n, outcome = some[0]
        print(f"\n{kind}/{n}  {verdict}  {where}  {outcome.what}")
        print(f"    {' '.join(outcome.case.words)[:300]}")
        print(f"    {outcome.case.note[:300]}")
        if some[1:]:
            print(f"    and {len(some) - 1} more like this: {', '.join(str(n) for n, _ in some[1:10])}")
    return bool(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits memory")
def test_mutated_files_and_command_lines_give_what_is_right_or_one_line():
    done = subprocess.run([sys.executable, __file__, str(SHORT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
