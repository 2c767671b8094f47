"""PruneSID as an ONNX graph: semantic groups of tokens, redundant ones of a group suppressed, a budget shared out.

Algorithm: "Prune Redundancy, Preserve Essence" (PruneSID) as its authors' code has it. Each token belongs to the
principal component on which it loads most; in a group, tokens that resemble a better one are suppressed; every group
gets a share of the budget by how many are left of it.

The components come from subspace iteration from a fixed start, with Rayleigh-Ritz and eigenvectors by simultaneous
Jacobi rotations: matrix products and elementwise operators in float32, the same in every run. Suppression is the
fixpoint of "kept if no kept one suppresses it", quotas are a closed form, and equal values are ordered by index. So
there is no SVD, no NonZero and no TopK, which TensorRT lacks, limits or leaves open.

T tokens, C values of each, G groups, p directions, more of them than groups so that all of these are right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from ...models.pruners.prunesid import GROUPS, INFORMATION, MILLIONTHS, MOST_DIRECTIONS
from ...models.start_block import start_block
from ..lowering.algebra import Term, repeat
from ..lowering.dialects import Dialect
from ..lowering.onnx_writer import Ops
from .pixelprune import finish, output

if TYPE_CHECKING:
    from . import Sizes

ITERATIONS = 6  # of the subspace
ROTATIONS = 24  # Jacobi steps, from any matrix to float32's precision
POLISH = 4  # and from one that is nearly diagonal
ROUNDS = 16  # of suppression: a chain of tokens, each suppressed by the one before, was never longer than 11
LEAST = 16.0  # tokens that an image gets of a dynamic budget, if that has them
UNSORTED = 150.0  # the authors' code for Qwen keeps the order of groups up to so many tokens
FAR = 1e9  # beyond every index


@dataclass(frozen=True)
class Budget:
    """How many tokens to keep, and how the authors' formulas count them."""

    budget: Term  # [1]
    need: Term  # [1], with the class token where there is one
    groups: Term  # [1]


def graphs(sizes: Sizes, dialect: Dialect) -> dict[str, ir.Model]:
    """See exporters/pruners/__init__.py; "llava" for towers that score by their class token."""
    variants = ("qwen", "llava") if sizes.hidden else ("qwen",)
    found = {f"prunesid.{variant}": prunesid_graph(variant, sizes, dialect) for variant in variants}
    return found | {INFORMATION: information_graph(sizes, dialect)}


def prunesid_graph(variant: str, sizes: Sizes | None, dialect: Dialect) -> ir.Model:
    """Selection among the tokens of one view.

    Inputs: features [1 + L, K, D], and where the tower gives it hidden [K, C], which then is looked at instead of the
    first of them; for "llava", score float32 [K]; without ``sizes``, which leaves D open, start
    float32 [D, MOST_DIRECTIONS] (models.start_block); directions int32 [p], 0 ... p - 1, whose length
    says how many are followed (PruneSID.directions); int32 [1] each: budget, at least 1; grouped, 1 to order by
    group and 0 as in the picture; information, the usual one of a picture in millionths, 0 for a fixed budget.
    Outputs: order int32 [K], the kept tokens and then the others; count int32 [1], how many are kept; group int32 [K];
    pruned [1 + L, K, D], features in that order.
    """
    op = Ops()
    given, x = _looked_at(op, sizes)
    names = ("budget", "grouped", "information")
    settings = {name: ir.val(name, ir.DataType.INT32, [1]) for name in names}
    width: int | str = (sizes.hidden or sizes.width) if sizes else "D"
    start = _start(width)
    directions = ir.val("directions", ir.DataType.INT32, ["p"])
    inputs = [*given.values(), directions, *settings.values()]
    score = None
    if variant == "llava":
        inputs.append(ir.val("score", ir.DataType.FLOAT, ["K"]))
        score = Term(op, op("Unsqueeze", inputs[-1], op.ints([1])))
    loadings = components(x, Term(op, op("Gather", start, directions, axis=1)))
    numbers = [Term(op, op("Cast", value, to=ir.DataType.FLOAT)) for value in settings.values()]
    order, count, group = selection(variant, x, loadings, score, *numbers)
    outputs = [output(order, "order", "K"), output(count, "count", 1), output(group, "group", "K")]
    if sizes is not None:
        pruned = op("Gather", given["features"], order, axis=1)
        outputs.append(output(pruned, "pruned", 1 + sizes.levels, "K", sizes.width, dtype=sizes.dtype))
    else:
        inputs.append(start)
    return finish(op, dialect, inputs, outputs, [start] if sizes is not None else [])


def information_graph(sizes: Sizes, dialect: Dialect) -> ir.Model:
    """How little the tokens of a view resemble each other, 1 - their mean cosine: inputs as above -> float32 [1]."""
    op = Ops()
    given, x = _looked_at(op, sizes)
    unit = x / (x * x).over("Sum", 1).clip(1e-24).map("Sqrt")
    total = _size(x, 0)
    together = unit.over("Sum", 0)
    pairs = (total * (total - 1.0)).clip(1.0)
    alike = ((together * together).over("Sum") - (unit * unit).over("Sum")) / pairs
    found = op("Reshape", (1.0 - alike).value, op.ints([1]))
    looked = given.get("hidden", given["features"])
    return finish(op, dialect, [looked], [output(found, "information", 1, dtype=ir.DataType.FLOAT)])


def _looked_at(op: Ops, sizes: Sizes | None) -> tuple[dict[str, ir.Value], Term]:
    """The inputs with what the tower gives, and the tokens that are compared, float32 [T, C]."""
    levels, width, dtype = (sizes.levels, sizes.width, sizes.dtype) if sizes else (0, "D", ir.DataType.FLOAT)
    given = {"features": ir.val("features", dtype, [1 + levels, "K", width])}
    if sizes is not None and sizes.hidden:
        given["hidden"] = ir.val("hidden", dtype, ["K", sizes.hidden])
        return given, Term(op, op("Cast", given["hidden"], to=ir.DataType.FLOAT))
    embeds = op("Gather", given["features"], op.const(0), axis=0)
    return given, Term(op, op("Cast", embeds, to=ir.DataType.FLOAT))


def _start(width: int | str) -> ir.Value:
    """The block to start from, as an initializer where the width is known."""
    if isinstance(width, int):
        return ir.val("start", const_value=ir.tensor(start_block(width), name="start"))
    return ir.val("start", ir.DataType.FLOAT, [width, MOST_DIRECTIONS])


def components(x: Term, start: Term) -> Term:
    """Loadings of tokens x [T, C] on the principal components of sigmoid(x), largest first: float32 [T, p], positive.

    As in the authors' code each token is centred on its own mean. ``start``: [C, p].
    """
    op = x.op
    squashed = x.map("Sigmoid")
    A = squashed - squashed.over("Mean", 1)
    # the same once more: ONNX Runtime is slower where it reads A by its columns
    squashed = x.T.map("Sigmoid")
    A_T = squashed - squashed.over("Mean", 0)
    numbers = _numbered(start, 1)
    eye = Term(op, op("Unsqueeze", numbers.value, op.ints([1]))).equals(numbers)
    Q = _orthonormal(A @ start, eye, 5, 3)
    for i in range(ITERATIONS):
        Q = _orthonormal(A_T @ Q, eye, 4, 3)
        Q = _orthonormal(A @ Q, eye, 4, 5 if i == ITERATIONS - 1 else 3)
    B = A_T @ Q
    vectors, _ = _eigen(B.T @ B, eye, ROTATIONS, "rotate")
    Q = _orthonormal(Q @ vectors, eye, 0, 3)
    B = A_T @ Q
    vectors, values = _eigen(B.T @ B, eye, POLISH, "polish")
    place = _ahead(values.T).over("Sum", 0)  # how many are larger: [1, p]
    return (Q @ (vectors @ place.T.equals(numbers))).map("Abs")


def _orthonormal(Y: Term, eye: Term, quintic: int, cubic: int) -> Term:
    """Columns of Y [T, p] made orthonormal: Newton-Schulz iterations for the inverse root of its Gram matrix.

    The quintic polynomial raises small singular values fast, the cubic one converges (Jordan et al. 2024, "Muon").
    """
    gram = Y.T @ Y
    size = (gram * gram).over("Sum").clip(1e-30).map("Sqrt")
    M = gram / size
    Z = eye / size.map("Sqrt")
    for k in range(quintic + cubic):
        N = eye * 3.4445 - M * 4.775 + (M @ M) * 2.0315 if k < quintic else eye * 1.5 - M * 0.5
        Z = Z @ N
        M = (M @ N) @ N
    return Y @ Z


def _eigen(H: Term, eye: Term, steps: int, name: str) -> tuple[Term, Term]:
    """Eigenvectors [p, p] in columns and eigenvalues [1, p] of a symmetric matrix.

    Jacobi's rotation of all pairs at once: the angles form a skew matrix, which is damped where it is large (by its
    Schatten-8 norm) and made a rotation by Newton-Schulz.
    """
    off = 1.0 - eye

    def step(H: Term, W: Term) -> tuple[Term, Term]:
        inner_eye = Term(H.op, eye.value)
        diagonal = (H * inner_eye).over("Sum", 0)
        gap = diagonal - diagonal.T
        twice = H * 2.0
        sign = (gap < 0.0) * -2.0 + 1.0
        root = (gap * gap + twice * twice).map("Sqrt")
        tangent = twice * sign / (gap.map("Abs") + root + 1e-20) * Term(H.op, off.value)
        skew = (tangent - tangent.T) * 0.5
        squared = skew @ skew
        fourth = squared @ squared
        eighth = ((fourth * fourth).over("Sum") * 0.5).clip(1e-30)
        norm = eighth.map("Sqrt").map("Sqrt").map("Sqrt")
        J = inner_eye + skew / norm.clip(1.0)
        for _ in range(5):
            J = J * 1.5 - (J @ (J.T @ J)) * 0.5
        return J.T @ (H @ J), W @ J

    H, W = repeat(H.op, name, steps, (H, eye), step)
    return W, (H * eye).over("Sum", 0)


def selection(
    variant: str,
    x: Term,
    loadings: Term,
    score: Term | None,
    budget: Term,
    grouped: Term,
    information: Term,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Which tokens x [T, C] are kept, given their loadings [T, p].

    Score [T, 1] is None for "qwen"; the others are [1]. Returns order int32 [T], count int32 [1], group int32 [T].
    """
    op = x.op
    total = _size(x, 0)
    index = _numbered(x, 0)
    column = Term(op, op("Unsqueeze", index.value, op.ints([1])))  # [T, 1]
    row = column.T
    unit = x / (x * x).over("Sum", 1).clip(1e-24).map("Sqrt")
    similar = unit @ unit.T
    apart = 1.0 - column.equals(row)
    mean = (similar * apart).over("Sum") / apart.over("Sum").clip(1.0)  # [1, 1]
    wanted = _budget(variant, budget, information, mean)
    group, membership, best = _groups(loadings, wanted)
    if score is None:
        score = best
    if variant == "llava":
        limit = wanted.need / 32.0 * mean
    else:  # of the upper triangle with its diagonal, over all pairs
        upper = (row > column) + row.equals(column)
        half = (similar * upper).over("Sum") / (total * total)
        limit = (wanted.need * 18.0 / total).clip(1.0) * half
    ahead = _ahead(score)
    same = group.equals(group.T)
    suppresses = ahead * same * (similar > limit)
    kept = repeat(
        op,
        "suppress",
        ROUNDS,
        (row * 0.0 + 1.0,),
        lambda kept: ((kept @ Term(kept.op, suppresses.value)) < 0.5,),
    )[0]  # [1, T]
    quota = _quotas(wanted, membership.over("Sum", 0), kept @ membership, column)
    first = (kept < kept.T) + kept.equals(kept.T) * ahead  # survivors, then the others, by score
    rank = (first * same).over("Sum", 0).T  # [T, 1]: how many of the group go before
    chosen = rank < membership @ quota.T
    count = chosen.over("Sum")
    before = quota.running(1) - quota
    by_group = rank + membership @ before.T
    in_picture = chosen.running(0) - 1.0
    if variant == "qwen":
        grouped = grouped * (1.0 - (count > UNSORTED))
    place = (grouped > 0.5).where(by_group, in_picture)
    place = chosen.where(place, count + (column - in_picture - 1.0))
    flat = op("Cast", op("Squeeze", place.value, op.ints([1])), to=ir.DataType.INT64)
    numbers = op("Cast", index.value, to=ir.DataType.INT32)
    order = op("ScatterElements", numbers, flat, numbers, axis=0)
    kept_count = op("Cast", op("Reshape", count.value, op.ints([1])), to=ir.DataType.INT32)
    return order, kept_count, op("Cast", op("Squeeze", group.value, op.ints([1])), to=ir.DataType.INT32)


def _budget(variant: str, budget: Term, information: Term, mean: Term) -> Budget:
    """A fixed budget, or the image's share by how little its tokens resemble each other."""
    share = (budget * MILLIONTHS * (1.0 - mean) / information.clip(1.0)).map("Round")
    share = share.clip(budget.clip(high=LEAST))
    budget = (information > 0.5).where(share, budget)
    need = budget + 1.0 if variant == "llava" else budget
    least = 1.0 if variant == "llava" else 4.0
    groups = (need / 4.0).map("Floor").clip(least, float(GROUPS))
    return Budget(budget, need, groups.clip(high=budget))  # each of them keeps a token


def _groups(loadings: Term, wanted: Budget) -> tuple[Term, Term, Term]:
    """Of each token its group [T, 1], the same as a membership matrix [T, p], and its loading there [T, 1]."""
    each = _numbered(loadings, 1)
    used = (each < wanted.groups).where(loadings, -1.0)
    best = used.over("Max", 1)
    group = used.equals(best).where(each, FAR).over("Min", 1)
    return group, group.equals(each), best


def _quotas(wanted: Budget, sizes: Term, kept: Term, column: Term) -> Term:
    """How many tokens each group may keep, [1, p]: sizes and survivors of groups [1, p], column [T, 1] counts up."""
    lower = sizes.clip(high=1.0)
    upper = ((wanted.need / 64.0).map("Ceil") * 5.0).clip(high=sizes).clip(high=kept)
    # all caps grow by one until the budget fits
    fits = (upper + column).clip(high=sizes).over("Sum", 1)  # [T, 1]
    upper = (upper + (fits < wanted.need).over("Sum")).clip(high=sizes)
    other = (wanted.budget - lower.over("Sum")).clip(0.0)
    share = ((kept / kept.over("Sum").clip(1.0)).running(1) * other).map("Round")
    quota = (share - _shifted(share) + lower).clip(high=upper)
    room = upper - quota
    left = other + lower.over("Sum") - quota.over("Sum")
    taken = room @ _ahead(kept.T)  # by groups with more survivors
    return quota + (left - taken).clip(0.0).clip(high=room)


def _shifted(x: Term) -> Term:
    """[1, p], every value one place on, 0 at first."""
    op = x.op
    first = op("Mul", op("Slice", x.value, op.ints([0]), op.ints([1]), op.ints([1])), op.const(0.0))
    rest = op("Slice", x.value, op.ints([0]), op.ints([-1]), op.ints([1]))
    return Term(op, op("Concat", first, rest, axis=1))


def _ahead(score: Term) -> Term:
    """[n, 1] -> [n, n], 1 where the row's goes before the column's: it is larger, or equal and first."""
    op = score.op
    index = Term(op, op("Unsqueeze", _numbered(score, 0).value, op.ints([1])))
    return (score > score.T) + score.equals(score.T) * (index < index.T)


def _size(x: Term, axis: int) -> Term:
    """The length of an axis, [1]."""
    op = x.op
    return Term(op, op("Cast", op("Shape", x.value, start=axis, end=axis + 1), to=ir.DataType.FLOAT))


def _numbered(x: Term, axis: int) -> Term:
    """0, 1, 2, ... along an axis."""
    op = x.op
    return Term(op, op("Range", op.const(0.0), op("Squeeze", _size(x, axis).value), op.const(1.0)))
