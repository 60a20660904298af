"""Finds the layer in front of a batch norm in a trace of one batch.

During the trace, each layer names its output (`name_output`), and each batch norm names
its input (`name_input`). If the output of a layer is the input of a batch norm, and
nothing else reads this value, the batch norm can be folded into the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxq.jaxprs import inner_jaxprs
from jaxq.recipes import compile_pattern

_OUTPUT, _INPUT = "jaxq output of ", "jaxq input of "


def name_output(y: jax.Array, path: str) -> jax.Array:
    """The output of a layer, with a name that the trace shows."""
    return checkpoint_name(y, _OUTPUT + path)


def name_input(x: jax.Array, path: str) -> jax.Array:
    """The input of a batch norm, with a name that the trace shows."""
    return checkpoint_name(x, _INPUT + path)


def chosen_norms(
    norms: Sequence[str] | None, paths: Sequence[str], caller: str
) -> list[str]:
    """The batch norms that patterns choose.

    Args:
      norms: the patterns. None chooses all batch norms.
      paths: the batch norms of the model.
      caller: errors begin with this name.

    Raises:
      ValueError: the model has no batch norm, or a pattern matches none.
    """
    if not paths:
        raise ValueError(
            f"{caller}: the model has no BatchNorm of Flax. Leave out the folding of "
            "batch norms."
        )
    if norms is None:
        return list(paths)
    matched = {norm: _matches(norm, paths) for norm in norms}
    unmatched = [norm for norm in norms if not matched[norm]]
    if unmatched or not norms:
        raise ValueError(
            f"{caller}: the patterns {unmatched} match no batch norm. The batch norms "
            f"of the model are {list(paths)}."
        )
    return [path for path in paths if any(path in m for m in matched.values())]


def find_pairs(
    chosen: Iterable[str],
    trace: NormTrace,
    why_not: Callable[[str, str], str],
    caller: str,
    argument: str,
) -> dict[str, str]:
    """The layer in front of each batch norm, by the path of the batch norm.

    Args:
      chosen: the paths of the batch norms.
      trace: the trace of a batch.
      why_not: `why_not(norm, layer)` says why the two cannot be folded, or returns "".
      caller: errors begin with this name.
      argument: the argument of the caller that chooses batch norms.

    Raises:
      ValueError: a batch norm cannot be folded. The error names all of them.
    """
    pairs, problems = {}, []
    for path in chosen:
        layer, problem = trace.layer_before(path)
        problem = problem or why_not(path, layer)
        if problem:
            problems.append(f"  {path or 'the model itself'}: {problem}")
        else:
            pairs[path] = layer
    if problems:
        remedy = "Leave out the folding of batch norms."
        if pairs:
            remedy = f"To fold only the others, pass {argument}={list(pairs)}."
        lines = [f"{caller}: some batch norms cannot be folded.", *problems, remedy]
        raise ValueError("\n".join(lines))
    return pairs


class NormTrace:
    """What a trace shows about layers and batch norms.

    Args:
      jaxpr: of the trace.

    Attributes:
      pairs: the path of the layer that computes the input of each batch norm, by the
        path of the batch norm.
      calls: how often the trace calls each layer and batch norm, by the name of the
        output of the layer, or of the input of the batch norm.
      shared: the layers whose outputs are read more than once.
    """

    def __init__(self, jaxpr: Any):
        self.pairs: dict[str, str] = {}
        self.calls: dict[str, int] = {}
        self.shared: set[str] = set()
        self._visit(jaxpr)

    def layer_before(self, norm: str) -> tuple[str, str]:
        """The layer in front of a batch norm.

        Returns:
          (path of the layer, ""), or ("", why there is no such layer).
        """
        num_calls = self.calls.get(_INPUT + norm, 0)
        if num_calls == 0:
            return "", "the batch does not reach it"
        if num_calls > 1:
            return "", f"the batch reaches it {num_calls} times"
        layer = self.pairs.get(norm)
        if layer is None:
            return "", "its input is not the output of a linear layer or a convolution"
        num_calls = self.calls[_OUTPUT + layer]
        if num_calls > 1:
            return "", f"{layer} in front of it is called {num_calls} times"
        if layer in self.shared:
            return "", f"other computations read the output of {layer} too"
        return layer, ""

    def _visit(self, jaxpr: Any) -> None:
        layers: dict[Any, str] = {}
        num_reads: dict[Any, int] = {}
        atoms = [atom for equation in jaxpr.eqns for atom in equation.invars]
        for atom in (*atoms, *jaxpr.outvars):
            if not hasattr(atom, "val"):  # not a constant
                num_reads[atom] = num_reads.get(atom, 0) + 1
        for equation in jaxpr.eqns:
            for inner in inner_jaxprs(equation):
                self._visit(inner)
            name = str(equation.params.get("name", ""))
            if equation.primitive.name != "name" or not _is_ours(name):
                continue
            self.calls[name] = self.calls.get(name, 0) + 1
            if name.startswith(_OUTPUT):
                output, path = equation.outvars[0], name.removeprefix(_OUTPUT)
                layers[output] = path
                if num_reads.get(output, 0) > 1:
                    self.shared.add(path)
            elif equation.invars[0] in layers:
                self.pairs[name.removeprefix(_INPUT)] = layers[equation.invars[0]]


def _matches(pattern: str, paths: Iterable[str]) -> list[str]:
    compiled = compile_pattern(pattern)
    return [path for path in paths if compiled.matches(path)]


def _is_ours(name: str) -> bool:
    return name.startswith((_OUTPUT, _INPUT))
