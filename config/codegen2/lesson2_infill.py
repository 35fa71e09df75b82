"""CodeGen2, lesson 2: is infilling free? Half of the documents as they are, half as fill-in-the-middle in PSM.

python train.py config/codegen2/lesson2_infill.py
python train.py config/codegen2/lesson2_infill.py --objective={} --out=out/causal
"""

from config.codegen2.causal_span import *

objective = {"code": fim(0.5, spm=0)}
