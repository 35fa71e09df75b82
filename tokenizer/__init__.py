"""
The tokenizer: 32,000 byte-level BPE ranks (nanocrystal.tiktoken, made by train.py), run by tiktoken.

    encoding = tokenizer.load()                       # all 32,064 ids
    encoding = tokenizer.load(vocab_size=8192)        # the first 8,128 ranks and the 64 special ids
    encoding = tokenizer.load("gpt2")                 # any tiktoken encoding whose ids fit uint16

- Ranks are in the order the merges were made, so a smaller vocabulary is a prefix of a larger one, and is the
  vocabulary that training to that size would have given.
- The 64 special ids follow the ranks, so they move with vocab_size. Encode documents with `encode_ordinary` or
  `encode_to_numpy(text, disallowed_special=())`: a document that spells a special token then stays plain bytes.
"""

import base64
import hashlib
from pathlib import Path

import numpy as np
import tiktoken

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


class TokenizerError(ValueError):
    """A tokenizer that does not exist, does not fit or cannot be fetched; the message says what to do."""


def load(name="nanocrystal", vocab_size=None):
    """
    The encoding `name`: "nanocrystal", cut to `vocab_size` ids (special ids included), or one of tiktoken's own.
    Raises TokenizerError.
    """
    encoding = (
        _shipped(VOCAB_SIZE if vocab_size is None else vocab_size) if name == "nanocrystal" else _from_tiktoken(name)
    )
    if vocab_size not in (None, encoding.n_vocab):
        raise TokenizerError(
            f"{name} has {encoding.n_vocab} ids; vocab_size={vocab_size} is possible with nanocrystal only"
        )
    return encoding


def eot(encoding):
    """The id that ends every document."""
    return encoding.encode_single_token("<|endoftext|>")


def digest(encoding):
    """sha256 over all that decides ids: two encodings with the same digest encode alike."""
    parts = encoding._pat_str, sorted(encoding._special_tokens.items()), _token_bytes(encoding)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def byte_lengths(encoding):
    """uint16 (n_vocab,): bytes that each id stands for, 0 for special ids; turns nats per token into bits per byte."""
    return np.array([len(token) for token in _token_bytes(encoding)], dtype=np.uint16)


def _token_bytes(encoding):
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
            f"no tokenizer {name!r}; there are nanocrystal and tiktoken's gpt2, p50k_base and p50k_edit"
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
