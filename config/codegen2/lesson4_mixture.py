"""CodeGen2, lesson 4: what does a mixture of programs and prose cost each of them, at equal compute?

python train.py config/codegen2/lesson4_mixture.py
python train.py config/codegen2/lesson4_mixture.py --mix="{'code': 1, 'text': 0}" --out=out/code
python train.py config/codegen2/lesson4_mixture.py --mix="{'code': 0, 'text': 1}" --out=out/text
"""

from config.codegen2.causal_span import *

mix = {"code": 0.5, "text": 0.5}
objective = {}
