"""To Code, or Not To Code: what kind of code. A model of code alone, and with parts of it given to other sources.

Of commits and questions about code, of programs made and verified by synthetic.py, of textbooks:

python prepare.py text=FILES code=FILES adjacent=FILES synthetic quality=FILES
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
seeds = (1, 2, 3, 4, 5)
