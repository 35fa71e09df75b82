"""Does the best learning rate stay where it is when the model gets wider? With muP (arXiv 2203.03466) and without.

python study.py study/transfer.py --data=FOLDER
"""

_widths = (128, 256, 512)
_rates = {"muP": (0.0015, 0.003, 0.006, 0.012, 0.024), "standard": (0.0005, 0.001, 0.002, 0.004, 0.008)}


def _phase(width, rate, mup):
    shape = {"n_embd": width, "n_head": width // 64, "n_layer": 2, "mup_base": 256 if mup else 0}
    return [("config/tocode/balanced.py", shape | {"lr_peak": rate, "share": 1.0})]


variants = {
    f"{kind} {width} {rate:g}": _phase(width, rate, kind == "muP")
    for kind, rates in _rates.items()
    for width in _widths
    for rate in rates
}
baseline = "muP 256 0.006"
knobs = {"budget": "60K", "batch": 512}


def picture(values, to):
    """values: {(variant, seed): {measure: value}}. Bits per byte over the rate: a line a width, a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axis, (kind, rates) in zip(axes, _rates.items(), strict=True):
        for width in _widths:
            points = []
            for rate in rates:
                found = [m for (v, _), m in values.items() if v == f"{kind} {width} {rate:g}"]
                points += [(rate, [(m["text"] + m["code"]) / 2 for m in found])] * bool(found)
            if points:
                means = [(rate, np.mean(bits)) for rate, bits in points]
                (line,) = axis.plot(*zip(*means, strict=True), label=f"width {width}")
                for rate, bits in points:
                    axis.plot([rate] * len(bits), bits, ".", color=line.get_color())
                axis.plot(*min(means, key=lambda mean: mean[1]), marker="*", markersize=14, color=line.get_color())
        axis.set(title=kind, xscale="log", xlabel="learning rate", ylabel="bits per byte, text and code")
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.minorticks_off()
        axis.legend()
    figure.savefig(to, dpi=120)
