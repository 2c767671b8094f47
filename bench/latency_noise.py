"""How times scatter here: several measurements of one bundle, which tests/test_latency_gate.py draws from.

    python bench/latency_noise.py -o tests/golden/latency_noise.npz

The pocket model on the documents, pruned and not. Of each run i: "tau 0.i" and "unpruned.i", milliseconds float32
[rounds, questions, stages], "memory.i" and "arithmetic.i", the speeds of the machine [rounds + 1]; "machine" is JSON.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import numpy as np

from ppexport.bench.measure import Plan, measure
from ppexport.bench.schema import STAGES
from ppexport.bench.workload import open_workload
from ppexport.build_bundle import build

POCKET = Path(__file__).parent.parent / "models" / "pocket"


@click.command()
@click.option("--runs", default=6, show_default=True)
@click.option("--duration", default=120.0, show_default=True, help="Seconds of each.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
def main(runs: int, duration: float, output: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as name:
        bundle = build(POCKET, Path(name) / "pocket.bundle")
        workload, questions = open_workload("documents", [], None)
        plan = Plan(
            duration=duration, cold=0, max_new_tokens=16, ignore_eos=True, max_pixels=600_000, pictures=False
        )
        for i in range(runs):
            result = measure(str(bundle), workload, questions, plan)
            for setting in result.settings:
                times = np.zeros((result.rounds, len(questions), len(STAGES)), np.float32)
                for r in setting.requests:
                    times[r.round, r.item] = [r.stages[stage] for stage in STAGES]
                arrays[f"{setting.name}.{i}"] = times.round(3)
            arrays[f"memory.{i}"] = np.array(result.speed.memory_gb_per_s, np.float32).round(2)
            arrays[f"arithmetic.{i}"] = np.array(result.speed.gflop_per_s, np.float32).round(2)
            medians = {s.name: round(s.metrics["e2el"].median.value, 2) for s in result.settings}
            print(i, result.rounds, medians, flush=True)
    np.savez_compressed(output, machine=np.array(result.machine.model_dump_json()), **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
