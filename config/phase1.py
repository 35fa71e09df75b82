"""Crystal at laptop size, phase 1 of 3: language first. 95% text, 5% code, 24.77% of the tokens."""

size = "nano"
budget = 7e6  # tokens of all three phases
share = 0.2477
batch = 4096 if size == "nano" else 0  # 0: the size's own
mix = {"text": 0.95, "code": 0.05}

# Phases 1 and 2 of Crystal are one line from the peak to 1.14% of it, which phase 1 leaves at 73.19%.
lr_peak = 0.006
lr = lr_peak
lr_end = 0.7319 * lr_peak
warmup = 0.1  # of the phase; Crystal: 86 steps, of 79,721
eval_every = 100
save_every = 100

# Measured 2026-11-22: two cores of an AMD EPYC (Zen 4), bf16, torch 2.13, default corpus, one seed, one run of three
# phases. Held-out bits per byte before -> after:
#     text 12.887 -> 1.933   code 13.358 -> 2.226   in 7.2 minutes, packages, corpus and six evaluations included
#
# The sweep that chose lr_peak and batch, on the corpus of other packages, 2026-11-20: text and code bits per byte after
# this phase alone, one seed, one core each, of the first held-out windows instead of windows from everywhere.
#     batch 4096: lr_peak 0.003: 1.952 2.066   0.006: 1.935 2.043   0.012 (Crystal's): 1.991 2.126
#     batch 2048: lr_peak 0.003: 1.951 2.053
