"""CodeGen2's lessons on objectives and mixtures: what does it cost to train for more than the next token?

python study.py study/codegen2.py --data=FOLDER --eval_tasks=FOLDER

Every variant sees the same number of tokens. All of a row is trained on but a prefix, so `prefix` has fewer that teach.
"""

_causal = "config/codegen2/causal_span.py"

variants = {
    "causal": [(_causal, {"objective": {}})],
    "spans masked, half": [_causal],
    "PSM, half": ["config/codegen2/lesson2_infill.py"],
    "PSM and SPM, 0.9": [(_causal, {"objective": {"code": "fim(0.9)"}})],
    "prefix-LM": ["config/codegen2/lesson1_prefix.py"],
    "half text": ["config/codegen2/lesson4_mixture.py"],
    "text": [("config/codegen2/lesson4_mixture.py", {"mix": {"text": 1.0}})],
}
baseline = "causal"
tasks = "code_spans,code_lines,quick"
