"""The machine that a figure was measured on: what it is, how busy, and the least time that a job can take."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .timing import Clock, threads

# Instruction sets that decide which kernels can run.
_FLAGS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
)


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo, empty where there is none."""
    path = Path("/proc/cpuinfo")
    fields = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    return fields


def _caches(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int]:
    """Bytes of each data cache that the first core sees: {"L1": ..., "L2": ..., "L3": ...}."""
    sizes = {}
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for folder in sorted(root.glob("index*")):
        kind, level, size = ((folder / name).read_text().strip() for name in ("type", "level", "size"))
        if kind != "Instruction":
            sizes[f"L{level}"] = int(size.rstrip("KMG")) * units.get(size[-1], 1)
    return sizes


def machine() -> dict[str, Any]:
    """Processor, cores, instruction sets, caches, memory, versions and load average, ready for JSON."""
    info = _cpuinfo()
    flags = (info.get("flags") or info.get("Features") or "").split()
    result = {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "caches": _caches(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }
    if torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()
    return result


def others_busy() -> float:
    """Core-seconds that everything but this process has used since the machine started; 0 where unknown."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice, system, _, _, interrupts, soft, *_ = map(int, path.read_text().split("\n")[0].split()[1:])
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK") - time.process_time()


def last_level_cache() -> int:
    """Bytes of the largest cache; 32 MiB where the system does not say."""
    return max(_caches().values(), default=32 << 20)


def _best(function: Any, clock: Clock, seconds: float | int) -> float:
    """The shortest call within about `seconds`: noise only ever adds, so the least is the machine's own."""
    function()
    best, spent = float("inf"), 0.0
    while spent < seconds:
        start = clock()
        function()
        took = max(clock() - start, 1e-9)
        best, spent = min(best, took), spent + took
    return best


def bandwidth(
    count: int = 1, *, megabytes: int = 256, clock: Clock = time.perf_counter, seconds: float | int = 0.5
) -> float:
    """Bytes per second that `count` threads read from memory, the best of a sum and products with a vector.

    One of the products is this project's own, which reads four rows at a time: several streams bring more
    than one does.
    """
    from .. import ops  # which itself measures with this package

    data = torch.ones(megabytes << 6, 4096)
    vector, rows = torch.ones(4096), ops.store_rows(data)
    every = torch.ones(len(data), dtype=torch.bool)
    with threads(count), torch.inference_mode():
        readers = [data.sum, lambda: data @ vector]
        if ops.available():
            with ops.backend("native"):
                took = _best(lambda: ops.gather_linear_rows(vector, rows, every), clock, seconds)
        else:
            took = float("inf")
        took = min(took, *(_best(reader, clock, seconds) for reader in readers))
    return data.numel() * 4 / took


def peak_flops(
    count: int = 1,
    *,
    size: int = 1024,
    dtype: torch.dtype = torch.float32,
    clock: Clock = time.perf_counter,
    seconds: float | int = 0.5,
) -> float:
    """FLOPs per second of `count` threads in a square matrix product, the best that torch reaches."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    with threads(count), torch.inference_mode():
        return 2 * size**3 / _best(lambda: a @ b, clock, seconds)


@dataclass(frozen=True)
class Limits:
    """What the machine can do: bytes per second and FLOPs per second."""

    bytes_per_second: float | int
    flops_per_second: float | int


def limits(count: int = 1, *, clock: Clock = time.perf_counter, seconds: float | int = 0.5) -> Limits:
    """Measure bandwidth and peak with `count` threads."""
    options: dict[str, Any] = {"clock": clock, "seconds": seconds}
    return Limits(bandwidth(count, **options), peak_flops(count, **options))


@dataclass(frozen=True)
class Bound:
    """The work that no implementation can avoid: bytes to move and FLOPs to do."""

    bytes: float | int
    flops: float | int = 0

    def seconds(self, of: Limits) -> float:
        """The least time: the slower of moving the bytes and doing the FLOPs, perfectly overlapped."""
        return max(self.bytes / of.bytes_per_second, self.flops / of.flops_per_second)

    def kind(self, of: Limits) -> str:
        """Which of the two decides: "memory" or "compute"."""
        memory = self.bytes / of.bytes_per_second >= self.flops / of.flops_per_second
        return "memory" if memory else "compute"
