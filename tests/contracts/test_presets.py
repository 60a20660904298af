"""One table: every preset, times every kind of array, times every promise of `quantize`. A new preset is a row.

Beside the presets stands a spec of three levels of scales, which none of them has.
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

PRESETS = tuple(jaxq.presets())
THREE_LEVELS = QuantSpec(
    "int4",
    PerGroup(16, pad=True),
    scale=QuantSpec(
        "uint8", PerChannel(), scale=QuantSpec("float8_e4m3fn", PerTensor())
    ),
)
SPECS = {**jaxq.presets(), "three_levels": THREE_LEVELS}
# name: (shape, contracting, batch). 100 and 288 are multiples of no common group size.
ARRAYS = {
    "row": ((100,), None, ()),
    "matrix": ((100, 64), None, ()),
    "qkv": ((288, 4, 6), -3, ()),
    "attention_output": ((4, 16, 48), (-3, -2), ()),
}
# Three of each, in one array with a batch axis.
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
# The numbers: every preset as a matrix and as a stack, which other tests here compile anyway; some as all the rest.
COMPILED = {
    "row": ("int8", "int3", "nf4_dq", "nvfp4", "ttq"),
    "matrix": tuple(SPECS),
    "qkv": ("int4", "uint4", "nf4", "mxfp4"),
    "attention_output": ("fp8", "int3", "nf4_dq", "nvfp4", "ttq"),
    "stacked_matrix": PRESETS[::4],
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
    """Normal numbers, some rows and columns of other sizes, a block of zeros."""
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


def assert_same(actual, expected, *, sums: bool = False):
    """Equal treedefs, equal bits in every leaf; with `sums`, float32 scales may differ as sums in another order do."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    )
    for (path, a), b in pairs:
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), jax.tree_util.keystr(path)
        if sums and a.dtype == np.float32:
            np.testing.assert_array_max_ulp(
                a, b, maxulp=8
            )  # about log2 of the 100 numbers summed
        else:
            same = a.view(np.uint8) == b.view(np.uint8) if a.ndim else a == b
            assert np.all(same), (
                f"{jax.tree_util.keystr(path)}: {np.sum(~same)} bytes differ"
            )


def sums_floats(spec: QuantSpec) -> bool:
    nested = isinstance(spec.scale, QuantSpec) and sums_floats(spec.scale)
    return spec.scale_rule in ("absmean", "ttq") or spec.offset == "mean" or nested


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
    # Nothing is computed: the arrays of the other tests come from the same function.
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
    """Bytes of `[rows, k]` by the definitions of group, padding and packing."""
    kind, size = (
        type(spec.granularity).__name__,
        getattr(spec.granularity, "size", None),
    )
    if kind == "PerFlat":
        rows, k = 1, rows * k
    blocks = 1 if size is None or size >= k else -(-k // size)
    fields = 1 if spec.fmt.bits == 8 else 8 // math.gcd(8, spec.fmt.bits)
    padded = k if blocks == 1 else blocks * size
    codes = rows * (-(-padded // fields) * fields) * spec.fmt.bits // 8
    scales = 1 if kind == "PerTensor" else rows
    codes += 0 if spec.symmetric else scales * blocks
    codes += (
        12 * scales * blocks if spec.scale_rule == "ttq" else 0
    )  # float32 numbers of -1, 0 and 1
    if isinstance(spec.scale, QuantSpec):
        return codes + expected_bytes(scales, blocks, spec.scale)
    return codes + scales * blocks * {"float32": 4, "bfloat16": 2, "float16": 2}.get(
        spec.scale, 1
    )


def rows_of(x: np.ndarray, case: str) -> np.ndarray:
    """The array as `[batch, kept, contracted]`, whatever its axes are called."""
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
def test_every_number_goes_to_the_nearest_one(preset, case):
    # With the scale as it is stored, no other code comes closer; and the stored scale is the nearest to the ideal one.
    qt = quantized(preset, case)
    rows, values = rows_of(array(case), case), rows_of(dequantized(preset, case), case)
    if qt.spec.scale_rule == "ttq":
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
    """Zhu et al., 2017: 0 up to 0.05 of the largest magnitude of a layer; the rest begins at its sign's mean."""
    for x, found in zip(rows.astype(np.float64), values, strict=True):
        expected = np.zeros_like(x)
        for sign in (-1, 1):
            held = sign * x > 0.05 * abs(x).max()
            expected[held] = x[held].mean() if held.any() else 0
        np.testing.assert_allclose(found, expected, rtol=1e-5)


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
    if spec.fmt.kind == "integer" and spec.symmetric:
        numbers = numbers[numbers >= -spec.fmt.max]
    zero = (
        0
        if qt.zero_point is None
        else spread(np.asarray(qt.zero_point).reshape(scale.shape))
    )
    usable = np.where(step > 2.0**-126, step, 1.0)
    y = np.where(step > 2.0**-126, rows / usable, 0.0) + zero
    above = np.clip(np.searchsorted(numbers, y), 1, len(numbers) - 1)
    nearest = np.minimum(abs(y - numbers[above - 1]), abs(y - numbers[above]))
    if getattr(
        spec.fmt, "boundaries", None
    ):  # rounds in the logarithm: a boundary at sqrt(2) between 1 and 2
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
        wrong = abs(scale - ideal) > close * ideal
        assert not np.any(wrong & (ideal > 0)), (
            f"scales {scale[wrong]} instead of {ideal[wrong]}"
        )
        assert np.all(scale[ideal == 0] <= 2.0**-126)


def assert_nearest_scale(
    ideal: np.ndarray, scale: np.ndarray, second: np.ndarray, spec: QuantSpec
):
    """Scales that are numbers of `spec.fmt` times a second scale: the nearest such number, and not 0 but for 0."""
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
    assert spec.scale_rule == "absmax", (
        f"teach this test the scale rule {spec.scale_rule!r}"
    )
    return largest / spec.fmt.max


@over_stacks
def test_layers_of_a_stack_stand_alone(preset, case):
    x, stack = array(case), quantized(preset, case)
    sums = sums_floats(stack.spec)
    _, contracting, batch = ARRAYS[case.removeprefix("stacked_")]
    layers = [compiled(layer, stack.spec, contracting, batch)[0] for layer in x]
    for i, layer in enumerate(layers):
        assert_same(jax.tree.map(lambda a, i=i: a[i], stack), layer, sums=sums)
        assert_same(stack[i], layer, sums=sums)
    assert_same(jax.tree.map(lambda *a: np.stack(a), *layers), stack, sums=sums)


@over_stacks
def test_mapping_over_layers_is_quantizing_a_stack(preset, case):
    stack, (_, contracting, batch) = (
        quantized(preset, case),
        ARRAYS[case.removeprefix("stacked_")],
    )
    one = functools.partial(
        jaxq.quantize, spec=SPECS[preset], contracting=contracting, batch=batch
    )
    assert_same(
        jax.jit(jax.vmap(one))(array(case)), stack, sums=sums_floats(stack.spec)
    )


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


def test_presets_are_named_in_order_and_any_spelling_finds_them():
    assert list(PRESETS) == sorted(PRESETS)
    assert len(PRESETS) >= 25
    x = array("matrix")
    assert_same(jaxq.quantize(x, "NF4-DQ"), quantized("nf4_dq", "matrix"))


@pytest.mark.parametrize(
    ("preset", "bits"),
    [
        # Dettmers et al., QLoRA, 2023: 4 + 32/64, and with double quantization 4 + 8/64 + 32/(64*256).
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
