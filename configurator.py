"""How a knob gets its value: a dataclass's default, then the phase's config file, then the command line.

A config file is plain Python and may compute. It runs among the defaults, so it can name any knob, and a knob given on
the command line keeps that value while the file runs, so what the file computes from it follows. A config that it
imports runs in the same way. It is looked for beside the file that imports it, then in the folders above, then in the
program's own: never in the working folder, so a config means the same from everywhere.
"""

import ast
import builtins
import dataclasses
import difflib
import math
import numbers
import os
import re
import sys
from decimal import Decimal
from pathlib import Path
from types import ModuleType

from errors import UserError

HERE = Path(__file__).resolve().parent
SPELT = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
EXAMPLES = {
    int: "a whole number such as 8192, 64K or 2.5M", float: "a number such as 0.006 or 6e-3", bool: "True or False",
    dict: "a dict such as {'text': 0.5, 'code': 0.5}", list: "a list such as [0.0, 0.5]", str: "text",
    "objective": "a dict such as {'code': 'fim(0.9)'}", "skip": "a list such as [(1000, 2000)]",
}  # fmt: skip


class ConfigError(UserError):
    """A knob, file or command line that cannot be meant; the message names it and says what to type instead."""


# -------------------------------------------------------------------------------------------------------------- values


def coerce(name, value, kind):
    """A knob's value as its type: "2.5B" -> 2500000000 for an int, "{'text': 1}" -> dict. Raises ConfigError."""
    given = value
    try:
        value = parse(value, kind) if isinstance(value, str) else plain(value)
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if kind is float and type(value) is int:
            value = float(value)
        if kind is list and isinstance(value, tuple):
            value = list(value)
    except (ValueError, SyntaxError, OverflowError, RecursionError, MemoryError):
        pass
    if type(value) is int and abs(value) >= 2**62:  # which Python may not even spell
        raise ConfigError(f"{name} is beyond 2**62, more than anything here can count")
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        example = EXAMPLES.get(name, EXAMPLES[kind])
        raise ConfigError(f"{name} = {given!r:.200} is not of type {kind.__name__}: write {example}")
    return value


def parse(text, kind):
    """What a person types for a knob of some type, as Python's value. ValueError, SyntaxError."""
    if kind is bool and text.lower() in SPELT:
        return SPELT[text.lower()]
    if kind is dict and re.match(r"[\w.-]+=", text):  # text=0.5,code=0.5, where fim(0.5, spm=0) is one word
        pairs = (pair.split("=", 1) for pair in re.split(r",(?![^(]*\))", text))
        return {name.strip(): value_of(word) for name, word in pairs}
    if kind in (bool, dict, list):
        return ast.literal_eval(text)
    if kind in (int, float):
        if text.endswith("%"):
            return float(text[:-1]) / 100
        scale = {"K": 1e3, "M": 1e6, "B": 1e9}.get(text[-1:].upper())
        return float(text[:-1]) * scale if scale else int(text) if re.fullmatch(r"\d+", text) else float(text)
    return text


def value_of(word):
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


def plain(value):
    """A value, with what numpy, fractions and decimal call numbers as Python's own, or as exact text, for JSON."""
    if isinstance(value, dict):
        return {plain(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (numbers.Rational, Decimal)) and not isinstance(value, int):
        return str(value)
    return value


def unknown(name, known):
    near = difflib.get_close_matches(name.lower(), known, 1)
    hint = f"did you mean {near[0]!r}?" if near else "all are at the top of train.py"
    return ConfigError(f"there is no knob {name!r}; {hint}")


# --------------------------------------------------------------------------------------------------------------- files


class ConfigFile(dict):
    """Globals of a running config file. Knobs in `fixed` keep their value whatever the file assigns to them. inside:
    the files that are being run, the first one first, each imported by the one before."""

    def __init__(self, defaults, fixed, inside=()):
        super().__init__(defaults | fixed)
        self.defaults, self.fixed, self.inside = defaults, fixed, inside
        self.assigned = set()  # by the file, if only to be overruled

    def __setitem__(self, name, value):
        self.assigned.add(name)
        if name not in self.fixed:
            super().__setitem__(name, value)

    def update(self, *args, **values):  # globals().update(json.load(file))
        for name, value in dict(*args, **values).items():
            self[name] = value

    def run(self, path):
        """Run a file, and return what there is then. Raises ConfigError, OSError."""
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"there is no config file {path}{what_is_meant(path)}")
        if path.resolve() in self.inside:
            raise ConfigError(f"{path} imports itself")
        self.inside = *self.inside, path.resolve()
        super().update({"__builtins__": vars(builtins) | {"__import__": self.import_}, "__file__": str(path)})
        source = path.read_bytes()  # as bytes: Python knows byte order marks and declared encodings
        try:
            tree = ast.parse(source, str(path))
            check_statements(path, tree.body)
            exec(compile(tree, str(path), "exec"), self)
        except ConfigError:
            raise
        except SyntaxError as error:
            where = f", line {error.lineno}," if error.lineno else ""
            raise ConfigError(f"{path}{where} is not Python ({error.msg}): write lines such as lr = 0.003") from error
        except SystemExit as error:
            raise ConfigError(f"{path} ends the program itself, with exit or SystemExit") from error
        except NameError as error:  # as of true, null, or a text without quotation marks
            name = str(error.name)
            hint = f"write {SPELT[name.lower()]}" if name.lower() in SPELT else f"a text is written {name!r}"
            raise ConfigError(f"{path}: there is no name {name}; {hint}") from error
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever somebody's file does
            raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
        return self

    def import_(self, name, globals=None, locals=None, fromlist=(), level=0):
        """`from config.phase1 import *` runs that file as this one is run: same defaults, same fixed knobs."""
        found = self.find(name, fromlist or (), level)
        if not found:
            return builtins.__import__(name, globals, locals, fromlist, level)
        if found.is_dir():  # from config import phase1
            return as_module(name, {part: self.module(found / f"{part}.py") for part in fromlist})
        module = self.module(found)
        if not fromlist:  # import config.phase1, which binds config
            for part in reversed(name.split(".")[1:]):
                module = as_module(name, {part: module})
        return module

    def module(self, path):
        other = ConfigFile(self.defaults, self.fixed, self.inside).run(path)
        return as_module(path.stem, {name: other[name] for name in other.assigned if name in other})

    def find(self, name, parts, level):
        """The config file that an import means, or the folder of the configs `parts`; None for what Python imports."""
        beside = self.inside[-1].parent
        folders = [beside, *beside.parents, HERE]
        if level:
            folders = folders[level - 1 : level]
        modules = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
        for folder in folders:
            path = folder.joinpath(*name.split("."))
            file = path.with_name(f"{path.name}.py")
            alone = level or "." in name or folder in (beside, HERE)  # random.py in a folder above is not meant
            if alone and file.is_file():
                package = folder == HERE and (HERE / name.split(".")[0] / "__init__.py").exists()
                return None if package or (file.parent == HERE and str(file) in modules) else file
            if parts and all((path / f"{part}.py").is_file() for part in parts):
                return path
        return None


def what_is_meant(path):
    """What somebody may have wanted with the path of a config that is not there, as the end of a sentence."""
    if "=" in str(path):
        return f"; a knob is written --{path}"
    near = [Path(f"{path}.py"), HERE / path, HERE / f"{path}.py"]
    return next((f"; did you mean {other}?" for other in near if other.is_file()), "")


def as_module(name, values):
    module = ModuleType(name)
    vars(module).update(values)
    return module


def check_statements(path, body):
    """Refuse what is Python but sets nothing: YAML's `lr: 0.003` is an annotation, JSON a dict, TOML's [model] a list.

    Raises ConfigError.
    """
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        where, shown = f"{path}, line {statement.lineno},", ast.unparse(statement)
        if isinstance(statement, ast.AnnAssign) and statement.value is None:
            name, value = ast.unparse(statement.target), ast.unparse(statement.annotation)
            raise ConfigError(f"{where} sets nothing with {shown:.60}: write {name} = {value:.60}")
        if isinstance(statement, ast.Expr) and not does_something(statement.value):
            raise ConfigError(f"{where} sets nothing with {shown:.60}: write lines such as lr = 0.003")
        parts = [*ast.iter_child_nodes(statement)]
        check_statements(path, [part for part in parts if isinstance(part, ast.stmt)])
        for part in parts:
            if isinstance(part, (ast.ExceptHandler, ast.match_case)):
                check_statements(path, part.body)


def does_something(expression):
    """Whether a statement that is only an expression has a use: a call, or a text, which is a comment."""
    if isinstance(expression, ast.Constant):
        return isinstance(expression.value, (str, type(...)))
    return any(isinstance(part, (ast.Call, ast.NamedExpr)) for part in ast.walk(expression))


def read_config(path, fixed, Config, presets, names):
    """One file -> Config, filled up from presets[size] where neither the file nor the command line said anything.

    names: what a file may use beside the knobs, {name: anything}.
    """
    fields = dataclasses.fields(Config)
    defaults, untouched = (
        {f.name: f.default_factory() if f.default is dataclasses.MISSING else f.default for f in fields}
        for _ in range(2)
    )
    file = ConfigFile(defaults | names, fixed).run(path)
    for name in sorted(file.assigned - set(defaults)):
        if name in file and not (name.startswith("_") or isinstance(file[name], ModuleType) or callable(file[name])):
            raise ConfigError(f"{path}: {unknown(name, defaults)}; begin names of your own with _")
    if not file.assigned & set(defaults) and repr(defaults) == repr(untouched):
        raise ConfigError(f"{path} sets no knob: write lines such as lr = 0.003")
    try:
        knobs = {f.name: coerce(f.name, file.get(f.name, untouched[f.name]), f.type) for f in fields}
        for name, value in presets.get(knobs["size"], {}).items():
            given = name in file.assigned or name in fixed
            if not given or (type(value) is int and knobs[name] == 0):
                knobs[name] = value
        return Config(**knobs)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


# -------------------------------------------------------------------------------------------------------- command line


def split_words(argv, flags):
    """["a.py", "--lr=0.01", "--seed", "2", "--plan"] -> (["a.py"], {"lr": "0.01", "seed": "2"}, {"plan"}).

    flags: the names that take no value. Raises ConfigError.
    """
    paths, given, switched, words = [], {}, set(), list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-"):
            paths.append(word)
        elif name in flags:
            if equals:
                raise ConfigError(f"--{name} takes no value")
            switched.add(name)
        elif equals or (words and not words[0].startswith("--")):
            given[name] = value if equals else words.pop(0)
        else:
            given[name] = None
    return paths, given, switched


def read_command_line(argv, Config, presets, flags, names):
    """["config/phase1.py", "--lr=0.01", "--plan"] -> ([(phase name, Config), ...], {"plan"}). Raises ConfigError."""
    kinds = {f.name: f.type for f in dataclasses.fields(Config)}
    argv = ["--help" if word == "-h" else word for word in argv]
    paths, given, switched = split_words(argv, flags)
    if "help" in switched:
        return [], switched
    fixed = {}
    for name, value in given.items():
        if name not in kinds:
            raise unknown(name, [*kinds, *flags])
        if value is None:
            raise ConfigError(f"--{name} needs a value: --{name}={'True' if kinds[name] is bool else '...'}")
        fixed[name] = coerce(name, value, kinds[name])
    paths = [os.path.expanduser(path) for path in paths]
    return [(Path(path).stem, read_config(path, fixed, Config, presets, names)) for path in paths], switched
