"""What jaxq knows of a post-training method: one record per method, and their registry.

A method's file holds its function and one `Method`. Everything else in jaxq asks the
record. No other file compares a method's name with a string.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from jaxq import formats
from jaxq.observers import LayerStats
from jaxq.qtensor import Granularity, QTensor, QuantSpec


class Solution(NamedTuple):
    """What a method made of one weight.

    Attributes:
      qt: the quantized weight, same shape as the float weight, axis -2 contracted.
      note: what the report should say about it; empty if nothing.
      rounded: True if the method could only round this weight to nearest.
    """

    qt: QTensor
    note: str = ""
    rounded: bool = False


class Solve(Protocol):
    """Quantizes one weight `[..., in, out]`, or a stack of weights."""

    def __call__(
        self,
        w: jax.Array,
        stats: LayerStats | None,
        spec: QuantSpec,
        *,
        key: jax.Array,
        **options: Any,
    ) -> Solution: ...


class Option(NamedTuple):
    """One keyword argument of a method that a `Rule` may set.

    Attributes:
      accepts: True for a valid value.
      expected: what a valid value is, in words: "a whole number of at least 1".
    """

    accepts: Callable[[Any], bool]
    expected: str


@dataclasses.dataclass(frozen=True)
class Folding:
    """How a method moves scales out of a weight into the layer before it.

    Attributes:
      find: `(source, weights, stats, spec, options) -> scale [in]`. `source` is the
        weight of the linear layer before the group, or None behind a norm. `weights`
        are the weights `[in, out]` that read one input. `stats` are of that input.
      why_not: `(source, weights) -> str`: why no scale can be moved here; empty if one
        can.
      judges_source: the scales change the rounding error of the layer before as well,
        so that layer is judged too.
      without_scales: what the report says the method still did where no scale could be
        moved ("only clipped"). Empty if the weight is then only rounded to nearest.
    """

    find: Callable[..., jax.Array]
    why_not: Callable[[jax.Array | None, Sequence[jax.Array]], str]
    judges_source: bool = False
    without_scales: str = ""


def _no_objection(spec: QuantSpec, options: Mapping[str, Any]) -> str:
    return ""


@dataclasses.dataclass(frozen=True)
class Method:
    """One post-training method, as recipes and models see it.

    Attributes:
      name: what a `Rule` calls it.
      solve: quantizes a weight. None: the weight is rounded to nearest, after
        `folding` moved its scales.
      options: the options a `Rule` may set, with their checks.
      check: `(options) -> str`: what is wrong with a combination of options; empty if
        nothing is.
      why_not: `(spec, options) -> str`: why the method cannot quantize to a spec; empty
        if it can.
      needs: the fields of `LayerStats` it cannot work without: "hessian", "samples",
        "absmax". Empty for a method that works without data.
      needs_with: `(options) -> needs`, where options add to them; None if they do not.
      granularity: `(spec, options) -> Granularity`, where the method does not use the
        spec's; None if it does.
      folding: how it moves scales into the layer before; None if it does not.
      judged: its result is compared with rounding to nearest on held-out inputs.
      matrices_only: it needs inputs whose rows meet the weight as a matrix, as those of
        a linear layer do and those of a convolution do not.
      own_activation: it quantizes the layer's input itself, so a rule sets no observer.
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

    def needs_data(self, options: Mapping[str, Any]) -> bool:
        """True if the method cannot work without statistics of the layer's inputs."""
        return bool(self.needed_statistics(options))

    def needed_statistics(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The fields of `LayerStats` it cannot work without, with these options."""
        more = () if self.needs_with is None else self.needs_with(options)
        return (*self.needs, *more)


_METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Makes a method known by its name, so that a `Rule` can use it.

    Raises:
      ValueError: another method has this name.
    """
    known = _METHODS.get(method.name)
    if known is not None and known is not method:
        raise ValueError(
            f"methods.register: a method {method.name!r} exists already. "
            "Choose another name."
        )
    _METHODS[method.name] = method


def get(name: str) -> Method:
    """The method of this name.

    Raises:
      ValueError: no such method; close matches are named.
    """
    formats.check_choice("methods.get: name", name, names())
    return _METHODS[name]


def names() -> list[str]:
    """The methods that recipes can name, sorted."""
    return sorted(_METHODS)
