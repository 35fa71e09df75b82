"""What one change in the data does: many runs, one table, with seeds and intervals.

    python study.py study/crystal.py --dry            # what it would cost, and what is there already
    python study.py study/crystal.py                  # train and evaluate what is missing; then the table, the picture
    python study.py study/crystal.py --budget=50M     # with any knob of train.py that the study leaves alone
    python study.py study/crystal.py --table          # what is there already; --baseline=VARIANT against another

A study is a Python file that names variants, each a list of phases:

    variants = {"three phases": ["config/phase1.py", "config/phase2.py"],
                "no code": [("config/phase1.py", {"mix": {"text": 1.0}, "share": 0.9})]}
    baseline = "no code"        # what the others are compared with
    cooldown = "config/cool.py" # optional, a phase that every variant is continued with; tables without it come second
    seeds = (1, 2, 3)           # of initialisation and of the order of the data
    knobs = {"budget": "2M"}    # of all phases; the command line beats them
    tasks = "quick,code_spans"  # of eval.py; those from files if --eval_tasks=FOLDER says where they are
    def picture(values, to):    # instead of the usual one: {(variant, seed): {measure: value}}, path

Config files are looked for in the folder of the study, in those above it, and beside this program.

Variants that begin with the same phases share the runs of these. A run lives in OUT/<key>, its key made from what
decides its numbers: configuration, arithmetic, seed, data, the run before it, and the ALGORITHM of mix.py. (Whoever
changes other code says another --out.) An evaluation goes by what it was asked. So the same command continues what was
killed, runs nothing twice, also for other studies on the same folder, and after one number is changed trains what
depends on it. A run that fails is named, and what does not begin from it goes on. Several processes may work on one
folder, each on a run that no other has; on many machines, if its file system's locks reach them all.

What variants end with is evaluated by eval.py, on every source that the study names and on its tasks. Differences are
paired by seed and by example; intervals, 95%, say how far the mean may be over new seeds and new examples of the same
kinds. One seed, or one example, has none. Whether two others differ says --baseline=VARIANT, not the overlap of their
intervals.
"""

import ast
import functools
import hashlib
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

import checkpoint
import errors
import files
import infill
import train
from configurator import ConfigError, check_statements, plain, read_command_line, split_words
from errors import UserError
from eval import ALGORITHM as EVALUATION
from eval import bits_of, floor, load_results, mean, read_tasks
from machine import find_device
from mix import ALGORITHM, META, command_for, quotas
from model import GPT, PRESETS
from plot import label, pyplot, save

HERE = Path(__file__).parent

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5%, of 1 to 9 degrees of freedom
NORMAL = 1.95996  # of infinitely many
SWITCHES = ("dry", "table", "help")  # options without a value
WITHOUT_EFFECT = {  # knobs that do not change what a run's weights are; its data count by content
    "data", "out", "init_from", "eval_every", "eval_tokens", "eval_tasks", "eval_examples", "save_every", "keep",
    "log_every", "wandb", "epochs_max", "source_tokens", "timeout",
}  # fmt: skip
OWN = {"variants": None, "baseline": None, "cooldown": "", "seeds": (1, 2, 3), "knobs": {}, "tasks": "quick",
       "picture": None}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One phase of one variant with one seed, and what it begins from."""

    key: str
    path: str  # of the config file
    knobs: tuple  # (("lr", "0.01"), ...) for the command line
    parent: "Run | None"
    steps: int
    mix: tuple  # ((source, weight), ...)
    decides: str  # digest of all else in the configuration but the seed
    data: str  # the folder of its sources
    tokens: int  # trained here
    flops: float

    @property
    def name(self):
        return Path(self.path).stem

    def folder(self, out):
        return out / self.key / self.name

    def line(self):
        """This run and those before it, first to last."""
        return [*(self.parent.line() if self.parent else []), self]


# ------------------------------------------------------------------------------------------------------------- the plan


def load_study(path):
    """The names of OWN in a study file, in values that JSON has, and the `file`. ConfigError."""
    path = errors.path(path)
    if not path.is_file():
        raise ConfigError(f"there is no study {path}")
    try:
        check_statements(path, ast.parse(path.read_bytes()).body)
        found = {
            name: value
            for name, value in runpy.run_path(str(path)).items()
            if not name.startswith("_") and not isinstance(value, ModuleType)
        }
    except (ConfigError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever somebody's file does
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from None
    if unknown := [name for name in found if name not in OWN and not callable(found[name])]:
        raise ConfigError(f"{path}: {unknown[0]} is none of {', '.join(OWN)}; begin names of your own with _")
    study = {name: plain(found.get(name, usual)) for name, usual in OWN.items()} | {"file": path}
    study["baseline"] = str(study["baseline"])
    variants, seeds = study["variants"], study["seeds"]
    if not variants or not isinstance(variants, dict) or study["baseline"] not in map(str, variants):
        raise ConfigError(f"{path} needs variants, a dict, and a baseline that is one of them")
    for variant, phases in variants.items():
        if not phases or not isinstance(phases, (list, tuple)) or not all(map(is_phase, phases)):
            raise ConfigError(f"{path}: variant {variant!r} is no list of phases, each a path or (path, knobs)")
    if study["cooldown"] and not is_phase(study["cooldown"]):
        raise ConfigError(f"{path}: cooldown is one phase, a path or (path, knobs)")
    if not isinstance(seeds, (list, tuple, range)) or {*map(type, seeds)} != {int} or len({*seeds}) < len(seeds):
        raise ConfigError(f"{path} needs seeds, a list of different numbers")
    if not isinstance(study["knobs"], dict) or not isinstance(study["tasks"], str):
        raise ConfigError(f"{path}: knobs is a dict, and tasks a text, names with commas")
    if not callable(study["picture"] or plot):
        raise ConfigError(f"{path}: picture is a function of values and a path")
    study |= {"seeds": [*seeds], "variants": {str(variant): phases for variant, phases in variants.items()}}
    try:
        json.dumps(written(study))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}; knobs are numbers, texts, lists and dicts") from None
    return study


def written(study):
    """What of a study goes into the file of its table."""
    return {name: value for name, value in study.items() if name not in ("picture", "file")}


def is_phase(phase):
    return isinstance(phase, str) or (isinstance(phase, (list, tuple)) and [*map(type, phase)] == [str, dict])


def find_config(path, file):
    """A config file that a study names: in the folder of the study's file or one above it, or beside this program; the
    path as it is if nowhere."""
    folders = [*file.absolute().parents, HERE]
    found = (folder / errors.path(path) for folder in folders)
    return next((str(config) for config in found if config.is_file()), path)


def plan(study, knobs):
    """{(variant, seed): (its last Run, the same with the cooldown or None)}; equal runs are one object. knobs: for all
    phases, as text. ConfigError."""
    made, contexts, rates = {}, set(), {"lr", "lr_end", "lr_peak"}

    def run(parent, phase, seed):
        path, own = (phase, {}) if isinstance(phase, str) else phase
        if ours := [name for name in ("out", "seed", "init_from") if name in study["knobs"] | own | knobs]:
            raise ConfigError(f"--{ours[0]}: a study decides that itself")
        if clash := {*knobs} & ({*own} | (rates if rates & {*own} else set())):
            raise ConfigError(f"--{clash.pop()}: the study sets that, or what hangs on it, for {path}; change its file")
        all_knobs = {name: str(value) for name, value in (study["knobs"] | own | knobs | {"seed": seed}).items()}
        path = find_config(path, study["file"])
        argv = [path, *(f"--{name}={value}" for name, value in all_knobs.items())]
        ((_, cfg),), _ = read_command_line(argv, train.Config, PRESETS, (), infill.OBJECTIVES)
        contexts.add(cfg.block_size)
        dtype = str(find_device(cfg)[1]).removeprefix("torch.")  # auto is not the same on all machines
        all_knobs["dtype"] = dtype
        decides = {name: plain(value) for name, value in asdict(cfg).items() if name not in WITHOUT_EFFECT}
        quotas(cfg.mix)  # MixError, where a weight is no number
        weights = {name: float(Fraction(str(weight))) for name, weight in cfg.mix.items()}
        decides |= {"dtype": dtype, "mix": weights}
        data = {name: contents(Path(cfg.data) / name) for name in cfg.mix}
        key = digest([ALGORITHM, parent and parent.key, Path(path).stem, decides, data])
        if key not in made:
            steps, _ = train.phase_steps(path, cfg)
            tokens, alike = steps * cfg.batch, {k: v for k, v in decides.items() if k not in ("mix", "seed")}
            mix = tuple((name, weights[name] if isinstance(one, str) else one) for name, one in cfg.mix.items())
            vocabulary = prepared(Path(cfg.data) / next(iter(cfg.mix)))["tokenizer"]["vocab_size"]
            made[key] = Run(
                key, path, tuple(all_knobs.items()), parent, steps, mix, digest(alike), cfg.data, tokens,
                tokens * flops_per_token(cfg, vocabulary),
            )  # fmt: skip
        return made[key]

    ends = {}
    for variant, phases in study["variants"].items():
        for seed in study["seeds"]:
            last = None
            for phase in phases:
                last = run(last, phase, seed)
            ends[variant, seed] = last, run(last, study["cooldown"], seed) if study["cooldown"] else None
    if len(contexts) > 1:
        raise ConfigError("variants differ in block_size, so they could not be compared on the same windows")
    return ends


def digest(value):
    """A name for what JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def prepared(folder):
    """meta.json of a source. ConfigError."""
    try:
        return files.read_json(folder / "meta.json", META)
    except OSError:
        raise ConfigError(f"{folder} is not prepared: run {command_for(folder)}, or say --data=FOLDER") from None
    except UserError as error:
        raise ConfigError(f"{error}; prepare it again") from None


def contents(folder):
    """What a source holds, wherever it lies and whatever it was made from."""
    meta = prepared(folder)
    return [meta["tokenizer"], *([shard["sha256"] for shard in meta[split]["shards"]] for split in ("train", "val"))]


def flops_per_token(cfg, vocabulary):
    with torch.device("meta"):
        return GPT(train.model_config(cfg, vocabulary)).flops_per_token()


def evaluation_of(study, ends, data, folder, examples, how):
    """Options of eval.py, and a `key` of what decides its numbers: those and contents, wherever these lie. ConfigError,
    EvalError."""
    if examples < 1:
        raise ConfigError(f"--eval_examples={examples} is less than 1")
    lines = [end.line() for pair in ends.values() for end in pair if end]
    sources = sorted({source for line in lines for run in line for source, _ in run.mix})
    holes = [f"{source}_{kind}" for source in sources for kind in ("spans", "lines")]  # in held-out documents
    names = [name.strip() for name in study["tasks"].split(",") if name.strip()]
    tasks = [name for name in names if folder or name in holes]
    held = [EVALUATION, *(contents(Path(data) / name) for name in sources)]
    if folder:  # a mistake is said now
        read = read_tasks(Path(folder), [name for name in tasks if name not in holes], examples)
        held += [[task.name, task.kind, task.group, task.sha256] for task in read]
    asked = {"tasks": ",".join(sources + tasks), "limit": examples} | how
    return asked | {"sources": data, "data": folder, "key": digest([asked, held])}


def all_runs(ends, evaluation):
    """{run: how it is evaluated, None if no variant ends with it}, those that others begin from first."""
    shown = [end for pair in ends.values() for end in pair if end]
    return {run: evaluation if run in shown else None for end in shown for run in end.line()}


# ------------------------------------------------------------------------------------------------------------- the work


class Stopped(Exception):
    """A signal asked this process to end."""


class RunError(Exception):
    """A run that did not come to its end, in one line."""


def trained_path(run, out):
    return out / run.key / "trained.json"


def scores_path(run, out, evaluation):
    return out / run.key / f"eval-{evaluation['key']}.json"


def result_path(run, out, evaluation):
    return out / run.key / f"result-{evaluation['key']}.json"


def done(run, out, evaluation):
    return trained_path(run, out).exists() and not (evaluation and not result_path(run, out, evaluation).exists())


@contextmanager
def claimed(run, out):
    """A file if this process has the run for itself, else None; train.py and eval.py keep it if this process dies
    before them."""
    (out / run.key).mkdir(parents=True, exist_ok=True)
    with open(out / run.key / "claim", "a") as file:
        yield None if files.lock(file) is False else file


class Worker:
    """Runs commands, one after another, and passes signals on to the one that runs."""

    def __init__(self):
        self.process, self.signal = None, None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, number, _):
        self.signal = number
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def do(self, command, log, claim):
        """Run a command of this project, its output to a file. Stopped, RunError."""
        if self.signal:
            raise Stopped
        with open(log, "ab") as file:
            environment = os.environ | {"PYTHONUNBUFFERED": "1"}
            how = {"stdout": file, "stderr": subprocess.STDOUT, "pass_fds": [claim.fileno()], "env": environment}
            self.process = subprocess.Popen([sys.executable, *command], start_new_session=True, **how)
            if self.signal:  # it came in between
                self.process.send_signal(signal.SIGTERM)
            code = self.process.wait()
        if self.signal:
            raise Stopped
        if code:
            said = Path(log).read_text(errors="replace").strip().splitlines()
            raise RunError(f"{' '.join(command)}: exit code {code}: {said[-1] if said else ''}; all of it in {log}")


def train_run(run, out, worker, claim):
    """Train a run, or what is missing of it, and leave trained.json. Stopped, RunError."""
    start, anew = time.perf_counter(), not run.folder(out).exists()
    before = [f"--init_from={run.parent.folder(out)}"] if run.parent else []
    knobs = [f"--{name}={value}" for name, value in run.knobs]
    ours = [f"--out={out / run.key}", "--keep=1", "--eval_every=0", "--eval_tokens=4096"]  # eval.py comes after
    log = out / run.key / "train.log"
    worker.do([str(HERE / "train.py"), run.path, *knobs, *ours, *before], log, claim)
    try:
        step = checkpoint.load_state(checkpoint.find(run.folder(out)))["step"]
    except checkpoint.CheckpointError as error:
        raise RunError(str(error)) from None
    if step != run.steps:
        raise RunError(f"{run.folder(out)} is at step {step} of {run.steps}; see {log}")
    about = {"phase": run.name, "knobs": dict(run.knobs), "mix": dict(run.mix), "decides": run.decides,
             "parent": run.parent and run.parent.key, "tokens": run.tokens, "flops": run.flops}  # fmt: skip
    about["seconds"] = time.perf_counter() - start if anew else None  # None: of several starts
    files.write_json(trained_path(run, out), about)


def evaluate_run(run, out, evaluation, worker, claim):
    """Evaluate a trained run, or what is missing of that, and leave what result_path says. Stopped, RunError."""
    start, to = time.perf_counter(), scores_path(run, out, evaluation)
    options = [f"--{name}={value}" for name, value in evaluation.items() if value and name != "key"]
    command = [str(HERE / "eval.py"), str(run.folder(out)), f"--out={to}", *options]
    worker.do(command, to.with_suffix(".log"), claim)
    values = {name: value(tasks) for name, tasks in measures(load_results(to)).items()}
    made = {"evaluation": evaluation, "measures": values, "seconds": time.perf_counter() - start}
    files.write_json(result_path(run, out, evaluation), made)


def measures(scores):
    """A result file of eval.py -> {measure: [what each example of a task gives, a float64 array, for every task]}: bits
    per byte of every source and of right answers, what of a hole's a suffix saves, and accuracies between 0 for what
    knows nothing (chance, or the commonest answer) and 1."""
    made = {}
    for name, group in scores["groups"].items():
        mine = [scores["tasks"][task] for task in group["tasks"]]
        bits = [bits_of(one["items"], one["kind"]) for one in mine]
        if name == "held out":
            made |= {source: [each] for source, each in zip(group["tasks"], bits, strict=True)}
        else:
            made[f"{name} answers"] = bits
        if gains := [np.array(one["items"]["suffix_gain"], float) for one in mine if "suffix_gain" in one["items"]]:
            made[f"{name} suffix gain"] = gains
        if choices := [one for one in mine if "chance" in one and floor(one) < 1]:
            made[f"{name} acc"] = [1 - (1 - np.array(one["items"]["acc"], float)) / (1 - floor(one)) for one in choices]
    return made


def value(tasks):
    """Of a measure: the mean over tasks, which weigh the same, of their examples' means."""
    return float(np.mean([each.mean() for each in tasks]))


def carry_out(runs, out):
    """Do what is missing of all_runs, beside other processes that do the same -> whether all of it came to an end.
    Stopped."""
    worker, failed, waits = Worker(), set(), False
    while todo := [run for run in runs if not done(run, out, runs[run]) and not failed & {*run.line()}]:
        for run in todo:
            if run.parent in todo:
                continue
            with claimed(run, out) as claim:
                if not claim or done(run, out, runs[run]):
                    continue
                print(f"{run.key}  {len(todo):>3} left  {run.name}  {dict(run.knobs)}", flush=True)
                try:
                    if not trained_path(run, out).exists():
                        train_run(run, out, worker, claim)
                    if runs[run]:
                        evaluate_run(run, out, runs[run], worker, claim)
                except RunError as error:
                    failed.add(run)
                    print(f"study.py: {error}", file=sys.stderr, flush=True)
                waits = False
                break
        else:
            if worker.signal:
                raise Stopped
            if not waits:
                print(f"waiting for {len(todo)} runs that other processes have, or that begin from these", flush=True)
            waits = True
            time.sleep(2)
    return not failed


# ----------------------------------------------------------------------------------------------------------- the table


def interval(samples):
    """(mean, half of the 95% interval, nan for one seed) of a measure. samples: its tasks, for every seed the same
    examples. The errors of seeds and of examples are added as if independent, which is a little too much: what a seed
    does to one example is in both."""
    means = [value(tasks) for tasks in samples]
    if len(means) < 2:
        return means[0], math.nan
    return np.mean(means), math.hypot(student(len(means) - 1) * mean(means)[1], over_examples(samples))


def over_examples(samples):
    """Half of the 95% interval over examples."""
    errors = [mean(np.mean(each, axis=0))[1] for each in zip(*samples, strict=True)]  # of a task, its mean over seeds
    return NORMAL * math.hypot(*errors) / len(errors)


def student(freedom):
    """97.5% quantile of Student's t; from ten degrees of freedom on by its expansion around the normal's
    (Abramowitz and Stegun, 26.7.5)."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z, n = NORMAL, freedom
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2) + third


def compare(study, found):
    """{measure: {variant: ((mean, half interval) of its values, (..) of its differences from the baseline, or None if
    it is the baseline)}}, over the seeds at which both are there; no accuracies at which all variants may be guessing.
    found: {(variant, seed): measures}."""
    made = {}
    for name in dict.fromkeys(name for one in found.values() for name in one):
        samples = {}
        for variant in study["variants"]:
            both = variant, study["baseline"]
            if seeds := [s for s in study["seeds"] if all(name in found.get((v, s), {}) for v in both)]:
                samples[variant] = [[found[v, s][name] for s in seeds] for v in both]
        if not samples:
            continue
        if name.endswith(" acc") and all(guessing(mine) for mine, _ in samples.values()):
            continue
        made[name] = {}
        for variant, (mine, base) in samples.items():
            apart = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(mine, base, strict=True)]
            made[name][variant] = interval(mine), None if variant == study["baseline"] else interval(apart)
    return made


def guessing(samples):
    """Whether an accuracy may be 0."""
    accuracy, half = interval(samples)
    return accuracy <= (over_examples(samples) if math.isnan(half) else half)


def print_table(table, study, ends, which):
    """Markdown: a column a variant, or a row if they are many; tokens, compute, then for every measure the baseline's
    value and how far the others are from it, * if the interval is clear of zero."""
    variants = [study["baseline"], *(v for v in study["variants"] if v != study["baseline"])]
    lines = [ends[variant, study["seeds"][0]][which].line() for variant in variants]
    rows = [["", *variants]]
    rows.append(["tokens", *(train.si(sum(run.tokens for run in line)) for line in lines)])
    rows.append(["FLOPs", *(train.si(sum(run.flops for run in line)) for line in lines)])
    for measure, of in table.items():
        rows.append([measure])
        for variant in variants:
            if variant not in of:
                rows[-1].append("")
                continue
            value, difference = of[variant]
            mean, half = difference or value
            sure = "*" if difference and abs(mean) > half > 0 else ""
            around = "" if math.isnan(half) else f" ± {half:.3f}"
            rows[-1].append(f"{mean:{'+' if difference else ''}.3f}{around}{sure}")
    if len(variants) > len(rows):  # the shorter way across
        rows = [[*column] for column in zip(*rows, strict=True)]
    rows = [[cell(text) for text in row] for row in rows]
    rows.insert(1, ["---"] + ["---:"] * (len(rows[0]) - 1))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("| " + " | ".join(cells) + " |")


def cell(text):
    """A text as Markdown has it in a table: on one line, and without the border of columns."""
    return " ".join(text.split()).replace("|", "\\|")


def plot(tables, study, to):
    """Differences from the baseline with their intervals: a panel a measure, a row a variant."""
    plt = pyplot(to)
    names = list(next(iter(tables.values())))
    others = [variant for variant in study["variants"] if variant != study["baseline"]]
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    size = (2 + 2.6 * columns, (0.6 + 0.3 * len(others)) * rows + 0.8)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        for shift, (title, table) in enumerate(tables.items()):
            for y, variant in enumerate(others):
                if variant in table.get(name, {}):
                    mean, half = table[name][variant][1]
                    where, colour = y + 0.2 * shift, f"C{shift}"
                    half = 0 if math.isnan(half) else half
                    how = {"color": colour, "label": None if y else title, "fmt": "o", "markersize": 4}
                    axis.errorbar(mean, where, xerr=half, **how)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=label(name), yticks=range(len(others)), yticklabels=[*map(label, others)])
        axis.tick_params(labelsize=8)
    axes[0, 0].invert_yaxis()
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    if len(tables) > 1:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", fontsize=8)
    figure.suptitle(f"difference from {label(study['baseline'])}, 95% over {len(study['seeds'])} seeds and examples")
    save(figure, to)


def show(study, ends, out, knobs, evaluation, to):
    """Print the tables of what is there, matched cooldown first; write them as `to`.json with a picture, `to`.png."""
    titles = ["as trained, without it" if study["cooldown"] else "as trained", "after the same cooldown"]
    tables, each = {}, {}
    for which in (1, 0):
        last = {place: pair[which] for place, pair in ends.items() if pair[which]}
        ready = {place: scores_path(run, out, evaluation) for place, run in last.items() if done(run, out, evaluation)}
        found = {place: measures(load_results(path)) for place, path in ready.items()}
        if table := compare(study, found):
            values = {place: {name: value(tasks) for name, tasks in one.items()} for place, one in found.items()}
            tables[titles[which]] = table
            each[titles[which]] = [{"variant": place[0], "seed": place[1], **some} for place, some in values.items()]
            print(f"\n{titles[which]}; means over seeds of {study['baseline']}, and how far the others are from it\n")
            print_table(table, study, ends, which)
            if len(found) < len(last):
                lacking = [f"{variant} with seed {seed}" for variant, seed in last if (variant, seed) not in found]
                print(f"not done yet: {', '.join(lacking)}")
    if not tables:
        print(f"{out} has no finished run of {study['baseline']!r} with these options")
        return
    print("\nbits per byte of held-out sources and of right answers: less is better; suffix gain: more of them saved")
    print("acc: 0 what knows nothing gets, 1 all right; left out where every variant may be guessing")
    print("* the 95% interval over seeds and examples, paired, is clear of zero; chance makes one in 20 so")
    if not to:
        return
    about = written(study)
    asked = {name: evaluation[name] for name in ("tasks", "limit", "dtype")}
    about |= {"knobs": study["knobs"] | {k: v for k, v in knobs.items() if k != "data"}, "evaluation": asked}
    with open(f"{to}.lock", "a") as file:  # several may come to the end at once
        files.lock(file, wait=True)
        files.write_json(Path(f"{to}.json"), {"study": about, "tables": tables, "runs": each})
        try:
            if study["picture"]:
                study["picture"](values, Path(f"{to}.png"))  # as trained
            else:
                plot(tables, study, Path(f"{to}.png"))
        except Exception as error:  # the table is there
            print(f"no picture: {error}")


def check_files(to):
    """UserError if there is a table `to`.json or a picture without one that no study has written."""
    table, picture = Path(f"{to}.json"), Path(f"{to}.png")
    try:
        if table.exists():
            files.read_json(table, {"study": dict, "tables": dict, "runs": dict})
        elif picture.exists():
            raise UserError(f"{picture} belongs to no table of a study")
    except UserError as error:
        raise ConfigError(f"{error}; say another --out, or move it away") from None


def show_cost(study, ends, out, data, evaluation):
    runs, first = all_runs(ends, evaluation), study["seeds"][0]
    for variant in study["variants"]:
        line = (ends[variant, first][1] or ends[variant, first][0]).line()
        drawn = Counter()
        for run in line:
            for source, weight in run.mix:
                drawn[source] += run.tokens * weight / sum(w for _, w in run.mix)
        epochs = {name: tokens / prepared(Path(data) / name)["train"]["tokens"] for name, tokens in drawn.items()}
        many = ", ".join(f"{epoch:.1f} epochs of {name}" for name, epoch in epochs.items() if epoch > 1)
        phases = " -> ".join(f"{run.name} {train.si(run.tokens)}" for run in line)
        print(f"{cell(variant):<24} {phases}   {many}".rstrip())
    alone = sum(run.tokens for pair in ends.values() for run in (pair[1] or pair[0]).line())
    tokens, flops = sum(run.tokens for run in runs), sum(run.flops for run in runs)
    ready = [run for run in runs if done(run, out, runs[run])]
    print(
        f"{len(study['seeds'])} seeds: {len(runs)} runs, {train.si(tokens)} tokens ({train.si(alone)} if nothing were"
        f" shared), {train.si(flops)}FLOP; {len(ready)} runs done"
    )
    timed = [files.read_json(trained_path(run, out), {"seconds": files.number, "flops": files.real}) for run in ready]
    timed = [one for one in timed if one["seconds"]]
    evaluated = [result_path(run, out, evaluation) for run in ready if runs[run]]
    asked = [files.read_json(path, {"seconds": files.real})["seconds"] for path in evaluated]
    if timed and len(ready) < len(runs):
        rate = sum(one["flops"] for one in timed) / sum(one["seconds"] for one in timed)
        left = [run for run in runs if run not in ready]
        seconds = sum(run.flops for run in left) / rate
        seconds += sum(1 for run in left if runs[run]) * (sum(asked) / len(asked) if asked else 0)
        print(f"left: {train.clock(seconds)} of one process at the rate of those done")


@errors.command
def main(argv):
    parser = errors.Parser(__doc__)
    parser.add_argument("study", type=errors.path, help="a study file")
    parser.add_argument("--dry", action="store_true", help="say what it costs and what is done; do nothing")
    parser.add_argument("--table", action="store_true", help="print and draw what is there; train nothing")
    parser.add_argument("--baseline", help="compare with this variant, and write no files of that")
    parser.add_argument("--out", type=errors.path, default="studies", help="folder of runs, shared by all studies")
    parser.add_argument("--eval_tasks", type=errors.path, help="folder of task files; default: held-out parts alone")
    parser.add_argument("--eval_examples", type=int, default=200, help="of each task; of held-out windows as many")
    known = {field.name for field in fields(train.Config)}
    paths, given, switched = split_words(["--help" if word == "-h" else word for word in argv], SWITCHES)
    words = [name if value is None else f"{name}={value}" for name, value in (given | dict.fromkeys(switched)).items()]
    args, rest = parser.parse_known_args([*paths, *(f"--{word}" for word in words)])
    whole = True
    try:
        knobs = dict(argument.removeprefix("--").partition("=")[::2] for argument in rest)
        if strange := [name for name in knobs if name not in known]:
            raise ConfigError(f"{strange[0]} is neither an option of study.py nor a knob of train.py")
        study = load_study(args.study)
        if args.baseline:
            study["baseline"] = args.baseline
        if args.baseline not in (None, *study["variants"]):
            raise ConfigError(f"--baseline={args.baseline} is none of {', '.join(study['variants'])}")
        ends = plan(study, knobs)
        data, chosen = next(iter(ends.values()))[0].data, study["knobs"] | knobs
        how = {name: chosen.get(name, "").replace("auto", "") for name in ("dtype", "device")}  # "": as eval.py would
        evaluation = evaluation_of(study, ends, data, str(args.eval_tasks or ""), args.eval_examples, how)
        if args.dry:
            show_cost(study, ends, args.out, data, evaluation)
            return 0
        to = None if args.baseline else args.out / args.study.stem
        if to:
            check_files(to)
        if not args.table:
            whole = carry_out(all_runs(ends, evaluation), args.out)
        show(study, ends, args.out, knobs, evaluation, to)
    except Stopped:
        print("stopped; the same command continues")
    return 0 if whole else 1


if __name__ == "__main__":
    errors.run(main)
