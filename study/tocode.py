"""To Code, or Not To Code: Table 2, at matched cooldown first.

python study.py study/tocode.py --data=FOLDER --eval_tasks=FOLDER
"""

_twice = {"share": 10 / 11}

variants = {
    "text only": [("config/tocode/text.py", _twice)],
    "balanced only": [("config/tocode/balanced.py", _twice)],
    "balanced -> text": ["config/tocode/balanced.py", "config/tocode/continued.py"],
    "code -> text": ["config/tocode/code.py", "config/tocode/continued.py"],
    "code -> text, one cosine": [
        ("config/tocode/code.py", {"decay_part": [0, 0.5]}),
        ("config/tocode/continued.py", {"decay_part": [0.5, 1], "warmup": 0, "carry_optimizer": True}),
    ],
}
baseline = "text only"
cooldown = "config/tocode/cooldown.py"
