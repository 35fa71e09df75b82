"""Crystal at laptop size, phase 3 of 3: 83% code, the rate re-warmed to a sixth of the peak; 8.62% of the tokens."""

from config.phase1 import *

share = 0.0862
mix = {"text": 0.17, "code": 0.83}
lr = lr_peak / 6
lr_end = lr_peak / 60
warmup = 0.01
eval_every = 0
