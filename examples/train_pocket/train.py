"""Trains the pocket model: ``python examples/train_pocket/train.py -o OUT --state FILE``.

Needs ``ppexport[cpu,export,train]``.

The towers are the torch modules that are exported (exporters/towers/qwen_vit.py, exporters/decoders/attention.py).
Half of the samples are pruned (pred_2d, tau = 0) unless --unpruned.

With the language loss alone the pictures are ignored for long, so reading is taught first: the vision tower sees pages
of random characters, and two heads, dropped afterwards, predict for each half of each patch the character whose centre
lies in it, from the tower's last hidden state and from the merged token (a third one, where the token lies). The
attention heads start out looking at the four neighbours of a patch (through their biases and the rotary positions), as
a convolution would. Both together learn in hundreds of steps what otherwise takes thousands. Then the whole model
copies single lines of text, and only then it sees screens and questions.

A wrong "yes" says little about what to look at: with the answers alone, marks are not found for thousands of steps. So
one attention head in two layers of the decoder is also taught to look at what an answer is read from.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import click
import torch
from lessons import Reader, batches, line
from network import Pocket, pocket_config
from report import write_training
from save import save_checkpoint
from torch import Tensor, nn

from ppexport.models import qwen3_vl
from ppexport.workloads.screens import SKILLS


class Optimizer:
    """Muon for the matrices inside the layers, AdamW for everything else.

    Muon (Jordan et al. 2024; torch.optim.Muon) makes each matrix's update orthogonal. With AdamW alone reading took
    about three times as many steps.
    """

    def __init__(self, model: Pocket, rate: float):
        inside = lambda name: not any(part in name for part in ("head.", "table", "positions"))  # noqa: E731
        named = list(model.named_parameters())
        hidden = [p for n, p in named if p.ndim == 2 and inside(n)]
        tables = [p for n, p in named if p.ndim > 1 and not (p.ndim == 2 and inside(n))]
        vectors = [p for _, p in named if p.ndim <= 1]
        groups = [{"params": tables, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        muon = torch.optim.Muon(hidden, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        self.parts = [muon, torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))]

    def step(self, rate: float) -> None:
        """Apply the gradients and forget them."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> list[dict[str, Any]]:
        """To be saved."""
        return [part.state_dict() for part in self.parts]

    def load(self, saved: list[dict[str, Any]]) -> None:
        """What ``state`` gave."""
        for part, state in zip(self.parts, saved, strict=True):
            part.load_state_dict(state)


@dataclass
class Run:
    """Training in progress; ``save`` and ``resume`` keep all of it but the random state of torch, which is not used."""

    model: Pocket
    optimizer: Optimizer
    output: Path
    state: Path
    options: str = ""  # of the command line
    note: str = ""
    pruned_share: float = 0.5
    step: int = 0  # of all phases together
    seconds: float = 0.0  # before this process
    begin: float = field(default_factory=time.time)
    log: list[dict[str, Any]] = field(default_factory=list)

    def resume(self) -> None:
        """Continue from the saved state, if there is one."""
        if self.state.exists():
            saved = torch.load(self.state, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load(saved["optimizer"])
            self.step, self.seconds, self.log = saved["step"], saved["seconds"], json.loads(saved["log"])

    def save(self) -> None:
        """Write the state and the checkpoint; an interruption leaves the ones before."""
        saved = {"model": self.model.state_dict(), "optimizer": self.optimizer.state()}
        saved |= {"step": self.step, "seconds": self.elapsed(), "log": json.dumps(self.log)}
        torch.save(saved, self.state.with_suffix(".partial"))
        os.replace(self.state.with_suffix(".partial"), self.state)
        save_checkpoint(self.model, self.output)
        write_training(self.output, self.options, self.note, self.pruned_share, self.elapsed(), self.log)

    def elapsed(self) -> float:
        """Seconds of training so far, over all processes."""
        return self.seconds + time.time() - self.begin

    def update(self, loss: Tensor, rate: float) -> None:
        """One step of the optimizer."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step(rate)
        self.step += 1

    def report(self, row: dict[str, Any]) -> None:
        """Log and print one row."""
        row = {**row, "seconds": round(self.elapsed())}
        self.log.append(row)
        click.echo(json.dumps(row))


def teach_reading(run: Run, steps: int, rate: float) -> None:
    """Phase one: the vision tower alone, on pages of random characters."""
    rights: list[float] = []
    while run.step < steps:
        with torch.autocast("cpu", torch.bfloat16):
            loss, right = run.model.read_pages(Random(f"page {run.step}"), 64)
        run.update(loss, rate * min(1.0, (run.step + 1) / 100))
        rights.append(right)
        if run.step % 50 == 0:
            row = {"phase": "read", "step": run.step, "loss": round(loss.item(), 4)}
            run.report({**row, "characters": round(sum(rights) / len(rights), 4)})
            rights = []
        if run.step % 200 == 0:
            run.save()


def teach_copying(run: Run, first: int, steps: int, rate: float, reader: Reader) -> None:
    """Phase two: everything, on single lines of text; ``first`` is the step at which it began."""
    rights: list[float] = []
    while run.step < first + steps:
        rng = Random(f"line {run.step}")
        items = sorted((reader.item(line(rng), rng) for _ in range(128)), key=lambda item: len(item.ids))
        for group in (items[:64], items[64:]):
            with torch.autocast("cpu", torch.bfloat16):
                loss, auxiliary, _, found = run.model(group)
            run.update(loss + 0.3 * auxiliary, rate * min(1.0, (run.step - first + 1) / 100))
            rights += [s for _, s in reader.scores(group, found.numpy())]
        if run.step % 50 == 0:
            row = {"phase": "copy", "step": run.step - first, "loss": round(loss.item(), 4)}
            run.report({**row, "characters": round(sum(rights) / len(rights), 4)})
            rights = []
        if run.step % 200 == 0:
            run.save()


def teach_answering(run: Run, first: int, steps: int, positions: int, rate: float, reader: Reader) -> None:
    """Phase three: everything, on screens with questions; ``first`` is the step at which it began."""
    seen: dict[str, list[float]] = defaultdict(list)
    losses = []
    while (begin := run.step - first) < steps:
        for group in batches(begin, steps, 128, positions, reader):
            done = run.step - first
            progress = min(1.0, done / steps)
            with torch.autocast("cpu", torch.bfloat16):
                loss, auxiliary, looking, found = run.model(group)
            cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
            total = loss + (0.5 if progress < 0.3 else 0.2) * auxiliary + 0.3 * looking
            run.update(total, rate * min(1.0, (done + 1) / 200) * cosine)
            losses.append((loss.item(), auxiliary.item(), looking.item()))
            for skill, value in reader.scores(group, found.numpy()):
                seen[skill].append(value)
        done = run.step - first
        if done // 40 > begin // 40:
            means = (round(sum(v) / len(v), 4) for v in zip(*losses, strict=True))
            row = {
                "phase": "answer",
                "step": done,
                **dict(zip(("loss", "auxiliary", "looking"), means, strict=True)),
            }
            run.report(
                row | {skill: round(sum(seen[skill]) / max(1, len(seen[skill])), 3) for skill in SKILLS}
            )
            losses, seen = [], defaultdict(list)
        if done // 200 > begin // 200:
            run.save()
    run.save()


@click.command()
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The checkpoint directory."
)
@click.option(
    "--state", type=click.Path(path_type=Path), required=True, help="Saved progress; continues from it."
)
@click.option(
    "--read-steps", type=int, default=700, show_default=True, help="Of the first phase, in batches of 64."
)
@click.option(
    "--copy-steps", type=int, default=700, show_default=True, help="Of the second phase, in batches of 64."
)
@click.option("--steps", type=int, default=3600, show_default=True, help="Of the third phase.")
@click.option(
    "--positions", type=int, default=6400, show_default=True, help="Of a batch in the third phase, padded."
)
@click.option("--rate", type=float, default=3e-3, show_default=True, help="Highest learning rate.")
@click.option("--unpruned", is_flag=True, help="Train without pruned samples.")
@click.option("--note", default="", help="For TRAINING.md.")
@click.option("--threads", type=int, default=2, show_default=True)
def main(
    output: Path,
    state: Path,
    read_steps: int,
    copy_steps: int,
    steps: int,
    positions: int,
    rate: float,
    unpruned: bool,
    note: str,
    threads: int,
) -> None:
    """Train, printing loss and teacher-forced accuracy per skill, saving often."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = Pocket(qwen3_vl.QWEN3_VL.parse(pocket_config()))
    options = f"--read-steps {read_steps} --copy-steps {copy_steps} --steps {steps}"
    options += f" --positions {positions} --rate {rate:g}"
    options += f"{' --unpruned' if unpruned else ''} --threads {threads} -o OUT --state FILE"
    reader = Reader(0.0 if unpruned else 0.5)
    run = Run(model, Optimizer(model, rate), output, state, options, note, reader.pruned_share)
    run.resume()
    trained = sum(p.numel() for n, p in model.named_parameters() if "head." not in n)
    click.echo(f"{trained / 1e6:.2f} M parameters")
    teach_reading(run, read_steps, rate)
    teach_copying(run, read_steps, copy_steps, rate, reader)
    teach_answering(run, read_steps + copy_steps, steps, positions, rate, reader)


if __name__ == "__main__":
    main()
