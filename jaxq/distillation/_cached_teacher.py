"""The teacher of a cache: its classes, and whether it wrote a stored batch."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxq.distillation._model import Model, PlainFunction, as_model
from jaxq.distillation._rows import described
from jaxq.distillation._top_k import TopK

# Teachers with equal arrays differ only if their functions do. The code of a function
# is not compared, so this tolerance is for gross differences. Another device or
# another version of jax changes the probabilities by less.
_SAME_ARRAYS_TOLERANCE = 0.1


class CachedTeacher:
    """A teacher as `LogitsCache.write` uses it.

    Attributes:
      sha256: the digest of the teacher's arrays; None for a plain function.
    """

    def __init__(self, teacher: Any, k: int, temperature: float, caller: str):
        model = as_model(teacher, caller, "teacher")
        self.sha256 = _digest_of_arrays(model)
        self._caller = caller
        self._compiled_top_k = jax.jit(
            lambda logits: TopK.from_logits(logits, k, temperature=temperature)
        )
        if isinstance(model.function, PlainFunction):
            # jax may not be able to trace a plain function.
            self._logits_of = lambda inputs: jnp.asarray(teacher(inputs))
        else:
            compiled = jax.jit(model.function)
            self._logits_of = lambda inputs: compiled(model.arrays, inputs)

    def top_k(self, inputs: Any, number: int) -> TopK:
        """The most probable classes of a batch.

        Raises:
          ValueError: the logits have a NaN.
        """
        top = self._compiled_top_k(self._logits_of(inputs))
        self._check_nan(top.log_probs, number)
        return top

    def problem(
        self, stored: TopK, inputs: Any, number: int, *, has_same_arrays: bool
    ) -> str | None:
        """How the teacher differs from the one that wrote a batch, or None.

        Args:
          stored: the classes of the batch on disk.
          inputs: the inputs of the batch.
          number: the number of the batch, for errors.
          has_same_arrays: whether equal digests show that the arrays are the same.

        Raises:
          ValueError: the logits have a NaN.
        """
        logits = self._logits_of(inputs)
        rows = stored.log_tail.shape
        if logits.shape != (*rows, stored.vocab_size):
            return (
                f"batch {number} has rows {list(rows)} of {stored.vocab_size} classes, "
                f"now the logits are {described(logits)}"
            )
        # The logits of the stored classes are compared, because classes of nearly equal
        # probabilities may change places.
        log_probs = stored.student_log_classes(logits.astype(jnp.float32))
        self._check_nan(log_probs, number)
        difference = _largest_difference(stored, log_probs)
        tolerance = _SAME_ARRAYS_TOLERANCE
        if not has_same_arrays:
            tolerance = _float_noise(logits.dtype, stored.log_probs.dtype)
        if difference <= tolerance:
            return None
        return (
            f"the probabilities of a row of batch {number} differ by {difference:.2g}, "
            f"more than {tolerance:.2g}"
        )

    def _check_nan(self, log_probs: Any, number: int) -> None:
        """Raises ValueError if a row is NaN. One NaN logit makes its whole row NaN."""
        is_nan = np.isnan(np.asarray(log_probs)).any(axis=-1)
        if is_nan.any():
            row = [int(index) for index in np.argwhere(is_nan)[0]]
            raise ValueError(
                f"{self._caller}: the teacher's logits of batch {number}, row {row}, "
                "have a NaN or no finite number. Check the teacher's parameters and "
                "its inputs."
            )


def _digest_of_arrays(model: Model) -> str | None:
    """SHA-256 of a model's arrays, in their order; None if it has no array.

    The states of random number generators are left out. A teacher draws no random
    numbers, but the counters of its dropout layers may have changed.
    """
    arrays = model.arrays
    if isinstance(arrays, nnx.State):
        arrays = nnx.filter_state(arrays, nnx.Not(nnx.RngState))
    leaves = jax.tree.leaves(arrays)
    if not leaves:
        return None
    digest = hashlib.sha256()
    for leaf in leaves:
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        digest.update(described(array).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _largest_difference(stored: TopK, log_probs: jax.Array) -> float:
    """The largest sum over a row of the differences of probabilities."""
    old_probs, old_tail = (
        np.exp(np.asarray(x, np.float64)) for x in (stored.log_probs, stored.log_tail)
    )
    new = np.exp(np.asarray(log_probs, np.float64))  # [*rows, k + 1]
    difference = np.abs(new[..., :-1] - old_probs).sum(-1)
    difference += np.abs(new[..., -1] - old_tail)
    return float(difference.max(initial=0.0))


def _float_noise(*dtypes: Any) -> float:
    """How much the probabilities of a row change if a function is compiled again.

    That is half of the digits of the least precise dtype: 3e-4 for float32, 0.03 for
    float16 and 0.09 for bfloat16.
    """
    return max(float(jnp.finfo(dtype).eps) for dtype in dtypes) ** 0.5
