"""What to do to which parameter: rules on layer paths, first match wins.

A recipe knows paths, kinds and shapes of layers, not models: `jaxq.nn` asks it about each layer it finds. Every preset
is a weight-only recipe by name; `w8a8` and its like also quantize activations, on the fly or (`w8a8_static`) by a range
that calibration found.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxq import formats
from jaxq.qtensor import QuantSpec, as_spec, as_static, presets

if TYPE_CHECKING:
    from jaxq.observers import Observer

__all__ = ["Layer", "Recipe", "Rule", "as_recipe", "get", "names"]

# (weight, activation) of the recipes that quantize activations dynamically, one scale a token.
_DYNAMIC = {
    "fp8_dynamic": ("fp8", "fp8"),
    "w4a4": ("int4", "int4"),
    "w4a8": ("int4", "int8"),
    "w8a8": ("int8", "int8"),
}

# (weight, activation, observer) of the recipes with one scale for all of a layer's input, known from calibration.
_STATIC = {
    "fp8_static": ("fp8", "fp8", "absmax"),
    "w8a8_static": ("int8", "int8", "absmax"),
}

# (weight, activation, method) of the recipes that quantize by more than rounding to nearest.
_BY_METHOD = {
    "int3_gptq": ("int3", None, "gptq"),
    "int4_adaround": ("int4", None, "adaround"),
    "int4_awq": ("int4", None, "awq"),
    "int4_gptq": ("int4", None, "gptq"),
    "int4_hqq": ("int4", None, "hqq"),
    "llm_int8": ("int8", None, "llm_int8"),
    "w8a8_smoothquant": ("int8", "int8", "smoothquant"),
}

# The same in rotated coordinates.
_ROTATED = {
    "w4a4_rotated": ("int4", "int4"),
    "w8a8_rotated": ("int8", "int8"),
}

# One layer under two names, nnx's and linen's: rules are about both.
_SAME_KIND = {
    "Dense": "Linear",
    "DenseGeneral": "LinearGeneral",
    "Linear": "Dense",
    "LinearGeneral": "DenseGeneral",
}

# What a layer or an array can be called: layers of nnx and linen, arrays of a tree, matrices of a module's own.
KINDS = (
    *(
        "Linear",
        "LinearGeneral",
        "Dense",
        "DenseGeneral",
        "Einsum",
        "Conv",
        "ConvTranspose",
        "Embed",
    ),
    *("Array", "Param"),
)

# What recipes by name leave in floats: small errors there cost most. Names are words of a path, whose components "/"
# separates, or "." in flat dicts of Hugging Face; "LMHead_0" is what linen calls an LMHead without a name.
_IN = r"re:(?i)(?:.*[/.])?"  # anywhere in the model
_TOP = r"re:(?i)(?:(?:base_model|model|module|params|transformer)[/.])*"  # of the model itself
_AND_BELOW = r"(?:_\d+)?(?:[/.].*)?"  # and what is in it
# Arrays that are looked up; "embedding_proj" and what is in it are multiplied with.
_PROJECTION = r"(.*[/._])?(dense|linear|mlp|patch|proj|projection)s?\d*([/._].*)?$"
_TABLES = r"([^/.]*_)?(emb|embed|embedder|embeddings?|relative_attention_bias|wpe|wte)(_[^/.]*)?([/.].*)?"
# Gains and biases; stacks of them have two axes, as matrices do.
_NORM = rf"(?!{_PROJECTION})([^/.]*_)?(bn|(batch|group|layer|rms)?_?norm|ln)(_?\d+|_[^/.]*)?([/.](w|weight))?"
_VECTOR = r"([^/.]*_)?(beta|bias|gain|gamma|mean|scale|var)(es|s)?"
_HEADS = r"embed_out|(?:[^/.]*_)?head|(lm|mlm|output)head|(to_)?logits?(_?dense)?|unembed|unembedding"
# Of the model itself: attention has an `out` too.
_TOP_HEADS = (
    "classifier|cls|out|output|output_(layer|projection)|qa_outputs|readout|score"
)
_ROUTERS = r"router|[^/.]*moe[^/.]*[/.]gate|(?:[^/.]*_)?(expert|moe)_gate"
_MATRICES = (
    "Linear",
    "Dense",
    "Einsum",
    "Array",
    "Param",
)  # attention's own `out` is a LinearGeneral
_IN_FLOATS = (
    # (what, pattern, kinds)
    ("embedding", "**", ("Embed",)),
    ("router", rf"{_IN}({_ROUTERS}){_AND_BELOW}", KINDS),
    ("output head", rf"{_IN}({_HEADS}){_AND_BELOW}", KINDS),
    ("output head", rf"{_TOP}({_TOP_HEADS}){_AND_BELOW}", _MATRICES),
    ("embedding", rf"{_IN}(?!{_PROJECTION}){_TABLES}", ("Array",)),
    ("embedding", rf"{_TOP}shared[/.]weight", ("Array",)),  # T5's
    ("norm or bias", rf"{_IN}({_NORM}|{_VECTOR})", ("Array",)),
    ("adapter", rf"{_IN}lora_?[ab]{_AND_BELOW}", ("Array",)),
)


class Layer(NamedTuple):
    """What a rule sees of a layer.

    Attributes:
      path: components joined by "/".
      kind: "Linear", "Conv", ...; "Array" for an array of a tree that is no model.
      shape: of its weight, stacked axes in front.
      module: the layer's class; None for a bare array.
    """

    path: str
    kind: str
    shape: tuple[int, ...] = ()
    module: type | None = None


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do to the layers a pattern matches.

    Args:
      pattern: glob on the path, components joined by "/": `*` is within a component, `**` any number of components;
        "re:..." is a regular expression that must match the whole path.
      weight: preset name or `QuantSpec` for the weight.
      activation: preset name or `QuantSpec` for the input; None leaves it in floats. It is quantized on the fly, by the
        extremes of each input (a token's, for presets of a scale a channel).
      observer: an observer of `jaxq.observers`, or the name of its kind ("absmax", "minmax", "percentile", ...): the
        input has one range then, which this finds in `calibration=` data ("static"). None looks at each input anew.
      method: how the weight is quantized, one of `jaxq.methods.names()`; those that need data get it from
        `calibration=`.
      options: keyword arguments of the method, `{"act_order": True}` for example.
      correct_bias: add to the layer's bias what its quantized weight falls short of on average, on `calibration=` data
        (`jaxq.methods.bias_correction`).
      skip: leave the layer as it is.
      kinds: layer kinds the rule is about ("Linear", "Conv", ...); empty means all. Linen's Dense goes by "Linear" too,
        its DenseGeneral by "LinearGeneral", and the other way round. Arrays of a tree are "Array"; an `nnx.Param` that
        a module of yours multiplies with is a "Param", which a rule must name here to quantize it.
      where: a function of `jaxq.recipes.Layer` (path, kind, shape, module) that says whether the rule is about a layer
        the pattern matches. Compared by identity: use a function of a module to have equal rules.
      contracting: axes a product with the weight contracts, as in `jaxq.quantize`; None takes them from the layer (of a
        bare matrix -2).
      batch: leading axes of a bare array with statistics of their own; None takes them from the layer.
      reason: what a report says of a skipped layer.
      optional: True where matching nothing is no mistake.

    Raises:
      TypeError: a field of another type, axes that are no integers for example.
      ValueError: neither or both of `weight` and `skip`; an unknown preset, observer, method or kind; a bad regular
        expression; an axis named twice; an observer for an activation whose scales are of blocks.

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

    def __post_init__(self):
        for name in ("pattern", "method"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(
                    f"Rule: {name} must be a string, got {type(getattr(self, name)).__name__}."
                )
        for name in ("skip", "optional", "correct_bias"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"Rule({self.pattern!r}): {name} must be True or False, got {getattr(self, name)!r}."
                )
        if self.skip == (self.weight is not None):
            raise ValueError(
                f"Rule({self.pattern!r}): give either weight= or skip=True."
            )
        if self.skip and self.activation is not None:
            raise ValueError(
                f"Rule({self.pattern!r}): a skipped layer has no activation=."
            )
        if self.skip and self.correct_bias:
            raise ValueError(
                f"Rule({self.pattern!r}): a skipped layer has no error that correct_bias= could correct."
            )
        for field in ("weight", "activation"):
            if getattr(self, field) is not None:
                object.__setattr__(
                    self,
                    field,
                    as_spec(getattr(self, field), f"Rule({self.pattern!r}) {field}"),
                )
        for field in ("contracting", "batch"):
            axes = getattr(self, field)
            if axes is not None:
                object.__setattr__(
                    self, field, _as_axes(axes, f"Rule({self.pattern!r}): {field}")
                )
        if self.observer is not None:
            object.__setattr__(
                self, "observer", _as_observer(self.observer, f"Rule({self.pattern!r})")
            )
            if not isinstance(self.activation, QuantSpec):
                raise ValueError(
                    f"Rule({self.pattern!r}): observer= finds the range of an activation=; there is none."
                )
            as_static(self.activation, f"Rule({self.pattern!r})")
        if self.where is not None and not callable(self.where):
            raise TypeError(
                f"Rule({self.pattern!r}): where must be a function of a Layer, got {self.where!r}."
            )
        if self.method != "rtn":
            from jaxq import methods  # which import optax; most rules name no method

            formats.check_choice(
                f"Rule({self.pattern!r}): method", self.method, methods.names()
            )
            methods.check_options(
                f"Rule({self.pattern!r})", self.method, dict(self.options)
            )
            if isinstance(self.weight, QuantSpec) and (
                why := methods.why_not(self.method, self.weight, dict(self.options))
            ):
                raise ValueError(
                    f"Rule({self.pattern!r}): method {self.method!r}: {why}"
                )
        elif dict(self.options):
            raise ValueError(
                f"Rule({self.pattern!r}): options {dict(self.options)} need a method= that has them."
            )
        if self.method == "llm_int8" and self.observer is not None:
            raise ValueError(
                f"Rule({self.pattern!r}): llm_int8 looks at each input anew, so it takes no observer=."
            )
        options = {
            name: tuple(v) if isinstance(v, list) else v
            for name, v in dict(self.options).items()
        }
        object.__setattr__(
            self, "options", tuple(sorted(options.items()))
        )  # JSON has no tuples
        kinds = (self.kinds,) if isinstance(self.kinds, str) else self.kinds
        if not isinstance(kinds, tuple | list | set | frozenset):
            raise TypeError(
                f"Rule({self.pattern!r}): kinds must be names such as ('Linear', 'Conv'), got {kinds!r}."
            )
        object.__setattr__(self, "kinds", tuple(kinds))
        for kind in self.kinds:
            formats.check_choice(f"Rule({self.pattern!r}): kinds", kind, KINDS)
        try:
            _compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"Rule({self.pattern!r}): not a regular expression: {error}."
            ) from error

    def matches(
        self,
        path: str,
        kind: str,
        shape: tuple[int, ...] = (),
        module: type | None = None,
    ) -> bool:
        """True if the rule is about the layer of this kind at this path."""
        names = {kind, _SAME_KIND.get(kind)}
        if (self.kinds and names.isdisjoint(self.kinds)) or _compile(
            self.pattern
        ).fullmatch(path) is None:
            return False
        return self.where is None or bool(
            self.where(Layer(path, kind, tuple(shape), module))
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description of what is not the default; `from_dict` gives an equal rule back.

        Raises:
          TypeError: `where` is a function, or an option is nothing that JSON has.
        """
        if self.where is not None:
            raise TypeError(
                f"Rule({self.pattern!r}): where={self.where!r} is a function, which JSON cannot hold."
            )
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "pattern" and value == field.default:
                continue
            if field.name == "options":
                value = dict(value)
                try:
                    json.dumps(value)
                except TypeError as error:
                    raise TypeError(
                        f"Rule({self.pattern!r}): options {value} are nothing that JSON has."
                    ) from error
            elif hasattr(value, "to_dict"):
                value = value.to_dict()
            out[field.name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rule:
        """The rule that `to_dict` described.

        Raises:
          ValueError: an unknown field.
        """
        if not isinstance(data, Mapping):
            raise ValueError(
                f"Rule.from_dict: expected a dict of what is in a jaxq.Rule, got {data!r:.80}."
            )
        fields = dict(data)
        known = {field.name for field in dataclasses.fields(cls)} - {"where"}
        for name in fields:
            if name not in known:
                raise ValueError(
                    "Rule.from_dict: "
                    + formats.unknown_name("field", name, known, "jaxq.Rule")
                )
        for name in ("weight", "activation"):
            if isinstance(fields.get(name), Mapping):
                fields[name] = QuantSpec.from_dict(dict(fields[name]))
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Rules in order; the first that matches a layer decides. A layer that none matches stays in floats.

    Args:
      rules: `jaxq.Rule` objects.
      rotate: first put the model into rotated coordinates, in which no channel stands out (Ashkboos et al., QuaRot,
        2024). What it computes stays the same. Its class says how, by a method `rotated` as `jaxq.models.Llama` has,
        or `jaxq.nn.register_rotation`.

    Example:
      >>> import jaxq
      >>> recipe = jaxq.Recipe([jaxq.Rule("lm_head", skip=True), jaxq.Rule("**", weight="nf4")])
      >>> recipe.find("layers/0/mlp/up", "Linear").weight.fmt.name
      'nf4'
    """

    rules: tuple[Rule, ...]
    rotate: bool = False

    def __post_init__(self):
        if isinstance(self.rules, Rule):
            raise TypeError(
                "Recipe: rules must be a list of jaxq.Rule objects, got one Rule. Write [rule]."
            )
        if not isinstance(self.rotate, bool):
            raise TypeError(
                f"Recipe: rotate must be True or False, got {self.rotate!r}."
            )
        object.__setattr__(self, "rules", tuple(self.rules))
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise TypeError(
                    f"Recipe: rules must be jaxq.Rule objects, got {type(rule).__name__}."
                )

    def find(
        self,
        path: str,
        kind: str,
        shape: tuple[int, ...] = (),
        module: type | None = None,
    ) -> Rule | None:
        """The first rule that matches, or None."""
        return next(
            (rule for rule in self.rules if rule.matches(path, kind, shape, module)),
            None,
        )

    def plan(
        self,
        model: Any,
        variables: Any = None,
        *,
        example: Any = None,
        strict: bool = True,
    ) -> Any:
        """What the recipe would do to each parameter of a model: a `jaxq.nn.Report` without measured errors.

        Nothing is quantized, and no array is made; bytes are those the real thing would have.

        Args:
          model: a flax nnx module, a flax linen module (with its `variables`), or a tree of arrays.
          variables: of a linen module.
          example: an input of a linen module, as in `jaxq.nn.linen.quantize_model`.
          strict: as in `jaxq.quantize_model`.

        Raises:
          ValueError: all that `jaxq.quantize_model` would find before it quantizes anything.

        Example:
          >>> import jaxq
          >>> from flax import nnx
          >>> plan = jaxq.Recipe([jaxq.Rule(weight="int8")]).plan(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
          >>> plan.quantized[0].format, plan.bytes_before, plan.bytes_after
          ('int8', 2080, 576)
        """
        from jaxq import nn  # which knows models

        return nn.plan(model, self, variables, example=example, strict=strict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; `from_dict` gives an equal recipe back."""
        rules = {"rules": [rule.to_dict() for rule in self.rules]}
        return {**rules, "rotate": True} if self.rotate else rules

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` described.

        Raises:
          ValueError: something else.

        Example:
          >>> import json, jaxq
          >>> recipe = jaxq.Recipe([jaxq.Rule("lm_head", skip=True), jaxq.Rule(weight="nf4")])
          >>> jaxq.Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
          True
        """
        fits = isinstance(data, Mapping) and {"rules"} <= set(data) <= {
            "rules",
            "rotate",
        }
        if not fits or not isinstance(data["rules"], list | tuple):
            raise ValueError(
                f"Recipe.from_dict: expected {{'rules': [...]}}, got {data!r:.80}."
            )
        return cls(
            tuple(Rule.from_dict(rule) for rule in data["rules"]),
            rotate=data.get("rotate", False),
        )


def names() -> list[str]:
    """The recipes known by name: every preset as weight-only, those that quantize activations too, and by method."""
    return sorted([*presets(), *_DYNAMIC, *_ROTATED, *_STATIC, *_BY_METHOD])


def get(name: str | QuantSpec) -> Recipe:
    """The recipe of a name (`names()`), or of a spec for every weight.

    Raises:
      ValueError: no such recipe; close matches are named.

    Example:
      >>> import jaxq
      >>> recipe = jaxq.Recipe([jaxq.Rule("layers/0/**", weight="int8"), *jaxq.recipes.get("int4").rules])
    """
    return as_recipe(name, "recipes.get")


def as_recipe(recipe: str | QuantSpec | Recipe, caller: str) -> Recipe:
    """A recipe by name, or a spec for every weight; both leave embeddings, norms, output heads and routers in floats.

    Raises:
      ValueError: no such recipe; close matches are named.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str):
        name = recipe.strip().lower().replace("-", "_")
        if name not in names():
            raise ValueError(
                f"{caller}: {formats.unknown_name('recipe', recipe, names(), 'jaxq.recipes.names()')}"
            )
        method, observer, rotate = "rtn", None, name in _ROTATED
        if name in _BY_METHOD:
            weight, activation, method = _BY_METHOD[name]
        elif name in _STATIC:
            weight, activation, observer = _STATIC[name]
        else:
            weight, activation = (_DYNAMIC | _ROTATED).get(name, (name, None))
    elif isinstance(recipe, QuantSpec):
        weight, activation, observer, method, rotate = recipe, None, None, "rtn", False
    else:
        raise TypeError(
            f"{caller}: recipe must be a name, a QuantSpec or a jaxq.Recipe, got {type(recipe).__name__}."
        )
    defaults = (
        Rule(
            pattern,
            kinds=kinds,
            skip=True,
            reason=f"{what}, left in floats by default",
            optional=True,
        )
        for what, pattern, kinds in _IN_FLOATS
    )
    last = Rule(weight=weight, activation=activation, observer=observer, method=method)
    return Recipe((*defaults, last), rotate=rotate)


def _as_axes(axes: Any, what: str) -> tuple[int, ...]:
    """Axes as a tuple of different integers."""
    found = tuple(axes) if isinstance(axes, list | tuple) else (axes,)
    if not all(hasattr(a, "__index__") and not isinstance(a, bool) for a in found):
        raise TypeError(
            f"{what} must be an axis or several, such as -2 or (0, 1), got {axes!r}."
        )
    found = tuple(operator.index(a) for a in found)
    if len(set(found)) != len(found):
        raise ValueError(f"{what} names an axis twice: {axes!r}. Name each once.")
    return found


def _as_observer(observer: Any, caller: str) -> Any:
    """An observer, by its kind's name or as `to_dict` described it."""
    from jaxq import observers  # most rules name none

    if isinstance(observer, str):
        name = observer.strip().lower().replace("-", "_")
        formats.check_choice(f"{caller}: observer", name, observers.names())
        return observers.from_dict({"type": name})
    if isinstance(observer, Mapping):
        return observers.from_dict(dict(observer))
    if not isinstance(observer, observers.Observer):
        raise TypeError(
            f"{caller}: observer must be a name or one of jaxq.observers, got {type(observer).__name__}."
        )
    if observer.axis is not None:
        raise ValueError(
            f"{caller}: one range covers a layer's input, so observer={observer!r} must not keep an axis."
        )
    return observer


def _compile(pattern: str) -> re.Pattern[str]:
    if pattern.startswith("re:"):
        return re.compile(pattern[3:])
    parts = []
    for part in pattern.split("/"):
        if part == "**":
            parts += [] if parts[-1:] == ["**"] else ["**"]
        else:
            parts.append(
                "".join(
                    "[^/]*" if c == "*" else "[^/]" if c == "?" else re.escape(c)
                    for c in part
                )
            )
    text = "/".join(parts)
    # "**/" may stand for nothing, "/**" for nothing, a lone "**" for everything.
    text = text.replace("/**/", "/(?:.*/)?")
    text = re.sub(r"^\*\*/", "(?:.*/)?", text)
    text = re.sub(r"/\*\*$", "(?:/.*)?", text)
    return re.compile(text.replace("**", ".*"))
