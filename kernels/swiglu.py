"""The gated unit of the MLP: SwiGLU (Shazeer, arXiv 2002.05202)."""

import torch.nn.functional as F


def swiglu(gate_up, gate_first=True):
    """silu(gate) * up on packed halves: gate_up (..., 2f) -> (..., f), same dtype.

    `gate_first` says which half passes through silu. Crystal's `fc(x) * silu(fc2(x))` is gate = fc2, up = fc.
    """
    gate, up = gate_up.chunk(2, dim=-1) if gate_first else gate_up.chunk(2, dim=-1)[::-1]
    return F.silu(gate) * up
