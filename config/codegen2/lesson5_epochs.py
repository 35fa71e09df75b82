r"""CodeGen2, lesson 5: five epochs over little data, with spans and windows drawn anew in every epoch and without, and
as many tokens of new data in one.

    python prepare.py few="$(python -c 'import asyncio; print(*asyncio.__path__)')" --vocab_size=8192
    python train.py config/codegen2/lesson5_epochs.py
    python train.py config/codegen2/lesson5_epochs.py --out=out/fixed \
        --objective="{'few': 'codegen2(0.5, redraw=False)'}"
    python train.py config/codegen2/lesson5_epochs.py --out=out/causal --objective={}
    python train.py config/codegen2/lesson5_epochs.py --out=out/causal-fixed \
        --objective="{'few': 'codegen2(0, redraw=False)'}"
    python train.py config/codegen2/lesson5_epochs.py --out=out/new --mix="{'few': 0, 'code': 1}" \
        --objective="{'code': 'codegen2(0.5)'}"

Without redraw all epochs have the same rows, in another order, as if one copy lay on the disk: the same spans in
windows cut at the same places. What the windows alone do, the two causal runs show.
"""

import json

from config.codegen2.causal_span import *

mix = {"few": 1, "code": 0}  # code is evaluated, not trained on
with open(f"{data}/few/meta.json") as _file:
    budget = 5 * json.load(_file)["train"]["tokens"]
objective = {"few": codegen2(0.5)}
