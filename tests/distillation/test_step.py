"""make_step against an optax loop written by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.core import freeze, unfreeze

import jaxq
from jaxq.distillation import (
    LogitsCache,
    feature_loss,
    generate,
    kd_loss,
    make_step,
    projection,
    response_loss,
)
from tests.arrays import assert_close, assert_same, normal
from tests.distillation.models import VOCAB, MeanModel, mean_logits, params

pytestmark = pytest.mark.usefixtures("standard_promotion")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (4, 6)), jnp.int32)
LABELS = jnp.roll(TOKENS, -1, axis=1)
SHARP = functools.partial(kd_loss, temperature=4.0, alpha=0.8)


def by_hand(apply, params, teacher_logits, tx, batches):
    """Ordinary training with optax."""
    opt_state = tx.init(params)
    losses = []
    for tokens, labels in batches:
        loss, grads = jax.value_and_grad(
            lambda p, x, y: SHARP(apply(p, x), teacher_logits(x), y)
        )(params, tokens, labels)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        losses.append(loss)
    return params, jnp.stack(losses)


def run(step, state, batches):
    losses = []
    for batch in batches:
        state, loss = step(state, batch)
        losses.append(loss)
    return state, jnp.stack(losses)


BATCHES = [(TOKENS, LABELS), (TOKENS + 1, LABELS), (TOKENS % 3, LABELS)]


def test_pairs_train_as_by_hand():
    student, teacher, tx = params(2), params(0), optax.adamw(1e-2)
    step = make_step((mean_logits, student), (mean_logits, teacher), tx, SHARP)
    state, losses = run(step, step.init(), BATCHES)
    expected = by_hand(
        mean_logits, student, lambda x: mean_logits(teacher, x), tx, BATCHES
    )
    assert_close((step.student(state), losses), expected, 1e-5)
    # What was passed is unchanged.
    assert_same(student, params(2))
    assert_same(teacher, params(0))


def test_modules_train_as_by_hand():
    student, teacher, tx = MeanModel(1), MeanModel(0), optax.adam(1e-2)
    graphdef, before = nnx.split(student)
    step = make_step(student, teacher, tx, SHARP)
    state, losses = run(step, step.init(), BATCHES)

    def apply(params, tokens):
        return nnx.merge(graphdef, params)(tokens)

    expected, expected_losses = by_hand(apply, before, teacher, tx, BATCHES)
    assert_close(losses, expected_losses, 1e-4)
    trained = step.student(state)
    assert_close(trained(TOKENS), apply(expected, TOKENS), 1e-3)
    assert_same(nnx.state(student), nnx.state(MeanModel(1)))
    assert_same(nnx.state(teacher), nnx.state(MeanModel(0)))
    # Later steps do not touch the student that was read.
    logits = trained(TOKENS)
    run(step, state, BATCHES)
    assert_same(trained(TOKENS), logits)


def test_one_trace_and_no_gradient_of_the_teacher():
    traces = []

    def apply(params, tokens):
        traces.append(1)
        return mean_logits(params, tokens)

    def gradient_of_teacher(shared):
        # The loss itself stops gradients, and make_step does for any loss.
        logits = mean_logits(shared, TOKENS)
        return kd_loss(mean_logits(params(2), TOKENS), logits, LABELS)

    zeros = jax.grad(gradient_of_teacher)(params(0))
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(zeros))

    def squared(student, teacher, *rest):
        return jnp.mean((student - teacher) ** 2)

    # Student and teacher are one object: a gradient through the teacher would differ.
    own = params(2)
    step = make_step((apply, own), (mean_logits, params(0)), optax.sgd(1.0), squared)
    state, _ = run(step, step.init(), BATCHES)
    assert len(traces) == 1
    same = make_step((mean_logits, own), (mean_logits, own), optax.sgd(1.0), squared)
    state, losses = run(same, same.init(), BATCHES[:1])
    assert float(losses[0]) == 0
    assert_same(same.student(state), own)


def test_a_stopped_run_continues_to_the_same_bits(tmp_path):
    student, teacher = MeanModel(1), MeanModel(0)
    step = make_step(student, teacher, optax.adam(1e-2), SHARP)
    whole, losses = run(step, step.init(), BATCHES)

    state, _ = run(step, step.init(), BATCHES[:1])
    jaxq.save(tmp_path / "state.safetensors", jax.tree.leaves(state))

    step = make_step(MeanModel(1), MeanModel(0), optax.adam(1e-2), SHARP)
    leaves = jaxq.load(tmp_path / "state.safetensors")
    state = jax.tree.unflatten(jax.tree.structure(step.init()), leaves)
    continued, last_losses = run(step, state, BATCHES[1:])
    assert_same(jax.tree.leaves(continued), jax.tree.leaves(whole))
    assert_same(last_losses, losses[1:])


class Classifier(nnx.Module):
    """Batch norm and dropout in front of a linear head."""

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(self.norm(x)))


def test_running_averages_and_random_keys():
    student, teacher = Classifier(1), Classifier(0)
    student.train()
    teacher.train()
    x = 2 + normal(32, 8)
    step = make_step(student, teacher, optax.sgd(1e-2), kd_loss)
    state, losses = run(step, step.init(), [x] * 3)
    trained = step.student(state)
    # Batch norm keeps 0.99 of its average, which began at 0.
    expected = (1 - 0.99**3) * np.asarray(x).mean(0)
    assert_close(trained.norm.mean[...], expected, 1e-4)
    assert int(trained.dropout.rngs.count[...]) == 3
    # The teacher reads its running averages and drops nothing.
    teacher.eval()
    expected = kd_loss(student(x), teacher(x))
    assert float(losses[0]) == pytest.approx(float(expected), rel=1e-5)
    assert not np.any(np.asarray(teacher.norm.mean[...]))


class LinenClassifier(linen.Module):
    """Batch norm in front of a linear head."""

    @linen.compact
    def __call__(self, x, train=True):
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return linen.Dense(5)(x)


@pytest.mark.parametrize("box", [dict, freeze])
def test_only_the_params_of_linen_variables_are_trained(box):
    module, x = LinenClassifier(), 2 + normal(32, 8)
    variables = box(module.init(jax.random.key(0), x))
    evaluate = functools.partial(module.apply, train=False)
    teacher = (evaluate, module.init(jax.random.key(1), x))
    traces = []

    def loss(student, teacher):
        traces.append(1)
        return kd_loss(student, teacher)

    # Adam with momentum would move running averages even where their gradient is 0.
    tx = optax.adam(1e-2)
    step = make_step((module.apply, variables), teacher, tx, loss)
    state, _ = run(step, step.init(), [x] * 3)
    assert len(traces) == 1
    trained = step.student(state)
    assert type(trained) is type(variables)
    assert jax.tree.structure(trained) == jax.tree.structure(variables)

    params, stats = variables["params"], variables["batch_stats"]
    opt_state = tx.init(params)
    for _ in range(3):

        def objective(params, stats=stats):
            outputs, changed = module.apply(
                {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
            )
            return kd_loss(outputs, teacher[0](teacher[1], x)), changed["batch_stats"]

        grads, stats = jax.grad(objective, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert_close(unfreeze(trained)["batch_stats"], unfreeze(stats), 1e-5)
    assert_close(unfreeze(trained)["params"], unfreeze(params), 1e-5)
    # Batch norm keeps 0.9 of its average, which began at 0.
    mean = trained["batch_stats"]["BatchNorm_0"]["mean"]
    assert_close(mean, (1 - 0.9**3) * np.asarray(x).mean(0), 1e-4)
    # The teacher reads its own averages.
    assert not np.any(teacher[1]["batch_stats"]["BatchNorm_0"]["mean"])


def test_moving_ranges_of_a_prepared_linen_student():
    module, x = linen.Dense(8), normal(4, 64)
    floats = module.init(jax.random.key(0), x)
    recipe = jaxq.Recipe([jaxq.Rule("**", weight="int8", activation="int8")])
    ranges = jaxq.training.ema(0.5)
    prepared, variables = jaxq.training.linen.prepare(
        module, floats, recipe, ranges=ranges
    )
    assert sorted(variables) == ["params", "quant_stats"]
    step = make_step(
        (prepared.apply, variables),
        (module.apply, floats),
        optax.adam(1e-3),
        feature_loss,
    )
    batches = [x, 3 * x, 2 * x]
    state, losses = run(step, step.init(), batches)
    trained = step.student(state)
    # The first batch sets the range. Later ones move it by one half.
    low, high = float(x.min()), float(x.max())
    factor = (1 * 0.5 + 3 * 0.5) * 0.5 + 2 * 0.5
    (input_range,) = jax.tree.leaves(trained["quant_stats"])
    assert_close(input_range, factor * np.array([low, high]), 1e-5)
    assert np.isfinite(np.asarray(losses)).all()

    qmodule, qvariables, _ = jaxq.training.linen.convert(prepared, trained)
    assert_close(qmodule.apply(qvariables, x), prepared.apply(trained, x), 1e-5)
    # A step without `mutable` has no way to return the ranges.
    with pytest.raises(TypeError, match="have quant_stats beside 'params'"):
        make_step(
            (lambda variables, x: prepared.apply(variables, x), variables),
            None,
            optax.adam(1e-3),
            feature_loss,
        )


def test_functions_of_linen_variables():
    module, x = LinenClassifier(), 2 + normal(32, 8)
    variables = module.init(jax.random.key(0), x)
    sgd = optax.sgd(0.1)

    def apply(variables, inputs, mutable):
        return module.apply(variables, inputs["x"], train=True, mutable=mutable)

    step = make_step((apply, variables), None, sgd, lambda y: jnp.mean(y**2))
    state, _ = step(step.init(), {"x": x})
    assert np.any(step.student(state)["batch_stats"]["BatchNorm_0"]["mean"])
    # In eval mode, the averages stay.
    frozen = (functools.partial(module.apply, train=False), variables)
    step = make_step(frozen, None, sgd, lambda y: jnp.mean(y**2))
    state, _ = step(step.init(), x)
    assert_same(step.student(state)["batch_stats"], variables["batch_stats"])

    for result in (jnp.ones(3), (jnp.ones(3), jnp.ones(3))):
        step = make_step(
            (lambda variables, x, mutable, r=result: r, variables), None, sgd, jnp.sum
        )
        with pytest.raises(TypeError, match=r"must return \(outputs, changed"):
            step(step.init(), x)
    with pytest.raises(TypeError, match="rename 'params'"):
        make_step((mean_logits, {"params": params(), "w": x}), None, sgd, kd_loss)
    with pytest.raises(ValueError, match="nothing to train"):
        make_step(
            (module.apply, variables | {"params": {"n": jnp.arange(3)}}),
            None,
            sgd,
            kd_loss,
        )
    with pytest.raises(TypeError, match="pair student is a linen module"):
        make_step((module, variables), None, sgd, kd_loss)


def test_codes_of_a_quantized_student_stay():
    weights = params(2)
    weights["head"] = jaxq.quantize(weights["head"], "int8")
    step = make_step((mean_logits, weights), MeanModel(), optax.adam(1e-3), kd_loss)
    state, losses = run(step, step.init(), [TOKENS] * 10)
    trained = step.student(state)
    assert float(losses[-1]) < float(losses[0])
    assert_same(trained["head"].data, weights["head"].data)
    assert not np.allclose(trained["head"].scale, weights["head"].scale)


def test_an_optimizer_whose_state_holds_the_parameters():
    def update(grads, first_params, params):
        return jax.tree.map(lambda grad: -0.1 * grad, grads), first_params

    tx = optax.GradientTransformation(lambda params: params, update)
    student = (mean_logits, params(2))
    step = make_step(student, (mean_logits, params(0)), tx, kd_loss)
    state, losses = run(step, step.init(), [TOKENS] * 3)
    assert float(losses[-1]) < float(losses[0])
    assert_same(state.opt_state, params(2))


def test_cached_teacher(tmp_path):
    teacher = params(0)
    cache = LogitsCache.write(
        tmp_path / "cache", (mean_logits, teacher), BATCHES, k=VOCAB, temperature=4.0
    )
    tx = optax.sgd(0.1)
    student = (mean_logits, params(2))
    step = make_step(student, None, tx, SHARP)
    state, losses = run(step, step.init(), cache.batches(BATCHES))
    online = make_step(student, (mean_logits, teacher), tx, SHARP)
    expected_state, expected = run(online, online.init(), BATCHES)
    assert_close(losses, expected)
    assert_close(state.params, expected_state.params)


def test_sequence_level_distillation():
    teacher, tx = MeanModel(0), optax.adam(3e-2)
    tokens, mask = generate(
        teacher, TOKENS[:, :2], 6, key=jax.random.key(0), temperature=1.0
    )
    step = make_step(MeanModel(1), None, tx, response_loss)
    _, losses = run(step, step.init(), [(tokens, tokens, mask)] * 30)
    assert float(losses[-1]) < 0.3 * float(losses[0])
    expected = response_loss(MeanModel(1)(tokens), tokens, mask)
    assert float(losses[0]) == pytest.approx(float(expected), rel=1e-5)


def test_on_policy_distillation():
    def reverse_kl(student, teacher, mask):
        return kd_loss(
            student[:, :-1],
            teacher[:, :-1],
            temperature=1.0,
            alpha=1.0,
            mask=mask[:, 1:],
            divergence="reverse",
        )

    student, teacher = (mean_logits, params(2)), (mean_logits, params(0))
    step = make_step(student, teacher, optax.adam(3e-2), reverse_kl)
    state = step.init()
    losses = []
    for i in range(40):
        own = (mean_logits, step.student(state))
        tokens, mask = generate(
            own, TOKENS[:, :2], 6, key=jax.random.key(i), temperature=1.0
        )
        state, loss = step(state, (tokens, mask))
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_features_through_a_trained_projection():
    x = normal(32, 8)
    teacher = {"w": normal(8, 6, seed=1), "head": normal(6, 1, seed=2)}

    def apply(params, x):
        hidden = jnp.tanh(x @ params["w"])
        return {"hidden": hidden, "score": hidden @ params["head"]}

    def apply_student(params, x):
        return apply(params["net"], x) | {"projection": params["projection"]}

    def loss(student, teacher):
        regression = feature_loss(student["score"], teacher["score"])
        hidden, matrix = student["hidden"], student["projection"]
        return regression + feature_loss(hidden, teacher["hidden"], matrix)

    student = {
        "net": {"w": normal(8, 4, seed=3), "head": normal(4, 1, seed=4)},
        "projection": projection(jax.random.key(0), 4, 6),
    }
    step = make_step((apply_student, student), (apply, teacher), optax.adam(0.02), loss)
    state, losses = run(step, step.init(), [x] * 100)
    assert float(losses[-1]) < 0.3 * float(losses[0])
    assert not np.allclose(state.params["projection"], student["projection"])


@pytest.mark.parametrize(
    "student", [MeanModel(1), (mean_logits, params(2))], ids=["module", "pair"]
)
def test_a_state_that_was_used_before(student):
    step = make_step(student, MeanModel(0), optax.adam(1e-2), SHARP)
    old = step.init()
    state, _ = step(old, BATCHES[0])
    for use in (lambda: step(old, BATCHES[0]), lambda: step.student(old)):
        with pytest.raises(ValueError, match="make_step: this state was used"):
            use()
    # Inside jit, nothing is donated.
    _, loss = jax.jit(step)(state, BATCHES[1])
    expected = step(state, BATCHES[1])[1]
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_an_empty_batch():
    step = make_step((mean_logits, params()), None, optax.sgd(0.1), kd_loss)
    for batch in ((), []):
        with pytest.raises(ValueError, match="make_step: a batch is an empty"):
            step(step.init(), batch)


def test_with_x64():
    step = make_step(MeanModel(1), MeanModel(0), optax.adamw(1e-2), SHARP)
    _, expected = run(step, step.init(), BATCHES)
    with jax.enable_x64(True):
        step = make_step(MeanModel(1), MeanModel(0), optax.adamw(1e-2), SHARP)
        state, losses = run(step, step.init(), BATCHES)
        assert_close(losses, expected, 1e-4)
        assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float32"}


def test_models_that_do_not_fit():
    sgd = optax.sgd(0.1)
    with pytest.raises(ValueError, match="nothing to train"):
        make_step((mean_logits, {"w": jnp.arange(3)}), None, sgd, kd_loss)
    with pytest.raises(ValueError, match="nothing to train"):
        make_step(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), None, sgd, kd_loss)
    with pytest.raises(TypeError, match="student is a dict"):
        make_step({}, None, sgd, kd_loss)
    with pytest.raises(TypeError, match="teacher is a dict"):
        make_step((mean_logits, params()), {}, sgd, kd_loss)

    def padded(tokens):
        logits = mean_logits(params(), tokens)
        return jnp.pad(logits, ((0, 0), (0, 0), (0, 4)))

    step = make_step((mean_logits, params()), padded, sgd, kd_loss)
    with pytest.raises(ValueError, match="slice it: logits.*:16"):
        step(step.init(), TOKENS)
