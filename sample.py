"""Continue a prompt with a trained checkpoint, or fill a hole.

python sample.py out/phase3 --prompt 'def fibonacci(n):'     # an out/<phase> folder: its newest checkpoint
python sample.py out/phase1/checkpoints/step-00000302 --prompt @story.txt --n 3 --temperature 0.8 --top_p 0.95
python sample.py out/phase3 --infill 'def area(r):' '    return a'     # what belongs between; @FILE works here too

What begins with @ and is no file is the text itself: --prompt @property
"""

import codecs
import os
import reprlib
import sys
from pathlib import Path

import numpy as np
import torch

import checkpoint
import errors
import infill
import tokenizer
from checkpoint import CheckpointError
from errors import UserError
from machine import device_named
from model import GPT, GPTConfig

TEMPERATURE, TOP_P = errors.number(float, 0, 1e6), errors.number(float, 1e-6, 1)  # for eval.py too
SEED = errors.number(int, 0, 2**62)


def load_model(path, device="cpu", dtype=torch.float32):
    """(model in evaluation mode, tiktoken.Encoding or its like or None, state of the checkpoint) from what a person
    typed. UserError."""
    folder = checkpoint.find(path)
    state = checkpoint.load_state(folder, checkpoint.STATE)
    encoding = tokenizer.find(state["tokenizer"], folder.parents[1])
    try:
        config = GPTConfig(**state["model"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}/state.json describes no model: {error}") from None
    if encoding and tokenizer.rows(encoding) > config.vocab_size:
        raise CheckpointError(f"{folder} has {config.vocab_size:,} rows, {encoding.name} makes higher ids of text")
    if encoding:
        config.vocab_real = min(config.vocab_real, encoding.n_vocab)
    check_shapes(folder, config)
    model = GPT(config, dtype).to(device).eval()
    checkpoint.load(folder, {"model": dict(model.named_parameters())})
    for name, p in model.named_parameters():
        if bad := int((~p.isfinite()).sum()):
            raise CheckpointError(f"{folder}: {bad:,} numbers of {name} are NaN or infinite")
    return model, encoding, state


def check_shapes(folder, config):
    """Refuse a checkpoint that does not hold the model that it describes, before memory is taken for it."""
    shapes = checkpoint.shapes(folder)
    with torch.device("meta"):
        model = GPT(config)
    for name, p in model.named_parameters():
        if (size := shapes.get(f"model.{name}")) != p.shape:
            holds = "is missing" if size is None else f"is {tuple(size)}"
            raise CheckpointError(f"{folder}: {name} {holds}, state.json says {tuple(p.shape)}")


def complete(model, encoding, prompt, **how):
    """Yield the continuation of a text as text, piece by piece; characters of several tokens come out whole.

    The prompt follows what documents follow in training, an end of text. `how` goes to GPT.generate.
    """
    stop = tokenizer.eot(encoding)
    ids = [tokenizer.start(encoding), *encoding.encode_ordinary(prompt)]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for (token,) in model.generate([ids], stop=stop, **how):
        yield decoder.decode(encoding.decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


def fill(model, vocabulary, holes, layout, max_new_tokens, heal=True, **how):
    """What stands in holes, [(text before, text after), ...] -> [(UTF-8 bytes, whether the end came), ...], found side
    by side. `how` goes to GPT.generate.

    layout: of infill.LAYOUTS. heal: leave the last token before a hole to the model, which may only spell it again or
    go on from inside it, because the text may stop where no token would end. What has no room in the context with
    max_new_tokens, or half of it, for the answer is left out: the beginning of what is before, the end of what is
    after.
    """
    room = model.config.block_size - min(max_new_tokens, model.config.block_size // 2) - 5  # sentinels of any layout
    prompts, rests = [], []
    for around in holes:
        head, tail = (np.array(vocabulary.encoding.encode_ordinary(text), np.uint16) for text in around)
        head, tail = trim(head, tail, room)
        rests.append(vocabulary.token_bytes[head[-1]] if heal and len(head) else b"")
        prompts.append(infill.prompt(head[: len(head) - bool(rests[-1])], tail, layout, vocabulary).tolist())
    most = min(max_new_tokens, model.config.block_size - max(map(len, prompts)))
    stop = vocabulary.eom if layout == "codegen2" else vocabulary.eot
    rules, answers = [spelling(rest, vocabulary.token_bytes) for rest in rests], [[] for _ in holes]
    for tokens in model.generate(prompts, most, stop=stop, allow=rules, **how):
        for answer, token in zip(answers, tokens, strict=True):
            if token is not None:
                answer.append(token)
    spelt = [b"".join(vocabulary.token_bytes[token] for token in answer) for answer in answers]
    return [(text[len(rest) :], len(ids) < most) for text, rest, ids in zip(spelt, rests, answers, strict=True)]


def trim(head, tail, room):
    """What two arrays of ids around a hole keep, if they have room for so many: the parts next to it."""
    tail = tail[: max(0, room // 2, room - len(head))]
    return head[max(0, len(head) + len(tail) - room) :], tail


def spelling(rest, token_bytes):
    """A rule for GPT.generate: at first allows only tokens that spell `rest` or a part of it, or that begin with it."""

    def allow(made):
        left = rest[sum(len(token_bytes[token]) for token in made) :]
        if not left:
            return None
        return torch.tensor([bool(b) and (b.startswith(left) or left.startswith(b)) for b in token_bytes])

    return allow


def trained_layout(config):
    """Which of infill.LAYOUTS a checkpoint was trained to fill holes in, in the first source that was; None if it was
    not. config: the knobs of its phase, as a dict."""
    return next(filter(None, map(infill.layout, map(infill.parse, config.get("objective", {}).values()))), None)


def vocabulary_for(layout, encoding):
    """infill.Vocabulary, which must have the sentinels of one of infill.LAYOUTS. InfillError."""
    return infill.Vocabulary(encoding, [infill.Codegen2() if layout == "codegen2" else infill.Fim()])


def text_of(argument):
    """TEXT, or @FILE for what is in it, line ends as they are; @TEXT if there is no such file. UserError."""
    path = os.path.expanduser(argument[1:]) if argument.startswith("@") else ""
    if os.path.isdir(path):
        raise UserError(f"{argument!r}: {path!r} is a folder; put a text that begins so into a file, and say @FILE")
    try:
        if os.path.exists(path):
            return Path(path).read_bytes().decode("utf-8-sig")
        try:
            argument.encode()
        except UnicodeEncodeError:  # bytes that are nothing in the terminal's encoding
            argument = os.fsencode(argument).decode()
    except UnicodeError:
        raise UserError(f"{argument!r} is not UTF-8 text") from None
    if path:
        print(f"sample.py: there is no such file, so this is the text: {reprlib.repr(argument)}", file=sys.stderr)
    return argument


@errors.command
def main(argv):
    parser = errors.Parser(__doc__)
    parser.add_argument("checkpoint", type=errors.path, help="out/<phase>, or one of its checkpoints/step-... folders")
    parser.add_argument("--prompt", default="", help="text, or @FILE; default: the start of a document")
    parser.add_argument("--infill", nargs=2, metavar=("PREFIX", "SUFFIX"), help="texts, or @FILEs, around a hole")
    parser.add_argument("--layout", choices=infill.LAYOUTS, help="of --infill; default: what was trained")
    parser.add_argument("--no_healing", action="store_true", help="keep the prefix's last token as it is")
    count = errors.number(int, 1)
    parser.add_argument("--n", type=count, default=1, help="how many samples")
    parser.add_argument("--tokens", type=count, default=200, help="at most so many; end of text stops earlier")
    parser.add_argument(
        "--temperature", type=TEMPERATURE, help="0 takes the likeliest token; default 0.8, or 1 with --infill"
    )
    parser.add_argument("--top_p", type=TOP_P, help="default 0.95, or 1 with --infill: the end of text is a rare token")
    parser.add_argument("--seed", type=SEED, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.temperature = args.temperature if args.temperature is not None else 1.0 if args.infill else 0.8
    args.top_p = args.top_p if args.top_p is not None else 1.0 if args.infill else 0.95
    device = device_named(args.device)
    prompt, *around = map(text_of, (args.prompt, *(args.infill or ())))
    model, encoding, state = load_model(args.checkpoint, device)
    if encoding is None:
        raise tokenizer.TokenizerError("this checkpoint's data named no tokenizer, so ids cannot be turned into text")
    layout = args.layout or trained_layout(state["config"])
    if around and not layout:
        raise infill.InfillError(f"{args.checkpoint} was not trained to infill; try another, or say --layout")
    vocabulary = vocabulary_for(layout, encoding) if around else None
    for i in range(args.n):
        generator = torch.Generator(device).manual_seed(args.seed + i)
        how = {"max_new_tokens": args.tokens, "temperature": args.temperature, "top_p": args.top_p}
        how["generator"] = generator
        if around:
            ((middle, stopped),) = fill(model, vocabulary, [around], layout, heal=not args.no_healing, **how)
            print(around[0] + middle.decode(errors="replace") + around[1], end="", flush=True)
            if not stopped:
                print("\nsample.py: the answer was cut off before its end; try --tokens", file=sys.stderr)
        else:
            print(prompt, end="", flush=True)
            for piece in complete(model, encoding, prompt, **how):
                print(piece, end="", flush=True)
        print("\n" + "-" * 80 if i + 1 < args.n else "")
    return 0


if __name__ == "__main__":
    errors.run(main)
