"""quantize_model: what it leaves alone, what stays shared, and what it refuses."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxq
from jaxq import QTensor, Recipe, Rule
from jaxq.nn import QuantizedParam
from tests.arrays import assert_same, normal

ALL = Recipe([Rule(weight="int8")])


def squash(x):
    return x / 2


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(40, 8, rngs=rngs)
        self.down = nnx.Linear(8, 40, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class Model(nnx.Module):
    def __init__(self, rngs, num_layers=2):
        self.layers = nnx.List([Block(rngs) for _ in range(num_layers)])
        self.lm_head = nnx.Linear(40, 5, rngs=rngs)
        self.hook = squash

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.hook(x))


class Hand(nnx.Module):
    """Multiplies with its weight by calling `fn`."""

    def __init__(self, fn, rngs):
        self.lin = nnx.Linear(8, 8, use_bias=False, rngs=rngs)
        self.fn = fn

    def __call__(self, x):
        return self.fn(x, self.lin.kernel[...])


def linear(rngs=None, **arguments):
    return nnx.Linear(40, 8, rngs=rngs or nnx.Rngs(0), **arguments)


def weights(model):
    return {
        "/".join(map(str, path)): v.get_value()
        for path, v in nnx.iter_graph(model)
        if isinstance(v.get_value() if isinstance(v, nnx.Variable) else None, QTensor)
    }


def test_the_model_stays_as_it_is():
    model = Model(nnx.Rngs(0))
    state = jax.tree.map(np.array, nnx.state(model))
    graph = nnx.graphdef(model)
    attributes = {
        "/".join(map(str, path)): {
            k: v for k, v in vars(m).items() if not k.startswith("_")
        }
        for path, m in nnx.iter_modules(model)
    }
    q, _ = jaxq.quantize_model(model, "int8")
    assert type(q) is type(model)
    assert nnx.graphdef(model) == graph
    assert_same(nnx.state(model), state)
    for path, m in nnx.iter_modules(model):
        before = attributes["/".join(map(str, path))]
        after = {k: v for k, v in vars(m).items() if not k.startswith("_")}
        assert before.keys() == after.keys()
        assert all(before[k] is after[k] for k in before)
    assert [type(m) for _, m in nnx.iter_modules(q)] == [
        type(m) for _, m in nnx.iter_modules(model)
    ]


def test_nothing_of_jax_or_flax_is_replaced():
    attributes = [
        (jax.lax, "dot_general"),
        (jax.lax, "conv_general_dilated"),
        (jnp, "einsum"),
        (jnp, "matmul"),
    ]
    attributes += [
        (jnp, "dot"),
        (jax.nn, "dot_product_attention"),
        (jax.nn, "relu"),
        (nnx.Linear, "__call__"),
    ]
    attributes += [
        (nnx.Conv, "__call__"),
        (nnx.Embed, "__call__"),
        (nnx.Embed, "attend"),
        (nnx.Einsum, "__call__"),
    ]
    before = [
        (getattr(owner, name), getattr(getattr(owner, name), "__code__", None))
        for owner, name in attributes
    ]
    q, _ = jaxq.quantize_model(Model(nnx.Rngs(0)), "w8a8")
    q(jnp.ones((2, 40)))
    for (owner, name), (fn, code) in zip(attributes, before, strict=True):
        assert getattr(owner, name) is fn
        assert getattr(fn, "__code__", None) is code


def test_quantized_models_are_models():
    q, _ = jaxq.quantize_model(Model(nnx.Rngs(0)), "w8a8")
    x = normal(2, 40)
    expected = q(x)
    graph, state = nnx.split(q)
    for model_copy in (
        nnx.merge(graph, state),
        nnx.clone(q),
        pickle.loads(pickle.dumps(q)),
    ):
        assert nnx.graphdef(model_copy) == graph
        np.testing.assert_array_equal(model_copy(x), expected)
    np.testing.assert_allclose(
        nnx.jit(lambda m, x: m(x))(q, x), expected, rtol=1e-4, atol=1e-5
    )
    assert (
        weights(nnx.merge(graph, jax.tree.map(lambda a: a, state))).keys()
        == weights(q).keys()
    )
    nnx.update(q, state)
    np.testing.assert_array_equal(q(x), expected)
    # Submodules work alone.
    block = q.layers[1]
    assert block.up(x).shape == (2, 8)
    assert block(x).shape == (2, 40)


def test_equal_quantizations_trace_once():
    traces = []

    @nnx.jit
    def forward(model, x):
        traces.append(1)
        return model(x)

    for seed in (0, 0, 1):
        forward(
            jaxq.quantize_model(Model(nnx.Rngs(seed), 1), "int8")[0], jnp.ones((2, 40))
        )
    assert len(traces) == 1
    forward(jaxq.quantize_model(Model(nnx.Rngs(0), 1), "w8a8")[0], jnp.ones((2, 40)))
    assert len(traces) == 2


def test_optimizers_of_params_leave_weights_alone():
    q, _ = jaxq.quantize_model(Model(nnx.Rngs(0), 1), "int8")
    before = {path: jax.tree.map(jnp.copy, qt) for path, qt in weights(q).items()}
    bias = np.array(q.layers[0].up.bias[...])
    optimizer = nnx.Optimizer(q, optax.sgd(0.1), wrt=nnx.Param)
    grads = nnx.jit(nnx.grad(lambda m, x: (m(x) ** 2).sum()))(q, jnp.ones((2, 40)))
    optimizer.update(q, grads)
    assert weights(grads) == {}
    assert len(before) == 2
    for path, qt in weights(q).items():
        assert_same(qt, before[path])
    assert np.any(q.layers[0].up.bias[...] != bias)


# Products outside of layers.


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, w: x @ w,
        lambda x, w: x @ w.astype(jnp.float32),
        lambda x, w: x @ w.T,
        lambda x, w: (w.T @ x.T).T,
        lambda x, w: jax.jit(lambda a, b: a @ b)(x, w),
        lambda x, w: jaxq.einsum("bk,kn->bn", x, w),
        lambda x, w: x @ jaxq.dequantize(w) if isinstance(w, QTensor) else x @ w,
    ],
    ids=["@", "astype", "T", "left", "jit", "einsum", "dequantize"],
)
def test_products_by_hand_use_codes(fn):
    model = Hand(fn, nnx.Rngs(0))
    q, report = jaxq.quantize_model(model, "int4")
    assert len(report.quantized) == 1
    x = normal(2, 8)
    expected, y = fn(x, jaxq.dequantize(q.lin.kernel[...])), q(x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(y, model(x), atol=1e-4)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x, w: x @ (w * 2.0), "jaxq.dequantize"),
        (lambda x, w: x @ (jnp.ones(8) * w), "jaxq.dequantize"),
        (lambda x, w: x @ w[:, :4], "jaxq.dequantize"),
        (lambda x, w: x @ np.asarray(w), "jaxq.dequantize"),
        (lambda x, w: jnp.matmul(x, w), "jaxq.dequantize"),
        (lambda x, w: jnp.einsum("bk,kn->bn", x, w), "jaxq.dequantize"),
        (lambda x, w: jnp.dot(x, w), "jaxq.dequantize"),
        (lambda x, w: x @ jnp.split(w, 2, axis=1)[0], "jaxq.dequantize"),
        (lambda x, w: jax.lax.dot(x, w), "__jax_array__"),  # jax.lax names nothing
    ],
    ids=["w*g", "g*w", "slice", "numpy", "matmul", "einsum", "dot", "split", "lax.dot"],
)
def test_functions_that_need_floats_raise(fn, message):
    q, _ = jaxq.quantize_model(Hand(fn, nnx.Rngs(0)), "int4")
    for call in (q, nnx.jit(lambda x: q(x))):
        with pytest.raises((TypeError, IndexError, ValueError), match=message):
            call(jnp.ones((2, 8)))


# Sharing.


class Holder(nnx.Module):
    def __init__(self, weight):
        self.w = weight


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.first = linear(rngs)
        self.second = linear(rngs)
        self.second.kernel = self.first.kernel
        self.last = self.first
        self.a_holder = Holder(self.first.kernel)
        self.listed = nnx.List([self.first.kernel])


def test_shared_weights_stay_shared():
    model = Tied(nnx.Rngs(0))
    q, report = jaxq.quantize_model(model, "int8")
    assert isinstance(q.first.kernel, QuantizedParam)
    assert q.first.kernel is q.second.kernel is q.a_holder.w is q.listed[0]
    assert q.last is q.first
    assert q.first.bias is not q.second.bias
    assert [row.path for row in report.rows] == [
        "a_holder/w",
        "first/bias",
        "second/bias",
    ]
    assert report.rows[0].kind == "Linear"
    assert report.bytes_after == sum(
        leaf.nbytes for leaf in jax.tree.leaves(nnx.state(q))
    )
    assert q.second(jnp.ones((2, 40))).shape == (2, 8)


def test_a_weight_in_a_tuple_is_refused():
    model = Tied(nnx.Rngs(0))
    model.pair = nnx.data((model.first.kernel, 1))
    with pytest.raises(
        ValueError,
        match=r"also held as pair/0, in a container that cannot be changed.*nnx.List",
    ):
        jaxq.quantize_model(model, "int8")


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe([Rule("first", skip=True), Rule(weight="int8")]),
        Recipe([Rule("first", weight="int8")]),
        Recipe([Rule("first", weight="int8"), Rule("second", weight="int4")]),
        Recipe(
            [
                Rule("first", weight="int8"),
                Rule("second", weight="int8", activation="int8"),
            ]
        ),
    ],
    ids=["skip first", "no rule for second", "two formats", "two activations"],
)
def test_conflicting_rules_for_one_weight(recipe):
    with pytest.raises(
        ValueError, match=r"second \(Linear\): it shares its weight with first"
    ):
        jaxq.quantize_model(Tied(nnx.Rngs(0)), recipe)


def test_equal_rules_for_one_weight():
    recipe = Recipe([Rule("first", weight="int8"), Rule("second", weight="int8")])
    assert len(jaxq.quantize_model(Tied(nnx.Rngs(0)), recipe)[1].quantized) == 1


def test_conflicting_use_of_one_weight():
    class Odd(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Embed(40, 8, rngs=rngs)
            self.lin = linear(rngs)
            self.lin.kernel = self.table.embedding

    with pytest.raises(
        ValueError,
        match=r"table \(Embed\): it shares its weight with lin, and the rules or axes",
    ):
        jaxq.quantize_model(Odd(nnx.Rngs(0)), ALL)


# Refusing.


def own_dot(*args, **kwargs):
    return jax.lax.dot_general(*args, **kwargs)


class Named(nnx.Embed):
    pass


class Troubled(nnx.Module):
    def __init__(self, rngs):
        self.hooked = linear(rngs, dot_general=own_dot)
        self.general = nnx.LinearGeneral(
            4, 4, dot_general_cls=lambda: own_dot, rngs=rngs
        )
        self.masked = nnx.Conv(2, 3, (3,), mask=jnp.ones((3, 2, 3)), rngs=rngs)
        self.free = nnx.Einsum("ab,bc->ac", (4, 4), rngs=rngs)
        self.free.einsum_str = None  # given at each call
        self.outer = nnx.Einsum("a,bc->abc", (4, 4), rngs=rngs)
        self.table = Named(4, 4, rngs=rngs)
        self.ints = linear(rngs)
        self.ints.kernel.set_value(jnp.ones((40, 8), jnp.int32))
        build = nnx.split_rngs(splits=3)(
            nnx.vmap(lambda r: linear(r), in_axes=0, out_axes=1)
        )
        self.stack = build(rngs)
        self.good = linear(rngs)


def test_one_error_names_all_problems():
    with pytest.raises(ValueError, match="these layers cannot be quantized") as error:
        jaxq.quantize_model(Troubled(nnx.Rngs(0)), ALL)
    lines = {
        line.strip().split(" ")[0]: line for line in str(error.value).splitlines()[1:-1]
    }
    assert lines.keys() == {
        "hooked",
        "general",
        "masked",
        "free",
        "outer",
        "table",
        "ints",
        "stack",
    }
    for name, word in {
        "hooked": "dot_general is a custom function",
        "general": "dot_general_cls is a custom class",
        "masked": "masked",
        "free": "einsum_str is given at each call",
        "outer": "contracts no axis",
        "table": "Named is a subclass of Embed",
        "ints": "int32",
        "stack": "is [40, 3, 8], a stack along axis 1, not along axis 0",
    }.items():
        assert word in lines[name], name
    assert "skip=True" in str(error.value).splitlines()[-1]


def test_skipped_layers_are_not_checked():
    names = ("hooked", "general", "masked", "free", "outer", "table", "ints", "stack")
    recipe = Recipe([*(Rule(name, skip=True) for name in names), Rule(weight="int8")])
    _, report = jaxq.quantize_model(Troubled(nnx.Rngs(0)), recipe)
    assert [row.path for row in report.quantized] == ["good/kernel"]


def test_quantized_already():
    q, _ = jaxq.quantize_model(Model(nnx.Rngs(0), 1), "int8")
    with pytest.raises(
        ValueError, match=r"layers/0/down \(Linear\): it is quantized already"
    ):
        jaxq.quantize_model(q, "int8")


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_non_finite_weights_are_named(number):
    model = Model(nnx.Rngs(0))
    kernel = model.layers[1].up.kernel
    weight = np.array(kernel[...])
    weight[3, 2] = number
    kernel.set_value(jnp.asarray(weight))
    with pytest.raises(ValueError, match=rf"layers/1/up/kernel\[3, 2\] is {number}"):
        jaxq.quantize_model(model, "int8")
    q, _ = jaxq.quantize_model(model, "int8", on_nonfinite="zero")
    assert np.isfinite(q(jnp.ones((2, 40)))).all()


def test_unused_rules():
    recipe = Recipe(
        [
            Rule("layers/*/atn", weight="int8"),
            Rule("x", skip=True, optional=True),
            Rule(weight="int8"),
        ]
    )
    with pytest.raises(
        ValueError,
        match=r"\['layers/\*/atn'\] match no layer.*layers/0/down \(Linear\)",
    ):
        jaxq.quantize_model(Model(nnx.Rngs(0)), recipe)


def test_rules_hidden_by_earlier_ones_are_unused():
    with pytest.raises(
        ValueError,
        match=r"\['lm_head'\] match no layer \(or only layers that an earlier rule",
    ):
        jaxq.quantize_model(
            Model(nnx.Rngs(0)),
            Recipe([Rule(weight="int8"), Rule("lm_head", skip=True)]),
        )


def test_a_model_without_layers():
    with pytest.raises(ValueError, match=r"does not know: w float32\[4, 4\]"):
        jaxq.quantize_model(Holder(nnx.Param(jnp.ones((4, 4)))), "int8")
    with pytest.raises(ValueError, match="Layers here: none that jaxq knows"):
        jaxq.quantize_model(Holder(nnx.Param(jnp.ones(4))), "int8")


def test_a_dict_is_refused():
    with pytest.raises(TypeError, match="must be a flax nnx Module, got dict"):
        jaxq.quantize_model({"w": jnp.ones((4, 4))}, "int8")


def test_a_layer_is_a_model():
    q, report = jaxq.quantize_model(linear(), "int8")
    assert [row.path for row in report.rows] == ["bias", "kernel"]
    assert isinstance(q.kernel[...], QTensor)


def test_named_recipes_skip_layers_with_a_note():
    class Usual(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(4, 40, rngs=rngs)
            self.router = linear(rngs)
            self.lm_head = linear(rngs)
            self.up = linear(rngs)

    q, report = jaxq.quantize_model(Usual(nnx.Rngs(0)), "int8")
    assert weights(q).keys() == {"up/kernel"}
    notes = {row.path: row.note for row in report.rows}
    assert "embedding" in notes["embed/embedding"]
    assert "router" in notes["router/kernel"]
    assert "output head" in notes["lm_head/kernel"]


def test_donated_weights_are_gone():
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    kernel, bias = model.kernel.get_value(), model.bias.get_value()
    q, _ = jaxq.quantize_model(model, "int8", donate=True)
    assert kernel.is_deleted()
    assert not bias.is_deleted()
    assert q(jnp.ones((2, 64))).shape == (2, 8)
    with pytest.raises(ValueError, match="needs. Pass only one"):
        jaxq.quantize_model(q, "int8", donate=True, calibration=[jnp.ones((2, 64))])


class Dense(nnx.Module):
    """A Linear, and a matrix in a module of an unknown class."""

    def __init__(self, rngs):
        self.lin = nnx.Linear(40, 40, rngs=rngs)
        self.w = nnx.Param(normal(40, 8))
        self.b = nnx.Param(normal(8))

    def __call__(self, x):
        y = self.lin(x) @ self.w
        return y + jnp.broadcast_to(self.b[...], y.shape)


class Layers(nnx.Module):
    """The same numbers in an nnx.Linear."""

    def __init__(self, dense, rngs):
        self.lin = dense.lin
        self.out = nnx.Linear(40, 8, rngs=rngs)
        self.out.kernel[...], self.out.bias[...] = dense.w[...], dense.b[...]

    def __call__(self, x):
        return self.out(self.lin(x))


@pytest.mark.parametrize(
    "rule",
    [
        Rule(weight="int4", method="gptq", kinds=("Param", "Linear")),
        Rule(
            weight="int8", activation="int8", observer="mse", kinds=("Param", "Linear")
        ),
        Rule(weight="int4", correct_bias=True, kinds=("Param", "Linear")),
    ],
    ids=["gptq", "static", "bias"],
)
def test_a_bare_matrix_is_calibrated_as_a_linear_is(rule):
    if rule.observer is not None:
        spec = jaxq.QuantSpec("int8", jaxq.PerTensor())
        rule = dataclasses.replace(rule, activation=spec)
    dense = Dense(nnx.Rngs(0))
    batches = [jnp.abs(normal(8, 6, 40, seed=seed)) for seed in range(2)]
    q, report = jaxq.quantize_model(dense, Recipe([rule]), calibration=batches)
    reference = Layers(dense, nnx.Rngs(0))
    wanted, _ = jaxq.quantize_model(reference, Recipe([rule]), calibration=batches)
    bare, kernel = q.w[...], wanted.out.kernel[...]
    assert_same(bare.codes(), kernel.codes())
    assert_same(bare.input_range, kernel.input_range)
    np.testing.assert_allclose(q.b[...], wanted.out.bias[...], rtol=1e-5, atol=1e-6)
    assert (q.b[...] != dense.b[...]).any() == rule.correct_bias
    (row,) = [row for row in report.rows if row.path == "w"]
    assert row.method == rule.method


def test_a_trace_shows_the_axes_of_a_bare_matrix():
    class Heads(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(normal(40, 2, 4))

        def __call__(self, x):
            return jaxq.einsum("td,dhk->thk", x, self.w[...])

    rule = Rule(weight="int4", method="gptq", kinds=("Param",))
    q, _ = jaxq.quantize_model(Heads(), Recipe([rule]), calibration=[normal(64, 40)])
    assert q.w[...].meta.geometry.contracted == (-3,)
    assert q(normal(3, 40)).shape == (3, 2, 4)
    wrong = dataclasses.replace(rule, contracting=(0, 1))
    with pytest.raises(ValueError, match=r"its axes are contracting=\(0,\)"):
        jaxq.quantize_model(Heads(), Recipe([wrong]), calibration=[normal(64, 40)])


def test_bare_matrices_and_layers_are_quantized_in_their_order():
    dense = Dense(nnx.Rngs(0))
    batches = [normal(8, 6, 40)]
    rule = Rule(weight="int2", method="gptq", kinds=("Param", "Linear"))
    settings = {"calibration": batches, "fallback": "none"}
    together, _ = jaxq.quantize_model(dense, Recipe([rule]), **settings)
    q, _ = jaxq.quantize_model(dense, Recipe([rule]), sequential="layers", **settings)
    assert_same(q.lin.kernel[...].codes(), together.lin.kernel[...].codes())
    # The matrix is quantized after the layer, on inputs with the error of the layer.
    reference = Layers(dense, nnx.Rngs(0))
    wanted, _ = jaxq.quantize_model(
        reference, Recipe([rule]), sequential="layers", **settings
    )
    assert_same(q.w[...].codes(), wanted.out.kernel[...].codes())
    assert np.any(q.w[...].codes() != together.w[...].codes())
