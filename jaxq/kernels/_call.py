"""One product by a quantized weight as a jax primitive: which kernel runs is decided when a platform is known.

`lax.platform_dependent` chooses between functions when a program is lowered as well, but a Pallas kernel among them
fails to lower for several platforms at once. A primitive has a lowering rule for each platform, and rules of its own
for `vmap`, derivatives and transposition:

| | rule |
|---|---|
| lowering | the platform's kernel, or the XLA form where `choose` has a reason |
| vmap over x | its rows join the others |
| vmap over the weight | a stack, which kernels take as their outermost grid axis |
| derivative for x | the same product |
| derivative for scale, offset, codebook | a second primitive, linear in them: transposed, it decodes in blocks |
| transpose for x | the same product with the weight used the other way round |

A program for several devices is partitioned by XLA, which cannot cut a kernel: there the XLA form runs. Inside
`jax.shard_map` every device has a kernel of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxq import formats
from jaxq.kernels import _tiles
from jaxq.kernels._codes import codes_matmul, largest_exact_length
from jaxq.kernels._devices import device_of, some_device
from jaxq.kernels._problem import Problem
from jaxq.kernels._rows import RowMeta, Rows, as_rows
from jaxq.kernels._xla import rows_gradient, transposed_matmul, weight_only_matmul
from jaxq.sharding import over_explicit_axes, spec_of

# The kernels of a platform, in the order in which they are asked.
KERNELS = {"tpu": ("tpu",), "cuda": ("mosaic_gpu", "triton")}
# Rows of x from which a dense product of a decoded weight is taken on a platform: a GPU kernel decodes its weights anew
# for every 128 rows, and by then computing takes longer than reading them.
_DENSE_FROM = {"cuda": 512}
# Decoded rows that may lie in an accelerator's memory at once.
_ACCELERATOR_BLOCK_BYTES = 256 * 2**20
# Over several devices a weight is decoded at once, each device its part: XLA cannot cut a loop over blocks of rows.
_WHOLE = 2**62


class FallbackWarning(UserWarning):
    """A kernel of this platform exists and does not run; the message says why."""


@dataclasses.dataclass(frozen=True)
class Call:
    """Static facts of one product.

    Attributes:
      meta: of the rows.
      leaves: which fields of `Rows` there are.
      out_dtype: of the result.
      transposed: `x @ decode(rows)`, not `x @ decode(rows).T`.
      backend: "auto", "xla" or the name of a kernel.
      interpret: run the kernel's interpreter, on any platform.
      backward: it is part of a derivative, where nobody expects a kernel.
    """

    meta: RowMeta
    leaves: tuple[str, ...]
    out_dtype: str
    transposed: bool = False
    backend: str = "auto"
    interpret: bool = False
    backward: bool = False

    def rows(self, leaves: Sequence[Any]) -> Rows:
        return Rows(
            **(
                dict.fromkeys(Rows._fields)
                | dict(zip(self.leaves, leaves, strict=True))
            )
        )  # pyright: ignore[reportArgumentType]


class Choice(NamedTuple):
    """What computes a product on a platform.

    Attributes:
      backend: "xla" or the name of a kernel.
      reason: why not a kernel, or None where one runs.
      preferred: the XLA form is taken for being the faster one.
      passed_over: the kernels that were asked before the one that runs, with their reasons.
    """

    backend: str
    reason: str | None
    preferred: bool = False
    passed_over: str = ""


def call_matmul(x: jax.Array, rows: Rows, call: Call) -> jax.Array:
    """`x @ decode(rows).T`, or without the transpose where `call.transposed`.

    Args:
      x: `[m, k]` (or `[m, n]` transposed), or the same with a leading axis e where rows have one in every leaf.
      rows: `[n, k]`.
      call: static facts; `leaves` is filled in here.

    Returns:
      `[m, n]` (or `[m, k]`) in `call.out_dtype`.
    """
    call = dataclasses.replace(
        call, leaves=tuple(f for f in Rows._fields if getattr(rows, f) is not None)
    )
    args = [x, *(getattr(rows, field) for field in call.leaves)]

    def bind(*args: jax.Array) -> jax.Array:
        if x.ndim == 3:
            return _bind(matmul_p, args, call)
        return _bind(matmul_p, [a[None] for a in args], call)[0]

    n_axis = x.ndim - 2 if call.meta.layout == "rows" else x.ndim - 1
    last = None if call.transposed else spec_of(rows.data)[n_axis]
    return over_explicit_axes(bind, (*spec_of(x)[:-1], last), *args)


def choose(
    problem: Problem | str, platform: str, device_kind: str | None, num_devices: int = 1
) -> Choice:
    """Which kernel computes a product on a platform, by static facts alone.

    Args:
      problem: the product, or why it is none that kernels know.
      platform: "cpu", "tpu", "cuda", ...
      device_kind: as `jax.Device.device_kind` has it, if known.
      num_devices: devices that XLA partitions the program for.
    """
    if platform not in KERNELS:
        return Choice("xla", f"there are no kernels for {platform}")
    if isinstance(problem, str):
        return Choice("xla", problem)
    if num_devices > 1:
        return Choice(
            "xla",
            f"XLA partitions this program for {num_devices} devices; a kernel runs inside shard_map",
        )
    if 0 in (problem.e, problem.m, problem.n, problem.k):
        return Choice("xla", "nothing is to be computed")
    if platform == "cuda" and problem.x_dtype == "int8" and problem.bits == 8:
        return Choice(
            "xla", "XLA's own int8 product serves int8 x and int8 codes", True
        )
    reasons = []
    for name in KERNELS[platform]:
        reason = _tiles.kernel(name).why_not(problem, device_kind)
        if reason is None and problem.m >= _DENSE_FROM.get(platform, problem.m + 1):
            return Choice(
                "xla",
                f"from {_DENSE_FROM[platform]} rows of x on the weight is decoded once and multiplied densely",
                True,
            )
        if reason is None:
            return Choice(name, None, passed_over="; ".join(reasons))
        reasons.append(reason if len(KERNELS[platform]) == 1 else f"{name}: {reason}")
    return Choice("xla", "; ".join(reasons))


def problem_of(call: Call, x: Any, leaves: Sequence[Any]) -> Problem | str:
    """The product as kernels see it, from the shapes and dtypes of x `[e, m, k]` and its leaves; or why it is none."""
    meta, rows = call.meta, call.rows(leaves)
    if call.transposed:
        return "kept axes are contracted"
    if rows.offset is not None:
        return "it has real offsets"
    if meta.fmt.bits not in (4, 8):
        return f"{meta.fmt.name} has {meta.fmt.bits} bits, kernels take 4 and 8"
    integer = meta.fmt.kind == "integer"
    if x.dtype.name == "int8" and integer:
        plain = RowMeta(formats.get("int8"), formats.Packing.NONE, None, meta.k, meta.k)
        longest = largest_exact_length(plain, True, meta, rows.zero_point is None)
        at_once = meta.padded_k // (
            1 if rows.scale is None else max(rows.scale.shape[-1], 1)
        )
        if at_once > longest:
            return f"int32 surely holds {longest} products of {meta.fmt.name} codes and int8 x, and a sum has {at_once}"
    if meta.fmt.bits == 8 and not integer:
        return f"{meta.fmt.name} is no integer and no table of 16 numbers"
    if rows.codebook is not None and rows.codebook.shape[1:3] != (1, 1):
        return "it has several codebooks"
    groups = 1 if rows.scale is None else rows.scale.shape[-1]
    group = meta.padded_k // groups if groups else 0
    if (
        meta.packing is formats.Packing.HALVES
        and groups > 1
        and (meta.unit is None or group % meta.unit)
    ):
        return f"codes are packed in units of {meta.unit or meta.padded_k}, scales change every {group}"
    if x.dtype.name == "int8" and not integer:
        return f"int8 activations meet {meta.fmt.name} codes"
    return Problem(
        e=x.shape[0],
        m=x.shape[1],
        k=meta.padded_k,
        n=rows.data.shape[1 if meta.layout == "rows" else 2],
        bits=meta.fmt.bits,
        signed=integer and meta.fmt.code_dtype.name == "int8",
        codebook=not integer,
        group=group,
        zero_point=rows.zero_point is not None,
        layout=meta.layout,
        x_dtype=x.dtype.name,
        scale_dtype=None if rows.scale is None else rows.scale.dtype.name,
        out_dtype=call.out_dtype,
    )


def calls(jaxpr: Any) -> Iterator[tuple[Call, Any, list[Any]]]:
    """(call, x, leaves) of every product in a jaxpr, inner ones too, arrays as their avals."""
    for equation in jaxpr.eqns:
        if equation.primitive is matmul_p:
            x, *leaves = (v.aval for v in equation.invars)
            yield equation.params["call"], x, leaves
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                yield from calls(getattr(inner, "jaxpr", inner))


def xla_form(x: jax.Array, *leaves: jax.Array, call: Call) -> jax.Array:
    """The product in plain XLA: what every platform without a kernel runs, and what kernels are compared with."""
    one = functools.partial(_xla_matrix, call=call)
    if x.shape[0] == 1:
        return one(x[0], *(leaf[0] for leaf in leaves))[None]
    if call.meta.block_bytes is None and x.dtype != jnp.int8:
        # One matrix after the other: blocks of all of them at once would not stay in cache.
        return lax.map(lambda args: one(*args), (x, *leaves))
    return jax.vmap(one)(x, *leaves)


def _xla_matrix(x: jax.Array, *leaves: jax.Array, call: Call) -> jax.Array:
    rows, meta = as_rows(call.rows(leaves), call.meta)
    if x.dtype == jnp.int8:
        scale = None if rows.scale is None else jnp.ones((1, 1), jnp.float32)
        left = Rows(x, scale, None, None, None)  # pyright: ignore[reportArgumentType]
        fmt = formats.get("int8")
        y = codes_matmul(
            left, RowMeta(fmt, formats.Packing.NONE, None, meta.k, meta.k), rows, meta
        )
    else:
        # XLA:CPU would multiply columns as they lie, and its matrix library refuses that in narrow floats.
        x = (
            x.astype(jnp.float32)
            if call.meta.layout == "columns" and meta.block_bytes is None
            else x
        )
        y = (transposed_matmul if call.transposed else weight_only_matmul)(
            x, rows, meta
        )
    return y.astype(call.out_dtype)


def kernel_form(
    x: jax.Array,
    *leaves: jax.Array,
    call: Call,
    backend: str,
    problem: Problem,
    device_kind: str | None,
) -> jax.Array:
    """The product by a kernel: x in the order of the codes in memory, scales along k first."""
    rows = call.rows(leaves)
    codebook = rows.codebook
    if codebook is not None:
        codebook = codebook.reshape(problem.e, -1)
    elif problem.codebook:
        table = call.meta.fmt.decode(jnp.arange(16, dtype=call.meta.fmt.code_dtype))
        codebook = jnp.broadcast_to(table.astype(jnp.float32), (problem.e, 16))

    def along_k(leaf: jax.Array | None) -> jax.Array | None:
        if leaf is None:
            return None
        return jnp.swapaxes(
            jnp.broadcast_to(leaf, (problem.e, problem.n, leaf.shape[-1])), 1, 2
        )

    module = _tiles.kernel(backend)
    return module.matmul(
        _in_memory_order(x, call.meta),
        rows.data,
        along_k(rows.scale),
        along_k(rows.zero_point),
        codebook,
        problem=problem,
        tiles=_tiles.lookup(backend, device_kind, problem),
        interpret=call.interpret,
    )


def interpreted(x: jax.Array, rows: Rows, call: Call) -> jax.Array:
    """`call_matmul` by the interpreter of the kernel that `call.backend` names, without the primitive's rules."""
    call = dataclasses.replace(
        call, leaves=tuple(f for f in Rows._fields if getattr(rows, f) is not None)
    )
    args = [
        a if x.ndim == 3 else a[None]
        for a in (x, *(getattr(rows, field) for field in call.leaves))
    ]
    problem = problem_of(call, args[0], args[1:])
    assert isinstance(problem, Problem), problem
    y = kernel_form(
        *args, call=call, backend=call.backend, problem=problem, device_kind=None
    )
    return y if x.ndim == 3 else y[0]


def _in_memory_order(x: jax.Array, meta: RowMeta) -> jax.Array:
    """Columns of x padded to `padded_k` and moved so that column j meets the code that lies j-th, low bits first."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, meta.padded_k - meta.k)))
    if meta.packing in (formats.Packing.NONE, formats.Packing.LOW_FIRST):
        return x
    pairs = (2, (meta.unit or meta.padded_k) // 2)
    if meta.packing is formats.Packing.HALVES:
        return jnp.swapaxes(x.reshape(*x.shape[:2], -1, *pairs), 3, 4).reshape(x.shape)
    return x.reshape(*x.shape[:2], -1, 2)[..., ::-1].reshape(x.shape)  # HIGH_FIRST


# The primitive and its rules.

matmul_p = Primitive("quantized_matmul")
# `d matmul = tangent(x, *leaves, *d leaves)`, the d of float leaves only; linear in them, and in x.
tangent_p = Primitive("quantized_matmul_tangent")


def _float_leaves(call: Call) -> list[str]:
    return [name for name in call.leaves if name in ("scale", "offset", "codebook")]


def _bind(primitive: Primitive, args: Sequence[jax.Array], call: Call) -> jax.Array:
    # Inside shard_map all operands must vary over the same mesh axes.
    varying = [jax.typeof(a).manual_axis_type.varying for a in args]
    everywhere = frozenset().union(*varying)
    args = [
        lax.pcast(a, tuple(everywhere - found), to="varying")
        if everywhere - found
        else a
        for a, found in zip(args, varying, strict=True)
    ]
    return primitive.bind(*args, call=call)


def _abstract(x, *leaves, call: Call):
    data = leaves[call.leaves.index("data")]
    last = (
        call.meta.k
        if call.transposed
        else data.shape[1 if call.meta.layout == "rows" else 2]
    )
    return x.update(
        shape=(*x.shape[:2], last), dtype=jnp.dtype(call.out_dtype), weak_type=False
    )


def _tangent_form(x: jax.Array, *args: jax.Array, call: Call) -> jax.Array:
    leaves, dots = args[: len(call.leaves)], args[len(call.leaves) :]
    names = _float_leaves(call)

    def product(floats: list[jax.Array]) -> jax.Array:
        filled = dict(zip(call.leaves, leaves, strict=True)) | dict(
            zip(names, floats, strict=True)
        )
        return xla_form(x, *(filled[name] for name in call.leaves), call=call)

    return jax.jvp(
        product, ([leaves[call.leaves.index(name)] for name in names],), (list(dots),)
    )[1]


def _jvp(primals, tangents, *, call: Call):
    x, *leaves = primals
    x_dot, *leaf_dots = tangents
    y = _bind(matmul_p, primals, call)
    terms = []
    if type(x_dot) is not ad.Zero:
        terms.append(_bind(matmul_p, [x_dot, *leaves], call))
    dots = {
        name: dot
        for name, dot in zip(call.leaves, leaf_dots, strict=True)
        if name in _float_leaves(call)
    }
    if any(type(dot) is not ad.Zero for dot in dots.values()):
        filled = [ad.instantiate_zeros(dot) for dot in dots.values()]
        terms.append(_bind(tangent_p, [x, *leaves, *filled], call))
    return y, functools.reduce(jnp.add, terms) if terms else ad.Zero.from_primal_value(
        y
    )  # pyright: ignore[reportAttributeAccessIssue]


def _transpose(ct, x, *leaves, call: Call):
    assert ad.is_undefined_primal(x), "a product is linear in x alone"
    nothing = [None] * len(leaves)
    if type(ct) is ad.Zero:
        return [ad.Zero(x.aval), *nothing]
    turned = dataclasses.replace(
        call, transposed=not call.transposed, out_dtype=x.aval.dtype.name, backward=True
    )
    return [_bind(matmul_p, [ct.astype(x.aval.dtype), *leaves], turned), *nothing]


def _tangent_transpose(ct, x, *args, call: Call):
    undefined = [ad.is_undefined_primal(a) for a in (x, *args)]
    if type(ct) is ad.Zero:
        return [
            ad.Zero(a.aval) if u else None
            for a, u in zip((x, *args), undefined, strict=True)
        ]
    if undefined[0]:
        shape = jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype)
        (dx,) = jax.linear_transpose(
            lambda x: _tangent_form(x, *args, call=call), shape
        )(ct)
        return [dx, *(None for _ in args)]
    leaves, dots = args[: len(call.leaves)], args[len(call.leaves) :]

    def one(x: jax.Array, ct: jax.Array, *leaves: jax.Array) -> list[jax.Array]:
        rows, meta = as_rows(call.rows(leaves), call.meta)
        x, ct = (ct, x) if call.transposed else (x, ct)
        found = rows_gradient(x, rows, meta, ct)
        return [getattr(found, name) for name in _float_leaves(call)]

    if x.shape[0] == 1:
        found = [g[None] for g in one(x[0], ct[0], *(leaf[0] for leaf in leaves))]
    else:
        found = jax.vmap(one)(x, ct, *leaves)
    return [
        *(None for _ in (x, *leaves)),
        *(
            g if ad.is_undefined_primal(d) else None
            for g, d in zip(found, dots, strict=True)
        ),
    ]


def _batch(args, dims, *, call: Call):
    x, *leaves = args
    if all(d is None for d in dims[1:]):
        stacked = jnp.moveaxis(x, dims[0], 1)  # [e, b, m, k]
        e, b, m, k = stacked.shape
        y = _bind(matmul_p, [stacked.reshape(e, b * m, k), *leaves], call)
        return y.reshape(e, b, m, y.shape[-1]), 1
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)

    def merge(a: jax.Array, dim: int | None) -> jax.Array:
        front = (
            jnp.broadcast_to(a[None], (size, *a.shape))
            if dim is None
            else jnp.moveaxis(a, dim, 0)
        )
        return front.reshape(math.prod(front.shape[:2]), *front.shape[2:])

    y = _bind(matmul_p, [merge(a, d) for a, d in zip(args, dims, strict=True)], call)
    return y.reshape(size, -1, *y.shape[1:]), 0


def _batch_tangent(args, dims, *, call: Call):
    return jax.vmap(functools.partial(_tangent_form, call=call), in_axes=dims)(*args), 0


def _lower(ctx, *args, call: Call, platform: str | None):
    with some_device(platform, ctx.avals_in):
        return mlir.lower_fun(_form_for(ctx, call, platform), multiple_results=False)(
            ctx, *args
        )


def _form_for(ctx, call: Call, platform: str | None) -> Callable[..., jax.Array]:
    """What computes a product on a platform; None is any without kernels."""
    named = call.backend not in ("auto", "xla")
    if (
        named
        and not call.interpret
        and call.backend not in KERNELS.get(platform or "", ())
    ):
        where = next(p for p, names in KERNELS.items() if call.backend in names)
        raise ValueError(
            f"quantized_matmul: the {call.backend} kernel runs on {where}, and this program is lowered for "
            f"{platform or ctx.module_context.platforms[0]}. Use interpret=True to run its interpreter."
        )
    kind, num_devices = device_of(ctx, platform)
    if platform is None and not named:
        meta = (
            dataclasses.replace(call.meta, block_bytes=_WHOLE)
            if num_devices > 1
            else call.meta
        )
        return functools.partial(xla_form, call=dataclasses.replace(call, meta=meta))
    found = problem_of(call, ctx.avals_in[0], ctx.avals_in[1:])
    if named and call.transposed:  # of a derivative: kernels go forward
        return functools.partial(xla_form, call=call)
    if named:
        choice = Choice(call.backend, None)
    else:
        assert platform is not None
        asked = "the XLA form is asked for" if call.backend == "xla" else None
        choice = (
            Choice("xla", asked)
            if asked
            else choose(found, platform, kind, num_devices)
        )
    if choice.reason is None:
        assert isinstance(found, Problem), found
        return functools.partial(
            kernel_form,
            call=call,
            backend=choice.backend,
            problem=found,
            device_kind=kind,
        )
    if call.backend == "auto" and not call.backward and not choice.preferred:
        warnings.warn(
            f"{call.meta.fmt.name} product with k = {call.meta.k} takes the XLA form on {platform}: {choice.reason}.",
            FallbackWarning,
            stacklevel=2,
        )
    size = (
        _WHOLE
        if num_devices > 1
        else _ACCELERATOR_BLOCK_BYTES // max(ctx.avals_in[0].shape[0], 1)
    )
    wide = dataclasses.replace(call.meta, block_bytes=size)
    return functools.partial(xla_form, call=dataclasses.replace(call, meta=wide))


for _primitive, _form, _batch_rule in (
    (matmul_p, xla_form, _batch),
    (tangent_p, _tangent_form, _batch_tangent),
):
    _primitive.def_abstract_eval(_abstract)
    batching.primitive_batchers[_primitive] = _batch_rule
ad.primitive_jvps[matmul_p] = _jvp
ad.primitive_transposes[matmul_p] = _transpose
ad.primitive_jvps[tangent_p] = lambda primals, tangents, *, call: jax.jvp(
    functools.partial(_tangent_form, call=call),
    primals,
    [ad.instantiate_zeros(t) for t in tangents],
)
ad.primitive_transposes[tangent_p] = _tangent_transpose
mlir.register_lowering(tangent_p, mlir.lower_fun(_tangent_form, multiple_results=False))
mlir.register_lowering(matmul_p, functools.partial(_lower, platform=None))
for _platform in KERNELS:
    mlir.register_lowering(
        matmul_p, functools.partial(_lower, platform=_platform), platform=_platform
    )


# The function behind each primitive, for those who look into programs.
FORMS = {"quantized_matmul": xla_form, "quantized_matmul_tangent": _tangent_form}


@functools.partial(jax.jit, static_argnames="call")
def _run(*args, call: Call):
    return matmul_p.bind(*args, call=call)


@functools.partial(jax.jit, static_argnames="call")
def _run_tangent(*args, call: Call):
    return tangent_p.bind(*args, call=call)


def _compiled(run):
    """A primitive has no other way to be evaluated: under `jax.disable_jit()`, too, it is one program."""

    def evaluate(*args, call: Call):
        with jax.disable_jit(False):
            return run(*args, call=call)

    return evaluate


matmul_p.def_impl(_compiled(_run))
tangent_p.def_impl(_compiled(_run_tangent))
