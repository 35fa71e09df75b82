"""CodeGen2's lessons 1 to 4: what does it cost to train for more than the next token, and on more than code?

python study.py study/codegen2.py --data=FOLDER --eval_tasks=FOLDER

All variants see the same number of tokens, and train on all of them, spans and parts of infilling included; a prefix is
not trained on, on average a quarter of a document. The longer prefix-LM has as many trained tokens as the others. The
marks of holes have been seen by variants with infilling only.
"""

_causal = "config/codegen2/causal_span.py"
_prefix = "config/codegen2/lesson1_prefix.py"
_mixture = "config/codegen2/lesson4_mixture.py"

variants = {
    "causal": [(_causal, {"objective": {}})],
    "prefix-LM": [_prefix],
    "prefix-LM, longer": [(_prefix, {"share": 4 / 3})],
    "PSM, half": ["config/codegen2/lesson2_infill.py"],
    "PSM and SPM, 0.9": [(_causal, {"objective": {"code": "fim(0.9)"}})],
    "spans, half": [_causal],
    "half text": [_mixture],
    "text": [(_mixture, {"mix": {"code": 0, "text": 1}})],
}
baseline = "causal"
tasks = "quick,code_spans"
