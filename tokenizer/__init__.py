"""
The tokenizer: 32,000 byte-level BPE ranks (nanocrystal.tiktoken, made by train.py), run by tiktoken.

    encoding = tokenizer.load()                       # all 32,064 ids
    encoding = tokenizer.load(vocab_size=8192)        # the first 8,128 ranks and the 64 special ids
    encoding = tokenizer.load("gpt2")                 # any tiktoken encoding whose ids fit uint16
    encoding = tokenizer.load("out/llama/tokenizer.json")  # a file of Hugging Face's `tokenizers`

- Ranks are in the order the merges were made, so a smaller vocabulary is a prefix of a larger one, and is the
  vocabulary that training to that size would have given.
- The 64 special ids follow the ranks, so they move with vocab_size. Encode documents with `encode_ordinary` or
  `encode_to_numpy(text, disallowed_special=())`: a document that spells a special token then stays plain bytes.
"""

import base64
import functools
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import tiktoken

import errors
import files
from errors import UserError

RANKS = 32_000
# cl100k's split (words with one leading character, numbers of at most three digits, punctuation, white space)
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Crystal's 22 in the order of their ids, spelt as in its release
CRYSTAL = """fim_prefix fim_middle fim_suffix fim_pad filename gh_stars issue_start issue_comment issue_closed
    jupyter_start jupyter_text jupyter_code jupyter_output empty_output commit_before commit_msg commit_after
    reponame im_start im_end sys_start sys_end""".split()  # noqa: SIM905
SPECIALS = [
    "<|endoftext|>",
    *(f"<|{name}|>" for name in CRYSTAL),
    "<sep>",  # CodeGen2's span corruption: <sep> before the answers, <eom> after each, one <mask_i> per span
    "<eom>",
    *(f"<mask_{i}>" for i in range(1, 40)),
]
VOCAB_SIZE = RANKS + len(SPECIALS)
COPY = "tokenizer.json"  # what a tokenizer.json is called in the folders that it is kept in

# What a tokenizer.json must give back before it is used: what people write, then the characters of Unicode, all up to
# U+07FF and some of every kind beyond, so that every byte of UTF-8 is among them.
SAMPLES = [
    "Hello, World! 0123456789",
    "def f(x):\n    if x > 0:\n\treturn {'a': [x, -1.5e-3]}  # why?\n\n\n\n",
    "  two spaces before, two between  words, and two behind  ",
    "\n\n\tends of lines\r\n\r\n of every\rkind \t\n",
    "a" + " " * 40 + "b" + "\t" * 9 + "c" + "\n" * 20 + "d",
    "``quoted'' \u201cquoted\u201d \u2018it\u2019s\u2019 -- \u2013 \u2014 ... \u2026",
    "e\u0301 \ufb01 \u2460 \u00b2 \u00bd \u212b \uff21 \u00df \u0130 \u01c5 \u1112\u1161\u11ab",
    "a\u00a0b\u00adc\u200bd\u200de\u2028f\u3000g\ufeffh\ufffdi\0j\x1b[0m\x7f",
    "\u00efve \u65e5\u672c \ud55c\uad6d \u0627\u0644\u0639 \u0939\u093f\u0928 \u0e44\u0e17 \U0001f469\u200d\U0001f52c",
    "<b>x</b> &amp; https://example.org/a_b?c=d#e someone@example.org $x^2$ \\n %s @name ~/file_name.txt",
    "x" * 200,
]
CHARACTERS = [*range(0x800), *range(0x800, 0xD800, 0x153), *range(0xE000, 0x110000, 0x353)]
SAMPLES += ["".join(map(chr, CHARACTERS[i : i + 32])) for i in range(0, len(CHARACTERS), 32)]


class TokenizerError(UserError):
    """A tokenizer that does not exist, does not fit or cannot be fetched; the message says what to do."""


def load(name="nanocrystal", vocab_size=None):
    """
    The encoding `name`: "nanocrystal", cut to `vocab_size` ids (special ids included), one of tiktoken's own, or the
    path of a tokenizer.json. Raises TokenizerError.
    """
    if name == "nanocrystal":
        encoding = _shipped(VOCAB_SIZE if vocab_size is None else vocab_size)
    else:
        encoding = FileEncoding(errors.path(name)) if is_file(name) else _from_tiktoken(name)
    if vocab_size not in (None, encoding.n_vocab):
        raise TokenizerError(
            f"{name} has {encoding.n_vocab} ids; vocab_size={vocab_size} is possible with nanocrystal only"
        )
    return encoding


def is_file(name):
    """Whether a tokenizer of this name is a tokenizer.json, of whatever name, and not one that comes with a program."""
    return name.endswith(".json") or (errors.path(name).is_file() and name not in tiktoken.list_encoding_names())


def find(about, *folders):
    """
    The encoding that meta.json or a checkpoint describes, {"name", "vocab_size", "sha256", ...}; None of None.

    A tokenizer.json is looked for where a copy is kept, in `folders`, and then where it was when the data was prepared.
    Only one with the digest that was recorded is taken. Raises TokenizerError.
    """
    if about is None:
        return None
    if wrong := files.misfit(about, {"name": str, "vocab_size": int, "sha256": str}, "tokenizer"):
        raise TokenizerError(wrong)
    name = about["name"]
    if name == "nanocrystal" or name in tiktoken.list_encoding_names():
        paths, encodings = [name], [load(name, about["vocab_size"])]
    else:
        paths = [path for path in (*(Path(folder) / COPY for folder in folders), errors.path(name)) if path.is_file()]
        encodings = (FileEncoding(path, check=False) for path in paths)  # whatever it loses, it was used
    for encoding in encodings:
        if digest(encoding) == about["sha256"]:
            return encoding
    if paths:
        raise TokenizerError(
            f"the ids were made with another {name} than the one here ({', '.join(map(str, paths))});"
            " bring back the one of then, or prepare the data again"
        )
    copy = f"copy it to {Path(folders[0]) / COPY}" if folders else "bring it back"
    raise TokenizerError(f"there is no {name}, the tokenizer.json that made the ids; {copy}")


def keep(encoding, folder):
    """Put a tokenizer.json, of which there may be no other copy, where `find` looks for it."""
    if isinstance(encoding, FileEncoding):
        files.write(Path(folder) / COPY, encoding._pat_str.encode())


def eot(encoding):
    """The id that ends every document."""
    return encoding.encode_single_token("<|endoftext|>")


def start(encoding):
    """The id that a document begins after: the one that ended the document before, unless the encoding has its own."""
    return getattr(encoding, "start", eot(encoding))


def digest(encoding):
    """sha256 over all that decides ids: two encodings with the same digest encode alike."""
    parts = encoding._pat_str, sorted(encoding._special_tokens.items()), _token_bytes(encoding)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def rows(encoding):
    """Rows that the embedding of a model must have: beyond them are special ids only, which no text is encoded to."""
    return max(eot(encoding), start(encoding), int(byte_lengths(encoding).nonzero()[0].max())) + 1


def byte_lengths(encoding):
    """uint16 (n_vocab,): bytes that each id stands for, 0 for special ids; turns nats per token into bits per byte."""
    return np.array([len(token) for token in _token_bytes(encoding)], dtype=np.uint16)


def byte_characters():
    """The character that stands for each byte in byte-level vocabularies that are kept as text: itself where it can be
    seen, else one from U+0100 on (GPT-2)."""
    seen, characters = {*range(33, 127), *range(161, 173), *range(174, 256)}, []
    for byte in range(256):
        characters.append(chr(byte if byte in seen else 256 + byte - sum(b in seen for b in range(byte))))
    return characters


class FileEncoding:
    """A tokenizer.json, run by Hugging Face's `tokenizers`, with what is used here of tiktoken.Encoding's interface.

    Byte-level BPE (GPT-2, Llama 3) and SentencePiece's BPE with bytes for rare characters (Llama 2, Crystal). What its
    text calls </s> or <|end_of_text|> is <|endoftext|> here. Truncation, padding, dropout and NFC are switched off, and
    a tokenizer that does not give SAMPLES back is refused, unless `check` is false. SentencePiece may put its space
    before a text, and take its own sign for a space, U+2581, for one. Raises TokenizerError.
    """

    def __init__(self, path, check=True):
        try:
            from tokenizers import Tokenizer, normalizers
        except ImportError:
            raise TokenizerError(f"{path} needs a package: pip install tokenizers") from None
        try:
            self.name, self._pat_str = str(path), Path(path).read_text(encoding="utf-8-sig")
            bpe = Tokenizer.from_str(self._pat_str)
        except Exception as error:  # the library raises this very class
            raise TokenizerError(f"{path} is no tokenizer.json: {getattr(error, 'strerror', None) or error}") from None
        bpe.encode_special_tokens = True  # text that spells a special token stays text
        bpe.no_truncation()
        bpe.no_padding()
        if hasattr(bpe.model, "dropout"):
            bpe.model.dropout = None
        if isinstance(bpe.normalizer, normalizers.NFC):
            bpe.normalizer = None
        self.bpe, vocabulary, added = bpe, bpe.get_vocab(), bpe.get_added_tokens_decoder()
        self.n_vocab = max(vocabulary.values(), default=-1) + 1
        self._special_tokens = {t.content: i for i, t in added.items() if t.special}
        ends = [name for name in ("<|endoftext|>", "</s>", "<|end_of_text|>") if name in self._special_tokens]
        if not ends or self.n_vocab > 1 << 16:
            why = f"{self.n_vocab:,} ids, more than uint16 holds" if ends else "no end of text among its special tokens"
            raise TokenizerError(f"{path} has {why}")
        if check and len({*vocabulary.values()}) < len(vocabulary):
            raise TokenizerError(f"{path} has two tokens of one id")
        self._special_tokens["<|endoftext|>"] = self._special_tokens[ends[0]]
        self.special_tokens_set = set(self._special_tokens)
        before = bpe.encode("").ids  # what it puts before a text
        self.start = before[0] if before else self._special_tokens["<|endoftext|>"]
        steps = b"".join(step.__getstate__() for step in (bpe.normalizer, bpe.pre_tokenizer) if step)
        is_byte_level = b'"ByteLevel"' in steps
        self.byte_level = {c: byte for byte, c in enumerate(byte_characters())} if is_byte_level else {}
        self.token_bytes, special = [b""] * self.n_vocab, {*self._special_tokens.values()}
        for token, i in vocabulary.items():
            if i not in special:
                literal = self.byte_level and i in added
                self.token_bytes[i] = token.encode() if literal else self._bytes_of(token)
        if check:
            named = "".join(f"a {token.content} b{token.content}c" for token in added.values())
            replaced = map(json.loads, re.findall(rb'{"String":("(?:[^"\\]|\\.)*")}', steps))
            for text in [*SAMPLES, named, *replaced]:
                self.check(text, self.encode_ordinary(text))

    def __reduce__(self):  # the library forgets encode_special_tokens
        return FileEncoding, (self.name, False)

    def check(self, text, ids):
        """Refuse a tokenizer whose ids of a text do not give it back, and name the first thing that is lost."""
        decoded = self.decode(ids)
        spaced = text.replace("▁", " ")
        right = [text] if self.byte_level else [spaced, " " + spaced]
        if decoded not in right:
            same, wanted = max((common_start(decoded, one), one) for one in right)
            raise TokenizerError(
                f"{self.name} does not give every text back: of {wanted[same:][:12]!r} it makes"
                f" {decoded[same:][:12]!r}; take one that keeps every byte, such as a byte-level BPE"
            )

    def _bytes_of(self, token):
        if self.byte_level and all(c in self.byte_level for c in token):
            return bytes(self.byte_level[c] for c in token)
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    def encode_ordinary(self, text):
        return self._ids(self.bpe, text)

    def _ids(self, bpe, text):
        try:
            return bpe.encode(text, add_special_tokens=False).ids
        except Exception as error:  # of words that it has no id for
            raise TokenizerError(f"{self.name} cannot encode {text[:12]!r}: {error}") from None

    def encode_to_numpy(self, text, disallowed_special=()):
        return np.array(self.encode_ordinary(text), np.uint32)

    def encode_further(self, text):
        """Ids, uint32, of what comes after other text, where SentencePiece puts no space."""
        return np.array(self._ids(self._further, text), np.uint32)

    @functools.cached_property
    def _further(self):
        further = re.sub(
            r'{"type":"Prepend","prepend":"[^"]*"}', '{"type":"Sequence","normalizers":[]}', self.bpe.to_str()
        )
        further = type(self.bpe).from_str(re.sub(r'"prepend_scheme":"\w+"', '"prepend_scheme":"never"', further))
        further.encode_special_tokens = True
        return further

    def encode_single_token(self, name):
        return self._special_tokens[name]

    def decode_single_token_bytes(self, token):
        return self.token_bytes[token]

    def decode(self, tokens, errors="replace"):
        return b"".join(self.token_bytes[token] for token in tokens).decode(errors=errors)

    def _encode_single_piece(self, piece):
        """Ids of bytes that may begin and end inside characters, without what goes before a text."""
        if self.byte_level:
            return [t.id for t in self.bpe.model.tokenize("".join(byte_characters()[byte] for byte in piece))]
        ids = []
        for part in re.split("([\udc80-\udcff])", piece.decode(errors="surrogateescape").replace(" ", "▁")):
            if part and "\udc80" <= part <= "\udcff":
                ids.append(self.bpe.token_to_id(f"<0x{ord(part) & 0xFF:02X}>"))
            else:
                ids += [t.id for t in self.bpe.model.tokenize(part)]
        return ids


def common_start(a, b):
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _token_bytes(encoding):
    if isinstance(encoding, FileEncoding):
        return encoding.token_bytes
    tokens = [b""] * encoding.n_vocab
    for token, rank in encoding._mergeable_ranks.items():
        tokens[rank] = token
    return tokens


def _shipped(vocab_size):
    least = 256 + len(SPECIALS)  # below that some byte would have no id
    if not least <= vocab_size <= VOCAB_SIZE:
        raise TokenizerError(f"vocab_size={vocab_size}: nanocrystal has {least} to {VOCAB_SIZE} ids")
    # read here because tiktoken's own loader keeps a copy by path, which outlives a change of the file
    lines = Path(__file__).with_name("nanocrystal.tiktoken").read_bytes().splitlines()[: vocab_size - len(SPECIALS)]
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    return tiktoken.Encoding(
        f"nanocrystal-{vocab_size}", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials
    )


def _from_tiktoken(name):
    if name not in tiktoken.list_encoding_names():
        raise TokenizerError(
            f"no tokenizer {name!r}; there are nanocrystal, tiktoken's gpt2, p50k_base and p50k_edit, and"
            " every tokenizer.json, by its path"
        )
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as e:  # every network error of requests is one
        raise TokenizerError(
            f"the files of {name} could not be fetched ({type(e).__name__}). Run once with a network and "
            f"TIKTOKEN_CACHE_DIR=folder set, then keep that variable set here; nanocrystal needs no network"
        ) from e
    if encoding.n_vocab > 1 << 16:
        raise TokenizerError(
            f"{name} has {encoding.n_vocab} ids, shards hold at most 65,536 (uint16); try nanocrystal or gpt2"
        )
    if "<|endoftext|>" not in encoding.special_tokens_set:
        raise TokenizerError(f"{name} has no <|endoftext|> id to put between documents")
    return encoding
