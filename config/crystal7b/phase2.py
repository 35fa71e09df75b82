"""Crystal 7B, phase 2 of 3: code mixed in. 214,387 steps, 927.3B tokens.

The other half of SlimPajama, and StarCoderData twice. With SlimPajama's GitHub part 64.7% of the tokens are code.
90% of StarCoderData is trained as fill-in-the-middle.
"""

from config.crystal7b.phase1 import *
from config.crystal7b.phase1 import _steps

share = _steps["phase2"] / sum(_steps.values())
mix = {
    "slimpajama_commoncrawl": 0.19839,
    "slimpajama_c4": 0.09910,
    "slimpajama_github": 0.01845,
    "slimpajama_arxiv": 0.01608,
    "slimpajama_books": 0.01536,
    "slimpajama_wikipedia": 0.01271,
    "slimpajama_stackexchange": 0.01178,
    "starcoderdata": 0.62812,
}
objective = {"starcoderdata": fim(0.9)}
lr = 0.0087825  # phase 1's line, after a warmup of its own
lr_end = 0.00013679
