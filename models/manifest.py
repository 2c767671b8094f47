"""bundle.json: what a bundle says of itself. Written by the exporter, read by the runtime, checked strictly."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from .config import ModelConfig, Preprocessing
from .errors import BundleError, RequestError
from .families import FAMILIES
from .precision import BITS, BYTES, PARTS, Precision
from .pruners import PruneSetting, listed, pruners_of
from .strict import StrictError, from_json, to_json

SCHEMA = 7
FILE = "bundle.json"
MOST_SIDE = 1 << 20  # of a state
SMALL_FILE = (
    16 << 20
)  # files up to this size (bytes) are hashed on every load; larger ones are checked for size


@dataclass(frozen=True)
class Graph:
    """One ONNX graph of the bundle."""

    file: str  # the graph; its weights lie beside it in ``file`` + ".data", if it has any
    dialect: str  # see exporters/lowering/dialects.py
    also: dict[str, str] = field(default_factory=dict)  # other dialects of it -> file, on the same weights


@dataclass(frozen=True)
class Source:
    """The checkpoint a bundle was made from."""

    name: str  # of its directory, or on the Hugging Face hub
    revision: str  # its commit there, or ""
    sha256: dict[str, str]  # config.json and weight files -> hash


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of bundle.json."""

    schema: int
    family: str
    source: Source
    precision: Precision  # of the weights
    compute: str  # what the graphs calculate in: "fp32", "fp16" or "bf16"
    float32_kinds: dict[
        str, tuple[str, ...]
    ]  # graph -> what it calculates in float32 whatever ``compute`` says
    interface: str  # "text" (tokenizer and chat template are there) or "tokens"
    graphs: dict[str, Graph]  # ModelConfig.graphs
    model: ModelConfig
    preprocessing: Preprocessing
    prune: tuple[PruneSetting, ...]  # of requests that do not say; empty: nothing is pruned
    context: int  # longest sequence in tokens, prompt and answer together
    stop_tokens: tuple[int, ...]  # generation ends at any of these
    special_tokens: dict[str, str]  # what a chat template may ask for: "bos_token" and the like
    versions: dict[str, str]  # of the tools that made the bundle
    files: dict[str, FileRecord]  # every other file of the bundle

    def hashes(self, name: str) -> list[str]:
        """Of a graph that has weights: its own, that of the weights, and those of the graph in other dialects."""
        graph = self.graphs[name]
        return [self.files[file].sha256 for file in (graph.file, f"{graph.file}.data", *graph.also.values())]


def sha256(path: Path) -> str:
    """Hash of a file, read in blocks."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(4 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def write(manifest: Manifest, directory: Path) -> None:
    """Write bundle.json."""
    text = json.dumps(to_json(manifest), indent=1, ensure_ascii=False)
    (directory / FILE).write_text(text + "\n", encoding="utf-8")


def read(directory: Path) -> Manifest:
    """Read bundle.json; raises BundleError if it is absent, damaged or of another schema version."""
    path = directory / FILE
    if not path.is_file():
        raise BundleError(f"{directory}: found no {FILE}; expected a bundle made by 'ppexport build'")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise BundleError(f"{path}: is damaged ({err}); build the bundle again") from err
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        source = data.get("source") if isinstance(data, dict) else None
        name = source.get("name") if isinstance(source, dict) else None
        made_from = f", where CHECKPOINT is what it was made from ({name})" if isinstance(name, str) else ""
        again = f"build it again: ppexport build CHECKPOINT -o NEW_BUNDLE{made_from}"
        todo = "upgrade ppexport" if newer else again
        raise BundleError(f"{path}: found schema version {schema!r}, expected {SCHEMA}; {todo}")
    try:
        manifest = from_json(Manifest, data)
        _check(manifest)
    except StrictError as err:
        raise BundleError(f"{path}: {err}; build the bundle again") from err
    return manifest


def _check(manifest: Manifest) -> None:
    """Values that the types cannot hold; raises StrictError."""
    for key, found, allowed in (
        *((part, manifest.precision.of(part), (*BYTES, *BITS)) for part in PARTS),
        ("compute", manifest.compute, BYTES),
        ("interface", manifest.interface, ("text", "tokens")),
    ):
        if found not in allowed:
            raise StrictError(f"{key}: found {found!r}, expected one of: {', '.join(allowed)}")
    if manifest.family not in FAMILIES or manifest.model.family != manifest.family:
        raise StrictError(
            f"family: found {manifest.family!r}, expected one of: {', '.join(FAMILIES)}, as in model"
        )
    _check_model(manifest.model)
    if set(manifest.graphs) != set(manifest.model.graphs):
        expected = ", ".join(sorted(manifest.model.graphs))
        raise StrictError(f"graphs: found {sorted(manifest.graphs)}, expected {expected}")
    for name, graph in manifest.graphs.items():
        if set(graph.also) - ({"openvino"} if name == "vision" else set()):
            raise StrictError(
                f"graphs.{name}.also: found {sorted(graph.also)}, expected openvino, of vision only"
            )
    try:
        listed(list(pruners_of(manifest.prune)))
    except RequestError as err:
        raise StrictError(f"prune: {err}") from err
    needed = {file for graph in manifest.graphs.values() for file in (graph.file, *graph.also.values())}
    needed |= {f"{manifest.graphs[name].file}.data" for name in manifest.model.with_weights}
    needed |= {"tokenizer.json", "chat_template.jinja"} if manifest.interface == "text" else set()
    for name in sorted(needed - set(manifest.files)):
        raise StrictError(f"files: {name!r} is not listed")
    for name in manifest.files:
        if Path(name).name != name:
            raise StrictError(f"files: found {name!r}, expected plain file names")


def _check_model(model: ModelConfig) -> None:
    """Sizes that nothing could be computed with; raises StrictError."""
    for name, size in (
        ("patch", model.vision.patch),
        ("merge", model.vision.merge),
        ("vocab", model.text.vocab),
        ("width", model.text.width),
    ):
        if not 1 <= size < 1 << 31:
            raise StrictError(f"model: {name} is {size}, expected at least 1 and less than 2 ** 31")
    if model.vision.side % model.vision.patch:
        raise StrictError(f"model: side is {model.vision.side}, expected a multiple of patch")
    if 2 * sum(model.text.rope.sections) != model.text.rope.width:
        raise StrictError(
            f"model.text.rope: sections {model.text.rope.sections}, expected a sum of width / 2"
        )
    names = [state.name for state in model.states]
    if not names or len(set(names)) < len(names):
        raise StrictError(f"model.states: found {names!r:.80}, expected each state once")
    for state in model.states:
        letters = [n for n in state.shape if isinstance(n, str)]
        sizes = [n for n in state.shape if isinstance(n, int)]
        known = letters in (["slots"], ["slots", "M"]) and state.shape[0] == "slots"
        if (
            not known
            or state.dtype not in ("compute", "float32")
            or not all(1 <= n <= MOST_SIDE for n in sizes)
        ):
            raise StrictError(f"model.states: found {state}, expected shape slots, ..., with M at most once")
