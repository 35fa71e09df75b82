"""Promises of prepare.py, corpus.py and tokenizer/."""

import ast
import builtins
import bz2
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import logging
import lzma
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import tiktoken

import corpus
import prepare
import readers
import synthetic
import tokenizer

ROOT = Path(__file__).parent
CL100K = (  # as OpenAI writes it today, with possessive quantifiers
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
HARD = [
    "",
    "".join(map(chr, range(256))),
    "emoji \U0001f469\u200d\U0001f469\u200d\U0001f467 flags \U0001f1eb\U0001f1f7 combining e\u0301 \u4f60\u597d \ufeff",
    "def f(x):\r\n\treturn x\r\n\r\n\t\t# tabs\n",
    " " * 10_000,
    "x" + " " * 10_000 + "\n" * 300 + "y",
    "I'll WE'VE 1234567890 a_b.c->d --- === <|endoftext|> <sep>",
    "a" * 3_000,
]


def naive_bpe(text, encoding, n_ranks):
    """The definition: split, then merge the pair of lowest rank, leftmost first, while one is below n_ranks."""
    ranks, ids = encoding._mergeable_ranks, []
    for word in regex.findall(CL100K, text):
        parts = [bytes([b]) for b in word.encode()]
        while len(parts) > 1:
            rank, i = min((ranks.get(a + b, n_ranks), i) for i, (a, b) in enumerate(pairwise(parts)))
            if rank >= n_ranks:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def command(*words, piece=8 << 20, before=""):
    """`python prepare.py *words`, with pieces of `piece` bytes; `before` is run first in the same process."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import errors, prepare; prepare.readers.PIECE = {piece}\n"
    return [sys.executable, "-c", f"{code}{before}\nerrors.run(prepare.main)", *words]


load = functools.cache(tokenizer.load)  # a twentieth of a second each


def run_prepare(*words, cwd, **patches):
    """prepare.main in this process, with names of readers.py and prepare.py patched -> what subprocess.run gives."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(tokenizer, "load", load)
        for name, value in patches.items():
            patch.setattr(readers if hasattr(readers, name) else prepare, name, value)
        code = prepare.main([*map(str, words), "--workers=1"])
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def shards(folder, split="*"):
    return {path.name: path.read_bytes() for path in sorted(folder.glob(f"{split}-*.bin"))}


def read_back(folder, split="*", vocab_size=None):
    """The documents in a source's shards, as text."""
    encoding = load(vocab_size=vocab_size)
    found = []
    for data in shards(folder, split).values():
        ids = np.frombuffer(data, "<u2")
        ends = np.flatnonzero(ids == tokenizer.eot(encoding))
        assert not len(ids) or ends[-1] == len(ids) - 1
        found += [encoding.decode(part[:-1].tolist()) for part in np.split(ids, ends + 1)[:-1]]
    return found


@pytest.fixture(scope="module")
def documents():
    """400 documents of words, sizes from a line to some kilobytes."""
    draw = random.Random(0)
    words = ["def", "return", "the", "of", "and", "class", "self", "42", "x_1", "naïve", "木", "\t", "\n\n"]
    return ["".join(draw.choice(words) + " " for _ in range(draw.randint(5, 900))) + f"#{i}" for i in range(400)]


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


# tokenizer


@pytest.mark.parametrize("vocab_size", [320, 8192, 32_064])
def test_encoding_and_decoding_is_the_identity_on_hard_inputs(vocab_size):
    encoding = tokenizer.load(vocab_size=vocab_size)
    for text in HARD:
        assert encoding.decode_bytes(encoding.encode_ordinary(text)) == text.encode()
    assert encoding.decode_bytes(range(256)) == bytes(range(256))


@pytest.mark.parametrize("vocab_size", [320, 1000, 8192, 32_064])
def test_any_vocab_size_takes_the_first_ranks_and_means_bpe_with_that_many(vocab_size):
    full, cut = tokenizer.load(), tokenizer.load(vocab_size=vocab_size)
    source = Path(ast.__file__).read_text()[:6000]
    for text in [*(t[:2000] for t in HARD), source]:
        assert cut.encode_ordinary(text) == naive_bpe(text, full, vocab_size - 64)
    assert cut.n_vocab == vocab_size and tokenizer.eot(cut) == vocab_size - 64
    names = [name for name, _ in sorted(cut._special_tokens.items(), key=lambda item: item[1])]
    assert len(names) == 64 and names[:2] == ["<|endoftext|>", "<|fim_prefix|>"]
    assert names[22:26] == ["<|sys_end|>", "<sep>", "<eom>", "<mask_1>"] and names[-1] == "<mask_39>"


def test_hugging_face_gives_the_same_ids():
    hf = pytest.importorskip("tokenizers")
    encoding = tokenizer.load(vocab_size=8192)
    letters = {b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}  # GPT-2's bytes to characters
    letters |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in letters)}
    ranks, merges = encoding._mergeable_ranks, []
    spell = {token: "".join(letters[b] for b in token) for token in ranks}
    for token, rank in ranks.items():
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            _, i = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts)))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((spell[parts[0]], spell[parts[1]]))
    other = hf.Tokenizer(hf.models.BPE({spell[token]: rank for token, rank in ranks.items()}, merges))
    other.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [
            hf.pre_tokenizers.Split(hf.Regex(tokenizer.PATTERN), "isolated"),
            hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    texts = [*HARD, *(path.read_text() for path in sorted(Path(ast.__file__).parent.glob("*.py"))[:30])]
    assert all(other.encode(text).ids == encoding.encode_ordinary(text) for text in texts)


def test_the_digest_tells_vocabularies_apart_and_byte_lengths_add_up():
    full, small = tokenizer.load(), tokenizer.load(vocab_size=8192)
    assert tokenizer.digest(full) == tokenizer.digest(tokenizer.load()) != tokenizer.digest(small)
    text = "".join(HARD)
    ids = small.encode_ordinary(text)
    assert tokenizer.byte_lengths(small)[ids].sum() == len(text.encode())
    assert tokenizer.byte_lengths(small)[-64:].sum() == 0
    ranks = dict(small._mergeable_ranks)
    ranks[b" the"], ranks[b"or"] = ranks[b"or"], ranks[b" the"]
    specials = small._special_tokens
    swapped = tiktoken.Encoding("x", pat_str=tokenizer.PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    assert tokenizer.digest(swapped) != tokenizer.digest(small)


@pytest.mark.parametrize(
    ("name", "vocab_size", "said"),
    [("gtp2", None, "gtp2"), ("nanocrystal", 319, "320"), ("nanocrystal", 32_065, "32064"), ("nanocrystal", 0, "320")],
)
def test_a_tokenizer_that_cannot_be_had_is_refused_in_words(name, vocab_size, said):
    with pytest.raises(tokenizer.TokenizerError, match=said):
        tokenizer.load(name, vocab_size)


def test_an_encoding_that_cannot_be_fetched_says_what_to_do(monkeypatch):
    def offline(name):
        raise ConnectionError

    monkeypatch.setattr("tiktoken.get_encoding", offline)
    with pytest.raises(tokenizer.TokenizerError, match="TIKTOKEN_CACHE_DIR"):
        tokenizer.load("gpt2")


# prepare.py: what comes out


def test_any_number_of_workers_and_machines_writes_the_same_bytes(tmp_path, documents):
    write_jsonl(tmp_path / "a.jsonl", documents[:250])
    with lzma.open(tmp_path / "b.jsonl.xz", "wt") as f:
        f.writelines(json.dumps({"text": text}) + "\n" for text in documents[250:])
    words = ["s=a.jsonl,b.jsonl.xz", "--val=0.1"]
    for workers in (1, 4):
        line = command(*words, f"--workers={workers}", f"--out=w{workers}", piece=20_000)
        assert subprocess.run(line, cwd=tmp_path, timeout=120).returncode == 0
    for k in (2, 0, 1):
        assert not shards(tmp_path / "m/s")
        assert run_prepare(*words, f"--shard={k}/3", "--out=m", cwd=tmp_path, PIECE=20_000).returncode == 0
    one = shards(tmp_path / "w1/s")
    assert one and one == shards(tmp_path / "w4/s") == shards(tmp_path / "m/s")
    assert sorted(read_back(tmp_path / "w1/s")) == sorted(documents)
    order = [documents.index(text) for text in read_back(tmp_path / "w1/s", "train")]
    assert abs(np.corrcoef(order, range(len(order)))[0, 1]) < 0.2  # shuffled over all inputs
    assert 0.02 < len(read_back(tmp_path / "w1/s", "val")) / len(documents) < 0.3


def test_meta_json_describes_the_shards(tmp_path, documents):
    write_jsonl(tmp_path / "a.jsonl", documents)
    assert run_prepare("s=a.jsonl", "--val=0.1", cwd=tmp_path, PIECE=50_000, SHARD=30_000).returncode == 0
    meta = json.loads((tmp_path / "data/s/meta.json").read_text())
    encoding = tokenizer.load()
    assert meta["tokenizer"] == {
        "name": "nanocrystal", "vocab_size": 32_064, "eot": 32_000, "sha256": tokenizer.digest(encoding)
    }  # fmt: skip
    for split in ("train", "val"):
        files = shards(tmp_path / "data/s", split)
        assert list(files) == [entry["file"] for entry in meta[split]["shards"]]
        for entry in meta[split]["shards"]:
            data = files[entry["file"]]
            ids = np.frombuffer(data, "<u2").tolist()
            assert entry["tokens"] == len(ids) and entry["documents"] == ids.count(32_000)
            assert entry["bytes"] == len(encoding.decode_bytes([i for i in ids if i != 32_000]))
            assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert meta[split]["tokens"] == sum(entry["tokens"] for entry in meta[split]["shards"])
    assert len(meta["train"]["shards"]) > 2
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == sum(len(text.encode()) for text in documents)


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_run_again_it_keeps_what_was_done_and_ends_in_the_same_bytes(tmp_path, documents, death):
    write_jsonl(tmp_path / "a.jsonl", documents)
    words = ["s=a.jsonl", "--val=0.1", "--workers=2"]
    assert run_prepare(*words, "--out=whole", cwd=tmp_path, PIECE=5_000).returncode == 0
    slow = "write = prepare.files.write\nprepare.files.write = lambda *a: (prepare.time.sleep(0.02), write(*a))"
    torn = command(*words, "--out=torn", piece=5_000, before=slow)
    process = subprocess.Popen(torn, cwd=tmp_path, stderr=subprocess.DEVNULL)
    runs = lambda: list((tmp_path / "torn").glob("s/runs-*/*.json"))
    until = time.time() + 30
    while len(runs()) < 20 and time.time() < until:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    process.send_signal(death)
    assert process.wait(timeout=20) == (-signal.SIGKILL if death == signal.SIGKILL else 130)
    kept = len(runs())
    assert kept >= 20 and not list((tmp_path / "torn").glob("s/*.bin"))
    encoded, finish = [], prepare.finish
    count = lambda *a: (encoded.append(1), finish(*a))
    result = run_prepare(*words, "--out=torn", cwd=tmp_path, PIECE=5_000, finish=count)
    assert result.returncode == 0, result.stderr
    pieces = -(-(tmp_path / "a.jsonl").stat().st_size // 5_000)
    assert kept <= pieces - len(encoded) <= kept + 4
    assert shards(tmp_path / "torn/s") == shards(tmp_path / "whole/s")
    assert sorted(p.name.split("-")[0] for p in (tmp_path / "torn/s").iterdir()) == ["meta.json", "train", "val"]
    for pid in workers:
        assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]
    again = run_prepare(*words, "--out=torn", cwd=tmp_path, PIECE=5_000)
    assert again.returncode == 0 and "nothing to do" in again.stdout


def test_special_tokens_spelt_in_a_document_are_plain_bytes(tmp_path):
    text = "before<|endoftext|>after <|fim_middle|> <sep> " * 3
    (tmp_path / "a.txt").write_text(text)
    assert run_prepare("s=a.txt", "--val=0", cwd=tmp_path).returncode == 0
    assert read_back(tmp_path / "data/s") == [text]


def test_equal_documents_are_kept_once_wherever_they_lie(tmp_path, documents):
    twice = documents[:200]
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in/a.jsonl", documents + twice)
    write_jsonl(tmp_path / "in/b.jsonl", twice)
    (tmp_path / "in/c.txt").write_bytes(documents[0].encode())
    assert run_prepare("s=in", "--val=0.2", cwd=tmp_path, PIECE=10_000).returncode == 0
    train, val = (read_back(tmp_path / "data/s", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(documents) and not set(train) & set(val)
    assert json.loads((tmp_path / "data/s/meta.json").read_text())["duplicates"] == 401


def test_what_is_no_document_is_counted_and_named(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/good.txt").write_text("good text\r\n")
    (tmp_path / "in/empty.txt").write_text(" \n")
    (tmp_path / "in/latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "in/image.txt").write_bytes(b"PNG\0\0\1")
    (tmp_path / "in/bom.txt").write_bytes(b"\xef\xbb\xbfmarked")
    rows = ['{"text": "row"}', '{"text": 3}', '{"text": "\\ud800"}', "not json", '{"body": 1}', ""]
    (tmp_path / "in/rows.jsonl").write_text("\n".join(rows))
    with gzip.open(tmp_path / "in/cut.jsonl.gz", "wb") as f:
        f.write(b"".join(json.dumps({"text": os.urandom(99).hex()}).encode() + b"\n" for _ in range(400)))
    data = (tmp_path / "in/cut.jsonl.gz").read_bytes()
    (tmp_path / "in/cut.jsonl.gz").write_bytes(data[: len(data) // 2])
    result = run_prepare("s=in", "--val=0", cwd=tmp_path, PIECE=10_000)
    assert result.returncode == 0, result.stderr
    assert {"good text\r\n", "marked", "row"} <= set(read_back(tmp_path / "data/s"))
    for line in ("1 empty: ", "3 not UTF-8 text: ", "2 not a JSON object with 'text': ", "1 no string in", "1 damaged"):
        assert line in result.stdout, line
    for name in ("empty.txt", "latin.txt", "image.txt", "rows.jsonl", "cut.jsonl.gz"):
        assert name in result.stdout, name


def test_huge_documents_are_cut_at_line_ends_and_nothing_is_lost(tmp_path):
    text = "".join(f"line {i} of a long book\n" for i in range(5000)) + "".join(f"é{i}木" for i in range(10_000))
    (tmp_path / "a.txt").write_text(text)
    result = run_prepare("s=a.txt", "--val=0", cwd=tmp_path, PIECE=10_000, LONGEST_LINE=3_000)
    assert result.returncode == 0 and "huge, cut into parts" in result.stdout and "not UTF-8" not in result.stdout
    parts = read_back(tmp_path / "data/s")
    assert len(parts) > 10 and sorted("".join(parts)) == sorted(text)
    assert all(part in text for part in parts)


@pytest.mark.parametrize("vocab_size", [1000, 32_064])
def test_long_documents_are_encoded_in_stretches_to_the_same_ids(monkeypatch, vocab_size, documents):
    encoding = tokenizer.load(vocab_size=vocab_size)
    monkeypatch.setattr(prepare, "ENCODING", encoding, raising=False)
    monkeypatch.setattr(prepare, "EOT", 7, raising=False)
    text = "\n".join(documents) + "\r\n  def f(): return 'x'  # don't\n\n\n   \n" * 500 + Path(ast.__file__).read_text()
    whole = [*encoding.encode_ordinary(text), 7]
    for stretch in (300, 999, 5000):
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "STRETCH", stretch)
            assert prepare.encode(text).tolist() == whole
    for text in (" " * 3_000_000, "\n" * 1_500_000 + "x", "ab" * 500_000, "^" * 1_000_000):
        assert encoding.decode(prepare.encode(text)[:-1].tolist()) == text


def test_few_long_documents_give_val_their_ends(tmp_path):
    text = "to be or not to be that is the question\n" * 2000
    (tmp_path / "a.txt").write_text(text)
    result = run_prepare("s=a.txt", "--val=0.1", cwd=tmp_path)
    assert "the end of every document" in result.stdout
    [train], [val] = (read_back(tmp_path / "data/s", split) for split in ("train", "val"))
    assert train + val == text and abs(len(val) / len(text) - 0.1) < 0.01


def test_every_reader_gives_the_same_shards(tmp_path, documents, monkeypatch):
    rows = "".join(json.dumps({"body": text}) + "\n" for text in documents).encode()
    halves = rows[:300_000], rows[300_000:]  # a compressed file may be several joined together
    (tmp_path / "folder").mkdir()
    for i, text in enumerate(documents):
        (tmp_path / f"folder/{i}.{('txt', 'md', 'py', 'rs')[i % 4]}").write_bytes(text.encode())
    (tmp_path / "folder/.hidden.txt").write_text("hidden")
    (tmp_path / "folder/picture.png").write_text("not a source file")
    (tmp_path / "a.jsonl").write_bytes(rows)
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, halves)) + b"\0" * 512)  # padded, as by a tape
    (tmp_path / "a.jsonl.xz").write_bytes(b"".join(map(lzma.compress, halves)))
    words = ["folder=folder", "glob=folder/*.[tm]*,folder/*.py", "folder/*.rs"]
    words += ["plain=a.jsonl", "gz=a.jsonl.gz", "xz=a.jsonl.xz"]
    names = ["folder", "glob", "plain", "gz", "xz", "hub"]
    if readers.find_spec("zstandard"):
        import zstandard

        (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, halves)))
        words, names = [*words, "zst=a.jsonl.zst"], [*names, "zst"]
    if readers.find_spec("pyarrow"):
        from pyarrow import parquet, table

        parquet.write_table(table({"id": range(400), "body": documents}), tmp_path / "a.parquet")
        words, names = [*words, "parquet=a.parquet"], [*names, "parquet"]

    def load_dataset(path, config, split, streaming):  # a stand-in for the one function of `datasets` that is used
        assert (path, config, split, streaming) == ("some/set", "part", "train", True)
        return map(json.loads, rows.splitlines())

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    installed = lambda name: name == "datasets" or importlib.util.find_spec(name)
    result = run_prepare(*words, "hub=hf:some/set:part", "--field=body", "--val=0.1", cwd=tmp_path, find_spec=installed)
    assert result.returncode == 0, result.stderr
    assert all(shards(tmp_path / "data" / name) == shards(tmp_path / "data/plain") != {} for name in names)
    assert sorted(read_back(tmp_path / "data/plain")) == sorted(documents)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["text=nowhere/"], "nowhere"),
        (["a.txt"], "text=a.txt"),
        (["text=a.txt", "--val=1.5"], "--val"),
        (["text=a.txt", "--shard=4/4"], "--shard"),
        (["text=a.txt", "--tokenizer=gtp2"], "gtp2"),
        (["text=a.txt", "--vocab_size=100"], "320"),
        (["text=a.txt", "--wrokers=4"], "--wrokers"),
        (["text=a.jsonl", "--field=body"], "'body'"),
        (["text=hf:some/set"], "pip install datasets"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2_and_leaves_no_trace(tmp_path, words, said):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n')
    result = run_prepare(*words, cwd=tmp_path, find_spec=lambda name: None)
    assert result.returncode == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.txt"]


def test_prepared_data_is_replaced_only_with_fresh(tmp_path):
    (tmp_path / "a.txt").write_text("the first text " * 50)
    assert run_prepare("s=a.txt", "--val=0", cwd=tmp_path).returncode == 0
    (tmp_path / "a.txt").write_text("another text " * 50)
    refused = run_prepare("s=a.txt", "--val=0", cwd=tmp_path)
    assert refused.returncode == 2 and "--fresh" in refused.stderr
    assert read_back(tmp_path / "data/s") == ["the first text " * 50]
    assert run_prepare("s=a.txt", "--val=0", "--fresh", cwd=tmp_path).returncode == 0
    assert read_back(tmp_path / "data/s") == ["another text " * 50]
    [shard] = [path for path in tmp_path.glob("data/s/train-*") if path.stat().st_size]
    right = shard.read_bytes()
    shard.write_bytes(right[::-1])  # of the same size: nobody reads them all again to see it
    assert "nothing to do" in run_prepare("s=a.txt", "--val=0", cwd=tmp_path).stdout
    assert run_prepare("s=a.txt", "--val=0", "--fresh", cwd=tmp_path).returncode == 0 and shard.read_bytes() == right
    shard.write_bytes(right[:-2])
    assert run_prepare("s=a.txt", "--val=0", cwd=tmp_path).returncode == 0 and shard.read_bytes() == right


# prepare.py and readers.py: what people have


def rows_of(texts, field="text"):
    return "".join(json.dumps({field: text}) + "\n" for text in texts).encode()


def stories(n, first=0):
    return [f"story {i} of a river, a stone and {'a lamp ' * (i % 7)}" for i in range(first, first + n)]


def put(path, content=b"some text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def everything_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(result, *words):
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, (result.returncode, result.stderr)
    for word in words:
        assert word in result.stderr, result.stderr


OF_OTHERS = {  # files that lie there, and a command that would write among them
    "the input": (["data/s/1.txt"], ["s=data/s"]),
    "the input, by a glob": (["data/s/1.txt"], ["s=data/s/*.txt"]),
    "the input is below": (["data/s/raw/1.txt"], ["s=data/s/raw"]),
    "the input is above": (["data/1.txt"], ["s=."]),
    "another source's input": (["in/t/1.txt", "a.txt"], ["s=in", "t=a.txt", "--out=in"]),
    "through a link": (["in/1.txt", "data/s -> ../in"], ["s=in"]),
    "notes": (["a.txt", "data/s/notes.md"], ["s=a.txt"]),
    "nanoGPT's data": (["a.txt", "data/s/train.bin"], ["s=a.txt"]),
    "shards of which nothing is known": (["a.txt", "data/s/train-00000.bin"], ["s=a.txt"]),
    "another meta.json": (["a.txt", "data/s/meta.json"], ["s=a.txt"]),
    "a folder called as ours": (["a.txt", "data/s/runs-0123456789ab/1.txt"], ["s=a.txt"]),
    "another folder called almost as ours": (["a.txt", "data/s/runs-mine/000000-000000.ids"], ["s=a.txt"]),
    "a file": (["a.txt", "data/s"], ["s=a.txt"]),
    "by the default corpus": (["data/raw/a.txt"], []),
    "by the default corpus, into a source": (["data/text/a.txt"], []),
    "by the default corpus, into corpus": (["data/corpus/a.txt"], []),
    "by synthetic": (["data/corpus/a.txt"], ["synthetic", "--problems=3"]),
}


@pytest.mark.parametrize("name", OF_OTHERS)
def test_files_that_prepare_did_not_write_are_neither_replaced_nor_joined(tmp_path, name):
    lying, words = OF_OTHERS[name]
    for file, link, target in (entry.partition(" -> ") for entry in lying):
        put(tmp_path / file) if not link else (tmp_path / file).parent.mkdir()
        if link:
            (tmp_path / file).symlink_to(target)
    before = everything_in(tmp_path)
    for fresh in ([], ["--fresh"]):
        one_line(run_prepare(*words, *fresh, cwd=tmp_path))
        assert everything_in(tmp_path) == before


@pytest.mark.parametrize("words", [["s=bad.jsonl"], ["s=nowhere"], ["s=b.txt", "t=nowhere"], ["s=b.txt", "t=data"]])
def test_a_mistake_costs_nothing_of_what_was_prepared(tmp_path, words):
    put(tmp_path / "a.txt", "what was prepared")
    put(tmp_path / "b.txt", "what comes")
    put(tmp_path / "bad.jsonl", '{"body": 1}\n')
    assert run_prepare("s=a.txt", "--val=0", cwd=tmp_path).returncode == 0
    before = everything_in(tmp_path)
    one_line(run_prepare(*words, "--fresh", cwd=tmp_path))
    assert everything_in(tmp_path) == before and set(tmp_path.glob("data/*/*")) <= set(before)


def dying(function, steps):
    """The function, until nothing is left of an iterator: then the process is interrupted."""

    def step(*args, **kwargs):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return step


def test_a_death_at_any_moment_leaves_the_old_or_nothing_and_the_new_at_last(tmp_path, documents):
    write_jsonl(tmp_path / "a.jsonl", documents[:40])
    write_jsonl(tmp_path / "b.jsonl", documents[:20])
    small = {"cwd": tmp_path, "PIECE": 30_000, "SHARD": 20_000}
    assert run_prepare("s=a.jsonl", "--vocab_size=400", "--out=old", **small).returncode == 0
    assert run_prepare("s=b.jsonl", "--vocab_size=400", "--out=new", **small).returncode == 0
    old, new = shards(tmp_path / "old/s"), shards(tmp_path / "new/s")
    assert len(old) > len(new) > 1
    deaths, left = 0, None
    while left != new:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        shutil.copytree(tmp_path / "old", tmp_path / "data")
        with pytest.MonkeyPatch.context() as patch:
            steps = iter(range(deaths))
            for owner, name in ((Path, "replace"), (Path, "unlink"), (Path, "rename"), (shutil, "rmtree")):
                patch.setattr(owner, name, dying(getattr(owner, name), steps))
            died = run_prepare("s=b.jsonl", "--vocab_size=400", "--fresh", **small).returncode == 130
        left = shards(tmp_path / "data/s") if not died else None
        if (tmp_path / "data/s/meta.json").exists():
            meta = json.loads((tmp_path / "data/s/meta.json").read_text())
            known = {shard["file"]: shard["sha256"] for part in ("train", "val") for shard in meta[part]["shards"]}
            there = {name: hashlib.sha256(data).hexdigest() for name, data in shards(tmp_path / "data/s").items()}
            assert there == known
        again = run_prepare("s=b.jsonl", "--vocab_size=400", *["--fresh"] * died, **small)
        assert again.returncode == 0, again.stderr
        assert shards(tmp_path / "data/s") == new and not list((tmp_path / "data/s").glob("runs-*"))
        deaths += 1
    assert deaths > 15


def test_runs_that_a_death_left_beside_finished_shards_are_removed_and_others_are_not(tmp_path):
    put(tmp_path / "a.txt")
    assert run_prepare("s=a.txt", cwd=tmp_path).returncode == 0
    print_of = json.loads((tmp_path / "data/s/meta.json").read_text())["fingerprint"]
    for name in (f"runs-{print_of[:12]}", "runs-0123456789ab", "runs-mine"):
        put(tmp_path / "data/s" / name / "000000-000000.ids")
    assert "nothing to do" in run_prepare("s=a.txt", cwd=tmp_path).stdout
    assert {path.name for path in tmp_path.glob("data/s/runs-*")} == {"runs-0123456789ab", "runs-mine"}


@pytest.mark.parametrize("words", [["s=b.txt"], ["s=b.txt", "--fresh"], ["s=a.txt", "--val=0.3"]])
def test_two_at_once_in_one_folder_with_other_settings_is_a_mistake(tmp_path, words):
    put(tmp_path / "a.txt")
    put(tmp_path / "b.txt", "another text")
    encode, results = prepare.encode, []

    def meanwhile(*args):
        if not results:
            results.append(None)
            results.append(run_prepare(*words, cwd=tmp_path))
        return encode(*args)

    assert run_prepare("s=a.txt", "--val=0", cwd=tmp_path, encode=meanwhile).returncode == 0
    one_line(results[1], "another prepare.py is at work")
    assert read_back(tmp_path / "data/s") == ["some text"] and not list(tmp_path.glob("data/s/runs-*"))


def test_the_same_command_twice_at_once_is_done_once(tmp_path):
    put(tmp_path / "a.txt")
    encode, others = prepare.encode, []
    line = command("s=a.txt", "--val=0", before="prepare.encode = None")  # it has nothing to encode

    def meanwhile(*args):
        if not others:
            others.append(subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE))
            assert b"waiting" in others[0].stdout.readline()
        return encode(*args)

    assert run_prepare("s=a.txt", "--val=0", cwd=tmp_path, encode=meanwhile).returncode == 0
    assert others[0].wait(timeout=20) == 0 and b"train" in others[0].stdout.read()
    assert read_back(tmp_path / "data/s") == ["some text"] and not list(tmp_path.glob("data/s/runs-*"))


SETTINGS = ["--val=0.2", "--seed=1", "--field=body", "--vocab_size=400", "another input"]


@pytest.mark.parametrize("other", SETTINGS)
def test_whatever_decides_the_shards_decides_whether_they_are_prepared(tmp_path, other):
    put(tmp_path / "a.txt")
    put(tmp_path / "b.txt", "more of it")
    assert run_prepare("s=a.txt", "--val=0.1", cwd=tmp_path).returncode == 0
    words = ["s=a.txt", "--val=0.1", other] if other.startswith("--") else ["s=a.txt", "b.txt", "--val=0.1"]
    one_line(run_prepare(*words, cwd=tmp_path), "--fresh")


def compressors():
    ways = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    if readers.find_spec("zstandard"):
        import zstandard

        ways["zst"] = zstandard.compress
    return ways


def damaged(how, compress, data):
    whole = compress(data)
    return {
        "cut": whole[: len(whole) // 2],
        "one byte short": whole[:-1],
        "empty": b"",
        "another format": data,
        "garbage behind it": whole + b"garbage",
        "a second part that is cut": whole + compress(data)[:-9],
    }[how]


@pytest.mark.parametrize(
    "how", ["cut", "one byte short", "empty", "another format", "garbage behind it", "a second part that is cut"]
)
def test_damaged_files_are_named_and_the_others_prepared(tmp_path, how):
    draw = random.Random(1)
    data = rows_of([draw.randbytes(30).hex() for _ in range(3000)])
    ways = compressors()
    for ending, compress in ways.items():
        put(tmp_path / f"in/bad.jsonl.{ending}", damaged(how, compress, data))
        put(tmp_path / f"in/good.jsonl.{ending}", compress(rows_of([f"good {ending}"])) * 2)
    result = run_prepare("s=in", "--val=0", "--vocab_size=320", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"{len(ways)} damaged" in result.stdout and all(f"bad.jsonl.{end}" in result.stdout for end in ways)
    found = read_back(tmp_path / "data/s", vocab_size=320)
    assert {f"good {ending}" for ending in ways} <= set(found)
    if how in ("one byte short", "garbage behind it", "a second part that is cut"):
        assert len(found) > 2000  # read up to there


@pytest.mark.parametrize("how", ["cut", "empty", "another format", "wrong inside", "without the column"])
def test_a_damaged_parquet_file_is_named_and_the_others_prepared(tmp_path, how):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet, table

    for n in range(3):
        parquet.write_table(table({"text": stories(50, 50 * n)}), tmp_path / f"part-{n}.parquet", row_group_size=10)
    whole = (tmp_path / "part-1.parquet").read_bytes()
    ways = {"cut": whole[:-60], "empty": b"", "another format": rows_of(stories(3))}
    ways["wrong inside"] = whole[: len(whole) // 2] + b"U" * 400 + whole[len(whole) // 2 + 400 :]
    put(tmp_path / "part-1.parquet", ways.get(how, whole))
    if how == "without the column":
        parquet.write_table(table({"body": ["a"]}), tmp_path / "part-1.parquet")
    result = run_prepare("s=part-*.parquet", "--val=0", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert ("1 without a column" if how == "without the column" else "1 damaged") in result.stdout
    assert "part-1.parquet" in result.stdout
    assert {*stories(50), *stories(50, 100)} <= set(read_back(tmp_path / "data/s"))


def raw_frame(content, window_log, last=1):
    """A zstd frame that wants a window of 2**window_log bytes, its content as it is."""
    header = (len(content) << 3 | last).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd\0" + bytes([window_log - 10 << 3]) + header + content


def test_zstd_as_dumps_have_it(tmp_path):
    pytest.importorskip("zstandard")
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
    lines = rows_of(stories(30))
    whole = skipped + raw_frame(lines[:500], 31) + raw_frame(b"", 10) + skipped + raw_frame(lines[500:], 28)
    for name, content, n in [("whole", whole, 30), ("open", raw_frame(rows_of(stories(9)), 20, last=0), 9)]:
        put(tmp_path / f"{name}.jsonl.zst", content)
        result = run_prepare(f"{name}={name}.jsonl.zst", "--val=0", cwd=tmp_path)
        assert result.returncode == 0 and sorted(read_back(tmp_path / f"data/{name}")) == sorted(stories(n))
        assert ("1 damaged" in result.stdout) == (name == "open")


@pytest.mark.parametrize("words", ["s=in", "s=in/**/*", "s=in/*"])
def test_what_lies_in_folders_beside_files_is_named_and_read_once_if_at_all(tmp_path, words):
    for name in ("in/a.txt", "far/b.txt", "far/sub/c.txt", "secret.txt"):
        put(tmp_path / name, name)
    links = {"gone.txt": "/nowhere", "self.txt": "self.txt", "zero.txt": "/dev/zero"}
    links |= {"far1": "../far", "far2": "../far", "loop": ".", "up": ".."}
    for name, target in links.items():
        (tmp_path / "in" / name).symlink_to(target)
    (tmp_path / "far/back").symlink_to("../in")
    os.mkfifo(tmp_path / "in/pipe.txt")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(os.path.relpath(tmp_path / "in/socket.txt"))
    result = run_prepare(words, "--val=0", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    expected = ["in/a.txt"] if words == "s=in/*" else ["far/b.txt", "far/sub/c.txt", "in/a.txt"]
    assert sorted(read_back(tmp_path / "data/s")) == expected and "0 duplicates" not in result.stdout
    assert json.loads((tmp_path / "data/s/meta.json").read_text())["duplicates"] == 0
    folders = "4 folders among the matches" if words == "s=in/*" else "2 links to folders above them"
    assert folders in result.stdout and "in/loop" in result.stdout and "in/up" in result.stdout
    for name in ("gone.txt (a link", "self.txt", "zero.txt (a device", "pipe.txt (a pipe", "socket.txt (a socket"):
        assert name in result.stdout, name
    for name in ("gone", "self", "zero", "pipe", "socket"):
        one_line(run_prepare(f"t=in/{name}.txt", cwd=tmp_path), f"{name}.txt")


@pytest.mark.parametrize("words", [["s=in"], ["s=in/caf\udce9.txt"], ["in/caf\udce9.txt"], ["\udce9=in"]])
def test_names_that_are_no_utf8_are_shown_in_some_way(tmp_path, words):
    latin = {b"caf\xe9.txt": b"caf\xe9", b"fine\xe9.txt": b"fine", b"x\xe9.jsonl.gz": b"no", b"two\nlines\xe9.txt": b""}
    for name, content in latin.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        with open(os.fsencode(tmp_path / "in") + b"/" + name, "wb") as file:
            file.write(content)
    env = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    line = [sys.executable, ROOT / "prepare.py", *words, "--val=0", "--workers=1"]
    if words == ["s=in"]:
        result = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        assert "1 not UTF-8 text: in/caf" in result.stdout and "1 damaged" in result.stdout
        assert "1 empty: in/two\\nlines" in result.stdout
        assert read_back(tmp_path / "data/s") == ["fine"]
        str(json.loads((tmp_path / "data/s/meta.json").read_text())).encode()
    else:
        one_line(run_prepare(*words, cwd=tmp_path), "\\udce9" if "s=" in words[0] else "")


TEXTS = stories(12)
LINES, ARRAY = rows_of(TEXTS), json.dumps([{"text": text} for text in TEXTS]).encode()
PRETTY = json.dumps([{"text": text} for text in TEXTS], indent=2).encode()
FILES = {
    "A.JSONL": LINES, "A.Jsonl.Gz": gzip.compress(LINES), "c4.json.gz": gzip.compress(LINES), "a.ndjson": LINES,
    "a.jsonl.bz2": bz2.compress(LINES), "array.json.xz": lzma.compress(ARRAY), "pretty.json.gz": gzip.compress(PRETTY),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES, "windows.jsonl": LINES.replace(b"\n", b"\r\n\r\n"),
}  # fmt: skip
NAMED = {
    "a.json": LINES, "array.json": ARRAY, "pretty.JSON": PRETTY, "part-00000": LINES, "dump.gz": gzip.compress(LINES),
    "bom.json": b"\xef\xbb\xbf" + ARRAY, "utf16.json": ARRAY.decode().encode("utf-16"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*FILES, *NAMED])
def test_rows_are_read_under_whatever_ending(tmp_path, name):
    put(tmp_path / "in" / name, (FILES | NAMED)[name])
    result = run_prepare("s=in" if name in FILES else f"s=in/{name}", "--val=0", cwd=tmp_path)
    assert result.returncode == 0 and sorted(read_back(tmp_path / "data/s")) == sorted(TEXTS), result.stderr


SAID = {  # what is not read, and what is said
    "utf16.jsonl": (LINES.decode().encode("utf-16"), "1 not UTF-8 text", "UTF-16"),
    "bare16.jsonl": (LINES.decode().encode("utf-16-le"), "1 not UTF-8 text", "UTF-16"),
    "utf16.jsonl.gz": (gzip.compress(LINES.decode().encode("utf-16")), "1 not UTF-8 text", "UTF-16"),
    "zipped.jsonl": (gzip.compress(LINES), "1 not UTF-8 text", "gzip"),
    "latin.jsonl": ('{"text": "café"}\n'.encode("latin-1"), "1 not UTF-8 text", "latin.jsonl"),
    "settings.json": (b'{\n "lr": 1\n}', "1 not a JSON object with 'text'", "settings.json"),
    "columns.json": (b'{"text": ["a", "b"]}', "1 no string in 'text'", "columns.json"),
    "torn.json": (b'[{"text": "a', "1 not a JSON object with 'text'", "torn.json"),
    "empty.json": (b"", "1 empty", "empty.json"),
    "blank.jsonl": (b"\n \n", "no documents in blank.jsonl"),
    "none.json": (b"[]", "no documents in none.json"),
    "all.tar.gz": (b"...", "1 archives", "unpack"),
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_not_read_is_said_in_one_line(tmp_path, name):
    content, *said = SAID[name]
    put(tmp_path / name, content)
    one_line(run_prepare(f"s={name}", cwd=tmp_path), *said)


@pytest.mark.parametrize("content", [LINES, ARRAY, PRETTY])
def test_json_is_never_plain_text_without_a_word(tmp_path, content):
    put(tmp_path / "in/a.txt", content)
    put(tmp_path / "in/b.txt", "[1] is a note, {x} a set")
    assert "1 JSON, read as plain text" in run_prepare("s=in", cwd=tmp_path).stdout
    (tmp_path / "in/a.txt").rename(tmp_path / "in/a.json")  # as is said there
    assert run_prepare("t=in/a.json", "--val=0", cwd=tmp_path).returncode == 0
    assert sorted(read_back(tmp_path / "data/t")) == sorted(TEXTS)


def test_a_field_that_holds_no_string_is_called_that(tmp_path):
    odd = [["two", "parts"], {"a": "b"}, 3, True, None, 0, False, [], {}, 1.5]
    put(tmp_path / "a.jsonl", rows_of([*odd, "", "fine"]) + b'[1]\nnull\n"text"\n')
    out = run_prepare("s=a.jsonl", "--val=0", cwd=tmp_path).stdout
    assert "10 no string in 'text': " in out and "1 empty: " in out and "3 not a JSON object" in out
    assert "UTF" not in out


def test_what_a_folder_holds_and_is_not_read_is_counted(tmp_path):
    for name in ("a.txt", "README", "b.XML", "sub/c.xml", "t.csv", "x.json", "d.tar.gz", ".hidden", ".git/config.xml"):
        put(tmp_path / "in" / name, name)
    expected = "6 left out by their names: 2 .xml, 1 without ending, 1 .csv, 1 .json, 1 .tar.gz"
    assert expected in run_prepare("s=in", "--val=0", cwd=tmp_path).stdout
    (tmp_path / "in/a.txt").unlink()
    one_line(run_prepare("t=in", cwd=tmp_path), expected)


def no_train(*_, **__):
    raise ValueError("Bad split: train.\nAvailable splits: ['test']")


def no_config(*_, **__):
    raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['first', 'second']")


def no_network(*_, **__):
    raise ConnectionError("Couldn't reach the Hub")


def logged(*_, **__):
    if logging.getLogger("datasets").isEnabledFor(logging.ERROR):
        print("Failed to read file", file=sys.stderr)
    raise ValueError("train.parquet has\nno footer")


def broken(*_, **__):
    yield {"text": "fine"}
    raise RuntimeError("row 1 is\nbroken")


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (no_train, ["'test'"]),
        (no_config, ["'first'", "'second'"]),
        (no_network, ["reach"]),
        (logged, ["train.parquet has no footer"]),
        (broken, ["broken"]),
        (lambda *_, **__: iter([{"body": "b", "id": 1}]), ["body, id"]),
    ],
)
def test_whatever_datasets_raises_is_one_line_with_what_there_is(tmp_path, monkeypatch, load, words):
    put(tmp_path / "a.txt")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    result = run_prepare("s=a.txt", "t=hf:some/set", cwd=tmp_path, find_spec=lambda name: True)
    one_line(result, "hf:some/set", *words)
    early = load in (no_train, no_config, no_network, logged)  # then nothing was prepared
    assert (tmp_path / "data/s").exists() != early and not (tmp_path / "data/t").exists()


@pytest.mark.parametrize("name", ["..", ".", "a b", "a/b", "", "../x", "a\nb", "long" * 80])
def test_a_source_is_one_folder_right_below_out(tmp_path, name):
    put(tmp_path / "w/a.txt")
    one_line(run_prepare(f"{name}=a.txt", cwd=tmp_path / "w"), repr(name))
    assert [path.name for path in tmp_path.rglob("*")] == ["w", "a.txt"]


@pytest.mark.parametrize("word", ["a,b", "data[1].txt", "data[1]", "data[1]/*.txt", "data[1]/**", "lang=en", "x.txt,"])
def test_names_that_look_like_something_else_are_names(tmp_path, word):
    for name in ("a,b/x.txt", "data[1].txt", "data[1]/x.txt", "lang=en/x.txt", "x.txt"):
        put(tmp_path / "in" / name)
    put(tmp_path / "in/other.txt", "another")
    result = run_prepare("s=other.txt", word, "--out=../data", "--val=0", cwd=tmp_path / "in")
    assert result.returncode == 0 and sorted(read_back(tmp_path / "data/s")) == ["another", "some text"], result.stderr


@pytest.mark.parametrize("word", ["--workers=0", "--val=nan", "--vocab_size=abc", "--seed=" + "9" * 80, "s=", "s=,"])
def test_a_number_that_is_none_is_one_line(tmp_path, word):
    put(tmp_path / "a.txt")
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as err:
        patch.chdir(tmp_path)
        assert prepare.main(["s=a.txt", word]) == 2
    assert word.strip("-").split("=")[0] in err.getvalue() and len(err.getvalue().splitlines()) == 1


def test_the_home_folder_is_meant_by_a_tilde_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    put(tmp_path / "home/a.txt")
    assert run_prepare("s=~/a.txt", "--out=~/data", "--val=0", cwd=tmp_path).returncode == 0
    assert read_back(tmp_path / "home/data/s") == ["some text"] and not (tmp_path / "~").exists()
    one_line(run_prepare("s=~/a.txt", "--tokenizer=~/none.json", cwd=tmp_path), str(tmp_path / "home/none.json"))
    one_line(run_prepare("s=~nobody-here/a.txt", cwd=tmp_path), "~nobody-here")


def test_a_tokenizer_of_ones_own_is_kept_beside_the_shards(tmp_path):
    hf = pytest.importorskip("tokenizers")
    letters = {character: i for i, character in enumerate(tokenizer.byte_characters())}
    own = hf.Tokenizer(hf.models.BPE(letters, []))
    own.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = hf.decoders.ByteLevel()
    own.add_special_tokens(["<|endoftext|>"])
    own.save(str(tmp_path / "mine.json"))
    put(tmp_path / "a.txt")
    put(tmp_path / "b.txt", "another")
    assert run_prepare("s=a.txt", "--tokenizer=mine.json", cwd=tmp_path).returncode == 0
    assert (tmp_path / "data/s/tokenizer.json").read_text() == (tmp_path / "mine.json").read_text()
    assert run_prepare("s=b.txt", "--tokenizer=mine.json", "--fresh", cwd=tmp_path).returncode == 0
    assert run_prepare("s=b.txt", "--fresh", cwd=tmp_path).returncode == 0
    assert not (tmp_path / "data/s/tokenizer.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="programs are confined by Linux")
@pytest.mark.parametrize("problems", [1, 19, 45])
def test_as_many_problems_are_made_as_were_asked_for(tmp_path, monkeypatch, capsys, problems):
    monkeypatch.setattr(synthetic, "CHUNK", 20)
    monkeypatch.setattr(synthetic.sandbox, "run", lambda programs: ["passed"] * len(programs))
    for n in (problems, problems + 20, problems):
        prepare.collect_synthetic(tmp_path, 0, n)
        assert f"of {n} problems kept" in capsys.readouterr().out


# corpus.py


@pytest.mark.parametrize("there", [[], ["text"], ["code"], ["text", "code"]])
def test_what_was_collected_is_not_written_again(tmp_path, monkeypatch, there):
    monkeypatch.setattr(corpus, "collect", lambda pool: {"text": ["prose"], "code": ["x = 1"]})
    for name in there:
        put(tmp_path / f"{name}.jsonl", rows_of(["somebody's"]))
    assert {*prepare.collect_default(tmp_path, None)} == {"text", "code"}
    for name, document in ("text", "prose"), ("code", "x = 1"):
        expected = "somebody's" if name in there else document
        assert json.loads((tmp_path / f"{name}.jsonl").read_text()) == {"text": expected}


def test_docstrings_become_prose_and_leave_the_source():
    source = (
        '"""Module docstring of more than six words."""\nfrom __future__ import annotations\n\n\nclass A:\n'
        '    """The docstring of the class A, too.\n\n    Indented text of it.\n    """\n\n    def only(self):\n'
        '        """Nothing but a docstring is in here."""\n\n'
        '    def f(self): "one line holds all of this function"; return 1\n'
        '\n    def short(self):\n        """Too short."""\n        return "é"\n'
    )
    text, code = corpus.split_module(source.encode(), "pkg.mod")
    tree = ast.parse(code)
    compile(code, "code", "exec")
    assert text.startswith("# pkg.mod\n\n") and "one line holds all" in text and "Too short" not in text
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    assert [doc for doc in docs if doc] == ["Too short."]
    assert "return 1" in code and "        ...\n" in code and "class A:" in code


def test_the_default_corpus_has_no_passage_in_both_sources():
    with ThreadPoolExecutor(1) as pool:
        kept = corpus.collect(pool, 400_000, 600_000)
        again = corpus.collect(pool, 400_000, 600_000)
    assert kept == again
    sizes = {side: sum(map(len, documents)) for side, documents in kept.items()}
    assert sizes["text"] >= 400_000 and 600_000 <= sizes["code"] <= 900_000
    for code in kept["code"]:
        ast.parse(code)
    lines = {line.strip() for code in kept["code"] for line in code.splitlines() if len(line.strip()) > 60}
    prose = {line.strip() for text in kept["text"] for line in text.splitlines() if len(line.strip()) > 60}
    assert len(prose) > 1000 and len(lines & prose) <= len(prose) / 1000


# synthetic.py


def test_both_forms_of_every_step_agree():
    dice = random.Random(4)

    def outcome(step, form, given):
        names = {}
        exec(synthetic.function("f", "v", [step], ["3"], [form]), names)
        try:
            return names["f"](given)
        except (ValueError, IndexError):
            return None

    for step in synthetic.STEPS:
        for _ in range(100):
            given = {"b": 2, "a": 1} if step[0] == "counts" else synthetic.an_input(step[0], dice)
            if given:  # of nothing, one form may raise where the other has an answer: such problems are rejected
                assert outcome(step, True, given) == outcome(step, False, given), step
    kinds = {step[0] for step in synthetic.STEPS}
    assert set(synthetic.TAKES) <= kinds and len({step[3] for step in synthetic.STEPS}) == len(synthetic.STEPS)
    assert not any(hasattr(builtins, step[3]) for step in synthetic.STEPS)  # def sum(x): return sum(x) never ends


@pytest.mark.skipif(sys.platform != "linux", reason="programs are confined by Linux")
def test_programs_that_fail_their_asserts_are_left_out_and_counted(monkeypatch):
    monkeypatch.setattr(synthetic, "CHUNK", 60)
    kept, fates = synthetic.programs(seed=5, chunk=2)
    assert kept == synthetic.programs(seed=5, chunk=2)[0] and fates["kept"] == len(kept) > 50
    assert sum(fates.values()) == 60 and not {*kept} & {*synthetic.programs(seed=5, chunk=3)[0]}
    for program in kept:
        exec(compile(program, "<kept>", "exec"), {})
        assert ast.get_docstring(ast.parse(program)) or program.startswith("# ")
    steps = [(*step[:5], "y = 0" if step[3] == "length" else step[5]) for step in synthetic.STEPS]  # wrong, not broken
    monkeypatch.setattr(synthetic, "STEPS", steps)
    fewer, fates = synthetic.programs(seed=5, chunk=2)
    assert fates["failed"] and {*fewer} < {*kept}


@pytest.mark.skipif(sys.platform != "linux", reason="programs are confined by Linux")
def test_synthetic_is_a_source_like_others_and_made_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(synthetic, "CHUNK", 20)
    first = prepare.collect_synthetic(tmp_path, seed=0, problems=40)
    said = capsys.readouterr().out
    assert "of 40 problems kept" in said and len(first) == 2
    monkeypatch.setattr(synthetic, "programs", None)  # nothing is made again
    assert prepare.collect_synthetic(tmp_path, seed=0, problems=40) == first and capsys.readouterr().out == said
    monkeypatch.undo()
    for n in (0, 1):  # as if 2,000 problems had been tried
        for suffix in (".jsonl", ".json"):
            name = f"synthetic-0-{n:05}{suffix}"
            (tmp_path / "data/corpus").mkdir(parents=True, exist_ok=True)
            (tmp_path / "data/corpus" / name).write_bytes((tmp_path / name).read_bytes())
    done = run_prepare("synthetic", "--problems=2000", "--val=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    documents = [json.loads(line)["text"] for path in first for line in path.read_text().splitlines()]
    assert sorted(read_back(tmp_path / "data/synthetic")) == sorted(documents)
    for wrong in ("many", "0"):
        refused = run_prepare("synthetic", f"--problems={wrong}", cwd=tmp_path)
        assert refused.returncode == 2 and "--problems" in refused.stderr
