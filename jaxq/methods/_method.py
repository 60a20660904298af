"""The record of a post-training method, as recipes and models see it.

A method's file has its function and one `Method` record. Everything else in jaxq reads
the record. No other file compares a method's name with a string.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax

from jaxq.observers import LayerStats
from jaxq.qtensor import Granularity, QTensor, QuantSpec


class Solution(NamedTuple):
    """The result of a method for one weight, or for a stack of weights.

    Attributes:
      qt: the quantized weight. It has the shape of the float weight; axis -2 is
        contracted.
      note: a remark for the report; empty if there is none.
      rounded: True if the method could only round this weight to nearest.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> qt = jaxq.quantize(jnp.ones((4, 2)), "int8")
      >>> jaxq.methods.Solution(qt, note="all weights are equal").rounded
      False
    """

    qt: QTensor
    note: str = ""
    rounded: bool = False


# The statistics that `Method.needs` may name: the fields of `LayerStats`, and `absmax`,
# which `LayerStats` computes from two fields. A method of a convolution gets the
# statistics of its patches as if the patches were rows.
_STATISTICS = (*(name for name in LayerStats._fields if name != "patches"), "absmax")

# Quantizes one weight `[in, out]`, or a stack `[..., in, out]`:
# `(w, stats, spec, *, key, **options) -> Solution`. `Method.solve` explains it.
Solve = Callable[..., Solution]


class Option(NamedTuple):
    """One keyword argument of a method that a `Rule` may set.

    Attributes:
      accepts: `(value) -> bool`: True for a valid value.
      expected: what a valid value is, in words: "a whole number of at least 1".

    Example:
      >>> import jaxq
      >>> shrink = jaxq.methods.Option(lambda v: 0 < v <= 1, "above 0, at most 1")
      >>> shrink.accepts(2)
      False
    """

    accepts: Callable[[Any], bool]
    expected: str


@dataclasses.dataclass(frozen=True)
class Folding:
    """How a method moves scales from the inputs of a layer into the previous layer.

    Weights `w` that read one input become `w * scale[:, None]`, and the outputs of the
    previous layer are divided by `scale`. The model computes the same as before. If no
    previous layer can take the scale, a method with `at_run_time` keeps it with the
    layer, and the input is divided by `scale` at each call.

    Attributes:
      find: `(source, weights, stats, spec, options) -> scale [in]`. `source` is the
        weight of the linear layer before the group, or None after a norm. `weights`
        are the weights `[in, out]` that read one input. `stats` are the statistics of
        that input, or None if there are none and the method needs none.
      why_not: `(source, weights) -> str`: why no scale can be moved here; empty if one
        can.
      judges_source: True if the previous layer is judged too. The scales also change
        its rounding error.
      at_run_time: True if a scale needs no previous layer. `find(None, [w], ...)` then
        gives the scale of one weight.
      without_scales: what the method still does if no scale can be moved, as the report
        says it: "only clipped". Empty if the weight is then only rounded to nearest.

    Example:
      >>> import jaxq
      >>> folding = jaxq.methods.get("awq").folding
      >>> folding.without_scales
      'only clipped'
    """

    find: Callable[..., jax.Array]
    why_not: Callable[[jax.Array | None, Sequence[jax.Array]], str]
    judges_source: bool = False
    at_run_time: bool = False
    without_scales: str = ""


def _no_objection(spec: QuantSpec, options: Mapping[str, Any]) -> str:
    return ""


@dataclasses.dataclass(frozen=True)
class Method:
    """One post-training method, as recipes and models see it.

    Attributes:
      name: the name that a `Rule` uses.
      solve: `(w, stats, spec, *, key, **options) -> Solution`: quantizes one weight, or
        a stack of weights. `w` is float `[..., in, out]` and finite. `stats` are a
        `jaxq.observers.LayerStats` of the layer's inputs with the axes of the stack in
        front, or None. They have the fields that `needs` names. `spec` is a `QuantSpec`
        that `why_not` allows. `key` is a PRNG key. `options` are the checked options of
        the rule. If `solve` is None, the weight is rounded as the spec says, after
        `folding` moved its scales.
      options: the options that a `Rule` may set, with their checks.
      check: `(options) -> str`: what is wrong with a combination of options; empty if
        it is valid. None: every combination is valid.
      why_not: `(spec, options) -> str`: why the method cannot quantize to a spec; empty
        if it can. A `Rule` asks every method, also one without `solve`.
      needs: the fields of `LayerStats` that the method requires: "hessian", "samples",
        "absmax". Empty for a method that works without data.
      needs_with: `(options) -> fields`: further fields that some options require. None
        if no option does.
      granularity: `(spec, options) -> Granularity` of the result. None if the result
        has the granularity of the spec.
      folding: how the method moves scales into the previous layer. None if it does not.
      judged: True if the result is compared with rounding to nearest on held-out
        inputs.
      matrices_only: True if the method is for layers that multiply rows of the input
        with a matrix. A linear layer does so; a convolution does not.
      own_activation: True if the method quantizes the layer's input itself. Then a rule
        sets no observer.
      takes_nearest: True if `solve` also takes `nearest=`, the weight rounded to
        nearest. The method then does not round the weight a second time.

    Raises:
      TypeError: a field has another type than the one above.
      ValueError: `needs` names a statistic that `LayerStats` does not have.

    Example:
      >>> import jaxq
      >>> def solve(w, stats, spec, *, key, shrink=0.5):
      ...     qt, _ = jaxq.methods.clip(w, spec, max_shrink=shrink)
      ...     return jaxq.methods.Solution(qt, note=f"shrunk by up to {shrink:g}")
      >>> shrink = jaxq.methods.Option(lambda v: 0 <= v <= 1, "0 to 1")
      >>> method = jaxq.methods.Method("tight", solve, options={"shrink": shrink})
      >>> method.needs_data({})
      False
    """

    name: str
    solve: Solve | None
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], str] | None = None
    why_not: Callable[[QuantSpec, Mapping[str, Any]], str] = _no_objection
    needs: tuple[str, ...] = ()
    needs_with: Callable[[Mapping[str, Any]], tuple[str, ...]] | None = None
    granularity: Callable[[QuantSpec, Mapping[str, Any]], Granularity] | None = None
    folding: Folding | None = None
    judged: bool = True
    matrices_only: bool = False
    own_activation: bool = False
    takes_nearest: bool = False

    def __hash__(self) -> int:
        """By the name, because `options` is a mapping, which may have no hash."""
        return hash(self.name)

    def __post_init__(self):
        if not (isinstance(self.name, str) and self.name):
            self._refuse("name", "a non-empty string")
        if not callable(self.why_not):
            self._refuse("why_not", "a function")
        for field in ("solve", "check", "needs_with", "granularity"):
            function = getattr(self, field)
            if function is not None and not callable(function):
                self._refuse(field, "a function or None")
        if not isinstance(self.folding, Folding | None):
            self._refuse("folding", "a jaxq.methods.Folding or None")
        for field in ("judged", "matrices_only", "own_activation", "takes_nearest"):
            if not isinstance(getattr(self, field), bool):
                self._refuse(field, "True or False")
        self._check_options()
        self._check_needs()

    def _check_options(self) -> None:
        """Raises a TypeError unless `options` maps names to `Option` records."""
        expected = "a dict of jaxq.methods.Option by option name"
        if not isinstance(self.options, Mapping):
            self._refuse("options", expected)
        for name, option in self.options.items():
            is_option = isinstance(name, str) and isinstance(option, Option)
            if not (is_option and callable(option.accepts)):
                self._refuse("options", expected)

    def _check_needs(self) -> None:
        """Raises an error unless `needs` is a tuple of names of statistics."""
        expected = f"a tuple of names of statistics ({', '.join(_STATISTICS)})"
        is_tuple = isinstance(self.needs, tuple)
        if not (is_tuple and all(isinstance(name, str) for name in self.needs)):
            self._refuse("needs", expected)
        unknown = [name for name in self.needs if name not in _STATISTICS]
        if unknown:
            raise ValueError(
                f"Method {self.name!r}: needs must be {expected}, got {self.needs!r}."
            )

    def _refuse(self, field: str, expected: str) -> NoReturn:
        """Raises the TypeError of a field."""
        value = getattr(self, field)
        raise TypeError(
            f"Method {self.name!r}: {field} must be {expected}, got {value!r}."
        )

    def needs_data(self, options: Mapping[str, Any]) -> bool:
        """True if the method cannot work without statistics of the layer's inputs."""
        return bool(self.needed_statistics(options))

    def needed_statistics(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The fields of `LayerStats` that the method requires with these options."""
        further = () if self.needs_with is None else self.needs_with(options)
        return (*self.needs, *further)

    def nearest_spec(self, spec: QuantSpec, options: Mapping[str, Any]) -> QuantSpec:
        """The spec for rounding to nearest, with which this method is compared.

        It is `spec` with the granularity of the method's own result.
        """
        if self.granularity is None:
            return spec
        return spec.replace(granularity=self.granularity(spec, options))
