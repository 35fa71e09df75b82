"""Crystal at laptop size, phase 2 of 3: code mixed in. 63% code, 66.61% of the tokens; text goes on."""

from config.phase1 import *

share = 0.6661
mix = {"text": 0.37, "code": 0.63}
objective = {"code": fim(0.9)}
lr = 0.7319 * lr_peak
lr_end = 0.0114 * lr_peak
warmup = 0.02
eval_every = 200

# Measured as in phase1.py: text 1.947 -> 1.532, code 2.040 -> 1.137 bits per byte held out, in 10.8 minutes.
