"""One jitted training step of a student with a teacher."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.core import FrozenDict, freeze, unfreeze

from jaxq.distillation._model import (
    Model,
    as_model,
    check_apply,
    is_pair,
    split_batch,
)
from jaxq.qtensor import combine, is_traced, partition


class StepState(NamedTuple):
    """What a training step changes. It is a pytree, so it can be saved and restored.

    Attributes:
      params: the arrays that are trained.
      opt_state: the state of the optax transformation.
      variables: the student's other arrays: codes, running averages, random keys.
    """

    params: Any
    opt_state: Any
    variables: Any


class Student(NamedTuple):
    """A student as pure functions.

    Attributes:
      call: `call(params, variables, inputs)` returns (outputs, new variables).
      restored: `restored(params, variables)` returns the module, or the params of a
        pair.
      params: the arrays to train.
      variables: the other arrays.
    """

    call: Callable[[Any, Any, Any], tuple[Any, Any]]
    restored: Callable[[Any, Any], Any]
    params: Any
    variables: Any


class Step:
    """A training step that `make_step` made.

    `step.init()` is the first state. `step(state, batch)` returns `(state, loss)`. The
    old state cannot be used again, because its memory is reused.
    `step.student(state)` is the trained student.
    """

    def __init__(
        self,
        student: Student,
        teacher: Model | None,
        tx: optax.GradientTransformation,
        loss: Callable[..., jax.Array],
    ):
        self._student, self._tx, self._loss = student, tx, loss
        self._teacher_function = None if teacher is None else teacher.function
        self._teacher_arrays = None if teacher is None else teacher.arrays
        self._compiled = jax.jit(self._update, donate_argnums=0)

    def init(self) -> StepState:
        """The state before the first step. Its arrays are copies of the student's."""
        params, variables = _copies((self._student.params, self._student.variables))
        # The state of a transformation may hold the parameters themselves. No array may
        # be donated twice.
        opt_state = _copies(self._tx.init(params))
        return StepState(params, opt_state, variables)

    def __call__(self, state: StepState, batch: Any) -> tuple[StepState, jax.Array]:
        """Trains on one batch.

        Args:
          state: from `init` or the step before.
          batch: the inputs of both models, or a tuple or list `(inputs, *rest)`.

        Returns:
          The new state, and the loss before the step.

        Raises:
          ValueError: the state was used for an earlier step; the batch is an empty
            tuple.
        """
        _check_alive(state)
        return self._compiled(state, self._teacher_arrays, batch)

    def student(self, state: StepState) -> Any:
        """The student with the arrays of a state.

        Returns:
          A new nnx module, or new parameters if the student is a pair. The arrays are
          copies, so later steps do not change them.

        Raises:
          ValueError: the state was used for an earlier step.
        """
        _check_alive(state)
        arrays = _copies((state.params, state.variables))
        return self._student.restored(*arrays)

    def _update(
        self, state: StepState, teacher_arrays: Any, batch: Any
    ) -> tuple[StepState, jax.Array]:
        inputs, rest = split_batch(batch, "make_step")
        if self._teacher_function is not None:
            targets = self._teacher_function(teacher_arrays, inputs)
            rest = (jax.lax.stop_gradient(targets), *rest)

        def objective(params: Any) -> tuple[jax.Array, Any]:
            outputs, variables = self._student.call(params, state.variables, inputs)
            return self._loss(outputs, *rest), variables

        gradient = jax.value_and_grad(objective, has_aux=True)
        (value, variables), grads = gradient(state.params)
        updates, opt_state = self._tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return StepState(params, opt_state, variables), value


def make_step(
    student: Any,
    teacher: Any,
    tx: optax.GradientTransformation,
    loss: Callable[..., jax.Array],
    *,
    wrt: Any = nnx.Param,
) -> Step:
    """Makes a jitted training step of a student with a teacher.

    For a batch `(inputs, *rest)`, the loss is called as
    `loss(student_outputs, teacher_outputs, *rest)`. So `kd_loss` is such a loss for
    batches `(inputs, labels)`. One program is compiled for each shape of a batch. No
    gradient reaches the teacher. The arguments `student` and `teacher` do not change,
    because the trained arrays are in the state.

    Args:
      student: an nnx module or a pair `(apply, params)`. A module keeps its mode. Call
        `student.train()` before, to turn dropout on. A linen module is the pair
        `(module.apply, variables)`. If `variables` has other collections beside
        "params", such as "batch_stats" or "quant_stats", only "params" is trained. The
        others are updated, because `apply` is called as
        `apply(variables, inputs, mutable=names)` with their names. It must return
        `(outputs, changed collections)`, as `module.apply` does. Pass
        `functools.partial(module.apply, train=True)` for more arguments.
      teacher: an nnx module, which is called in eval mode; a pair `(apply, params)`; or
        a function of the inputs that jax can trace. None if the batches contain the
        teacher's outputs, as those of `LogitsCache.batches` do. The loss is then called
        as `loss(student_outputs, *rest)`.
      tx: optax transformation.
      loss: returns a scalar.
      wrt: a filter, as in `nnx.Optimizer`, for the variables of an nnx student that are
        trained. In a pair, all float arrays of `params`, or of the collection "params",
        are trained (`jaxq.partition`).

    Returns:
      The step. `step.init()` is the first state, `step(state, batch)` returns
      `(state, loss)`, and `step.student(state)` is the trained student.

    Raises:
      TypeError: a model is of another kind, or the `apply` of linen variables does not
        take `mutable`.
      ValueError: the student has nothing to train.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq, optax
      >>> from flax import nnx
      >>> teacher, student = (nnx.Linear(4, 3, rngs=nnx.Rngs(i)) for i in range(2))
      >>> step = jaxq.distillation.make_step(
      ...     student, teacher, optax.sgd(0.1), jaxq.distillation.kd_loss)
      >>> state = step.init()
      >>> x = jax.random.normal(jax.random.key(0), (16, 4))
      >>> labels = teacher(x).argmax(-1)
      >>> state, first = step(state, (x, labels))
      >>> for _ in range(20):
      ...     state, last = step(state, (x, labels))
      >>> bool(last < first)
      True
      >>> student = step.student(state)

    References:
      Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    pure_student = _as_student(student, wrt)
    if not jax.tree.leaves(pure_student.params):
        raise ValueError(
            "make_step: the student has nothing to train. wrt= chooses the variables "
            "of an nnx module. The params of a pair need a float array."
        )
    pure_teacher = None
    if teacher is not None:
        pure_teacher = as_model(teacher, "make_step", "teacher")
    return Step(pure_student, pure_teacher, tx, loss)


def _copies(tree: Any) -> Any:
    """Copies of all arrays. A step reuses the memory of its state, so it owns them."""
    return jax.tree.map(jnp.copy, tree)


def _as_student(student: Any, wrt: Any) -> Student:
    if isinstance(student, nnx.Module):
        return _nnx_student(student, wrt)
    if is_pair(student):
        apply, arrays = student
        check_apply(apply, "make_step", "student")
        if isinstance(arrays, Mapping) and "params" in arrays and len(arrays) > 1:
            return _linen_student(apply, arrays)
        params, variables = partition(arrays)

        def call(params: Any, variables: Any, inputs: Any) -> tuple[Any, Any]:
            return apply(combine(params, variables), inputs), variables

        return Student(call, combine, params, variables)
    raise TypeError(
        f"make_step: student is a {type(student).__name__}; expected an nnx module or "
        "a pair (apply, params)."
    )


def _linen_student(apply: Callable[..., Any], arrays: Mapping[str, Any]) -> Student:
    """The student of linen variables with other collections beside "params"."""
    is_frozen = isinstance(arrays, FrozenDict)
    # The collections that `apply` returns must have the types of those in the state.
    collections = unfreeze(dict(arrays))
    names = sorted(collections.keys() - {"params"})
    if not _takes_mutable(apply):
        raise _not_linen(names, "It does not take mutable=.")
    params, rest = partition(collections["params"])

    def joined(params: Any, variables: Any) -> dict[str, Any]:
        return variables | {"params": combine(params, variables["params"])}

    def call(params: Any, variables: Any, inputs: Any) -> tuple[Any, Any]:
        result = apply(joined(params, variables), inputs, mutable=names)
        is_result = isinstance(result, tuple) and len(result) == 2
        if not is_result or not isinstance(result[1], Mapping):
            raise _not_linen(names, f"It returned a {type(result).__name__}.")
        outputs, changed = result
        return outputs, variables | unfreeze(dict(changed))

    def restored(params: Any, variables: Any) -> Any:
        whole = joined(params, variables)
        return freeze(whole) if is_frozen else whole

    return Student(call, restored, params, collections | {"params": rest})


def _takes_mutable(apply: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(apply).parameters
    except (TypeError, ValueError):  # a callable without a signature
        return True
    takes_all = (p.kind is p.VAR_KEYWORD for p in parameters.values())
    return "mutable" in parameters or any(takes_all)


def _not_linen(names: list[str], reason: str) -> TypeError:
    listed = ", ".join(names)
    return TypeError(
        f"make_step: the student's variables have {listed} beside 'params', as those "
        "of a linen module. So only 'params' is trained, and apply(variables, inputs, "
        f"mutable={names}) must return (outputs, changed collections). {reason} Pass "
        "(module.apply, variables), or functools.partial(module.apply, ...) with more "
        "arguments. If these are not linen variables, rename 'params'."
    )


def _check_alive(state: StepState) -> None:
    """Raises ValueError if an array of the state was donated to an earlier step."""
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array) and not is_traced(leaf) and leaf.is_deleted():
            raise ValueError(
                "make_step: this state was used for an earlier step, which reused its "
                "memory. Continue with the state that the step returned: "
                "state, loss = step(state, batch). To keep an old state, copy it "
                "before the step: jax.tree.map(jnp.copy, state)."
            )


def _nnx_student(student: nnx.Module, wrt: Any) -> Student:
    graphdef, params, variables = nnx.split(student, wrt, ...)

    def call(params: Any, variables: Any, inputs: Any) -> tuple[Any, Any]:
        # Variables of an outer trace cannot be changed here. Their copies can.
        module = nnx.merge(graphdef, params, variables, copy=True)
        outputs = module(inputs)
        # Running averages and random keys have changed.
        _, _, variables = nnx.split(module, wrt, ...)
        return outputs, variables

    def restored(params: Any, variables: Any) -> nnx.Module:
        return nnx.merge(graphdef, params, variables)

    return Student(call, restored, params, variables)
