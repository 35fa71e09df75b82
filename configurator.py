"""How a knob gets its value: a dataclass's default, then the phase's config file, then the command line.

A config file is plain Python and may compute. It runs among the defaults, so it can name any knob, and a knob given on
the command line keeps that value while the file runs, so what the file computes from it follows.
"""

import ast
import builtins
import dataclasses
import difflib
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace

from errors import UserError


class ConfigError(UserError):
    """A knob, file or command line that cannot be meant; the message names it and says what to type instead."""


def coerce(name, value, kind):
    """A knob's value as its type: "2.5B" -> 2500000000 for an int, "{'text': 1}" -> dict. Raises ConfigError."""
    given = value
    try:
        if isinstance(value, str) and kind in (int, float):
            scale = {"K": 1e3, "M": 1e6, "B": 1e9}.get(value[-1:].upper())
            value = float(value[:-1]) * scale if scale else float(value)
        elif isinstance(value, str) and kind in (bool, dict, list):
            value = ast.literal_eval(value)
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if kind is float and type(value) is int:
            value = float(value)
    except (ValueError, SyntaxError):
        pass
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ConfigError(f"{name} = {given!r} is not of type {kind.__name__}")
    return value


def unknown(name, known):
    near = difflib.get_close_matches(name, known, 1)
    return ConfigError(f"there is no knob {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


class ConfigFile(dict):
    """Globals of a running config file. Knobs in `fixed` keep their value whatever the file assigns to them."""

    def __init__(self, defaults, fixed):
        super().__init__(defaults | fixed)
        self.defaults, self.fixed, self.assigned = defaults, fixed, set(fixed)

    def __setitem__(self, name, value):
        self.assigned.add(name)
        if name not in self.fixed:
            super().__setitem__(name, value)

    def run(self, path):
        if not Path(path).is_file():
            raise ConfigError(f"there is no config file {path}")
        self["__builtins__"] = vars(builtins) | {"__import__": self.import_}
        try:
            exec(compile(Path(path).read_text(), path, "exec"), self)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
        return self

    def import_(self, name, globals=None, locals=None, fromlist=(), level=0):
        """`from config.phase1 import *` runs that file as this one is run: same defaults, same fixed knobs."""
        path = Path(*name.split(".")).with_suffix(".py")
        if not (fromlist and path.parts[0] == "config" and path.is_file()):
            return builtins.__import__(name, globals, locals, fromlist, level)
        other = ConfigFile(self.defaults, self.fixed).run(str(path))
        return SimpleNamespace(**{name: other[name] for name in other.assigned if not name.startswith("__")})


def read_config(path, fixed, Config, presets, names):
    """One file -> Config, filled up from presets[size] where neither the file nor the command line said anything.

    names: what a file may use beside the knobs, {name: anything}.
    """
    fields = dataclasses.fields(Config)
    defaults = {f.name: f.default_factory() if f.default is dataclasses.MISSING else f.default for f in fields}
    file = ConfigFile(defaults | names, fixed).run(path)
    for name in file.assigned - set(defaults):
        if not (name.startswith("_") or isinstance(file[name], ModuleType) or callable(file[name])):
            raise ConfigError(f"{path}: {unknown(name, defaults)}")
    try:
        knobs = {f.name: coerce(f.name, file[f.name], f.type) for f in fields}
        for name, value in presets.get(knobs["size"], {}).items():
            if name not in file.assigned or (type(value) is int and knobs[name] == 0):
                knobs[name] = value
        return Config(**knobs)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_command_line(argv, Config, presets, flags, names):
    """["config/phase1.py", "--lr=0.01", "--plan"] -> ([(phase name, Config), ...], {"plan"}). Raises ConfigError."""
    kinds = {f.name: f.type for f in dataclasses.fields(Config)}
    paths, fixed, given = [], {}, set()
    for argument in argv:
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-"):
            paths.append(argument)
        elif name in flags and not equals:
            given.add(name)
        elif name not in kinds:
            raise unknown(name, [*kinds, *flags])
        elif not equals:
            raise ConfigError(f"{argument} needs a value: --{name}=...")
        else:
            fixed[name] = coerce(name, value, kinds[name])
    return [(Path(path).stem, read_config(path, fixed, Config, presets, names)) for path in paths], given
