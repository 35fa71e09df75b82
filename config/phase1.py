"""Crystal at laptop size, phase 1 of 3: language first, 95% text and 5% code, 24.77% of the tokens."""

size = "nano"
budget = 10e6
share = 0.2477
batch = 8192
mix = {"text": 0.95, "code": 0.05}

# Crystal's shape: phases 1 and 2 are one line from the peak to 1/88 of it, phase 3 re-warms to a sixth.
_peak = 0.012
lr = _peak
lr_end = 0.7319 * _peak
warmup = 0.1
eval_every = 100
