"""What the host does for every token of an engine: the Python between two runs, calls to TensorRT and CUDA stubbed.

    python bench/host_time.py -o bench/results/host_time.json

A decoder with the layers, states and vocabulary of Qwen3-VL-2B, but narrow: "compiled" for the emulator of the tests,
whose runs and copies are then replaced by functions that do nothing. Sampling is measured by bench/sampling.py.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent))
import emulator
from machine import describe

import ppexport
from ppexport.build_bundle import build
from ppexport.exporters.random_checkpoint import random_config, write_random, write_text_files
from ppexport.runtime.backends import cuda
from ppexport.runtime.language import Inputs
from ppexport.trt_build import Options

NARROW = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "head_dim": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
GIVE_BACK = cuda.Memory.give_back
CAPACITY = 2048
PROMPT = 200  # tokens that are there before


def narrow(directory: Path) -> Path:
    """A checkpoint with as many layers, states and tokens as the 2B model."""
    config = random_config("qwen3_vl", "2b")
    config["text_config"] |= NARROW
    config["text_config"]["rope_scaling"]["mrope_section"] = [12, 10, 10]
    config["vision_config"] |= {"depth": 3, "deepstack_visual_indexes": [0, 1, 2], "out_hidden_size": 128}
    write_random(config, directory)
    write_text_files(directory)
    return directory


def without_work() -> None:
    """Runs and copies of the emulator do nothing from now on; addresses, shapes and captures are kept as ever."""
    done = (0,)
    for name in ("cudaMemcpyAsync", "cudaMemcpy2DAsync", "cudaMemsetAsync", "cudaStreamSynchronize"):
        setattr(emulator.Cuda, name, lambda *_: done)
    cuda.Memory.give_back = GIVE_BACK  # type: ignore[method-assign]  # without poison
    emulator.ICudaEngine.run = lambda *_: True  # type: ignore[method-assign]
    emulator.Cuda.cudaGraphLaunch = lambda *_: done  # type: ignore[method-assign]
    emulator.IExecutionContext.execute_async_v3 = lambda *_: True  # type: ignore[method-assign]
    emulator.IExecutionContext.set_tensor_address = lambda *_: True  # type: ignore[method-assign]
    emulator.IExecutionContext.set_input_shape = lambda *_: True  # type: ignore[method-assign]


def per_token(pipe: ppexport.Pipeline, tokens: int) -> list[float]:
    """Milliseconds of each run of a single token, behind a prompt."""
    language = pipe.language
    slots = language.slots(CAPACITY)
    axes = language.model.axes
    found = []
    for at in range(PROMPT, PROMPT + tokens):
        ids = np.array([[7]], np.int32)
        places = np.full((axes, 1, 1), at, np.int32)
        inputs = Inputs(ids, np.full((1, 1), -1, np.int32), places, np.array([at], np.int32))
        begin = time.perf_counter()
        language.run(slots, 0, [0], inputs, None)
        found.append((time.perf_counter() - begin) * 1e3)
    return found


@click.command()
@click.option("--tokens", default=1000, show_default=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
def main(tokens: int, output: Path) -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work, emulator.installed("tensorrt"):
        checkpoint = narrow(Path(work) / "checkpoint")
        pipes = {}
        for dialect in ("plain", "standard"):
            bundle = Path(work) / dialect
            options = Options(max_pixels=1 << 16, capacity=CAPACITY)
            build(checkpoint, bundle, "fp16", dialect, targets=["tensorrt"], options=options)
            pipes[dialect] = ppexport.load(bundle, "tensorrt")
        without_work()
        for dialect, pipe in pipes.items():
            per_token(pipe, 20)
            times = per_token(pipe, tokens)
            states = len(pipe.language.model.states)
            rows.append(
                {
                    "dialect": dialect,
                    "states": states,
                    "median_ms": round(median(times), 3),
                    "p99_ms": round(float(np.percentile(times, 99)), 3),
                }
            )
            print(rows[-1])
    found = {
        "machine": describe(),
        "backend": "tensorrt, emulated",
        "tokens": tokens,
        "capacity": CAPACITY,
        "rows": rows,
    }
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
