"""How much code? Shares of a run's tokens, as in To Code, or Not To Code; and the same code added to all of the text
instead of taking its place, which tells what code gives from what less text costs.
python study.py study/shares.py --data=FOLDER --eval_tasks=FOLDER
"""


def _with(code, added=False):
    """Phases of a share of code; `added`: so much longer that there is as much text as without."""
    mix = {"text": round(1 - code, 6), "code": round(code, 6)}
    share = 5 / 11 / (1 - code if added else 1)
    return [("config/tocode/text.py", {"mix": {k: v for k, v in mix.items() if v}, "share": share})]


variants = {f"{100 * share:.0f}%": _with(share) for share in (0, 0.25, 0.5, 0.75, 0.9, 1)}
variants |= {f"{100 * share:.0f}% added": _with(share, added=True) for share in (0.25, 0.5)}
baseline = "0%"
seeds = (1, 2, 3, 4, 5)
cooldown = "config/tocode/cooldown.py"
