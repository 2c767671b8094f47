"""Gives a named axis of a serialized ONNX model a size, without the onnx package (a device that compiles has none).

Field numbers: onnx/onnx.proto (ModelProto.graph 7; GraphProto.input 11, output 12; ValueInfoProto.type 2;
TypeProto.tensor_type 1; Tensor.shape 2; TensorShapeProto.dim 1; Dimension.dim_value 1, dim_param 2). Everything else is
copied as it is. Encoding: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator

PATHS = {(7, 11, 2, 1, 2, 1), (7, 12, 2, 1, 2, 1)}  # of the axes of inputs and outputs
PREFIXES = {path[:n] for path in PATHS for n in range(1, 7)}


def set_axis(model: bytes, name: str, size: int) -> bytes:
    """``model`` with every input and output axis called ``name`` of fixed ``size``."""
    return _message(memoryview(model), (), name.encode(), size)


def _message(data: memoryview, path: tuple[int, ...], name: bytes, size: int) -> bytes:
    if path in PATHS:
        named = any(field == 2 and data[start:end] == name for field, _, start, end, _ in _fields(data))
        return b"\x08" + _varint(size) if named else bytes(data)
    parts = []
    for field, begin, start, end, wire in _fields(data):
        if wire == 2 and (*path, field) in PREFIXES:
            inner = _message(data[start:end], (*path, field), name, size)
            parts += [_varint(field << 3 | 2), _varint(len(inner)), inner]
        else:
            parts.append(bytes(data[begin:end]))
    return b"".join(parts)


def _fields(data: memoryview) -> Iterator[tuple[int, int, int, int, int]]:
    """(field number, begin, start of the value, end, wire type) of each field. Raises ValueError if it is cut off."""
    at = 0
    while at < len(data):
        begin = at
        key, at = _read_varint(data, at)
        field = key >> 3
        wire = key & 7
        if wire == 0:
            start = at
            _, at = _read_varint(data, at)
        elif wire == 2:
            length, start = _read_varint(data, at)
            at = start + length
        elif wire in (1, 5):
            start = at
            at = at + (8 if wire == 1 else 4)
        else:
            raise ValueError(f"wire type {wire} at byte {begin}")
        if at > len(data):
            raise ValueError(f"field {field} at byte {begin} is cut off")
        yield field, begin, start, at, wire


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError(f"no number at byte {at}")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at = at + 1
        shift = shift + 7
        if byte < 0x80:
            return value, at


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
