"""Crystal at laptop size, phase 2 of 3: code mixed in. 63% code, 66.61% of the tokens; text goes on."""

from config.phase1 import *

share = 0.6661
mix = {"text": 0.37, "code": 0.63}
lr = 0.7319 * lr_peak
lr_end = 0.0114 * lr_peak
warmup = 0.02
eval_every = 200
