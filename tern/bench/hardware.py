"""What the system says of itself: processor, memory, disk, ports. Reads /proc and asks the system; imports no torch."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
from pathlib import Path

CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
"""What kernels for x86 are chosen by, as /proc/cpuinfo spells it."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CPUINFO = Path("/proc/cpuinfo")
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def processor_name() -> str:
    """The processor as the system names it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def processor_flags() -> list[str]:
    """Those of `CPU_FLAGS` that this processor has."""
    present = set(_cpuinfo("flags").split())
    return [flag for flag in CPU_FLAGS if flag in present]


def memory_bytes() -> int:
    """The machine's memory, bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_limit() -> int | None:
    """What the control group allows, bytes; None for no limit."""
    try:
        limit = _CGROUP_LIMIT.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(limit) if limit.isdigit() else None


def nvidia_driver() -> str | None:
    """The version of NVIDIA's driver, "unknown" if it only shows by its tool, None without one."""
    try:
        text = _NVIDIA_DRIVER.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown" if shutil.which("nvidia-smi") else None
    found = re.search(r"\d+\.\d+(\.\d+)*", text)
    return found[0] if found else "unknown"


def disk_free(path: Path) -> int:
    """Bytes free where `path` lies, or would."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this port of 127.0.0.1 now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that only waits for stragglers is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _cpuinfo(field: str) -> str:
    """The first processor's value of a field; empty if there is none."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == field), "")
