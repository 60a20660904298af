"""LogitsCache: what is read is what the teacher said, and nothing else is accepted."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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
    leftover = tmp_path / "cache" / f".00000002.safetensors.{'0' * 16}.partial"
    leftover.write_bytes(b"half")
    teacher = Teacher()
    continued = write(tmp_path / "cache", teacher)
    assert not leftover.exists()
    # The two stored batches show that the teacher is the same.
    assert teacher.calls == 4
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
            "of 16 classes, now the logits are float32[2,2,16]",
        ),
        (
            {"teacher": lambda x: jnp.pad(Teacher()(x), ((0, 0), (0, 0), (0, 4)))},
            "by another teacher: batch 0 has rows [2, 5] of 16 classes",
        ),
        ({"batches": []}, "there is no batch"),
        ({"k": 0}, "k is 0"),
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": np.inf}, "LogitsCache.write: temperature is inf"),
        ({"batches": [()]}, "LogitsCache.write: a batch is an empty tuple"),
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


def test_numbers_of_other_types(tmp_path):
    for change, message in (
        ({"k": 4.0}, "k is 4.0; expected an integer"),
        ({"k": None}, "k is None"),
        ({"temperature": "a"}, "temperature is 'a'; expected one number"),
    ):
        with pytest.raises(TypeError, match=message):
            write(tmp_path / "cache", **change)
    assert not (tmp_path / "cache").exists()
    cache = write(tmp_path / "cache", k=np.int64(3), temperature=np.float32(2))
    assert (cache.k, cache.temperature) == (3, 2.0)


def changed_everywhere(tokens):
    return Teacher()(tokens) * (1 + 2e-3)


def changed_in_the_last_batch(tokens):
    is_last = (tokens == BATCHES[3]).all()
    return Teacher()(tokens) * jnp.where(is_last, 1 + 2e-3, 1)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (Teacher(), changed_everywhere, "of a row of batch 0 differ by"),
        (Teacher(), changed_in_the_last_batch, "of a row of batch 3 differ by"),
        ((mean_logits, params()), changed_everywhere, "batch 0 differ by"),
        (
            (mean_logits, params()),
            (lambda params, x: 2 * mean_logits(params, x), params()),
            "batch 0 differ by",
        ),
        (
            (mean_logits, params()),
            (mean_logits, params() | {"head": params()["head"].at[3, 3].add(1e-6)}),
            "its arrays have another digest",
        ),
        (
            (mean_logits, params()),
            (mean_logits, params() | {"head": params()["head"].astype(jnp.bfloat16)}),
            "its arrays have another digest",
        ),
        (MeanModel(0), MeanModel(1), "its arrays have another digest"),
    ],
)
def test_a_teacher_that_differs_a_little(tmp_path, first, second, message):
    write(tmp_path / "cache", first)
    before = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    with pytest.raises(ValueError, match=f"by another teacher: .*{message}"):
        write(tmp_path / "cache", second)
    after = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    assert before == after


def test_the_same_teacher_compiled_again(tmp_path):
    teacher = Teacher()
    write(tmp_path / "cache", teacher)
    write(tmp_path / "cache", jax.jit(lambda x: mean_logits(teacher.params, x)))
    # A pair and a function may be the same teacher.
    write(tmp_path / "cache", (mean_logits, teacher.params))

    class WithDropout(MeanModel):
        def __init__(self):
            super().__init__(0)
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    model = WithDropout()
    write(tmp_path / "module", model)
    model.dropout(jnp.ones(3))  # counts the random numbers
    write(tmp_path / "module", model)

    def half(tokens):
        return Teacher()(tokens).astype(jnp.bfloat16)

    # The logits that bfloat16 rounds to a neighbour are the noise of bfloat16.
    write(tmp_path / "half", half, dtype="float16")
    write(
        tmp_path / "half", lambda x: half(x) * jnp.bfloat16(1 + 2**-7), dtype="float16"
    )


def test_a_deleted_batch_of_another_vocabulary(tmp_path):
    write(tmp_path / "cache")
    (tmp_path / "cache" / "00000000.safetensors").unlink()
    with pytest.raises(ValueError, match="by another teacher: it has 16 classes"):
        write(tmp_path / "cache", lambda x: Teacher()(x)[..., :9])
    assert_same(write(tmp_path / "cache")[0], write(tmp_path / "whole")[0])


def test_with_x64(tmp_path):
    with jax.enable_x64(True):
        cache = write(tmp_path / "cache")
        (tokens, top), *_ = write(tmp_path / "cache").batches(BATCHES)
        assert top.log_probs.dtype == jnp.float32
        loss = kd_loss(Teacher()(tokens), top)
        assert loss.dtype == jnp.float32
        assert abs(float(loss)) < 1e-6
    assert_same(cache[0], write(tmp_path / "cache")[0])


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

    with pytest.raises(ValueError, match="LogitsCache.batches: a batch is an empty"):
        list(cache.batches([()]))
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
