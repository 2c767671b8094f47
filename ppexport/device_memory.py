"""What engines take on a device, by what it is for: said before they are built, and by ``ppexport plan --memory``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from .compile_bundle import plan_sizes
from .models import profiles
from .models.config import DELTA_CHUNK, ModelConfig
from .models.dtype import BY_NAME, BY_PRECISION
from .models.errors import BundleError
from .models.precision import BYTES, ENGINES
from .models.profiles import Profiles
from .runtime.backends.cuda import rounded
from .runtime.bundle import open_bundle
from .runtime.pipeline import REUSE
from .table import aligned
from .trt_build import Options

CUDA_CONTEXT = (
    500 << 20
)  # bytes; libraries and kernels of CUDA and TensorRT, 0.3 to 0.6 GB by others' reports
SYSTEM = 1500 << 20  # bytes; Linux on a board without a desktop
BOARDS = (8, 16, 32, 64)  # GB, of the Jetson Orin series
USABLE = 0.95  # of that; the rest is the firmware's
# times the weights: what building takes in all, by the compiler of TensorRT-RTX (bench/results/build_rtx.json)
BUILDING = 2.5


def memory(model: ModelConfig, compute: str, weights: int, sizes: Profiles, dialect: str) -> dict[str, int]:
    """What running the engines will take on the device, in bytes, by what it is for.

    Activations are an estimate: the widest layer with its inputs and outputs. Attention keeps no scores, as
    TensorRT-RTX compiles it.
    """
    c = model.text
    v = model.vision
    width = BYTES[compute]
    kept = max(profile["K"][2] for profile in sizes.prefill)
    pixels = max(profile["H"][2] * profile["W"][2] for profile in sizes.prune) if model.sees else 0
    patches = max(profile["K"][2] for profile in sizes.vision) * v.merge**2
    prompt = max(profile["S"][2] for profile in sizes.prefill)
    mlp = 3 if v.mlp == "gated_silu" else 2
    # q, k, v and what comes of them, in windows that are filled up
    filled = 4 * v.width * profiles.most_windows(sizes, v) * (v.window * v.merge) ** 2
    tower = patches * (4 * v.width + mlp * v.ffn) + filled
    decoder = prompt * (4 * c.width + 3 * c.ffn) * width
    if (d := c.delta) is not None:  # in chunks, in float32: queries, keys, values and their products
        decoder = max(
            decoder, prompt * d.value_heads * (5 * d.key_dim + 3 * d.value_dim + 4 * DELTA_CHUNK) * 4
        )
    return {
        "weights": weights,
        "states": _state_bytes(model, BY_PRECISION[compute].name, sizes.capacity, dialect),
        "activations": max(tower * width, decoder),
        "image": rounded(min(3 * pixels, 3 * sizes.max_pixels)),
        "features": rounded((1 + model.levels) * kept * c.width * width),
        "logits": rounded(4 * c.vocab),
    }


def _state_bytes(model: ModelConfig, computed: str, capacity: int, dialect: str) -> int:
    """Of one sequence: caches stand in one buffer (plain) or each in its own, other states are there twice."""
    sizes = {
        state: math.prod(state.sized(slots=1, capacity=capacity)) * BY_NAME[state.stored(computed)].nbytes
        for state in model.states
    }
    caches = [size for state, size in sizes.items() if state.by_token]
    others = [2 * size for state, size in sizes.items() if not state.by_token]
    if dialect == "plain":
        caches = [sum(caches)]
    return sum(rounded(size) for size in [*caches, *others])


def told(
    bundle: str | Path,
    planned: Profiles | None = None,
    capacity: int | None = None,
    max_pixels: int | None = None,
) -> Iterator[str]:
    """The lines of ``ppexport plan --memory``, for engines of planned sizes, else of those that ``build`` would take.

    Raises BundleError for graphs of no engine, RequestError for sizes that do not fit.
    """
    directory, manifest = open_bundle(bundle)
    dialect = manifest.graphs["language"].dialect
    if dialect not in ENGINES:
        raise BundleError(
            f"{directory}: has graphs of dialect {dialect}, expected {' or '.join(ENGINES)}: memory is planned for "
            "engines; build it with --dialect standard or plain"
        )
    options = Options(max_pixels=max_pixels, capacity=capacity)
    sizes = plan_sizes(manifest.model, manifest.context, manifest.preprocessing, dialect, planned, options)
    weights = sum(record.bytes for name, record in manifest.files.items() if name.endswith(".onnx.data"))
    need = memory(manifest.model, manifest.compute, weights, sizes, dialect)
    running = sum(need.values()) + CUDA_CONTEXT
    building = building_bytes(weights)
    images = f", images of up to {sizes.max_pixels} pixels" if manifest.model.sees else ""
    yield (
        f"{manifest.family}, weights in {manifest.precision}; one sequence of {sizes.capacity} tokens{images}"
    )
    why = {
        "weights": "",
        "states": "caches of one sequence; as much again for each further one that is held",
        "activations": "of the widest layer, estimated",
    }
    rows = [[name, f"{size / 1e6:.0f} MB", why.get(name, "")] for name, size in need.items()]
    rows.append(["CUDA context", f"{CUDA_CONTEXT / 1e6:.0f} MB", "assumed"])
    rows.append(["to run", f"{running / 1e6:.0f} MB", ""])
    rows.append(
        [
            "kept for later",
            f"{REUSE / 1e6:.0f} MB",
            "at most, of past requests; --reuse, or reuse=, lowers it",
        ]
    )
    rows.append(["to build", f"{building / 1e6:.0f} MB", f"about {BUILDING:g} times the weights"])
    yield from aligned(rows)
    for what, size in (("run", running), ("run and keep", running + REUSE), ("build", building)):
        yield f"to {what}, beside a system of {SYSTEM / 1e9:.1f} GB: a board of {board(size)}"


def building_bytes(weights: int) -> int:
    """What compiling engines of so many bytes of weights takes, about."""
    return int(weights * BUILDING) + CUDA_CONTEXT


def board(size: int) -> str:
    """The smallest of BOARDS that has so many bytes beside its system: "8 GB"."""
    fits = [gb for gb in BOARDS if size + SYSTEM <= gb * 10**9 * USABLE]
    return f"{fits[0]} GB" if fits else f"more than {BOARDS[-1]} GB"
