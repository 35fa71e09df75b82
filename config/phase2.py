"""Crystal at laptop size, phase 2 of 3: code mixed in, 63% of the tokens; text goes on where phase 1 stopped."""

from config.phase1 import *  # noqa: F403
from config.phase1 import _peak

share = 0.6661
mix = {"text": 0.37, "code": 0.63}
lr = 0.7319 * _peak
lr_end = 0.0114 * _peak
warmup = 0.02
