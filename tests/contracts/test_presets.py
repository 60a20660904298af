"""The contract of `quantize` for every preset and every kind of array.

A new preset is a new row. A spec with three levels of scales is added, because no
preset has three.
"""

import functools
import itertools
import json
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import PerChannel, PerGroup, PerTensor, QTensor, QuantSpec
from jaxq.qtensor import scale_values
from tests import tables
from tests.arrays import assert_same

PRESETS = tuple(jaxq.presets())
THREE_LEVELS = QuantSpec(
    "int4",
    PerGroup(16, pad=True),
    scale=QuantSpec(
        "uint8", PerChannel(), scale=QuantSpec("float8_e4m3fn", PerTensor())
    ),
)
SPECS = {**jaxq.presets(), "three_levels": THREE_LEVELS}
# name: (shape, contracting, batch). No common group size divides 100 or 288.
ARRAYS = {
    "row": ((100,), None, ()),
    "matrix": ((100, 64), None, ()),
    "qkv": ((288, 4, 6), -3, ()),
    "attention_output": ((4, 16, 48), (-3, -2), ()),
}
# Three arrays of each kind, stacked along a batch axis.
STACKS = {
    f"stacked_{name}": (
        (3, *shape),
        -min(len(shape), 2) if contracting is None else contracting,
        0,
    )
    for name, (shape, contracting, _) in ARRAYS.items()
}
CASES = {**ARRAYS, **STACKS}
DEFAULT = (*tables.REPRESENTATIVES, "three_levels")
over_presets = pytest.mark.parametrize("preset", tables.thinned(SPECS, DEFAULT))
over_cases = pytest.mark.parametrize("case", [*ARRAYS, "stacked_matrix"])
over_stacks = pytest.mark.parametrize(
    ("preset", "case"),
    tables.thinned(
        itertools.product(SPECS, STACKS),
        [(preset, "stacked_matrix") for preset in DEFAULT],
    ),
)
# Tests of values run every preset as a matrix, those as a stack that other tests
# compile anyway, and a few presets as other arrays.
COMPILED = {
    "row": ("int3", "nf4_dq"),
    "matrix": tuple(SPECS),
    "qkv": ("uint4", "mxfp4"),
    "attention_output": ("nvfp4", "ttq"),
    "stacked_matrix": DEFAULT,
}
TABLE = list(itertools.product(SPECS, CASES))
over_numbers = pytest.mark.parametrize(
    ("preset", "case"),
    tables.thinned(
        TABLE,
        [(preset, case) for preset, case in TABLE if preset in COMPILED.get(case, ())],
    ),
)
traces: list[QuantSpec] = []


@functools.partial(jax.jit, static_argnames=("spec", "contracting", "batch"))
def compiled(x, spec, contracting, batch):
    traces.append(spec)
    qt = jaxq.quantize(x, spec, contracting=contracting, batch=batch)
    return qt, jaxq.dequantize(qt)


@functools.cache
def array(case: str) -> np.ndarray:
    """Normal numbers; rows and columns differ in magnitude, and a block is zero."""
    shape = CASES[case][0]
    random = np.random.default_rng(len(case))
    x = random.standard_normal(shape) * np.exp(random.standard_normal((*shape[:-1], 1)))
    x[..., :2] *= 30
    x[..., 4 if len(shape) > 1 else slice(64, None)] = 0
    return x.astype(np.float32)


@functools.cache
def jitted(preset: str, case: str) -> tuple[QTensor, jax.Array]:
    _, contracting, batch = CASES[case]
    return compiled(array(case), SPECS[preset], contracting, batch)


def quantized(preset: str, case: str) -> QTensor:
    return jitted(preset, case)[0]


def dequantized(preset: str, case: str) -> np.ndarray:
    return np.asarray(jitted(preset, case)[1])


def assert_same_up_to_sums(actual, expected, spec: QuantSpec):
    """Equal bits; float32 scales of a rule that sums may differ in the last bits."""
    if not sums_floats(spec):
        assert_same(actual, expected)
        return
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for a, b in leaves:
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype == np.float32 and b.dtype == np.float32:
            # About log2 of the 100 numbers that are summed.
            np.testing.assert_array_max_ulp(a, b, maxulp=8)
        else:
            assert_same(a, b)


def sums_floats(spec: QuantSpec) -> bool:
    return any(
        level.rule.reads_block or level.offset == "mean" for level in spec.levels
    )


@over_presets
def test_jitted_equals_eager_to_the_bit(preset):
    x, (_, contracting, batch) = array("matrix"), CASES["matrix"]
    qt, values = jitted(preset, "matrix")
    eager = jaxq.quantize(x, SPECS[preset], contracting=contracting, batch=batch)
    assert_same(qt, eager)
    assert_same(values, jaxq.dequantize(eager))


@over_presets
def test_equal_specs_are_traced_once(preset):
    x, (_, contracting, batch) = array("matrix"), CASES["matrix"]
    spec = SPECS[preset]
    compiled(x, spec, contracting, batch)
    before = len(traces)
    assert spec in traces
    again = QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    compiled(x, again, contracting, batch)
    compiled(x, pickle.loads(pickle.dumps(spec)), contracting, batch)
    assert len(traces) == before, "an equal spec was traced again"


@over_cases
@pytest.mark.parametrize("preset", list(SPECS))
def test_shape_dtype_and_bytes(preset, case):
    # Only shapes are computed. Other tests compute the arrays by the same function.
    x, (_, contracting, batch) = array(case), CASES[case]
    qt, values = jax.eval_shape(
        lambda x: compiled(x, SPECS[preset], contracting, batch), x
    )
    assert (qt.shape, qt.dtype, qt.ndim, qt.size) == (x.shape, x.dtype, x.ndim, x.size)
    codes = jax.eval_shape(QTensor.codes, qt)
    assert (codes.shape, codes.dtype) == (x.shape, qt.spec.fmt.code_dtype)
    assert (values.shape, values.dtype) == (x.shape, x.dtype)
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(qt))
    batch, k = rows_of(x, case).shape[0], rows_of(x, case).shape[-1]
    assert (
        qt.nbytes
        == stored
        == batch * expected_bytes(rows_of(x, case).shape[1], k, qt.spec)
    )
    assert qt.bits_per_element == 8 * stored / x.size


def expected_bytes(rows: int, k: int, spec: QuantSpec) -> int:
    """Bytes of `[rows, k]` by the definitions of group and packing."""
    kind, size = (
        type(spec.granularity).__name__,
        getattr(spec.granularity, "size", None),
    )
    if kind == "PerFlat":
        rows, k = 1, rows * k
    blocks = 1 if size is None or size >= k else -(-k // size)
    fields = 1 if spec.fmt.bits == 8 else 8 // math.gcd(8, spec.fmt.bits)
    codes = rows * (-(-k // fields) * fields) * spec.fmt.bits // 8
    scales = 1 if kind == "PerTensor" else rows
    codes += 0 if spec.symmetric else scales * blocks
    if spec.rule.own_codebook:
        codes += 12 * scales * blocks  # float32 values of -1, 0 and 1
    if isinstance(spec.scale, QuantSpec):
        return codes + expected_bytes(scales, blocks, spec.scale)
    return codes + scales * blocks * {"float32": 4, "bfloat16": 2, "float16": 2}.get(
        spec.scale, 1
    )


def rows_of(x: np.ndarray, case: str) -> np.ndarray:
    """The array as `[batch, kept, contracted]`."""
    _, contracting, batch = CASES[case]
    contracting = (
        (contracting or -min(x.ndim, 2),)
        if not isinstance(contracting, tuple)
        else contracting
    )
    num_batch = x.shape[0] if batch == 0 else 1
    x = x.reshape(num_batch, *x.shape[1:] if batch == 0 else x.shape)
    k = math.prod(x.shape[a] for a in contracting)
    return np.moveaxis(x, contracting, range(-len(contracting), 0)).reshape(
        num_batch, -1, k
    )


@over_numbers
def test_every_number_becomes_the_nearest_value(preset, case):
    # No other code is nearer with the stored scale, and no other stored scale is nearer
    # to the ideal scale.
    qt = quantized(preset, case)
    rows, values = rows_of(array(case), case), rows_of(dequantized(preset, case), case)
    if qt.spec.rule.own_codebook:
        assert_trained_ternary(rows, values)
    else:
        assert_nearest(
            rows,
            values,
            np.asarray(scale_values(qt)).reshape(*rows.shape[:2], -1),
            qt,
            qt.spec,
        )


def assert_trained_ternary(rows: np.ndarray, values: np.ndarray):
    """Zhu et al., 2017: a magnitude up to 0.05 of the largest one becomes 0.

    The other numbers become the mean of the numbers of their sign.
    """
    for x, actual in zip(rows.astype(np.float64), values, strict=True):
        expected = np.zeros_like(x)
        for sign in (-1, 1):
            above = sign * x > 0.05 * abs(x).max()
            expected[above] = x[above].mean() if above.any() else 0
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


def assert_nearest(
    rows: np.ndarray,
    values: np.ndarray,
    scale: np.ndarray,
    qt: QTensor,
    spec: QuantSpec,
):
    """`rows`, `values` `[batch, n, k]`; `scale` `[batch, n, blocks]`."""
    size = getattr(spec.granularity, "size", rows.shape[-1])

    def spread(per_block):
        return np.repeat(per_block, size, axis=-1)[..., : rows.shape[-1]].astype(
            np.float64
        )

    step, numbers = spread(scale), spec.fmt.values().astype(np.float64)
    if spec.fmt.kind == "integer" and spec.symmetric and not spec.rule.signed:
        numbers = numbers[numbers >= -spec.fmt.max]
    zero = (
        0
        if qt.zero_point is None
        else spread(np.asarray(qt.zero_point).reshape(scale.shape))
    )
    usable = np.where(abs(step) > 2.0**-126, step, 1.0)
    y = np.where(abs(step) > 2.0**-126, rows / usable, 0.0) + zero
    step = abs(step)
    above = np.clip(np.searchsorted(numbers, y), 1, len(numbers) - 1)
    nearest = np.minimum(abs(y - numbers[above - 1]), abs(y - numbers[above]))
    if getattr(spec.fmt, "boundaries", None):
        # Rounds the logarithm: the boundary between 1 and 2 is sqrt(2).
        inside = (numbers[0] <= y) & (y <= numbers[-1])
        nearest = np.where(
            inside, (2 - np.sqrt(2)) * (numbers[above] - numbers[above - 1]), nearest
        )
    error = abs(values.astype(np.float64) - rows)
    slack = 1e-5 * step * np.abs(numbers).max() / 40 + 1e-6 * abs(rows)
    assert np.all(error <= step * nearest + slack), (
        f"off by {np.max((error - step * nearest) / usable)} steps"
    )

    blocks = [
        rows[..., i : i + size].astype(np.float64)
        for i in range(0, rows.shape[-1], size)
    ]
    ideal = np.stack([ideal_scale(b, spec) for b in blocks], axis=-1)
    if isinstance(spec.scale, QuantSpec):
        second = np.asarray(scale_values(qt.scale)).reshape(len(rows), -1)
        assert_nearest_scale(ideal, scale, second, spec.scale)
    else:
        close = {"float32": 1e-6, "bfloat16": 2.0**-8, "float8_e8m0fnu": 0.0}[
            spec.scale
        ]
        wrong = abs(scale - ideal) > close * abs(ideal)
        assert not np.any(wrong & (ideal != 0)), (
            f"scales {scale[wrong]} instead of {ideal[wrong]}"
        )
        assert np.all(scale[ideal == 0] <= 2.0**-126)


def assert_nearest_scale(
    ideal: np.ndarray, scale: np.ndarray, second: np.ndarray, spec: QuantSpec
):
    """Each scale is the nearest value of `spec.fmt` times a second scale.

    A scale is 0 only if the ideal scale is 0.
    """
    numbers = spec.fmt.values().astype(np.float64)
    numbers = numbers[numbers > 0]
    for batch in range(len(ideal)):
        if second.shape[1] in (1, ideal.shape[1]):
            step = np.broadcast_to(second[batch][:, None], ideal[batch].shape)
        else:  # blocks of flattened scales
            step = np.repeat(second[batch], spec.granularity.size)[
                : ideal[batch].size
            ].reshape(ideal[batch].shape)
        for a, b, unit in zip(
            ideal[batch].ravel(), scale[batch].ravel(), step.ravel(), strict=True
        ):
            if a == 0:
                assert b == 0
            else:
                assert (
                    abs(a - b) <= min(abs(a - unit * numbers)) * (1 + 1e-5) + 1e-6 * a
                )


def ideal_scale(block: np.ndarray, spec: QuantSpec) -> np.ndarray:
    largest = abs(block).max(-1)
    if not spec.symmetric:
        reach = np.maximum(block.max(-1), 0) - np.minimum(block.min(-1), 0)
        return reach / (spec.fmt.max - spec.fmt.min)
    if spec.scale_rule == "absmean":
        return abs(block).mean(-1)
    if spec.scale_rule == "mx_floor":
        exponent = np.floor(np.log2(largest + (largest == 0))) - np.floor(
            np.log2(spec.fmt.max)
        )
        return np.where(largest > 0, 2.0**exponent, 0)
    if spec.scale_rule == "signed_extreme":
        extreme = np.take_along_axis(block, abs(block).argmax(-1)[..., None], -1)
        return extreme[..., 0] / spec.fmt.min
    assert spec.scale_rule == "absmax", (
        f"teach this test the scale rule {spec.scale_rule!r}"
    )
    return largest / spec.fmt.max


@over_stacks
def test_a_layer_of_a_stack_equals_the_layer_alone(preset, case):
    x, stack = array(case), quantized(preset, case)
    _, contracting, batch = ARRAYS[case.removeprefix("stacked_")]
    layers = [compiled(layer, stack.spec, contracting, batch)[0] for layer in x]
    for i, layer in enumerate(layers):
        one = jax.tree.map(lambda a, i=i: a[i], stack)
        assert_same_up_to_sums(one, layer, stack.spec)
        assert_same_up_to_sums(stack[i], layer, stack.spec)
    stacked = jax.tree.map(lambda *a: np.stack(a), *layers)
    assert_same_up_to_sums(stacked, stack, stack.spec)


@over_stacks
def test_mapping_over_layers_equals_quantizing_the_stack(preset, case):
    stack = quantized(preset, case)
    _, contracting, batch = ARRAYS[case.removeprefix("stacked_")]
    quantize_layer = functools.partial(
        jaxq.quantize, spec=SPECS[preset], contracting=contracting, batch=batch
    )
    mapped = jax.jit(jax.vmap(quantize_layer))(array(case))
    assert_same_up_to_sums(mapped, stack, stack.spec)


@over_stacks
def test_scan_over_the_layers_of_a_stack(preset, case):
    stack = quantized(preset, case)

    @jax.jit
    def scanned(stack, start):
        def body(carry, layer):
            assert layer.shape == stack.shape[1:]
            values = jaxq.dequantize(layer)
            return carry + values, (layer, values)

        return jax.lax.scan(body, start, stack)

    total, (back, values) = scanned(stack, np.zeros(stack.shape[1:], np.float32))
    assert_same(back, stack)
    assert_same(values, dequantized(preset, case))
    np.testing.assert_allclose(total, values.sum(0), rtol=1e-5, atol=1e-4)


@over_numbers
def test_pickle_and_file(preset, case, tmp_path):
    qt = quantized(preset, case)
    jaxq.save(tmp_path / "file", {"layers": [qt, None]})
    for back in (
        pickle.loads(pickle.dumps(qt)),
        jaxq.load(tmp_path / "file")["layers"][0],
    ):
        assert_same(back, qt)
        assert back.meta == qt.meta
        assert hash(back.meta) == hash(qt.meta)


def test_names_of_presets_are_sorted_and_spelling_is_free():
    assert list(PRESETS) == sorted(PRESETS)
    assert len(PRESETS) >= 25
    x = array("matrix")
    assert_same(jaxq.quantize(x, "NF4-DQ"), quantized("nf4_dq", "matrix"))


@pytest.mark.parametrize(
    ("preset", "bits"),
    [
        # Dettmers et al., QLoRA, 2023: 4 + 32/64. With double quantization:
        # 4 + 8/64 + 32/(64*256).
        ("nf4", 4.5),
        ("nf4_dq", 4.126953125),
        # OCP Microscaling Formats v1.0: 8 bits for each 32.
        ("mxfp4", 4.25),
        ("mxfp6_e2m3", 6.25),
        ("mxfp6_e3m2", 6.25),
        ("mxfp8", 8.25),
        ("mxfp8_e5m2", 8.25),
        ("mxint8", 8.25),
        # 8 bits for each 16, and one float32.
        ("nvfp4", 4.5 + 32 / 2**20),
        ("int4", 4 + 16 / 128),
        # Dai et al., VS-Quant, 2021: 4 + 4/16, and one float32 a channel.
        ("vsq4", 4.25 + 32 / 1024),
        ("int8", 8 + 32 / 1024),
        ("binary", 1 + 32 / 1024),
        ("ternary", 2 + 32 / 1024),
        ("ttq", 2 + 4 * 32 / 2**20),
    ],
)
def test_published_bits_per_element(preset, bits):
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
    assert (
        jax.eval_shape(lambda x: jaxq.quantize(x, preset), x).bits_per_element == bits
    )
