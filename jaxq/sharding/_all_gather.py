"""all_gather: every device gets the arrays of all devices, which travel as codes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxq.meshes import names_in
from jaxq.qtensor import QTensor, QuantSpec, is_qtensor, leaf_specs
from jaxq.sharding._pieces import from_piece, in_pieces
from jaxq.sharding._wire import (
    AxisName,
    as_varying,
    decode,
    device_key,
    encode,
    exchange_and_sum,
    float_array,
    is_type_checked,
    move,
    move_leaf,
    num_devices,
    position_of_axis,
    varying_axes,
    wire_spec,
)

_CALLER = "all_gather"


def all_gather(
    x: Any,
    axis_name: AxisName,
    spec: str | QuantSpec | None = None,
    *,
    axis: int = 0,
    tiled: bool = False,
    gradient_spec: str | QuantSpec | None = None,
    key: Array | None = None,
) -> Any:
    """Gathers arrays from all devices as `jax.lax.all_gather` does, but sends codes.

    Call it inside `jax.shard_map`. It is the all-gather of weights in fully sharded
    training and inference (FSDP).

    A float array is quantized, and each device dequantizes what it receives. So all
    devices get the same numbers, and they differ from `x` by the rounding of `spec`.
    With one device along `axis_name`, no number travels and none is rounded.

    The gradient of a float array passes straight through the rounding: it is the
    reduce-scatter of the gradient of the result. There is no forward-mode derivative.

    A QTensor travels as it is stored, and nothing is rounded. With `tiled=True` it must
    be a device's part of a QTensor, passed with the specs of `jaxq.sharding.specs`, and
    `axis` the axis that is sharded over `axis_name`. The result is the QTensor with
    this axis whole.

    Args:
      x: float32, bfloat16 or float16 array, a QTensor, or a tree of these.
      axis_name: the mapped axis, or a tuple of mapped axes.
      spec: preset name or `QuantSpec` for float arrays. Groups are neighbours in the
        flattened array. A preset without groups, such as "int8", gets groups of 256
        numbers with one scale each. None if `x` has only QTensors.
      axis: with `tiled=True`, the axis of `x` along which the parts are joined. With
        `tiled=False`, where the result has its new axis; 0 for QTensors, which get a
        new batch axis.
      tiled: whether to join the parts along an axis of `x`.
      gradient_spec: preset name or `QuantSpec` by which gradients are quantized, as in
        `reduce_scatter`. None sums gradients as floats.
      key: PRNG key, needed if a spec rounds stochastically. Every device uses other
        random numbers.

    Returns:
      Arrays of the dtype of `x`, or QTensors. As in `jax.lax.all_gather`, their type
      says that they vary over `axis_name`.

    Raises:
      TypeError: an array is not float32, bfloat16 or float16.
      ValueError: `axis_name` is not mapped; an array is sharded over a mesh axis that
        is not mapped; `axis` does not exist; a float array has no `spec`; a QTensor is
        not a part along `axis`; a name is unknown; a `QuantSpec` has no groups; or
        `key` is missing or not needed.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> def layer(x, w):  # w: [in / num_devices, out]
      ...     w = jaxq.sharding.all_gather(w, "data", "int8", axis=0, tiled=True)
      ...     return x @ w
      >>> layer = jax.shard_map(
      ...     layer, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data")
      ... )
      >>> sharded = jax.NamedSharding(mesh, P("data"))
      >>> x, w = jax.device_put((jnp.ones((2, 64)), jnp.ones((64, 8))), sharded)
      >>> layer(x, w).shape
      (2, 8)

    References:
      Wang et al., "ZeRO++: Extremely Efficient Collective Communication for Giant Model
      Training", 2023, section 3.1.
    """
    used = [
        wire_spec(entry, _CALLER, argument)
        for argument, entry in (("spec", spec), ("gradient_spec", gradient_spec))
        if entry is not None
    ]
    key = device_key(key, axis_name, used, _CALLER)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(x, is_leaf=is_qtensor)
    gathered = []
    for number, (keys, leaf) in enumerate(leaves):
        path = jax.tree_util.keystr(keys, simple=True, separator="/") or "x"
        if isinstance(leaf, QTensor):
            gathered.append(_gather_qtensor(leaf, axis_name, axis, tiled, path))
            continue
        array = float_array(leaf, path, axis_name, _CALLER)
        if spec is None:
            raise ValueError(
                f"{_CALLER}: {path} is an array of {array.dtype}, and spec is None. "
                "Pass a preset name, for example 'int8', or use jax.lax.all_gather."
            )
        ndim = array.ndim if tiled else array.ndim + 1
        position = position_of_axis(axis, ndim, _CALLER, "axis", path)
        array = as_varying(array, axis_name)
        leaf_key = None if key is None else jax.random.fold_in(key, number)
        gather = _straight_through(
            axis_name, used[0], position, tiled, used[1] if gradient_spec else None
        )
        gathered.append(gather(array, leaf_key))
    return jax.tree.unflatten(treedef, gathered)


def _straight_through(
    axis_name: AxisName,
    spec: QuantSpec,
    axis: int,
    tiled: bool,
    gradient_spec: QuantSpec | None,
) -> Any:
    """The gather of a float array, with the gradient of a gather of floats."""
    count = num_devices(axis_name, _CALLER)

    @jax.custom_vjp
    def gather(x: Array, key: Array | None) -> Array:
        return _gather_floats(x, axis_name, spec, axis, tiled, key)

    def forward(x: Array, key: Array | None) -> tuple[Array, Array | None]:
        return gather(x, key), key

    def backward(key: Array | None, gradient: Array) -> tuple[Array, None]:
        if gradient_spec is None or count == 1 or gradient.size == 0:
            summed = jax.lax.psum_scatter(
                gradient, axis_name, scatter_dimension=axis, tiled=tiled
            )
            return summed, None
        pieces = in_pieces(gradient.astype(jnp.float32), count, axis)
        total, _ = exchange_and_sum(pieces, axis_name, gradient_spec, key, step=1)
        part = from_piece(total, gradient.shape, count, axis, tiled)
        return part.astype(gradient.dtype), None

    gather.defvjp(forward, backward)
    return gather


def _gather_floats(
    x: Array,
    axis_name: AxisName,
    spec: QuantSpec,
    axis: int,
    tiled: bool,
    key: Array | None,
) -> Array:
    """Every device's array, after quantization."""
    if num_devices(axis_name, _CALLER) == 1 or x.size == 0:
        return jax.lax.all_gather(x, axis_name, axis=axis, tiled=tiled)
    row = encode(x.reshape(-1), spec, key)
    rows = move(row, lambda leaf: jax.lax.all_gather(leaf, axis_name))
    parts = decode(rows).astype(x.dtype).reshape(-1, *x.shape)  # [num_devices, ...]
    parts = jnp.moveaxis(parts, 0, axis)
    if not tiled:
        return parts
    num, size = parts.shape[axis : axis + 2]
    return parts.reshape(*x.shape[:axis], num * size, *x.shape[axis + 1 :])


def _gather_qtensor(
    qt: QTensor, axis_name: AxisName, axis: int, tiled: bool, path: str
) -> QTensor:
    """The QTensors of all devices, stacked or joined along an axis of the array."""
    if not tiled:
        if axis != 0:
            raise ValueError(
                f"{_CALLER}: {path} is a QTensor, and stacked QTensors get their new "
                f"axis at 0, got axis={axis}. Pass axis=0, or tiled=True."
            )
        return move(qt, lambda leaf: jax.lax.all_gather(leaf, axis_name))
    position = position_of_axis(axis, qt.ndim, _CALLER, "axis", path)
    count = num_devices(axis_name, _CALLER)
    if count == 1:
        return qt
    _check_is_part(qt, axis_name, position, path)
    # The rule for shards says along which axis each leaf is joined.
    entries: list[Any] = [None] * qt.ndim
    entries[position] = "joined"
    at = leaf_specs(qt, entries)

    def join(leaf: Array, leaf_spec: Any) -> Array:
        if "joined" not in leaf_spec:
            return leaf  # one scale covers the axis, and all devices have it
        leaf_axis = tuple(leaf_spec).index("joined")
        return move_leaf(
            leaf,
            lambda words: jax.lax.all_gather(
                words, axis_name, axis=leaf_axis, tiled=True
            ),
        )

    whole = jax.tree.map(join, qt, at)
    expected = list(qt.shape)
    expected[position] *= count
    if _shape_of(whole) != expected:
        raise ValueError(
            f"{_CALLER}: {path}, of shape {list(qt.shape)} on each device, does not "
            f"become {expected} along axis {axis}, because the whole QTensor has the "
            f"shape {_whole_shape(qt)}. Pass the axis of the array that is sharded "
            f"over {axis_name!r}."
        )
    return whole


def _check_is_part(qt: QTensor, axis_name: AxisName, position: int, path: str) -> None:
    """Raises a ValueError unless the devices have parts of one QTensor."""
    remedy = (
        "Quantize the whole array, place it with jaxq.sharding.place, and pass it with "
        "in_specs=jaxq.sharding.specs(qt, PartitionSpec(...), mesh=mesh). To gather a "
        "float array, pass it with spec=."
    )
    names = names_in(axis_name)
    if is_type_checked(axis_name) and not varying_axes(qt.data).issuperset(names):
        raise ValueError(
            f"{_CALLER}: {path}, {qt!r}, is the same on all devices of {axis_name!r}, "
            f"so it is no part that could be joined. {remedy}"
        )
    # A batch axis has scales of its own for each element.
    if position >= len(qt.batch_shape) and qt.meta.whole is None:
        raise ValueError(
            f"{_CALLER}: {path}, {qt!r}, is not a part of a larger QTensor, so nothing "
            f"says that the scales of the devices fit together. {remedy}"
        )


def _shape_of(qt: QTensor) -> list[int] | None:
    """The shape of the array; None if the leaves do not fit together."""
    try:
        return list(qt.shape)
    except ValueError:
        return None


def _whole_shape(qt: QTensor) -> list[int]:
    return [*qt.batch_shape, *qt.meta.of_whole().geometry.shape]
