"""What eval.py promises: its numbers against arithmetic done another way, and against others' programs if installed."""

import dataclasses
import gzip
import itertools
import json
import lzma
import math
import os
import random
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

import checkpoint
import eval as evaluation
import plot
import sample
import tokenizer
import train
from conftest import losses, run
from model import GPT, GPTConfig, init_weights
from test_processes import trained

ENCODING = tokenizer.load(vocab_size=512)
EOT = tokenizer.eot(ENCODING)


@pytest.fixture(scope="module")
def model():
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=640, vocab_real=ENCODING.n_vocab)
    model = GPT(config).eval()
    init_weights(model, seed=1)
    return model


def alone(model, context, ids):
    """Sum of log-probabilities of ids after a context, and whether all are the likeliest, from one plain pass."""
    whole = torch.tensor([*context, *ids])[-model.config.block_size - 1 :]
    logs = model(whole[None, :-1])[0].log_softmax(-1)[-len(ids) :]
    goal = whole[-len(ids) :][-len(logs) :]
    return logs.gather(1, goal[:, None]).sum().item(), bool((logs.argmax(1) == goal).all())


def test_packed_continuations_have_the_likelihoods_that_each_has_alone(model):
    dice = random.Random(0)

    def ids(least, most):
        return [dice.randrange(500) for _ in range(dice.randint(least, most))]

    asked = [([EOT, *ids(0, 30)], [ids(1, 12) for _ in range(dice.randint(1, 5))]) for _ in range(200)]
    asked += [([EOT, *ids(60, 90)], [ids(1, 12), ids(20, 30)]), ([EOT], [ids(70, 90)]), ([EOT], [ids(64, 64)])]
    asked += [([EOT, 5], [[], [6]])]  # nothing has the likelihood 1
    logs, greedy = evaluation.log_likelihoods(model, asked, tokens_per_batch=256)
    assert logs[-2] == 0 and greedy[-2]
    logs, greedy, asked[-1] = np.delete(logs, -2), np.delete(greedy, -2), ([EOT, 5], [[6]])
    expected = [alone(model, context, some) for context, many in asked for some in many]
    assert np.abs(logs - [log for log, _ in expected]).max() < 1e-4
    assert greedy.tolist() == [right for _, right in expected]
    rows = evaluation.pack(asked, 64)
    assert len(rows) < len(logs) / 3  # and does so in far fewer rows


def test_a_model_that_knows_nothing_gives_every_token_one_in_its_vocabulary(model):
    blank = GPT(model.config).eval()
    for p in blank.parameters():
        torch.nn.init.zeros_(p)
    asked = [([EOT, 1, 2], [[3], [4, 5, 6]]), ([EOT], [[7] * 64])]
    logs, _ = evaluation.log_likelihoods(blank, asked)
    assert logs == pytest.approx([-n * math.log(ENCODING.n_vocab) for n in (1, 3, 64)])


def test_contexts_and_continuations_are_cut_as_one_text():
    encode = ENCODING.encode_ordinary
    for context, continuation, body, rest in (
        ("The cat", " sat", "The cat", " sat"),
        ("def f(x):\n", "    return x", "def f(x):", "    return x"),  # "):" and "):\n" are one token each
        ("", "word", "", "word"),
        ("a  ", "b", "a", "  b"),
    ):
        head, ids = evaluation.split(encode, context, continuation)
        assert (ENCODING.decode(head), ENCODING.decode(ids)) == (body, rest)
    joined = encode("return")
    assert evaluation.split(encode, "retu", "rn")[1] == joined[len(encode("retu")) :]


@pytest.mark.parametrize("n, c, k", [(1, 0, 1), (5, 2, 1), (5, 2, 3), (7, 7, 2), (6, 4, 3)])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_one(n, c, k):
    subsets = list(itertools.combinations(range(n), k))
    assert evaluation.pass_at(k, n, c) == pytest.approx(sum(min(s) < c for s in subsets) / len(subsets))


def test_a_task_is_read_scored_and_summed_up_by_hand(tmp_path, model, monkeypatch):
    examples = [
        {"kind": "choice", "id": n, "context": "c", "sep": " ", "choices": ["a", "bb", "cc"], "answer": n % 2}
        for n in range(4)
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
    (task,) = evaluation.read_tasks(tmp_path, ["t"], None)
    logs = np.array([[-1, -3, -5], [-1, -3, -5], [-2, -2, -2], [-9, -4, -3]], float)
    monkeypatch.setattr(evaluation, "log_likelihoods", lambda *args: (logs.flatten(), logs.flatten() < 0))
    items = evaluation.score(task, model, ENCODING, "psm", None, 1024)
    assert items["acc"] == [1, 0, 1 / 3, 0] and items["given"] == [0, 0, 0, 2]
    assert items["acc_norm"] == [1, 0, 0, 0]  # -1 -1.5 -2.5; the same; -2 -1 -1; -9 -2 -1.5
    assert items["p"] == pytest.approx(
        [0.8668, 0.1173, 1 / 3, math.exp(-4) / sum(map(math.exp, (-9, -4, -3)))], abs=1e-4
    )
    assert items["bits"] == pytest.approx([1 / math.log(2), 3 / math.log(2), 2 / math.log(2), 4 / math.log(2)])
    assert items["bytes"] == [2, 3, 2, 3]
    made = evaluation.summary(task, items)
    assert made["scores"]["acc"]["mean"] == pytest.approx(1 / 3)
    assert made["scores"]["acc"]["se"] == pytest.approx(np.std([1, 0, 1 / 3, 0], ddof=1) / 2)
    assert made["scores"]["bpb"]["mean"] == pytest.approx((0.5 + 1 + 1 + 4 / 3) / 4 / math.log(2))
    assert (made["chance"], made["constant"]) == (pytest.approx(1 / 3), 0.5)
    assert made["entropy"] == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))


def test_texts_are_scored_token_by_token_with_windows_of_full_contexts(model):
    ids = [EOT, *random.Random(1).choices(range(500), k=150)]
    asked = evaluation.requests({"ids": ids}, "text", None, EOT, None, None, 64)
    assert [t for _, (some,) in asked for t in some] == ids[1:]  # each once
    assert [len(context) for context, _ in asked] == [1, 1, 64 + 1 - 22]
    logs, _ = evaluation.log_likelihoods(model, asked)
    assert logs == pytest.approx([alone(model, context, some)[0] for context, (some,) in asked], abs=1e-3)


# -------------------------------------------------------------------------------------------- what people have and type

CHOICE = {"kind": "choice", "context": "The garden has", "sep": " ", "choices": ["a lamp", "a river"], "answer": 1}
SCHEMA = {"kind": "schema", "contexts": ["A lamp", "A river"], "sep": " ", "continuation": "runs", "answer": 1}
COMPLETION = {"kind": "completion", "context": "A river", "sep": " ", "answer": "runs"}
CODE = {"kind": "code", "prompt": "def f(x):", "solution": "    return x", "tests": "assert f(1) == 1"}
INFILL = {"kind": "infill", "prompt": "def f(x):", "suffix": "", "answer": "    return x"}


def write_source(folder, text, n_val):
    """A prepared source of few tokens, of which n_val are held out."""
    folder.mkdir(parents=True)
    about = {"name": "nanocrystal", "vocab_size": 512, "sha256": tokenizer.digest(ENCODING)}
    meta = {"format": 1, "tokenizer": about}
    for split, n in (("train", 200), ("val", n_val)):
        ids = np.array((ENCODING.encode_ordinary(text) * 200)[:n], "<u2")
        ids.tofile(folder / f"{split}.bin")
        shards = [{"file": f"{split}.bin", "tokens": n, "sha256": split}] * bool(n)
        meta[split] = {"tokens": n, "documents": 1, "bytes": n, "shards": shards}
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.fixture(scope="module")
def tiny(model, tmp_path_factory):
    """A phase with one checkpoint, of random weights, which are said to have been trained on two sources."""
    folder = tmp_path_factory.mktemp("tiny")
    for name, text in (("text", "A river runs.\n"), ("code", "def f(x):\n    return x\n\n")):
        write_source(folder / "data" / name, text, 400)
    state = {"phase": "tiny", "step": 5, "tokens": 1024, "model": dataclasses.asdict(model.config)}
    state["tokenizer"] = {"name": "nanocrystal", "vocab_size": 512, "sha256": tokenizer.digest(ENCODING)}
    state["config"] = {"data": str(folder / "data"), "mix": {"text": 0.5, "code": 0.5}, "objective": {}}
    state |= {"start": {}, "drawn": {}, "first_token": 0, "sample": 64, "mix": {"sources": {}}}
    checkpoint.save(folder / "out/tiny/checkpoints", 5, {"model": dict(model.named_parameters())}, state, 1)
    return folder / "out/tiny"


@pytest.fixture
def tasks(tmp_path):
    """A function that writes a task file, lines as dicts or texts, and gives the folder of all of them."""

    def write(name, *lines):
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        (folder / name).write_bytes(text.encode())
        return folder

    return write


def strict(text):
    """JSON without the words that it has not."""

    def refuse(word):
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


def is_mistake(capsys, code, *words):
    """Whether a command has ended as it does of a mistake, with one line on stderr that has these words in it."""
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1, said
    assert all(word in said for word in words), said
    return True


def test_a_tokenizer_without_sentinels_has_no_holes_to_fill(tasks):
    (task,) = evaluation.read_tasks(tasks("fill.jsonl", INFILL), ["fill"], None)
    with pytest.raises(evaluation.EvalError, match="fill: nanocrystal-512 has no sentinels"):
        evaluation.ask(task, ENCODING, None, None, 64)


@pytest.mark.parametrize(
    "line, word",
    [
        *((CHOICE | {"answer": answer}, "answer is") for answer in (2, -1, "B", True, 1.0)),
        (CHOICE | {"answer": None}, "lacks answer"),
        *((CHOICE | {"choices": choices}, "choices is") for choices in ([], ["one"], "ab", [1, 2], ["a", ""])),
        (CHOICE | {"context": 3}, "context is 3"),
        (CHOICE | {"context": "\ud800"}, "context is"),
        (SCHEMA | {"answer": 2}, "answer is 2"),
        (SCHEMA | {"contexts": ["a", None]}, "contexts is"),
        (COMPLETION | {"answer": ""}, "answer is ''"),
        (COMPLETION | {"context": "retu", "sep": "", "answer": "rn"}, "no token of its own"),
        (CODE | {"tests": ["assert f(1) == 1"]}, "tests is"),
        (CODE | {"lang": 3}, "lang is 3"),
        (INFILL | {"suffix": None}, "lacks suffix"),
        ({"kind": "text", "text": ""}, "text is ''"),
        ({"kind": "riddle"}, "'riddle', which is none of choice"),
        ({"kind": ["text"]}, "which is none of choice"),
        ({"kind": "text"}, "lacks text"),
        ("null", "no JSON object but None"),
        ("[" * 9999, "not JSON"),
        ('{"kind": "text", "text": ', "not JSON"),
    ],
)
def test_a_line_that_cannot_be_scored_is_named_before_any_scoring(tiny, tasks, tmp_path, capsys, line, word):
    folder = tasks("first.jsonl", CHOICE)
    tasks("quiz.jsonl", "", line)
    to = tmp_path / "r.json"
    code = evaluation.main([str(tiny), f"--data={folder}", "--tasks=all", f"--out={to}"])
    assert is_mistake(capsys, code, f"{folder}/quiz.jsonl, line 2", word) and not to.exists()


def test_a_file_has_examples_of_one_kind(tasks):
    for lines, word in (([COMPLETION, CHOICE], "line 2, has kind 'choice'"), (["", " "], "has no examples")):
        with pytest.raises(evaluation.EvalError, match=word):
            evaluation.read_tasks(tasks("quiz.jsonl", *lines), ["quiz"], None)
    with pytest.raises(evaluation.EvalError, match="no task or group 'u'; it has quiz"):
        evaluation.read_tasks(tasks("quiz.jsonl", CHOICE), ["u"], None)


def test_fields_that_a_kind_does_not_know_are_nothing_to_it(tiny, tasks, tmp_path):
    strange = {"ids": [1], "bytes": "x", "sub": ["a"], "id": None, "tests": None}
    one = strange | {"choices": None} | SCHEMA
    folder = tasks("a.jsonl", *[strange | SCHEMA | {"choices": [1, 2, 3]}] * 2, one | {"sub": 3})
    tasks("b.jsonl", *[SCHEMA] * 3)
    assert evaluation.main([str(tiny), f"--data={folder}", "--tasks=a,b", f"--out={tmp_path / 'r.json'}"]) == 0
    a, b = (strict((tmp_path / "r.json").read_text())["tasks"][name] for name in "ab")
    assert a["scores"] == b["scores"] and a["chance"] == b["chance"] and a["ids"] == b["ids"] == ["0", "1", "2"]


LINES = "".join(json.dumps(CHOICE | {"context": f"In {place} is", "note": "naïve"}, ensure_ascii=False) + "\n"
                for place in ("the hall", "a shed", "it")).encode()  # fmt: skip


@pytest.mark.parametrize(
    "name, content",
    [
        ("quiz.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("quiz.jsonl", b"\xef\xbb\xbf" + LINES),
        ("quiz.jsonl", b"\n" + LINES.replace(b"\n", b"\n \t\n\n")),
        ("QUIZ.JSONL", LINES),
        ("quiz.jsonl.gz", gzip.compress(LINES)),
        ("quiz.jsonl.XZ", lzma.compress(LINES)),
    ],
)
def test_a_task_is_the_same_however_its_file_was_saved(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    (task,) = evaluation.read_tasks(tmp_path, ["all"], None)
    (tmp_path / name).unlink()
    (tmp_path / "quiz.jsonl").write_bytes(LINES)
    (plainly,) = evaluation.read_tasks(tmp_path, ["quiz"], None)
    assert (task.examples, task.sha256) == (plainly.examples, plainly.sha256)
    assert evaluation.read_tasks(tmp_path, ["quiz"], 2)[0].examples == plainly.examples[:2]


@pytest.mark.parametrize(
    "name, content",
    [
        ("quiz.jsonl", LINES.decode().encode("utf-16")),
        ("quiz.jsonl", LINES.decode().encode("latin-1")),
        ("quiz.jsonl", gzip.compress(LINES)),
        ("quiz.jsonl.gz", gzip.compress(LINES)[:-9]),
        ("quiz.jsonl.gz", LINES),
        ("quiz.jsonl.xz", lzma.compress(LINES)[:-9]),
        ("quiz.jsonl.xz", LINES),
        ("tasks.json", b"{"),
        ("tasks.json", b'{"good": "group"}'),
        ("tasks.json", b'{"good": {"group": 3}}'),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(tmp_path, capsys, tiny, name, content):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.jsonl").write_bytes(LINES)
    code = evaluation.main([str(tiny), f"--data={tmp_path}", "--tasks=all", f"--out={tmp_path / 'r.json'}"])
    assert is_mistake(capsys, code, str(tmp_path / name)) and not (tmp_path / "r.json").exists()


def test_a_task_is_called_by_what_stands_before_jsonl(tasks):
    for name in ("b.jsonl", "a.b.jsonl", "b.jsonl.bak", "b.jsonl~", ".b.jsonl.swp", "._b.jsonl", "b.jsonl.orig.txt"):
        folder = tasks(name, *[CHOICE] * len(name))
    read = {task.name: len(task.examples) for task in evaluation.read_tasks(folder, ["all"], None)}
    assert read == {"b": len("b.jsonl"), "a.b": len("a.b.jsonl")}
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    assert len(evaluation.read_tasks(folder, ["a.b"], None)) == 1  # who asks for another is not concerned
    with pytest.raises(evaluation.EvalError, match=r"b\.jsonl and .*b\.jsonl\.gz are both the task b"):
        evaluation.read_tasks(folder, ["all"], None)


def test_results_are_strict_json_and_are_read_as_before(tiny, tasks, tmp_path, capsys):
    folder, to, samples = tasks("quiz.jsonl", CHOICE | {"weight": math.nan}), tmp_path / "r.json", tmp_path / "s.jsonl"
    command = [str(tiny), f"--data={folder}", "--tasks=quiz", f"--out={to}", f"--samples={samples}"]
    assert evaluation.main(command) == 0
    results, first = strict(to.read_text()), capsys.readouterr().out
    assert results["tasks"]["quiz"]["scores"]["acc"]["se"] is None  # of one example
    assert strict(samples.read_text())["task"] == "quiz"
    old = to.read_text().replace("null", "NaN")  # as it used to be written
    for content in (to.read_text(), old):
        to.write_text(content)
        assert evaluation.main(command) == 0 and capsys.readouterr().out == first
        assert evaluation.main(["--compare", str(to), str(to)]) == 0 and "+0.0000" in capsys.readouterr().out
    for plotted in ([to], [to, to]):
        pytest.importorskip("matplotlib")
        assert evaluation.main([*map(str, plotted), f"--plot={tmp_path / 'new/p.PNG'}"]) == 0
        assert (tmp_path / "new/p.PNG").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
@pytest.mark.parametrize("option", ["--out", "--samples"])
@pytest.mark.parametrize("content", ['{"my": "notes"}', "my notes\n", json.dumps(CHOICE) + "\n", '{"tasks": {}}', None])
def test_a_file_of_somebody_else_is_not_replaced(tiny, tasks, tmp_path, capsys, option, content, fresh):
    to, folder = tmp_path / "mine", tasks("quiz.jsonl", CHOICE)
    if content is None:
        to.mkdir()
    else:
        to.write_text(content)
    others = {"--out": tmp_path / "r.json"} | {option: to}
    options = [f"{name}={path}" for name, path in others.items()]
    code = evaluation.main([str(tiny), f"--data={folder}", "--tasks=quiz", *options, *fresh])
    assert is_mistake(capsys, code, str(to))
    assert to.is_dir() if content is None else to.read_text() == content


def change(value, path, to):
    """A nested dict or list with one member changed, or removed if `to` is `...`."""
    *outer, last = path
    inner = value
    for name in outer:
        inner = inner[name]
    inner[last] = to
    if to is ...:
        del inner[last]
    return value


@pytest.mark.parametrize(
    "path, to",
    [
        (["meta"], ...),
        (["meta", "tokens"], "many"),
        (["tasks"], []),
        (["tasks", "quiz"], None),
        (["tasks", "quiz", "scores"], ...),
        (["tasks", "quiz", "scores", "acc"], 0.5),
        (["tasks", "quiz", "chance"], "half"),
        (["tasks", "quiz", "items", "acc"], ...),
        (["tasks", "quiz", "items", "acc", 1], "right"),
        (["tasks", "quiz", "items", "bits", 0], 10**400),
        (["tasks", "quiz", "items", "bits", 0], ...),
        (None, '{"meta": {"key'),
        (None, "[]"),
    ],
)
def test_a_damaged_result_is_named_in_one_line_and_left_as_it_is(tiny, tasks, tmp_path, capsys, path, to):
    folder, good, bad = tasks("quiz.jsonl", CHOICE, CHOICE), tmp_path / "good.json", tmp_path / "bad.json"
    command = [str(tiny), f"--data={folder}", "--tasks=quiz"]
    assert evaluation.main([*command, f"--out={good}"]) == 0
    bad.write_text(to if path is None else json.dumps(change(json.loads(good.read_text()), path, to)))
    content = bad.read_text()
    capsys.readouterr()
    plotted = [str(bad), f"--plot={tmp_path / 'p.png'}"]
    for arguments in ([*command, f"--out={bad}"], ["--compare", str(good), str(bad)], plotted):
        pytest.importorskip("matplotlib")
        assert is_mistake(capsys, evaluation.main(arguments), str(bad)) and bad.read_text() == content


def test_results_of_other_settings_of_what_is_written_are_not_taken_over(tiny, tasks, tmp_path, capsys):
    to, folder = tmp_path / "r.json", tasks("gaps.jsonl", INFILL, INFILL)
    command = [str(tiny), f"--data={folder}", "--tasks=gaps", f"--out={to}"]
    settings = ["--generate", "--max_new_tokens=2"]

    def taken_over(*more):
        results = json.loads(to.read_text())
        results["tasks"]["gaps"]["scores"]["bpb"]["mean"] = 77.0
        to.write_text(json.dumps(results))
        capsys.readouterr()
        assert evaluation.main([*command, *more]) == 0
        return "77.000" in capsys.readouterr().out

    assert evaluation.main(command) == 0
    assert taken_over()
    assert not taken_over(*settings)
    assert taken_over(*settings) and taken_over()  # who does not ask for answers takes what there is
    for other in ("--max_new_tokens=3", "--temperature=0", "--top_p=0.5", "--seed=2", "--no_healing"):
        assert not taken_over(*settings, other), other
    assert not taken_over(*settings)
    assert taken_over(*settings) and not taken_over(*settings, "--fresh")


@pytest.mark.parametrize("left", [0, 40, None])
def test_a_source_without_a_held_out_part_does_not_keep_the_others_from_evaluation(tiny, tmp_path, capsys, left):
    write_source(tmp_path / "data/text", "A river runs.\n", 400)
    if left is not None:
        write_source(tmp_path / "data/code", "x = 1\n", left)
    options = [f"--sources={tmp_path / 'data'}", f"--out={tmp_path / 'r.json'}", "--limit=2"]
    if left is None:
        (tmp_path / "data/code").mkdir()
        (tmp_path / "data/code/train.bin").write_bytes(b"ab")
    assert evaluation.main([str(tiny), *options]) == 0
    assert "code has no held-out part of one window" in capsys.readouterr().out
    assert {"text"} == {name for name in json.loads((tmp_path / "r.json").read_text())["tasks"] if "_" not in name}
    assert evaluation.main([str(tiny), *options, "--tasks=text,code"]) == 0  # as study.py asks
    assert is_mistake(capsys, evaluation.main([str(tiny), *options, "--tasks=code"]), "no held-out part")
    shutil.rmtree(tmp_path / "data/text")
    assert is_mistake(capsys, evaluation.main([str(tiny), *options]), "no ")


@pytest.mark.parametrize("at", [100, 28_999, 30_000])
def test_ids_that_the_tokenizer_does_not_have_are_named(tiny, tmp_path, capsys, at):
    (tmp_path / "data/text").mkdir(parents=True)
    ids = np.full(30_001, 5, "<u2")
    ids[at] = 600  # also where no window is read
    ids.tofile(tmp_path / "data/text/val.bin")
    options = [f"--sources={tmp_path / 'data'}", f"--out={tmp_path / 'r.json'}", "--limit=2"]
    assert is_mistake(capsys, evaluation.main([str(tiny), *options]), f"{tmp_path / 'data/text/val.bin'}: id 600")


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["nothing"], "nothing"),
        ([], "which checkpoint"),
        *((["x", f"--{option}"], f"--{option.split('=')[0]}") for option in (
            "limit=0", "tokens_per_batch=0", "samples_per_task=0", "max_new_tokens=-1", "temperature=nan", "top_p=0",
            "seed=-1", f"seed={2**70}", "seconds=inf", "seconds=0", "limit=1e3", "device=gpu", "device=cuda:99",
        )),
        (["--compare", "no.json", "no.json"], "no.json"),
        (["x", "--plot=results.json"], "results.json: a picture's name ends in"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line(arguments, word, capsys):
    assert is_mistake(capsys, evaluation.main(arguments), word)


@pytest.mark.parametrize(
    "option, word",
    [
        *((option, f"--{option.split('=')[0]}") for option in (
            "n=0", "tokens=-1", "temperature=nan", "temperature=-1", "top_p=2", "seed=-1", f"seed={2**70}", "n=two",
            "device=gpu", "device=cuda:99", "device=meta",
        )),
        ("prompt=caf\udce9", "is not UTF-8 text"),
        ("prompt=@FOLDER", "is a folder"),
        ("prompt=@FOLDER/latin.txt", "is not UTF-8 text"),
    ],
)  # fmt: skip
def test_bad_input_to_sampling_gets_one_line(option, word, tiny, tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    code = sample.main([str(tiny), f"--{option}".replace("FOLDER", str(tmp_path))])
    assert is_mistake(capsys, code, word)


@pytest.mark.parametrize("temperature", ["0", "1e-30", "1"])
def test_a_model_that_has_diverged_is_said_to_have(temperature, tiny, capsys, monkeypatch):
    assert sample.main([str(tiny), "--tokens=2", f"--temperature={temperature}"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(GPT, "logits", lambda self, x: torch.full((len(x), 600), math.inf))
    assert is_mistake(capsys, sample.main([str(tiny), "--tokens=2", f"--temperature={temperature}"]), "diverged")


def test_bytes_that_the_terminals_encoding_has_not_are_still_text(monkeypatch):
    monkeypatch.setattr(sample.os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))  # as in LC_ALL=C
    assert sample.text_of("caf\udcc3\udca9") == "café" and sample.text_of("naïve") == "naïve"


@pytest.mark.parametrize("text", ["@property", "@", "@@ -1,3 +1,4 @@", "@a\n" * 200, "@~/no/such/file"])
def test_a_text_may_begin_with_at(text, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sample.main([str(tiny), "--tokens=2", f"--prompt={text}"]) == 0
    assert capsys.readouterr().out.startswith(text)
    (tmp_path / "story.txt").write_bytes(b"\xef\xbb\xbfOnce\r\n")
    assert sample.main([str(tiny), "--tokens=2", "--prompt=@~/story.txt"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("Once\r\n") and not said.err


RECORDS = [{"step": n, "phase": "a", "tokens": 512 * n, "loss_by_source": {"text": 5.0 - n, "code$_{": 4.0}}
           for n in range(4)]  # fmt: skip
RECORDS += [{"step": 4, "phase": "a", "tokens": 2048, "val": {"text": {"loss": 5.0, "bpb": None}, "b": {"bpb": 2.5}}}]


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 5, "phase": "a", "tok', "null", "[]", "\x00", {"step": 5}, {"phase": "a", "tokens": "512"},
        {"phase": 3, "tokens": 512}, {"phase": "a", "tokens": 10**400}, {"phase": "a", "tokens": 9, "val": [1]},
        {"phase": "a", "tokens": 9, "val": {"text": 2.5}}, {"phase": "a", "tokens": 9, "loss_by_source": {"text": "2"}},
    ],
)  # fmt: skip
def test_a_log_is_drawn_without_the_lines_that_are_none(tmp_path, capsys, line):
    lines = [json.dumps(record) for record in RECORDS]
    lines.insert(2, line if isinstance(line, str) else json.dumps(line))
    path = tmp_path / "a/log.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(lines))
    records, left_out = plot.read_logs(tmp_path)
    assert records == RECORDS and left_out == {path: 1}
    assert plot.series(records)[1] == {"b": [(2048, 2.5)]}
    assert is_mistake(capsys, plot.main([str(tmp_path), "--to=curves.txt"]), "curves.txt")
    path.parent.rename(tmp_path / "a.old-1")  # as --fresh does: drawn if it is asked for
    assert plot.read_logs(tmp_path)[0] == [] and plot.read_logs(tmp_path / "a.old-1")[0] == RECORDS
    (tmp_path / "a.old-1").rename(path.parent)
    path.write_text(lines[2])
    pytest.importorskip("matplotlib")
    assert is_mistake(capsys, plot.main([str(tmp_path)]), "no log.jsonl with records")


def test_runs_that_have_diverged_and_strange_names_can_be_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    name = "$x_{$ | \udce9 木" + "y" * 500
    records = [{"phase": name, "tokens": n, "loss_by_source": {name: [math.nan, 1.0, 1e299][n]}} for n in range(3)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"phase": ')
    assert plot.main([str(tmp_path)]) == 0 and (tmp_path / "curves.png").stat().st_size > 10_000
    assert f"left out 1 lines of {tmp_path / 'log.jsonl'}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ others' programs


def made_up_tasks(folder):
    """Files of small tasks of the kinds that lm-evaluation-harness knows too; NANOCRYSTAL_TASKS names real ones."""
    dice = random.Random(0)
    words = ["the", "def", "return", "naïve", "x", "=", "1", "(", ")", ":", "cat", "日本", "sat\non\tmat"]

    def text(n):
        return " ".join(dice.choices(words, k=n)).strip()

    def choices():
        return [text(dice.randint(1, 9)) for _ in range(4)]

    kinds = {
        "choice": lambda: dict(context=text(dice.randint(0, 60)), sep=" ", choices=choices(), answer=dice.randrange(4)),
        "schema": lambda: dict(contexts=[text(9), text(8)], sep=" ", continuation=text(5), answer=dice.randrange(2)),
        "completion": lambda: dict(context=text(30), sep=" ", answer=text(3)),
        "text": lambda: dict(text=text(200)),
    }
    for kind, make in kinds.items():
        lines = [json.dumps({"kind": kind, "task": kind, "id": n, **make()}) for n in range(20)]
        (folder / f"{kind}.jsonl").write_text("\n".join(lines) + "\n")
    return [*kinds]


def harness_of(model):
    """A model for lm-evaluation-harness: one plain pass a request, through its own way from texts to ids."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Ours(TemplateLM):
        eot_token_id, max_length = EOT, model.config.block_size

        def tok_encode(self, string, **_):
            return ENCODING.encode_ordinary(string)

        def _loglikelihood_tokens(self, requests, **_):
            return [alone(model, context, ids) for _, context, ids in requests]

        def _encode_pair(self, context, continuation):
            head, rest = super()._encode_pair(context, continuation)
            return [EOT, *head] if context else head, rest

        def loglikelihood_rolling(self, requests, **_):
            totals = []
            for request in requests:
                windows = get_rolling_token_windows(self.tok_encode(request.args[0]), EOT, self.max_length, 1)
                totals.append(sum(alone(model, *map(list, make_disjoint_window(w)))[0] for w in windows))
            return totals

        def generate_until(self, requests, **_):
            raise NotImplementedError

    return Ours()


def harness_config(task, path):
    """A task file as lm-evaluation-harness describes it, and the measures that are ours as well."""
    kinds = {
        "choice": ("multiple_choice", "{{context}}", "answer", "choices", ("acc", "acc_norm")),
        "schema": ("multiple_choice", "answer", "continuation", "contexts", ("acc",)),
        "completion": ("loglikelihood", "{{context}}", "{{sep}}{{answer}}", None, ("acc",)),
        "text": ("loglikelihood_rolling", "", "{{text}}", None, ()),
    }
    output_type, doc_to_text, doc_to_target, doc_to_choice, measures = kinds[task.kind]
    config = dict(
        task=task.name, dataset_path="json", dataset_kwargs={"data_files": {"test": str(path)}}, test_split="test",
        num_fewshot=0, output_type=output_type, doc_to_text=doc_to_text, doc_to_target=doc_to_target,
        target_delimiter="" if task.kind == "completion" else task.examples[0].get("sep", ""),
        metric_list=[{"metric": measure} for measure in measures or ("bits_per_byte",)],
    )  # fmt: skip
    return config | ({"doc_to_choice": doc_to_choice} if doc_to_choice else {}), measures


def test_log_likelihoods_and_accuracies_are_those_of_lm_evaluation_harness(model, tmp_path):
    """pip install lm_eval==0.4.13; NANOCRYSTAL_TASKS=FOLDER:piqa,winograd,lambada,wikitext2 for files of your own."""
    pytest.importorskip("lm_eval")
    from lm_eval import evaluator

    folder, _, names = os.environ.get("NANOCRYSTAL_TASKS", f"{tmp_path}:").partition(":")
    names = names.split(",") if names else made_up_tasks(tmp_path)
    for task in evaluation.read_tasks(Path(folder), names, 20):
        config, measures = harness_config(task, next(Path(folder).glob(f"{task.name}.jsonl*")))
        theirs = evaluator.simple_evaluate(
            harness_of(model), tasks=[config], limit=20, log_samples=True, bootstrap_iters=0
        )
        items = evaluation.score(task, model, ENCODING, "psm", None, 1024)
        samples = sorted(theirs["samples"][task.name], key=lambda sample: sample["doc_id"])
        for sample_, logs in zip(samples, items["logs"], strict=True):
            answers = [r[0] if isinstance(r, (list, tuple)) else r for r in sample_["filtered_resps"]]
            ours = [sum(logs)] if task.kind == "text" else logs
            assert ours == pytest.approx([float(a) for a in answers], rel=1e-7, abs=1e-3)
            for measure in measures:
                assert sample_[measure] == items[measure][sample_["doc_id"]]


# ------------------------------------------------------------------------------------------------- from end to end


def test_training_scores_tasks_as_eval_does_and_as_on_one_process(phases, tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for n, name in enumerate(("piqa", "conala")):
        kinds = made_up_tasks(folder)
        (folder / f"{kinds[2 * n]}.jsonl").rename(folder / f"{name}.jsonl")
    knobs = {"eval_tasks": str(folder), "eval_examples": 12, "share": 0.1}
    trained(phases("a", **knobs))
    assert train.main(phases("a", out="one", micro_batch=8, **knobs)) == 0
    two, one = ([r["tasks"] for r in losses(tmp_path / out, "a") if "tasks" in r] for out in ("out", "one"))
    assert len(one) == len(two) == 2 and one[0].keys() == {"piqa", "conala"}
    for a, b in zip(one, two, strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-4)
    path = tmp_path / "result.json"
    command = ["eval.py", tmp_path / "one/a", f"--data={folder}", "--tasks=quick", "--limit=12", f"--out={path}"]
    assert run(*command).returncode == 0
    results = json.loads(path.read_text())
    for name, scores in one[-1].items():
        assert results["tasks"][name]["scores"]["bpb"]["mean"] == pytest.approx(scores["bpb"], rel=1e-4)
        assert results["tasks"][name]["scores"]["acc"]["mean"] == scores["acc"]
    done = results["tasks"].pop("conala")  # as if it had been killed before the last task
    results["tasks"]["piqa"]["scores"]["acc"]["mean"] = 77.0
    path.write_text(json.dumps(results))
    again = run(*command)
    assert again.returncode == 0 and "7700.0" in again.stdout  # taken over, not done again
    assert json.loads(path.read_text())["tasks"]["conala"]["items"] == done["items"]
    other = run(*command, "--dtype=bfloat16")
    assert other.returncode == 2 and "has results of other weights or settings" in other.stderr
    compared = run("eval.py", "--compare", path, path)
    assert compared.returncode == 0 and "+0.0000  [+0.0000, +0.0000]  n 12" in compared.stdout


def test_held_out_parts_have_the_bits_that_training_logged(phases, data, tmp_path):
    assert train.main(phases("a", share=0.1, objective="{'code': 'fim(0.5)'}")) == 0
    logged = [r["val"] for r in losses(tmp_path / "out", "a") if "val" in r][-1]
    windows = logged["code"]["tokens"] // 32
    done = run("eval.py", tmp_path / "out/a", f"--limit={windows}", f"--samples={tmp_path / 's.jsonl'}", "--generate")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out/a").glob("eval-*.json")
    tasks = json.loads(path.read_text())["tasks"]
    for name in ("text", "code"):
        assert tasks[name]["scores"]["bpb"]["mean"] == pytest.approx(logged[name]["bpb"], rel=1e-4)
    assert {"stops", "exact"} <= tasks["code_spans"]["scores"].keys()
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert len(lines) == sum(task["n"] for task in tasks.values())
    shutil.copytree(data, tmp_path / "other")
    record = tmp_path / "other/text/meta.json"
    record.write_text(record.read_text().replace(tokenizer.digest(ENCODING), "0" * 64))
    done = run("eval.py", tmp_path / "out/a", f"--sources={tmp_path / 'other'}", "--fresh")
    assert done.returncode == 2 and "ids of another tokenizer" in done.stderr


def test_code_is_written_cut_and_run(model, tmp_path, monkeypatch):
    examples = [{"kind": "code", "id": "a", "prompt": "def f(x):\n", "solution": "    return 2 * x\n",
                 "tests": "assert f(2) == 4"}] * 2  # fmt: skip
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
    (task,) = evaluation.read_tasks(tmp_path, ["t"], None)
    texts = ["\n    return 2 * x\n\nprint(f(3)", "\n    return x", "\n    return x + x", "\n    return x * 2\n# and"]
    scripts = [ENCODING.encode_ordinary(text) for text in texts]

    def generate(prompts, *_):
        assert all(ENCODING.decode(ids[1:]) == "def f(x):" for ids in prompts)
        yield from itertools.zip_longest(*scripts)

    monkeypatch.setattr(model, "generate", generate)
    args = evaluation.parse(["x", "--run-code", "--samples_per_task=2"])
    programs = evaluation.write_programs(task, model, ENCODING, args)
    assert programs[0] == [
        "def f(x):\n    return 2 * x\n\n\nassert f(2) == 4",
        "def f(x):\n    return x\n\nassert f(2) == 4",
    ]
    assert evaluation.run_programs(programs, 5.0, (1, 2, 3)) == {"pass@1": [0.5, 1.0], "pass@2": [1.0, 1.0]}


def test_a_program_that_a_text_asks_for_is_not_over_at_its_first_line(model, tmp_path, monkeypatch):
    example = {"kind": "code", "prompt": '"""\nDouble.\n"""\n', "solution": "x", "tests": "assert double(2) == 4"}
    (tmp_path / "t.jsonl").write_text(json.dumps(example) + "\n" + json.dumps(example | {"lang": "go"}) + "\n")
    task = evaluation.read_tasks(tmp_path, ["t"], 1)[0]
    body = ENCODING.encode_ordinary("\ndef double(x):\n    return 2 * x\n\nassert double(1) == 3\n")
    monkeypatch.setattr(model, "generate", lambda prompts, *_: ([token] for token in body))
    args = evaluation.parse(["x", "--run-code"])
    assert evaluation.runs(task, args) and not evaluation.runs(evaluation.read_tasks(tmp_path, ["t"], 2)[0], args)
    (programs,) = evaluation.write_programs(task, model, ENCODING, args)
    assert programs == ['"""\nDouble.\n"""\ndef double(x):\n    return 2 * x\n\n\nassert double(2) == 4']
    assert evaluation.run_programs([programs], 5.0) == {"pass@1": [1.0]}


def test_tasks_are_scored_also_where_no_source_has_a_held_out_part(phases, data, tmp_path):
    for name in ("text", "code"):
        (tmp_path / "bare" / name).mkdir(parents=True)
        for path in (data / name).glob("train*"):
            (tmp_path / "bare" / name / path.name).symlink_to(path)
        meta = json.loads((data / name / "meta.json").read_text())
        meta["val"] = {"tokens": 0, "documents": 0, "bytes": 0, "shards": []}
        (tmp_path / "bare" / name / "meta.json").write_text(json.dumps(meta))
    (tmp_path / f"{made_up_tasks(tmp_path)[0]}.jsonl").rename(tmp_path / "piqa.jsonl")
    knobs = {"eval_tasks": str(tmp_path), "eval_examples": 5, "share": 0.1, "data": str(tmp_path / "bare")}
    assert train.main(phases("a", **knobs)) == 0
    assert [r["tasks"].keys() for r in losses(tmp_path / "out", "a") if "tasks" in r] == [{"piqa"}] * 2
