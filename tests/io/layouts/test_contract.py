"""What every layout does: round trips, jit, numpy, and errors that name the array."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.io import layouts
from jaxq.qtensor import scale_values
from tests.io.layouts.cases import CASES, Case, kernel, split, weight_of
from tests.tables import thinned

# One case of each kind: a table, a stream of bits, words along either axis, floats,
# scales that are quantized, blocks with minimums.
DEFAULT = (
    *("nf4 nested", "gptq 3", "awq", "compressed-tensors pack 4 asymmetric"),
    *("compressed-tensors nvfp4", "fp8 block", "gguf Q5_1"),
)
over_cases = pytest.mark.parametrize("name", thinned(CASES, DEFAULT))


@pytest.fixture
def case(name) -> Case:
    return CASES[name]


def written(case):
    qt = weight_of(case)
    layout = layouts.get(case.layout)
    return qt, layout, *layout.from_qtensor(qt)


def equal_values(a, b):
    np.testing.assert_array_equal(
        jaxq.dequantize(a, dtype=jnp.float32), jaxq.dequantize(b, dtype=jnp.float32)
    )


@over_cases
def test_a_written_weight_reads_as_the_same_numbers(case):
    qt, layout, tensors, config = written(case)
    assert set(tensors) <= set(layout.tensors)
    back = layout.to_qtensor(tensors, config)
    assert back.shape == qt.shape
    tolerance = 3e-7 if case.layout in INVERSE_SCALES else 0
    np.testing.assert_allclose(scale_values(back), scale_values(qt), rtol=tolerance)
    np.testing.assert_allclose(
        np.asarray(jaxq.dequantize(back, dtype=jnp.float32)),
        np.asarray(jaxq.dequantize(qt, dtype=jnp.float32)),
        rtol=tolerance,
        atol=0,
    )


# These store a multiple or the inverse of the scale, rounded to float32.
INVERSE_SCALES = ("bitsandbytes_int8", "compressed_tensors")


@over_cases
def test_a_weight_that_was_read_is_written_with_the_same_bytes(case):
    _, layout, tensors, config = written(case)
    again, settings = layout.from_qtensor(layout.to_qtensor(tensors, config))
    assert settings == config
    assert set(again) == set(tensors)
    for name, array in tensors.items():
        array = np.asarray(array)
        assert array.dtype == again[name].dtype, name
        if case.layout in INVERSE_SCALES and array.dtype == np.float32:
            np.testing.assert_allclose(again[name], array, rtol=3e-7)
        else:
            np.testing.assert_array_equal(np.asarray(again[name]), array, err_msg=name)


@over_cases
def test_a_read_weight_fits_its_own_description(case):
    _, layout, tensors, config = written(case)
    back = layout.to_qtensor(tensors, config)
    # A QTensor of the same spec that `quantize` made has the same leaves.
    floats = jaxq.dequantize(back)
    batch = tuple(range(len(back.batch_shape)))
    fresh = jax.eval_shape(
        lambda w: jaxq.quantize(w, back.spec, contracting=(-2,), batch=batch), floats
    )
    assert fresh.meta == back.meta
    assert jax.tree.structure(fresh) == jax.tree.structure(back)
    for expected, leaf in zip(
        jax.tree.leaves(fresh), jax.tree.leaves(back), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
    assert type(back.meta).from_dict(back.meta.to_dict()) == back.meta
    x = jnp.asarray(kernel(1, (3, back.shape[0])))
    product = jaxq.dot_general(
        x, back, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    floats = np.asarray(jaxq.dequantize(back, dtype=jnp.float32), np.float64)
    expected = np.asarray(x, np.float64) @ floats
    np.testing.assert_allclose(
        np.asarray(product), expected, rtol=1e-4, atol=1e-4 * abs(expected).max()
    )


@over_cases
def test_the_arrays_are_as_small_as_the_layout_says(case):
    qt, layout, tensors, _ = written(case)
    tables = [*layout.static, "g_idx"]
    size = sum(np.asarray(a).nbytes for n, a in tensors.items() if n not in tables)
    np.testing.assert_allclose(8 * size / qt.size, case.bits, rtol=1e-3)


@over_cases
def test_reading_and_writing_are_the_same_under_jit(case):
    qt, layout, tensors, config = written(case)
    traced, static = split(layout, tensors)
    read = jax.jit(lambda traced: layout.to_qtensor(traced | static, config))(traced)
    eager = layout.to_qtensor(tensors, config)
    assert read.meta == eager.meta
    jax.tree.map(np.testing.assert_array_equal, read, eager)
    if case.traced_write:
        arrays = jax.jit(lambda qt: layout.from_qtensor(qt)[0])(qt)
        for name, array in arrays.items():
            np.testing.assert_array_equal(np.asarray(array), np.asarray(tensors[name]))


@over_cases
def test_numpy_arrays_and_dequantize(case):
    _, layout, tensors, config = written(case)
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    qt = layout.to_qtensor(arrays, config)
    floats = layout.to_qtensor(arrays, config, dequantize=True, dtype=jnp.float32)
    np.testing.assert_array_equal(floats, jaxq.dequantize(qt, dtype=jnp.float32))
    assert layout.to_qtensor(arrays, config, dtype="bfloat16").dtype == jnp.bfloat16


@over_cases
def test_the_transposed_weight_is_written_in_the_same_way(case):
    qt, layout, tensors, _ = written(case)
    same, _ = layout.from_qtensor(qt.T.T)
    transposed, _ = layout.from_qtensor(qt.T)
    for name in set(tensors) - set(layout.static):
        np.testing.assert_array_equal(np.asarray(same[name]), np.asarray(tensors[name]))
        np.testing.assert_array_equal(
            np.asarray(transposed[name]), np.asarray(tensors[name])
        )


@over_cases
def test_a_missing_array_is_named(case):
    _, layout, tensors, config = written(case)
    for name in set(tensors) - set(case.optional):
        rest = {key: array for key, array in tensors.items() if key != name}
        with pytest.raises(ValueError, match=re.escape(name)):
            layout.to_qtensor(rest, config)


@over_cases
def test_an_unknown_array_is_named(case):
    _, layout, tensors, config = written(case)
    with pytest.raises(ValueError, match="unknown array 'lora_A'"):
        layout.to_qtensor(dict(tensors, lora_A=np.zeros(3)), config)
    with pytest.raises(ValueError, match="is int, expected a numpy or jax array"):
        layout.to_qtensor(dict(tensors, **{layout.tensors[0]: 3}), config)


@over_cases
def test_an_array_of_another_dtype_is_named(case):
    _, layout, tensors, config = written(case)
    for name in set(tensors) - set(case.optional):
        array = np.asarray(tensors[name])
        for dtype in (np.complex64, np.int16):
            changed = dict(tensors, **{name: np.zeros(array.shape, dtype)})
            with pytest.raises(ValueError, match=re.escape(name)):
                layout.to_qtensor(changed, config)


@over_cases
def test_contradicting_shapes_are_errors(case):
    qt, layout, tensors, config = written(case)
    for name in set(tensors) - set(case.optional):
        array = np.asarray(tensors[name])
        longer = [np.concatenate([array, array], axis) for axis in range(array.ndim)]
        shorter = [np.take(array, range(1), axis) for axis in range(array.ndim)]
        empty = [np.take(array, range(0), axis) for axis in range(array.ndim)]
        others = [np.zeros((2, 2, 2, 2, 2), array.dtype), np.zeros((), array.dtype)]
        for changed in (*longer, *shorter, *empty, *others):
            if changed.shape == array.shape or changed.size == array.size:
                continue
            try:
                other = layout.to_qtensor(dict(tensors, **{name: changed}), config)
            except ValueError as error:
                message = str(error)
            else:  # the array alone says how large the weight is
                assert other.size * qt.data.size == qt.size * other.data.size
                assert other.shape != qt.shape
                continue
            assert message.startswith(f"{layout.name}: ")
            assert any(known in message for known in layout.tensors)


@over_cases
def test_a_scale_that_is_not_finite_is_named(case):
    _, layout, tensors, config = written(case)
    for name in case.scales:
        array = np.asarray(tensors[name])
        # All ones are a NaN of every float dtype, and of e8m0 stored as uint8. A block
        # of GGUF starts with a scale of two bytes.
        itemsize = max(2, array.dtype.itemsize)
        damaged = np.frombuffer(array.tobytes(), np.uint8).copy()
        damaged[:itemsize] = 0xFF
        damaged = damaged.view(array.dtype).reshape(array.shape)
        with pytest.raises(ValueError, match=f"{name} has a number that is not finite"):
            layout.to_qtensor(dict(tensors, **{name: damaged}), config)


@over_cases
def test_what_a_layout_cannot_hold_is_an_error(case):
    qt, layout, _, _ = written(case)
    with pytest.raises(TypeError, match="expected a QTensor, got"):
        layout.from_qtensor(jaxq.dequantize(qt))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="has an input_scale"):
        layout.from_qtensor(qt.with_input_scale(jnp.full(qt.shape[0], 2.0)))
    log = jaxq.quantize(jnp.asarray(kernel()), "log4")
    with pytest.raises(ValueError, match="cannot be written: .*spec returns a spec"):
        layout.from_qtensor(log)
    vector = jaxq.quantize(jnp.ones(32), "int8")
    with pytest.raises(ValueError, match="one kept and one contracted axis"):
        layout.from_qtensor(vector)
    if not layout.has_batch:
        stack = jnp.asarray(kernel(2, (2, 64, 32)))
        stacked = jaxq.quantize(stack, "int8", contracting=(-2,), batch=(0,))
        with pytest.raises(ValueError, match="it has batch axes. Write each slice"):
            layout.from_qtensor(stacked)


@over_cases
def test_settings_must_be_a_dict(case):
    layout = layouts.get(case.layout)
    with pytest.raises(ValueError, match="config must be a dict"):
        layout.spec([("bits", 4)])  # pyright: ignore[reportArgumentType]


def test_names():
    assert {case.layout for case in CASES.values()} <= set(layouts.names())
    assert layouts.get("bitsandbytes-4bit").name == "bitsandbytes_4bit"
    with pytest.raises(
        ValueError, match="unknown layout 'bitsandbyte_4bit'. Did you mean"
    ):
        layouts.get("bitsandbyte_4bit")
    for name in layouts.names():
        layout = layouts.get(name)
        assert layout.summary
        assert set(layout.static) <= set(layout.tensors)


# The settings and arrays of a weight, changed at random.


def mutated(random, tensors, config):
    """One array or one setting changed in a way that a damaged file could have."""
    tensors = {name: np.asarray(array) for name, array in tensors.items()}
    config = dict(config)
    name = str(random.choice(list(tensors)))
    array = tensors[name]
    kind = random.integers(6)
    if kind == 0 and array.size:  # other bits
        damaged = np.frombuffer(array.tobytes(), np.uint8).copy()
        damaged[random.integers(damaged.size)] ^= 1 << random.integers(8)
        tensors[name] = damaged.view(array.dtype).reshape(array.shape)
    elif kind == 1:  # another order of axes
        tensors[name] = array.T
    elif kind == 2:  # a part
        axis = random.integers(max(array.ndim, 1))
        if array.ndim:
            part = random.integers(array.shape[axis] + 1)
            tensors[name] = np.take(array, range(part), axis)
    elif kind == 3:  # another shape of the same size
        tensors[name] = array.reshape(1, array.size)
    elif kind == 4:  # another name
        other = str(random.choice(list(tensors)))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif config:
        key = str(random.choice(list(config)))
        values = (None, -2, 0, 1, 7, 3.5, True, "x", [], [1, 2], {}, 1 << 70)
        config[key] = values[random.integers(len(values))]
    return tensors, config


@pytest.mark.filterwarnings("ignore:gptq. checkpoint_format is 'gptq'")
@over_cases
def test_damaged_weights_are_errors_or_other_weights(case, name):
    _, layout, tensors, config = written(case)
    random = np.random.default_rng(len(name))
    for _ in range(25):
        changed = mutated(random, tensors, config)
        try:
            floats = layout.to_qtensor(*changed, dequantize=True)
        except ValueError as error:
            message = str(error)
        else:
            assert floats.ndim == 2
            continue
        assert message.startswith(f"{layout.name}: ")
