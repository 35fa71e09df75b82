"""Which operations run as Triton kernels, and how those are launched.

Everything here also works where Triton is not installed: then the kernels are plain functions that nobody calls. Triton
launches on the current device, so a process with several GPUs calls torch.cuda.set_device first.
"""

import os
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = SimpleNamespace(jit=lambda function: function), SimpleNamespace(constexpr=None)

HAS_TRITON = hasattr(triton, "__version__")
INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it too, when it is imported

# kernels=auto on an NVIDIA GPU: what runs in (eager mode, torch.compile). Inductor fuses norm and SwiGLU to the same
# bytes as we do and can go on fusing around them; it neither rotates in place nor keeps the logits to one buffer.
# Derived from bytes moved, not measured yet: `python bench.py --only kernels` prints this table from times.
AUTO = {
    "linear_ce": ("triton", "triton"),
    "rope": ("triton", "triton"),
    "norm": ("triton", "torch"),
    "swiglu": ("triton", "torch"),
}
using = dict.fromkeys(AUTO, "torch")  # what runs now; `choose` sets it for the process

# (operation, next power of two of the width, bytes an element) -> (rows or columns a program, num_warps, num_stages):
# where `python bench.py --only tune` found something faster than the formula beside the kernel.
TILES = {}


def choose(kernels, device, compiled):
    """Set what runs, by `kernels` (auto, triton or torch); returns a line about it; ValueError says why not.

    device: cuda, cpu or mps. compiled: whether the model goes through torch.compile.
    """
    interpreted = INTERPRET and kernels == "triton"
    if not HAS_TRITON:
        lack = "triton is not installed"
    elif interpreted or (device == "cuda" and torch.version.cuda and torch.cuda.get_device_capability() >= (8, 0)):
        lack = ""
    else:
        lack = "there is no NVIDIA GPU of the Ampere generation or later"
    if kernels == "triton" and lack:
        raise ValueError(f"kernels = triton, but {lack}; leave it at auto")
    if kernels == "auto" and not lack:
        using.update({op: ways[compiled] for op, ways in AUTO.items()})
        why = "the faster ones inside torch.compile" if compiled else "the faster ones without torch.compile"
    else:
        using.update(dict.fromkeys(AUTO, "triton" if kernels == "triton" else "torch"))
        why = lack if kernels == "auto" else f"kernels={kernels}" + " in the interpreter" * interpreted
    names = {way: ", ".join(op for op in using if using[op] == way) for way in ("triton", "torch")}
    return "; ".join(f"{way}: {ops}" for way, ops in names.items() if ops) + f" ({why})"


def runs_triton(op, x):
    """Whether `op` on tensor x is Triton's: the user's choice, if the kernels can take x. They compute in fp32."""
    return using[op] == "triton" and (x.is_cuda or INTERPRET) and x.dtype != torch.float64


def next_power_of_2(n):
    return 1 << max(0, n - 1).bit_length()


def tile(op, width, dtype, formula):
    """(rows or columns a program, num_warps, num_stages) for one launch."""
    return TILES.get((op, next_power_of_2(width), dtype.itemsize), formula)


def processors(x):
    """Streaming multiprocessors of the GPU that x is on; the interpreter is one."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
