"""Draw what a run has logged: loss and held-out bits per byte of every source over tokens, phases marked.

python plot.py out                         # all phases under out/, to out/curves.png; needs matplotlib
python plot.py out/phase1 --to=p1.png
"""

import json
from pathlib import Path

import errors
from errors import UserError


def read_logs(folder):
    """Records of every log.jsonl in or right under a folder, in order of tokens. A half-written line is left out."""
    records = []
    for path in sorted([*Path(folder).glob("log.jsonl"), *Path(folder).glob("*/log.jsonl")]):
        if ".old-" in path.parent.name:  # set aside by --fresh
            continue
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return sorted(records, key=lambda r: r["tokens"])


def series(records):
    """-> {source: [(tokens, training loss)]}, {source: [(tokens, bits per byte)]}, {phase: first token}."""
    losses, held_out, phases = {}, {}, {}
    for r in records:
        phases.setdefault(r["phase"], r["tokens"])
        for name, loss in r.get("loss_by_source", {}).items():
            losses.setdefault(name, []).append((r["tokens"], loss))
        for name, value in r.get("val", {}).items():
            if value["bpb"]:
                held_out.setdefault(name, []).append((r["tokens"], value["bpb"]))
    return losses, held_out, phases


def draw(records, to):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    losses, held_out, phases = series(records)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = sorted(losses.keys() | held_out.keys())  # one colour in both panels
    panels = ((losses, "training loss, nats a token", ""), (held_out, "held out, bits a byte", "o"))
    for axis, (curves, title, marker) in zip(axes, panels, strict=True):
        for name, points in sorted(curves.items()):
            x, y = zip(*points, strict=True)
            colour = f"C{names.index(name)}"
            axis.plot([tokens / 1e6 for tokens in x], y, marker=marker, markersize=4, label=name, color=colour)
        late = [
            y for points in curves.values() for _, y in points[len(points) // 10 :]
        ]  # the first fall hides the rest
        limits = (min(late) * 0.9, max(late) * 1.05) if late else None
        axis.set(title=title, xlabel="tokens seen, millions", ylim=limits)
        for phase, tokens in phases.items():
            axis.axvline(tokens / 1e6, color="grey", linewidth=0.8, linestyle=":")
            axis.annotate(
                phase, (tokens / 1e6, 0.98), xycoords=("data", "axes fraction"), va="top", color="grey", fontsize=8
            )
        axis.grid(alpha=0.2)
        axis.legend()
    figure.savefig(to, dpi=120)


@errors.command
def main(argv):
    parser = errors.Parser(__doc__)
    parser.add_argument("folder", type=errors.path, help="the --out of a run, or one phase in it")
    parser.add_argument("--to", type=errors.path, help="picture to write; default: curves.png in the folder")
    args = parser.parse_args(argv)
    records = read_logs(args.folder)
    if not records:
        raise UserError(f"there is no log.jsonl in {args.folder} or right under it")
    to = args.to or args.folder / "curves.png"
    try:
        draw(records, to)
    except ImportError:
        raise UserError("a picture needs matplotlib: pip install matplotlib") from None
    print(f"wrote {to}")


if __name__ == "__main__":
    errors.run(main)
