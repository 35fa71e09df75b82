"""Crystal at laptop size, phase 3 of 3: 83% code, the rate re-warmed to a sixth of the peak; 8.62% of the tokens."""

from config.phase1 import *

share = 0.0862
mix = {"text": 0.17, "code": 0.83}
objective = {"code": fim(0.3)}
lr = lr_peak / 6
lr_end = lr_peak / 60
warmup = 0.01
eval_every = 0

# Measured 2026-11-22, else as in phase1.py: text 1.561 -> 1.586, code 1.395 -> 1.377 bits per byte held out. Without
# infilling in both phases: text 1.550 -> 1.576, code 1.356 -> 1.355. The rate goes from phase 2's last 6.8e-5 up to
# 1e-3 and ends at 1e-4; the data's part in what gets worse is not separated.
