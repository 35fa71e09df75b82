"""To Code, or Not To Code: what kind of code. A model of code alone, and with parts of it given to other sources.

python prepare.py ... adjacent=FILES synthetic      # commits and questions about code; verified programs (synthetic.py)
python study.py study/quality.py --data=FOLDER --eval_tasks=FOLDER
"""


def _of(**mix):
    return [("config/tocode/text.py", {"mix": mix | {"text": 0}})]  # evaluated, not trained on


variants = {
    "code": _of(code=1.0),
    "15% adjacent": _of(code=0.85, adjacent=0.15),
    "10% synthetic": _of(code=0.9, synthetic=0.1),
    "10% quality": _of(code=0.9, quality=0.1),
}
baseline = "code"
