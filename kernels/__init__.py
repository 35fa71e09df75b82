"""The five operations a transformer step spends its time in, besides plain matrix products.

One file each; the model calls nothing else. Every file holds the readable PyTorch version, which is also what runs on a
CPU, and the Triton kernels that must agree with it; backend.py says which of them runs. product.py, for the products
of several micro-steps, needs no kernel of ours.
"""

from kernels.attention import attention, batch_mask, dense_mask
from kernels.linear_ce import linear_ce
from kernels.norm import add_norm
from kernels.rope import rope_qkv_, rope_tables
from kernels.swiglu import swiglu

__all__ = ["add_norm", "attention", "batch_mask", "dense_mask", "linear_ce", "rope_qkv_", "rope_tables", "swiglu"]
