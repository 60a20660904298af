"""`Layout.from_qtensor`, compiled once for weights of equal shapes.

A compiled program converts a weight in one pass over its codes. Some layouts need
numbers while they write, such as the offset of nested scales. They run uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxq.io.layouts import Layout
from jaxq.qtensor import QTensor


class CompiledConversions:
    """Converts QTensors by programs that it keeps.

    The checks of numbers that a layout makes outside jit are not made. So the QTensors
    must come from `quantize`.
    """

    def __init__(self):
        self._programs: dict[Any, _Program | None] = {}

    def __call__(
        self, layout: Layout, qt: QTensor
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arrays and the settings of `layout.from_qtensor(qt)`."""
        qt = qt.with_meta(name="")  # otherwise each weight has a program of its own
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(qt))
        key = (layout.name, jax.tree.structure(qt), shapes)
        if key not in self._programs:
            try:
                self._programs[key] = _Program(layout, qt)
            except ValueError:
                # The layout needs numbers, or refuses the weight with its own error.
                self._programs[key] = None
        program = self._programs[key]
        return layout.from_qtensor(qt) if program is None else program(qt)


class _Program:
    """A compiled conversion. Arrays that do not depend on numbers are kept."""

    def __init__(self, layout: Layout, qt: QTensor):
        self._constants: dict[str, Any] = {}
        self._settings: dict[str, Any] = {}

        def convert(qt: QTensor) -> dict[str, jax.Array]:
            arrays, self._settings = layout.from_qtensor(qt)
            self._constants = {
                name: array
                for name, array in arrays.items()
                if not isinstance(array, jax.Array)
            }
            return {
                name: array
                for name, array in arrays.items()
                if isinstance(array, jax.Array)
            }

        jax.eval_shape(convert, qt)
        self._convert: Callable[[QTensor], dict[str, jax.Array]] = jax.jit(convert)

    def __call__(self, qt: QTensor) -> tuple[dict[str, Any], dict[str, Any]]:
        arrays = self._convert(qt)
        return self._constants | arrays, dict(self._settings)
