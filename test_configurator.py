"""Configs and command lines as people write them: each means what it says, or one line tells what to write."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import infill
import train
from configurator import ConfigError, read_command_line, split_words
from model import PRESETS

ROOT = Path(__file__).parent
PHASE = "n_layer, n_head, n_embd, block_size = 1, 2, 32, 32\nbudget, batch = 1024, 512\n"


def read(*argv):
    ((_, cfg),), _ = read_command_line([*map(str, argv)], train.Config, PRESETS, ("plan",), infill.OBJECTIVES)
    return cfg


SETS_NOTHING = {
    "YAML": "lr: 0.003\nbudget: 1024\n",
    "an annotation among values": PHASE + "lr: 0.003\n",
    "JSON": '{"lr": 0.003, "budget": 1024}\n',
    "TOML with a table": "[model]\nlr = 0.003\n",
    "a comparison": PHASE + "lr == 0.003\n",
    "an annotation below a condition": PHASE + "if True:\n    lr: 0.003\n",
    "a name alone": PHASE + "try:\n    pass\nexcept ValueError:\n    lr\n",
    "nothing at all": "",
    "comments alone": '"""Phase 1."""\n# lr = 0.003\n',
    "names of its own alone": "_x = 3\n",
}


@pytest.mark.parametrize("case", SETS_NOTHING)
def test_a_config_that_sets_nothing_is_refused(case, tmp_path):
    (tmp_path / "phase.yaml").write_text(SETS_NOTHING[case])
    with pytest.raises(ConfigError, match=r"phase.yaml.* (sets nothing|no knob).*write \w") as error:
        read(tmp_path / "phase.yaml")
    assert "\n" not in str(error.value)
    (tmp_path / "outer.py").write_text(f"{PHASE}from inner import *\n")
    shutil.move(tmp_path / "phase.yaml", tmp_path / "inner.py")
    if "sets nothing" in str(error.value):  # in what is imported, too
        with pytest.raises(ConfigError, match=r"inner.py.*sets nothing"):
            read(tmp_path / "outer.py")


def test_texts_and_calls_are_no_statements_that_set_nothing(tmp_path):
    (tmp_path / "a.py").write_text(f'"""Doc."""\n{PHASE}"a comment"\nmix.update(text=3)\n[print(n) for n in ()]\n...\n')
    assert read(tmp_path / "a.py").mix == {"text": 3, "code": 0.5}
    (tmp_path / "b.py").write_text("mix['text'] = 0.9\n")  # no assignment of a knob, but a knob that is set
    assert read(tmp_path / "b.py").mix == {"text": 0.9, "code": 0.5}
    (tmp_path / "c.py").write_text("lr = 0.003\n")  # overruled, and still a config that sets something
    assert read(tmp_path / "c.py", "--lr=0.004").lr == 0.004
    (tmp_path / "d.py").write_text("globals().update(lr_peak=0.003, n_layer=2)\nlr_end = lr_peak\n")
    assert read(tmp_path / "d.py", "--lr_peak=0.004").lr_end == 0.004 and read(tmp_path / "d.py").n_layer == 2


IMPORTS = {
    "a shipped one": ("from config.phase1 import *\nshare = 0.5\n", {}, ("lr_end", pytest.approx(0.7319 * 0.012))),
    "a shipped one as a module": ("from config import phase1\nlr = phase1.lr_peak\n", {}, ("lr", 0.012)),
    "one beside it": ("from base import *\n", {"base.py": "lr_end = lr_peak / 2\n"}, ("lr_end", 0.006)),
    "one beside it, relative": ("from .base import *\n", {"base.py": "lr_end = lr_peak / 2\n"}, ("lr_end", 0.006)),
    "one beside it as a module": ("import base\nlr = base._lr\n", {"base.py": "_lr = lr_peak\n"}, ("lr", 0.012)),
    "one in a folder": ("import a.b as x\nlr = x.lr\n", {"a/b.py": "lr = 2 * lr_peak\n"}, ("lr", 0.024)),
    "one with an objective": (
        "from base import *\n", {"base.py": "objective = {'code': fim(0.9)}\n"}, ("objective", {"code": "fim(0.9)"}),
    ),
    "one in the folder above": ("from config.x import *\n", {"../config/x.py": "lr = lr_peak\n"}, ("lr", 0.012)),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPORTS)
def test_a_config_means_the_same_from_every_folder(case, tmp_path, monkeypatch):
    text, others, (knob, value) = IMPORTS[case]
    mine = tmp_path / "mine"
    for name, content in {"half.py": text, **others}.items():
        (mine / name).resolve().parent.mkdir(parents=True, exist_ok=True)
        (mine / name).resolve().write_text(content)
    for folder in (tmp_path, ROOT, ROOT / "config"):
        monkeypatch.chdir(folder)
        assert getattr(read(mine / "half.py", "--lr_peak=0.012"), knob) == value


def test_a_config_that_python_has_imported_by_itself_is_still_a_config(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "config.phase1", SimpleNamespace(__file__=str(ROOT / "config/phase1.py"), lr=9.0))
    (tmp_path / "half.py").write_text("from config.phase1 import *\n")
    assert read(tmp_path / "half.py", "--lr_peak=0.012").lr_end == pytest.approx(0.7319 * 0.012)


def test_a_config_imports_modules_as_python_does_and_never_itself(tmp_path):
    (tmp_path / "a.py").write_text("import math\nfrom os.path import join\nfrom mix import Mix\nlr = math.pi\n")
    assert read(tmp_path / "a.py").lr == pytest.approx(3.14159, rel=1e-5)
    (tmp_path / "a.py").write_text("from b import *\n")
    (tmp_path / "b.py").write_text("from a import *\n")
    with pytest.raises(ConfigError, match=r"a.py imports itself"):
        read(tmp_path / "a.py")


BYTES = {
    "a byte order mark": b"\xef\xbb\xbf" + PHASE.encode(),
    "a declared encoding": ("# coding: latin-1\n_x = 'é'\nassert len(_x) == 1\n" + PHASE).encode("latin-1"),
    "lines that end as on Windows": PHASE.replace("\n", "\r\n").encode(),
    "no end of line": PHASE.encode().rstrip(),
}  # fmt: skip


@pytest.mark.parametrize("case", BYTES)
def test_a_config_is_read_as_python_reads_it(case, tmp_path):
    (tmp_path / "a.py").write_bytes(BYTES[case])
    assert read(tmp_path / "a.py").budget == 1024


NO_CONFIG = {
    "a stray variable of a loop": ("for name in mix:\n    pass\n", "no knob 'name'.*begin names of your own with _"),
    "a call of exit": ("exit()\n", "exit"),
    "another encoding": (PHASE.encode("utf-16"), "not Python|null bytes"),
    "a mistake in the syntax": ("lr = 0.003\nmix = {\n", r"line \d, is not Python"),
    "an error": ("lr = 1 / 0\n", "ZeroDivisionError"),
    "a word of YAML": ("doc_mask = true\n", "no name true; write True"),
    "a text without quotation marks": ("mix = {text: 1}\n", "no name text; a text is written 'text'"),
    "a model of a billion layers": ("n_layer = 10**9\n", "n_layer"),
    "a share without end": ("share = 1e300\n", "share = 1e.300 is more"),
    "a number that cannot be spelt": ("seed = -10**5000\n", r"seed is beyond 2\*\*62"),
    "a number of another type that cannot be spelt": ("lr = 10**5000\n", r"lr is beyond 2\*\*62"),
    "more than can be a float": ("block_size = 10**400\n", r"block_size is beyond 2\*\*62"),
    "more tokens than there are numbers": ("share = budget = 2**40\n", "more tokens than can be counted"),
    "a skip without end": ("skip = [(0, 10**30)]\n", "is not a list of"),
    "a path that is none": ("eval_tasks = '\\0'\n", "eval_tasks = .* is no path"),
    "an objective of a number": ("objective = {3: 'fim(1)'}\n", "objective names 3"),
    "a weight without end": ("mix = {'text': '1e999999999'}\n", "text"),
    "a knob that is a list": ("lr = [0.003]\n", "lr = .*a number such as"),
}


@pytest.mark.parametrize("case", NO_CONFIG)
def test_what_is_wrong_in_a_config_is_said_in_one_line(case, tmp_path, data, capsys):
    text, words = NO_CONFIG[case]
    content = text if isinstance(text, bytes) else (PHASE + text).encode()
    (tmp_path / "a.py").write_bytes(content)
    assert train.main([str(tmp_path / "a.py"), f"--data={data}", "--plan"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(words, err), err


def test_numbers_of_other_packages_and_paths_are_values(tmp_path):
    (tmp_path / "a.py").write_text(
        "import numpy as np\nfrom fractions import Fraction as _F\nfrom pathlib import Path\n"
        "lr, batch, seed = np.float32(0.5), np.int64(512), np.uint8(3)\ndecay_part = np.array([0.0, 0.5])\n"
        "mix = {'text': np.float64(0.25), 'code': _F(1, 3)}\nout = Path('there')\ndoc_mask = np.True_\n"
    )
    cfg = read(tmp_path / "a.py")
    assert (cfg.lr, cfg.batch, cfg.seed, cfg.decay_part, cfg.doc_mask) == (0.5, 512, 3, [0.0, 0.5], True)
    assert cfg.mix == {"text": 0.25, "code": "1/3"} and cfg.out == "there"
    json.dumps(vars(cfg))


TYPED = {
    "--doc_mask=true": ("doc_mask", True), "--compile=no": ("compile", "no"), "--recompute=Off": ("recompute", False),
    "--lr=1e-3": ("lr", 1e-3), "--share=95%": ("share", 0.95), "--budget=2.5M": ("budget", 2_500_000),
    "--budget=1e6": ("budget", 1_000_000), "--mix=text=0.5,code=0.5": ("mix", {"text": 0.5, "code": 0.5}),
    "--mix={'text': 1}": ("mix", {"text": 1}), "--objective=code=fim(0.9)": ("objective", {"code": "fim(0.9)"}),
    "--objective=code=fim(0.5, spm=0),text=prefix(1)": ("objective", {"code": "fim(0.5, spm=0)", "text": "prefix(1)"}),
    "--lr 0.01": ("lr", 0.01), "--mix text=1": ("mix", {"text": 1}), "--data ~": ("data", str(Path.home())),
    "--out=~/a b": ("out", str(Path.home() / "a b")), "--decay_part=(0, 0.5)": ("decay_part", [0, 0.5]),
}  # fmt: skip


@pytest.mark.parametrize("words", TYPED)
def test_what_people_type_is_taken(words, tmp_path):
    (tmp_path / "a.py").write_text(PHASE)
    knob, value = TYPED[words]
    argv = words.split(" ", 1) if words.startswith(("--lr ", "--mix ", "--data ")) else [words]
    for order in ([tmp_path / "a.py", *argv], [*argv, tmp_path / "a.py"], [tmp_path / "a.py", *argv, "--plan"]):
        assert getattr(read(*order), knob) == value


REFUSED = {
    "--doc_mask=maybe": "True or False", "--mix=none": "{'text': 0.5", "--budget=1.5": "a whole number such as",
    "--budget=10,000": "a whole number such as", "--lr=nan": "a number such as", "--plan=yes": "--plan takes no value",
    "--doc_mask": "--doc_mask=True", "--lr": "--lr=", "--learning_rate=1": "there is no knob", "--": "there is no knob",
    "--lr-peak=0.01": "did you mean 'lr_peak'", "--LR=0.01": "did you mean 'lr'",
    "--resume=1": "at the top of train.py",
    "--objective={'code': fim(0.9)}": "{'code': 'fim(0.9)'}", "lr=0.01": "a knob is written --lr=0.01",
    "config/phase1": "did you mean", "--mix={text:0.5}": "{'text': 0.5", "--mix=text=1,code": "{'text': 0.5",
    "--seed=" + "9" * 400 + ".5": "seed", "--mix=" + "[" * 9999: "mix",
}  # fmt: skip


@pytest.mark.parametrize("word", REFUSED, ids=lambda word: word[:24])
def test_what_cannot_be_meant_says_what_to_type(word, tmp_path):
    (tmp_path / "a.py").write_text(PHASE)
    with pytest.raises(ConfigError) as error:
        read(tmp_path / "a.py", word)
    assert REFUSED[word] in str(error.value) and len(str(error.value)) < 500


def test_help_is_help_wherever_it_stands(capsys):
    for argv in (["-h"], ["--help"], ["nowhere.py", "--help"], ["--lr=fast", "-h"]):
        assert train.main(argv) == 0 and "python train.py" in capsys.readouterr().out
    assert split_words(["a", "--b=c=d", "--e", "f", "--g"], {"g"}) == (["a"], {"b": "c=d", "e": "f"}, {"g"})
