"""One table: every observer times every promise of `Observer`."""

import functools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxq import observers
from tests.tables import thinned

# Few bins, for int4: 8 levels.
FACTORIES = {
    "minmax": observers.minmax,
    "absmax": observers.absmax,
    "moving_average": lambda axis=None: observers.moving_average(0.5, axis=axis),
    "moving_average_corrected": lambda axis=None: observers.moving_average(
        0.5, bias_corrected=True, axis=axis
    ),
    "percentile": lambda axis=None: observers.percentile(90, axis=axis),
    "percentile_nearest_rank": lambda axis=None: observers.percentile(
        90, method="nearest_rank", axis=axis
    ),
    "histogram": lambda axis=None: observers.histogram(32, axis=axis),
    "mse": lambda axis=None: observers.mse(grid=20, bins=64, axis=axis),
    "entropy": lambda axis=None: observers.entropy(64, axis=axis),
}
# histogram counts as mse and entropy do, and has tests of its own.
RARE = ("histogram", "moving_average_corrected", "percentile_nearest_rank")
COMMON = [name for name in FACTORIES if name not in RARE]
CHANNELS = 4
SHAPE = (3, 10, CHANNELS)
over_observers = pytest.mark.parametrize("name", thinned(FACTORIES, COMMON))
STATES = [name for name in COMMON if name != "mse"]  # which keeps the state of entropy
over_states = pytest.mark.parametrize("name", thinned(FACTORIES, STATES))
# Nearly all of the time goes into compiling: arrays are of one shape, and most tests keep channels.
BOTH = [(name, axis) for name in FACTORIES for axis in (-1, None)]
over_both = pytest.mark.parametrize(
    ("name", "axis"), thinned(BOTH, [(name, -1) for name in COMMON])
)
FORMAT = "int4"
MASK = np.broadcast_to(np.arange(10)[:, None] < 7, SHAPE[1:])


def batches() -> np.ndarray:
    """Three batches, later ones larger, each channel of its own size."""
    random = np.random.default_rng(0)
    x = (
        random.standard_normal(SHAPE)
        * np.float32([1, 3, 10])[:, None, None]
        * np.float32([1, 0.1, 5, 30])
    )
    return x.astype(np.float32)


def observed(obs, *xs, where=None):
    state = obs.init(xs[0])
    for x in xs:
        state = obs.update(state, x, where=where)
    return state


def scanned(obs, x):
    return lax.scan(
        lambda state, one: (obs.update(state, one), None), obs.init(x[0]), x
    )[0]


def both(obs, state):
    """Symmetric and asymmetric bounds, one array."""
    return np.stack(
        [
            np.asarray(b)
            for s in (True, False)
            for b in obs.bounds(state, FORMAT, symmetric=s)
        ]
    )


@functools.cache
def bounds_inside(obs):
    return jax.jit(lambda state: obs.bounds(state, FORMAT))


def assert_equal(a, b):
    """Equal to the bit, leaf by leaf."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        u, v = np.asarray(u), np.asarray(v)
        assert (u.dtype, u.shape) == (v.dtype, v.shape)
        np.testing.assert_array_equal(u.view(np.uint32), v.view(np.uint32))


def ordered_one(name):
    return name.startswith("moving_average")


def test_the_table_has_every_kind():
    assert {make().kind for make in FACTORIES.values()} == set(observers.names())


@over_observers
def test_is_a_value(name):
    make = FACTORIES[name]
    obs, other = make(axis=-1), make()
    assert obs == make(axis=-1) != other
    assert len({obs, make(axis=-1), other}) == 2
    assert pickle.loads(pickle.dumps(obs)) == obs
    assert observers.from_dict(json.loads(json.dumps(obs.to_dict()))) == obs
    several = make(axis=(0, -1))
    assert observers.from_dict(json.loads(json.dumps(several.to_dict()))) == several


@over_both
def test_bounds(name, axis):
    obs, x = FACTORIES[name](axis=axis), batches()
    state = observed(obs, *x)
    shape = () if axis is None else (CHANNELS,)
    magnitude = np.abs(x).max(axis=(0, 1) if axis else None)
    for symmetric in (True, False):
        low, high = obs.bounds(state, FORMAT, symmetric=symmetric)
        assert (low.shape, high.shape, low.dtype, high.dtype) == (
            shape,
            shape,
            np.float32,
            np.float32,
        )
        low, high = np.asarray(low), np.asarray(high)
        assert (low <= 0).all()
        assert (high >= 0).all()
        assert (np.maximum(-low, high) <= magnitude).all()
        assert (np.maximum(-low, high) >= magnitude / 20).all()
        if symmetric:
            np.testing.assert_array_equal(low, -high)
    low, high = obs.bounds(state, "uint4")
    assert (np.asarray(low) == 0).all()
    assert (np.asarray(high) > 0).all()


@over_both
def test_state_has_static_shape(name, axis):
    obs, x = FACTORIES[name](axis=axis), batches()
    state = obs.init(jax.ShapeDtypeStruct(SHAPE[1:], jnp.float32))
    assert_equal(state, obs.init(x[0]))
    new = obs.update(state, x[0])
    assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(
        lambda a: (a.shape, a.dtype), state
    )
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((state, new)))


@over_both
def test_scan_and_jit_are_eager(name, axis):
    obs, x = FACTORIES[name](axis=axis), batches()

    @jax.jit
    def inside(x):
        state = scanned(obs, x)
        return (
            state,
            obs.bounds(state, FORMAT),
            obs.bounds(state, FORMAT, symmetric=False),
        )

    state = observed(obs, *x)
    eager = state, obs.bounds(state, FORMAT), obs.bounds(state, FORMAT, symmetric=False)
    assert_equal(inside(x), eager)


@over_states
def test_channels_are_independent(name):
    # A channel's statistics are those of its numbers alone, which is also what vmap makes.
    make, x = FACTORIES[name], batches()
    mapped = jax.jit(jax.vmap(functools.partial(scanned, make()), in_axes=-1))(x)
    assert_equal(observed(make(axis=-1), *x), mapped)


@over_both
def test_merging_in_any_order(name, axis):
    obs, x = FACTORIES[name](axis=axis), batches()
    a, b, c = (observed(obs, one) for one in x)
    left, right = obs.merge(obs.merge(a, b), c), obs.merge(a, obs.merge(c, b))
    if ordered_one(name):
        np.testing.assert_allclose(both(obs, left), both(obs, right), rtol=1e-6)
        return
    assert_equal(left, right)
    assert_equal(left, observed(obs, *x))
    assert_equal(left, observed(obs, x[2], x[0], x[1]))
    assert_equal(obs.merge(left, obs.init(x[0])), left)


@pytest.mark.parametrize(
    ("name", "axis"), thinned(BOTH, [(name, -1) for name in STATES])
)
def test_merging_across_devices(name, axis):
    obs, x = FACTORIES[name](axis=axis), np.concatenate([batches(), 2 * batches()[:1]])
    mesh = jax.make_mesh((4,), ("data",))
    spec = PartitionSpec("data")

    def shard(x):
        return obs.merge_across(scanned(obs, x), "data")

    across = jax.jit(
        jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=PartitionSpec())
    )
    state = jax.device_get(across(jax.device_put(x, NamedSharding(mesh, spec))))
    expected = observed(obs, x[0])
    for one in x[1:]:
        expected = obs.merge(expected, observed(obs, one))
    if ordered_one(name):
        np.testing.assert_allclose(both(obs, state), both(obs, expected), rtol=1e-6)
    else:
        assert_equal(state, expected)


@over_states
def test_mask(name):
    # Padding that would show: as if it had not been there. NaN is not there either, but counted.
    obs, x = FACTORIES[name](axis=-1), batches()
    state = observed(obs, *np.where(MASK, x, np.float32(1e6)), where=MASK)
    assert_equal(
        state, observed(obs, *np.where(MASK, x, np.float32(np.inf)), where=MASK)
    )
    without = observed(obs, *np.where(MASK, x, np.float32(np.nan)))
    assert_equal(state._replace(seen=None), without._replace(seen=None))
    assert_equal(state.seen.finite, without.seen.finite)
    assert np.asarray(without.seen.nan.low).tolist() == [9] * CHANNELS
    assert np.asarray(state.seen.nan.low).tolist() == [0] * CHANNELS


@over_states
def test_narrow_inputs(name):
    obs, x = FACTORIES[name](axis=-1), batches().astype(jnp.bfloat16)
    assert_equal(observed(obs, *x), observed(obs, *x.astype(np.float32)))


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_other_narrow_inputs(dtype):
    obs, x = observers.minmax(axis=-1), batches().astype(dtype)
    assert_equal(observed(obs, *x), observed(obs, *x.astype(np.float32)))


@over_observers
def test_powers_of_two_scale(name):
    obs, x = FACTORIES[name](axis=-1), batches()
    expected, exact = (
        both(obs, observed(obs, *x)),
        np.asarray(obs.bounds_of(x[0], FORMAT)),
    )
    for k in (-100, -3, 90):
        factor = np.float32(2.0**k)
        np.testing.assert_array_equal(
            both(obs, observed(obs, *(x * factor))), expected * factor
        )
        np.testing.assert_array_equal(
            np.asarray(obs.bounds_of(x[0] * factor, FORMAT)), exact * factor
        )


CONSTANTS = [
    0.0,
    3.25,
    -0.7,
    1e30,
    -3e38,
    1e-30,
    1e-38,
    -1e-40,
    1e-45,
    -0.0,
    65504.0,
    3.4e38,
]


@over_observers
def test_constants(name):
    # The range of one number repeated ends at it, whatever its size.
    obs = FACTORIES[name](axis=-1)
    for constants in np.float32(CONSTANTS).reshape(-1, CHANNELS):
        x = np.broadcast_to(constants, SHAPE[1:])
        state, size = observed(obs, x, x), np.abs(constants)
        for found in (obs.bounds(state, FORMAT), obs.bounds_of(x, FORMAT)):
            np.testing.assert_array_equal(np.asarray(found), [-size, size])
        low, high = -size, size
        if name != "absmax":
            low, high = (
                np.where(constants < 0, constants, 0),
                np.where(constants > 0, constants, 0),
            )
        np.testing.assert_array_equal(
            np.asarray(obs.bounds(state, FORMAT, symmetric=False)), [low, high]
        )


@over_observers
def test_empty_batches_change_nothing(name):
    obs, x = FACTORIES[name](axis=-1), batches()
    state = observed(obs, *x)
    assert_equal(obs.update(state, x[0, :0]), state)
    assert_equal(obs.update(state, x[0], where=MASK & False), state)
    first = obs.update(obs.init(x), x[0, :0])
    assert_equal(first, obs.init(x))


@over_observers
def test_nothing_seen(name):
    obs, x = FACTORIES[name](axis=-1), batches()
    with pytest.raises(
        ValueError,
        match=rf"{obs.kind}.bounds: no finite number was observed in 4 of 4 channels",
    ):
        obs.bounds(obs.init(x), FORMAT)
    mask = np.array([True, False, True, True])
    state = observed(obs, x[0], where=MASK & mask)
    with pytest.raises(
        ValueError,
        match="in 1 of 4 channels, the first being 1, so there is no range. Update",
    ):
        obs.bounds(state, FORMAT)
    for bound in bounds_inside(obs)(state):
        np.testing.assert_array_equal(np.isnan(bound), ~mask)
    nothing = np.full(SHAPE[1:], np.nan, np.float32)
    with pytest.raises(
        ValueError, match="bounds_of: no finite number was observed in 4 of 4"
    ):
        obs.bounds_of(nothing, FORMAT, on_nonfinite="ignore")


@over_observers
def test_what_is_not_finite_is_told(name):
    obs, x = FACTORIES[name](axis=-1), batches()
    clean, dirty = observed(obs, *x, where=MASK), np.where(MASK, x, np.float32(np.nan))
    dirty[0, 8, 2], dirty[1, 9, 2] = np.inf, -np.inf
    state = observed(obs, *dirty)
    told = r"34 NaN and 2 infinities were observed in 4 of 4 channels"
    with pytest.raises(ValueError, match=told):
        obs.bounds(state, FORMAT)
    assert np.isnan(bounds_inside(obs)(state)).all()
    assert_equal(
        obs.bounds(state, FORMAT, on_nonfinite="ignore"), obs.bounds(clean, FORMAT)
    )
    with pytest.raises(ValueError, match=r"bounds_of: 11 NaN and 1 infinities"):
        obs.bounds_of(dirty[0], FORMAT)
    with pytest.raises(ValueError, match=told):  # once seen it stays known
        obs.bounds(obs.merge(clean, state), FORMAT)


@over_observers
def test_errors(name):
    obs, x = FACTORIES[name](axis=-1), batches()
    state = observed(obs, *x)
    with pytest.raises(TypeError, match=r"x must be floating point, got int32\[3\]"):
        obs.init(np.zeros(3, np.int32))
    with pytest.raises(
        ValueError, match=r"keeps statistics of shape \[4\] and this batch has \[10\]"
    ):
        obs.update(state, x[0].T)
    with pytest.raises(ValueError, match="no such axes"):
        obs.init(np.float32(1))
    with pytest.raises(TypeError, match="where must be bool"):
        obs.update(state, x[0], where=np.ones(4, np.float32))
    with pytest.raises(ValueError, match=r"where must broadcast to x, got bool\[3\]"):
        obs.update(state, x[0], where=np.ones(3, bool))
    with pytest.raises(ValueError, match="states differ in shape"):
        obs.merge(state, FACTORIES[name]().init(x))
    with pytest.raises(ValueError, match="on_nonfinite must be one of raise, ignore"):
        obs.bounds(state, FORMAT, on_nonfinite="zero")
    with pytest.raises(TypeError, match="symmetric must be True or False"):
        obs.bounds(state, FORMAT, symmetric=1)
    with pytest.raises(ValueError, match="unknown format"):
        obs.bounds(state, "int44")
    with pytest.raises(TypeError, match="axis must be a whole number"):
        FACTORIES[name](axis="channels")


def test_from_dict_names_what_is_wrong():
    with pytest.raises(
        ValueError, match="unknown kind 'percentiles'. Did you mean 'percentile'"
    ):
        observers.from_dict({"type": "percentiles"})
    with pytest.raises(ValueError, match="unexpected keyword argument 'q'"):
        observers.from_dict({"type": "percentile", "q": 3})


@over_observers
def test_one_compilation_for_equal_observers(name):
    make, x = FACTORIES[name], batches()
    traces = 0

    def update(obs, state, x):
        nonlocal traces
        traces += 1
        return obs.update(state, x)

    jitted = jax.jit(update, static_argnums=0)
    for _ in range(2):
        obs = make(axis=-1)
        jitted.lower(obs, obs.init(x), x[0])
    assert traces == 1


def test_states_of_other_observers_are_refused():
    x = np.ones(64, np.float32)
    fine, coarse = (
        observers.percentile(99.0, mantissa_bits=4),
        observers.percentile(99.0, mantissa_bits=2),
    )
    state = coarse.update(coarse.init(x), x)
    for use in (
        lambda: fine.bounds(state),
        lambda: fine.update(state, x),
        lambda: observers.minmax().bounds(state),
    ):
        with pytest.raises(ValueError, match="the state is not of .*other settings"):
            use()
    assert (
        observers.percentile(50.0, mantissa_bits=2).bounds(state)[1] == 1
    )  # which share is asked for is no setting
