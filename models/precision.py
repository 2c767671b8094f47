"""How the weights of a bundle are stored, part by part."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .dtype import BY_PRECISION
from .errors import CheckpointError

BYTES = {name: BY_PRECISION[name].nbytes for name in ("fp32", "fp16", "bf16")}  # per value
# per value; int4 in groups with a scale each, int8 too unless ``per_output``; w8a8 rounds the inputs of products, too
BITS = {"int8": 8, "int4": 4, "w8a8": 8}
ENGINES = ("standard", "plain")  # dialects that TensorRT compiles; see exporters/lowering/dialects.py
PARTS = ("language", "vision", "head", "embedding")
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Wanted:
    """What a user asks for; None is what goes well with the rest."""

    precision: str = (
        "auto"  # of the decoder's layers, and of what is not said: "auto", a key of BYTES or of BITS
    )
    vision: str | None = None
    head: str | None = None
    embedding: str | None = None
    group_size: int = 32
    symmetric: bool = True


@dataclass(frozen=True)
class Precision:
    """What each part is stored in: a key of BYTES or of BITS.

    Only matrices are stored in integers; vectors, the patch kernel and what a group does not divide are in ``base``.
    """

    base: str
    language: str  # the decoder's layers
    vision: str  # the tower and the mergers
    head: str  # hidden state -> logits
    embedding: str  # token -> vector
    group_size: int = 32  # inputs of a matrix that share a scale
    symmetric: bool = True  # without zero points
    calibrated: int = 0  # images that matrices in int4 were fitted to
    # int8 has a scale per output of a matrix: TensorRT expands groups before each product
    per_output: bool = False

    def of(self, part: str) -> str:
        """What a part (one of PARTS) is stored in."""
        found: str = getattr(self, part)
        return found

    @property
    def quantized(self) -> bool:
        """Is any part stored in integers?"""
        return any(self.uses(stored) for stored in BITS)

    def uses(self, stored: str) -> bool:
        """Is any part stored so?"""
        return any(self.of(part) == stored for part in PARTS)

    @property
    def in_groups(self) -> bool:
        """Is any part stored in groups?"""
        return any(self.grouped(stored) for stored in BITS if self.uses(stored))

    def grouped(self, stored: str) -> bool:
        """Are matrices of a kind stored in groups? Else integers have a scale per output."""
        return stored == "int4" or (stored == "int8" and not self.per_output)

    def for_openvino(self) -> Precision:
        """Of a tower that computes in bfloat16 beside float32; one that is stored in fp32 stays exact."""
        return replace(self, base="fp32" if self.vision == "fp32" else "bf16")

    def bytes_of(self, part: str, count: int) -> int:
        """What ``count`` values of a part take, with float32 scales."""
        stored = self.of(part)
        if stored in BYTES:
            return count * BYTES[stored]
        scales = 0 if not self.grouped(stored) else count // self.group_size * (4 if self.symmetric else 5)
        return count * BITS[stored] // 8 + scales

    def __str__(self) -> str:
        """For people: "bf16", or "int4, vision w8a8, head int8, embedding int8, groups of 32"."""
        others = [f"{part} {self.of(part)}" for part in PARTS[1:] if self.of(part) != self.language]
        zeros = "" if self.symmetric else " with zero points"
        rows = ["int8 with a scale per output"] if self.per_output and self.uses("int8") else []
        groups = [f"groups of {self.group_size}{zeros}"] if self.in_groups else []
        fitted = [f"fitted to {self.calibrated} images"] if self.calibrated else []
        return ", ".join([self.language, *others, *rows, *groups, *fitted])


def resolve(wanted: Wanted, base: str, dialect: str, tied: bool, engines: bool = False) -> Precision:
    """What to store, for a checkpoint in ``base`` whose head is (``tied``) its embedding table.

    "auto" keeps the checkpoint's dtype, but for ``engines``, which take bf16 for float32. With quantized layers, ONNX
    Runtime (dialect "ort") gets the other parts in 8 bits: vision in w8a8, which it calculates several times faster
    than floats, head and embedding in int8. For TensorRT the head is stored as the layers are, vision and embedding
    stay as they are: vision is not bound by reading weights there, and there is no lookup in tables of integers. So it
    is for ONNX Runtime on CUDA ("cuda"), where what is not in integers is in fp16 then: its matrices are not expanded
    to bf16; for engines it is in what ``wanted.vision`` says. Raises CheckpointError for what cannot be had.
    """
    for name, value in (("precision", wanted.precision), *((p, getattr(wanted, p)) for p in PARTS[1:])):
        if value is not None and value not in (*BYTES, *BITS) and (name, value) != ("precision", "auto"):
            what = name if name == "precision" else f"{name} precision"
            raise CheckpointError(f"{what} is {value!r}, expected auto, {', '.join((*BYTES, *BITS))}")
    if wanted.group_size not in GROUP_SIZES:
        raise CheckpointError(
            f"group size is {wanted.group_size}, expected one of: {', '.join(map(str, GROUP_SIZES))}"
        )
    layers = base if wanted.precision == "auto" else wanted.precision
    if layers in BYTES:
        base = layers
    elif dialect in ENGINES and wanted.vision in ("fp16", "bf16"):
        base = wanted.vision
    elif dialect != "ort" and base == "fp32":
        base = "bf16"  # engines calculate in 16 bits
    if dialect == "cuda" and layers in BITS:
        base = "fp16"
    if wanted.precision == "auto" and (engines or dialect == "cuda") and base == "fp32":
        base = layers = "bf16"
    integers = layers in BITS and dialect == "ort"
    vision = wanted.vision or ("w8a8" if integers else base)
    head = wanted.head or ("int8" if integers else layers)
    follows = head if tied and head in BYTES else base  # they are one table
    embedding = wanted.embedding or ("int8" if integers and (head in BITS or not tied) else follows)
    per_output = dialect in ENGINES
    found = Precision(
        base, layers, vision, head, embedding, wanted.group_size, wanted.symmetric, per_output=per_output
    )
    _check(found, wanted, dialect, tied)
    return found


def _check(found: Precision, wanted: Wanted, dialect: str, tied: bool) -> None:
    """Raise CheckpointError for what cannot be had."""
    stored = {found.of(part) for part in PARTS} & set(BYTES)
    if dialect != "ort" and not stored <= {found.base}:
        raise CheckpointError(
            f"found {' and '.join(sorted(stored | {found.base}))}, expected {found.base} only: graphs of dialect "
            f"{dialect} calculate in it"
        )
    if tied and found.head not in BITS and found.embedding != found.head:
        raise CheckpointError(
            f"the head is stored in {found.head} and the embedding in {found.embedding}, expected the same: they are "
            "one table in this checkpoint; quantize the head too, or neither"
        )
    if dialect == "cuda" and found.base == "fp32":
        raise CheckpointError(
            "dialect cuda is in 16 bits, expected fp16 or bf16: its attention takes no float32"
        )
    if dialect == "cuda" and found.quantized and found.base != "fp16":
        raise CheckpointError(
            f"found integers beside {found.base}, expected fp16 for dialect cuda; build it with --precision int4 or "
            "int8"
        )
    if dialect != "ort" and "w8a8" in (found.language, found.vision, found.head):
        raise CheckpointError("w8a8 is for CPUs (dialect ort), expected int8 or int4")
    if found.embedding in ("int4", "w8a8") or (found.embedding in BITS and dialect != "ort"):
        raise CheckpointError(
            f"the embedding cannot be stored in {found.embedding}, expected "
            f"{'int8 or ' if dialect == 'ort' else ''}{found.base}: there is no operator that looks up such a table"
        )
    if not found.in_groups and (wanted.group_size, wanted.symmetric) != (Wanted.group_size, Wanted.symmetric):
        grouped = "int4 (int8 has a scale per output for engines)" if found.per_output else "int8 and int4"
        raise CheckpointError(f"group size and asymmetric are for {grouped}, found {found}; leave them out")
    if dialect in ENGINES and found.in_groups and not wanted.symmetric:
        raise CheckpointError(
            "TensorRT takes no zero points; build with symmetric groups, or for ONNX Runtime"
        )
