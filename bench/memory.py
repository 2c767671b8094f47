"""What fits on a board: what engines of the published sizes take, as ``ppexport plan --memory`` says of a bundle.

    python bench/memory.py -o bench/results/memory.json

From the shapes of the models and what each precision stores; no weights are needed. For one sequence of 2048 tokens and
images of up to a megapixel, dialect plain.
"""

from __future__ import annotations

import json
import types
from pathlib import Path

import click

from ppexport.device_memory import CUDA_CONTEXT, board, building_bytes, memory
from ppexport.exporters.random_checkpoint import random_config
from ppexport.exporters.weights.attach import weight_bytes
from ppexport.models import profiles
from ppexport.models.families import FAMILIES
from ppexport.models.precision import Wanted, resolve
from ppexport.runtime.pipeline import REUSE

MODELS = [
    ("qwen3_vl", "2b"),
    ("qwen3_5", "2b"),
    ("qwen2_vl", "2b"),
    ("qwen2_5_vl", "3b"),
    ("qwen3_vl", "4b"),
    ("qwen3_5", "4b"),
    ("qwen3_vl", "8b"),
]
PRECISIONS = ("int4", "int8", "fp16")
CAPACITY = 2048
PIXELS = 1 << 20


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
def main(output: Path) -> None:
    rows = []
    for family, shape in MODELS:
        model = FAMILIES[family].parse(random_config(family, shape))
        checkpoint = types.SimpleNamespace(family=FAMILIES[family], config=model)
        sizes = profiles.defaults(model, 32768, PIXELS, CAPACITY)
        for precision in PRECISIONS:
            stored = resolve(Wanted(precision), "bf16", "plain", model.text.tied_head, engines=True)
            need = memory(model, stored.base, weight_bytes(checkpoint, stored), sizes, "plain")  # type: ignore[arg-type]
            running = sum(need.values()) + CUDA_CONTEXT
            building = building_bytes(need["weights"])
            rows.append(
                {
                    "model": f"{family}:{shape}",
                    "precision": precision,
                    "mb": {name: round(size / 1e6) for name, size in need.items()},
                    "to_run_gb": round(running / 1e9, 2),
                    "to_run_and_keep_gb": round((running + REUSE) / 1e9, 2),
                    "to_build_gb": round(building / 1e9, 2),
                    "runs_on": board(running),
                    "builds_on": board(building),
                }
            )
            print(rows[-1])
    found = {"dialect": "plain", "capacity": CAPACITY, "max_pixels": PIXELS, "rows": rows}
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
