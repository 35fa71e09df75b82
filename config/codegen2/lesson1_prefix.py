"""CodeGen2, lesson 1: does a prefix-LM pay? The first part of every document sees itself from both sides, untrained.
It is evaluated causally, like the other.

python train.py config/codegen2/lesson1_prefix.py
python train.py config/codegen2/lesson1_prefix.py --objective={} --out=out/causal
"""

from config.codegen2.causal_span import *

objective = {"code": prefix(1)}
