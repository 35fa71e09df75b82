"""How a command begins and ends, on whatever terminal, and what files.py writes and reads."""

import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import errors
import files

ROOT = Path(__file__).parent
COMMAND = """
import errors, sys
@errors.command
def main(argv):
    for n in range(int(argv[0])):
        print(argv[1], n)
    open("done", "w").write("done")
    print(argv[1], file=sys.stderr)
if __name__ == "__main__":
    errors.run(main)
"""


def start(tmp_path, *argv, **how):
    (tmp_path / "command.py").write_text(COMMAND)
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | how.pop("env", {})
    return subprocess.Popen([sys.executable, "command.py", *argv], cwd=tmp_path, env=environment, **how)


TERMINALS = {
    "ASCII": ("± Naïve 木", {"PYTHONIOENCODING": "ascii"}, b"\\xb1 Na\\xefve \\u6728 0\n"),
    "strict UTF-8, and a name that is none": (b"caf\xe9", {"PYTHONIOENCODING": "utf-8:strict"}, b"caf\\udce9 0\n"),
    "Latin-1": ("± 木", {"PYTHONIOENCODING": "latin-1"}, b"\xb1 \\u6728 0\n"),
    "UTF-8": ("± 木", {"PYTHONIOENCODING": "utf-8"}, "± 木 0\n".encode()),
}


@pytest.mark.parametrize("terminal", TERMINALS)
def test_a_terminal_that_cannot_show_a_character_gets_it_spelt(terminal, tmp_path):
    text, env, shown = TERMINALS[terminal]
    process = start(tmp_path, "1", text, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    assert process.returncode == 0 and out == shown and err == shown.replace(b" 0", b"")


def test_a_reader_that_goes_away_ends_no_work(tmp_path):
    process = start(tmp_path, "100000", "line", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"line 0\n"
    process.stdout.close()
    assert process.stderr.read() == b"line\n" and process.wait() == 0 and (tmp_path / "done").exists()
    (tmp_path / "done").unlink()
    shut = start(tmp_path, "9", "line", preexec_fn=lambda: (os.close(1), os.close(2)))  # as by >&- 2>&-
    assert shut.wait() == 0 and (tmp_path / "done").exists()


@pytest.mark.parametrize("lines", ["1", "100000"])
def test_a_full_disk_behind_the_output_is_said_once(lines, tmp_path):
    with open("/dev/full", "wb") as full:
        process = start(tmp_path, lines, "line", stdout=full, stderr=subprocess.PIPE)
        err = process.communicate()[1]
    assert process.returncode == 2 and err == b"command.py: [Errno 28] No space left on device\n"


ENDS = {
    "a mistake": (errors.UserError("line 1\n  line 2\n"), 2, "test_errors.py: line 1; line 2\n"),
    "the operating system's": (FileNotFoundError(2, "None", "x"), 2, "test_errors.py: [Errno 2] None: 'x'\n"),
    "half a character": (errors.UserError("caf\udce9"), 2, "test_errors.py: caf\\udce9\n"),
    "Ctrl-C": (KeyboardInterrupt(), 130, ""),
    "none": (None, 0, ""),
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
def test_a_command_ends_with_one_line_and_its_exit_code(end, capsys):
    raised, code, line = ENDS[end]

    @errors.command
    def main(argv):
        if raised:
            raise raised

    assert main([]) == code and capsys.readouterr().err == line
    with pytest.raises(ZeroDivisionError):  # an error of ours keeps its trace
        errors.command(lambda argv: 1 / 0)([])


def test_a_parser_says_in_one_line_what_is_wrong():
    parser = errors.Parser("What it does.")
    parser.add_argument("--n", type=errors.number(int, 1, 10))
    parser.add_argument("--share", type=errors.number(float, 0))
    parser.add_argument("--out", type=errors.path)
    for words in ("--n=0", "--n=11", "--n=1.5", "--share=nan", "--share=-1", "--shar=1", "--none", "--n"):
        with pytest.raises(errors.UserError) as error:
            parser.parse_args([words])
        assert "\n" not in str(error.value)
    read = parser.parse_args(["--n", "10", "--share=1e3", "--out=~/a b"])
    assert (read.n, read.share, read.out) == (10, 1000.0, Path.home() / "a b")
    assert errors.path("~nobody-is-called-so/x") == Path("~nobody-is-called-so/x")


def test_what_is_written_is_strict_json_and_whole_or_absent(tmp_path):
    values = {"nan": math.nan, "inf": [math.inf, 1.5, {"deep": (-math.inf, "NaN", None)}]}
    files.write_json(tmp_path / "new" / "a.json", values)
    read = json.loads((tmp_path / "new/a.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert read == {"nan": None, "inf": [None, 1.5, {"deep": [None, "NaN", None]}]}
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "new" / "a.json", {"set": set()})
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        files.write(tmp_path / "folder", b"x")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.json"] and not [*tmp_path.glob("*.tmp")]


NOT_THAT = {
    "no JSON": (b"{", "is not JSON"), "not UTF-8": (b"\xff\xfe{}", "is not JSON"),
    "too deep": (b"[" * 10**5, "is not JSON"), "nothing": (b"", "is not JSON"),
    "a number of 5,000 digits": (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"), "a list": (b"[1]", "not an object"),
    "a lack": (b'{"m": 1}', "lacks 'n'"), "true for a number": (b'{"n": true}', "n is true, not a whole number"),
    "null": (b'{"n": null}', "n is null"),
    "text deep inside": (b'{"n": 1, "of": {"a": [{"x": "1"}]}}', r"of.a\[0\].x is"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_THAT)
def test_a_json_file_of_another_shape_is_named_with_the_place(case, tmp_path):
    content, words = NOT_THAT[case]
    path, shape = tmp_path / "a.json", {"n": int}
    path.write_bytes(content)
    with pytest.raises(errors.UserError, match=rf"a\.json.*{words}"):
        files.read_json(path, shape | ({"of": {...: [{"x": float}]}} if b"of" in content else {}))
    path.write_bytes(b'\xef\xbb\xbf{"n": 3, "more": [], "of": {"a": [{"x": 1}], "b": []}}')
    assert files.read_json(path, shape | {"of": {...: [{"x": float}]}})["n"] == 3


def test_a_new_folder_appears_whole_and_takes_nobodys_place(tmp_path):
    (tmp_path / "a.tmp").mkdir()
    (tmp_path / "a.tmp" / "mine").write_text("mine")
    with files.new_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("x")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a/x").read_text() == "x" and stat.S_IMODE((tmp_path / "a").stat().st_mode) & 0o500 == 0o500
    with pytest.raises(errors.UserError, match="exists"), files.new_folder(tmp_path / "a"):
        pass
    with pytest.raises(KeyboardInterrupt), files.new_folder(tmp_path / "b"):
        raise KeyboardInterrupt
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.tmp"] and (tmp_path / "a.tmp/mine").exists()
