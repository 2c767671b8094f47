"""What Linux says of the CPU."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
BOARD = Path("/proc/device-tree/model")
VNNI = ("avx_vnni", "avx512_vnni")


def said(what: str) -> str:
    """Of the first core, the line that begins with ``what``; "" where the system does not say."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(what)), "")


def name() -> str:
    """The processor's, as its maker gives it; of ARM boards, which name none there, the board's."""
    if found := said("model name"):
        return found
    try:
        board = BOARD.read_text(encoding="utf-8", errors="replace")
    except OSError:
        board = ""
    return board.rstrip("\0") or platform.processor() or platform.machine()


def features() -> str:
    """What it can do, and on ARM which one it is."""
    return " ".join(said(what) for what in ("flags", "Features", "CPU part"))


def multiplies_bfloat16() -> bool:
    """Has this x86 CPU instructions for that? False where the system does not say, and on others."""
    return _has("avx512_bf16", "amx_bf16")


def saturates() -> bool:
    """Does this x86 CPU add two products of 8 bits in 16 (vpmaddubsw)? False where the system does not say."""
    return bool(said("flags")) and not _has(*VNNI)


def adds_up_bytes() -> bool:
    """Is it known that products of 8 bits add up exactly: by VNNI, or on a CPU that is not an x86 one?"""
    return _has(*VNNI) or platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686")


def _has(*flags: str) -> bool:
    """Does this x86 CPU say one of these of itself?"""
    return not set(said("flags").split()).isdisjoint(flags)
