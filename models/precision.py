"""How the weights of a bundle are stored, part by part."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import CheckpointError

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}  # per value
BITS = {"int8": 8, "int4": 4}  # per value of a block; each block has a scale, too
PARTS = ("language", "vision", "head", "embedding")
BLOCKS = (32, 64, 128)


@dataclass(frozen=True)
class Wanted:
    """What a user asks for; None is what goes well with the rest."""

    precision: str = "auto"  # of the decoder's layers, and of what is not said: "auto", a key of BYTES or of BITS
    vision: str | None = None
    head: str | None = None
    embedding: str | None = None
    block: int = 32
    symmetric: bool = True


@dataclass(frozen=True)
class Precision:
    """What each part is stored in: "fp32", "fp16", "bf16", or in blocks of integers, "int8" or "int4".

    Only matrices are stored in blocks; vectors, the patch kernel and whatever a block does not divide are in ``base``.
    """

    base: str
    language: str  # the decoder's layers
    vision: str  # the tower and the mergers
    head: str  # hidden state -> logits
    embedding: str  # token -> vector
    block: int = 32  # inputs of a matrix that share a scale
    symmetric: bool = True  # without zero points

    def of(self, part: str) -> str:
        """What a part (one of PARTS) is stored in."""
        found: str = getattr(self, part)
        return found

    @property
    def quantized(self) -> bool:
        """Is any part stored in blocks?"""
        return any(self.of(part) in BITS for part in PARTS)

    def bytes_of(self, part: str, count: int) -> int:
        """What ``count`` values of a part take, with float32 scales."""
        stored = self.of(part)
        if stored in BYTES:
            return count * BYTES[stored]
        return count * BITS[stored] // 8 + count // self.block * (4 if self.symmetric else 5)

    def __str__(self) -> str:
        """For people: "bf16", or "int4, vision int8, head int8, embedding int8, blocks of 32"."""
        others = [f"{part} {self.of(part)}" for part in PARTS[1:] if self.of(part) != self.language]
        blocks = [f"blocks of {self.block}{'' if self.symmetric else ' with zero points'}"] if self.quantized else []
        return ", ".join([self.language, *others, *blocks])


def resolve(wanted: Wanted, base: str, dialect: str, tied: bool) -> Precision:
    """What to store, for a checkpoint in ``base`` whose head is (``tied``) its embedding table.

    "auto" keeps the checkpoint's dtype. With quantized layers, ONNX Runtime (dialect "ort") gets the other parts in
    int8, which it multiplies faster than floats; for TensorRT they stay as they are: vision is not bound by reading
    weights there, and tables of integers are not supported. Raises CheckpointError for what cannot be had.
    """
    for name, value in (("precision", wanted.precision), *((p, getattr(wanted, p)) for p in PARTS[1:])):
        if value is not None and value not in (*BYTES, *BITS) and (name, value) != ("precision", "auto"):
            what = name if name == "precision" else f"{name} precision"
            raise CheckpointError(f"{what} is {value!r}, expected auto, {', '.join((*BYTES, *BITS))}")
    if wanted.block not in BLOCKS:
        raise CheckpointError(f"block is {wanted.block}, expected one of: {', '.join(map(str, BLOCKS))}")
    layers = base if wanted.precision == "auto" else wanted.precision
    if layers in BYTES:
        base = layers
    elif dialect != "ort" and base == "fp32":
        base = "bf16"  # engines calculate in 16 bits
    others = "int8" if layers in BITS and dialect == "ort" else base
    vision, head = wanted.vision or others, wanted.head or (others if dialect == "ort" else layers)
    embedding = wanted.embedding or (others if head in BITS or not tied else base)
    found = Precision(base, layers, vision, head, embedding, wanted.block, wanted.symmetric)
    stored = {found.of(part) for part in PARTS} & set(BYTES)
    if dialect != "ort" and not stored <= {base}:
        raise CheckpointError(
            f"found {' and '.join(sorted(stored | {base}))}, expected {base} only: engines calculate in it"
        )
    if tied and head not in BITS and embedding != head:
        raise CheckpointError(
            f"the head is stored in {head} and the embedding in {embedding}, expected the same: they are one table in "
            "this checkpoint; quantize the head too, or neither"
        )
    if embedding == "int4" or (embedding in BITS and dialect != "ort"):
        raise CheckpointError(
            f"the embedding cannot be stored in {embedding}, expected "
            f"{'int8 or ' if dialect == 'ort' else ''}{base}: there is no operator that looks up such a table"
        )
    if dialect != "ort" and found.quantized and not wanted.symmetric:
        raise CheckpointError("TensorRT takes no zero points; build with symmetric blocks, or for ONNX Runtime")
    return found
