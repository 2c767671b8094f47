"""What ``ppexport bench`` writes, and a reader that refuses what it does not know.

Times are milliseconds and metrics have the names of ``vllm bench``: ttft (time to first token), tpot (time per output
token after the first), itl (inter-token latency), e2el (end-to-end latency); beside them the stages, and "other", the
time of a request that no stage took.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from ..models.errors import BackendError, RequestError
from ..models.files import write_text

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
except ImportError as err:
    raise BackendError(
        f"{err.name} is not installed; 'ppexport bench' needs: pip install 'ppexport[bench]'"
    ) from err

VERSION = 1
STAGES = ("preprocess", "prune", "vision", "prefill", "decode")
METRICS = ("ttft", "tpot", "itl", "e2el", *STAGES, "other")
STATISTICS = ("mean", "median", "p90", "p95", "p99")


Milliseconds = Annotated[float, Field(ge=0)]
Speeds = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]


class Model(BaseModel):
    """Immutable; a key that is missing, unknown or of another type is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Gpu(Model):
    """One NVIDIA GPU."""

    name: str
    driver: str
    memory_bytes: int | None
    clock_mhz: int | None  # of its multiprocessors, while measuring
    clock_max_mhz: int | None


class Machine(Model):
    """What it ran on."""

    cpu: str
    cores: int
    memory_bytes: int
    clock_mhz: float | None  # mean over the cores, while measuring
    governor: str | None  # how Linux chooses clocks
    gpu: Gpu | None
    system: str
    python: str
    packages: dict[str, str]


class Bundle(Model):
    """What was measured."""

    name: str
    sha256: str  # of bundle.json, which holds the hash of every other file
    family: str
    precision: str
    bytes: int
    device: str  # where it ran, and why there


class Item(Model):
    """One question about one image."""

    image: str
    sha256: str  # of its pixels, as the model sees them
    width: int  # as the model sees it
    height: int
    prompt: str
    expected: str | None  # the right answer, where one is known

    def judge(self, answer: str) -> bool | None:
        """Is it the expected answer, spaces around it aside? None where no answer is known."""
        return None if self.expected is None else answer.strip() == self.expected.strip()


class Options(Model):
    """What the user asked for; results are compared only for the same answer lengths and threads."""

    taus: tuple[float | None, ...]  # None: unpruned
    concurrency: tuple[int, ...]
    max_new_tokens: int
    ignore_eos: bool
    threads: int
    min_pixels: int
    max_pixels: int


class Request(Model):
    """One request, in milliseconds."""

    round: int
    item: int  # index of Workload.items
    start: float  # since the measurement began
    stages: dict[str, Milliseconds]  # of each of STAGES
    ttft: Milliseconds
    e2el: Milliseconds
    itl: tuple[Milliseconds, ...]  # between one token and the next
    kept: int
    total: int
    prompt_tokens: int
    output_tokens: int
    answer: str

    @field_validator("stages")
    @classmethod
    def _all_stages(cls, value: dict[str, float]) -> dict[str, float]:
        if set(value) != set(STAGES):
            raise ValueError(f"stages should be {', '.join(STAGES)}")
        return value

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first; None for an answer of one token."""
        return (self.e2el - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def other(self) -> float:
        """What of the end-to-end latency lies outside of every stage."""
        return max(0.0, self.e2el - sum(self.stages.values()))

    def in_stages(self, metric: str) -> float | None:
        """What of "ttft", "e2el" or "tpot" the stages took."""
        decode = self.stages["decode"]
        if metric == "tpot":
            return decode / (self.output_tokens - 1) if self.output_tokens > 1 else None
        return sum(self.stages.values()) - (decode if metric == "ttft" else 0.0)


class Interval(Model):
    """A statistic and its 95 % bootstrap confidence interval."""

    value: float
    low: float
    high: float


class Summary(Model):
    """One metric of one setting, in milliseconds."""

    n: int
    mean: Interval
    median: Interval
    p90: Interval
    p95: Interval
    p99: Interval


class Setting(Model):
    """All requests of one prune setting at one concurrency."""

    tau: float | None
    concurrency: int
    metrics: dict[str, Summary]
    request_throughput: float  # requests (which is images) per second
    output_throughput: float  # output tokens per second
    total_token_throughput: float  # prompt tokens, after pruning, and output tokens per second
    kept: int  # image tokens of one round
    total: int
    correct: int | None  # requests with the expected answer, of those that have one
    answered: int | None
    requests: Annotated[tuple[Request, ...], Field(min_length=1)]

    @property
    def name(self) -> str:
        """For people: "tau 0", "unpruned, concurrency 2"."""
        prune = "unpruned" if self.tau is None else f"tau {self.tau:g}"
        return prune if self.concurrency == 1 else f"{prune}, concurrency {self.concurrency}"


class Picture(Model):
    """An image with what was pruned of it."""

    item: int  # index of Result.items
    tau: float
    webp: str  # base64


class Speed(Model):
    """How fast the machine was at two fixed tasks, before every round and after the last."""

    memory_gb_per_s: Speeds  # reading an array
    gflop_per_s: Speeds  # multiplying numbers in the cache


class Result(Model):
    """One measurement of one bundle."""

    version: Literal[1]
    created: str  # ISO 8601
    ppexport: str
    machine: Machine
    bundle: Bundle
    workload: str
    items: Annotated[tuple[Item, ...], Field(min_length=1)]
    options: Options
    rounds: int
    warmup: int
    cold: Summary | None  # time to first token of a new process that loads the bundle; None: not measured
    settings: Annotated[tuple[Setting, ...], Field(min_length=1)]
    speed: Speed
    peak_rss_bytes: int
    peak_gpu_bytes: int | None
    pictures: tuple[Picture, ...]
    energy_joules: (
        dict[str, float] | None
    )  # of each power rail or GPU, where the machine tells; while measuring

    @model_validator(mode="after")
    def _known_items(self) -> Result:
        numbers = {r.item for s in self.settings for r in s.requests} | {p.item for p in self.pictures}
        if not numbers <= set(range(len(self.items))):
            raise ValueError(f"requests and pictures should be of items 0 to {len(self.items) - 1}")
        return self


def read(path: str | Path) -> Result:
    """A result file. Raises RequestError if it is absent, damaged, or of another version."""
    return parsed(loaded(path), path)


def loaded(path: str | Path) -> Any:
    """What a file of JSON holds. Raises RequestError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise RequestError(
            f"{path}: cannot be read ({err}), expected a file written by 'ppexport bench'"
        ) from err


def parsed(data: Any, path: str | Path) -> Result:
    """A result from the JSON of a file. Raises RequestError if it is damaged, or of another version."""
    version = data.get("version") if isinstance(data, dict) else None
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        todo = "upgrade ppexport" if newer else "measure again with 'ppexport bench'"
        raise RequestError(f"{path}: found version {version!r} of bench results, expected {VERSION}; {todo}")
    try:
        return Result.model_validate(data)
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RequestError(
            f"{path}: {where}: {first['msg'].lower()} ({err.error_count()} such), expected a file written by "
            "'ppexport bench'; measure again"
        ) from err


def write(result: Result, path: str | Path) -> None:
    """Write a result file. Raises SpaceError."""
    write_text(path, result.model_dump_json(indent=1) + "\n")
