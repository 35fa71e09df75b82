"""What one change in the data does: many runs, one table, with seeds and intervals.

    python study.py study/crystal.py --dry            # what it would cost, and what is there already
    python study.py study/crystal.py                  # train and evaluate what is missing; then the table, the picture
    python study.py study/crystal.py --budget=50M     # with any knob of train.py, for all its runs

A study is a Python file that names variants, each a list of phases:

    variants = {"three phases": ["config/phase1.py", "config/phase2.py"],
                "no code": [("config/phase1.py", {"mix": {"text": 1.0}, "share": 0.9})]}
    baseline = "no code"        # what the others are compared with
    cooldown = "config/cool.py" # optional, a phase that every variant is continued with; tables without it come second
    seeds = (1, 2, 3)           # of initialisation and of the order of the data
    knobs = {"budget": "2M"}    # of all phases; the command line beats them
    tasks = "quick,code_spans"  # of eval.py; those from files if --eval_tasks=FOLDER says where they are
    def picture(values, to):    # instead of the usual one: {(variant, seed): {measure: value}}, path

Variants that begin with the same phases share the runs of these. A run lives in OUT/<key>, its key made from all that
decides its numbers: configuration, seed, data, the run before it; what an evaluation gave goes by what it was asked.
So the same command continues what was killed, runs nothing twice, also for other studies on the same folder, and after
one number is changed trains what depends on it.
Several processes, on one machine or many, may work on one folder: each takes a run that no other has.

What variants end with is evaluated by eval.py, on every source that the study names and on its tasks. Differences are
paired by seed; intervals are Student's, 95%, over seeds: they say how far the mean over new seeds may be, not new data.
One seed has none.
"""

import argparse
import fcntl
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

import checkpoint
import infill
import train
from configurator import ConfigError, read_command_line
from model import GPT, PRESETS

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5%, of 1 to 9 degrees of freedom
NORMAL = 1.95996  # of infinitely many
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
    decides: str  # sha256 of all else in the configuration but the seed
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
    """The names of OWN in a study file. ConfigError."""
    if not Path(path).is_file():
        raise ConfigError(f"there is no study {path}")
    found = {name: value for name, value in runpy.run_path(path).items() if not name.startswith("_")}
    if unknown := [name for name in found if name not in OWN and not callable(found[name])]:
        raise ConfigError(f"{path}: {unknown[0]} is none of {', '.join(OWN)}; begin names of your own with _")
    study = OWN | {name: found[name] for name in OWN if name in found}
    if not study["variants"] or study["baseline"] not in study["variants"]:
        raise ConfigError(f"{path} needs variants, and a baseline that is one of them")
    return study


def plan(study, knobs):
    """{(variant, seed): (its last Run, the same with the cooldown or None)}; equal runs are one object. ConfigError."""
    made = {}

    def run(parent, phase, seed):
        path, own = (phase, {}) if isinstance(phase, str) else phase
        all_knobs = {name: str(value) for name, value in (study["knobs"] | own | knobs | {"seed": seed}).items()}
        argv = [path, *(f"--{name}={value}" for name, value in all_knobs.items())]
        ((_, cfg),), _ = read_command_line(argv, train.Config, PRESETS, (), infill.OBJECTIVES)
        decides = {name: value for name, value in asdict(cfg).items() if name not in WITHOUT_EFFECT}
        data = {name: prepared(Path(cfg.data) / name) for name in cfg.mix}
        key = digest([parent and parent.key, Path(path).stem, decides, data])
        if key not in made:
            steps, *_ = train.phase_steps(path, cfg)
            tokens, alike = steps * cfg.batch, {k: v for k, v in decides.items() if k not in ("mix", "seed")}
            vocabulary = next(iter(data.values()))["tokenizer"]["vocab_size"]
            made[key] = Run(
                key, path, tuple(all_knobs.items()), parent, steps, tuple(cfg.mix.items()), digest(alike), tokens,
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
    return ends


def digest(value):
    """A name for what JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def prepared(folder):
    """meta.json of a source, which has the sha256 of its shards. ConfigError."""
    try:
        return json.loads((folder / "meta.json").read_text())
    except OSError:
        raise ConfigError(f"{folder} is not prepared; see prepare.py, or say --data=FOLDER") from None


def flops_per_token(cfg, vocabulary):
    with torch.device("meta"):
        return GPT(train.model_config(cfg, vocabulary)).flops_per_token()


def evaluation_of(study, ends, data, folder, examples, dtype):
    """Options of eval.py, and a `key` of what decides its numbers: those and contents, wherever these lie."""
    sources = sorted({source for pair in ends.values() for run in pair[0].line() for source, _ in run.mix})
    tasks = [name for name in study["tasks"].split(",") if folder or name.endswith(("_spans", "_lines"))]
    contents = [prepared(Path(data) / name) for name in sources]
    if folder:
        contents += [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).glob("*.jsonl*"))]
    asked = {"tasks": ",".join(sources + tasks), "limit": examples, "dtype": dtype}
    return asked | {"sources": data, "data": folder, "key": digest([asked, contents])}


def all_runs(ends, evaluation):
    """{run: what eval.py is asked about it, nothing if no variant ends with it}, those that others begin from first."""
    shown = [end for pair in ends.values() for end in pair if end]
    return {run: evaluation if run in shown else {} for end in shown for run in end.line()}


# ------------------------------------------------------------------------------------------------------------- the work


class Stopped(Exception):
    """A signal asked this process to end."""


def result_path(run, out, evaluation):
    return out / run.key / (f"result-{evaluation['key']}.json" if evaluation else "result.json")


def results(run, out, evaluation):
    """What is known of a finished run, if it was evaluated so; else None."""
    path = result_path(run, out, evaluation)
    return json.loads(path.read_text()) if path.exists() else None


@contextmanager
def claimed(run, out):
    """Whether this process has the run for itself; train.py and eval.py keep it if this process dies before them."""
    (out / run.key).mkdir(parents=True, exist_ok=True)
    with open(out / run.key / "claim", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
        else:
            yield file


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
        """Run a command of this project, its output to a file. Stopped; RuntimeError if it fails."""
        if self.signal:
            raise Stopped
        with open(log, "ab") as file:
            environment = os.environ | {"PYTHONUNBUFFERED": "1"}
            how = {"stdout": file, "stderr": subprocess.STDOUT, "pass_fds": [claim.fileno()], "env": environment}
            self.process = subprocess.Popen([sys.executable, *command], start_new_session=True, **how)
            code = self.process.wait()
        if self.signal:
            raise Stopped
        if code:
            said = Path(log).read_text(errors="replace").strip().splitlines()
            raise RuntimeError(f"{' '.join(command)}: exit code {code}: {said[-1] if said else ''}; all of it in {log}")


def work(run, out, evaluation, worker, claim):
    """Train and evaluate a run, or what is missing of it, and leave what `results` reads."""
    here, start = Path(__file__).parent, time.perf_counter()
    before = [f"--init_from={run.parent.folder(out)}"] if run.parent else []
    knobs = [f"--{name}={value}" for name, value in run.knobs]
    ours = [f"--out={out / run.key}", "--keep=1", "--eval_every=0", "--eval_tokens=4096"]  # eval.py comes after
    worker.do([str(here / "train.py"), run.path, *knobs, *ours, *before], out / run.key / "train.log", claim)
    trained = time.perf_counter()
    state = checkpoint.load_state(checkpoint.find(run.folder(out)))
    if state["step"] != run.steps:
        raise RuntimeError(
            f"{run.folder(out)} is at step {state['step']} of {run.steps}; see {out / run.key}/train.log"
        )
    scores = {"tasks": {}, "groups": {}}
    if evaluation:
        to = out / run.key / f"eval-{evaluation['key']}.json"
        options = [f"--{name}={value}" for name, value in evaluation.items() if value and name != "key"]
        worker.do([str(here / "eval.py"), str(run.folder(out)), f"--out={to}", *options], to.with_suffix(".log"), claim)
        scores = json.loads(to.read_text())
    made = {
        "evaluation": evaluation, "phase": run.name, "knobs": dict(run.knobs), "mix": dict(run.mix),
        "decides": run.decides, "parent": run.parent and run.parent.key, "tokens": run.tokens, "flops": run.flops,
        "seconds": [round(trained - start), round(time.perf_counter() - trained)], "measures": measures(scores),
    }  # fmt: skip
    checkpoint.write_json(result_path(run, out, evaluation), made)


def measures(scores):
    """A result file of eval.py -> {measure: value}: bits per byte of every source and of right answers, and accuracies
    between 0 for chance and 1, of every group of tasks."""
    made = {
        name: task["scores"]["bpb"]["mean"] for name, task in scores["tasks"].items() if task["group"] == "held out"
    }
    for name, group in scores["groups"].items():
        if name != "held out":
            made[f"{name} answers"] = group["bpb"]
            if "acc" in group:
                made[f"{name} acc"] = group["acc"]
    return made


def carry_out(runs, out):
    """Do what is missing, beside other processes that do the same; until all is done. runs: of all_runs. Stopped,
    RuntimeError."""
    worker = Worker()
    while todo := [run for run, evaluation in runs.items() if not results(run, out, evaluation)]:
        ready = [run for run in todo if not (run.parent and run.parent in todo)]
        for run in ready:
            with claimed(run, out) as claim:
                if claim and not results(run, out, runs[run]):
                    print(f"{run.key}  {len(todo):>3} left  {run.name}  {dict(run.knobs)}", flush=True)
                    work(run, out, runs[run], worker, claim)
                    break
        else:
            if worker.signal:
                raise Stopped
            time.sleep(2)  # others are at it


# ----------------------------------------------------------------------------------------------------------- the table


def mean_interval(values):
    """(mean, half of the 95% interval of Student's t, nan for one value)."""
    values = np.array(values, float)
    if len(values) < 2:
        return values.mean(), math.nan
    return values.mean(), student(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))


def student(freedom):
    """97.5% quantile of Student's t; from ten degrees of freedom on by its expansion around the normal's
    (Abramowitz and Stegun, 26.7.5)."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z, n = NORMAL, freedom
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2) + third


def compare(study, values):
    """{measure: {variant: ((mean, half interval) of its values, (..) of its differences from the baseline, or None if
    it is the baseline)}}, over the seeds at which both are there; no accuracies at which all variants may be guessing.
    values: {(variant, seed): {measure: value}}."""
    made = {}
    names = list(dict.fromkeys(name for one in values.values() for name in one))
    for name in names:
        for variant in study["variants"]:
            seeds = [s for s in study["seeds"] if name in values.get((variant, s), {})
                     and name in values.get((study["baseline"], s), {})]  # fmt: skip
            if seeds:
                mine, base = ([values[v, s][name] for s in seeds] for v in (variant, study["baseline"]))
                difference = None if variant == study["baseline"] else mean_interval(np.subtract(mine, base))
                made.setdefault(name, {})[variant] = mean_interval(mine), difference

    def guessed(of):
        return all(mean <= np.nan_to_num(half) for (mean, half), _ in of.values())

    return {name: of for name, of in made.items() if not (name.endswith(" acc") and guessed(of))}


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
            sure = "*" if difference and abs(mean) > half else ""
            around = "" if math.isnan(half) else f" ± {half:.3f}"
            rows[-1].append(f"{mean:{'+' if difference else ''}.3f}{around}{sure}")
    if len(variants) > len(rows):  # the shorter way across
        rows = [[*column] for column in zip(*rows, strict=True)]
    rows.insert(1, ["---"] + ["---:"] * (len(rows[0]) - 1))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("| " + " | ".join(cells) + " |")


def plot(tables, study, to):
    """Differences from the baseline with their intervals: a panel a measure, a row a variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(next(iter(tables.values())))
    others = [variant for variant in study["variants"] if variant != study["baseline"]]
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    size = (2 + 2.6 * columns, (0.6 + 0.3 * len(others)) * rows + 0.8)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        for shift, (label, table) in enumerate(tables.items()):
            for y, variant in enumerate(others):
                if variant in table.get(name, {}):
                    mean, half = table[name][variant][1]
                    where, colour = y + 0.2 * shift, f"C{shift}"
                    half = 0 if math.isnan(half) else half
                    how = {"color": colour, "label": None if y else label, "fmt": "o", "markersize": 4}
                    axis.errorbar(mean, where, xerr=half, **how)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=name, yticks=range(len(others)), yticklabels=others)
        axis.tick_params(labelsize=8)
    axes[0, 0].invert_yaxis()
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    if len(tables) > 1:
        axes[0, 0].legend(fontsize=8)
    figure.suptitle(f"difference from {study['baseline']}, 95% over {len(study['seeds'])} seeds")
    figure.savefig(to, dpi=120)


def show(study, ends, out, evaluation, to):
    """Print the tables of what is there, matched cooldown first; write them with the picture as `to`.json and .png."""
    about = f"means over {len(study['seeds'])} seeds of {study['baseline']}, and how far the others are from it"
    titles = ["as trained, without it" if study["cooldown"] else "as trained", "after the same cooldown"]
    tables, each = {}, {}
    for which in (1, 0):
        found = {place: results(pair[which], out, evaluation) for place, pair in ends.items() if pair[which]}
        values = {place: one["measures"] for place, one in found.items() if one}
        if table := compare(study, values):
            tables[titles[which]] = table
            each[titles[which]] = [{"variant": place[0], "seed": place[1], **some} for place, some in values.items()]
            print(f"\n{titles[which]}; {about}")
            print_table(table, study, ends, which)
    if tables:
        print("\nbits per byte of held-out sources and of right answers: less is better")
        print("acc: 0 chance, 1 all right; left out where every variant may be guessing")
        print("* the 95% interval over seeds, paired, is clear of zero; of 20 such marks one is expected by chance")
        plain = {name: value for name, value in study.items() if name != "picture"}
        checkpoint.write_json(to.with_suffix(".json"), {"study": plain, "tables": tables, "runs": each})
        try:
            if study["picture"]:
                study["picture"](values, to.with_suffix(".png"))  # as trained
            else:
                plot(tables, study, to.with_suffix(".png"))
        except ImportError:
            print("no picture: pip install matplotlib")


def show_cost(study, ends, out, evaluation):
    runs = all_runs(ends, evaluation)
    done = {run: one for run in runs if (one := results(run, out, runs[run]))}
    for variant in study["variants"]:
        last = ends[variant, study["seeds"][0]][1] or ends[variant, study["seeds"][0]][0]
        phases = " -> ".join(f"{run.name} {train.si(run.tokens)}" for run in last.line())
        print(f"{variant:<24} {phases}")
    alone = sum(run.tokens for pair in ends.values() for run in (pair[1] or pair[0]).line())
    tokens, flops = sum(run.tokens for run in runs), sum(run.flops for run in runs)
    print(
        f"{len(study['seeds'])} seeds: {len(runs)} runs, {train.si(tokens)} tokens ({train.si(alone)} if nothing were"
        f" shared), {train.si(flops)}FLOP; {len(done)} runs done"
    )
    if done:
        rate = sum(one["flops"] for one in done.values()) / max(1, sum(one["seconds"][0] for one in done.values()))
        each = sum(one["seconds"][1] for one in done.values()) / len(done)
        left = [run for run in runs if run not in done]
        print(
            f"left: {train.clock(sum(run.flops for run in left) / rate + each * len(left))} at the rate of those done"
        )


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="a study file")
    parser.add_argument("--dry", action="store_true", help="say what it costs and what is done; do nothing")
    parser.add_argument("--table", action="store_true", help="print what is there; do nothing")
    parser.add_argument("--out", type=Path, default=Path("studies"), help="folder of runs, shared by all studies")
    parser.add_argument("--eval_tasks", default="", help="folder of task files; default: held-out parts alone")
    parser.add_argument("--eval_examples", type=int, default=200, help="of each task; of held-out windows as many")
    args, rest = parser.parse_known_args(argv)
    try:
        known = {field.name for field in fields(train.Config)}
        knobs = dict(argument.removeprefix("--").partition("=")[::2] for argument in rest)
        if strange := [name for name in knobs if name not in known]:
            raise ConfigError(f"{strange[0]} is neither an option of study.py nor a knob of train.py")
        study = load_study(args.study)
        ends = plan(study, knobs)
        data = knobs.get("data") or study["knobs"].get("data", train.Config.data)
        dtype = (study["knobs"] | knobs).get("dtype", "").replace("auto", "")
        evaluation = evaluation_of(study, ends, data, args.eval_tasks, args.eval_examples, dtype)
        if args.dry:
            show_cost(study, ends, args.out, evaluation)
            return 0
        if not args.table:
            carry_out(all_runs(ends, evaluation), args.out)
    except ConfigError as error:
        print(f"study.py: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"study.py: {error}", file=sys.stderr)
        return 1
    except Stopped:
        print("stopped; the same command continues")
        return 0
    show(study, ends, args.out, evaluation, args.out / Path(args.study).stem)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
