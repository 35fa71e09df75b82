"""Crystal at laptop size, phase 3 of 3: mostly code, re-warmed to a sixth of the peak and down to a sixtieth."""

from config.phase1 import *  # noqa: F403
from config.phase1 import _peak

share = 0.0862
mix = {"text": 0.17, "code": 0.83}
lr = _peak / 6
lr_end = _peak / 60
warmup = 0.01
