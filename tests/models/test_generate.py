"""`generate`: prompts of unequal lengths, sampling, stop tokens, streaming, buckets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxq
from jaxq.models import _generate as generate_module
from jaxq.models import generate, load
from jaxq.models._sampling import filtered_logits
from tests import tables
from tests.models.peers import DENSE, REASON, make_peer
from tests.models.test_decoder import make

PROMPTS = [[5, 17, 3, 80, 41], [9], [2, 2, 63]]
CACHES = {"float": None, "int8": jaxq.ops.KVCacheSpec("int8", group=4, residual=4)}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason=REASON)


@pytest.fixture(scope="module")
def transformers(torch):
    return pytest.importorskip("transformers", reason=REASON)


@pytest.mark.parametrize("cache", tables.thinned(CACHES, CACHES))
def test_prompts_of_a_batch_are_as_alone(cache):
    model, kind = make(num_hidden_layers=1, sliding_window=4), CACHES[cache]
    together = generate(model, PROMPTS, 6, cache=kind)
    alone = [generate(model, [prompt], 6, cache=kind)[0] for prompt in PROMPTS]
    assert together == alone
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    array = np.zeros((3, 5), np.int32)
    for row, prompt in zip(array, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    array = generate(model, array, 6, lengths=lengths, pad_token=-1, cache=kind)
    assert array.shape == (3, 11)
    for row, text in zip(np.asarray(array).tolist(), together, strict=True):
        assert row == text + [-1] * (11 - len(text))


@pytest.mark.parametrize(
    "name", tables.thinned(["gpt2", "gemma3", "smollm3"], ["gpt2"])
)
def test_padded_prompts_give_the_text_of_transformers(
    torch, transformers, name, tmp_path
):
    peer = make_peer(torch, transformers, DENSE, name)
    peer.save_pretrained(tmp_path)
    width = max(map(len, PROMPTS))
    ids = [[0] * (width - len(prompt)) + prompt for prompt in PROMPTS]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS]
    with torch.no_grad():
        expected = peer.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=7,
            do_sample=False,
            pad_token_id=0,
        ).numpy()
    texts = generate(load(tmp_path)[0], PROMPTS, 7)
    for prompt, text, row in zip(PROMPTS, texts, expected, strict=True):
        assert text[len(prompt) :] == row[width:].tolist()


def test_a_stop_token_ends_its_row_only():
    model = make(num_hidden_layers=1)
    free = generate(model, PROMPTS, 8)
    new = [text[len(prompt) :] for text, prompt in zip(free, PROMPTS, strict=True)]
    stop = new[0][2]
    stopped = generate(model, PROMPTS, 8, stop_tokens=stop)
    for text, prompt, row in zip(stopped, PROMPTS, new, strict=True):
        end = row.index(stop) + 1 if stop in row else len(row)
        assert text == prompt + row[:end]
    assert len(stopped[0]) < len(free[0])


def test_tokens_are_streamed():
    model, steps = make(num_hidden_layers=1), []
    texts = generate(model, PROMPTS, 5, on_token=lambda row: steps.append(row.tolist()))
    assert texts == generate(model, PROMPTS, 5)
    new = [text[len(prompt) :] for text, prompt in zip(texts, PROMPTS, strict=True)]
    assert np.array(steps).T.tolist() == new
    stop, steps[:] = new[1][0], []
    generate(model, [PROMPTS[1]], 5, stop_tokens=stop, on_token=steps.append)
    assert len(steps) == 1
    with pytest.raises(ValueError, match="on_token= does not work under jit"):
        nnx.jit(lambda m, x: generate(m, x, 2, on_token=print))(
            model, jnp.ones((1, 2), jnp.int32)
        )


def test_one_program_for_each_bucket():
    model, read = make(num_hidden_layers=1), generate_module._read_prompts
    add = generate_module._add_tokens
    generate(model, [[1, 2, 3], [4, 5, 6]], 3)
    compiled = read._cache_size(), add._cache_size()
    generate(model, [[1] * 16, [2]], 16, stop_tokens=[])
    generate(model, [[1], [2]], 9, on_token=lambda row: None)
    assert (read._cache_size(), add._cache_size()) == compiled
    generate(model, [[1] * 17, [2]], 3)
    assert read._cache_size() == compiled[0] + 1


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (50, 0.6), (7, 0.5), (1, 0.1)])
def test_filters_are_those_of_transformers(torch, transformers, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32) * 2
    scores = torch.tensor(logits)
    scores = transformers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = transformers.TopPLogitsWarper(top_p)(None, scores)
    found = filtered_logits(logits, jnp.int32(top_k), jnp.float32(top_p))
    np.testing.assert_array_equal(found, scores.numpy())


def test_draws_follow_the_filtered_probabilities():
    """The first tokens of many equal prompts against their probabilities."""
    model, num_rows = make(num_hidden_layers=1), 4000
    x = jnp.broadcast_to(jnp.array([[5, 17, 3]], jnp.int32), (num_rows, 3))
    options = {"temperature": 1.7, "top_k": 6, "top_p": 0.9}
    drawn = np.asarray(generate(model, x, 1, key=3, **options))[:, 3]
    np.testing.assert_array_equal(
        generate(model, x, 1, key=jax.random.key(3), **options)[:, 3], drawn
    )
    logits = np.asarray(model(x[:1]), np.float64)[0, -1] / 1.7
    order = np.argsort(-logits)[:6]
    weights = np.exp(logits[order] - logits[order[0]])
    weights /= weights.sum()
    kept = order[np.cumsum(weights) - weights < 0.9]
    expected = np.exp(logits[kept] - logits[kept].max())
    expected /= expected.sum()
    assert set(drawn) == set(kept)
    shares = np.array([(drawn == token).mean() for token in kept])
    # Five standard deviations of a share.
    error = 5 * np.sqrt(expected * (1 - expected) / num_rows)
    assert (np.abs(shares - expected) < error).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tokens": []}, "tokens is an empty list"),
        ({"tokens": [[1], []]}, r"tokens\[1\] is \[\]; expected a list of at least"),
        ({"tokens": [[0.5]]}, r"tokens\[0\] is \[0.5\]"),
        ({"tokens": [[1]], "lengths": [1]}, "lengths= is for an array"),
        ({"lengths": jnp.array([1])}, r"lengths is int32\[1\]; expected int32\[2\]"),
        ({"lengths": jnp.array([0, 3])}, r"lengths are \[0, 3\]; expected 1 to 3"),
        ({"top_k": 5}, "need temperature="),
        ({"temperature": 1.0, "key": 0, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "key": 0, "top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_errors(kwargs, message):
    tokens = jnp.ones((2, 3), jnp.int32)
    with pytest.raises(ValueError, match=message):
        generate(**({"model": make(), "tokens": tokens, "num_tokens": 2} | kwargs))
