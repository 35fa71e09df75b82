"""CodeGen2's lesson 5: five epochs are better than one. Because of more steps, more tokens, or spans drawn anew?

python prepare.py ... few=FILES                     # a little code
python study.py study/epochs.py --data=FOLDER --eval_tasks=FOLDER

A fixed draw has the same rows in every epoch, windows and spans alike; the budget is five epochs of `few`. "1 epoch,
rate of 5" is the first fifth of five epochs: the rate has hardly begun to fall when it ends.
"""

_five = "config/codegen2/lesson5_epochs.py"


def _with(objective, **knobs):
    return [(_five, {"objective": {"*": objective} if objective else {}} | knobs)]


variants = {
    "5 epochs, spans anew": _with("codegen2(0.5)"),
    "1 epoch": _with("codegen2(0.5)", share=0.2),
    "1 epoch, rate of 5": _with("codegen2(0.5)", share=0.2, warmup=0.5, decay_part=[0, 1 / 9]),
    "5 epochs, spans fixed": _with("codegen2(0.5, redraw=False)"),
    "5 times the code": _with("codegen2(0.5)", mix={"few": 0, "code": 1}),
    "5 epochs, causal": _with(""),
    "5 epochs, causal, fixed": _with("codegen2(0, redraw=False)"),
}
baseline = "5 epochs, spans anew"
