"""Vectors for numba: sixteen blocks side by side, one in each lane.

A kernel written with these values reads like the scalar code of ggml-quants.c, and each lane does
what the scalar code does with one block, operation by operation in the same order: ``a * b + c`` is
two roundings to float32, never a fused one, and a sum keeps its order. That is what makes the bytes
the same. LLVM turns a vector into whatever registers the processor has: one of AVX-512, two of
AVX2, four of NEON. Branches become :func:`select`.

A value is ``Floats`` (float32), ``Ints`` (int32) or a ``Mask``; :func:`float_rows` and
:func:`int_rows` are many of them on the stack of the kernel. A number beside a vector is rounded to
the vector's type first. Knows nothing of formats.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from medllm_pack.compiling import STRICT, cached

WIDTH = 16
_LANE_ROWS = 4  # room for the longest block, 210 bytes, in vectors
STAGE_ROWS = WIDTH * _LANE_ROWS

# Types are numba's to infer; these names only say what is meant.
Floats: TypeAlias = Any
Ints: TypeAlias = Any
Mask: TypeAlias = Any
FloatRows: TypeAlias = Any
IntRows: TypeAlias = Any

_Function: TypeAlias = Callable[..., Any]

# Addresses and counts: nothing to infer, so nothing compiles twice.
KERNEL_SIGNATURE = types.void(*[types.int64] * 5)


def inline(function: _Function) -> _Function:
    """Compile a part of kernels; it becomes part of its callers."""
    compiled: _Function = numba.njit(forceinline=True, **STRICT)(function)
    return compiled


def kernel(function: _Function) -> Any:
    """Make a kernel: ``f(rows, importance, period, out, blocks)``.

    The first, second and fourth are addresses; ``period`` is the number of blocks in a row and
    ``blocks`` their number in all. Compiled for ``KERNEL_SIGNATURE`` when it is needed, not before.
    """
    # numba's cache looks at the file that a kernel stands in, not at those it uses.
    return cached(function, tag=_source_digest())


@cache
def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------ types


class _Vector(types.Type):
    def __init__(self, name: str, element: Any) -> None:
        self.llvm = ir.VectorType(element, WIDTH)
        super().__init__(name=name)


class _Rows(types.Type):
    def __init__(self, item: _Vector) -> None:
        self.item = item
        super().__init__(name=f"{item.name}Rows")


def _model(kind: type, llvm: Callable[[Any], Any]) -> None:
    def __init__(self: Any, manager: Any, numba_type: Any) -> None:  # noqa: N807
        models.PrimitiveModel.__init__(self, manager, numba_type, llvm(numba_type))

    register_model(kind)(type("Model", (models.PrimitiveModel,), {"__init__": __init__}))


_model(_Vector, lambda vector: vector.llvm)
_model(_Rows, lambda rows: rows.item.llvm.as_pointer())

_FLOATS = _Vector("Floats", ir.FloatType())
_INTS = _Vector("Ints", ir.IntType(32))
_MASK = _Vector("Mask", ir.IntType(1))
_FLOAT_ROWS, _INT_ROWS = _Rows(_FLOATS), _Rows(_INTS)

_NUMBERS = {_FLOATS: (types.float32, types.float64, types.int64), _INTS: (types.int64,), _MASK: ()}
_ALIGN = 4 * WIDTH

# ------------------------------------------------------------------------------ definitions


def _define(key: _Function, cases: Sequence[Any], build: _Function) -> None:
    """Give a function or operator its meaning: ``build(builder, *values)`` for every case.

    Where a case has a number and the case before it a vector, the number is spread over a vector.
    """
    infer_global(key)(type("Template", (ConcreteTemplate,), {"key": key, "cases": list(cases)}))
    wanted = cases[0].args

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = zip(args, sig.args, wanted, strict=True)
        built = build(builder, *(_fit(context, builder, *value) for value in values))
        return context.get_dummy_value() if sig.return_type == types.none else built

    for case in cases:
        lower_builtin(key, *case.args)(lower)


def _fit(context: Any, builder: Any, value: Any, given: Any, wanted: Any) -> Any:
    if given == wanted:
        return value
    element = types.float32 if wanted == _FLOATS else types.int32
    scalar = context.cast(builder, value, given, element)
    return _splat(builder, scalar, wanted)


def _splat(builder: Any, scalar: Any, wanted: Any) -> Any:
    vector = builder.insert_element(ir.Constant(wanted.llvm, ir.Undefined), scalar, _i32(0))
    return builder.shuffle_vector(vector, vector, _lanes([0] * WIDTH))


def _i32(value: int) -> Any:
    return ir.Constant(ir.IntType(32), value)


def _lanes(order: Sequence[int]) -> Any:
    return ir.Constant(ir.VectorType(ir.IntType(32), len(order)), list(order))


def _pairs(vector: _Vector, result: _Vector) -> list[Any]:
    """Return the cases of an operator between two vectors, or a vector and a number."""
    numbers = _NUMBERS[vector]
    pairs = [(vector, vector), *((vector, n) for n in numbers), *((n, vector) for n in numbers)]
    return [signature(result, *pair) for pair in pairs]


def _define_operators() -> None:
    for sign, op in _COMPARISONS.items():
        # As in C: a comparison with NaN is false, but for !=, which is true.
        compare = "fcmp_unordered" if sign == "!=" else "fcmp_ordered"
        _define(
            op, _pairs(_FLOATS, _MASK), lambda b, x, y, s=sign, c=compare: getattr(b, c)(s, x, y)
        )
        _define(op, _pairs(_INTS, _MASK), lambda b, x, y, s=sign: b.icmp_signed(s, x, y))
    for vector, table in ((_FLOATS, _FLOAT_ARITHMETIC), (_INTS, _INT_ARITHMETIC)):
        for name, ops in table.items():
            for op in ops:
                _define(op, _pairs(vector, vector), lambda b, x, y, n=name: getattr(b, n)(x, y))
    _define(operator.and_, _pairs(_MASK, _MASK), lambda b, x, y: b.and_(x, y))
    for op in (operator.or_, operator.ior):
        _define(op, _pairs(_MASK, _MASK), lambda b, x, y: b.or_(x, y))
    _define(operator.invert, [signature(_MASK, _MASK)], lambda b, x: b.not_(x))
    _define(operator.neg, [signature(_FLOATS, _FLOATS)], lambda b, x: b.fneg(x))
    for rows in (_FLOAT_ROWS, _INT_ROWS):
        _define(
            operator.getitem,
            [signature(rows.item, rows, types.int64)],
            lambda b, r, i: b.load(b.gep(r, [i]), align=_ALIGN),
        )
        _define(
            operator.setitem,
            [signature(types.none, rows, types.int64, rows.item)],
            lambda b, r, i, x: b.store(x, b.gep(r, [i]), align=_ALIGN),
        )


_COMPARISONS = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
    "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
_FLOAT_ARITHMETIC = {
    "fadd": (operator.add, operator.iadd), "fsub": (operator.sub, operator.isub),
    "fmul": (operator.mul, operator.imul), "fdiv": (operator.truediv, operator.itruediv),
}  # fmt: skip
_INT_ARITHMETIC = {
    "add": (operator.add, operator.iadd), "sub": (operator.sub, operator.isub),
    "and_": (operator.and_, operator.iand), "or_": (operator.or_, operator.ior),
    "shl": (operator.lshift, operator.ilshift), "lshr": (operator.rshift, operator.irshift),
}  # fmt: skip

_define_operators()

# ------------------------------------------------------------------------------ functions
# Python sees names and meanings here; numba sees what is defined below them.


def floats(value: float) -> Floats:
    """Return a number in every lane."""
    raise NotImplementedError


def ints(value: int) -> Ints:
    """Return a whole number in every lane."""
    raise NotImplementedError


def select(mask: Mask, yes: Floats | Ints, no: Floats | Ints) -> Floats | Ints:
    """Return ``yes`` in the lanes of the mask, ``no`` in the others."""
    raise NotImplementedError


def any_lane(mask: Mask) -> bool:
    """Say whether a lane is in the mask."""
    raise NotImplementedError


def magnitude(x: Floats) -> Floats:
    """Return ``fabsf(x)``."""
    raise NotImplementedError


def root(x: Floats) -> Floats:
    """Return ``sqrtf(x)``."""
    raise NotImplementedError


def rounded(x: Floats) -> Floats:
    """Return ``rintf(x)``: the nearest whole number, ties to even."""
    raise NotImplementedError


def truncated(x: Floats) -> Ints:
    """Return ``(int) x``; out of range it is what the processor says, as in C."""
    raise NotImplementedError


def as_floats(x: Ints) -> Floats:
    """Return ``(float) x``."""
    raise NotImplementedError


def bits_of(x: Floats) -> Ints:
    """Return the bits of float32 values."""
    raise NotImplementedError


def from_bits(x: Ints) -> Floats:
    """Return the float32 values that have these bits."""
    raise NotImplementedError


def spread(address: int) -> Floats:
    """Return the float at an address in every lane."""
    raise NotImplementedError


def load_floats(address: int) -> Floats:
    """Return ``WIDTH`` float32 that lie at an address."""
    raise NotImplementedError


def load_shorts(address: int) -> Ints:
    """Return ``WIDTH`` unsigned 16-bit numbers that lie at an address."""
    raise NotImplementedError


def store_floats(x: Floats, address: int) -> None:
    """Write ``WIDTH`` float32 to an address."""
    raise NotImplementedError


def store_shorts(x: Ints, address: int) -> None:
    """Write the low 16 bits of ``WIDTH`` whole numbers to an address."""
    raise NotImplementedError


def transpose_in(
    rows: FloatRows, at: int, address: int, stride: int, first: int, last: int, period: int
) -> None:
    """Load ``WIDTH`` floats for each lane; row ``at`` + i gets the i-th of every lane.

    Lane s reads at ``address`` + ``stride`` * (min(``first`` + s, ``last``) % ``period``).
    """
    raise NotImplementedError


def transpose_out(rows: IntRows, at: int, stage: IntRows) -> None:
    """Transpose ``WIDTH`` rows into a stage of ``STAGE_ROWS``, where a lane's words lie together.

    Row ``at`` + i becomes word ``at`` + i of every lane.
    """
    raise NotImplementedError


def copy_lane(stage: IntRows, lane: int, target: int, size: int) -> None:
    """Copy the first bytes of a lane from the stage to an address."""
    raise NotImplementedError


def _room(rows: _Rows) -> _Function:
    """Make a function that returns room on the stack for a constant number of vectors."""

    def typed(context: Any, count: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            array = ir.ArrayType(rows.item.llvm, count.literal_value)
            room = cgutils.alloca_once(builder, array)
            room.align = _ALIGN
            return builder.bitcast(room, rows.item.llvm.as_pointer())

        return signature(rows, count), lower

    made: _Function = intrinsic(prefer_literal=True)(typed)
    return made


float_rows, int_rows = _room(_FLOAT_ROWS), _room(_INT_ROWS)


def _define_functions() -> None:
    for vector, make in ((_FLOATS, floats), (_INTS, ints)):
        numbers = (signature(vector, number) for number in _NUMBERS[vector])
        _define(make, [signature(vector, vector), *numbers], lambda b, x: x)
        choices = (pair.args for pair in _pairs(vector, vector))
        _define(
            select, [signature(vector, _MASK, *pair) for pair in choices],
            lambda b, *args: b.select(*args),
        )  # fmt: skip
    _define(any_lane, [signature(types.boolean, _MASK)], _any_lane)
    _define(magnitude, [signature(_FLOATS, _FLOATS)], lambda b, x: _call(b, "fabs", x))
    _define(root, [signature(_FLOATS, _FLOATS)], lambda b, x: _call(b, "sqrt", x))
    _define(rounded, [signature(_FLOATS, _FLOATS)], lambda b, x: _call(b, "rint", x))
    _define(truncated, [signature(_INTS, _FLOATS)], lambda b, x: b.fptosi(x, _INTS.llvm))
    _define(as_floats, [signature(_FLOATS, _INTS)], lambda b, x: b.sitofp(x, _FLOATS.llvm))
    _define(bits_of, [signature(_INTS, _FLOATS)], lambda b, x: b.bitcast(x, _INTS.llvm))
    _define(from_bits, [signature(_FLOATS, _INTS)], lambda b, x: b.bitcast(x, _FLOATS.llvm))
    i64 = types.int64
    void = types.none
    _define(spread, [signature(_FLOATS, i64)], _spread)
    _define(load_floats, [signature(_FLOATS, i64)], _load_floats)
    _define(load_shorts, [signature(_INTS, i64)], _load_shorts)
    _define(store_floats, [signature(void, _FLOATS, i64)], _store_floats)
    _define(store_shorts, [signature(void, _INTS, i64)], _store_shorts)
    _define(transpose_in, [signature(void, _FLOAT_ROWS, *[i64] * 6)], _transpose_in)
    _define(transpose_out, [signature(void, _INT_ROWS, i64, _INT_ROWS)], _transpose_out)
    _define(copy_lane, [signature(void, _INT_ROWS, i64, i64, i64)], _copy_lane)


def _any_lane(builder: Any, mask: Any) -> Any:
    whole = ir.IntType(WIDTH)
    return builder.icmp_unsigned("!=", builder.bitcast(mask, whole), ir.Constant(whole, 0))


def _call(builder: Any, name: str, x: Any) -> Any:
    kind = ir.FunctionType(x.type, [x.type])
    name = f"llvm.{name}.v{WIDTH}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [x])


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _i64(value: int) -> Any:
    return ir.Constant(ir.IntType(64), value)


def _transposed(builder: Any, vectors: list[Any]) -> list[Any]:
    """Transpose a square: interleaving the two halves log2(WIDTH) times."""
    half = WIDTH // 2
    low = _lanes([i // 2 + i % 2 * WIDTH for i in range(WIDTH)])
    high = _lanes([half + i // 2 + i % 2 * WIDTH for i in range(WIDTH)])
    for _ in range(half.bit_length()):
        pairs = zip(vectors[:half], vectors[half:], strict=True)
        vectors = [builder.shuffle_vector(a, b, way) for a, b in pairs for way in (low, high)]
    return vectors


def _transpose_in(
    builder: Any, rows: Any, at: Any, address: Any, stride: Any, first: Any, last: Any, period: Any
) -> None:
    lanes = []
    for lane in range(WIDTH):
        place = builder.add(first, _i64(lane))
        place = builder.select(builder.icmp_signed("<", place, last), place, last)
        place = builder.add(address, builder.mul(stride, builder.urem(place, period)))
        lanes.append(builder.load(_at(builder, place, _FLOATS.llvm), align=4))
    for i, row in enumerate(_transposed(builder, lanes)):
        builder.store(row, builder.gep(rows, [builder.add(at, _i64(i))]), align=_ALIGN)


def _transpose_out(builder: Any, rows: Any, at: Any, stage: Any) -> None:
    found = [
        builder.load(builder.gep(rows, [builder.add(at, _i64(i))]), align=_ALIGN)
        for i in range(WIDTH)
    ]
    for lane, words in enumerate(_transposed(builder, found)):
        row = builder.add(_i64(lane * _LANE_ROWS), builder.udiv(at, _i64(WIDTH)))
        builder.store(words, builder.gep(stage, [row]), align=_ALIGN)


def _copy_lane(builder: Any, stage: Any, lane: Any, target: Any, size: Any) -> None:
    byte = ir.IntType(8)
    source = builder.gep(stage, [builder.mul(lane, _i64(_LANE_ROWS))])
    source = builder.bitcast(source, byte.as_pointer())
    cgutils.raw_memcpy(builder, _at(builder, target, byte), source, size, 1)


_SHORTS = ir.VectorType(ir.IntType(16), WIDTH)


def _load_floats(builder: Any, address: Any) -> Any:
    return builder.load(_at(builder, address, _FLOATS.llvm), align=4)


def _load_shorts(builder: Any, address: Any) -> Any:
    return builder.zext(builder.load(_at(builder, address, _SHORTS), align=2), _INTS.llvm)


def _store_floats(builder: Any, x: Any, address: Any) -> None:
    builder.store(x, _at(builder, address, _FLOATS.llvm), align=4)


def _store_shorts(builder: Any, x: Any, address: Any) -> None:
    builder.store(builder.trunc(x, _SHORTS), _at(builder, address, _SHORTS), align=2)


def _spread(builder: Any, address: Any) -> Any:
    value = builder.load(_at(builder, address, ir.FloatType()), align=4)
    return _splat(builder, value, _FLOATS)


_define_functions()
