"""Calls in turns, and peak memory against what the system says."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.evaluation import peak_memory, time_calls


def test_functions_are_called_in_turns():
    calls = []
    times = time_calls(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, num_calls=3
    )
    # The first call of each compiles, and is not timed.
    assert calls == ["a", "b"] * 4
    assert list(times) == ["a", "b"]
    assert times["a"].num_calls == 3
    assert 0 <= times["a"].fastest <= times["a"].median <= times["a"].slowest


def test_a_call_ends_when_its_arrays_are_computed():
    waited = []

    class Result:
        """An array that tells when somebody waits for it."""

        def block_until_ready(self):
            waited.append(True)
            return self

    time_calls({"a": Result}, num_calls=2)
    assert len(waited) == 3


def test_nothing_to_time_is_an_error():
    with pytest.raises(ValueError, match="at least one of each"):
        time_calls({})
    with pytest.raises(ValueError, match="num_calls=0"):
        time_calls({"a": lambda: jnp.ones(2)}, num_calls=0)


def test_peak_memory_grows_with_a_large_array():
    before = peak_memory()
    assert before.where == "process"
    # The peak of the process so far is never below its present size.
    large = np.ones(before.num_bytes // 8 + 2_000_000)
    after = peak_memory()
    assert after.num_bytes >= large.nbytes
