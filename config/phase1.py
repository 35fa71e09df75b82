"""Crystal at laptop size, phase 1 of 3: language first. 95% text, 5% code, 24.77% of the tokens."""

size = "nano"
budget = 7e6  # tokens of all three phases
share = 0.2477
batch = 4096
mix = {"text": 0.95, "code": 0.05}

# Phases 1 and 2 of Crystal are one line from the peak to 1.14% of it, which phase 1 leaves at 73.19%.
lr_peak = 0.006
lr = lr_peak
lr_end = 0.7319 * lr_peak
warmup = 0.1
eval_every = 100
