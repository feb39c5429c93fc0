"""THE MACHINE: what decides the numbers besides the code."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from harness import peers
from harness.limit import FLAGS, compiler


def facts() -> dict[str, Any]:
    """Return what the machine is."""
    found = compiler()
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "caches": _caches(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "huge_pages": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "compiler": _first_line([found, "--version"]) if found else None,
        "compiler_flags": " ".join(FLAGS),
    }


def versions() -> dict[str, str]:
    """Return the versions of what is compared."""
    found = {"python": platform.python_version()}
    for package in ["polyak", *peers.packages()]:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def load() -> float:
    """Return how many processes wanted to run in the last minute."""
    return os.getloadavg()[0]


def free_bytes() -> int:
    """Return how much memory a process could still have."""
    available = _field("/proc/meminfo", "MemAvailable")
    if available:
        return int(available.split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _field(path: str, name: str) -> str | None:
    file = Path(path)
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def _chosen(path: str) -> str | None:
    """Return the word in brackets."""
    file = Path(path)
    return file.read_text().partition("[")[2].partition("]")[0] if file.exists() else None


def _caches() -> dict[str, str]:
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    found = {}
    for index in sorted(folder.glob("index*")):
        level, kind, size = (
            (index / name).read_text().strip() for name in ("level", "type", "size")
        )
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def _first_line(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[
        0
    ]
