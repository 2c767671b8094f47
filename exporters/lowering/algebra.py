"""Formulas as graphs: float32 values that are added, multiplied and compared like arrays of numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from .onnx_writer import Ops


class Term:
    """A float32 value of a graph under construction. Comparisons give 1 and 0, in float32, too."""

    def __init__(self, op: Ops, value: ir.Value):
        self.op = op
        self.value = value

    def _of(self, op_type: str, *inputs: ir.Value) -> Term:
        return Term(self.op, self.op(op_type, *inputs))

    def _other(self, other: Term | float) -> ir.Value:
        return other.value if isinstance(other, Term) else self.op.const(float(other))

    def __add__(self, other: Term | float) -> Term:
        return self._of("Add", self.value, self._other(other))

    def __sub__(self, other: Term | float) -> Term:
        return self._of("Sub", self.value, self._other(other))

    def __rsub__(self, other: float) -> Term:
        return self._of("Sub", self._other(other), self.value)

    def __mul__(self, other: Term | float) -> Term:
        return self._of("Mul", self.value, self._other(other))

    __radd__ = __add__
    __rmul__ = __mul__

    def __truediv__(self, other: Term | float) -> Term:
        return self._of("Div", self.value, self._other(other))

    def __matmul__(self, other: Term) -> Term:
        return self._of("MatMul", self.value, other.value)

    def __gt__(self, other: Term | float) -> Term:
        return self._truth("Greater", other)

    def __lt__(self, other: Term | float) -> Term:
        return self._truth("Less", other)

    def equals(self, other: Term | float) -> Term:
        """1 where both are equal."""
        return self._truth("Equal", other)

    def _truth(self, op_type: str, other: Term | float) -> Term:
        found = self.op(op_type, self.value, self._other(other))
        return Term(self.op, self.op("Cast", found, to=ir.DataType.FLOAT))

    @property
    def T(self) -> Term:
        """Of a matrix, rows and columns exchanged."""
        return Term(self.op, self.op("Transpose", self.value, perm=[1, 0]))

    def map(self, op_type: str) -> Term:
        """An operator of one input, such as "Sqrt"."""
        return self._of(op_type, self.value)

    def clip(self, low: Term | float | None = None, high: Term | float | None = None) -> Term:
        """Not under ``low``, not over ``high``."""
        found = self if low is None else self._of("Max", self.value, self._other(low))
        return found if high is None else self._of("Min", found.value, self._other(high))

    def over(self, what: str, *axes: int) -> Term:
        """ "Sum", "Mean", "Max" or "Min" over axes, which stay with length 1; over all without any."""
        given = [self.op.ints(axes)] if axes else []
        return Term(self.op, self.op(f"Reduce{what}", self.value, *given, keepdims=1))

    def running(self, axis: int) -> Term:
        """Sums up to and including each place."""
        return self._of("CumSum", self.value, self.op.const(axis))

    def where(self, yes: Term | float, no: Term | float) -> Term:
        """``yes`` where this is 1, ``no`` where it is 0."""
        condition = self.op("Cast", self.value, to=ir.DataType.BOOL)
        return self._of("Where", condition, self._other(yes), self._other(no))


def repeat(
    op: Ops, name: str, times: int, state: Sequence[Term], body: Callable[..., Sequence[Term]]
) -> list[Term]:
    """A Loop of so many steps; ``body`` gets the state and gives the next one."""
    inner = Ops(f"{name}_")
    step = ir.val(f"{name}_step", ir.DataType.INT64, [])
    go = ir.val(f"{name}_go", ir.DataType.BOOL, [])
    inputs = [ir.val(f"{name}_in_{i}", ir.DataType.FLOAT) for i in range(len(state))]
    found = body(*(Term(inner, value) for value in inputs))
    on = inner("Identity", go)
    on.type = ir.TensorType(ir.DataType.BOOL)
    on.shape = ir.Shape([])
    outputs = [term.value for term in found]
    for value in outputs:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([step, go, *inputs], [on, *outputs], nodes=inner.nodes, name=name)
    always = op("Cast", op.const(1), to=ir.DataType.BOOL)
    made = op.multi("Loop", len(state), op.const(times), always, *(term.value for term in state), body=graph)
    return [Term(op, value) for value in made]
