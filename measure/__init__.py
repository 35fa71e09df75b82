"""How fast it is, and what the machine would allow. `bench.py` at the root is the command.

table.py      rows of measurements: timed side by side, printed, kept
train.py      whole training steps on a GPU, beside arithmetic on paper
kernels.py    the five operations beside eager PyTorch, torch.compile and Liger; their launch parameters
processes.py  sharding and checkpoints
gpu.py        a GPU's first ten minutes: is everything right, how fast is it, and why
"""
