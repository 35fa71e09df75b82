"""
Trains the shipped tokenizer: a byte-level BPE of 32,000 ranks, half of its sample text and half code, by bytes.

    pip install tokenizers
    D=corpora  # Wikipedia, books, documentation; Python, web and systems code; openly licensed or public domain
    python -m tokenizer.train --bytes=240M \
        text=$D/text_wiki.jsonl.xz,$D/text_books.jsonl.xz,$D/text_web_docs.jsonl.xz \
        code=$D/code_python.jsonl.xz,$D/code_web.jsonl.xz,$D/code_systems.jsonl.xz

reproduces nanocrystal.tiktoken bit for bit: the sample is the first documents of each file, an equal share of the bytes
for each file of a side, and merging breaks ties by token id. Files are .jsonl.xz with the document under "text".
--ranks and --out train another one. The merging is Hugging Face's; the result needs tiktoken only.
"""

import base64
import json
import lzma
from pathlib import Path

import errors
from errors import UserError
from tokenizer import PATTERN, RANKS

LONGEST = 32  # bytes in a token: keeps rulers of dashes and base64 lines from using up ranks


def sample(path, budget):
    """The first documents of a .jsonl.xz file, about `budget` bytes of text. UserError if it holds fewer."""
    with lzma.open(errors.path(path), "rt", encoding="utf-8") as f:
        for line in f:
            text = json.loads(line)["text"]
            yield text
            budget -= len(text.encode())
            if budget <= 0:
                return
    raise UserError(f"{path} holds too little text: {budget:,.0f} bytes short of its share")


def train(texts, n_ranks):
    """The byte strings of a BPE by rank: the 256 bytes in order, then merges in the order they were made."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=n_ranks, initial_alphabet=alphabet, max_token_length=LONGEST)
    )
    # Hugging Face writes byte b as a printable character: itself where it is one, else the next from U+0100 on (GPT-2)
    visible = [b for b in range(256) if chr(b) in alphabet]
    byte = {chr(b): b for b in visible}
    byte |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in visible)}
    vocab = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(byte[c] for c in token) for token, _ in vocab]
    return sorted(tokens[:256]) + tokens[256:]


@errors.command
def main(argv):
    parser = errors.Parser(__doc__)
    parser.add_argument("files", nargs="+", metavar="text=FILES|code=FILES", help="comma-separated .jsonl.xz files")
    parser.add_argument("--bytes", default="240M", help="size of the sample")
    parser.add_argument("--ranks", type=int, default=RANKS)
    parser.add_argument("--out", default=Path(__file__).with_name("nanocrystal.tiktoken"), type=errors.path)
    args = parser.parse_args(argv)
    sides = [side.partition("=")[2].split(",") for side in args.files]
    budget = float(args.bytes.rstrip("KMG")) * {"K": 1e3, "M": 1e6, "G": 1e9}.get(args.bytes[-1], 1)
    texts = (text for side in sides for path in side for text in sample(path, budget / len(sides) / len(side)))
    tokens = train(texts, args.ranks)
    args.out.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(t), rank) for rank, t in enumerate(tokens)))
    print(f"{args.out}: {len(tokens):,} ranks, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    errors.run(main)
