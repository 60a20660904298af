"""A rule: which layers it applies to, and how they are quantized."""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxq import formats
from jaxq.qtensor import QuantSpec, as_activation_spec, as_spec, as_static
from jaxq.recipes._kinds import kinds, names_of
from jaxq.recipes._patterns import compile_pattern

if TYPE_CHECKING:
    from jaxq.observers import Observer


class Layer(NamedTuple):
    """What `Rule(where=...)` sees of a layer.

    Attributes:
      path: the layer's path, components joined by "/".
      kind: "Linear", "Conv", ...; "Array" for an array of a tree that is not a model.
      shape: the shape of its weight; stacked axes come first.
      module: the layer's class; None for an array of a tree.

    Example:
      >>> import jaxq
      >>> large = jaxq.Rule(where=lambda layer: layer.shape[0] > 64, weight="int4")
      >>> large.matches("up", "Linear", (128, 8)), large.matches("up", "Linear", (8, 8))
      (True, False)
    """

    path: str
    kind: str
    shape: tuple[int, ...] = ()
    module: type | None = None


@dataclasses.dataclass(frozen=True)
class Rule:
    """How to quantize the layers that a pattern matches.

    Args:
      pattern: glob on the path of a layer, whose components are joined by "/". `*`
        matches within one component and `**` any number of components. "re:..." is a
        regular expression that must match the whole path. Some regular expressions
        take exponential time, so use "re:" only in recipes that you trust.
      weight: preset name or `QuantSpec` for the weight.
      activation: preset name or `QuantSpec` for the input; None leaves the input in
        floats. Without `observer` this is dynamic activation quantization: each call
        uses the range of its own input. A per-channel preset has one scale per token.
        The names "int4" and "int3" mean "int4_absmax" and "int3_absmax" here.
      observer: an observer of `jaxq.observers`, or its name ("absmax", "minmax",
        "percentile", ...). The input then has one static range, which the observer
        finds in the calibration batches.
      method: how the weight is quantized: one of `jaxq.methods.names()`. A method that
        needs data gets it from `calibration=`.
      options: keyword arguments of the method, for example `{"act_order": True}`.
      correct_bias: correct the layer's bias for the mean error of its quantized weight
        on the calibration batches (`jaxq.methods.bias_correction`).
      skip: leave the layer in floats.
      kinds: the kinds of layers the rule applies to ("Linear", "Conv", ...; see
        `jaxq.recipes.kinds()`). Empty means all. "Linear" includes linen's Dense, and
        "LinearGeneral" includes DenseGeneral; the reverse holds as well. "Array" is an
        array of a tree. "Param" is an `nnx.Param` that a module of your own class
        multiplies with; it is quantized only if a rule lists "Param".
      where: a function of a `jaxq.recipes.Layer` that returns True if the rule applies.
        Two rules are equal only if they have the same function object.
      contracting: the axes of the weight that its product contracts, as in
        `jaxq.quantize`. None takes them from the layer; for a bare matrix it means -2,
        or the axes that a trace of calibration batches shows.
      batch: leading axes of a bare array that get separate scales. None takes them
        from the layer.
      reason: what the report says about a skipped layer.
      optional: True if the rule may match nothing. Otherwise that is an error.
      or_nearest: True rounds a layer to nearest if the method cannot quantize layers of
        its kind, and the report says so. Otherwise that is an error. The rules of named
        recipes have True.

    Raises:
      TypeError: a field has the wrong type.
      ValueError: both or neither of `weight` and `skip` are given; a preset, observer,
        method, option or kind is unknown; the method cannot quantize to this spec; the
        regular expression is invalid; an axis is named twice; `observer` is given
        without `activation`, or with an activation that has no single static range; or
        the spec of the activation names an axis or rounds stochastically.

    Example:
      >>> import jaxq
      >>> rule = jaxq.Rule("**/attn/*", weight="int8", activation="int8")
      >>> rule.matches("layers/0/attn/query", "Linear"), rule.matches("attn", "Linear")
      (True, False)
    """

    pattern: str = "**"
    weight: str | QuantSpec | None = None
    activation: str | QuantSpec | None = None
    observer: str | Observer | None = None
    method: str = "rtn"
    options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    correct_bias: bool = False
    skip: bool = False
    kinds: tuple[str, ...] = ()
    where: Callable[[Layer], bool] | None = None
    contracting: tuple[int, ...] | None = None
    batch: tuple[int, ...] | None = None
    reason: str | None = None
    optional: bool = False
    or_nearest: bool = False

    def __post_init__(self):
        self._check_types()
        self._check_skip()
        self._normalize_specs()
        self._normalize_axes()
        self._normalize_observer()
        self._check_method()
        self._normalize_options()
        self._normalize_kinds()
        self._check_pattern()

    @property
    def name(self) -> str:
        """The name of this rule in errors."""
        return f"Rule({self.pattern!r})"

    def matches(
        self,
        path: str,
        kind: str,
        shape: tuple[int, ...] = (),
        module: type | None = None,
    ) -> bool:
        """True if the rule applies to a layer.

        Args:
          path: the layer's path, components joined by "/".
          kind: the layer's kind: "Linear", "Conv", ...
          shape: the shape of its weight.
          module: the layer's class; None for an array of a tree.
        """
        if self.kinds and names_of(kind).isdisjoint(self.kinds):
            return False
        if not compile_pattern(self.pattern).matches(path):
            return False
        if self.where is None:
            return True
        return bool(self.where(Layer(path, kind, tuple(shape), module)))

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as a dict that JSON can hold.

        `from_dict` returns an equal rule.

        Raises:
          TypeError: `where` is a function, or JSON cannot hold an option.
        """
        if self.where is not None:
            raise TypeError(
                f"{self.name}: where={self.where!r} is a function. JSON cannot hold a "
                "function. Use pattern= or kinds= instead."
            )
        description: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "pattern" and value == field.default:
                continue
            if field.name == "options":
                value = self._options_for_json()
            elif hasattr(value, "to_dict"):
                value = value.to_dict()
            description[field.name] = list(value) if isinstance(value, tuple) else value
        return description

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rule:
        """The rule that `to_dict` described.

        Raises:
          ValueError: `data` is not a dict, or a field is unknown or invalid. The error
            names the field.
        """
        if not isinstance(data, Mapping):
            raise ValueError(
                "Rule.from_dict: expected a dict with the fields of a jaxq.Rule, got "
                f"{data!r:.80}."
            )
        known = {field.name for field in dataclasses.fields(cls)} - {"where"}
        for name in data:
            if name not in known:
                message = formats.unknown_name("field", name, known, "jaxq.Rule")
                raise ValueError(f"Rule.from_dict: {message}")
        fields = dict(data)
        for name in ("weight", "activation"):
            if isinstance(fields.get(name), Mapping):
                try:
                    fields[name] = QuantSpec.from_dict(dict(fields[name]))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"Rule.from_dict: {name}: {error}") from error
        try:
            return cls(**fields)
        # The fields of a stranger's file can have any type.
        except (
            *(ArithmeticError, AttributeError, LookupError),
            *(RecursionError, SyntaxError, TypeError),
        ) as error:
            raise ValueError(f"Rule.from_dict: {error}") from error

    def _set(self, field: str, value: Any) -> None:
        """Sets a field of the frozen dataclass while it is being made."""
        object.__setattr__(self, field, value)

    def _check_types(self) -> None:
        for field in ("pattern", "method"):
            value = getattr(self, field)
            if not isinstance(value, str):
                raise TypeError(
                    f"Rule: {field} must be a string, got {type(value).__name__}."
                )
        for field in ("skip", "optional", "correct_bias", "or_nearest"):
            value = getattr(self, field)
            if not isinstance(value, bool):
                raise TypeError(
                    f"{self.name}: {field} must be True or False, got {value!r}."
                )
        if self.where is not None and not callable(self.where):
            raise TypeError(
                f"{self.name}: where must be a function of a Layer, got {self.where!r}."
            )

    def _check_skip(self) -> None:
        if self.skip == (self.weight is not None):
            raise ValueError(f"{self.name}: give either weight= or skip=True.")
        if self.skip and self.activation is not None:
            raise ValueError(
                f"{self.name}: a skipped layer stays in floats, so activation= has no "
                "effect. Leave it out."
            )
        if self.skip and self.correct_bias:
            raise ValueError(
                f"{self.name}: a skipped layer has no quantization error that "
                "correct_bias= could correct. Leave it out."
            )

    def _normalize_specs(self) -> None:
        for field in ("weight", "activation"):
            name = getattr(self, field)
            recipe = formats.recipe_name(name)
            if recipe is not None:
                rotate = " with rotate=True" if recipe.rotate else ""
                raise ValueError(
                    f"{self.name}: {field}={name!r} is a recipe for models, not a "
                    f"preset. Write {recipe.fields} in the rule, or add "
                    f"*jaxq.recipes.get({name!r}).rules to the jaxq.Recipe{rotate}."
                )
        if self.weight is not None:
            self._set("weight", as_spec(self.weight, f"{self.name} weight"))
        if self.activation is not None:
            activation = as_activation_spec(self.activation, f"{self.name} activation")
            self._set("activation", activation)

    def _normalize_axes(self) -> None:
        for field in ("contracting", "batch"):
            value = getattr(self, field)
            if value is not None:
                self._set(field, _as_axes(value, f"{self.name}: {field}"))

    def _normalize_observer(self) -> None:
        if self.observer is None:
            return
        self._set("observer", _as_observer(self.observer, self.name))
        if not isinstance(self.activation, QuantSpec):
            raise ValueError(
                f"{self.name}: observer= finds the static range of activation=, and "
                "this rule has no activation=. Add it, or leave observer= out."
            )
        as_static(self.activation, self.name)

    def _check_method(self) -> None:
        """Checks the method's name, its options, and whether it fits the spec."""
        # Imported here: methods import optax, and `import jaxq` must stay light.
        from jaxq import methods

        formats.check_choice(f"{self.name}: method", self.method, methods.names())
        record = methods.get(self.method)
        options = dict(self.options)
        if options and not record.options:
            raise ValueError(
                f"{self.name}: method {self.method!r} has no options, got {options}. "
                "Leave them out, or pass the method= that has them."
            )
        methods.check_options(self.name, self.method, options)
        if isinstance(self.weight, QuantSpec):
            objection = record.why_not(self.weight, options)
            if objection:
                raise ValueError(f"{self.name}: method {self.method!r}: {objection}")
        if record.own_activation and self.observer is not None:
            raise ValueError(
                f"{self.name}: method {self.method!r} quantizes each input by its own "
                "range, so it takes no observer=. Leave it out."
            )

    def _normalize_options(self) -> None:
        """Options as sorted pairs: equal rules compare equal, also after JSON."""
        pairs = []
        for name, value in sorted(dict(self.options).items()):
            # JSON has lists and no tuples.
            pairs.append((name, tuple(value) if isinstance(value, list) else value))
        self._set("options", tuple(pairs))

    def _normalize_kinds(self) -> None:
        value: Any = (self.kinds,) if isinstance(self.kinds, str) else self.kinds
        if not isinstance(value, tuple | list | set | frozenset):
            raise TypeError(
                f"{self.name}: kinds must be names such as ('Linear', 'Conv'), got "
                f"{value!r}."
            )
        self._set("kinds", tuple(value))
        for kind in self.kinds:
            formats.check_choice(f"{self.name}: kinds", kind, kinds())

    def _check_pattern(self) -> None:
        try:
            compile_pattern(self.pattern)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}.") from error

    def _options_for_json(self) -> dict[str, Any]:
        options = dict(self.options)
        try:
            json.dumps(options)
        except TypeError as error:
            raise TypeError(
                f"{self.name}: JSON cannot hold the options {options}: {error}. Use "
                "numbers, strings, booleans and tuples."
            ) from error
        return options


def _as_axes(axes: Any, name: str) -> tuple[int, ...]:
    """Axes as a tuple of different integers. `name` is their name in errors."""
    values = tuple(axes) if isinstance(axes, list | tuple) else (axes,)
    for value in values:
        if not hasattr(value, "__index__") or isinstance(value, bool):
            raise TypeError(
                f"{name} must be one axis or several, such as -2 or (0, 1), got "
                f"{axes!r}."
            )
    integers = tuple(operator.index(value) for value in values)
    if len(set(integers)) != len(integers):
        raise ValueError(f"{name} names an axis twice: {axes!r}. Name each axis once.")
    return integers


def _as_observer(observer: Any, caller: str) -> Any:
    """Converts a name or a dict of `to_dict` to an observer, and checks an observer."""
    from jaxq import observers  # most rules name no observer

    if isinstance(observer, str):
        name = observer.strip().lower().replace("-", "_")
        formats.check_choice(f"{caller}: observer", name, observers.names())
        return observers.from_dict({"type": name})
    if isinstance(observer, Mapping):
        return observers.from_dict(dict(observer))
    if not isinstance(observer, observers.Observer):
        raise TypeError(
            f"{caller}: observer must be a name or an observer of jaxq.observers, got "
            f"{type(observer).__name__}."
        )
    if observer.axis is not None:
        raise ValueError(
            f"{caller}: observer={observer!r} keeps an axis. One static range covers "
            "the whole input of a layer, so leave axis= out."
        )
    return observer
