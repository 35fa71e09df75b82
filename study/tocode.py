"""To Code, or Not To Code: Table 2, at matched cooldown first.

Two phases have two cosines, the second from Adam's moments at zero; "text -> text" shows what that does by itself, and
"one cosine" is without it, on text-only's curve.

python study.py study/tocode.py --data=FOLDER --eval_tasks=FOLDER
"""

_twice = {"share": 10 / 11}
_half = (0.5 - 0.028) / (1 - 0.028)  # of text-only's cosine, past its warmup

variants = {
    "text only": [("config/tocode/text.py", _twice)],
    "text -> text": ["config/tocode/text.py", "config/tocode/text.py"],
    "balanced only": [("config/tocode/balanced.py", _twice)],
    "balanced -> text": ["config/tocode/balanced.py", "config/tocode/continued.py"],
    "code -> text": ["config/tocode/code.py", "config/tocode/continued.py"],
    "code -> text, one cosine": [
        ("config/tocode/code.py", {"decay_part": [0, _half], "warmup": 2 * 0.028}),
        ("config/tocode/continued.py", {"decay_part": [_half, 1], "warmup": 0, "carry_optimizer": True}),
    ],
}
baseline = "text only"
seeds = (1, 2, 3, 4, 5)
cooldown = "config/tocode/cooldown.py"
