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
from jaxq.nn.calibration._programs import cached_program
from jaxq.nn.calibration._stats import StatsRequest, check_stats, initial_stats
from jaxq.observers import LayerStats
from jaxq.qtensor import QTensor


class ParameterFunction(NamedTuple):
    """A function of parameters and a batch.

    Attributes:
      run: `run(leaves, batch)`. Later calls with an equal function and equal shapes
        neither trace nor compile again.
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
    groups = tuple(groups)
    program = _uses_program(_Program.of(function), groups)
    found = jax.eval_shape(program, _arrays(function.leaves), Batch.of(batch))
    return dict(zip(groups, found.uses, strict=True))


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
    factors = {
        name: jnp.asarray(group.request.input_scale)
        for name, group in watched.items()
        if group.request.input_scale is not None
    }
    groups = {
        # An array has no hash, so the factors are an argument of the program.
        name: group._replace(request=group.request._replace(input_scale=None))
        for name, group in watched.items()
    }
    step = _statistics_program(_Program.of(function), tuple(groups.items()), caller)
    state = {name: _empty_stats(function, group) for name, group in watched.items()}

    def run(batch: Batch, counts: jax.Array | None) -> None:
        nonlocal state
        state = step(arrays, factors, state, batch, counts)

    run_batches(run, batches, caller=caller, mask=mask, progress=progress)
    check_stats(state, caller)
    return state


class _Program(NamedTuple):
    """A `ParameterFunction` without its arrays, which are arguments.

    Attributes:
      run: as in `ParameterFunction`.
      others: the leaves that are not arrays, with their types, because 1 == True. None
        in place of each array.
    """

    run: Callable[[list[Any], Any], Any]
    others: tuple[tuple[type, Any] | None, ...]

    @classmethod
    def of(cls, function: ParameterFunction) -> _Program:
        arrays = _arrays(function.leaves)
        others = tuple(
            None if position in arrays else (type(leaf), leaf)
            for position, leaf in enumerate(function.leaves)
        )
        return cls(function.run, others)

    def __call__(self, arrays: dict[int, Any], batch: Batch) -> Any:
        leaves = [
            arrays[position] if other is None else other[1]
            for position, other in enumerate(self.others)
        ]
        return self.run(leaves, batch.whole())


@jax.tree_util.register_static
class _Uses(NamedTuple):
    """The use of each group, as a static result of a jitted function."""

    uses: tuple[Use, ...]


@cached_program
def _uses_program(
    program: _Program, groups: tuple[tuple[int, ...], ...]
) -> Callable[..., _Uses]:
    """A jitted function that finds the uses of groups of parameters."""

    @jax.jit
    def find(arrays: dict[int, Any], batch: Batch) -> _Uses:
        products: dict[Any, Product] = {}

        def visit(product: Product, state: Any) -> Any:
            products.setdefault((product.leaf, product.key), product)
            return state

        # `id` identifies a tracer, so the tracers in `watcher` must stay alive.
        watcher = _visit_products(program, arrays, batch, visit, ())
        numbers: dict[int, int] = {}
        inputs = {
            key: numbers.setdefault(id(product.x), len(numbers))
            for key, product in products.items()
        }
        uses = [_use(group, products, inputs, watcher) for group in groups]
        return _Uses(tuple(uses))

    return find


@cached_program
def _statistics_program(
    program: _Program, watched: tuple[tuple[str, Watched], ...], caller: str
) -> Callable[..., dict[str, LayerStats]]:
    """A jitted function that adds a batch to the statistics of parameters."""

    @jax.jit
    def step(
        arrays: Any,
        factors: dict[str, jax.Array],
        state: Any,
        batch: Batch,
        counts: Any,
    ) -> dict[str, LayerStats]:
        def visit(product: Product, state: dict[str, LayerStats]) -> Any:
            state = dict(state)
            for name, group in watched:
                if product.leaf in group.leaves:
                    state[name] = _with_product(
                        state[name], product, group, factors.get(name), name, caller
                    )
            return state

        with only_rows(counts):
            return _visit_products(program, arrays, batch, visit, state).state

    return step


def _with_product(
    stats: LayerStats,
    product: Product,
    group: Watched,
    factors: jax.Array | None,
    name: str,
    caller: str,
) -> LayerStats:
    """The statistics of a parameter after one more product.

    Args:
      stats: the statistics before the product.
      product: the product.
      group: the parameter and what to collect.
      factors: multiply the input, `[*batch, K]`. None does not multiply.
      name: the name of the parameter.
      caller: the name that error messages begin with.

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
    if factors is not None:
        factors = factors[position]
    observer = group.request.observer
    own_stats = add_rows(own_stats, product.rows, name, observer, factors)
    return jax.tree.map(lambda leaf, own: leaf.at[position].set(own), stats, own_stats)


def _visit_products(
    program: _Program,
    arrays: dict[int, Any],
    batch: Batch,
    visit: Callable[[Product, Any], Any],
    state: Any,
) -> Products:
    """Traces a function, and evaluates it with `visit`. Returns the `Products`."""
    closed = jax.make_jaxpr(program)(arrays, batch)
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
