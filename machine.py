"""What a process runs on: its device, the arithmetic that serves it, and how fast that could be."""

import contextlib
import ctypes
import math
import re
import time

import torch

import processes
from configurator import ConfigError
from errors import UserError

# Dense bf16 matmul peak, FLOP/s, from the vendors' data sheets. A CPU's, or another card's, is measured.
PEAK = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
        "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "A10": 125e12}  # fmt: skip


def keep_memory(largest=1 << 30):
    """Have glibc keep freed memory, blocks up to `largest` bytes: it hands large ones back, and the system clears their
    pages for the next step."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc here
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, largest)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def find_device(cfg):
    """(device, dtype, compile?) from the knobs, `auto` resolved. Never float16: its range needs a loss scale."""
    device = cfg.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    elif not (device == "cpu" or getattr(torch, device).is_available()):
        raise ConfigError(f"device = {device}, but torch sees none; try --device=cpu")
    if device == "mps" and processes.world() > 1:
        raise ConfigError("several processes cannot share an Apple GPU; try --device=cpu, or one process")
    here = processes.local()[1]
    if device == "cuda" and here > torch.cuda.device_count():
        raise ConfigError(f"{here} processes on a machine with {torch.cuda.device_count()} GPUs; one each is all")
    if cfg.dtype != "auto":
        dtype = getattr(torch, cfg.dtype)
    elif device == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    elif device == "cpu":  # emulated bf16 is slower than fp32
        has = getattr(torch.cpu, "get_capabilities", dict)()
        dtype = torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32
    else:
        dtype = torch.float32
    return device, dtype, cfg.compile == "yes" or (cfg.compile == "auto" and device == "cuda")


def device_named(name):
    """What a person typed as a device, as torch.device; of several GPUs also the one that kernels are launched on.
    UserError if it is none, or not there."""
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        raise UserError(f"--device={name} is no device; cpu, cuda, cuda:1 and mps are") from None
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= here.get(device.type, 0):
        raise UserError(f"--device={name}, but torch sees {here.get(device.type, 0)} of this kind; try --device=cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    return device


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device, dtype, seconds=0.1):
    """FLOP/s of a 1024 (CPU) or 8192 (GPU) square matmul: the ceiling that this machine shows."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end or best == math.inf:
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def describe(device, dtype, compiled):
    """(one line about the machine, peak FLOP/s of all processes)."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    listed = next((peak for card, peak in PEAK.items() if re.search(rf"\b{card}\b(?! PCIe| Laptop)", name)), None)
    peak = listed if listed and dtype == torch.bfloat16 else matmul_rate(device, dtype)
    ceiling = f"{peak / 1e12:.4g} TFLOP/s {'data sheet' if peak == listed else 'measured matmul'}"
    mode, many = "compiled" if compiled else "eager", processes.world()
    each = f"{many} x {name}" if many > 1 else name
    ceiling = f"{many} x {ceiling}" if many > 1 else ceiling
    return f"device   {each}; {str(dtype)[6:]}, {mode}, torch {torch.__version__}; 100% MFU = {ceiling}", many * peak
