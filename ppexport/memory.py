"""How much memory can still be taken: of the machine, and of the container that this process is in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/proc/self/cgroup")  # which groups this process is in
GROUPS = Path("/sys/fs/cgroup")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
NO_LIMIT = 1 << 60  # version 1 has no word for it, but a number near 2**63


def available_memory() -> int | None:
    """Bytes that can be taken without swapping or being killed, or None where the system does not say.

    The least of what Linux says of the machine (MemAvailable) and of what the limits of the process's control groups
    leave, those of all groups around them included (Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst).
    """
    found = [*_machine(), *_groups()]
    return min(found) if found else None


def _machine() -> Iterator[int]:
    for line in _text(MEMINFO).splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _groups() -> Iterator[int]:
    """What each limit leaves. A line of CGROUP is "number:controllers:/path"; those of version 2 are "0::/path"."""
    for line in _text(CGROUP).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (GROUPS / "memory", VERSION_1) if controllers else (GROUPS, VERSION_2)
        group = root / path.lstrip("/")
        # a container sees its own group as the root, under which the path of the host does not exist
        for directory in {root, *(g for g in (group, *group.parents) if g.is_relative_to(root))}:
            yield from _left(directory, *names)


def _left(directory: Path, limit: str, usage: str, inactive: str) -> Iterator[int]:
    """What a group's limit leaves: files that were read and are not in use can be given up."""
    most = _text(directory / limit).strip()
    taken = _text(directory / usage).strip()
    if not most.isdigit() or not taken.isdigit() or int(most) >= NO_LIMIT:
        return
    statistics = dict(
        line.split(maxsplit=1) for line in _text(directory / "memory.stat").splitlines() if " " in line
    )
    yield max(0, int(most) - int(taken) + int(statistics.get(inactive, 0)))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
