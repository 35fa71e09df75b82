"""To Code, or Not To Code: what a cooldown's data does to one trunk, and what is only the falling rate.

python prepare.py text=FILES code=FILES quality=FILES
python study.py study/cooldown.py --data=FOLDER --eval_tasks=FOLDER

The source `quality` is better text than the rest, for the two variants that name it. "goes on" has the trunk's mixture
for as long, at the rate where it ends (a tenth of 0.006), "goes on, cooled" with the cooldown's falling rate. Runs are
shared with study/tocode.py.
"""

_trunk = ["config/tocode/balanced.py", "config/tocode/continued.py"]
_cooldown = "config/tocode/cooldown.py"
_goes_on = {"share": 1 / 11, "lr": 0.0006, "lr_end": 0.0006, "decay": "constant", "warmup": 0}

variants = {
    "goes on": [*_trunk, ("config/tocode/continued.py", _goes_on)],
    "goes on, cooled": [*_trunk, ("config/tocode/continued.py", _goes_on | {"decay": "linear", "lr_end": 1e-6})],
    "without code": [*_trunk, "config/tocode/cooldown_nocode.py"],
    "a fifth code": [*_trunk, _cooldown],
    "quality": [*_trunk, ("config/tocode/cooldown_nocode.py", {"mix": {"quality": 1.0}})],
    "quality, a fifth code": [*_trunk, (_cooldown, {"mix": {"quality": 0.8, "code": 0.2}})],
}
baseline = "without code"
seeds = (1, 2, 3, 4, 5)
