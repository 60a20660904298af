"""mean_gradients and init_error: data-parallel steps that send gradients as codes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxq.meshes import names_in
from jaxq.qtensor import QuantSpec, check_floats
from jaxq.sharding._entries import named_sharding
from jaxq.sharding._reduce import reduce_all
from jaxq.sharding._wire import AxisName


def mean_gradients(
    grads: Any,
    axis_name: AxisName,
    spec: str | QuantSpec,
    error: Any = None,
    *,
    min_size: int = 4096,
    key: Array | None = None,
) -> Any:
    """Averages gradients over devices as `jax.lax.pmean` does, but sends codes.

    Call it inside `jax.shard_map`, in a data-parallel training step. It is `all_reduce`
    of a tree of gradients, divided by the number of devices.

    Arrays with fewer than `min_size` numbers are not quantized. They travel as float32,
    in the same call. Biases and scales of norms are such arrays.

    Error feedback (`error`) keeps what rounding takes away and adds it to the next
    gradients. Use it below 8 bits.

    If jax checks types (`jax.shard_map` without `check_vma=False`), the parameters must
    be marked by `jax.lax.pcast` as in the example. Otherwise `jax.grad` itself sums the
    gradients in floats, and `mean_gradients` raises an error.

    Args:
      grads: tree of float32, bfloat16 or float16 arrays.
      axis_name: the mapped axis, or a tuple of mapped axes.
      spec: preset name or `QuantSpec`, as in `all_reduce`.
      error: the result of `init_error` or of the last step. None is no error feedback.
      min_size: arrays with fewer numbers travel as float32. 0 quantizes all arrays.
      key: PRNG key, needed if `spec` rounds stochastically.

    Returns:
      The means, with the shapes and dtypes of `grads`, the same bits on all devices.
      With `error`, the pair (means, error).

    Raises:
      TypeError, ValueError: as in `reduce_scatter`.

    Example:
      >>> import functools, jax, jax.numpy as jnp, jaxq
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> def loss_of(params, x):
      ...     return jnp.mean((x @ params["w"]) ** 2)
      >>> @jax.jit
      ... @functools.partial(
      ...     jax.shard_map,
      ...     mesh=mesh,
      ...     in_specs=(P(), P("data"), P("data")),
      ...     out_specs=(P(), P("data")),
      ... )
      ... def step(params, error, x):
      ...     local = jax.lax.pcast(params, "data", to="varying")
      ...     grads = jax.grad(loss_of)(local, x)
      ...     grads, error = jaxq.sharding.mean_gradients(grads, "data", "int8", error)
      ...     params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
      ...     return params, error
      >>> params = {"w": jnp.ones((64, 64))}
      >>> error = jaxq.sharding.init_error(params, mesh, "data")
      >>> x = jax.device_put(jnp.ones((16, 64)), jax.NamedSharding(mesh, P("data")))
      >>> params, error = step(params, error, x)

    References:
      Seide et al., "1-Bit Stochastic Gradient Descent and its Application to
      Data-Parallel Distributed Training of Speech DNNs", 2014; Karimireddy et al.,
      "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", 2019.
    """
    is_count = isinstance(min_size, int) and not isinstance(min_size, bool)
    if not is_count or min_size < 0:
        raise ValueError(
            "mean_gradients: min_size must be a whole number of at least 0, got "
            f"{min_size!r}."
        )
    return reduce_all(
        grads,
        axis_name,
        spec,
        error,
        key,
        "mean_gradients",
        mean=True,
        min_size=min_size,
    )


def init_error(params: Any, mesh: Mesh, axis_name: AxisName) -> Any:
    """The error feedback before the first step: zeros for each device and parameter.

    Call it outside `jax.shard_map`. Pass the result with
    `in_specs=PartitionSpec(axis_name)`, return it with the same `out_specs`, and give
    it to the next step. If other mesh axes shard the parameters, the specs are
    `jax.tree.map(lambda leaf: leaf.sharding.spec, error)`.

    Each device needs 4 bytes for each number of its gradients.

    Args:
      params: tree of float arrays with the shapes of the gradients. A Python float is a
        scalar. Parameters that are sharded over `axis_name` itself (FSDP) have
        gradients of the whole shape.
      mesh: the mesh.
      axis_name: the mesh axis over which the gradients will be summed, or a tuple.

    Returns:
      The tree with zeros, float32 `[num_devices, *shape]`. The first axis is sharded
      over `axis_name`, the others as the parameters.

    Raises:
      TypeError: an array is not float32, bfloat16 or float16.
      ValueError: the mesh has no such axis.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> params = {"w": jnp.ones((64, 8))}
      >>> jaxq.sharding.init_error(params, mesh, "data")["w"].shape
      (1, 64, 8)
    """
    names = names_in(axis_name)
    unknown = [name for name in names if name not in mesh.shape]
    if unknown:
        raise ValueError(
            f"init_error: axis_name={axis_name!r}, but the mesh has the axes "
            f"{list(mesh.axis_names)}."
        )
    count = 1
    for name in names:
        count *= mesh.shape[name]

    def zeros(keys: Any, leaf: Any) -> Array:
        path = jax.tree_util.keystr(keys, simple=True, separator="/") or "params"
        shape = jnp.shape(leaf)
        check_floats(jnp.result_type(leaf), shape, path, "init_error")
        sharding = named_sharding(leaf)
        entries = () if sharding is None else sharding.spec
        others = [_without(entry, names) for entry in entries]
        at = NamedSharding(mesh, PartitionSpec(axis_name, *others))
        return jnp.zeros((count, *shape), jnp.float32, device=at)

    return jax.tree_util.tree_map_with_path(zeros, params)


def _without(entry: Any, names: tuple[str, ...]) -> Any:
    """An entry of a PartitionSpec without some mesh axes."""
    rest = tuple(name for name in names_in(entry) if name not in names)
    return rest or None
