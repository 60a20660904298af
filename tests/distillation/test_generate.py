"""generate against a loop without padding, and against the models' own generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxq
from jaxq.distillation import generate, response_mask
from tests.distillation.models import VOCAB, Letters, llama, mean_logits, params

PROMPTS = np.array([[3, 1, 4, 1], [5, 9, 0, 0], [2, 0, 0, 0]], np.int32)
LENGTHS = np.array([4, 2, 1])


def greedy64(params, prompt, num_tokens):
    """One row, one token at a time, in numpy."""
    params = jax.tree.map(np.float64, params)
    tokens = list(prompt)
    for _ in range(num_tokens):
        mean = params["embed"][tokens].mean(0)
        tokens.append(int(np.argmax(mean @ params["head"])))
    return tokens


def test_greedy_rows_of_different_lengths():
    tokens, mask = generate(
        (mean_logits, params()), PROMPTS, 5, lengths=LENGTHS, pad_token=7
    )
    assert tokens.dtype == jnp.int32
    for row, row_mask, prompt, length in zip(
        tokens.tolist(), mask.tolist(), PROMPTS, LENGTHS, strict=True
    ):
        end = length + 5
        assert row[:end] == greedy64(params(), prompt[:length], 5)
        assert row[end:] == [7] * (9 - end)
        assert row_mask == [length <= i < end for i in range(9)]


def test_models_with_a_cache_agree_with_the_models_own_generation():
    model = llama()
    expected = jaxq.models.generate(model, PROMPTS, 6)
    tokens, mask = generate(model, PROMPTS, 6)
    assert len(set(np.asarray(expected[:, 4:]).ravel().tolist())) > 3
    np.testing.assert_array_equal(tokens, expected)
    assert mask.tolist() == [[False] * 4 + [True] * 6] * 3


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_cache_changes_no_token(temperature):
    model = llama()
    graphdef, state = nnx.split(model)

    def apply(state, tokens):
        return nnx.merge(graphdef, state)(tokens)

    options = {
        "lengths": LENGTHS,
        "temperature": temperature,
        "key": jax.random.key(3),
        "stop_token": 2,
    }
    with_cache = generate(model, PROMPTS, 6, **options)
    without = generate((apply, state), PROMPTS, 6, **options)
    for actual, expected in zip(with_cache, without, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_a_cache_that_cannot_be_rewound_is_not_used():
    class OwnCache(nnx.Module):
        """A model whose cache has only a length."""

        def __init__(self):
            self.params = nnx.data(params())

        def __call__(self, tokens):
            return mean_logits(self.params, tokens)

        def init_cache(self, batch, length):
            return jnp.zeros((batch,), jnp.int32)

        def decode(self, tokens, cache):
            raise AssertionError("The rows have different lengths.")

    tokens, _ = generate(OwnCache(), PROMPTS, 5, lengths=LENGTHS)
    expected, _ = generate((mean_logits, params()), PROMPTS, 5, lengths=LENGTHS)
    np.testing.assert_array_equal(tokens, expected)


def test_rows_end_after_a_stop_token():
    free, _ = generate((mean_logits, params()), PROMPTS, 5, lengths=LENGTHS)
    stop = int(free[1, 3])  # the second token of row 1's response
    tokens, mask = generate(
        (mean_logits, params()), PROMPTS, 5, lengths=LENGTHS, stop_token=stop
    )
    for row, row_mask, free_row, length in zip(
        tokens.tolist(), mask.tolist(), free.tolist(), LENGTHS, strict=True
    ):
        response = free_row[length : length + 5]
        end = length + 5
        if stop in response:
            end = length + response.index(stop) + 1
        assert row == free_row[:end] + [0] * (9 - end)
        assert row_mask == [length <= i < end for i in range(9)]


def test_samples_have_the_probabilities_of_the_model():
    logits = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))

    def model(tokens):
        return jnp.broadcast_to(logits, (*tokens.shape, 4))

    prompts = np.zeros((2000, 1), np.int32)
    tokens, _ = generate(model, prompts, 2, key=jax.random.key(0), temperature=0.5)
    # Temperature 1/2 squares the probabilities.
    expected = np.array([1, 4, 9, 16]) / 30
    shares = np.bincount(np.asarray(tokens[:, 1:]).ravel(), minlength=4) / 4000
    error = np.sqrt(expected * (1 - expected) / 4000)
    assert (np.abs(shares - expected) < 4 * error).all()
    # Positions have keys of their own.
    assert 0.3 < np.mean(tokens[:, 1] == tokens[:, 2]) < 0.5
    other, _ = generate(model, prompts, 2, key=jax.random.key(1), temperature=0.5)
    assert (tokens != other).any()


def test_modules_generate_in_eval_mode():
    class Noisy(nnx.Module):
        def __init__(self):
            self.dropout = nnx.Dropout(0.9, rngs=nnx.Rngs(0))
            self.params = nnx.data(params())
            self.num_calls = nnx.BatchStat(jnp.zeros((), jnp.int32))

        def __call__(self, tokens):
            self.num_calls[...] += 1
            return self.dropout(mean_logits(self.params, tokens))

    model = Noisy()
    model.train()
    tokens, _ = generate(model, PROMPTS, 5, lengths=LENGTHS)
    expected, _ = generate((mean_logits, params()), PROMPTS, 5, lengths=LENGTHS)
    np.testing.assert_array_equal(tokens, expected)
    assert model.dropout.deterministic is False
    assert int(model.num_calls[...]) == 0


def test_one_trace_for_all_parameters_keys_and_prompts():
    traces = []

    def apply(params, tokens):
        traces.append(tokens.shape)
        return mean_logits(params, tokens)

    for seed in range(3):
        generate(
            (apply, params(seed)),
            (PROMPTS + seed) % VOCAB,
            3,
            lengths=np.roll(LENGTHS, seed),
            key=jax.random.key(seed),
            temperature=0.5 + seed,
            stop_token=seed,
            pad_token=seed,
        )
    assert len(traces) == 1


def test_inside_jit():
    @jax.jit
    def continued(params, lengths):
        return generate((mean_logits, params), PROMPTS, 3, lengths=lengths)

    expected = generate((mean_logits, params()), PROMPTS, 3, lengths=LENGTHS)
    actual = continued(params(), jnp.asarray(LENGTHS))
    for array, wanted in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(array, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": PROMPTS[0]}, "tokens is int32[4]; expected int32[b, t]"),
        ({"tokens": np.zeros((1, 2), np.float32)}, "tokens is float32[1,2]"),
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": np.inf, "key": jax.random.key(0)}, "temperature is inf"),
        ({"temperature": np.nan}, "temperature is nan"),
        ({"temperature": 1.0}, "pass key=jax.random.key(0)"),
        ({"lengths": [4, 2]}, "lengths is int32[2]; expected int32[3]"),
        ({"lengths": [4, 0, 1]}, "each must be from 1 to 4"),
        ({"lengths": [5, 1, 1]}, "each must be from 1 to 4"),
        ({"model": lambda tokens: jnp.zeros(tokens.shape)}, "expected logits [3, 6,"),
        ({"model": lambda tokens: jnp.full((3, 6, 4), jnp.nan)}, "have a NaN"),
    ],
)
def test_bad_values(change, message):
    arguments = {
        "model": (mean_logits, params()),
        "tokens": PROMPTS,
        "num_tokens": 2,
    } | change
    with pytest.raises(ValueError) as error:
        generate(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 2.0}, "num_tokens is 2.0; expected an integer"),
        ({"temperature": "a"}, "temperature is 'a'; expected one number"),
        ({"stop_token": 1.5}, "stop_token is 1.5; expected an integer"),
        ({"pad_token": None}, "pad_token is None; expected an integer"),
    ],
)
def test_numbers_of_other_types(change, message):
    with pytest.raises(TypeError) as error:
        generate(**{"model": llama(), "tokens": PROMPTS, "num_tokens": 2} | change)
    assert str(error.value) == f"generate: {message}."


@pytest.mark.parametrize("make_model", [llama, lambda: (mean_logits, params())])
def test_with_x64(make_model):
    options = {"lengths": LENGTHS, "stop_token": 2, "key": jax.random.key(3)}
    expected = generate(make_model(), PROMPTS, 4, **options)
    with jax.enable_x64(True):
        actual = generate(make_model(), PROMPTS.astype(np.int64), 4, **options)
        sampled, mask = generate(make_model(), PROMPTS, 4, temperature=1.5, **options)
        assert actual[0].dtype == sampled.dtype == jnp.int32
        lengths = jnp.asarray(LENGTHS + 4)
        again = response_mask(sampled, LENGTHS, lengths=lengths, stop_token=2)
        np.testing.assert_array_equal(again, mask)
    for array, wanted in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(array, wanted)


def test_lengths_that_jit_closes_over():
    compiled = jax.jit(
        lambda params: generate((mean_logits, params), PROMPTS, 3, lengths=LENGTHS)
    )
    expected = generate((mean_logits, params()), PROMPTS, 3, lengths=LENGTHS)
    np.testing.assert_array_equal(compiled(params())[0], expected[0])


def test_models_of_another_kind():
    from flax import linen

    with pytest.raises(TypeError, match=r"Pass the pair \(module.apply, variables\)"):
        generate(linen.Dense(3), PROMPTS, 2)
    with pytest.raises(TypeError, match=r"pair model is a linen module.*module.apply"):
        generate((linen.Dense(3), {}), PROMPTS, 2)
    with pytest.raises(TypeError, match="model is a Letters; expected an nnx module"):
        generate(Letters(), PROMPTS, 2)


def test_response_mask_ends_at_the_first_stop_token_of_the_response():
    tokens = np.array([[1, 5, 6, 1, 1, 7], [5, 6, 7, 8, 9, 0]])
    mask = response_mask(tokens, [2, 1], stop_token=1)
    assert mask.astype(int).tolist() == [[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]
    mask = response_mask(tokens, [2, 1], lengths=[6, 5])
    assert mask.astype(int).tolist() == [[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]]
    with pytest.raises(ValueError, match="prompt_lengths int32"):
        response_mask(tokens, [2, 1, 3])
