"""What study.py promises: nothing is trained twice or lost, and the table is what the runs' results give."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

import eval as evaluation
import infill
import mixture
import study
import train
from configurator import read_command_line
from conftest import ROOT, write_phases
from model import PRESETS

STUDY = """
variants = {{
    "both": ["{0}/a.py", "{0}/b.py"],
    "text": ["{0}/a.py", ("{0}/b.py", {{"mix": {{"text": 1.0}}}})],
    "alone": [("{0}/b.py", {{"lr": 0.02}})],
}}
baseline = "both"
seeds = (1, 2)
knobs = {{"share": 0.1}}
"""


@pytest.fixture
def tiny(tmp_path, data):
    write_phases(tmp_path, data)
    for path in tmp_path.glob("?.py"):
        path.write_text(path.read_text() + f"data = {str(data)!r}\n")
    (tmp_path / "tiny.py").write_text(STUDY.format(tmp_path))
    return tmp_path / "tiny.py"


@pytest.fixture
def inside(monkeypatch):
    """Commands run in this process, which is faster; the list of them."""
    done = []

    def do(self, command, log, claim):
        done.append(command)
        assert {"train.py": train.main, "eval.py": evaluation.main}[Path(command[0]).name](command[1:]) == 0

    monkeypatch.setattr(study.Worker, "do", do)
    monkeypatch.setattr(study.signal, "signal", lambda *_: None)
    return done


def keys(ends):
    return {place: [one.key for one in pair[0].line()] for place, pair in ends.items()}


def test_variants_share_what_they_begin_with_and_nothing_that_differs(tiny, data, tmp_path):
    plan = keys(study.plan(study.load_study(tiny), {}))
    assert len({key for line in plan.values() for key in line}) == 8  # a, b, text's b, alone's b, with two seeds
    for seed in (1, 2):
        assert plan["both", seed][0] == plan["text", seed][0] and plan["both", seed][1] != plan["text", seed][1]
    assert not {*plan["both", 1]} & {*plan["both", 2]}
    assert keys(study.plan(study.load_study(tiny), {"log_every": "7", "eval_every": "9"})) == plan
    other = keys(study.plan(study.load_study(tiny), {"clip": "0.5"}))
    assert not {k for line in other.values() for k in line} & {k for line in plan.values() for k in line}
    text = tiny.read_text()
    tiny.write_text(text.replace('"text": 1.0', '"text": 0.9, "code": 0.1'))
    changed = keys(study.plan(study.load_study(tiny), {}))
    assert [place for place in plan if plan[place] != changed[place]] == [("text", 1), ("text", 2)]
    tiny.write_text(text + f'cooldown = ("{tmp_path}/c.py", {{"lr_end": 0.0}})\n')
    ends = study.plan(study.load_study(tiny), {})
    assert keys(ends) == plan
    assert all(cold.parent is warm and cold.name == "c" for warm, cold in ends.values())


def test_a_study_trains_once_and_its_table_is_that_of_the_runs(tiny, inside, data, tmp_path, capsys):
    command = [str(tiny), f"--out={tmp_path / 'runs'}", "--eval_examples=9"]
    assert study.main([*command, "--dry"]) == 0
    assert "8 runs" in capsys.readouterr().out and not inside
    assert study.main(command) == 0
    trained, asked = ([c for c in inside if c[0].endswith(name)] for name in ("train.py", "eval.py"))
    assert len(trained) == 8 and len(asked) == 6  # both runs that others begin from end no variant
    said = capsys.readouterr().out
    inside.clear()
    assert study.main(command) == 0 and not inside
    again = capsys.readouterr().out
    assert said.endswith(again) and "both" in again
    ends = study.plan(study.load_study(tiny), {})
    bits, windows = {}, {}
    for place, (last, _) in ends.items():
        (path,) = (tmp_path / "runs" / last.key).glob("eval-*.json")
        scores = json.loads(path.read_text())["tasks"]
        assert scores.keys() == {"text", "code"}  # both sources, whatever was trained on
        bits[place] = scores["code"]["scores"]["bpb"]["mean"]
        own, n_bytes = (np.array(scores["code"]["items"][name], float) for name in ("bits", "bytes"))
        without = [np.delete(own, i).sum() / np.delete(n_bytes, i).sum() for i in range(len(own))]
        windows[place] = len(own) * bits[place] - (len(own) - 1) * np.array(without)  # of the jackknife
    table = json.loads((tmp_path / "runs/tiny.json").read_text())["tables"]["as trained"]["code"]
    assert (
        table["both"][0][0] == pytest.approx(np.mean([bits["both", 1], bits["both", 2]])) and table["both"][1] is None
    )
    d = [bits["text", s] - bits["both", s] for s in (1, 2)]
    moved = np.mean([np.subtract(windows["text", s], windows["both", s]) for s in (1, 2)], axis=0)
    error = math.hypot(12.706 * abs(d[0] - d[1]) / 2, 1.95996 * moved.std(ddof=1) / math.sqrt(len(moved)))
    assert table["text"][1] == pytest.approx([np.mean(d), error], rel=1e-3)
    last = ends["both", 1][0]
    logged = [json.loads(line) for line in (last.folder(tmp_path / "runs") / "log.jsonl").read_text().splitlines()]
    assert logged[-1]["tokens"] == sum(one.tokens for one in last.line())
    tiny.write_text(tiny.read_text() + "def picture(values, to):\n    to.write_text(repr(sorted(values)))\n")
    assert study.main([*command, "--table"]) == 0
    assert (tmp_path / "runs/tiny.png").read_text() == repr(sorted(ends))
    assert study.main([*command, "--eval_examples=5"]) == 0
    assert [Path(c[0]).name for c in inside] == 6 * ["eval.py"]  # asked for less, evaluated again and not trained
    fewer = json.loads((tmp_path / "runs/tiny.json").read_text())["tables"]["as trained"]["code"]
    assert fewer["both"][0][0] != table["both"][0][0]
    inside.clear()
    assert study.main(command) == 0 and not inside  # what it was asked before is still there
    assert json.loads((tmp_path / "runs/tiny.json").read_text())["tables"]["as trained"]["code"] == table


def test_intervals_hold_95_percent_of_student():
    for freedom in (*range(1, 15), 30, 100):
        x = np.linspace(-1, 1, 200_001) * study.student(freedom)
        density = np.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
        inside = np.trapezoid(density * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x)
        assert inside == pytest.approx(0.95, abs=1e-4)


def test_intervals_hold_over_new_seeds_and_new_examples():
    dice, n_seeds, sizes = np.random.default_rng(4), 4, (30, 12)
    held = {"seeds": 0, "examples": 0, "both": 0}
    for _ in range(500):
        for name in held:  # what the error comes from
            of_seeds = dice.standard_normal((n_seeds, 1)) * (name != "examples")
            tasks = [0.7 + of_seeds + 5 * dice.standard_normal(n) * (name != "seeds") for n in sizes]
            tasks = [each + 0.1 * dice.standard_normal(each.shape) for each in tasks]
            mean, half = study.interval([*zip(*tasks, strict=True)])
            assert mean == pytest.approx(np.mean([each.mean() for each in tasks]))
            held[name] += abs(mean - 0.7) < half
            means = [each.mean(0) for each in tasks]
            errors = [math.dist(x, [x.mean()] * len(x)) / math.sqrt(len(x) * (len(x) - 1)) for x in means]
            assert study.over_examples([*zip(*tasks, strict=True)]) == pytest.approx(1.95996 / 2 * math.hypot(*errors))
    assert all(0.9 * 500 < count < 0.985 * 500 for count in held.values()), held
    assert math.isnan(study.interval([[np.ones(3)]])[1])


def guesses(*, seeds=(1, 2, 3), examples=400, apart=0.0):
    """Variants a and b: x are guesses of both; y of a only, of whose examples b has some right; z is no accuracy."""
    dice, found = np.random.default_rng(5), {}
    for seed in seeds:
        for variant in "ab":
            guess, known = (2 * dice.integers(0, 2, examples) - 1.0 for _ in range(2))
            known[: round(apart * examples) * (variant == "b")] = 1
            found[variant, seed] = {"x acc": [guess - guess.mean()], "y acc": [known], "z": [np.ones(examples)]}
    return found


def test_accuracies_of_guesses_are_left_out_of_the_table():
    about = {"variants": {"a": [], "b": []}, "baseline": "a", "seeds": (1, 2, 3)}
    assert [*study.compare(about, guesses(apart=0.4))] == ["y acc", "z"]
    assert [*study.compare(about, guesses(apart=0.0))] == ["z"]
    assert [*study.compare(about, guesses(apart=0.4, examples=10))] == ["z"]  # of few examples
    found = guesses(apart=0.4)
    for (variant, seed), some in found.items():
        some["z"] = [np.full(3, seed + 10.0 * (variant == "b"))]
    del found["b", 2]["z"], found["a", 3]
    assert study.compare(about, found)["z"]["b"][0][0] == 11.0  # of the one seed that both have
    one = study.compare(about, guesses(apart=0.4, seeds=(1,)))  # one seed: of examples alone
    assert [*one] == ["y acc", "z"] and math.isnan(one["y acc"]["b"][1][1])


def test_an_accuracy_is_left_out_that_one_answer_to_all_would_have():
    task = {"kind": "choice", "chance": 0.5, "items": {"bits": [3.0, 4.0], "bytes": [1, 4], "acc": [1.0, 0.0]}}
    for constant, expected in ((0.5, {"x answers": 2.0, "x acc": 0.0}), (1.0, {"x answers": 2.0})):
        scores = {"tasks": {"t": task | {"constant": constant}}, "groups": {"x": {"tasks": ["t"]}}}
        assert {name: study.value(tasks) for name, tasks in study.measures(scores).items()} == expected


def test_results_go_by_what_is_evaluated_and_not_by_where_it_lies(tiny, data, tmp_path):
    def key(data, tasks, examples=9):
        study_ = study.load_study(tiny)
        study.prepared.cache_clear()
        ends = study.plan(study_, {"data": str(data)})
        return study.evaluation_of(study_, ends, str(data), str(tasks), examples, {})["key"], keys(ends)

    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "lambada.jsonl").write_text(json.dumps({"kind": "text", "text": "a text"}))
    here = tmp_path / "here"
    shutil.copytree(data, here)
    first = key(here, tasks)
    there = here.rename(tmp_path / "there")
    for source in ("text", "code"):
        path = there / source / "meta.json"
        meta = json.loads(path.read_text())
        path.write_text(json.dumps(meta | {"fingerprint": "of other inputs"}))
    tasks = tasks.rename(tmp_path / "moved")
    assert key(there, tasks) == first
    (tasks / "another.jsonl").write_text("not asked")
    assert key(there, tasks) == first
    assert key(there, tasks, 8)[0] != first[0]
    (tasks / "tasks.json").write_text('{"lambada": {"group": "another"}}')
    assert key(there, tasks)[0] != first[0]
    meta["train"]["shards"][0]["sha256"] = "other"
    path.write_text(json.dumps(meta))
    changed = key(there, tasks)[1]
    assert all(changed[place] != first[1][place] for place in changed)


def test_the_arithmetic_of_a_machine_is_part_of_a_run(tiny, tmp_path, monkeypatch):
    plans = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.py"
        path.write_text(path.read_text().replace("'float32', 'cpu'", "'auto', 'cpu'"))
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(study, "find_device", lambda cfg, dtype=dtype: ("cpu", dtype, False))
        ends = study.plan(study.load_study(tiny), {})
        plans.append(keys(ends))
        assert dict(ends["both", 1][0].knobs)["dtype"] == str(dtype)[6:]
    assert all(plans[0][place] != plans[1][place] for place in plans[0])


def test_a_run_that_fails_is_named_and_the_others_go_on(tiny, inside, tmp_path, capsys, monkeypatch):
    train_run = study.train_run

    def fail(run, *rest):
        if dict(run.knobs).get("lr") == "0.02":
            raise study.RunError("the rate was too high")
        train_run(run, *rest)

    monkeypatch.setattr(study, "train_run", fail)
    assert study.main([str(tiny), f"--out={tmp_path / 'runs'}", "--eval_examples=9"]) == 1
    said = capsys.readouterr()
    assert said.err.count("the rate was too high") == 2
    assert "not done yet: alone with seed 1, alone with seed 2" in said.out
    table = json.loads((tmp_path / "runs/tiny.json").read_text())["tables"]["as trained"]["code"]
    assert [*table] == ["both", "text"]


def test_another_baseline_gives_its_own_pairs_and_leaves_the_files_alone(tiny, inside, tmp_path, capsys):
    command = [str(tiny), f"--out={tmp_path / 'runs'}", "--eval_examples=9"]
    assert study.main(command) == 0
    written = (tmp_path / "runs/tiny.json").read_bytes()
    bits = {(one["variant"], one["seed"]): one["text"] for one in json.loads(written)["runs"]["as trained"]}
    capsys.readouterr()
    assert study.main([*command, "--table", "--baseline=text"]) == 0
    (row,) = re.findall(r"^\| text .*", capsys.readouterr().out, re.M)  # of the source; columns text, both, alone
    d = [bits["alone", seed] - bits["text", seed] for seed in (1, 2)]
    assert float(row.split("|")[4].split()[0]) == pytest.approx(np.mean(d), abs=6e-4)
    assert (tmp_path / "runs/tiny.json").read_bytes() == written
    assert study.main([*command, "--table", "--eval_examples=7"]) == 0
    assert "no finished run of 'both' with these options" in capsys.readouterr().out


def numbers(out):
    return {path.parent.name: json.loads(path.read_text())["measures"] for path in out.glob("*/result-*.json")}


def test_killed_and_shared_studies_give_the_same_numbers_and_train_nothing_twice(tiny, inside, tmp_path):
    assert study.main([str(tiny), f"--out={tmp_path / 'whole'}", "--eval_examples=9"]) == 0
    command = [sys.executable, str(ROOT / "study.py"), str(tiny), f"--out={tmp_path / 'runs'}", "--eval_examples=9"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    while not list((tmp_path / "runs").glob("*/trained.json")):
        time.sleep(0.2)
        assert first.poll() is None
    time.sleep(3)  # in the midst of the second run
    first.kill()
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    both[1].stdout.readline()  # it has begun something
    both[1].send_signal(signal.SIGTERM)
    said = both[1].communicate(timeout=120)[0]
    assert both[1].returncode == 0 and "stopped; the same command continues" in said
    assert both[0].wait(timeout=300) == 0
    assert numbers(tmp_path / "runs") == numbers(tmp_path / "whole")
    logs = [path.read_text() for path in (tmp_path / "runs").glob("*/train.log")]
    begun = sum(len(re.findall(r" 0/\d+  held out", log)) for log in logs)
    assert len(logs) == 8 and 8 <= begun <= 10  # at most the killed and the stopped one again


def fake_runs(folder, truth, mixtures, seeds=3, **other):
    dice = np.random.default_rng(1)
    for n, mix in enumerate(mixtures):
        for seed in range(seeds):
            weights = np.array(list(mix.values()))
            noise = 1e-4 * dice.standard_normal(len(mix))
            measures = dict(zip(mix, truth(weights / weights.sum()) + noise, strict=True))
            made = {
                "mix": mix,
                "parent": None,
                "decides": "x",
                "evaluation": {"key": "z"},
                "measures": measures,
            } | other
            run = folder / f"{n}-{seed}-{len(list(folder.glob('*')))}"
            run.mkdir(parents=True)
            for name in ("trained.json", "result-0.json"):
                (run / name).write_text(json.dumps(made))


def test_a_mixture_left_out_is_predicted_from_the_others_only():
    dice = np.random.default_rng(3)
    weights, y = dice.dirichlet([1, 1, 1], 12), dice.standard_normal(12)
    x = np.stack([np.ones(12), *np.log((weights[:, 1:] + 0.01) / (weights[:, :1] + 0.01)).T], axis=1)
    expected = [x[i] @ np.linalg.lstsq(np.delete(x, i, 0), np.delete(y, i), rcond=None)[0] for i in range(12)]
    assert mixture.left_out(weights, y, mixture.with_settings(1, 1e-9)) == pytest.approx(expected, abs=1e-6)
    strong = mixture.with_settings(2, 1.0)  # a ridge pulls to the mean, not to nothing
    assert mixture.left_out(weights, y + 100, strong) == pytest.approx(mixture.left_out(weights, y, strong) + 100)
    nothing = mixture.left_out(weights, y, mixture.fit_predict)  # of noise alone, choosing among ten must not help
    assert np.corrcoef(nothing, y)[0, 1] < 0.3
    y[5] += 1000
    assert mixture.left_out(weights, y, mixture.fit_predict)[5] == nothing[5]  # chosen and fitted without the sixth


def test_a_mixture_is_found_where_the_truth_is_known(tmp_path, capsys):
    def truth(w):
        a, b = np.log(w[1:] + 0.01) - np.log(w[0] + 0.01)
        return np.array([1.5 + 0.1 * (a + b) + 0.02 * a * b, 1.2 - 0.1 * a + 0.03 * a**2, 1.8 - 0.2 * b + 0.05 * b**2])

    dice = np.random.default_rng(2)
    drawn = [*dice.dirichlet([1, 1, 1], 11).round(4).tolist(), [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    mixtures = [dict(zip("abc", weights, strict=True)) for weights in drawn]
    fake_runs(tmp_path, truth, mixtures)
    fake_runs(tmp_path, lambda w: w * 0 + 9, mixtures[:5], decides="y")  # of another configuration
    fake_runs(tmp_path, lambda w: w * 0 + 9, mixtures[:5], parent="z")
    fake_runs(tmp_path, lambda w: w * 0 + 9, mixtures[:5], evaluation={"key": "y"})
    fake_runs(tmp_path, truth, [{"a": 2 * a, "b": 2 * b, "c": 2 * c} for a, b, c in drawn], seeds=1)  # said otherwise
    runs = mixture.finished(tmp_path)
    assert len(runs) == 14 and all(len(some) == 4 for some in runs.values())
    weights = np.array([[dict(mix).get(name, 0) for name in "abc"] for mix in runs])
    predict = {}
    for i, name in enumerate("abc"):
        y = np.array([np.mean([one[name] for one in some]) for some in runs.values()])
        predict[name] = partial(mixture.fit_predict, weights, y)
        guesses = mixture.left_out(weights, y, mixture.fit_predict)
        assert np.abs(guesses - y).max() < 0.01 * np.ptp(y)
        fresh = dice.dirichlet([2, 2, 2], 50)
        assert np.abs(predict[name](fresh) - [truth(w)[i] for w in fresh]).max() < 0.01 * np.ptp(y)
    best, value = mixture.propose(weights, predict, {"a": 0.5, "b": 0.25, "c": 0.25})
    grid = np.array([(i, j, 60 - i - j) for i in range(61) for j in range(61 - i)]) / 60
    least = min(truth(w) @ [0.5, 0.25, 0.25] for w in grid)
    assert value == pytest.approx(least, abs=0.005) and truth(best) @ [0.5, 0.25, 0.25] == pytest.approx(
        least, abs=0.005
    )
    assert mixture.main([str(tmp_path), "--goal=a=2,b=1,c=1"]) == 0
    assert "least of 0.5 a, 0.25 b, 0.25 c" in capsys.readouterr().out
    for arguments, word in (
        ([str(tmp_path), "--goal=d=1"], "--goal names d"),
        ([str(tmp_path), "--goal=a=x"], "write source=share"),
        ([str(tmp_path / "none")], "no finished runs"),
    ):
        assert mixture.main(arguments) == 2
        assert word in capsys.readouterr().err
    (broken,) = [path for path in tmp_path.glob("0-0-0/*") if path.name != "trained.json"]
    result = json.loads(broken.read_text())
    for wrong in ({"measures": [1]}, {"measures": {"a": "1"}}, {"evaluation": 3}):
        broken.write_text(json.dumps(result | wrong))
        assert mixture.main([str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert str(broken) in said and said.count("\n") == 1
    broken.write_text(json.dumps(result | {"measures": {"a": None}}))
    assert sum(map(len, mixture.finished(tmp_path).values())) == 4 * 14 - 1
    assert f"left out {broken}" in capsys.readouterr().out
    fake_runs(tmp_path / "few", truth, mixtures[:3])
    assert mixture.main([str(tmp_path / "few")]) == 2 and "too few" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, arguments, word",
    [
        (None, ["nothing.py"], "there is no study nothing.py"),
        ("seed = 1\n", [], "seed is none of variants"),
        ("seeds: (1, 2)\n", [], "sets nothing with seeds: (1, 2): write seeds = (1, 2)"),
        ("baseline == 'both'\n", [], "sets nothing with baseline == 'both'"),
        ("baseline = 'x'\n", [], "a baseline that is one of them"),
        ("baseline = ['both']\n", [], "a baseline that is one of them"),
        ("", ["--colour=1"], "colour is neither an option"),
        ("", ["--lr=fast"], "lr = 'fast'"),
        ("", ["--init_from=out"], "--init_from: a study decides that itself"),
        ("", ["--mix={'text': 1}"], "--mix: the study sets that"),
        ("", ["--lr_peak=0.1"], "--lr_peak: the study sets that, or what hangs on it"),
        ("", ["--eval_examples=0"], "--eval_examples=0 is less than 1"),
        ("", ["--eval_tasks=nowhere"], "there is no folder nowhere of task files"),
        ("", ["--baseline=x"], "--baseline=x is none of both, text, alone"),
        ("seeds = ()\n", [], "needs seeds"),
        ("seeds = 3\n", [], "needs seeds"),
        ("seeds = (1, 1)\n", [], "list of different numbers"),
        ("variants['both'] = []\n", [], "variant 'both' is no list of phases"),
        ("variants['both'] = 'a.py'\n", [], "variant 'both' is no list of phases"),
        ("variants = ['both']\n", [], "needs variants, a dict"),
        ("cooldown = ['c.py']\n", [], "cooldown is one phase"),
        ("variants['both'][1] = variants['both'][1], {'block_size': 16}\n", [], "differ in block_size"),
        ("variants['alone'][0][1]['lr_peak'] = 1\n", ["--lr_end=0.1"], "--lr_end: the study sets that, or what"),
        ("variants['both'][0] = ('a.py',)\n", [], "variant 'both' is no list of phases"),
        ("variants['both'][0] = ('a.py', 3)\n", [], "variant 'both' is no list of phases"),
        ("variants['both'][0] = ('nowhere.py', {})\n", [], "there is no config file nowhere.py"),
        ("knobs = ['lr']\n", [], "knobs is a dict"),
        ("knobs = {'seed': 3}\n", [], "--seed: a study decides that itself"),
        ("tasks = ['quick']\n", [], "tasks a text"),
        ("picture = 'p.png'\n", [], "picture is a function"),
        ("seeds = ('1', '2')\n", [], "list of different numbers"),
        ("exit()\n", [], "tiny.py: SystemExit"),
        ("class Odd(BaseException): pass\nraise Odd('x')\n", [], "tiny.py: Odd: x"),
        ("variants['both'][0] = ('a.py', {'mix': {'text': 'much'}})\n", [], "a weight is not a number"),
        ("variants = {\n", [], "SyntaxError"),
        ("", ["--data=nowhere"], "nowhere/text is not prepared"),
        ("", ["--lr"], "lr"),
        ("", ["another.py"], "another.py is neither an option"),
    ],
)
def test_bad_input_gets_one_line(change, arguments, word, tiny, capsys):
    tiny.write_text(tiny.read_text() + (change or ""))
    assert study.main([*([str(tiny)] if change is not None else []), *arguments]) == 2
    said = capsys.readouterr().err
    assert word in said and said.count("\n") == 1


def test_a_study_means_the_same_from_every_folder(tiny, data, tmp_path, monkeypatch):
    plan = keys(study.plan(study.load_study(tiny), {}))
    text = tiny.read_text()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "config").mkdir(parents=True)
    (elsewhere / "a.py").write_text("lr = 1\n")  # of another study
    (elsewhere / "config/phase1.py").write_text("lr = 1\n")
    below = tmp_path / "studies/tiny.py"
    below.parent.mkdir()
    shipped = {}
    for folder in (tmp_path, elsewhere, ROOT):
        monkeypatch.chdir(folder)
        for path in (tiny, below):  # beside the configs, and in a folder beside them
            path.write_text(text.replace(f"{tmp_path}/", ""))
            assert keys(study.plan(study.load_study(os.path.relpath(path)), {})) == plan
        below.write_text(text.replace(f"{tmp_path}/a.py", "config/phase1.py"))
        shipped[folder] = keys(study.plan(study.load_study(below), {"data": str(data), "block_size": "32"}))
    assert shipped[tmp_path] == shipped[elsewhere] == shipped[ROOT] != plan


@pytest.mark.parametrize(
    "change",
    [
        "import numpy as np\nseeds = np.arange(1, 3)\n",
        "import numpy as np\nseeds, knobs = [np.int64(1), np.int32(2)], {'share': np.float64(0.1)}\n",
        "import numpy as np\nvariants['text'][1][1]['mix'] = {'text': np.float64(1.0)}\n",
        "from pathlib import Path as _Path\nvariants['both'] = tuple(map(_Path, variants['both']))\n",
        "seeds = range(1, 3)\n",
    ],
)
def test_numbers_and_lists_of_other_kinds_are_what_they_say(tiny, tmp_path, change):
    plan = keys(study.plan(study.load_study(tiny), {}))
    tiny.write_bytes(b"\xef\xbb\xbf" + (tiny.read_text() + change).encode())
    changed = study.load_study(tiny)
    assert keys(study.plan(changed, {})) == plan
    json.dumps({name: value for name, value in changed.items() if name != "file"})


def test_a_knob_may_be_apart_from_its_value(tiny, tmp_path, capsys):
    said = []
    for words in (["--clip=0.5", "--budget=40K"], ["--clip", "0.5", "--budget", "40K"]):
        for command in ([str(tiny), *words], [*words, str(tiny)]):
            assert study.main([*command, "--dry", f"--out={tmp_path / 'runs'}"]) == 0
            said.append(capsys.readouterr().out)
    assert len({*said}) == 1
    assert study.main([str(tiny), "--dry"]) == 0 and capsys.readouterr().out != said[0]


def write_runs(path, out):
    """What the runs of a study leave when they are trained and evaluated, with numbers made up -> their folders."""
    ends = study.plan(study.load_study(path), {})
    evaluation_ = study.evaluation_of(study.load_study(path), ends, *study_data(ends), 200, {"dtype": "", "device": ""})
    dice, runs = np.random.default_rng(0), {end for end, _ in ends.values()}
    for one in study.all_runs(ends, evaluation_):
        about = {"parent": one.parent and one.parent.key, "decides": one.decides, "mix": dict(one.mix)}
        study.files.write_json(study.trained_path(one, out), about | {"seconds": 2.0, "flops": one.flops})
    for one in runs:
        tasks = {
            name: {
                "kind": "text", "group": "held out", "n": 4, "sha256": "x",
                "scores": {"bpb": {"mean": 1.0, "se": None}},
                "items": {"bits": dice.uniform(8, 9, 4).tolist(), "bytes": [4] * 4},
            }
            for name in ("text", "code")
        }  # fmt: skip
        scores = study.scores_path(one, out, evaluation_)
        study.files.write_json(scores, {"meta": {"key": {}, "tokens": 1}, "tasks": tasks})
        values = {name: study.value(of) for name, of in study.measures(evaluation.load_results(scores)).items()}
        result = {"evaluation": evaluation_, "measures": values, "seconds": 1.0}
        study.files.write_json(study.result_path(one, out, evaluation_), result)


def study_data(ends):
    return next(iter(ends.values()))[0].data, ""


def test_any_name_of_a_variant_fits_into_the_table_and_the_picture(tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    strange = ["a|b", "two\nlines", "x" * 500, "$x_{$", "木", 3]
    text = "".join(f"variants[{name!r}] = variants['alone']\n" for name in strange)
    tiny.write_text(tiny.read_text() + text + "baseline = 'a|b'\n")
    out = tmp_path / "runs"
    write_runs(tiny, out)
    assert study.main([str(tiny), f"--out={out}", "--table"]) == 0
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3 + len(strange) and len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "| a\\|b" in said and "| two lines" in said and "no picture" not in said
    assert {run["variant"] for run in json.loads((out / "tiny.json").read_text())["runs"]["as trained"]} >= {"3", "a|b"}


@pytest.mark.parametrize(
    "name, content", [("tiny.json", '{"my": "notes"}'), ("tiny.json", "notes"), ("tiny.png", "mine")]
)
def test_a_table_that_no_study_has_written_is_not_replaced(tiny, inside, tmp_path, capsys, name, content):
    out = tmp_path / "runs"
    out.mkdir()
    (out / name).write_text(content)
    assert study.main([str(tiny), f"--out={out}"]) == 2 and not inside
    said = capsys.readouterr().err
    assert str(out / name) in said and said.count("\n") == 1 and (out / name).read_text() == content


@pytest.mark.parametrize(
    "name, damage",
    [
        ("trained.json", lambda text: text[:20]),
        ("trained.json", lambda text: text.replace('"flops"', '"flop"')),
        ("eval-*.json", lambda text: text.replace('"bits"', '"bit"')),
        ("eval-*.json", lambda text: "[]"),
        ("result-*.json", lambda text: text.replace('"seconds": 1.0', '"seconds": "1"')),
        ("result-*.json", lambda text: ""),
    ],
)
def test_what_a_run_has_left_is_named_if_it_is_damaged(tiny, tmp_path, capsys, name, damage):
    out = tmp_path / "runs"
    write_runs(tiny, out)
    path = sorted(out.glob(f"*/{name}"))[0]
    path.write_text(damage(path.read_text()))
    codes = [study.main([str(tiny), f"--out={out}", option]) for option in ("--dry", "--table")]
    said = capsys.readouterr().err
    assert str(path) in said and said.count("\n") == codes.count(2) >= 1


@pytest.fixture(scope="module")
def all_sources(data, tmp_path_factory):
    """A folder with every source that a study or config names; all but text are code."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("text", "code", "quality", "adjacent", "synthetic", "few"):
        (folder / name).symlink_to(data / ("text" if name == "text" else "code"))
    return folder


@pytest.mark.parametrize("path", sorted((ROOT / "study").glob("*.py")), ids=lambda path: path.stem)
def test_the_studies_that_are_shipped_can_be_planned(path, all_sources):
    ends = study.plan(study.load_study(path), {"data": str(all_sources)})
    meant = ("added", "longer", "1 epoch")  # to be of another length
    pairs = [pair for (variant, _), pair in ends.items() if not any(word in variant for word in meant)]
    totals = {sum(r.tokens for r in (cold or warm).line()) for warm, cold in pairs}
    assert max(totals) - min(totals) <= 3 * 4096  # the same tokens for all, but for rounding to steps


ONE = SimpleNamespace(key="one")
LONG = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(0)))
print("ready", flush=True)
time.sleep(60)
"""
WORKER = """
import study, sys
from pathlib import Path
from test_study import ONE
folder = Path(sys.argv[1])
with study.claimed(ONE, folder) as claim:
    try:
        study.Worker().do([str(folder / "long.py")], folder / "log", claim)
    except study.Stopped:
        print("stopped")
"""


def test_a_run_is_taken_by_one_process(tmp_path):
    with study.claimed(ONE, tmp_path) as mine:
        with study.claimed(ONE, tmp_path) as again:
            assert mine and again is None
        with study.claimed(SimpleNamespace(key="other"), tmp_path) as other:
            assert other
    with study.claimed(ONE, tmp_path) as again:
        assert again


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_a_worker_started_is_told_to_stop_or_keeps_the_run_when_the_worker_is_dead(number, tmp_path):
    (tmp_path / "long.py").write_text(LONG)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WORKER, tmp_path]
    worker = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "log"
    until = time.monotonic() + 60
    while not (log.exists() and "ready" in log.read_text()):
        time.sleep(0.1)
        assert worker.poll() is None and time.monotonic() < until
    worker.send_signal(number)
    said = worker.communicate(timeout=30)[0]
    if number == signal.SIGTERM:
        assert said == "stopped\n" and log.read_text() == "ready\nsaved\n"
    else:
        with study.claimed(ONE, tmp_path) as again:
            assert again is None
        subprocess.run(["pkill", "-f", str(tmp_path / "long.py")], check=True)


def config_of(run):
    argv = [run.path, *(f"--{name}={value}" for name, value in run.knobs)]
    ((_, cfg),), _ = read_command_line(argv, train.Config, PRESETS, (), infill.OBJECTIVES)
    return cfg


def rates(last):
    """Learning rate of every step from the beginning to the end of a variant."""
    phases = [(config_of(run), run.steps) for run in last.line()]
    return np.array([train.lr_at(step, steps, cfg) for cfg, steps in phases for step in range(1, steps + 1)])


def test_variants_have_the_learning_rates_that_their_studies_say(all_sources):
    def curves(name, **knobs):
        ends = study.plan(study.load_study(ROOT / f"study/{name}.py"), {"data": str(all_sources)} | knobs)
        return {variant: rates(warm) for (variant, seed), (warm, _) in ends.items() if seed == 1}

    crystal = curves("crystal", budget="10M")
    usual, swapped = crystal["Crystal"], crystal["code first"]
    for variant in ("uniform", "phase 2 goes on", "no code"):
        assert np.array_equal(crystal[variant], usual)
    apart = np.flatnonzero(np.abs(swapped - usual) > 0.025 * usual.max()) / len(usual)
    seams = [(0.2477, 0.02 * 0.6661), (0.6661, 0.02 * 0.6661)]  # where, and how long the rate warms up again
    assert all(any(at - 1e-3 <= x <= at + width + 1e-3 for at, width in seams) for x in apart)
    to_code = curves("tocode", budget="11M")
    one, whole = to_code["code -> text, one cosine"], to_code["text only"]
    n = min(len(one), len(whole))  # phases are rounded to steps
    assert abs(len(one) - len(whole)) <= 1 and np.abs(one[:n] - whole[:n]).max() < 1e-3 * whole.max()
    epochs = curves("epochs", budget="10M")
    assert epochs["1 epoch, rate of 5"] == pytest.approx(epochs["5 epochs, spans anew"][:488], rel=2e-3)


def test_crystals_uniform_mixture_has_as_much_code_and_infilling(all_sources):
    ends = study.plan(study.load_study(ROOT / "study/crystal.py"), {"data": str(all_sources), "budget": "100M"})
    made = {}
    for variant in ("uniform", "Crystal", "code first"):
        code = holes = 0
        for one in ends[variant, 1][0].line():
            cfg = config_of(one)
            code += one.tokens * cfg.mix["code"]
            holes += one.tokens * cfg.mix["code"] * (cfg.objectives()["code"].rate if cfg.objective else 0)
        made[variant] = code, holes
    assert made["uniform"] == pytest.approx(made["Crystal"], rel=2e-3) == made["code first"]


def test_every_interval_that_the_readme_claims_is_in_the_table_it_names():
    claims = (ROOT / "README.md").read_text().split("### What came out")[1].split("\n## ")[0]
    tables = re.split(r"\n## (?:study/)?(\w+).*", (ROOT / "results/studies.md").read_text())
    tables = dict(zip(tables[1::2], tables[2::2], strict=True))
    tables = {name: re.findall(r"[+-]\d\.\d{3} ± \d\.\d{3}", table) for name, table in tables.items()}
    rows = re.findall(r"^\|(.+)\| (\w+) \|$", claims, re.M)
    assert tables.keys() <= {study for _, study in rows}
    for claim, study_ in rows:
        for interval in re.findall(r"[+-]?\d\.\d{3} ± \d\.\d{3}", claim):
            assert any(one.endswith(interval) for one in tables[study_]), f"{study_} has no {interval}"
