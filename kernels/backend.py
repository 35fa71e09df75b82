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
# Derived from bytes moved, not measured yet: `python bench.py --gpu --only kernels` says how long each of them takes.
AUTO = {
    "linear_ce": ("triton", "triton"),
    "rope": ("triton", "triton"),
    "norm": ("triton", "torch"),
    "swiglu": ("triton", "torch"),
}
using = dict.fromkeys(AUTO, "torch")  # what runs now; `choose` sets it for the process

# (operation, next power of two of the width, bytes an element) -> (rows or columns a program, num_warps, num_stages):
# where `python bench.py --gpu --only tune` finds something faster than the formula beside the kernel.
TILES = {}


def use(choice):
    """Set what runs: triton or torch for all operations, or {operation: triton or torch} for some."""
    using.update(dict.fromkeys(AUTO, choice) if isinstance(choice, str) else choice)


def lack(device="cuda"):
    """Why kernels cannot run on a device (cuda, cpu, mps), or "" if they can."""
    if not HAS_TRITON:
        return "triton is not installed"
    if INTERPRET:  # which has kernels run on the CPU, whatever else is there
        return ""
    if device != "cuda":
        return f"the kernels are for NVIDIA GPUs and the device is {device}"
    if not torch.version.cuda or not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return "there is no NVIDIA GPU of the Ampere generation or later"
    return ""


def choose(kernels, device, compiled):
    """Set what runs, by `kernels` (auto, triton or torch); returns a line about it; ValueError says why not.

    device: cuda, cpu or mps. compiled: whether the model goes through torch.compile.
    """
    auto = kernels == "auto"
    why = lack(device) or ("the interpreter is for tests" if auto and INTERPRET else "")
    if kernels == "triton" and why:
        raise ValueError(f"kernels = triton, but {why}; leave it at auto")
    if auto and not why:
        use({op: ways[compiled] for op, ways in AUTO.items()})
        why = "AUTO in kernels/backend.py, " + ("with torch.compile" if compiled else "without torch.compile")
    else:
        use("triton" if kernels == "triton" else "torch")
        why = why if auto else f"kernels={kernels}"
    names = {way: ", ".join(op for op in using if using[op] == way) for way in ("triton", "torch")}
    return "; ".join(f"{way}: {ops}" for way, ops in names.items() if ops) + f" ({why})"


def runs_triton(op, x):
    """Whether `op` on tensor x is Triton's: the user's choice, unless x is on a CPU or in float64; kernels compute in
    fp32. Each operation has limits of its own beside."""
    return using[op] == "triton" and (x.is_cuda or INTERPRET) and x.dtype != torch.float64


def next_power_of_2(n):
    return 1 << max(0, n - 1).bit_length()


def tile(op, width, dtype, formula):
    """(rows or columns a program, num_warps, num_stages) for one launch."""
    return TILES.get((op, next_power_of_2(width), dtype.itemsize), formula)


def processors(x):
    """Streaming multiprocessors of the GPU that x is on; the interpreter is one."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
