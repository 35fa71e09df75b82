"""Train a GPT through phases of mixed sources.

    python train.py config/phase1.py                                     # one phase; prepares a corpus if there is none
    python train.py config/phase1.py config/phase2.py config/phase3.py   # one run through three phases
    python train.py config/phase2.py --init_from=out/phase1              # or one after the other, to the same weights
    python train.py config/phase1.py --size=124M --budget=2.5B --batch=512K   # any knob of this file, for every phase
    python train.py config/crystal7b/phase?.py --plan                    # show what would be trained, and stop
    torchrun --standalone --nproc_per_node=8 train.py config/phase1.py   # 8 GPUs; the same samples in the same steps
    torchrun --nnodes=4 --nproc_per_node=8 --max-restarts=3 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ...

The same command again continues where it stopped, after any kind of death, on any number of processes. --fresh starts
over and moves what is there aside. Ctrl-C, SIGTERM or SIGUSR1, to any of the processes, finishes the step, saves and
exits 0. Exit codes: 0 done, 2 your mistake, 1 ours.

A config file is one phase: plain Python, run in a namespace that holds every default below. A value on the command line
beats the file's, before the file computes with it: --lr_peak scales the rates of all phases, --lr makes them one rate.
Names that begin with _ are the file's own.
"""

import os
import signal

if __name__ == "__main__":  # until training listens for signals: imports take seconds, and there is nothing to save
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: os._exit(0))

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import shlex
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tiktoken import Encoding
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

import checkpoint
import errors
import eval as evaluation
import files
import infill
import processes
import tokenizer
from checkpoint import CheckpointError
from configurator import ConfigError, coerce, read_command_line
from errors import UserError
from infill import InfillError, Vocabulary
from kernels import backend, batch_mask
from machine import describe, find_device, keep_memory, synchronize
from mix import Mix, MixError, Source, check_identity, epoch_keys
from model import GPT, PRESETS, GPTConfig, accumulating, init_weights, param_groups
from processes import PeerError, Stop, Stopped, all_reduce, from_first, gather, rank, together, world
from tokenizer import TokenizerError

# ------------------------------------------------------------------------------------------------------------- knobs


@dataclass
class Config:
    # where
    out: str = "out"  # a folder a phase goes under it, named after the config file
    data: str = "data"  # a folder a source, written by prepare.py
    init_from: str = ""  # checkpoint, or out/<phase>, whose weights and data positions the first phase starts from
    seed: int = 1
    # model; `size` names a preset of model.py, which sets what you leave alone
    size: str = "nano"
    n_layer: int = 0
    n_head: int = 0
    n_embd: int = 0
    n_inner: int = 0  # width of the MLP; 0: 8/3 n_embd, up to a multiple of 64
    block_size: int = 0  # context, in tokens
    vocab_size: int = 0  # rows of the embedding; 0: the ids of the data's tokenizer, up to a multiple of 128
    norm: str = "layernorm"  # or rmsnorm
    bias: bool = False
    tie: bool = True
    rotary: float = 0.25  # share of each head's channels
    parallel: bool = False
    mup_base: int = 256  # width whose learning rate is meant by lr; 0: no muP
    # data
    mix: dict = field(default_factory=lambda: {"text": 0.5, "code": 0.5})  # source -> weight
    objective: dict = field(default_factory=dict)  # source, or "*" for the others -> fim(0.9), codegen2(0.5), prefix(1)
    doc_mask: bool = False  # attend within one document only; positions restart there
    epochs_max: float = 0.0  # refuse a plan that repeats a source more often, over all phases; 0: no limit
    source_tokens: dict = field(default_factory=dict)  # source -> tokens: lets --plan count epochs without the data
    skip: list = field(
        default_factory=list
    )  # [(a, b), ...]: jump over samples a to b - 1 of the phase, append later ones
    # length
    budget: int = 10_000_000  # tokens of the whole run
    share: float = 1.0  # this phase's part of it
    batch: int = 0  # tokens a step; 0: as BATCH says for the size
    micro_batch: int = 0  # rows at a time and process; 0: the most that divide the batch and fit, see micro_tokens
    # optimiser
    lr_peak: float = 0.006  # of the run: what the files of its phases compute lr and lr_end from
    lr: float = 0.0  # at the phase's peak, 0: lr_peak; hidden matrices get lr * mup_base / n_embd
    lr_end: float = 0.0  # at the phase's last step
    decay: str = "linear"  # from lr to lr_end: linear, cosine or constant
    decay_part: list = field(default_factory=lambda: [0.0, 1.0])  # of it that this phase goes through
    warmup: float = 0.03  # from 0 to lr: steps, or a share of the phase if below 1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-9
    weight_decay: float = 0.1  # not on norms and biases
    clip: float = 1.0  # of the global gradient norm; 0: none
    z_loss: float = 0.0
    max_skips: int = 10  # updates in a row left out because of a NaN or infinity, before training gives up
    carry_optimizer: bool = False  # keep Adam's moments from the phase before
    # watching
    eval_every: int = 0  # steps; 0: before and after the phase
    eval_tokens: int = 65_536  # of each source's held-out part, spread over it, always the same ones
    eval_tasks: str = ""  # folder of task files: the quick ones of eval.py are scored at every evaluation
    eval_examples: int = 200  # of each task, its first ones
    save_every: int = 500  # steps
    keep: int = 2  # checkpoints in a phase's folder
    log_every: int = 10  # steps
    wandb: str = ""  # project name; needs the wandb package
    # machine
    device: str = "auto"  # cuda, mps, cpu
    dtype: str = "auto"  # of the arithmetic: bfloat16 where the hardware has it, else float32, never TF32
    compile: str = "auto"  # yes, no; auto: on CUDA
    kernels: str = "auto"  # triton, torch; auto: as AUTO in kernels/backend.py says, on an NVIDIA GPU
    recompute: bool = False  # activations of a block in the backward pass: a third more work, far less memory
    reshard_after_forward: bool = True  # many processes: gather weights again for the backward pass, to hold less
    timeout: float = 600.0  # seconds that processes wait for each other before they call one hung

    def __post_init__(self):
        for name in ("out", "data", "init_from", "eval_tasks"):
            setattr(self, name, os.path.expanduser(getattr(self, name)))
            if "\0" in getattr(self, name):
                raise ConfigError(f"{name} = {getattr(self, name)!r} is no path")
        self.lr = self.lr or self.lr_peak
        self.batch = self.batch or BATCH.get(self.size, 0)
        choices = {
            "size": PRESETS,
            "decay": ("linear", "cosine", "constant"),
            "device": ("auto", "cuda", "mps", "cpu"),
            "dtype": ("auto", "bfloat16", "float32"),
            "compile": ("auto", "yes", "no"),
            "kernels": ("auto", "triton", "torch"),
        }
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"{name} = {value!r} is none of {', '.join(known)}")
        above_zero = ("budget", "share", "batch", "lr_peak", "save_every", "log_every", "eval_tokens", "eval_examples",
                      "keep", "timeout")  # fmt: skip
        for name, value in vars(self).items():
            if type(value) in (int, float) and (value < 0 or (value == 0 and name in above_zero)):
                raise ConfigError(f"{name} = {value} is not above 0")
            if type(value) is float and value >= 2**62:
                raise ConfigError(f"{name} = {value:.4g} is more than anything here can count")
        for name in ("beta1", "beta2"):
            if (value := getattr(self, name)) >= 1:
                raise ConfigError(f"{name} = {value} is not below 1")
        if not self.mix or not all(isinstance(source, str) for source in self.mix):
            raise ConfigError(f"mix = {self.mix!r} names no sources; for example {{'text': 0.5, 'code': 0.5}}")
        part = self.decay_part
        if len(part) != 2 or not all(type(n) in (int, float) for n in part) or not 0 <= part[0] < part[1] <= 1:
            raise ConfigError(f"decay_part = {part!r} is not two numbers from 0 to 1, the smaller first: as [0.0, 0.5]")
        if unknown := sorted(map(str, {*self.objective} - {*self.mix, "*"})):
            raise ConfigError(f"objective names {', '.join(unknown)}, but mix only {', '.join(self.mix)}")
        try:  # as text, each in one form, for logs and checkpoints
            self.objective = {name: str(infill.parse(some) or "causal") for name, some in self.objective.items()}
        except InfillError as error:
            raise ConfigError(str(error)) from None
        if self.doc_mask and any(objective.level == "row" for objective in self.objectives().values()):
            raise ConfigError("doc_mask keeps documents apart that an objective with level='row' joins: choose one")
        for pair in self.skip:
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(type(n) is int for n in pair)
                    and 0 <= pair[0] < pair[1] < 2**62):  # fmt: skip
                raise ConfigError(f"skip = {self.skip!r} is not a list of (first sample, sample after the last)")

    def objectives(self):
        """{source: Objective of infill.py} for the sources of mix that have one."""
        every = self.objective.get("*", "causal")
        parsed = {name: infill.parse(self.objective.get(name, every)) for name in self.mix}
        return {name: objective for name, objective in parsed.items() if objective}


# Tokens a step by size: what keeps a laptop and one GPU busy; from 124M on GPT-3's (arXiv 2005.14165, Table 2.1).
BATCH = {"nano": 8192, "30M": 65_536, "124M": 524_288, "350M": 524_288, "1.3B": 1_048_576, "7B": 2_097_152}
MODEL_KNOBS = [f.name for f in dataclasses.fields(GPTConfig) if f.name != "vocab_real"]
RUN_KNOBS = [
    *MODEL_KNOBS, "out", "data", "seed", "budget", "eval_tokens", "eval_tasks", "eval_examples", "wandb", "device",
    "dtype", "compile", "kernels", "recompute", "reshard_after_forward", "timeout",
]  # fmt: skip


def check_phases(named):
    """What the phases of a run must share, and what each must be able to do, before anything is opened."""
    if not named:
        raise ConfigError("which phase? python train.py config/phase1.py [config/phase2.py ...] [--knob=value ...]")
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        raise ConfigError(f"two phases of one name would share a folder: {', '.join(names)}; rename one")
    for name, cfg in named:
        for knob in RUN_KNOBS:
            if getattr(cfg, knob) != (first := getattr(named[0][1], knob)):
                raise ConfigError(f"{knob} = {getattr(cfg, knob)!r} in {name} but {first!r} in {names[0]}: must agree")
        micro_rows(name, cfg)


# ---------------------------------------------------------------------------------------------------------- the plan


def lr_at(step, steps, cfg):
    """Learning rate of update `step` (1 .. steps): linear from 0 over the warmup, then cfg.decay_part of cfg.decay."""
    warmup = cfg.warmup * steps if cfg.warmup < 1 else cfg.warmup
    first, last = cfg.decay_part
    progress = first + (last - first) * (max(step, warmup) - warmup) / (steps - warmup or 1)
    if cfg.decay == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    lr = cfg.lr if cfg.decay == "constant" else cfg.lr + (cfg.lr_end - cfg.lr) * progress
    return lr * step / warmup if step < warmup else lr


def phase_steps(name, cfg):
    """(steps, rows a step); ConfigError with the numbers if they do not fit."""
    steps, rows = round(cfg.share * cfg.budget / cfg.batch), cfg.batch // cfg.block_size
    if not rows or cfg.batch % cfg.block_size:
        near = max(1, round(cfg.batch / cfg.block_size)) * cfg.block_size
        raise ConfigError(
            f"{name}: batch = {cfg.batch:,} tokens is not a multiple of block_size = {cfg.block_size:,}: write {near}"
        )
    if steps >= 2**62 // cfg.batch:
        raise ConfigError(f"{name}: share {cfg.share} of budget {cfg.budget:,} is more tokens than can be counted")
    if not steps:
        raise ConfigError(
            f"{name}: share {cfg.share} of budget {cfg.budget:,} is less than one batch of {cfg.batch:,} tokens:"
            " write a larger budget, or a smaller batch"
        )
    return steps, rows


def micro_rows(name, cfg):
    """Rows a micro-step of one process; ConfigError with the numbers if they do not divide the batch."""
    _, rows = phase_steps(name, cfg)
    batch = f"{name}: batch = {cfg.batch:,} tokens = {rows} rows of {cfg.block_size:,} are not a multiple of"
    if rows % world():
        raise ConfigError(f"{batch} {world()} processes")
    mine, most = rows // world(), cfg.micro_batch or max(1, micro_tokens(cfg) // cfg.block_size)
    micro = max(n for n in range(1, min(mine, most) + 1) if mine % n == 0)
    if cfg.micro_batch and micro != cfg.micro_batch:
        each = f" on each of {world()} processes" if world() > 1 else ""
        raise ConfigError(f"{batch} micro_batch = {cfg.micro_batch} rows{each}; {micro} would be")
    return micro


def micro_tokens(cfg):
    """Tokens that a process takes at a time where micro_batch does not say.

    A GPU wants many: with few it waits for its host, and adds up gradients more often than it must. It gets up to
    65,536, as far as these leave a tenth of its memory free: 18 bytes a weight, shared by the processes (in fp32 with
    its gradient and two moments, and its copy in bf16), in several processes the gradients that FSDP collects whole,
    4 GiB of logits, and for the backward pass 16 n_embd + 6 n_inner bytes a layer and token in bf16, or, if activations
    are computed again, a layer's input, and one layer whole.
    """
    device, dtype, compiled = find_device(cfg)
    if device != "cuda":
        return 16_384
    model = model_config(cfg, cfg.vocab_size or 32_768)
    with torch.device("meta"):
        weights = GPT(model).num_params()
    layer = (16 * model.n_embd + 6 * model.n_inner) * dtype.itemsize // 2
    if not compiled:
        layer += layer // 2  # of what eager operations hand to each other, more stays
    token = layer + model.n_layer * 2 * model.n_embd * dtype.itemsize if cfg.recompute else model.n_layer * layer
    memory = torch.cuda.get_device_properties().total_memory
    weights *= 18 if world() == 1 else 18 / world() + 4
    room = 0.9 * memory - weights - (4 << 30)
    return max(1, min(65_536, int(room / token)))


@dataclass
class Phase:
    name: str
    cfg: Config
    steps: int
    rows: int  # a step, of all processes
    micro: int  # rows a micro-step, of one process
    mix: Mix
    first_token: int  # tokens trained before the phase, in this run and those it was initialised from

    @property
    def folder(self):
        return Path(self.cfg.out) / self.name

    @property
    def micro_steps(self):  # a step, of one process
        return self.rows // self.micro // world()


def build_phases(named, windows, start, tokens, vocabulary=None):
    """Configs -> Phases, each with its mix beginning where the one before leaves every source.

    windows: {name: Source, or its number of windows}. start: {name: windows drawn before}. tokens: trained before.
    vocabulary: of infill.py, if anything is to be rearranged or masked.
    """
    phases = []
    for name, cfg in named:
        steps, rows = phase_steps(name, cfg)
        order = cfg.mix, steps * rows, cfg.seed, start, cfg.epochs_max, cfg.skip
        try:
            mix = Mix(windows, *order, cfg.objectives(), vocabulary)
        except MixError as error:
            raise MixError(f"{name}: {error}") from None
        phases.append(Phase(name, cfg, steps, rows, micro_rows(name, cfg), mix, tokens))
        start, tokens = mix.drawn(mix.samples), tokens + steps * cfg.batch
    return phases


def model_config(cfg, vocab_real):
    knobs = {name: getattr(cfg, name) for name in MODEL_KNOBS}
    knobs["vocab_size"] = cfg.vocab_size or -(-vocab_real // 128) * 128
    if knobs["vocab_size"] < vocab_real:
        raise ConfigError(
            f"vocab_size = {cfg.vocab_size:,} is less than the {vocab_real:,} ids of the data's tokenizer;"
            " leave vocab_size out, or prepare the data with --vocab_size"
        )
    try:
        return GPTConfig(**knobs, vocab_real=vocab_real)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def si(n):
    """1234567 -> 1.23M"""
    for unit, scale in (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= scale:
            return f"{n / scale:.4g}{unit}"
    return f"{n:.4g}"


def clock(seconds):
    for unit, scale in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.0f} s"


def print_plan(phases, model, machine):
    c, cfg = model.config, phases[0].cfg
    print(machine)
    flops, total = model.flops_per_token(), sum(phase.steps * phase.cfg.batch for phase in phases)
    shape = f"{c.n_layer} layers x {c.n_embd}, {c.n_head} heads of {c.head_dim}, context {c.block_size:,}"
    print(f"model    {cfg.size}: {shape}, {c.vocab_real:,} ids; {model.num_params():,} parameters")
    print(f"run      {si(total)} tokens x {si(flops)}FLOP (6 N + 12 L d T) = {si(flops * total)}FLOP;"
          f" seed {cfg.seed}; output in {cfg.out}/")  # fmt: skip
    for phase in phases:
        print_phase(phase)


def print_phase(phase):
    cfg, tokens = phase.cfg, phase.steps * phase.cfg.batch
    warmup = round(cfg.warmup * phase.steps if cfg.warmup < 1 else cfg.warmup)
    lr_end = cfg.lr if cfg.decay == "constant" else cfg.lr_end
    many = f"{world()} processes x " if world() > 1 else ""
    shape = f"{phase.steps:,} steps of {many}{phase.micro_steps} x {phase.micro} rows"
    part = "" if cfg.decay_part == [0, 1] else " from {:g} to {:g} of it".format(*cfg.decay_part)
    rate = f"lr {cfg.lr:.4g} -> {lr_end:.4g} {cfg.decay}{part}, warmup {warmup:,} steps"
    print(f"{phase.name:<8} {si(tokens)} tokens = {shape}; {rate}")
    first, last = phase.mix.drawn(0), phase.mix.drawn(phase.mix.samples)
    batch = phase.mix.vocabulary and phase.mix.batch(0, min(phase.mix.samples, 512))
    for name, quota in sorted(phase.mix.quota.items(), key=lambda item: -item[1]):
        drawn, windows = (last[name] - first[name]) * cfg.block_size, phase.mix.windows[name]
        print(f"         {name:<24} {quota / phase.mix.period:8.3%} {si(drawn):>8} tokens   epochs"
              f" {first[name] / windows:.2f} -> {last[name] / windows:.2f}")  # fmt: skip
        if objective := phase.mix.objectives.get(name):
            print(f"         {'':<24} {objective}{survey(phase.mix, name, batch)}")


def survey(mix, name, batch):
    """What a source's objective makes of `batch`, the first samples of a phase: text; none without the data."""
    if batch is None:
        return ""
    rows, source, prefix = batch
    mine = source == mix.names.index(name)
    if not mine.any():
        return ""
    level, prefix = mix.objectives[name].level, None if prefix is None else prefix[mine]
    rearranged, trained = infill.survey(rows[mine], prefix, level, mix.vocabulary)
    return f": {rearranged:.1%} of tokens rearranged, {trained:.1%} trained on, in the first {mine.sum():,} windows"


# -------------------------------------------------------------------------------------------------------------- data


def prepare_corpus(cfg, names):
    """Prepare the default corpus if that is asked for and there is no data at all, in a folder that is free for it."""
    folder = Path(cfg.data)
    begun, empty = (folder / "corpus").is_dir(), not any(folder.glob("*/*.bin"))
    missing = any(not (folder / name / "meta.json").exists() for name in names)
    if set(names) <= {"text", "code"} and missing and (begun or empty):
        import prepare

        prepare.check_default(folder)
        print(f"{folder}/ is empty or unfinished: preparing text and code from this Python installation")
        try:
            prepare.prepare_default(folder)
        except subprocess.CalledProcessError as error:  # it has said why
            raise ConfigError("the default corpus could not be prepared") from error


def the_tokenizer(sources):
    """meta.json's entry on the tokenizer, one for all sources, and the encoding; None, None for bare .bin files."""
    metas = {name: source.meta["tokenizer"] for name, source in sources.items() if source.meta}
    if not metas:
        return None, None
    first, meta = next(iter(metas.items()))
    for name, other in metas.items():
        if other["sha256"] != meta["sha256"]:
            raise ConfigError(
                f"{name} was encoded with {other['name']} ({other['vocab_size']:,} ids) and {first} with {meta['name']}"
                f" ({meta['vocab_size']:,} ids); prepare both with one tokenizer"
            )
    folders = [source.files[0].parent for source in sources.values() if source.meta]
    try:
        return meta, tokenizer.find(meta, *folders)
    except TokenizerError as error:
        raise ConfigError(f"{first}: {error}") from None


def the_vocabulary(named, encoding):
    """What infill.py needs to know of the tokenizer, None if nothing is rearranged or masked."""
    objectives = [objective for _, cfg in named for objective in cfg.objectives().values()]
    if not objectives and not any(cfg.doc_mask for _, cfg in named):
        return None
    if encoding is None:
        raise ConfigError(
            "objective and doc_mask need an end of text between documents, but the data names no tokenizer"
        )
    return Vocabulary(encoding, objectives)


def held_out(named, sources, encoding, vocabulary):
    """What every evaluation reads: {name: (rows, uint16 (n, block_size + 1); targets, int64 (n, block_size), -1 where
    none; bytes behind the targets, None without a tokenizer)}.

    Under the name of a source: its held-out windows as they are. If a phase trains it to infill, in the layout of the
    first that does: a hole in each of them, "<source> middle" after prefix and suffix, and "<source> middle, prefix
    only" after the prefix.
    """
    cfg, sets = named[0][1], {}
    objectives = {
        name: some for _, c in reversed(named) for name, some in c.objectives().items() if infill.layout(some)
    }
    for name, trained in sources.items():
        folder, meta = Path(cfg.data) / name, trained.meta
        if meta["val"]["tokens"] <= cfg.block_size if meta else not (folder / "val.bin").exists():
            print(f"{name} has no held-out part of one window, so there will be no evaluation on it")
            continue
        source = Source(folder, "val", cfg.block_size)
        source.ids = trained.ids
        source.check_bare()
        rows = source.rows(max(1, cfg.eval_tokens // cfg.block_size))
        sets[name] = rows, rows[:, 1:].astype(np.int64)
        if name in objectives:
            sets |= holes(name, rows, objectives[name], cfg.seed, vocabulary)
    lengths = encoding and tokenizer.byte_lengths(encoding)
    return {name: (rows, targets, int(lengths[targets[targets >= 0]].sum()) if encoding else None)
            for name, (rows, targets) in sets.items()}  # fmt: skip


def holes(name, rows, objective, seed, vocabulary):
    """{name: (rows, targets)}, as `held_out` says, of a hole in each window's longest document, if any has room."""
    keys = epoch_keys(seed, "holes", np.arange(len(rows))).tolist()
    cut, layout = getattr(objective, "cut", "token"), infill.layout(objective)
    found = [hole for row, key in zip(rows, keys, strict=True) if (hole := infill.hole(row, key, cut, vocabulary))]
    if not found:
        return {}
    made = {}
    for kind in ("middle", "middle, prefix only"):
        out = np.full((len(found), rows.shape[1]), vocabulary.eot, np.uint16)
        targets = np.full((len(found), rows.shape[1] - 1), -1)
        for i, (prefix, middle, suffix) in enumerate(found):
            if kind == "middle":
                prompt = infill.prompt(prefix, suffix, layout, vocabulary)
            else:
                prompt = np.append(vocabulary.sentinels["eot"], prefix)
            begin, end = len(prompt), len(prompt) + len(middle)
            out[i, :begin], out[i, begin:end], targets[i, begin - 1 : end - 1] = prompt, middle, middle
        made[f"{name} {kind}"] = out, targets
    return made


class Feeder:
    """Micro-batches of this process on the device, one ahead: a thread reads the next while this one trains.

    Of every batch, rank r of R takes the r-th of R slices, so samples and steps are the same for any R. dtype: of the
    model's arithmetic.
    """

    def __init__(self, phase, first_step, device, dtype):
        self.phase, self.device, self.dtype = phase, device, dtype
        mine = phase.rows // world()
        first, end = first_step * phase.rows + rank() * mine, phase.steps * phase.rows
        self.slices = (lo for at in range(first, end, phase.rows) for lo in range(at, at + mine, phase.micro))
        self.thread = ThreadPoolExecutor(1, initializer=processes.claim_gpu)
        self.future = self.submit()

    def submit(self):
        lo = next(self.slices, None)
        return None if lo is None else self.thread.submit(self.read, lo, lo + self.phase.micro)

    def read(self, lo, hi):
        inputs = read_batch(self.phase, lo, hi)
        return {k: x.pin_memory() for k, x in inputs.items()} if self.device == "cuda" else inputs

    def __call__(self):
        """A micro-batch as `to_device` returns it."""
        inputs = self.future.result()
        self.future = self.submit()
        return to_device(inputs, self.device, self.dtype)


def read_batch(phase, lo, hi):
    """Samples lo to hi - 1 of a phase as `model_inputs`, and their source (B,). Pad and prefixes are no targets."""
    rows, source, prefix = phase.mix.batch(lo, hi)
    targets = rows[:, 1:].astype(np.int64)
    if phase.mix.objectives:
        targets[targets == phase.mix.vocabulary.pad] = -1
    if prefix is not None:
        targets[prefix[:, 1:] > 0] = -1
    return model_inputs(rows, targets, prefix, phase) | {"source": torch.from_numpy(source)}


def model_inputs(rows, targets, prefix, phase):
    """Rows, uint16 (B, T + 1), targets (B, T), prefix like rows or None -> {name: int64 tensor (B, T)}: tokens,
    targets; prefix if there is one; doc and pos, the number of a token's document and its place in it, if doc_mask."""
    inputs = {"tokens": rows[:, :-1], "targets": targets}
    if prefix is not None:
        inputs["prefix"] = prefix[:, :-1]
    if phase.cfg.doc_mask:
        vocabulary = phase.mix.vocabulary
        doc, pos = infill.documents(rows, vocabulary)
        # the token after the last span of a document begins another one, of which that span knows nothing
        inputs["targets"] = np.where((doc[:, 1:] > doc[:, :-1]) & (rows[:, :-1] == vocabulary.eom), -1, targets)
        inputs |= {"doc": doc[:, :-1], "pos": pos[:, :-1]}
    return {name: torch.from_numpy(array.astype(np.int64)) for name, array in inputs.items()}


def to_device(inputs, device, dtype):
    """What `read_batch` or `model_inputs` made -> on the device: tokens, targets, source or None, and the keywords mask
    and pos of the model."""
    inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
    tokens, targets = inputs["tokens"], inputs["targets"]
    mask = batch_mask(tokens.shape[1], inputs.get("prefix"), inputs.get("doc"), dtype)
    return tokens, targets, inputs.get("source"), {"mask": mask, "pos": inputs.get("pos")}


# ---------------------------------------------------------------------------------------------- model and optimizer


def parallelize(model, cfg):
    """Recomputation, compilation and sharding, in this order and in place, of a model born on the meta device.

    In several processes every block is one unit of FSDP2, and the rest, embedding and head, another: each process holds
    1/R of weights, gradients and moments, in fp32. A block's weights are gathered in the dtype of the arithmetic, those
    of the rest in fp32, as in one process: a sum over all places of a word would not survive bf16. Gradients are
    averaged over processes in fp32.
    """
    device, dtype, compiled = find_device(cfg)
    if device == "cuda" or compiled:
        # Blocks share one count, and every micro-batch's shape needs four. Beyond the limit Dynamo would run what it
        # was asked to compile uncompiled, without a word: FlexAttention with a whole score matrix.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    for block in model.blocks:
        if cfg.recompute:
            block.forward = recomputed(block.forward)
        if compiled:
            block.forward = torch.compile(block.forward, dynamic=False)
    if not dist.is_initialized():
        return
    mesh = init_device_mesh(device, (world(),))
    # the model casts what needs it; FSDP would also cast the angles of the rotation
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=cfg.reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    register_fsdp_forward_method(model, "hidden")  # which eval.py calls


def recomputed(forward):
    def wrapper(*args):
        return recompute(forward, *args, use_reentrant=False, preserve_rng_state=False)  # nothing is random

    return wrapper


def my_shard(whole, p):
    """What this process holds of a tensor that all have computed; p: the parameter it is for."""
    if not isinstance(p, DTensor):
        return whole
    return distribute_tensor(whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def make_optimizer(model, cfg, device):
    """AdamW with muP's groups, and all its state from the start, so that a checkpoint can be read into it."""
    fused = device in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(
        param_groups(model, cfg.weight_decay), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=fused
    )
    for p in model.parameters():
        step = torch.zeros((), device=device if fused else "cpu")
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def set_optimizer(optimizer, model, cfg):
    """Give it the knobs of the phase that begins, in place: two sets of moments may not fit into memory."""
    for group, new in zip(optimizer.param_groups, param_groups(model, cfg.weight_decay), strict=True):
        group |= {"betas": (cfg.beta1, cfg.beta2), "eps": cfg.eps, "weight_decay": new["weight_decay"]}
    if not cfg.carry_optimizer:
        for moments in optimizer.state.values():
            for tensor in moments.values():
                tensor.zero_()


def tensors_of(model, optimizer=None):
    """What a checkpoint holds, by parameter name: {"model": {name: weight}, "optimizer": {name: {moment: tensor}}}."""
    weights = dict(model.named_parameters())
    if not optimizer:
        return {"model": weights}
    moments = dict(optimizer.state)  # which, unlike the original, does not invent what is missing
    return {"model": weights, "optimizer": {name: moments[p] for name, p in weights.items()}}


def accumulator(values, device):
    """For sums over many steps: fp64, which MPS has not."""
    return torch.tensor(values, dtype=torch.float32 if device == "mps" else torch.float64, device=device)


# ------------------------------------------------------------------------------------------------------------ running


class Log:
    """log.jsonl of a phase, written by rank 0, and wandb's copy of its numbers.

    Every line has step, phase and tokens so far. Lines beyond `size` bytes belong to steps that a crash took back: they
    are cut off.
    """

    def __init__(self, phase, size):
        self.phase, self.file, self.wandb = phase, None, None
        if rank():
            return
        phase.folder.mkdir(parents=True, exist_ok=True)
        self.file = open(phase.folder / "log.jsonl", "a+b")
        alone = files.lock(self.file)
        if alone is False:
            raise ConfigError(f"another process is training in {phase.folder}; wait, or use --out")
        if alone is None:
            print(f"warning  {phase.folder} lies on a file system without locks: start no second run in it")
        self.file.truncate(min(size, self.file.seek(0, os.SEEK_END)))
        if phase.cfg.wandb:
            try:
                self.wandb = importlib.import_module("wandb").init(project=phase.cfg.wandb, name=phase.name)
            except (Exception, SystemExit) as error:  # of its own kinds: no login, no network, no such project
                raise ConfigError(f"wandb = {phase.cfg.wandb!r}: {type(error).__name__}: {error}") from error

    def write(self, step, values):
        if self.file:
            tokens = self.phase.first_token + step * self.phase.cfg.batch
            record = {"step": step, "phase": self.phase.name, "tokens": tokens} | values
            try:
                self.file.write(files.strict(record).encode() + b"\n")
                self.file.flush()
            except OSError as error:
                raise OSError(error.errno, error.strerror, self.file.name) from None
            if self.wandb and "event" not in values:
                try:
                    self.wandb.log(record, step=tokens)
                except (Exception, SystemExit) as error:  # whatever happens to the copy, training goes on
                    tqdm.write(f"wandb has failed and gets no more numbers: {error}")
                    self.wandb = None

    def size(self):
        """Bytes so far, on the disk; 0 in other processes."""
        if not self.file:
            return 0
        os.fsync(self.file.fileno())
        return self.file.seek(0, os.SEEK_END)

    def close(self):
        if self.file:
            self.file.close()
        if self.wandb:
            with contextlib.suppress(Exception, SystemExit):  # what was trained is saved
                self.wandb.finish()


@contextlib.contextmanager
def resharded(model):
    """Forward passes inside are followed by no backward pass, for which FSDP would keep the gathered weights."""
    try:
        yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@torch.no_grad()
def evaluate(model, sets, phase, device, stop):
    """Of each set that `held_out` made: mean loss in nats a target, and bits per byte. None if `stop` came up.

    Bits per byte = sum of losses / ln 2 / bytes of UTF-8 behind the targets; special ids stand for no bytes. The
    processes share the windows.
    """
    losses, micro = accumulator([0.0] * len(sets), device), phase.micro
    with resharded(model):
        for i, (rows, targets, _) in enumerate(sets.values()):
            for lo in range(rank() * micro, rank() * micro + len(rows), micro * world()):  # equally often everywhere
                if stop.agreed():
                    return None
                some, goals = np.zeros((micro, rows.shape[1]), np.uint16), np.full((micro, targets.shape[1]), -1)
                n = len(rows[lo : lo + micro])  # always one shape, so compiled once
                some[:n], goals[:n] = rows[lo : lo + micro], targets[lo : lo + micro]
                tokens, goals, _, how = to_device(model_inputs(some, goals, None, phase), device, model.dtype)
                losses[i] += model(tokens, goals, **how)[1].to(losses.dtype).sum()
    all_reduce(losses)
    result = {}
    for (name, (_, targets, n_bytes)), loss in zip(sets.items(), losses.tolist(), strict=True):
        n_targets = int((targets >= 0).sum())
        bpb = loss / math.log(2) / n_bytes if n_bytes else None
        result[name] = {"loss": loss / n_targets, "bpb": bpb, "tokens": n_targets}
    return result


def score_tasks(model, tasks, encoding, phase, stop):
    """{task: {"n", "chance" of choices, "acc", "acc_se", "bpb", "bpb_se"}} as eval.py has them. None if `stop` came up.
    The processes share the examples."""
    made = {}
    with resharded(model):
        for task in tasks:
            if stop.agreed():
                return None
            items = evaluation.score(task, model, encoding, None, None, phase.micro * phase.cfg.block_size)
            summary = evaluation.summary(task, items)
            made[task.name] = {name: summary[name] for name in ("n", "chance") if name in summary}
            for name in ("acc", "bpb"):
                if score := summary["scores"].get(name):
                    made[task.name] |= {name: score["mean"], f"{name}_se": score["se"]}
    return made


def add_losses(sums, token_loss, targets, source):
    """Add a micro-batch to sums (2, K): summed loss and trained tokens of each source. token_loss, targets (B, T);
    source (B,) < K.

    A product with the membership matrix, not a scatter: additions then have one order, and sums one last bit.
    """
    member = (source == torch.arange(sums.shape[1], device=sums.device)[:, None]).to(sums.dtype)  # (K, B)
    of_rows = torch.stack((token_loss.detach().to(sums.dtype).sum(1), (targets >= 0).sum(1).to(sums.dtype)))
    sums += of_rows @ member.T


def set_aside(folder):
    """--fresh: out/phase1 becomes out/phase1.old-1 (or -2, ...), so that nothing trained is lost by a slip."""
    if folder.exists():
        n = 1
        while (to := folder.with_name(f"{folder.name}.old-{n}")).exists():
            n += 1
        folder.rename(to)
        print(f"--fresh: {folder} moved to {to}")


def find_progress(named):
    """The phase to go on with and its newest checkpoint: (index, folder), or (0, None) when nothing was trained yet."""
    roots = [Path(cfg.out) / name / "checkpoints" for name, cfg in named]
    for index in reversed(range(len(named))):
        try:
            folder = checkpoint.latest(roots[index])
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; to train {named[index][0]} anew, move {roots[index].parent} aside"
            ) from None
        if folder:
            check_lineage(roots[: index + 1], folder)
            return index, folder
    return 0, None


# What state.json must have for a phase to go on inside.
RESUMED = checkpoint.STATE | {
    "evaluated": int, "parent": (str, None), "sums": [[float]], "skips": [int], "log_bytes": int,
    "config": {"data": str, "mix": {}, "objective": {}, "batch": int},
    "mix": {"algorithm": int, "seed": int, "block_size": int, "weights": {...: int}, "start": {...: int},
            "samples": int, "skip": [[int]], "sources": {...: {"sha256": str}}},
}  # fmt: skip


def check_lineage(roots, folder):
    """Refuse to go on from a phase whose predecessor has been trained anew since, and has other weights now."""
    for before, after in zip(reversed(roots[:-1]), reversed(roots[1:]), strict=True):
        parent = checkpoint.load_state(folder).get("parent")
        if not parent or not (complete := checkpoint.complete(before)):
            return
        folder = complete[-1]
        if checkpoint.weights_sha256(folder) != parent:
            raise ConfigError(
                f"{after.parent} did not begin with the weights that {before.parent} has now; --fresh trains all of"
                f" these phases anew, and without {before.parent.name} on the command line the old run goes on"
            )


def check_start(start, model, meta, sources, phase):
    """Refuse weights of another shape or for other ids, positions in other data and, inside a phase, another order."""
    folder, state, now = start.folder, start.state, dataclasses.asdict(model.config)
    old = state["tokenizer"]
    same_ids = meta and (not old or meta["sha256"] == old["sha256"])  # then rows that only padded may become words
    for knob, value in state["model"].items():
        if now.get(knob) != value and not (knob == "vocab_real" and same_ids):
            say = f"say --{knob}={value}" if knob in MODEL_KNOBS else "prepare the data with its tokenizer"
            raise CheckpointError(
                f"{folder} holds a model with {knob} = {value!r}, the configuration says {now.get(knob)!r};"
                f" {'use --out for another folder, or --fresh to start over' if start.inside else say}"
            )
    if meta and old and meta["sha256"] != old["sha256"]:
        raise CheckpointError(
            f"{folder} was trained on ids of {old['name']} ({old['vocab_size']:,}),"
            f" the data has ids of {meta['name']} ({meta['vocab_size']:,})"
        )
    for name, was in state["mix"]["sources"].items():
        if name in sources and sources[name].sha256 != was["sha256"]:
            raise MixError(f"{sources[name].name} is not the {name} that {folder} was trained on; give it another name")
    if start.inside:
        check_identity(state["mix"], phase.mix.identity(), state["sample"])
        if [*map(len, state["sums"])] != [len(phase.mix.names)] * 2 or len(state["skips"]) != 2:
            raise CheckpointError(f"{folder}/state.json: its sums and skips are not those of its sources")
        if state["sample"] != state["step"] * phase.rows:
            batch = state["config"]["batch"]
            raise CheckpointError(f"{folder} was made with batch = {batch:,}, which stays the same inside a phase")


def rehearse(model, phase, device, stop):
    """Tokens a second, of all processes, forward and backward: compiles, and finds out if memory is too small.

    Stopped if a signal came: before every block, because to compile them all may take longer than a cluster waits.
    """
    tokens, targets, _, how = to_device(read_batch(phase, 0, phase.micro), device, model.dtype)
    hooks = [block.register_forward_pre_hook(lambda *_: stop.here()) for block in model.blocks]
    with summing(model, phase):
        for last in (phase.micro_steps == 1, True):  # the first compiles; its gradients stay if they will in training
            end_of_batch(model, phase.cfg, last)
            synchronize(device)
            start = time.perf_counter()
            loss, _, _ = model(tokens, targets, phase.cfg.z_loss, phase.cfg.batch, **how)
            stop.here()
            loss.backward()
            if last:
                model.zero_grad(set_to_none=True)
            synchronize(device)
            while hooks:
                hooks.pop().remove()
    return world() * tokens.numel() / (time.perf_counter() - start)


def end_of_batch(model, cfg, last):
    """Say whether the next backward pass is its batch's last: only that averages gradients over the processes."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last or cfg.reshard_after_forward)


def summing(model, phase):
    """What the micro-steps of a batch run in: on one GPU and in bf16 `accumulating`, which spares 18 bytes of memory
    traffic a weight and micro-step.

    Not for a single micro-step, which has nothing to sum; nor under FSDP, which has casts and sums of its own; nor with
    recomputation, which torch.compile leaves out for products that have their own backward pass.
    """
    one_gpu = model.wte.weight.is_cuda and not isinstance(model, FSDPModule)
    if one_gpu and model.dtype == torch.bfloat16 and phase.micro_steps > 1 and not phase.cfg.recompute:
        return accumulating(model, model.dtype)
    return contextlib.nullcontext()


def train_step(model, optimizer, feeder, phase, step, sums, skips):
    """One update from phase.rows samples; returns its learning rate and gradient norm (a tensor, not waited for).

    If a loss or the norm is not finite, weights, moments and sums stay as they are; skips, int64 (2,) on the device,
    counts such steps since the last log line and in a row. Apart from what FSDP does, the processes exchange one vector
    of 2 K + 1 sums. Nothing here waits for the device.
    """
    cfg, step_sums = phase.cfg, torch.zeros_like(sums)
    with summing(model, phase):
        for n in range(1, phase.micro_steps + 1):
            tokens, targets, source, how = feeder()
            end_of_batch(model, cfg, n == phase.micro_steps)
            # a fixed divisor, as in Crystal: the sum over micro-batches is the mean over this process's part of the
            # batch, and the mean of those over processes, which FSDP takes, that over the batch
            loss, token_loss, _ = model(tokens, targets, cfg.z_loss, cfg.batch // world(), **how)
            loss.backward()
            add_losses(step_sums, token_loss, targets, source)
    grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    # squares summed in fp64, so that the norm does not depend on how many shards they lie in
    norms = torch.stack(torch._foreach_norm(grads, 2, dtype=sums.dtype))
    shared = torch.cat((step_sums.flatten(), norms.square().sum()[None]))
    all_reduce(shared)
    step_sums, norm = shared[:-1].view_as(sums), shared[-1].sqrt().float()
    if cfg.clip:
        torch._foreach_mul_(grads, (cfg.clip / (norm + 1e-6)).clamp(max=1.0))
    lr = lr_at(step, phase.steps, cfg)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    bad = ~(norm.isfinite() & step_sums.isfinite().all())
    sums += torch.where(bad, 0.0, step_sums)
    skips.copy_(torch.stack((skips[0] + bad, (skips[1] + 1) * bad)))
    if optimizer.defaults["fused"]:
        optimizer.found_inf = bad.float()  # the fused kernel then leaves everything as it is
        optimizer.step()
    elif not bad:  # other optimizers have no such switch
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return lr, norm


def measure(run, phase, log, step):
    """Evaluate, score the tasks, and log both. False if `stop` came up before the end."""
    values = evaluate(run.model, run.sets, phase, run.device, run.stop)
    scores = None if values is None else score_tasks(run.model, run.tasks, run.encoding, phase, run.stop)
    if scores is None:
        return False
    log.write(step, {"val": values} | ({"tasks": scores} if scores else {}))
    bits = {name: f" ({v['bpb']:.4f} bits/byte)" if v["bpb"] else "" for name, v in values.items()}
    each = "   ".join(f"{name} {v['loss']:.4f}{bits[name]}" for name, v in values.items())
    tqdm.write(f"{phase.name} {step:>7,}/{phase.steps:,}  held out: {each}")
    if scores:
        each = "  ".join(
            f"{name} {100 * v['acc']:.1f}" if "chance" in v else f"{name} {v['bpb']:.3f}" for name, v in scores.items()
        )
        tqdm.write(f"{phase.name} {step:>7,}/{phase.steps:,}  tasks, accuracy in % or bits/byte: {each}")
    return True


def log_training(log, phase, step, sums, skips, lr, norm, speed, mfu):
    """Write what was summed up since the last line, and begin new sums. Waits for the device. speed: tokens/s.

    Returns how many updates in a row have been left out.
    """
    (skipped, in_a_row), (loss, tokens), norm = skips.tolist(), sums.tolist(), norm.item()
    names, n = phase.mix.names, sum(tokens)
    by_source = {name: x / m for name, x, m in zip(names, loss, tokens, strict=True) if m}
    mean = sum(loss) / n if n else None  # of updates that were made
    log.write(step, {
        "loss": mean, "lr": lr, "grad_norm": norm if math.isfinite(norm) else None, "tok_per_s": round(speed),
        "mfu": round(mfu, 4), "loss_by_source": by_source, "epochs": phase.mix.epochs(step * phase.rows),
    })  # fmt: skip
    each = "  ".join(f"{name} {f'{by_source[name]:.3f}' if name in by_source else '-':>6}" for name in names)
    left = clock((phase.steps - step) * phase.cfg.batch / speed)
    tqdm.write(
        f"{phase.name} {step:>7,}/{phase.steps:,}  loss {f'{mean:6.3f}' if n else '     -'}  {each}  lr {lr:.2e}"
        f"  norm {norm:6.2f}  {round(speed):>9,} tok/s  MFU {mfu:5.1%}  {left} left"
    )
    if skipped:
        log.write(step, {"event": "skipped_step", "steps": skipped, "in_a_row": in_a_row})
        tqdm.write(f"{phase.name} {step:>7,}/{phase.steps:,}  updates left out, not finite: {skipped}")
    sums.zero_()
    skips[0].zero_()
    return in_a_row


class LossError(Exception):
    """Training cannot go on; the message says from where it can."""


def give_up(phase, step, in_a_row):
    """Raise the LossError after too many updates in a row were left out; it names their samples and the way on."""
    try:
        newest = from_first(checkpoint.latest, phase.folder / "checkpoints")
    except CheckpointError:  # none of them is good
        newest = None
    saved = checkpoint.load_state(newest)["sample"] if newest else 0
    first, end = (step - in_a_row) * phase.rows, step * phase.rows
    raise LossError(
        f"{phase.name}: loss or gradient was not finite in {in_a_row} steps in a row, samples {first:,} to {end - 1:,}"
        f" (max_skips = {phase.cfg.max_skips}); weights are as before them. To go on from {newest or 'the start'}"
        f" without these samples, append ({max(first, saved)}, {end}) to skip in the phase's file; or lower lr"
    )


@dataclass
class Run:
    """What stays the same through the phases of a run."""

    model: GPT
    optimizer: torch.optim.Optimizer
    device: str
    peak: float  # FLOP/s of all processes
    sets: dict  # of `held_out`
    tasks: list  # of eval.Task
    encoding: Encoding | None
    tokenizer: dict | None  # its entry in meta.json
    stop: Stop
    saver: checkpoint.Saver


def train_phase(run, phase, state, parent):
    """The loop of one phase, from `state` (a checkpoint's of this phase, or None). False if it was told to stop.

    parent: checkpoint.weights_sha256 of what the phase began with, None if it began with an initialisation.
    """
    cfg, mix, model, saver = phase.cfg, phase.mix, run.model, run.saver
    saved = (state["step"], state["evaluated"]) if state else None
    step, evaluated = saved or (0, -1)
    # loss and tokens by source since the last log line, of all processes; updates left out since then, and in a row
    sums = accumulator(state["sums"] if state else [[0.0] * len(mix.names)] * 2, run.device)
    skips = torch.tensor(state["skips"] if state else [0, 0], device=run.device)
    with together():
        log = Log(phase, state["log_bytes"] if state else 0)
        if rank() == 0:
            files.write_json(phase.folder / "config.json", dataclasses.asdict(cfg))
            tokenizer.keep(run.encoding, phase.folder)
    if state:
        log.write(step, {"event": "resume"})
    feeder = Feeder(phase, step, run.device, model.dtype)
    bar = tqdm(total=phase.steps, initial=step, desc=phase.name, unit="step", disable=rank() > 0 or None, leave=False)

    def due(every):
        return every and step and step % every == 0

    def save():
        state = {
            "step": step, "phase": phase.name, "tokens": phase.first_token + step * cfg.batch,
            "sample": step * phase.rows, "start": mix.start, "first_token": phase.first_token, "evaluated": evaluated,
            "parent": parent, "sums": sums.tolist(), "skips": skips.tolist(), "log_bytes": log.size(),
            "drawn": mix.drawn(step * phase.rows), "mix": mix.identity(), "model": dataclasses.asdict(model.config),
            "tokenizer": run.tokenizer, "config": dataclasses.asdict(cfg), "torch": torch.__version__,
        }  # fmt: skip
        saver.save(phase.folder / "checkpoints", step, tensors_of(model, run.optimizer), state, cfg.keep)

    since, done = (time.perf_counter(), step), False  # where the log line under way began
    while (why := run.stop.agreed(saver.failed())) != "failed":
        if not why and evaluated != step and (step in (0, phase.steps) or due(cfg.eval_every)):
            if not measure(run, phase, log, step):
                continue  # and hear why it was stopped
            evaluated, since = step, (time.perf_counter(), step)
        done = step == phase.steps == evaluated
        if why and not done:
            log.write(step, {"event": "signal", "signal": why})
        if saved != (step, evaluated) and (why or done or due(cfg.save_every)):
            save()
            saved, since = (step, evaluated), (time.perf_counter(), step)
        if why or done:
            break
        step += 1
        lr, norm = train_step(model, run.optimizer, feeder, phase, step, sums, skips)
        bar.update()
        if step in (1, phase.steps) or due(cfg.log_every):
            speed = (step - since[1]) * cfg.batch / (time.perf_counter() - since[0])
            mfu = speed * model.flops_per_token() / run.peak
            in_a_row = log_training(log, phase, step, sums, skips, lr, norm, speed, mfu)
            if in_a_row > cfg.max_skips:
                saver.wait()
                give_up(phase, step, in_a_row)
            since = time.perf_counter(), step
    bar.close()
    feeder.thread.shutdown()
    saver.wait()  # raises if the last save failed
    log.close()
    if not done:
        print(f"{why}: stopped and saved at step {step:,} of {phase.name}; the same command continues")
    return done


def report(phase):
    """The table at the end of a phase: held-out loss before and after, from its log."""
    evaluations = []
    for line in (phase.folder / "log.jsonl").read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):  # somebody has edited it
            record = json.loads(line)
            if not files.misfit(record, {"val": {...: {"loss": float, "bpb": files.number}}}):
                evaluations.append(record["val"])
    if not evaluations:
        return
    print(f"\n{phase.name:<8} held out                         loss before    after   bits/byte before    after")
    for name in (name for name in evaluations[0] if name in evaluations[-1]):
        before, after = evaluations[0][name], evaluations[-1][name]
        bits = f"   {before['bpb']:16.4f} {after['bpb']:8.4f}" if before["bpb"] else ""
        print(f"         {name:<32} {before['loss']:11.4f} {after['loss']:8.4f}{bits}")


def show_changes(saved, cfg):
    """Knobs that are not what they were when the checkpoint was written: allowed, but said."""
    now = dataclasses.asdict(cfg)
    changed = [f"{k} {saved[k]!r} -> {now[k]!r}" for k in now if k in saved and saved[k] != now[k]]
    if changed:
        print(f"changed  since the checkpoint: {', '.join(changed)}")


@dataclass
class Start:
    """What a run begins from: an initialisation, or a checkpoint."""

    index: int = 0  # of the phase that the checkpoint is of, or that begins with it
    folder: Path | None = None
    state: dict | None = None
    inside: bool = False  # the checkpoint is of the phase, not of one before
    done: bool = False  # and nothing is left to do in it

    @property
    def resumed(self):
        """State of the phase to go on with, None if one begins."""
        return self.state if self.inside and not self.done else None

    @property
    def position(self):
        """(windows drawn of every source, tokens trained) when phase `index` began."""
        if not self.state:
            return {}, 0
        return tuple(self.state[name] for name in (("start", "first_token") if self.inside else ("drawn", "tokens")))


def find_start(named, fresh):
    """The newest checkpoint of the last phase that has one, or what init_from names. CheckpointError, ConfigError."""
    index, folder = (0, None) if fresh else find_progress(named)
    if folder:
        state = checkpoint.load_state(folder, RESUMED)
        done = state["step"] == state["evaluated"] == phase_steps(*named[index])[0]
        return Start(index, folder, state, True, done)
    if init_from := named[0][1].init_from:
        folder = checkpoint.find(init_from)
        return Start(0, folder, checkpoint.load_state(folder, checkpoint.STATE))
    return Start()


def check_same(facts):
    """Refuse to train if the processes were given different things. facts: nested dict of what must be equal."""

    def flat(value, name=""):
        if not isinstance(value, dict):
            return {name: value}
        return {k: v for key, x in value.items() for k, v in flat(x, f"{name}.{key}".lstrip(".")).items()}

    first, *others = map(flat, gather(facts))
    with together():
        for n, other in enumerate(others, 1):
            for name in first | other:
                if first.get(name) != other.get(name):
                    raise ConfigError(
                        f"{name} is {first.get(name)!r} in process 0 but {other.get(name)!r} in process {n}: must agree"
                    )


def train(named, fresh, stop):
    """Run the phases from wherever they stopped. named: [(name, Config), ...]. False if `stop` ended it early."""
    cfg, names = named[0][1], sorted({name for _, c in named for name in c.mix})
    with together():
        device, dtype, compiled, kernels = set_up(cfg)
    from_first(prepare_corpus, cfg, names)
    start = from_first(find_start, named, fresh)
    with together():
        sources = {name: Source(Path(cfg.data) / name, "train", cfg.block_size) for name in names}
        meta, encoding = the_tokenizer(sources)
        with torch.device("meta"):
            model = GPT(model_config(cfg, count_ids(cfg, meta, sources)), dtype)
        vocabulary = the_vocabulary(named, encoding)
        phases = build_phases(named[start.index :], sources, *start.position, vocabulary)
        if start.folder:
            check_start(start, model, meta, sources, phases[0])
        sets = held_out(named, sources, encoding, vocabulary)
        tasks = evaluation.read_tasks(Path(cfg.eval_tasks), ["quick"], cfg.eval_examples) if cfg.eval_tasks else []
        if tasks and encoding is None:
            raise ConfigError("eval_tasks needs a tokenizer, but the data names none")
        weights = checkpoint.weights_sha256(start.folder) if start.folder else None
    check_same({
        **{name: dataclasses.asdict(c) for name, c in named}, "torch": torch.__version__, "arithmetic": str(dtype),
        "data": {phase.name: phase.mix.identity() for phase in phases}, "checkpoint": weights,
        "micro_batch": {phase.name: phase.micro for phase in phases},
        "held out": {name: hashlib.sha256(rows).hexdigest() + hashlib.sha256(targets).hexdigest()
                     for name, (rows, targets, _) in sets.items()}, "tasks": {t.name: t.sha256 for t in tasks},
    })  # fmt: skip
    phases = phases[start.done :]
    if not phases:
        print(f"finished: nothing is left to do in {cfg.out}/; a larger --budget trains on, --fresh starts over")
        return True

    machine, peak = describe(device, dtype, compiled)
    print_plan(phases, model, f"{machine}\nkernels  {kernels}")
    if device == "cuda" and model.config.n_inner % 8:
        print(f"slow     n_inner = {model.config.n_inner:,} is not a multiple of 8, so rows of the MLP are not aligned")
    if backend.using["norm"] == "triton" and model.config.n_embd > 8192:
        print(f"slow     n_embd = {model.config.n_embd:,} is above 8,192, so norms run in torch")
    print_start(start, named)

    first = phases[0]
    with together():
        need = 16 * model.num_params() / world() * processes.local()[1]  # fp32 weights, gradients and two moments
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if device == "cpu" and need > memory:
            sizes = f"{need / 1e9:,.1f} GB of a memory of {memory / 1e9:,.1f} GB"
            raise ConfigError(f"the model and its optimizer would take {sizes}; a smaller --size fits")
    parallelize(model, cfg)
    model.to_empty(device=device)
    optimizer = make_optimizer(model, first.cfg, device)
    if start.folder:
        model.init_tables()
        with_moments = start.resumed or first.cfg.carry_optimizer
        checkpoint.load(start.folder, tensors_of(model, optimizer if with_moments else None), processes.control)
    else:
        init_weights(model, cfg.seed, my_shard, min(8, os.cpu_count() // processes.local()[1] or 1))
    from_first(make_room, named if fresh else [], first.folder)
    try:
        speed = rehearse(model, first, device, stop)
    except torch.OutOfMemoryError:
        smaller = [n for n in range(1, first.micro) if first.micro % n == 0]
        fewer = f"--micro_batch={smaller[-1]}" if smaller else "--recompute=True"
        raise ConfigError(
            f"{first.micro} rows of {cfg.block_size:,} tokens do not fit into the GPU's memory at a time; try {fewer}"
        ) from None
    made = start.resumed["step"] * first.cfg.batch if start.resumed else 0
    left = sum(p.steps * p.cfg.batch for p in phases) - made
    print(f"time     about {clock(left / speed)} at {si(speed)} tokens/s, and the evaluations")

    parent = start.resumed["parent"] if start.resumed else weights
    run = Run(model, optimizer, device, peak, sets, tasks, encoding, meta, stop, checkpoint.Saver())
    for phase in phases:
        if phase is not first:
            set_optimizer(optimizer, model, phase.cfg)
        if not train_phase(run, phase, start.resumed if phase is first else None, parent):
            return False
        parent = from_first(end_phase, phase)
    folder, out = shlex.quote(str(phase.folder)), shlex.quote(cfg.out)
    print(f"\nnext     python sample.py {folder} --prompt 'def '     python plot.py {out}")
    print(f"         python train.py <another phase>.py --init_from={folder}")
    return True


def set_up(cfg):
    """(device, dtype, compile?, what the kernels are) that the knobs ask for; ConfigError if they are not there."""
    device, dtype, compiled = find_device(cfg)
    if cfg.wandb and not importlib.util.find_spec("wandb"):
        raise ConfigError(f"wandb = {cfg.wandb!r} needs the wandb package: pip install wandb")
    try:
        kernels = backend.choose(cfg.kernels, device, compiled)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if device == "cpu":
        keep_memory()
    return device, dtype, compiled, kernels


def print_start(start, named):
    for name, _ in named[: start.index + start.done]:
        print(f"{name:<8} done")
    if start.folder:
        print(f"from     {start.folder}, step {start.state['step']:,} of {start.state['phase']}")
    if start.resumed:
        show_changes(start.state["config"], named[start.index][1])


def count_ids(cfg, meta, sources):
    """Ids that the data may hold: the tokenizer's, or for bare .bin files cfg.vocab_size."""
    ids = meta["vocab_size"] if meta else cfg.vocab_size
    if not ids:
        largest = max(int(source.rows(100).max()) for source in sources.values())
        raise ConfigError(f"{cfg.data}/ names no tokenizer and has id {largest:,}; say --vocab_size={largest + 1}")
    for source in sources.values():
        source.ids = ids  # from now on a larger one is refused wherever it is met
        if not source.meta:
            source.rows(100)  # the usual mistake shows at once
    return ids


def make_room(afresh, folder):
    """Set aside what --fresh replaces, and make the folder of the phase that begins."""
    for name, cfg in afresh:
        set_aside(Path(cfg.out) / name)
    folder.mkdir(parents=True, exist_ok=True)


def end_phase(phase):
    """Print what it did; what tells its weights from others, for the phase that begins with them."""
    report(phase)
    return checkpoint.weights_sha256(checkpoint.complete(phase.folder / "checkpoints")[-1])


def show_plan(named):
    """The plan alone; sizes of sources that are not on this disk are taken from source_tokens."""
    cfg, sources = named[0][1], {}
    for name in sorted({name for _, c in named for name in c.mix}):
        folder = Path(cfg.data) / name
        tokens = next((c.source_tokens[name] for _, c in named if name in c.source_tokens), None)
        is_here = folder.is_dir() or tokens is None
        sources[name] = (
            Source(folder, "train", cfg.block_size) if is_here else coerce(name, tokens, int) // cfg.block_size
        )
    start, tokens = {}, 0
    if cfg.init_from:
        state = checkpoint.load_state(checkpoint.find(cfg.init_from), checkpoint.STATE)
        start, tokens = state["drawn"], state["tokens"]
    meta, encoding = the_tokenizer({name: source for name, source in sources.items() if isinstance(source, Source)})
    here = all(isinstance(source, Source) for source in sources.values())
    phases = build_phases(named, sources, start, tokens, the_vocabulary(named, encoding) if here else None)
    vocab_real = meta["vocab_size"] if meta else cfg.vocab_size or tokenizer.load().n_vocab
    with torch.device("meta"):
        model = GPT(model_config(cfg, vocab_real))
    print_plan(phases, model, "plan     only; nothing is written or trained")
    return True


def run_command(named, flags, refused, stop):
    """-> exit code. refused: what was wrong with the command line, if anything was."""
    try:
        with together():
            if refused:
                raise refused
            check_phases(named)
        if "plan" in flags:
            show_plan(named)
        else:  # a start by torchrun after a death, which not all machines need to have seen, is not a new run
            again = any(gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0))
            train(named, "fresh" in flags and not again, stop)
    except Stopped as signal_name:
        print(f"{signal_name}: stopped before this start made a step; the same command continues")
    except (UserError, OSError, LossError) as error:
        alone = isinstance(error, (OSError, UserError)) and not hasattr(error, "by_all")
        if rank() == 0 or alone:
            errors.say(main, error)
        return 1 if isinstance(error, LossError) else 2
    return 0


@errors.command
def main(argv):
    named, flags, refused = [], set(), None
    try:
        named, flags = read_command_line(argv, Config, PRESETS, ("plan", "fresh", "help"), infill.OBJECTIVES)
    except ConfigError as error:
        refused = error
    if "help" in flags:
        print(__doc__)
        return 0
    try:
        with Stop() as stop, processes.joined(named[0][1].timeout if named else Config.timeout):
            return run_command(named, flags, refused, stop)
    except PeerError as error:
        errors.say(main, error)
        return 1


if __name__ == "__main__":
    errors.run(main, processes.leave)
