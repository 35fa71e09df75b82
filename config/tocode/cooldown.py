"""To Code, or Not To Code, Table 2: the cooldown, a fifth of it code, down to a rate of 1e-6; see text.py.

Whoever has better text than the rest names it: --mix="{'quality': 0.8, 'code': 0.2}".
"""

from config.tocode.text import *

share = 1 / 11
mix = streams(code=0.2)
decay = "linear"
lr = 0.1 * lr_peak  # where a cosine ends
lr_end = min(lr, 1e-6)
warmup = 0
