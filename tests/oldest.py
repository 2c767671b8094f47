"""Run-time tests and commands with the lowest version of every run-time dependency that setup.cfg names.

    python tests/oldest.py [PYTHON]

makes an environment in build/oldest, with PYTHON (by default this one); the bundles are built by this environment.
"""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "oldest"
EXTRAS = ("cpu", "bench", "pdf", "serve")  # beside what is always installed
RUNTIME_TESTS = (
    "golden_e2e",
    "text",
    "inspect",
    "selector",
    "trace",
    "sampling",
    "engine",
    "until",
    "pdf",
    "chat",
    "server",
    "grammar",
    "cli",
    "privacy",
    "prunesid",
)
TOOLS = ("pytest>=9,<10", "pytest-xdist>=3.6,<4", "hypothesis>=6.130,<7", "openai>=3.57,<4")


def lowest(text: str) -> list[str]:
    """Requirements such as "numpy>=1.24,<3" -> "numpy==1.24", one a line.

    Raises ValueError for one without a lowest version: nobody would know what was tested.
    """
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        match = re.fullmatch(r"([\w.-]+)>=([\d.]+),<[\d.]+", line)
        if match is None:
            raise ValueError(f"setup.cfg: found {line!r}, expected NAME>=LOWEST,<HIGHEST")
        found.append(f"{match[1]}=={match[2]}")
    return found


def requirements(*extras: str) -> list[str]:
    """The lowest version of what some extras name."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    parts = [lowest(config["options.extras_require"][extra]) for extra in extras]
    return [each for part in [lowest(config["options"]["install_requires"]), *parts] for each in part]


def run(*command: object, expected: int = 0) -> None:
    print("$", *command, flush=True)
    done = subprocess.run([str(part) for part in command], cwd=WORK)
    if done.returncode != expected:
        sys.exit(f"exit code {done.returncode}, expected {expected}")


def main(python: str) -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    run(sys.executable, ROOT / "tests" / "bundles.py", WORK / "bundles")
    run(python, "-m", "venv", "--clear", "env")
    here = WORK / "env" / "bin" / "python"
    pip = (here, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    run(*pip, "--upgrade", "pip")
    run(*pip, *requirements(*EXTRAS), *TOOLS)
    run(*pip, "--no-deps", ROOT)
    run(here, "-m", "pip", "--disable-pip-version-check", "list")
    screen, pocket = ROOT / "docs" / "settings.png", WORK / "bundles" / "pocket"
    ppexport = (here, "-m", "ppexport")
    run(*ppexport, "run", pocket, "-i", screen, "What is the Region?", "What is the Brightness?")
    run(*ppexport, "inspect", screen)
    run(*ppexport, "inspect", screen, "--method", "unique")
    run(*ppexport, "eval", pocket, "-n", 3, "--skills", "read", "--tau", 0, "--tau", 0.05)
    run(*ppexport, "bench", pocket, "-i", screen, "--runs", 2, "--cold", 1, "-n", 8, "-q", "-o", "base.json")
    run(*ppexport, "bench", "compare", "base.json", "base.json", expected=3)  # two rounds are too few to tell
    tests = [ROOT / "tests" / f"test_{name}.py" for name in RUNTIME_TESTS]
    run(
        here,
        "-m",
        "pytest",
        "-c",
        ROOT / "pyproject.toml",
        "--bundles",
        "bundles",
        "-m",
        "not newest and not slow",
        *tests,
    )
    run(*pip, *requirements("openvino"))
    run(*ppexport, "verify", pocket, "--against-cpu", "--device", "vision=openvino", "-i", screen)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else sys.executable)
