"""How well a checkpoint fills holes in held-out documents.

    python eval.py out/phase2                       # holes in the held-out part of the data it was trained on
    python eval.py out/phase2 --source=text --holes=500 --temperature=0 --data=other/data

Two kinds of holes, in as much of a document as half a context holds: a span between any two characters, and a line.
Texts before and after a hole are encoded apart, as they come from a person. For each kind:

- stops: how often the model ends its answer by itself, before the context is full
- exact: how often that is what stood there, but for white space around it
- bits per byte of what stood there, after prefix and suffix in the layout that was trained, and after the prefix alone
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import infill
import tokenizer
from checkpoint import CheckpointError
from mix import MixError, Source
from sample import fill, load_model, trained_layout, vocabulary_for


def documents(folder, block_size, vocabulary, many):
    """The longest document's first half context of each of `many` held-out windows, as text."""
    source = Source(folder, "val", block_size)
    for row in source.rows(0, min(source.windows, many)):
        begin, end = infill.longest_document(row, vocabulary)
        ids = row[
            begin : min(end, begin + block_size // 2 - 8)
        ]  # whole in the context beside half of one for an answer
        yield b"".join(vocabulary.token_bytes[i] for i in ids).decode(errors="ignore")


def span(text, rng):
    """(before, middle, after) a hole between any two characters, or None."""
    if len(text) < 3:
        return None
    a, b = sorted(rng.choice(len(text) - 1, 2, replace=False) + 1)
    return text[:a], text[a:b], text[b:]


def line(text, rng):
    """(before, middle, after) a line that is not blank and has lines around it; or None."""
    lines = text.splitlines(keepends=True)
    inner = [i for i in range(1, len(lines) - 1) if lines[i].strip()]
    if not inner:
        return None
    i = rng.choice(inner)
    return "".join(lines[:i]), lines[i], "".join(lines[i + 1 :])


@torch.no_grad()
def nats(model, before, middle):
    """Loss of ids `middle` after ids `before`, uint16 (n,) both, summed."""
    ids = torch.from_numpy(np.concatenate([before, middle]).astype(np.int64))[None].to(model.wte.weight.device)
    ids = ids[:, -model.config.block_size - 1 :]
    return F.cross_entropy(model(ids[:, :-1])[0, -len(middle) :], ids[0, -len(middle) :], reduction="sum").item()


def measure(model, vocabulary, holes, layout, **how):
    """Shares of holes that stop and that are exact, bits per byte with and without the suffix. how: to sample.fill."""

    def encode(text):
        return np.array(vocabulary.encoding.encode_ordinary(text), np.uint16)

    stops = exact = n_bytes = 0
    losses = np.zeros(2)
    for before, middle, after in holes:
        answer, stopped = fill(model, vocabulary, before, after, layout, model.config.block_size, **how)
        stops += stopped
        exact += stopped and answer.decode(errors="replace").strip() == middle.strip()
        head, ids, tail = map(encode, (before, middle, after))
        prefix_only = np.append(vocabulary.sentinels["eot"], head)
        losses += nats(model, infill.prompt(head, tail, layout, vocabulary), ids), nats(model, prefix_only, ids)
        n_bytes += len(middle.encode())
    return stops / len(holes), exact / len(holes), *(losses / math.log(2) / n_bytes)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="out/<phase>, or one of its checkpoints/step-... folders")
    parser.add_argument("--source", default="code")
    parser.add_argument("--data", help="a folder a source; default: what it was trained on")
    parser.add_argument("--holes", type=int, default=200, help="of each kind, at most one a held-out window")
    parser.add_argument("--layout", choices=infill.LAYOUTS, help="default: what was trained, else psm")
    parser.add_argument("--no_healing", action="store_true", help="keep the prefix's last token as it is")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the answers; 0 takes the likeliest token")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.holes < 1 or args.temperature < 0 or not 0 < args.top_p <= 1:
        parser.error("--holes is above 0, --temperature is not below 0, --top_p is in (0, 1]")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees none")
    try:
        model, encoding, state = load_model(args.checkpoint, args.device)
        if encoding is None:
            raise tokenizer.TokenizerError(
                "this checkpoint's data named no tokenizer: there are no sentinels for holes"
            )
        layout = args.layout or trained_layout(state["config"], args.source) or "psm"
        vocabulary = vocabulary_for(layout, encoding)
        folder = Path(args.data or state["config"]["data"]) / args.source
        texts = [*documents(folder, model.config.block_size, vocabulary, args.holes)]
    except (CheckpointError, MixError, tokenizer.TokenizerError, infill.InfillError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    print(f"{args.checkpoint}, held-out {args.source}, {layout}, temperature {args.temperature:g}")
    print(f"{'hole':<8} {'n':>5} {'stops':>7} {'exact':>7}   bits/byte of the middle   without suffix")
    generator = torch.Generator(args.device).manual_seed(args.seed)
    how = {"temperature": args.temperature, "top_p": args.top_p, "generator": generator, "heal": not args.no_healing}
    for kind in (span, line):
        rng = np.random.default_rng(args.seed)
        holes = [hole for text in texts if (hole := kind(text, rng))]
        if holes:
            stops, exact, middle, prefix_only = measure(model, vocabulary, holes, layout, **how)
            print(
                f"{kind.__name__:<8} {len(holes):>5} {stops:>7.1%} {exact:>7.1%} {middle:>25.4f} {prefix_only:>16.4f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
