"""LogitsCache: what is read is what the teacher said, and nothing else is accepted."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.distillation import LogitsCache, TopK, kd_loss
from tests.arrays import assert_close, assert_same
from tests.distillation.models import MeanModel, mean_logits, params

BATCHES = [np.random.default_rng(i).integers(0, 16, (2, 5)) for i in range(4)]


class Teacher:
    """A teacher that counts its calls, and can be stopped."""

    def __init__(self, calls_before_stop: float = np.inf, seed: int = 0):
        self.calls, self.calls_before_stop = 0, calls_before_stop
        self.params = params(seed)

    def __call__(self, tokens):
        self.calls += 1
        if self.calls > self.calls_before_stop:
            raise KeyboardInterrupt
        return mean_logits(self.params, jnp.asarray(tokens))


def write(folder, teacher=None, batches=BATCHES, **options):
    options = {"k": 3} | options
    return LogitsCache.write(folder, teacher or Teacher(), batches, **options)


@pytest.mark.parametrize("k", [3, 16])
def test_reads_what_the_teacher_said(tmp_path, k):
    written = write(tmp_path / "cache", k=k)
    cache = LogitsCache(tmp_path / "cache")
    assert (len(cache), cache.k, cache.vocab_size) == (4, k, 16)
    assert len(written) == 4
    for i, (tokens, top) in enumerate(cache.batches(BATCHES)):
        logits = Teacher()(tokens)
        expected = TopK.from_logits(logits, k)
        # Eager and jitted softmax round differently. A tail of no class is -inf.
        probabilities = (np.exp(x.log_classes()) for x in (top, expected))
        assert_close(*probabilities, 1e-6)
        np.testing.assert_array_equal(top.indices, expected.indices)
        assert_same(cache[i], top)
        assert_same(cache[i - 4], top)
        student = jnp.flip(logits, axis=-1)
        assert float(kd_loss(student, top)) == pytest.approx(
            float(kd_loss(student, expected)), rel=1e-5
        )
    with pytest.raises(IndexError):
        cache[4]


def test_modules_and_pairs_are_teachers_too(tmp_path):
    pair = write(tmp_path / "pair", (mean_logits, params()))
    assert_close(pair[0], write(tmp_path / "function")[0], 1e-6)
    assert_close(pair[0], write(tmp_path / "module", MeanModel())[0], 1e-6)


def test_float16_halves_the_numbers(tmp_path):
    exact, small = write(tmp_path / "a"), write(tmp_path / "b", dtype="float16")
    assert small[0].log_probs.dtype == jnp.float16
    probabilities = [np.exp(cache[0].log_classes()) for cache in (exact, small)]
    assert_close(probabilities[1], probabilities[0], 2e-3)
    # Rounded probabilities are normalized again.
    np.testing.assert_allclose(probabilities[1].sum(-1), 1, atol=1e-6)
    # Per row, 3 indices of 2 bytes, and 3 classes and the tail of 2 or 4 bytes.
    sizes = [(tmp_path / n / "00000000.safetensors").stat().st_size for n in "ab"]
    assert sizes[0] - sizes[1] == pytest.approx(10 * 4 * 2, abs=24)


def test_the_rest_of_a_batch_follows(tmp_path):
    batches = [(tokens, tokens.sum(), "a") for tokens in BATCHES]
    cache = write(tmp_path / "cache", batches=batches)
    (inputs, top, total, name), *others = cache.batches(batches)
    assert isinstance(top, TopK)
    assert (inputs is BATCHES[0], total, name) == (True, BATCHES[0].sum(), "a")
    assert len(others) == 3
    # Labels and dtypes of integers do not matter: the teacher reads the same numbers.
    int32 = [jnp.asarray(tokens, jnp.int32) for tokens in BATCHES]
    assert len(list(cache.batches(int32[:2]))) == 2


def test_a_stopped_run_continues(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cache", Teacher(calls_before_stop=2))
    with pytest.raises(ValueError, match="is not finished.*It continues"):
        LogitsCache(tmp_path / "cache")
    # What a stopped write leaves.
    (tmp_path / "cache" / "00000002.safetensors.partial").write_bytes(b"half")
    teacher = Teacher()
    continued = write(tmp_path / "cache", teacher)
    # The first batch shows that the teacher is the same.
    assert teacher.calls == 3
    whole = write(tmp_path / "whole")
    for i in range(4):
        assert_same(continued[i], whole[i])
    texts = [(tmp_path / n / "manifest.json").read_text() for n in ("cache", "whole")]
    assert texts[0] == texts[1]


def test_a_stop_before_the_first_batch(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cache", Teacher(calls_before_stop=0))
    with pytest.raises(FileNotFoundError, match=r"has no manifest.json"):
        LogitsCache(tmp_path / "cache")
    assert len(write(tmp_path / "cache")) == 4


def test_more_batches_are_added(tmp_path):
    write(tmp_path / "cache", batches=BATCHES[:2])
    assert len(write(tmp_path / "cache")) == 4


def other_tokens():
    return [*BATCHES[:2], (BATCHES[2] + 1) % 16, BATCHES[3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": other_tokens()}, "written for other data: the inputs of batch 2"),
        ({"batches": BATCHES[::-1]}, "written for other data: the inputs of batch 0"),
        ({"batches": BATCHES[:3]}, "it has more than the 3 batches given"),
        ({"k": 4}, "was written with k=3 (now 4)"),
        ({"temperature": 1.0}, "was written with temperature=2.0 (now 1.0)"),
        ({"dtype": "float16"}, "dtype='float32' (now 'float16')"),
        ({"teacher": Teacher(seed=5)}, "was written by another teacher"),
        (
            {"teacher": lambda x: Teacher()(x)[:, :2]},
            "was written by another teacher: its first batch has log_probs",
        ),
        ({"batches": []}, "there is no batch"),
        ({"k": 0}, "k is 0"),
        ({"temperature": 0}, "temperature is 0"),
        ({"dtype": "int8"}, "expected 'float32' or 'float16'"),
    ],
)
def test_a_cache_is_not_reused_for_something_else(tmp_path, change, message):
    write(tmp_path / "cache")
    before = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    with pytest.raises(ValueError) as error:
        write(tmp_path / "cache", **change)
    assert message in str(error.value)
    after = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    assert before == after


def test_reading_with_other_data(tmp_path):
    cache = write(tmp_path / "cache")
    with pytest.raises(ValueError, match="other data: the inputs of batch 2"):
        list(cache.batches(other_tokens()))
    with pytest.raises(ValueError, match="has 4 batches, and the data has more"):
        list(cache.batches([*BATCHES, BATCHES[0]]))


def test_a_larger_vocabulary_of_the_student(tmp_path):
    top = write(tmp_path / "cache")[0]
    with pytest.raises(ValueError, match="TopK has 16 classes"):
        kd_loss(jnp.zeros((2, 5, 20)), top)
    with pytest.raises(ValueError, match="k is 17.*Pass k=16 or less"):
        write(tmp_path / "other", k=17)


def test_a_teacher_that_says_nan(tmp_path):
    def teacher(tokens):
        is_bad = (tokens == BATCHES[1]).all()
        return jnp.where(is_bad, jnp.nan, Teacher()(tokens))

    with pytest.raises(ValueError, match=r"batch 1, row \[0, 0\], have a NaN"):
        write(tmp_path / "cache", teacher)


def test_damaged_and_foreign_files(tmp_path):
    cache = write(tmp_path / "cache")
    shard = tmp_path / "cache" / "00000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(ValueError, match="00000001.safetensors is damaged or missing"):
        cache[1]
    shard.unlink()
    assert_same(write(tmp_path / "cache")[1], write(tmp_path / "whole")[1])

    manifest = tmp_path / "cache" / "manifest.json"
    manifest.write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="is not the manifest of a cache"):
        LogitsCache(tmp_path / "cache")
    with pytest.raises(ValueError, match="is not the manifest of a cache"):
        write(tmp_path / "cache")

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"other files, such as cat.png"):
        write(tmp_path / "photos")
    with pytest.raises(FileNotFoundError, match="Create it first"):
        write(tmp_path / "no" / "cache")
    with pytest.raises(TypeError, match=r"Pass a list: \[batch\]"):
        write(tmp_path / "cache", batches=BATCHES[0])


def test_progress_goes_to_stderr(tmp_path, capsys):
    write(tmp_path / "cache", progress=True)
    output = capsys.readouterr()
    assert output.out == ""
    assert "\rteacher: 3/4" in output.err
    assert output.err.rstrip().endswith("teacher: 4/4")
    write(tmp_path / "cache", progress=False)
    assert capsys.readouterr().err == ""
