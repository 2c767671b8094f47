"""TRAINING.md: what it took to train the checkpoint that lies beside it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from ppexport.workloads.screens import SKILLS

Row = dict[str, Any]
PHASES = {
    "read": "The vision tower alone reads pages of random characters, through heads that are dropped afterwards.",
    "copy": "Everything, on single lines of text that are to be transcribed.",
    "answer": "Everything, on screens with questions: small ones first, all sizes in the end.",
}
MEASURES = ("characters", *SKILLS)


def write_training(
    directory: Path, options: str, note: str, pruned_share: float, seconds: float, log: list[Row]
) -> None:
    """Write ``TRAINING.md`` and ``training.svg`` into ``directory``, from the rows that the trainer reported."""
    draw(log, directory / "training.svg")
    parts = [
        "# How this checkpoint was trained",
        f"```sh\npython examples/train_pocket/train.py {options}\n```",
        *([note] if note else []),
        f"Pruned samples (pred_2d, tau = 0): {pruned_share:.0%} in the copy and answer phases, drawn at random.",
        "Seeds: 0 for the initial weights; the samples of a step are drawn from its phase and number. Seeds of screens "
        "are below 1e9; from there on they are held out.",
        f"Time: {seconds / 60:.0f} minutes on {machine()}.",
        "![Loss and accuracy over the steps](training.svg)",
        "Accuracy here is measured on the training batches themselves, each seen once, with the right answer so far "
        "given (teacher forcing); a part of the samples is pruned. The accuracy of the finished model on held-out "
        "screens is in `docs/accuracy.md`.",
    ]
    for phase, what in PHASES.items():
        rows = [row for row in log if row["phase"] == phase]
        if rows:
            parts += [f"## {phase}", what, table(rows)]
    (directory / "TRAINING.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def table(rows: list[Row], most: int = 16) -> str:
    """A Markdown table of at most about ``most`` of the rows, the last one among them."""
    stride = -(-len(rows) // most)
    rows = rows[::-1][::stride][::-1]
    measures = [m for m in MEASURES if m in rows[-1]]
    looking = (
        ["looking"] if "looking" in rows[-1] else []
    )  # how little is looked at what an answer is read from
    lines = [f"| step | minutes | loss | {' | '.join([*looking, *measures])} |"]
    lines.append("| ---: " * (3 + len(looking) + len(measures)) + "|")
    for row in rows:
        shares = " | ".join(
            [f"{row[m]:.3f}" if m in row else "" for m in looking] + [f"{row[m]:.1%}" for m in measures]
        )
        lines.append(f"| {row['step']} | {row['seconds'] / 60:.0f} | {row['loss']:.3f} | {shares} |")
    return "\n".join(lines)


def draw(log: list[Row], path: Path) -> None:
    """Loss and accuracy against the step over all phases, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ppexport"
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    first = 0
    for phase in PHASES:
        rows = [row for row in log if row["phase"] == phase]
        if not rows:
            continue
        steps = [first + row["step"] for row in rows]
        above.plot(steps, [row["loss"] for row in rows], color="black")
        for measure in MEASURES:
            if measure in rows[-1]:
                below.plot(steps, [row[measure] for row in rows], label=f"{phase}: {measure}")
        above.axvline(first, color="lightgray")
        above.text(first, above.get_ylim()[1], f" {phase}", va="top")
        first = steps[-1]
    above.set_yscale("log")
    above.set_ylabel("loss")
    below.set_ylabel("accuracy")
    below.set_xlabel("step")
    if below.get_legend_handles_labels()[0]:
        below.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def machine() -> str:
    """The processor and the version of torch."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{torch.get_num_threads()} threads of {name} ({os.cpu_count()} cores), torch {torch.__version__}"
