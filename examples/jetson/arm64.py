"""ppexport on 64-bit ARM without a board: QEMU runs Debian's Python for arm64 with packages as a Jetson would get them.

    python examples/jetson/arm64.py my.bundle -i screen.png "What is the total?"

Needs apt of Debian or Ubuntu and qemu-user-static. Nothing is installed on the machine: all of it lies in --work. The
commands are those of a board: doctor, inspect, run, plan. It shows that packages install, load and answer; how long
they take means nothing. Exit code 77: something that it needs is not here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
QEMU = "qemu-aarch64-static"
# onnxruntime 1.31 does not load in QEMU 7.2, which knows no CPU vendor; that is not known of boards
PACKAGES = ["onnxruntime==1.26.0"]
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
MISSING = 77


def unpack_python(work: Path) -> Path:
    """Debian's python3 for arm64 and what it needs, unpacked into a folder. Returns the interpreter."""
    root = work / "root"
    apt = work / "apt"
    for folder in (root, apt / "state" / "lists" / "partial", apt / "cache" / "archives" / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()  # nothing is installed there, so everything is fetched
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "Dir::State": apt / "state",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "Debug::NoLocking": "1",
    }
    command = [
        "apt-get",
        "-qq",
        *(part for key, value in options.items() for part in ("-o", f"{key}={value}")),
    ]
    subprocess.run([*command, "update"], check=True)
    install = ["install", "--yes", "--download-only", "--no-install-recommends", "python3", "libstdc++6"]
    subprocess.run([*command, *install], check=True)
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)
    return next(path for path in sorted((root / "usr" / "bin").glob("python3.*")) if path.name[-1].isdigit())


def install(work: Path, version: str) -> Path:
    """This project and its packages as wheels for ARM. Returns the folder for PYTHONPATH."""
    site = work / "site"
    shutil.rmtree(site, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels = work / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    # built from a copy: a build leaves files behind
    source = work / "source"
    shutil.rmtree(source, ignore_errors=True)
    kept = ("ppexport", "exporters", "runtime", "models")
    for name in kept:
        left_out = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(REPOSITORY / name, source / name, ignore=left_out)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(wheels), str(source)], check=True)
    platforms = [part for name in PLATFORMS for part in ("--platform", name)]
    where = [
        "--target",
        str(site),
        "--python-version",
        version,
        "--implementation",
        "cp",
        "--only-binary",
        ":all:",
    ]
    found = [str(wheel) for wheel in wheels.glob("*.whl")]
    subprocess.run([*pip, "install", *where, *platforms, *PACKAGES, *found], check=True)
    return site


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("question")
    parser.add_argument("-i", "--image", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/arm64"))
    given = parser.parse_args()
    for tool in (QEMU, "apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            print(f"{tool} is not here; on Debian and Ubuntu: apt install qemu-user-static", file=sys.stderr)
            sys.exit(MISSING)
    work = given.work.resolve()
    python = unpack_python(work)
    site = install(work, python.name.removeprefix("python"))
    emulated = [QEMU, "-L", str(work / "root"), str(python), "-m", "ppexport"]
    bundle, image = str(given.bundle.resolve()), str(given.image.resolve())
    commands = (
        ["doctor", bundle],
        ["inspect", image],
        ["run", bundle, "-i", image, given.question],
        ["plan", image, "--bundle", bundle, "-o", str(work / "profiles.json")],
    )
    for command in commands:
        print(f"$ ppexport {' '.join(command)}", flush=True)
        done = subprocess.run([*emulated, *command], env={**os.environ, "PYTHONPATH": str(site)}, check=False)
        if done.returncode:
            sys.exit(f"ppexport {command[0]} ended with {done.returncode}")


if __name__ == "__main__":
    main()
