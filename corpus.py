"""
The default corpus: the English and the Python of the installation that runs this, so that training needs no download.

- text: docstrings as prose, Python's help topics, READMEs and descriptions of packages, .rst, .md and .txt files
- code: the .py files without those docstrings, so that no passage stands in both

It is a corpus to try things with: API documentation rather than literature, and its contents are what is installed.
"""

import ast
import hashlib
import os
import re
import sysconfig
import warnings
from pathlib import Path
from pydoc_data.topics import topics

ENGLISH = set("the of and to a in is that for it as with this be are or on by from not if an at can".split())  # noqa: SIM905
BLOCKS = (ast.If, ast.Try, ast.ExceptHandler, ast.With, ast.For, ast.While)  # where definitions may hide
LEGAL = re.compile(r"licen[cs]e|copying|notice|authors|third.?party", re.IGNORECASE)


def collect(pool, text_bytes=12_000_000, code_bytes=36_000_000):
    """
    {"text": [document, ...], "code": [...]} from the standard library and the installed packages, each up to its size.
    Files come in the order of a hash of their names, so that no package comes first. `pool` is an executor with map().
    """
    kept = {"text": [text for text in topics.values() if is_english(text)], "code": []}
    room = {"text": text_bytes - sum(map(len, kept["text"])), "code": code_bytes}
    files = python_files()
    for at in range(0, len(files), 512):
        for found in pool.map(read_file, files[at : at + 512], chunksize=16):
            for side, document in zip(kept, found, strict=True):
                if document and room[side] > 0:
                    kept[side].append(document)
                    room[side] -= len(document)
        if max(room.values()) <= 0:
            break
    return kept


def python_files():
    """[(path, name below its root)] of what may become text or code, in the order of a hash of the name."""
    files = {}
    for root in sorted({sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")}):
        for top, folders, names in os.walk(root):
            folders[:] = [f for f in folders if f not in ("site-packages", "dist-packages", "__pycache__")]
            for path in (Path(top, name) for name in names):
                kind = path.suffix if path.name != "METADATA" else ".md"
                if kind in (".py", ".md", ".rst", ".txt") and not LEGAL.search(str(path.relative_to(root))):
                    files[str(path.relative_to(root))] = path
    return [(files[name], name) for name in sorted(files, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())]


def read_file(file):
    """(text, code) of one file of an installation, "" for what it does not give."""
    path, name = file
    try:
        if not path.is_file():  # a pipe would be waited for
            return "", ""
        source = path.read_bytes()
        if not 200 <= len(source) <= 200_000:  # longer ones are mostly tables and generated
            return "", ""
        if path.suffix == ".py":
            return split_module(source, name.removesuffix(".py").replace(os.sep, "."))
        text = source.decode()
    except (OSError, ValueError, SyntaxError, RecursionError):
        return "", ""
    if path.name == "METADATA":
        text = text.partition("\n\n")[2]
    return (text if is_english(text) else ""), ""


def is_english(text):
    words = text.lower().split()
    return len(words) >= 30 and sum(word in ENGLISH for word in words) >= len(words) / 10


def split_module(source, name):
    """
    A module's docstrings as prose, each under the name of what it describes, and its source without them. Docstrings of
    less than six words stay in the source. Raises SyntaxError, UnicodeDecodeError.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's escape sequences
        tree = ast.parse(source.decode())
    prose, lines = [], source.splitlines(keepends=True)
    for node, title in reversed([(tree, "## Module"), *definitions(tree, "## ")]):
        doc = ast.get_docstring(node)
        if doc and len(doc.split()) >= 6:
            prose.append(f"{title}\n\n{doc}\n")
            cut_out(lines, node.body[0], only=len(node.body) == 1 and node is not tree)
    text = "\n".join([f"# {name}\n", *reversed(prose)])
    return text if is_english(text) else "", b"".join(lines).decode()


def definitions(node, prefix):
    """(node, title) of every class and function below a node, in the order of the source."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child, prefix + child.name
            yield from definitions(child, f"{prefix}{child.name}.")
        elif isinstance(child, BLOCKS):
            yield from definitions(child, prefix)


def cut_out(lines, statement, only):
    """Takes a docstring out of a file's lines, leaving `...` where a body needs a statement."""
    first, last = statement.lineno - 1, statement.end_lineno - 1
    before, after = lines[first][: statement.col_offset], lines[last][statement.end_col_offset :]
    if only:
        lines[first : last + 1] = [before + b"..." + after]
    elif before.strip() or after.strip():
        lines[first : last + 1] = [before + b'""' + after]
    else:
        del lines[first : last + 1]
