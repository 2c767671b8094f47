"""What a process says of itself, in the Python of whichever program it measures: packages, peak of memory."""

import importlib.metadata


def versions(*names: str) -> dict[str, str]:
    """Those of the packages that are installed."""
    installed = {}
    for name in names:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def peak() -> int:
    """The most memory that this process had, in bytes."""
    return _status("VmHWM")


def held() -> int:
    """The memory that this process has, in bytes, mapped files included."""
    return _status("VmRSS")


def _status(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
