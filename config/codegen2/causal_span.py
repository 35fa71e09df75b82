"""CodeGen2 (arXiv 2305.02309) at laptop size, the recipe of its release: code alone; half of the windows causal,
in the other half spans masked, and spelt out after each document.

As there, the block sums attention and MLP of one norm, a quarter of the channels rotates (in the 1B model half), head
and embedding are two matrices, and there is a z-loss; its MLP of four widths with GELU and biases is here our SwiGLU.
Ranges of mask ratio and span length, learning rate and batch were not published: codegen2's defaults are ours, and
lr_peak is what phase1.py's sweep chose for the sequential block. Betas, the cosine and its end at 10% are CodeGen-1's,
whose warmup is 1% of the steps; so short a run wants a longer one.
"""

size = "nano"
parallel, tie = True, False
budget = 1e6
batch = 4096 if size == "nano" else 0  # 0: the size's own
mix = {"code": 1, "text": 0}  # text is evaluated, not trained on
objective = {"code": codegen2(0.5)}
lr_peak = 0.006
lr = lr_peak
lr_end = lr_peak / 10
decay = "cosine"
warmup = 0.1
beta1, beta2 = 0.9, 0.999
z_loss = 1e-4
