"""A command as on a CPU with AMX, on one with AVX512-BF16 and VNNI: what OpenVINO executes there, and what comes out.

    python tests/emulated_amx.py ppexport eval BUNDLE --device vision=openvino
    python tests/emulated_amx.py python -m pytest -n 0 -p no:faulthandler tests/test_openvino.py

It says nothing of times: an instruction takes some microseconds. OpenVINO finds out what a CPU can do by two
instructions, CPUID and XGETBV. In a copy of its libraries these are no instructions any more, and the library that
emulated_amx.c makes answers in their place, as it does what those of AMX would do. At the end it is printed how many
there were: a product takes 16 cycles of a real CPU (Intel's optimization manual, "Intel AMX"). Wants gcc and objdump.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ppexport.runtime.backends import processor

SOURCE = Path(__file__).with_suffix(".c")
COMPILER = "gcc"
QUESTIONS = {"cpuid": b"\x0f\xa2", "xgetbv": b"\x0f\x01\xd0"}
NEVER = b"\x06"  # begins no instruction
ASK = ("libopenvino.so*", "libopenvino_intel_cpu_plugin.so")


def lacks() -> str | None:
    """What this machine lacks for it, None for nothing."""
    here = set(processor.features().split())
    missing = {"avx512_bf16", "avx512_vnni"} - here
    if missing:
        return f"the CPU has no {' and no '.join(sorted(missing))}"
    if "amx_tile" in here:
        return "the CPU has AMX itself"
    tools = [tool for tool in (COMPILER, "objdump") if shutil.which(tool) is None]
    if importlib.util.find_spec("openvino") is None:
        tools.append("openvino")
    return f"{' and '.join(tools)} not installed" if tools else None


def emulated(folder: Path) -> dict[str, str]:
    """The environment in which a process finds AMX; what that needs is put into ``folder`` (200 MB).

    What ``--device auto`` measures there is not kept.
    """
    library = folder / "emulated_amx.so"
    command = [COMPILER, "-O3", "-march=native", "-Wall", "-Werror", "-fPIC", "-shared"]
    subprocess.run([*command, "-o", str(library), str(SOURCE), "-ldl"], check=True)
    spec = importlib.util.find_spec("openvino")
    assert spec is not None
    assert spec.origin is not None
    copy = shutil.copytree(Path(spec.origin).parent, folder / "packages" / "openvino")
    for pattern in ASK:
        for each in copy.glob(f"libs/{pattern}"):
            withhold(each)
    first = {"LD_PRELOAD": str(library), "PYTHONPATH": str(copy.parent)}
    old = {name: os.environ[name] for name in first if os.environ.get(name)}
    environment = {
        **os.environ,
        **{name: f"{value}:{old.get(name, '')}".rstrip(":") for name, value in first.items()},
    }
    environment.pop("PYTHONFAULTHANDLER", None)  # would take what is no instruction for an error
    return {**environment, "XDG_CACHE_HOME": str(folder / "cache"), "AMX_COUNT": "1"}


def withhold(library: Path) -> None:
    """Make no instructions of those by which a library asks the CPU what it can do."""
    sections = subprocess.run(
        ["objdump", "-h", str(library)], check=True, capture_output=True, text=True
    ).stdout
    text = re.search(r"\s\.text\s+\w+\s+(\w+)\s+\w+\s+(\w+)", sections)
    assert text is not None, f"{library}: no section .text"
    shift = int(text[2], 16) - int(text[1], 16)  # from an address to a place in the file
    found = []
    command = ["objdump", "-d", "-j", ".text", "--no-show-raw-insn", str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listing:
        assert listing.stdout is not None
        for line in listing.stdout:
            if match := re.match(r"\s*([0-9a-f]+):\s+(cpuid|xgetbv)", line):
                found.append((int(match[1], 16) + shift, match[2]))
    with library.open("r+b") as file:
        for place, name in found:
            file.seek(place)
            assert file.read(len(QUESTIONS[name])) == QUESTIONS[name], f"{library}: no {name} at {place}"
            file.seek(place)
            file.write(NEVER)


def main() -> int:
    """Run the command that is given."""
    missing = lacks()
    if missing or len(sys.argv) < 2:
        print(f"AMX cannot be emulated: {missing}" if missing else __doc__, file=sys.stderr)
        return 2
    if shutil.which(sys.argv[1]) is None:
        print(f"{sys.argv[1]}: found no such command", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(sys.argv[1:], env=emulated(Path(folder)), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
