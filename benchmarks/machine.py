"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def describe() -> dict[str, str]:
    """Return processor, cores, memory and versions."""
    names = ("torch", "transformers", "moeify", "safetensors", "triton")
    found = {name: _version(name) for name in names}
    return {
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "memory_gib": str(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30),
        "python": platform.python_version(),
        **{name: value for name, value in found.items() if value},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    clean = {key.strip(): value.strip() for key, value in fields.items()}
    name = clean.get("model name", platform.processor())
    return f"{name} (family {clean.get('cpu family', '?')}, model {clean.get('model', '?')})"
