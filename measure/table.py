"""Rows of measurements: how they are timed side by side, printed and kept."""

import json
import time
from statistics import median

import files


def row(what, value, unit, per_cpu=None, of_limit=None, target=None, note="", must=None):
    """One line of a table.

    per_cpu: units per CPU-second, or None; of_limit: the limit's share reached, or None. target: (least, most) for
    per_cpu, or for value where there is none; most may be None. note: text at the line's end. must: whether what has to
    hold does, None where nothing has to.
    """
    measured = value if per_cpu is None else per_cpu
    met = target and bool(measured >= target[0] and (target[1] is None or measured < target[1]))
    return dict(what=what, value=value, unit=unit, per_cpu=per_cpu, of_limit=of_limit, target=target, met=met,
                note=note, must=must)  # fmt: skip


def take_turns(ways, rounds):
    """{name: function} called in turn, round by round -> {name: [(wall seconds, CPU seconds) of each round]}."""
    seconds = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            if i:  # the first round warms up
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return seconds


def rate_rows(seconds, amounts, unit, limit, targets):
    """Rows from take_turns. amounts: {name: units of work in a call}; limit: a name; targets: {name: (least, most)}."""
    rows = []
    for name, rounds in seconds.items():
        rates = [amounts[name] / wall for wall, _ in rounds]
        ratios = [rate / (amounts[limit] / wall) for rate, (wall, _) in zip(rates, seconds[limit], strict=True)]
        per_cpu = median(amounts[name] / cpu for _, cpu in rounds)
        rows.append(row(name, median(rates), unit, per_cpu, median(ratios), targets.get(name)))
    return rows


def milliseconds(way, repeats=7):
    return 1e3 * median(wall for wall, _ in take_turns({"": way}, repeats)[""])


def verdict(r):
    words = [r["note"][:120]] if r["note"] else []
    if r["target"]:
        least, most = r["target"]
        asked = f">= {least:,.4g}" if most is None else f"< {most:,.4g}" if not least else f"{least} to {most}"
        words.insert(0, f"{asked}: {'met' if r['met'] else 'MISSED'}")
    if r["must"] is not None:
        words.insert(0, "holds" if r["must"] else "DOES NOT HOLD")
    return "; ".join(words)


def line(r):
    numbers = [f"{r[key]:,.4g}" if r[key] is not None else "" for key in ("value", "per_cpu")]
    share = "" if r["of_limit"] is None else f"{r['of_limit']:.3f}x"
    return f"{r['what']:<58}{numbers[0]:>12} {r['unit']:<11}{numbers[1]:>10}{share:>10}  {verdict(r)}".rstrip()


def write(path, tables):
    """As strict JSON, numpy's numbers too; replaced as a whole, or not at all."""
    files.write_json(path, json.loads(json.dumps(tables, default=float)))
