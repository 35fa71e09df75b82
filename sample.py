"""Continue a prompt with a trained checkpoint.

python sample.py out/phase3 --prompt 'def fibonacci(n):'     # an out/<phase> folder: its newest checkpoint
python sample.py out/phase1/checkpoints/step-00000302 --prompt @story.txt --n 3 --temperature 0.8 --top_p 0.95
"""

import argparse
import codecs
import sys
from pathlib import Path

import torch

import checkpoint
import tokenizer
from model import GPT, GPTConfig


def load_model(path, device="cpu", dtype=torch.float32):
    """(model in evaluation mode, tiktoken.Encoding or None, state of the checkpoint) from what a person typed."""
    folder = checkpoint.find(path)
    state = checkpoint.load_state(folder)
    model = GPT(GPTConfig(**state["model"]), dtype).to(device).eval()
    checkpoint.load(folder, {"model": dict(model.named_parameters())})
    meta = state["tokenizer"]
    return model, meta and tokenizer.load(meta["name"], meta["vocab_size"]), state


def complete(model, encoding, prompt, **how):
    """Yield the continuation of a text as text, piece by piece; characters of several tokens come out whole.

    The prompt follows an end-of-text, as a document does in training. `how` goes to GPT.generate.
    """
    stop = tokenizer.eot(encoding)
    ids = [stop, *encoding.encode_ordinary(prompt)]
    tokens = torch.tensor([ids], device=model.wte.weight.device)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for word in model.generate(tokens, stop=stop, **how):
        yield decoder.decode(encoding.decode_single_token_bytes(word))
    yield decoder.decode(b"", final=True)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="out/<phase>, or one of its checkpoints/step-... folders")
    parser.add_argument("--prompt", default="", help="text, or @FILE; default: the start of a document")
    parser.add_argument("--n", type=int, default=1, help="how many samples")
    parser.add_argument("--tokens", type=int, default=200, help="at most so many; end of text stops earlier")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if not (args.n > 0 and args.tokens > 0 and args.temperature >= 0 and 0 < args.top_p <= 1):
        parser.error("--n and --tokens are above 0, --temperature is not below 0, --top_p is in (0, 1]")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees none")
    try:
        prompt = Path(args.prompt[1:]).read_text() if args.prompt.startswith("@") else args.prompt
        model, encoding, _ = load_model(args.checkpoint, args.device)
        if encoding is None:
            raise tokenizer.TokenizerError(
                "this checkpoint's data named no tokenizer, so ids cannot be turned into text"
            )
    except (checkpoint.CheckpointError, tokenizer.TokenizerError, UnicodeDecodeError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    for i in range(args.n):
        generator = torch.Generator(args.device).manual_seed(args.seed + i)
        how = {"max_new_tokens": args.tokens, "temperature": args.temperature, "top_p": args.top_p}
        print(prompt, end="", flush=True)
        for piece in complete(model, encoding, prompt, generator=generator, **how):
            print(piece, end="", flush=True)
        print("\n" + "-" * 80 if i + 1 < args.n else "")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
