"""quantize_model for linen: what it quantizes, leaves in floats and refuses."""

import pickle

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxq
from jaxq import QTensor, Recipe, Rule, methods
from jaxq.nn.linen import (
    QDense,
    Quantized,
    QuantizedBox,
    calibrate,
    quantize_model,
)
from tests.arrays import assert_same, normal
from tests.nn.layers.test_linen import built, in_floats
from tests.nn.layers.test_nnx import assert_close_and_nonzero, dots

ALL = Recipe([Rule(weight="int8")])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.Dense(8, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(8, name="down")(nn.relu(h)), None


class Model(nn.Module):
    """Tokens to logits, through blocks in a loop or in a scan."""

    lift: str = ""

    def setup(self):
        self.embed = nn.Embed(8, 8)
        self.lm_head = nn.Dense(8)
        block = {
            "": Block,
            "jit": nn.jit(Block),
            "remat": nn.remat(Block),
            "scan": nn.remat(Block),
        }[self.lift]
        if self.lift == "scan":
            self.blocks = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )()
        else:
            self.blocks = [block() for _ in range(2)]

    def encode(self, tokens):
        x = self.embed(tokens)
        if self.lift == "scan":
            return self.blocks(x, None)[0]
        for block in self.blocks:
            x, _ = block(x)
        return x

    def __call__(self, tokens):
        x = self.encode(tokens)
        return self.lm_head(x) + self.embed.attend(x)


class Hand(nn.Module):
    """Multiplies by hand, with a parameter of its own or with the weight of a layer."""

    fn: object
    raw: bool

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(8, use_bias=False, name="dense")
        y = dense(x)
        matrix = self.param("own", nn.initializers.lecun_normal(), (8, 8))
        return self.fn(y, matrix if self.raw else dense.variables["params"]["kernel"])


TOKENS = np.arange(10, dtype=np.int32).reshape(2, 5) % 8
X = normal(2, 8)


def init_variables(module, x=TOKENS):
    return built(module, x)


def assert_as_floats(qmodule, qvariables, module, *args):
    """The quantized module agrees with the float module on dequantized weights."""
    y = jax.jit(lambda variables: qmodule.apply(variables, *args))(qvariables)
    assert_close_and_nonzero(
        y,
        jax.jit(lambda variables: module.apply(in_floats(variables), *args))(
            qvariables
        ),
    )


def weights(variables):
    flat = flax.traverse_util.flatten_dict(
        flax.core.unfreeze(variables)["params"], sep="/"
    )
    return {path: v for path, v in flat.items() if isinstance(v, QTensor)}


# Layers that are found.


@pytest.mark.parametrize("lift", ["", "jit", "remat", "scan"])
def test_a_model_is_quantized_wherever_its_layers_are(lift):
    module = Model(lift)
    variables = init_variables(module)
    before = jax.tree.map(np.array, variables)
    qmodule, qvariables, report = quantize_model(module, variables, "int4")
    blocks = ["blocks"] if lift == "scan" else ["blocks_0", "blocks_1"]
    assert set(weights(qvariables)) == {
        f"{block}/{name}/kernel" for block in blocks for name in ("up", "down")
    }
    if lift == "scan":
        assert qvariables["params"]["blocks"]["up"]["kernel"].batch_shape == (2,)
    assert_as_floats(qmodule, qvariables, module, TOKENS)
    notes = {row.path: row.note for row in report.rows}
    assert notes["embed/embedding"] == "embedding, left in floats by default"
    assert notes["lm_head/kernel"] == "output head, left in floats by default"
    assert notes["lm_head/bias"] == "not a matrix, left in floats"
    assert len(report.rows) == len(jax.tree.leaves(variables))
    assert report.bytes_after == sum(
        leaf.nbytes for leaf in jax.tree.leaves(qvariables)
    )
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_embeddings_look_up_and_attend():
    module = Model()
    qmodule, qvariables, report = quantize_model(
        module, init_variables(module), Recipe([Rule("embed", weight="int4")])
    )
    assert [row.kind for row in report.quantized] == ["Embed"]
    assert_as_floats(qmodule, qvariables, module, TOKENS)


def test_rules_know_kinds_by_both_names():
    module, variables = Model(), init_variables(Model())
    for kind in ("Dense", "Linear"):
        recipe = Recipe([Rule(kinds=kind, weight="int8")])
        assert len(quantize_model(module, variables, recipe)[2].quantized) == 5
    from flax import nnx

    _, report = jaxq.quantize_model(
        nnx.Linear(8, 8, rngs=nnx.Rngs(0)), Recipe([Rule(kinds="Dense", weight="int8")])
    )
    assert len(report.quantized) == 1


def test_attention_convolution_and_statistics_of_batches():
    class Image(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Conv(8, (3, 3), name="conv")(x)
            x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
            x = nn.MultiHeadDotProductAttention(2, name="attn")(
                x.reshape(x.shape[0], -1, 8)
            )
            return nn.Dropout(0.5, deterministic=not train)(nn.Dense(3, name="out")(x))

    module, x = Image(), normal(2, 8, 8, 3)
    variables = jax.jit(module.init, static_argnums=2)(jax.random.key(0), x, False)
    qmodule, qvariables, report = quantize_model(
        module, variables, "int8"
    )  # an image and train=False are guessed
    expected_paths = {
        "conv",
        "attn/query",
        "attn/key",
        "attn/value",
        "attn/out",
    }  # "out" is a head
    assert {
        row.path.removesuffix("/kernel") for row in report.quantized
    } == expected_paths
    note = next(row.note for row in report.rows if row.path == "batch_stats/norm/mean")
    assert note == "not a parameter, passed through"
    assert_as_floats(qmodule, qvariables, module, x, False)
    rngs = {"dropout": jax.random.key(1)}
    train = {"train": True, "rngs": rngs, "mutable": ["batch_stats"]}
    y, updates = jax.jit(lambda variables: qmodule.apply(variables, x, **train))(
        qvariables
    )
    expected_output, _ = jax.jit(
        lambda variables: module.apply(in_floats(variables), x, **train)
    )(qvariables)
    assert_close_and_nonzero(y, expected_output)
    assert not np.allclose(
        updates["batch_stats"]["norm"]["mean"], variables["batch_stats"]["norm"]["mean"]
    )


def test_subclasses_that_call_their_parent_are_met_once():
    class Doubled(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            return super().__call__(2 * inputs)

    module = Doubled(4)
    qmodule, qvariables, _ = quantize_model(module, init_variables(module, X), "int8")
    assert_close_and_nonzero(
        qmodule.apply(qvariables, X), module.apply(in_floats(qvariables), X)
    )
    # The count is the number of rows.
    assert float(calibrate(module, init_variables(module, X), [X])[""].count) == 2
    assert float(calibrate(qmodule, qvariables, [X])[""].count) == 2


# How it is called.


class Two(nn.Module):
    """Takes what no one guesses."""

    @nn.compact
    def __call__(self, x, scale, *, power):
        return nn.Dense(8)(x * scale) ** power


def test_examples_say_how_a_module_is_called():
    module = Two()
    variables = {"params": {"Dense_0": init_variables(nn.Dense(8), X)["params"]}}
    for arguments in (
        {"example": {"x": X, "scale": X, "power": 2}},
        {
            "example": {
                "x": jax.ShapeDtypeStruct(X.shape, X.dtype),
                "scale": X,
                "power": 2,
            }
        },
        {"example": X, "forward": lambda m, v, x: m.apply(v, x, x, power=2)},
        {"calibration": [{"x": X, "scale": X, "power": jnp.ones(())}]},
    ):
        assert (
            len(quantize_model(module, variables, "int8", **arguments)[2].quantized)
            == 1
        )
    with pytest.raises(
        ValueError, match="not known how to call Two.*Pass calibration=, or example="
    ):
        quantize_model(module, variables, "int8")
    with pytest.raises(ValueError, match="^plan: it is not known how to call Two"):
        jaxq.nn.plan(module, "int8", variables)
    with pytest.raises(
        ValueError,
        match=r"Two cannot be called with the example float32\[2, 8\]: TypeError",
    ):
        quantize_model(module, variables, "int8", example=X)


def test_without_an_example_all_parameters_must_be_reached():
    class Half(nn.Module):
        def setup(self):
            self.used, self.other = nn.Dense(8), nn.Dense(8)

        def __call__(self, x):
            return self.used(x)

        def both(self, x):
            return self.other(self.used(x))

    module = Half()
    variables = module.init(jax.random.key(0), X, method="both")
    with pytest.raises(
        ValueError, match="None of them fits the module and reaches all parameters"
    ):
        quantize_model(module, variables, "int8")
    with pytest.raises(
        ValueError,
        match=r"does not reach other/kernel.*Pass an example= \(or forward=\)",
    ):
        quantize_model(module, variables, "int8", example=X)
    skip_recipe = Recipe([Rule("other", skip=True), *jaxq.recipes.get("int8").rules])
    unreached_note = "not reached by the call of the example, left in floats"
    for recipe, strict, note in (
        (skip_recipe, True, "skipped by the recipe"),
        ("int8", False, unreached_note),
    ):
        qmodule, qvariables, report = quantize_model(
            module, variables, recipe, example=X, strict=strict
        )
        assert set(weights(qvariables)) == {"used/kernel"}
        assert {row.path: row.note for row in report.rows}["other/kernel"] == note
    assert qmodule.apply(qvariables, X, method="both").shape == (2, 8)
    both = quantize_model(
        module, variables, "int8", example={"x": X, "method": "both"}
    )[1]
    assert set(weights(both)) == {"used/kernel", "other/kernel"}


# Weights that cannot be used as codes.

PATTERNS = {
    "matmul": lambda x, w: jnp.matmul(x, w),
    "split": lambda x, w: x @ jnp.split(w, 2, axis=1)[0],
    "jit": lambda x, w: jax.jit(lambda a, b: a @ b)(x, w),
    "astype": lambda x, w: x @ w.astype(jnp.bfloat16).astype(jnp.float32),
    "w * g": lambda x, w: x @ (w * 2.0),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_parameters_used_by_hand_are_an_error_or_a_row(pattern):
    module = Hand(PATTERNS[pattern], raw=True)
    variables = init_variables(module, X)
    with pytest.raises(
        ValueError,
        match=r"modules that jaxq does not know: own float32\[8, 8\] \(Hand\)",
    ):
        quantize_model(module, variables, "int8")
    with pytest.raises(
        ValueError,
        match=r"own \(Param\): Hand creates it with self.param, and flax checks",
    ):
        quantize_model(
            module,
            variables,
            Recipe([Rule("own", kinds="Param", weight="int8"), Rule(weight="int8")]),
        )
    with pytest.raises(
        ValueError,
        match=r"rules \['own'\] match no layer.*own float32\[8, 8\] \(Hand\)",
    ):
        quantize_model(module, variables, Recipe([Rule("own", weight="int8")]))
    skip_recipe = Recipe(
        [Rule("own", kinds="Param", skip=True, reason="small"), Rule(weight="int8")]
    )
    for recipe, strict, note in (
        (skip_recipe, True, "small"),
        ("int8", False, "used by Hand itself, which jaxq does not quantize"),
    ):
        qmodule, qvariables, report = quantize_model(
            module, variables, recipe, strict=strict
        )
        (row,) = [row for row in report.rows if row.path == "own"]
        assert row.format is None
        assert note in row.note
    assert_close_and_nonzero(
        qmodule.apply(qvariables, X), module.apply(in_floats(qvariables), X)
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_kernels_used_by_hand_are_refused(pattern):
    module = Hand(PATTERNS[pattern], raw=False)
    with pytest.raises(
        ValueError,
        match=r"dense \(Dense\): .* used in a way that a QTensor does not support",
    ):
        quantize_model(module, init_variables(module, X), "int8", strict=False)


def test_a_table_multiplied_by_hand_multiplies_codes():
    class Tied(nn.Module):
        def setup(self):
            self.embed = nn.Embed(8, 8)

        def __call__(self, tokens):
            return self.embed(tokens) @ self.embed.embedding.T

    module = Tied()
    qmodule, qvariables, _ = quantize_model(module, init_variables(module), ALL)
    assert_as_floats(qmodule, qvariables, module, TOKENS)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(8)(x), None


class Odd(nn.Module):
    """Layers that cannot be quantized, each for its own reason."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=8
        )
        x, _ = scan(name="same_size")(x, None)
        scan = nn.scan(
            Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=3
        )
        x, _ = scan(name="scanned")(x, None)
        x = nn.WeightNorm(nn.Dense(8, name="normed"))(x)
        transposed_dense = nn.map_variables(
            nn.Dense,
            "params",
            trans_in_fn=lambda p: jax.tree.map(jnp.transpose, p),
            mutable=True,
        )
        x = transposed_dense(8, use_bias=False, name="turned")(x)
        x = nn.Dense(
            8, name="own", dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k)
        )(x)
        x = nn.Einsum((8, 8), "bi,bj->bij", name="outer")(x)[:, 0]
        x = nn.Einsum((8, 8), "...i,...i->...", use_bias=False, name="dots")(
            jnp.zeros((8, 8)) + x[:1]
        )[None]
        x = nn.Conv(8, (1,), mask=jnp.ones((1, 8, 8)), name="masked")(x[:, None])
        x = nn.ConvLocal(8, (1,), name="local")(x)
        return nn.Dense(8, name="fine")(x)


def test_one_error_names_all_problems():
    module, x = Odd(), normal(8, 8)
    variables = init_variables(module, x)
    with pytest.raises(ValueError, match="cannot be quantized") as error:
        quantize_model(module, variables, ALL, example=x)
    lines = str(error.value).splitlines()
    reasons = {
        "same_size/Dense_0 (Dense)": "stacked along another axis than 0",
        "scanned/Dense_0 (Dense)": "[8, 3, 8], a stack along axis 1, not along axis 0",
        "normed (Dense)": "is changed before the layer multiplies by it",
        "turned (Dense)": "is changed before the layer multiplies by it",
        "own (Dense)": "its dot_general is a custom function",
        "outer (Einsum)": "contracts no axis of the kernel",
        "dots (Einsum)": "are not all named",
        "masked (Conv)": "its kernel is masked",
        "local (Conv)": "every spatial position has its own kernel",
    }
    for layer, reason in reasons.items():
        assert [
            line for line in lines if line.startswith(f"  {layer}") and reason in line
        ], (layer, lines)
    assert len(lines) == len(reasons) + 2
    assert "jaxq.Rule(path, skip=True)" in lines[-1]
    skip_rules = [Rule(layer.split(" ")[0], skip=True) for layer in reasons]
    qmodule, qvariables, report = quantize_model(
        module, variables, Recipe([*skip_rules, Rule(weight="int8")]), example=x
    )
    assert [row.path for row in report.quantized] == ["fine/kernel"]
    assert_as_floats(qmodule, qvariables, module, x)


class ProblemsOfAllSorts(nn.Module):
    @nn.compact
    def __call__(self, x):
        own = self.param("own", nn.initializers.ones, (8, 8))
        return nn.Dense(8, name="up")(x @ own)


def test_one_error_names_problems_of_all_sorts():
    module, x = ProblemsOfAllSorts(), normal(8, 8)
    variables = init_variables(module, x)
    spec = jaxq.QuantSpec("int8", jaxq.PerGroup(3))
    recipe = Recipe([Rule("up", weight=spec), Rule("typo", weight="int8")])
    with pytest.raises(ValueError) as error:
        quantize_model(module, variables, recipe)
    text = str(error.value)
    messages = (
        "these layers cannot be quantized:\n  up (Dense): ",
        "rules ['typo'] match no layer ",
        "modules that jaxq does not know: own float32[8, 8] (ProblemsOfAllSorts). ",
    )
    for message in messages:
        assert message in text, text
    assert text.count("linen.quantize_model: ") == len(messages)
    with pytest.raises(ValueError) as error:
        jaxq.nn.plan(module, recipe, variables)
    assert str(error.value) == text.replace("linen.quantize_model: ", "plan: ")


def test_wrong_arguments_are_refused():
    module, variables = nn.Dense(4), init_variables(nn.Dense(4), X)
    with pytest.raises(
        TypeError,
        match=r"^linen.quantize_model: module must be a flax linen Module, got dict",
    ):
        quantize_model(variables, module, "int8")
    with pytest.raises(TypeError, match="must be a dict with 'params'"):
        quantize_model(module, variables["params"], "int8")
    with pytest.raises(TypeError, match="^plan: variables must be a dict with"):
        jaxq.nn.plan(module, "int8", variables["params"])
    with pytest.raises(
        ValueError,
        match=r"rules \['typo'\] match no layer.*here: the model itself \(Dense\)",
    ):
        quantize_model(module, variables, Recipe([Rule("typo", weight="int8")]))
    kernel = np.array(variables["params"]["kernel"])
    kernel[0, 1] = np.nan
    nan_variables = {"params": {**variables["params"], "kernel": jnp.asarray(kernel)}}
    with pytest.raises(ValueError, match=r"kernel\[0, 1\] is nan"):
        quantize_model(module, nan_variables, "int8")
    qmodule, qvariables, _ = quantize_model(module, variables, "int8")
    with pytest.raises(TypeError, match="quantized already"):
        quantize_model(qmodule, qvariables, "int8")
    with pytest.raises(
        ValueError, match=r"the model itself \(Dense\): it is quantized already"
    ):
        quantize_model(module, qvariables, "int8", example=X)


# Modules are used as before.


@pytest.mark.parametrize("outer", [jax.jit, lambda fn: fn], ids=["jax.jit", "plain"])
def test_caches_see_what_changes(outer):
    """Two quantizations of equal shapes through one jit compile two programs."""

    class Jitted(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.jit(nn.Dense)(8)(x)

    module = Jitted()
    variables, x = (
        init_variables(module, X),
        X * jnp.asarray([1, 30] * 4, jnp.float32)[None],
    )
    qmodule, int8_variables, _ = quantize_model(module, variables, "int8")
    other_module, w8a8_variables, _ = quantize_model(module, variables, "w8a8")
    assert qmodule == other_module
    assert [leaf.shape for leaf in jax.tree.leaves(int8_variables)] == [
        leaf.shape for leaf in jax.tree.leaves(w8a8_variables)
    ]
    run = outer(qmodule.apply)
    y, w8a8_output, float_output = (
        run(int8_variables, x),
        run(w8a8_variables, x),
        module.apply(variables, x),
    )
    assert np.abs(y - w8a8_output).max() > 1e-4
    np.testing.assert_array_equal(run(int8_variables, x), y)
    np.testing.assert_array_equal(module.apply(variables, x), float_output)
    assert "int8" not in str(dots(qmodule.apply, int8_variables, x)[0][:1])
    assert dots(qmodule.apply, w8a8_variables, x) == [
        ("int8", "int8", "int32", "int32")
    ]


def test_methods_attributes_and_submodules_are_reached():
    module = Model()
    qmodule, qvariables, _ = quantize_model(module, init_variables(module), ALL)
    expected = qmodule.apply(qvariables, TOKENS, method="encode")
    assert_close_and_nonzero(
        expected, module.apply(in_floats(qvariables), TOKENS, method="encode")
    )
    for method in (
        Model.encode,
        module.encode,
        qmodule.encode,
        lambda m, tokens: m.encode(tokens),
    ):
        np.testing.assert_array_equal(
            qmodule.apply(qvariables, TOKENS, method=method), expected
        )
    assert qmodule.lift == ""
    bound_module = qmodule.bind(qvariables)
    np.testing.assert_array_equal(bound_module.encode(TOKENS), expected)
    block = bound_module.blocks[0]
    assert block(bound_module.embed(TOKENS))[0].shape == expected.shape
    np.testing.assert_array_equal(
        nn.apply(lambda m, t: m.encode(t), qmodule)(qvariables, TOKENS), expected
    )
    with pytest.raises(AttributeError, match="typo"):
        _ = qmodule.typo
    _, state = qmodule.apply(qvariables, TOKENS, capture_intermediates=True)
    assert "up" in state["intermediates"]["blocks_0"]


def test_a_quantized_module_is_part_of_others():
    module = Model()
    qmodule, qvariables, _ = quantize_model(module, init_variables(module), ALL)

    class Outer(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, tokens):
            return nn.Dense(3)(self.inner(tokens)) + self.inner.encode(tokens).mean()

    outer = Outer(qmodule)
    variables = init_variables(outer)
    assert set(variables["params"]) == {"inner", "Dense_0"}
    mixed_variables = {"params": {**variables["params"], "inner": qvariables["params"]}}
    assert_as_floats(outer, mixed_variables, Outer(module), TOKENS)
    with pytest.raises(
        ValueError, match=r"blocks_0/up/kernel.*are floats where QTensors are expected"
    ):
        outer.apply(variables, TOKENS)


def test_floats_and_the_float_module_are_refused():
    module = nn.Dense(8)  # square, so that codes have the kernel's shape
    variables = module.init(jax.random.key(0), X)
    qmodule, qvariables, _ = quantize_model(module, variables, "int8")
    with pytest.raises(
        ValueError, match=r"\['kernel'\] are floats where QTensors are expected"
    ):
        qmodule.apply(variables, X)
    with pytest.raises(TypeError, match="QTensor"):
        module.apply(qvariables, X)
    new_variables = qmodule.init(jax.random.key(0), X)
    jax.tree.map(np.testing.assert_array_equal, new_variables, variables)
    odd_module = nn.Dense(8, dot_general=lambda *a, **k: None)
    with pytest.raises(
        ValueError,
        match="Dense: its weight is quantized, but its dot_general is a custom",
    ):
        Quantized(odd_module).apply(qvariables, X)


def test_pickling_frozen_variables_and_saving(tmp_path):
    module = Model("scan")
    qmodule, qvariables, _ = quantize_model(
        module, flax.core.freeze(init_variables(module)), "int4"
    )
    assert isinstance(qvariables, flax.core.FrozenDict)
    unpickled_module = pickle.loads(pickle.dumps(qmodule))
    assert unpickled_module == qmodule
    assert hash(unpickled_module) == hash(qmodule)
    jaxq.save(tmp_path / "q.safetensors", flax.core.unfreeze(qvariables))
    loaded_variables = jaxq.load(tmp_path / "q.safetensors")
    np.testing.assert_array_equal(
        unpickled_module.apply(loaded_variables, TOKENS),
        qmodule.apply(qvariables, TOKENS),
    )


@pytest.mark.parametrize("preset", ["int4", "mxfp4", "nf4_dq"])
def test_flax_serialization_knows_qtensors(preset):
    module = nn.Dense(8)
    variables = init_variables(module, normal(2, 64))
    _, qvariables, _ = quantize_model(module, variables, preset)
    data = flax.serialization.to_bytes(qvariables)
    zero_variables = jax.tree.map(jnp.zeros_like, qvariables)
    restored_variables = flax.serialization.from_bytes(zero_variables, data)
    assert jax.tree.structure(restored_variables) == jax.tree.structure(qvariables)
    jax.tree.map(np.testing.assert_array_equal, restored_variables, qvariables)
    af4_variables = quantize_model(module, variables, "af4")[1]
    with pytest.raises(ValueError, match="quantized in another way than QTensor"):
        flax.serialization.from_bytes(af4_variables, data)
    with pytest.raises(ValueError, match="the saved value is not a QTensor"):
        flax.serialization.from_bytes(
            zero_variables, flax.serialization.to_bytes(variables)
        )


class Awkward(nn.Module):
    """Its submodule, fields and methods have names that a wrapper might use."""

    weights: int = 3

    def setup(self):
        self.module = nn.Dense(8)

    def enter(self, x):
        return self.module(x) * self.weights

    def __call__(self, x):
        return self.enter(x)


def test_no_name_collides_with_the_wrappers():
    module = Awkward()
    variables = init_variables(module, X)
    qmodule, qvariables, report = quantize_model(module, variables, "int8", donate=True)
    assert [row.path for row in report.quantized] == ["module/kernel"]
    assert variables["params"]["module"]["kernel"].is_deleted()
    assert not variables["params"]["module"]["bias"].is_deleted()
    assert qmodule.weights == 3
    np.testing.assert_array_equal(
        qmodule.apply(qvariables, X), qmodule.apply(qvariables, X, method="enter")
    )
    assert qmodule.bind(qvariables).module(X).shape == X.shape


def test_captured_intermediates_are_those_of_the_module():
    module = Block()
    variables = init_variables(module, X)
    qmodule, qvariables, _ = quantize_model(module, variables, "int8")
    for capture in (True, lambda module, name: isinstance(module, nn.Dense)):
        arguments = {"capture_intermediates": capture}
        _, intermediates = module.apply(variables, X, **arguments)
        _, qintermediates = qmodule.apply(qvariables, X, **arguments)
        assert jax.tree.structure(intermediates) == jax.tree.structure(qintermediates)


def test_nothing_of_flax_is_replaced():
    classes = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.Einsum, nn.Embed)
    attributes = []
    for name in ("__call__", "param", "setup"):
        attributes += [(cls, name) for cls in classes if hasattr(cls, name)]
    attributes += [
        (jax.lax, "dot_general"),
        (jnp, "einsum"),
        (jnp, "take"),
        (nn.Embed, "attend"),
    ]
    before = [
        (getattr(owner, name), getattr(getattr(owner, name), "__code__", None))
        for owner, name in attributes
    ]
    module = Model()
    qmodule, qvariables, _ = quantize_model(module, init_variables(module), ALL)
    qmodule.apply(qvariables, TOKENS)
    for (owner, name), (fn, code) in zip(attributes, before, strict=True):
        assert getattr(owner, name) is fn
        assert getattr(fn, "__code__", None) is code


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_boxes_of_metadata_are_kept(box):
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            def body(layer, x, _):
                return layer(x), None

            axes = {nn.meta.PARTITION_NAME: "layers"}
            run = nn.scan(
                body,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
                metadata_params=axes,
            )
            kernel, bias = (
                box(nn.initializers.lecun_normal(), (None, "model")),
                box(nn.initializers.ones, ("model",)),
            )
            return run(
                nn.Dense(8, kernel_init=kernel, bias_init=bias, name="dense"), x, None
            )[0]

    module = Stack()
    variables = init_variables(module, X)
    assert isinstance(variables["params"]["dense"]["kernel"], nn.meta.AxisMetadata)
    qmodule, qvariables, report = quantize_model(module, variables, "int8")
    kernel = qvariables["params"]["dense"]["kernel"]
    assert type(kernel) is QuantizedBox
    assert isinstance(kernel.value, QTensor)
    assert kernel.box.names == ("layers", None, "model")
    assert isinstance(qvariables["params"]["dense"]["bias"], nn.meta.AxisMetadata)
    assert len(report.quantized) == 1
    assert_close_and_nonzero(
        qmodule.apply(qvariables, X), module.apply(in_floats(nn.unbox(qvariables)), X)
    )


def test_models_that_hold_quantized_layers():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, name="plain")(QDense(8, weight="nf4", name="ready")(x))

    module = Mixed()
    qmodule, qvariables, report = quantize_model(
        module, module.init(jax.random.key(0), X), "int8"
    )
    assert {row.path: row.note for row in report.rows}[
        "ready/kernel"
    ] == "quantized already, left as it is"
    assert qmodule.apply(qvariables, X).shape == (2, 8)


def test_plans_have_the_bytes_of_the_real_thing():
    module = Model("scan")
    variables = init_variables(module)
    recipe = Recipe([Rule("blocks/**", weight="int4"), Rule(skip=True)])
    plan = jaxq.nn.plan(module, recipe, variables, example=TOKENS)
    report = quantize_model(module, variables, recipe)[2]
    assert [(r.path, r.format, r.bytes_after, r.note) for r in plan.rows] == [
        (r.path, r.format, r.bytes_after, r.note) for r in report.rows
    ]
    abstract_variables = jax.eval_shape(module.init, jax.random.key(0), TOKENS)
    assert (
        jaxq.nn.plan(module, "int4", abstract_variables).bytes_before
        == plan.bytes_before
    )
    with pytest.raises(TypeError, match="variables must be a dict with 'params'"):
        jaxq.nn.plan(module, "int8")


def test_unused_rules_can_be_left_to_the_report():
    module = nn.Dense(4)
    recipe = Recipe([Rule("typo", weight="int4"), Rule(weight="int8")])
    _, _, report = quantize_model(
        module, init_variables(module, X), recipe, strict=False
    )
    assert report.notes == ("rule 'typo' matched nothing",)


# Methods that need data.


class Pair(nn.Module):
    """Two layers whose weights have the same shape as matrices."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="first")(x)
        return nn.DenseGeneral((2, 8), name="second")(
            jnp.concatenate([jnp.tanh(x), jnp.cos(x)], axis=-1)
        )


BATCHES = [normal(64, 32, seed=seed) for seed in range(2)]


def by(method, **fields):
    return Recipe(
        [
            Rule(
                weight="int3",
                method=method,
                options=fields.pop("options", {}),
                **fields,
            )
        ]
    )


def test_a_result_is_what_the_matrix_method_gives():
    module, variables = Pair(), init_variables(Pair(), BATCHES[0])
    stats = calibrate(module, variables, BATCHES)
    for calibration in (BATCHES, stats):
        qvariables, report = quantize_model(
            module,
            variables,
            by("gptq"),
            calibration=calibration,
            example=BATCHES[0],
            fallback="none",
        )[1:]
        assert {row.method for row in report.quantized} == {"gptq"}
        assert all(row.loss is not None for row in report.quantized)
        for name in ("first", "second"):
            kernel = variables["params"][name]["kernel"]
            qt, _ = methods.gptq(
                kernel.reshape(kernel.shape[0], -1), stats[name].hessian, "int3"
            )
            qkernel = qvariables["params"][name]["kernel"]
            assert qkernel.shape == kernel.shape
            assert_same(qkernel.codes().reshape(qt.shape), qt.codes())


def test_experts_have_statistics_of_their_own():
    module = nn.Einsum((2, 32, 16), "ebk,ekn->ebn")
    x = normal(2, 64, 32)
    variables = init_variables(module, x)
    stats = calibrate(module, variables, [x])
    assert stats[""].hessian.shape == (2, 32, 32)
    _, qvariables, _ = quantize_model(
        module, variables, by("gptq"), calibration=[x], fallback="none"
    )
    for i in range(2):
        qt, _ = methods.gptq(
            variables["params"]["kernel"][i], stats[""].hessian[i], "int3"
        )
        np.testing.assert_array_equal(
            qvariables["params"]["kernel"][i].codes(), qt.codes()
        )


def test_a_stack_on_one_input_shares_its_statistics():
    stacked_dense = nn.vmap(
        nn.Dense,
        in_axes=None,
        out_axes=0,
        axis_size=2,
        variable_axes={"params": 0},
        split_rngs={"params": True},
    )
    module, x = stacked_dense(16), BATCHES[0]
    variables = init_variables(module, x)
    _, qvariables, _ = quantize_model(
        module, variables, by("gptq"), calibration=[x], fallback="none"
    )
    stats = calibrate(nn.Dense(16), init_variables(nn.Dense(16), x), [x])[""]
    for i in range(2):
        qt, _ = methods.gptq(variables["params"]["kernel"][i], stats.hessian, "int3")
        np.testing.assert_array_equal(
            qvariables["params"]["kernel"][i].codes(), qt.codes()
        )


def test_impossible_requests_are_refused_before_anything_runs():
    module, variables = Pair(), init_variables(Pair(), BATCHES[0])
    conv, x = nn.ConvTranspose(4, (3,)), normal(2, 8, 4)
    with pytest.raises(
        ValueError,
        match=r"(?s)first.*method 'gptq' needs data.*second.*method 'gptq' needs data",
    ):
        quantize_model(module, variables, by("gptq"))
    with pytest.raises(ValueError, match="linen modules do not say which layer"):
        quantize_model(module, variables, by("equalize"), calibration=BATCHES)
    with pytest.raises(
        ValueError,
        match=r"gptq.*does not collect the windows of ConvTranspose",
    ):
        quantize_model(conv, init_variables(conv, x), by("gptq"), calibration=[x])
    with pytest.raises(ValueError, match="no statistics of"):
        quantize_model(module, variables, by("gptq"), calibration={})
    scan_module, rule = Model("scan"), Rule("blocks/*", weight="int4", method="gptq")
    with pytest.raises(ValueError, match=r"blocks/\w+ is inside nn\.scan"):
        quantize_model(
            scan_module,
            init_variables(scan_module),
            Recipe([rule]),
            calibration=[TOKENS],
        )
    report = quantize_model(module, variables, by("hqq"))[2]
    assert {row.method for row in report.quantized} == {"hqq"}


class TiedHead(nn.Module):
    """A model that calls its output head with variables of its own making."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(16, 32, name="embed")
        h = nn.Dense(32, name="up")(embed(tokens))
        head = nn.Dense(16, use_bias=False, parent=None)
        table = embed.variables["params"]["embedding"]
        return head.apply({"params": {"kernel": table.T}}, h)


def test_a_head_that_is_applied_to_another_weight_is_no_layer_of_the_model():
    module, tokens = TiedHead(), jnp.arange(4)[None]
    variables = module.init(jax.random.key(0), tokens)
    qmodule, qvariables, report = quantize_model(
        module, variables, "int8", example=tokens
    )
    paths = [row.path for row in report.rows if row.method]
    assert paths == ["up/kernel"]
    assert qmodule.apply(qvariables, tokens).shape == (1, 4, 16)
    # The table is used as an array, and the error's advice works.
    with pytest.raises(ValueError, match=r"embed \(Embed\): .*Embed.attend") as error:
        quantize_model(module, variables, ALL, example=tokens)
    assert "the model itself" not in str(error.value)
    recipe = Recipe([Rule("embed", skip=True), *ALL.rules])
    report = quantize_model(module, variables, recipe, example=tokens)[2]
    assert [row.path for row in report.rows if row.method] == paths


class Bridged(nn.Module):
    """A linen layer, and an nnx layer in an `nnx.bridge.ToLinen`."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32, name="up")(x)
        return nnx.bridge.to_linen(nnx.Linear, 32, 32, name="inner")(x)


def test_the_advice_about_a_matrix_inside_to_linen_works():
    module, x = Bridged(), normal(4, 32)
    variables = module.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"inner/kernel .*write them in linen") as e:
        quantize_model(module, variables, "int8", example=x)
    assert "kernel of a Dense" not in str(e.value)
    rule = Rule("inner/kernel", weight="int8", kinds="Param")
    with pytest.raises(ValueError, match=r"Rule\(path, skip=True, kinds=\('Param',\)"):
        quantize_model(module, variables, Recipe([rule, *ALL.rules]), example=x)
    skip = Rule("inner/**", skip=True, kinds="Param")
    recipe = Recipe([skip, *jaxq.recipes.get("int8").rules])
    qmodule, qvariables, _ = quantize_model(module, variables, recipe, example=x)
    assert qmodule.apply(qvariables, x).shape == (4, 32)
