"""`jaxq recipes`: the table of named recipes."""

from __future__ import annotations

from typing import Any

import click
import jax
import jax.numpy as jnp

from jaxq import qtensor
from jaxq import recipes as recipes_room
from jaxq.cli import _options, _output, _recipe

# Bits per weight are those of a matrix of this shape.
_SHAPE = (4096, 4096)


@click.command(epilog="\b\nExample:\n  jaxq recipes")
@_options.common
def recipes(as_json: bool) -> None:
    """List the named recipes.

    Bits are bits per weight of a 4096 x 4096 matrix, scales included.
    """
    rows = [_row(name) for name in recipes_room.names()]
    if as_json:
        _output.print_json({"recipes": rows})
        return
    columns = ("recipe", "weights", "inputs", "method", "data", "bits")
    cells = [
        (
            row["name"],
            row["weights"],
            row["inputs"],
            row["method"] + (", rotated" if row["rotated"] else ""),
            "needed" if row["needs_data"] else "-",
            f"{row['bits_per_weight']:.3f}",
        )
        for row in rows
    ]
    _output.print_table(columns, cells, num_text_columns=5)


def _row(name: str) -> dict[str, Any]:
    recipe = recipes_room.get(name)
    rule: Any = next(rule for rule in recipe.rules if not rule.skip)
    weight, activation = rule.weight, rule.activation
    matrix = jax.ShapeDtypeStruct(_SHAPE, jnp.float32)
    qt = jax.eval_shape(lambda w: qtensor.quantize(w, weight), matrix)
    inputs = "floats"
    if activation is not None:
        kind = "dynamic" if rule.observer is None else "static"
        inputs = f"{activation.fmt.name} {kind}"
    return {
        "name": name,
        "weights": weight.fmt.name,
        "inputs": inputs,
        "method": rule.method,
        "rotated": recipe.rotate,
        "needs_data": _recipe.needs_data(recipe),
        "bits_per_weight": qt.bits_per_element,
    }
