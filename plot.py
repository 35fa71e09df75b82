"""Draw what a run has logged: loss and held-out bits per byte of every source over tokens, phases marked.

python plot.py out                         # all phases under out/, to out/curves.png; needs matplotlib
python plot.py out/phase1 --to=p1.png
"""

import io
import json
import math
import warnings
from pathlib import Path

import errors
import files
from errors import UserError

PICTURES = (".png", ".svg", ".pdf", ".jpg", ".webp")
RECORD = {"phase": str, "tokens": lambda value: type(value) is int and abs(value) < 2**63}
CURVES = {"loss_by_source": {...: files.number}, "val": {...: {"bpb": files.number}}}  # one of them, or neither


def pyplot(to):
    """matplotlib.pyplot, to draw what `save` will call `to`. UserError if there is none, or no such kind of picture."""
    if to.suffix.lower() not in PICTURES:
        raise UserError(f"{to}: a picture's name ends in one of {', '.join(PICTURES)}")
    try:
        import matplotlib
    except ImportError:
        raise UserError("a picture needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is a $
    import matplotlib.pyplot as plt

    return plt


def save(figure, to):
    """Write a picture, whole or not at all."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the font has not is a box
        figure.savefig(content, format=to.suffix[1:].lower(), dpi=120)
    files.write(to, content.getvalue())


def label(name):
    """A name as a picture has room for it, in letters that there are."""
    name = " ".join(name.encode(errors="replace").decode().split())
    return name if len(name) <= 60 else f"{name[:57]}..."


def read_logs(folder):
    """-> records of every log.jsonl in or right under a folder, in order of tokens; {path: how many lines are none}. A
    run that was killed may have left half a line."""
    records, left_out = [], {}
    phases = Path(folder).glob("*/log.jsonl")
    phases = [path for path in phases if ".old-" not in path.parent.name]  # which --fresh has set aside
    for path in filter(Path.is_file, sorted([*Path(folder).glob("log.jsonl"), *phases])):
        lines = [read_record(line) for line in path.read_bytes().split(b"\n") if line.strip()]
        records += filter(None, lines)
        left_out[path] = lines.count(None)
    return sorted(records, key=lambda r: r["tokens"]), left_out


def read_record(line):
    """A line of log.jsonl as a dict, None if it is not what train.py writes."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    curves = {name: shape for name, shape in CURVES.items() if isinstance(record, dict) and name in record}
    return None if not isinstance(record, dict) or files.misfit(record, RECORD | curves) else record


def series(records):
    """-> {source: [(tokens, training loss)]}, {source: [(tokens, bits per byte)]}, {phase: first token}."""
    losses, held_out, phases = {}, {}, {}
    for r in records:
        phases.setdefault(r["phase"], r["tokens"])
        for name, loss in r.get("loss_by_source", {}).items():
            add(losses, name, r["tokens"], loss)
        for name, value in r.get("val", {}).items():
            add(held_out, name, r["tokens"], value["bpb"])
    return losses, held_out, phases


def add(curves, name, tokens, value):
    """A point of a curve, if there is one: a run that has diverged has none, and bits per byte need a tokenizer."""
    if value is not None and math.isfinite(value):
        curves.setdefault(name, []).append((tokens, float(value)))


def draw(records, to):
    plt = pyplot(to)
    losses, held_out, phases = series(records)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = sorted(losses.keys() | held_out.keys())  # one colour in both panels
    panels = ((losses, "training loss, nats a token", ""), (held_out, "held out, bits a byte", "o"))
    for axis, (curves, title, marker) in zip(axes, panels, strict=True):
        for name, points in sorted(curves.items()):
            x, y = zip(*points, strict=True)
            colour = f"C{names.index(name)}"
            axis.plot([tokens / 1e6 for tokens in x], y, marker=marker, markersize=4, label=label(name), color=colour)
        late = [
            y for points in curves.values() for _, y in points[len(points) // 10 :]
        ]  # the first fall hides the rest
        limits = (min(late) * 0.9, max(late) * 1.05) if late else None
        axis.set(title=title, xlabel="tokens seen, millions", ylim=limits)
        for phase, tokens in phases.items():
            axis.axvline(tokens / 1e6, color="grey", linewidth=0.8, linestyle=":")
            axis.annotate(
                label(phase), (tokens / 1e6, 0.98), xycoords=("data", "axes fraction"), va="top", color="grey",
                fontsize=8,
            )  # fmt: skip
        axis.grid(alpha=0.2)
        if curves:
            axis.legend()
    save(figure, to)


@errors.command
def main(argv):
    parser = errors.Parser(__doc__)
    parser.add_argument("folder", type=errors.path, help="the --out of a run, or one phase in it")
    parser.add_argument("--to", type=errors.path, help="picture to write; default: curves.png in the folder")
    args = parser.parse_args(argv)
    to = args.to or args.folder / "curves.png"
    pyplot(to)  # what it lacks is said before anything else
    records, left_out = read_logs(args.folder)
    if not records:
        raise UserError(f"there is no log.jsonl with records of train.py in {args.folder} or right under it")
    draw(records, to)
    for path, n_lines in left_out.items():
        if n_lines:
            print(f"left out {n_lines} lines of {path}, which are no records of train.py")
    print(f"wrote {to}")


if __name__ == "__main__":
    errors.run(main)
