"""Statistics of the inputs of parameters, for any function of parameters.

A tree of arrays has no layers whose calls could be watched. Instead, the function that
runs a batch is traced, and its products with the parameters are found in the trace
(`_product_visitor.py`). Matrices in a module of an unknown class are found in the same
way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.nn.calibration._batches import Batch, run_batches
from jaxq.nn.calibration._held_out_rows import add_rows, only_rows
from jaxq.nn.calibration._origins import Origin, Other, View
from jaxq.nn.calibration._product import Product
from jaxq.nn.calibration._product_visitor import Products
from jaxq.nn.calibration._stats import StatsRequest, check_stats, initial_stats
from jaxq.observers import LayerStats
from jaxq.qtensor import QTensor


class ParameterFunction(NamedTuple):
    """A function of parameters and a batch.

    Attributes:
      run: `run(leaves, batch)`.
      leaves: the leaves of the parameters. A leaf is an array, a QTensor, or any other
        object.
    """

    run: Callable[[list[Any], Any], Any]
    leaves: Sequence[Any]


class Use(NamedTuple):
    """How a function multiplies data by one parameter.

    Attributes:
      problem: why there are no statistics of the inputs; or empty.
      is_changed: products read the parameter only after another computation, or inside
        a function that statistics cannot leave.
      is_read: forward reads the parameter.
      num_products: how many products read the parameter.
      is_shared: several products read the same numbers of the parameter.
      contracting: the axes that the products contract, ascending.
      batch: the axes that stack several matrices, ascending.
      windowed: the product is a convolution.
      num_channels: the size K of a row.
      inputs: a number for each product. Products that read the same array have the same
        number. Numbers ascend in the order of the products.
      order: the number of the first product, in the order of the function.
      bias: the position of the parameter that is added to every output, and that
        nothing else reads. None if there is no such parameter.
    """

    problem: str
    is_changed: bool = False
    is_read: bool = True
    num_products: int = 0
    is_shared: bool = False
    contracting: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    windowed: bool = False
    num_channels: int = 0
    inputs: tuple[int, ...] = ()
    order: int = 0
    bias: int | None = None


class Watched(NamedTuple):
    """Parameters whose inputs are collected together, under one name.

    Attributes:
      leaves: the positions of the parameters. One array may be at several positions.
      use: of these parameters.
      request: what to collect.
    """

    leaves: tuple[int, ...]
    use: Use
    request: StatsRequest


def find_uses(
    function: ParameterFunction, batch: Any, groups: Iterable[tuple[int, ...]]
) -> dict[tuple[int, ...], Use]:
    """Finds the products of parameters, for one batch. No number is computed.

    Args:
      function: runs the batch.
      batch: as the user passed it.
      groups: positions of leaves that hold the same array.

    Returns:
      The use of each group.
    """
    products: dict[Any, Product] = {}
    # `id` identifies a tracer, so the tracers in the `Products` must stay alive.
    watcher: list[Products] = []

    def visit(product: Product, state: Any) -> Any:
        products.setdefault((product.leaf, product.key), product)
        return state

    def trace(arrays: dict[int, Any], batch: Batch) -> None:
        watcher.append(_visit_products(function, arrays, batch, visit, ()))

    jax.eval_shape(trace, _arrays(function.leaves), Batch.of(batch))
    numbers: dict[int, int] = {}
    inputs = {
        key: numbers.setdefault(id(product.x), len(numbers))
        for key, product in products.items()
    }
    return {group: _use(group, products, inputs, watcher[0]) for group in groups}


def collect_traced_stats(
    function: ParameterFunction,
    batches: Iterable[Any],
    watched: Mapping[str, Watched],
    *,
    caller: str,
    mask: Callable[[Any], Any] | None = None,
    progress: bool | None = None,
) -> dict[str, LayerStats]:
    """Statistics of the inputs of parameters, in one pass over the data.

    Args:
      function: runs a batch.
      batches: as the user passed them.
      watched: the parameters and what to collect, by name.
      caller: the name that error messages begin with.
      mask: `mask(batch)` says which rows count.
      progress: show a progress line. None shows the line if stderr is a terminal.

    Raises:
      ValueError: an input is not finite, or no row counts; the mask does not fit; a
        later batch uses a parameter in another way than the first one.
    """
    arrays = _arrays(function.leaves)

    def visit(product: Product, state: dict[str, LayerStats]) -> dict[str, LayerStats]:
        state = dict(state)
        for name, group in watched.items():
            if product.leaf in group.leaves:
                state[name] = _with_product(state[name], product, group, name, caller)
        return state

    @jax.jit
    def step(arrays: Any, state: Any, batch: Batch, counts: Any) -> Any:
        with only_rows(counts):
            return _visit_products(function, arrays, batch, visit, state).state

    state = {name: _empty_stats(function, group) for name, group in watched.items()}

    def run(batch: Batch, counts: jax.Array | None) -> None:
        nonlocal state
        state = step(arrays, state, batch, counts)

    run_batches(run, batches, caller=caller, mask=mask, progress=progress)
    check_stats(state, caller)
    return state


def _with_product(
    stats: LayerStats, product: Product, group: Watched, name: str, caller: str
) -> LayerStats:
    """The statistics of a parameter after one more product.

    Raises:
      ValueError: the product has other axes than the use of the parameter.
    """
    if (product.contracting, product.batch) != (group.use.contracting, group.use.batch):
        raise ValueError(
            f"{caller}: {name}: a batch contracts its axes "
            f"{list(product.contracting)}, and the first batch contracts its axes "
            f"{list(group.use.contracting)}. Pass batches for which forward computes "
            "the same products."
        )
    position = tuple(product.index.get(axis, slice(None)) for axis in product.batch)
    own_stats = jax.tree.map(lambda leaf: leaf[position], stats)
    request, factors = group.request, None
    if request.input_scale is not None:
        factors = jnp.asarray(request.input_scale)[position]
    own_stats = add_rows(own_stats, product.rows, name, request.observer, factors)
    return jax.tree.map(lambda leaf, own: leaf.at[position].set(own), stats, own_stats)


def _visit_products(
    function: ParameterFunction,
    arrays: dict[int, Any],
    batch: Batch,
    visit: Callable[[Product, Any], Any],
    state: Any,
) -> Products:
    """Traces a function, and evaluates it with `visit`. Returns the `Products`."""

    def run(arrays: dict[int, Any], batch: Batch) -> Any:
        leaves = [arrays.get(i, leaf) for i, leaf in enumerate(function.leaves)]
        return function.run(leaves, batch.whole())

    closed = jax.make_jaxpr(run)(arrays, batch)
    origins: list[Origin] = []
    shapes: dict[int, tuple[int, ...]] = {}
    for position, value in arrays.items():
        if isinstance(value, QTensor) or not jnp.issubdtype(value.dtype, jnp.floating):
            origins += [Other.CONSTANT] * len(jax.tree.leaves(value))
            continue
        origins.append(View.of(position, value.shape))
        shapes[position] = value.shape
    origins += [Other.DATA] * len(jax.tree.leaves(batch))
    products = Products(shapes, visit, state)
    products.evaluate(closed, jax.tree.leaves((arrays, batch)), origins)
    return products


def _use(
    group: tuple[int, ...],
    products: Mapping[Any, Product],
    inputs: Mapping[Any, int],
    watcher: Products,
) -> Use:
    """The use of the parameters of a group."""
    own = {key: product for key, product in products.items() if key[0] in group}
    for leaf in group:
        if leaf in watcher.changed:
            return Use(watcher.changed[leaf], is_changed=True, num_products=len(own))
    if not own:
        readers = itertools.chain.from_iterable(
            watcher.readers.get(leaf, ()) for leaf in group
        )
        names = {name for name, _ in readers}
        detail = f"only {', '.join(sorted(names))}" if names else "nothing reads it"
        problem = f"no product of forward reads it ({detail})"
        return Use(problem, is_read=bool(names))
    first = next(iter(own.values()))
    for product in own.values():
        if _axes(product) != _axes(first):
            return Use(
                "two products of forward contract different axes: "
                f"{_axes_text(first)} and {_axes_text(product)}",
                num_products=len(own),
            )
    positions = {
        tuple((axis, _number(value)) for axis, value in product.index.items())
        for product in own.values()
    }
    return Use(
        problem="",
        num_products=len(own),
        is_shared=len(positions) < len(own),
        contracting=first.contracting,
        batch=first.batch,
        windowed=first.windowed,
        num_channels=first.rows.shape[-1],
        inputs=tuple(inputs[key] for key in own),
        order=list(products).index(next(iter(own))),
        bias=_added_bias(own, watcher),
    )


def _axes(product: Product) -> tuple[Any, ...]:
    return product.contracting, product.batch, product.windowed


def _number(position: Any) -> int:
    """A position as a number. Positions with equal numbers are certainly equal."""
    return position if isinstance(position, int) else id(position)


def _added_bias(own: Mapping[Any, Product], watcher: Products) -> int | None:
    """The bias of a parameter: it is added to each output, and to nothing else.

    Args:
      own: the products of the parameter, by (leaf, key).
      watcher: what the trace has shown.
    """
    biases = {watcher.biases.get(leaf, {}).get(key) for leaf, key in own}
    bias = biases.pop()
    if biases or bias is None or bias in watcher.changed:
        return None
    names = [name for name, _ in watcher.readers.get(bias, ())]
    return bias if names == ["add"] * len(own) else None


def _axes_text(product: Product) -> str:
    return f"contracting={product.contracting}, batch={product.batch}"


def _empty_stats(function: ParameterFunction, group: Watched) -> LayerStats:
    shape = function.leaves[group.leaves[0]].shape
    batch = tuple(shape[axis] for axis in group.use.batch)
    k = group.use.num_channels
    return initial_stats(group.request, k, batch, windowed=group.use.windowed)


def _arrays(leaves: Sequence[Any]) -> dict[int, Any]:
    """The leaves that are arguments of the traced function, by position."""
    return {
        position: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf
        for position, leaf in enumerate(leaves)
        if isinstance(leaf, QTensor | jax.Array)
        or (isinstance(leaf, np.ndarray) and leaf.dtype != object)
    }
