"""Crystal: is the order of its data worth anything? All variants have its tokens, and its learning-rate curve, "code
first" to 2% of the peak and warming up again elsewhere; in "no re-warming" phase 3 goes on from phase 2's last rate.
As much of all code is under infilling in "uniform" as in Crystal.

python study.py study/crystal.py --data=FOLDER --eval_tasks=FOLDER
"""

_P1, _P2, _P3 = (f"config/phase{n}.py" for n in (1, 2, 3))
_shares = (0.2477, 0.6661, 0.0862)  # of the tokens
_code = (0.05, 0.63, 0.83)  # of each phase


def _mix(code):
    return {"mix": {"text": round(1 - code, 6), "code": round(code, 6)}}


def _line(at):
    """Phases 1 and 2 are one line from the peak to 1.14% of it: its value after a share of the tokens."""
    return 1 - (1 - 0.0114) * at / (_shares[0] + _shares[1])


_rates = (0, 0.9, 0.3)  # of code, under infilling
_all_code = sum(s * c for s, c in zip(_shares, _code, strict=True))
_rate = sum(s * c * r for s, c, r in zip(_shares, _code, _rates, strict=True)) / _all_code
_average = _mix(_all_code) | {"objective": {"code": f"fim({_rate:.3f})"}}
_peak = 0.006
_swap = _peak * _line(_shares[1])

variants = {
    "uniform": [(_P1, _average), (_P2, _average), (_P3, _average)],
    "Crystal": [_P1, _P2, _P3],
    "code first": [  # phases 1 and 2 change places; the rate stays near its line, warmups have their tokens
        (_P2, {"lr": _peak, "lr_end": _swap, "warmup": 0.1 * _shares[0] / _shares[1]}),
        (_P1, {"lr": _swap, "lr_end": 0.0114 * _peak, "warmup": 0.02 * _shares[1] / _shares[0]}),
        _P3,
    ],
    "phase 2 goes on": [_P1, _P2, (_P3, _mix(_code[1]) | {"objective": {"code": "fim(0.9)"}})],
    "no re-warming": [_P1, _P2, (_P3, {"lr": 0.0114 * _peak, "lr_end": 0.0114 * _peak / 10, "warmup": 0})],
    "no code": [(path, {"mix": {"text": 1.0}, "objective": {}}) for path in (_P1, _P2, _P3)],
}
baseline = "uniform"
seeds = (1, 2, 3, 4, 5)
