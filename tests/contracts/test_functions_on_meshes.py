"""Every function on a mesh of four devices gives the results of one device.

Each case is a function of `put`. `put(array, *names)` shards an array over mesh axes.
The same case runs with a `put` that does nothing.
"""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import kernels, methods, ops
from tests import tables
from tests.arrays import normal, normal_with_outliers

GROUPS = jaxq.QuantSpec("int4", granularity=jaxq.PerGroup(32))
# Sums over sharded axes have another order than on one device.
TOLERANCE = 1e-5


def weight(put, *names):
    return put(normal_with_outliers(64, 128), *(names or (None, "t")))


def inputs(put):
    return put(normal(8, 64, seed=3), "d", None)


def tokens(put):
    return put(normal(256, 64, seed=4), "d", None)


def hessian():
    x = np.asarray(normal(256, 64, seed=4))
    return jnp.asarray(x.T @ x / 256)


def fake_quant(put):
    def loss(w):
        return (jaxq.fake_quant(w, "int4") ** 2).sum()

    return jaxq.fake_quant(weight(put), "int4"), jax.jit(jax.grad(loss))(weight(put))


def cast(put):
    key = jax.random.key(0)
    nearest = jaxq.cast(weight(put), "float8_e4m3fn")
    return nearest, jaxq.cast(weight(put), "bfloat16", rounding="stochastic", key=key)


def emulate(put):
    policy = jaxq.emulation.Policy("bfloat16", accumulate="bfloat16", result="bfloat16")
    return jaxq.emulate(lambda x, w: x @ w, policy)(inputs(put), weight(put))


def column_parallel(put):
    x, qt = inputs(put), jaxq.quantize(weight(put), "int4")
    return jaxq.dot_general(x, qt, (((1,), (0,)), ((), ())))


def row_parallel(put):
    x = put(normal(8, 64, seed=3), "d", "t")
    qt = jaxq.quantize(weight(put, "t", None), "int4")
    return put.product(x, qt, "d", None)


def einsum(put):
    qt = jaxq.quantize(weight(put), "int8").with_activation("int8")
    return jaxq.einsum("bk,kn->bn", inputs(put), qt)


def conv(put):
    kernel = put(normal(3, 3, 8, 16), None, None, None, "t")
    qt = jaxq.quantize(kernel, "int8", contracting=(0, 1, 2))
    x = put(normal(4, 8, 8, 8), "d")
    numbers = ("NHWC", "HWIO", "NHWC")

    def convolve(x, qt):
        return ops.conv_general_dilated(
            x, qt, (1, 1), "SAME", dimension_numbers=numbers
        )

    def loss(x):
        return (convolve(x, qt) ** 2).sum()

    return convolve(x, qt), convolve(x, qt.with_activation("int8")), jax.grad(loss)(x)


def take(put):
    table = jaxq.quantize(put(normal(128, 64), None, "t"), "int8", contracting=-1)
    return ops.take(table, put(jnp.arange(8) * 3, "d"))


def ragged_dot(put):
    experts = put(normal(4, 64, 32), "t", None, None)
    qt = jaxq.quantize(experts, "int8", batch=(0,))
    return ops.ragged_dot(put(normal(16, 64)), qt, jnp.array([4, 3, 9, 0]))


def kv_cache(put):
    cache = ops.KVCache.empty(
        "int4", batch=2, num_heads=2, length=128, head_dim=64, dtype=jnp.float32
    )
    rest = ((leaf, put(leaf, "d", "t")) for leaf in jax.tree.leaves(cache)[:-1])
    leaves = [sharded for _, sharded in rest] + [put(cache.lengths, "d")]
    cache = jax.tree.unflatten(jax.tree.structure(cache), leaves)
    k, v = (put(normal(2, 70, 2, 64, seed=seed), "d", None, "t") for seed in (0, 1))
    q = put(normal(2, 1, 4, 64, seed=2), "d", None, "t")

    def step(cache, _):
        cache = cache.append(k[:, :20], v[:, :20])
        return cache, cache.attend(q)

    cache = cache.append(k, v, count=put(jnp.array([70, 40]), "d")).reset([1])
    steps = jax.jit(lambda cache: jax.lax.scan(step, cache, None, length=2))
    return cache.attend(q), steps(cache)


def scan_in_place(put):
    stack = put(normal(3, 64, 64), None, None, "t")
    qt = jaxq.quantize(stack, "int4", batch=(0,))

    def step(x, layer):
        return put.product(x, layer, "d", None) / 8, None

    scan = ops.scan_in_place(lambda x, qt: jax.lax.scan(step, x, qt)[0])
    is_explicit = put.out_sharding_of_floats("d") is not None
    with warnings.catch_warnings():
        if is_explicit:  # each device multiplies its parts, which are copied first
            message = ".* get their codes from shard_map"
            warnings.filterwarnings("ignore", message, kernels.FallbackWarning)
        return jax.jit(scan)(inputs(put), qt)


def views(put):
    qt = jaxq.quantize(put(normal(4, 64, 128), None, None, "t"), "nf4", batch=(0,))
    at = jax.jit(lambda qt, i: jaxq.dequantize(qt[i]))
    matrix = qt[1]
    changed = [matrix.T, matrix.astype(jnp.bfloat16), jaxq.relayout(matrix, "columns")]
    return at(qt, jnp.array(2)), [jaxq.dequantize(part) for part in changed]


def metrics(put):
    w = weight(put)
    return jaxq.metrics.sqnr(w, jaxq.dequantize(jaxq.quantize(w, "int4")))


def optimizer_state(put):
    spec = jaxq.QuantSpec("dynamic8", granularity=jaxq.PerFlat(256))
    return jaxq.dequantize(jaxq.quantize(weight(put), spec))


def quantize_params(put):
    qparams, _ = jaxq.quantize_params(
        {"w": weight(put)},
        "int4_gptq",
        calibration=[inputs(put), 2 * inputs(put)],
        forward=lambda params, x: x @ params["w"],
    )
    return jaxq.dequantize_params(qparams)


class Block(nnx.Module):
    """Two layers, the first one column-parallel and the second one row-parallel."""

    def __init__(self, put):
        self.out_sharding = put.out_sharding_of_floats("d", None)
        self.up = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
        self.down = nnx.Linear(128, 64, use_bias=False, rngs=nnx.Rngs(0))
        self.up.kernel.set_value(put(normal(64, 128, seed=1), None, "t"))
        self.up.bias.set_value(put(normal(128), "t"))
        self.down.kernel.set_value(put(normal(128, 64, seed=2), "t", None))

    def __call__(self, x):
        return self.down(jax.nn.relu(self.up(x)), out_sharding=self.out_sharding)


def nnx_model(recipe):
    def case(put):
        x = inputs(put)
        qmodel, report = jaxq.quantize_model(Block(put), recipe, calibration=[x, 2 * x])
        assert len(report.rows) == 3
        return nnx.jit(lambda model, x: model(x))(qmodel, x)

    return case


def linen_model(put):
    module = linen.Dense(128)
    kernel, bias = weight(put), put(normal(128), "t")
    variables = {"params": {"kernel": kernel, "bias": bias}}
    x = inputs(put)
    qmodule, qvariables, _ = jaxq.nn.linen.quantize_model(
        module, variables, "int4_gptq", calibration=[x]
    )
    return qmodule.apply(qvariables, x)


def observer(name):
    def case(put):
        arguments = (99.9,) if name == "percentile" else ()
        watch = getattr(jaxq.observers, name)(*arguments)
        state = watch.update(watch.init(inputs(put)), inputs(put))
        return watch.bounds(watch.update(state, -2 * inputs(put)), "int8")

    return case


METHODS = {
    "adaround": lambda put: methods.adaround(
        weight(put), tokens(put), GROUPS, key=jax.random.key(0), num_steps=20
    ),
    "awq": lambda put: methods.awq(weight(put), tokens(put), GROUPS),
    "bias_correction": lambda put: methods.bias_correction(
        weight(put), jaxq.quantize(weight(put), "int4"), normal(64)
    ),
    "clip": lambda put: methods.clip(weight(put), GROUPS, x=tokens(put)),
    "equalize": lambda put: methods.equalize(
        weight(put), put(normal(128, 64, seed=2), "t", None)
    ),
    "gptq": lambda put: methods.gptq(weight(put), hessian(), GROUPS),
    "gptq, rows": lambda put: methods.gptq(weight(put, "t", None), hessian(), GROUPS),
    "gptq, jit": lambda put: jax.jit(lambda w, h: methods.gptq(w, h, GROUPS))(
        weight(put, "t", None), hessian()
    ),
    "hqq": lambda put: methods.hqq(weight(put), GROUPS),
    "kmeans": lambda put: methods.kmeans(weight(put), 4),
    "llm_int8": lambda put: methods.llm_int8(weight(put)),
    "llm_int8_matmul": lambda put: methods.llm_int8_matmul(inputs(put), weight(put)),
    "rotate": lambda put: (
        methods.rotate_in(weight(put)),
        methods.rotate_out(weight(put)),
    ),
    "rtn": lambda put: methods.rtn(weight(put), GROUPS),
    "smoothquant": lambda put: methods.smoothquant(
        put(jnp.abs(normal(64))), weight(put)
    ),
}
FUNCTIONS = (
    *(fake_quant, cast, emulate, column_parallel, row_parallel, einsum, conv, take),
    *(ragged_dot, kv_cache, scan_in_place, views, metrics, optimizer_state),
    *(quantize_params, linen_model),
)
CASES = (
    {function.__name__: function for function in FUNCTIONS}
    | METHODS
    | {f"{name} observer": observer(name) for name in jaxq.observers.names()}
    | {
        recipe: nnx_model(recipe)
        for recipe in ("int8", "int4_gptq", "int4_awq", "w8a8_static")
    }
)


class OneDevice:
    """`put` that leaves arrays where they are."""

    def __call__(self, array, *names):
        return array

    def out_sharding(self, *names):
        return None

    def out_sharding_of_floats(self, *names):
        return None

    def product(self, x, qt, *names):
        dims = (((1,), (0,)), ((), ()))
        return jaxq.dot_general(x, qt, dims, out_sharding=self.out_sharding(*names))


class OnMesh(OneDevice):
    """`put` that shards arrays over a mesh."""

    def __init__(self, mesh):
        self.mesh = mesh

    def __call__(self, array, *names):
        return jax.device_put(array, NamedSharding(self.mesh, P(*names)))

    def out_sharding(self, *names):
        return P(*names)

    def out_sharding_of_floats(self, *names):
        """jax's own products take an `out_sharding` only on Explicit axes."""
        is_explicit = AxisType.Explicit in self.mesh.axis_types
        return P(*names) if is_explicit else None


# On Auto axes XLA does the whole work. So most of these rows are heavy.
ON_AUTO_AXES = ("conv", "int4_gptq", "kv_cache", "quantize_params", "row_parallel")
TABLE = list(itertools.product(CASES, (AxisType.Explicit, AxisType.Auto)))


@pytest.mark.parametrize(
    ("name", "kind"),
    tables.thinned(
        TABLE,
        [row for row in TABLE if row[1] == AxisType.Explicit or row[0] in ON_AUTO_AXES],
    ),
)
def test_a_function_on_a_mesh(name, kind):
    expected = CASES[name](OneDevice())
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        result = CASES[name](OnMesh(mesh))
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True)
    for actual, wanted in pairs:
        actual, wanted = np.asarray(actual), np.asarray(wanted)
        assert (actual.dtype, actual.shape) == (wanted.dtype, wanted.shape)
        if np.issubdtype(wanted.dtype, np.integer):
            np.testing.assert_array_equal(actual, wanted)
            continue
        actual, wanted = actual.astype(np.float32), wanted.astype(np.float32)
        bound = TOLERANCE * np.max(np.abs(wanted), initial=1e-30)
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=bound)


def test_results_of_methods_stay_sharded():
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        qt, _ = methods.gptq(weight(OnMesh(mesh)), hessian(), GROUPS)
        rotated = methods.rotate_in(weight(OnMesh(mesh)))
    for leaf, spec in ((qt.data, P("t", None)), (rotated, P(None, "t"))):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
