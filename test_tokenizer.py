"""What tokenizer/ promises of a tokenizer.json that somebody else made."""

import json
import lzma
import pickle
import random

import pytest

import prepare
import tokenizer
import tokenizer.train as training
from tokenizer import TokenizerError

library = pytest.importorskip("tokenizers")
normalizers, pre_tokenizers, models = library.normalizers, library.pre_tokenizers, library.models
TEXT = "def area(width):\n    return width * 2  # naïve\n\n\tthe river, the stone\n" * 3
CHARACTERS = [chr(c) for c in (*range(0x500), *range(0x3000, 0x3100), 0x1F600, 0x10FFFF)]
SAMPLES = [
    TEXT, "  x", "x  ", "\r\n", " ", "\0", "e\u0301 is not é", "</s> and <|endoftext|>", "日本 👩\u200d🔬", "x" * 300,
    "".join(random.Random(1).choices(CHARACTERS, k=500)),
]  # fmt: skip


def byte_level(pre_tokenizer=None, alphabet=True):
    made = library.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
    )  # fmt: skip
    made.train_from_iterator([TEXT], trainer)
    return json.loads(made.to_str())


def sentencepiece(normalizer, pre_tokenizer=None):
    """As Llama's: bytes for rare characters, which are no special tokens."""
    made = library.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer:
        made.normalizer = normalizer
    if pre_tokenizer:
        made.pre_tokenizer = pre_tokenizer
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(
        [TEXT], library.trainers.BpeTrainer(vocab_size=320, special_tokens=specials, show_progress=False)
    )
    whole = json.loads(made.to_str())
    whole["added_tokens"] = whole["added_tokens"][:3]
    return whole


def of_words(model):
    """A WordLevel, WordPiece or Unigram that knows the words of a text and nothing else."""
    made = library.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["</s>", "[UNK]"])
    return json.loads(made.to_str())


def added(**how):
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    whole = byte_level()
    token = {"id": len(whole["model"]["vocab"]), "content": "<think>", **plain, **how}
    return whole | {"added_tokens": [*whole["added_tokens"], token]}


def with_holes(renumber=lambda i: i if i < 300 else i + 500):
    whole = byte_level()
    whole["model"]["vocab"] = {token: renumber(i) for token, i in whole["model"]["vocab"].items()}
    return whole


def written(path, whole):
    path.write_text(whole if isinstance(whole, str) else json.dumps(whole), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "setting",
    [
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
        {"padding": {"strategy": {"Fixed": 400}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                     "pad_type_id": 0, "pad_token": "<|endoftext|>"}},
        {"model": {"dropout": 0.9}},
        {"normalizer": {"type": "NFC"}},
    ],
    ids=["truncation", "padding", "dropout", "NFC"],
)  # fmt: skip
def test_what_would_change_documents_is_switched_off(setting, tmp_path):
    plain = byte_level()
    model = plain["model"] | setting.get("model", {})
    encoding = tokenizer.load(written(tmp_path / "t.json", plain | setting | {"model": model}))
    expected = tokenizer.load(written(tmp_path / "plain.json", plain))
    for text in SAMPLES:
        assert encoding.encode_ordinary(text) == expected.encode_ordinary(text)
        assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert tokenizer.start(encoding) == tokenizer.eot(encoding) == 0


PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
KEEP = {
    "digits apart": lambda: byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ),
    "ids with holes": with_holes,
    "a token of one's own": added,
    "Llama's": lambda: sentencepiece(PREPEND),
    "Gemma's": lambda: sentencepiece(normalizers.Replace(" ", "▁")),
    "Mistral's": lambda: sentencepiece(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
}


@pytest.mark.parametrize("name", KEEP)
def test_a_tokenizer_that_keeps_text_gives_it_back(name, tmp_path, monkeypatch):
    encoding = tokenizer.load(written(tmp_path / "t.json", KEEP[name]()))
    for text in SAMPLES:
        assert encoding.decode(encoding.encode_ordinary(text)) in (text, " " + text)
    other = pickle.loads(pickle.dumps(encoding))  # as workers get it
    assert other.encode_ordinary("</s><|endoftext|>") == encoding.encode_ordinary("</s><|endoftext|>")
    monkeypatch.setattr(prepare, "STRETCH", 40)
    monkeypatch.setattr(prepare, "ENCODING", encoding, raising=False)
    monkeypatch.setattr(prepare, "EOT", tokenizer.eot(encoding), raising=False)
    ids = prepare.encode(TEXT).tolist()  # in several parts
    assert encoding.decode(ids[:-1]) == encoding.decode(encoding.encode_ordinary(TEXT)) and len(TEXT) > 160


def normalized(*steps):
    return lambda: byte_level() | {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


LOSE = {
    "lower case": (normalized({"type": "Lowercase"}), "'Hello, World' it makes 'hello, world'"),
    "compatibility": (normalized({"type": "NFKC"}), "'...'"),
    "ends": (normalized({"type": "Strip", "strip_left": True, "strip_right": True}), "of '\\n\\n\\n\\n' it makes ''"),
    "accents": (normalized({"type": "NFD"}, {"type": "StripAccents"}), "does not give every text back"),
    "tabs": (normalized({"type": "Replace", "pattern": {"String": "\t"}, "content": "    "}), "it makes '    return"),
    "a word": (normalized({"type": "Replace", "pattern": {"String": "fo\"o"}, "content": "bar"}), "'bar'"),
    "a space before": (normalized({"type": "Prepend", "prepend": " "}), "it makes ' Hello"),
    "another": (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "it makes ' Hello"),
    "spaces": (
        lambda: byte_level(
            pre_tokenizers.Sequence(
                [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        ),
        "' World",
    ),
    "rare bytes": (lambda: byte_level(alphabet=False), "'Hello, World'"),
    "around a token": (lambda: added(lstrip=True), "' <think>"),
    "unknown words": (lambda: of_words(models.WordLevel({"[UNK]": 0, "</s>": 1, "x": 2}, "[UNK]")), "'Hello, World'"),
    "no word for the unknown": (
        lambda: of_words(models.WordLevel({"</s>": 0, "x": 1}, "[PAD]")), "cannot encode 'Hello, World'"
    ),
    "word pieces": (lambda: of_words(models.WordPiece({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]")), "'Hello, World'"),
    "unigrams": (lambda: of_words(models.Unigram([("[UNK]", 0.0), ("</s>", 0.0), ("H", -1.0)], 0)), "'ello, World!'"),
    "two of one id": (lambda: with_holes(lambda i: i % 270), "two tokens of one id"),
    "no end of text": (lambda: byte_level() | {"added_tokens": []}, "no end of text"),
    "no JSON": (lambda: "{", "is no tokenizer.json"),
    "no tokenizer": (lambda: {"model": []}, "is no tokenizer.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSE)
def test_a_tokenizer_that_loses_text_is_refused_with_what_it_loses(name, tmp_path):
    make, words = LOSE[name]
    with pytest.raises(TokenizerError) as refused:
        tokenizer.load(written(tmp_path / "t.json", make()))
    assert words in str(refused.value) and str(tmp_path / "t.json") in str(refused.value)


RARE = {  # what no sample shows, and texts that suffer from it
    "a word": ({"type": "Replace", "pattern": {"Regex": "riv(er)"}, "content": "stream"}, "down the river"),
    "long runs": ({"type": "Replace", "pattern": {"Regex": "\n{30,}"}, "content": "\n"}, "a" + "\n" * 40 + "b"),
    "the last line": ({"type": "Replace", "pattern": {"Regex": "end$"}, "content": ""}, "this is the end"),
}


@pytest.mark.parametrize("name", RARE)
def test_a_document_that_would_lose_something_is_named_and_left_out(name, tmp_path, capsys):
    step, text = RARE[name]
    written(tmp_path / "t.json", normalized(step)())
    rows = [json.dumps({"text": one}) + "\n" for one in ("another text", text, "and one more")]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    command = [f"s={tmp_path / 'a.jsonl'}", f"--out={tmp_path}", f"--tokenizer={tmp_path / 't.json'}", "--workers=1"]
    assert prepare.main([*command, "--val=0"]) == 0
    out = capsys.readouterr().out
    assert "1 that the tokenizer does not give back, left out: " in out and "a.jsonl" in out
    assert json.loads((tmp_path / "s/meta.json").read_text())["train"]["documents"] == 2


def test_what_was_trained_with_a_tokenizer_that_loses_text_can_still_be_used(tmp_path):
    path = written(tmp_path / "tokenizer.json", LOSE["lower case"][0]())
    encoding = tokenizer.FileEncoding(path, check=False)
    about = {"name": "mine.json", "vocab_size": encoding.n_vocab, "sha256": tokenizer.digest(encoding)}
    assert tokenizer.find(about, tmp_path).decode(encoding.encode_ordinary("Hello")) == "hello"


def test_a_tokenizer_is_found_by_its_digest_or_missed_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("run", "source", "empty"):
        (tmp_path / folder).mkdir()
    encoding = tokenizer.load(written(tmp_path / "my own.json", byte_level()))
    about = {"name": "my own.json", "vocab_size": encoding.n_vocab, "sha256": tokenizer.digest(encoding), "eot": 0}
    tokenizer.keep(encoding, tmp_path / "run")

    def found(*folders, about=about):
        return tokenizer.digest(tokenizer.find(about, *folders)) == tokenizer.digest(encoding)

    assert found("run") and found("empty") and found()
    written(tmp_path / "source/tokenizer.json", added())
    assert found("source") and found("source", "run")  # others of that name are passed over
    (tmp_path / "my own.json").rename(tmp_path / "renamed.json")
    assert found("empty", "run")
    with pytest.raises(TokenizerError, match=r"another my own.json than the one here \(source/tokenizer.json\)"):
        found("source")
    with pytest.raises(TokenizerError, match=r"there is no my own.json.*copy it to empty/tokenizer.json"):
        found("empty")
    assert tokenizer.find(None) is None
    for wrong in ({}, [], {**about, "name": 3}, {**about, "vocab_size": "320"}, {**about, "sha256": None}):
        with pytest.raises(TokenizerError, match="tokenizer"):
            tokenizer.find(wrong, "run")
    with pytest.raises(TokenizerError, match="another nanocrystal"):
        tokenizer.find({**about, "name": "nanocrystal", "vocab_size": 512})


def test_training_one_reads_and_writes_where_it_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    with lzma.open(tmp_path / "t.jsonl.xz", "wt") as file:
        file.writelines(json.dumps({"text": TEXT + str(i)}) + "\n" for i in range(9))
    words = ["--bytes=1K", "--ranks=270", "--out=~/own.tiktoken"]
    assert training.main(["text=~/t.jsonl.xz", "code=~/t.jsonl.xz", *words]) == 0
    assert len((tmp_path / "own.tiktoken").read_bytes().splitlines()) == 270
    capsys.readouterr()
    for name, said in ("gone", "No such file"), ("t", "t.jsonl.xz holds too little text"):
        assert training.main([f"text=~/{name}.jsonl.xz", "--bytes=1M", "--out=~/none"]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1 and not (tmp_path / "none").exists()
