"""One table: every observer is tested for every promise of `Observer`."""

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
from tests.arrays import assert_same
from tests.tables import thinned

# Few bins suffice for int4, which has 8 levels from 0 up.
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
# histogram has the state of mse and entropy, and tests of its own.
RARE = ("histogram", "moving_average_corrected", "percentile_nearest_rank")
COMMON = [name for name in FACTORIES if name not in RARE]
CHANNELS = 4
SHAPE = (3, 10, CHANNELS)
over_observers = pytest.mark.parametrize("name", thinned(FACTORIES, COMMON))
# mse has the state of entropy.
STATES = [name for name in COMMON if name != "mse"]
over_states = pytest.mark.parametrize("name", thinned(FACTORIES, STATES))
# Nearly all of the time is compilation. So all arrays have one shape, and most tests
# keep channels.
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
    def step(state, batch):
        return obs.update(state, batch), None

    return lax.scan(step, obs.init(x[0]), x)[0]


def both(obs, state):
    """Symmetric and asymmetric bounds, one array."""
    symmetric = obs.bounds(state, FORMAT)
    asymmetric = obs.bounds(state, FORMAT, symmetric=False)
    return np.stack([np.asarray(bound) for bound in (*symmetric, *asymmetric)])


@functools.cache
def bounds_inside(obs):
    return jax.jit(lambda state: obs.bounds(state, FORMAT))


def depends_on_order(name):
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
    assert_same(state, obs.init(x[0]))
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
    assert_same(inside(x), eager)


@over_states
def test_channels_are_independent(name):
    # The statistics of a channel depend on its numbers alone, as under vmap.
    make, x = FACTORIES[name], batches()
    mapped = jax.jit(jax.vmap(functools.partial(scanned, make()), in_axes=-1))(x)
    assert_same(observed(make(axis=-1), *x), mapped)


@over_both
def test_merging_in_any_order(name, axis):
    obs, x = FACTORIES[name](axis=axis), batches()
    a, b, c = (observed(obs, batch) for batch in x)
    left, right = obs.merge(obs.merge(a, b), c), obs.merge(a, obs.merge(c, b))
    if depends_on_order(name):
        np.testing.assert_allclose(both(obs, left), both(obs, right), rtol=1e-6)
        return
    assert_same(left, right)
    assert_same(left, observed(obs, *x))
    assert_same(left, observed(obs, x[2], x[0], x[1]))
    assert_same(obs.merge(left, obs.init(x[0])), left)


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
    for batch in x[1:]:
        expected = obs.merge(expected, observed(obs, batch))
    if depends_on_order(name):
        np.testing.assert_allclose(both(obs, state), both(obs, expected), rtol=1e-6)
    else:
        assert_same(state, expected)


@over_states
def test_mask(name):
    # Masked numbers change nothing, whatever they are. NaN is only counted.
    obs, x = FACTORIES[name](axis=-1), batches()
    state = observed(obs, *np.where(MASK, x, np.float32(1e6)), where=MASK)
    assert_same(
        state, observed(obs, *np.where(MASK, x, np.float32(np.inf)), where=MASK)
    )
    without = observed(obs, *np.where(MASK, x, np.float32(np.nan)))
    assert_same(state._replace(totals=None), without._replace(totals=None))
    assert_same(state.totals.finite, without.totals.finite)
    assert np.asarray(without.totals.nan.low).tolist() == [9] * CHANNELS
    assert np.asarray(state.totals.nan.low).tolist() == [0] * CHANNELS


@over_states
def test_narrow_inputs(name):
    obs, x = FACTORIES[name](axis=-1), batches().astype(jnp.bfloat16)
    assert_same(observed(obs, *x), observed(obs, *x.astype(np.float32)))


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_other_narrow_inputs(dtype):
    obs, x = observers.minmax(axis=-1), batches().astype(dtype)
    assert_same(observed(obs, *x), observed(obs, *x.astype(np.float32)))


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
    # If all numbers are equal, the range ends at that number.
    obs = FACTORIES[name](axis=-1)
    for constants in np.float32(CONSTANTS).reshape(-1, CHANNELS):
        x = np.broadcast_to(constants, SHAPE[1:])
        state, size = observed(obs, x, x), np.abs(constants)
        for bounds in (obs.bounds(state, FORMAT), obs.bounds_of(x, FORMAT)):
            np.testing.assert_array_equal(np.asarray(bounds), [-size, size])
        low, high = np.minimum(constants, 0), np.maximum(constants, 0)
        np.testing.assert_array_equal(
            np.asarray(obs.bounds(state, FORMAT, symmetric=False)), [low, high]
        )
        anywhere = obs.bounds(state, FORMAT, symmetric=False, include_zero=False)
        np.testing.assert_array_equal(np.asarray(anywhere), [constants, constants])


@over_observers
def test_a_range_for_an_offset_need_not_contain_zero(name):
    # The extremes of each channel are far from 0 beside their distance.
    obs, options = FACTORIES[name](axis=-1), {"symmetric": False, "include_zero": False}
    x = np.random.default_rng(0).uniform(100, 101, SHAPE).astype(np.float32)
    x = x * np.float32([1, -1, 1e-30, -1e30])
    x[1] = x[0]  # so that a moving average does not depend on the batches
    state = observed(obs, x[0], x[1])
    for low, high in (
        obs.bounds(state, "uint4", **options),
        obs.bounds_of(x[0], "uint4", **options),
    ):
        least, most = x[0].min(axis=0), x[0].max(axis=0)
        assert (least <= low).all()
        assert (high <= most).all()
        # "percentile" leaves out a tenth of ten numbers, and a bucket is 4 wide here.
        share = 0.3 if name.startswith("percentile") else 0.7
        assert (high - low >= share * (most - least)).all()
    with pytest.raises(ValueError, match=r"include_zero=False. Pass symmetric=False"):
        obs.bounds(state, FORMAT, include_zero=False)
    with pytest.raises(TypeError, match="include_zero must be True or False"):
        obs.bounds_of(x[0], FORMAT, symmetric=False, include_zero=0)


@over_observers
def test_empty_batches_change_nothing(name):
    obs, x = FACTORIES[name](axis=-1), batches()
    state = observed(obs, *x)
    assert_same(obs.update(state, x[0, :0]), state)
    assert_same(obs.update(state, x[0], where=MASK & False), state)
    first = obs.update(obs.init(x), x[0, :0])
    assert_same(first, obs.init(x))


@over_observers
def test_channels_without_a_number_have_no_bounds(name):
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
        match=r"in 1 of 4 channels \(the first is 1\), so there is no range. Each",
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
def test_numbers_that_are_not_finite_are_reported(name):
    obs, x = FACTORIES[name](axis=-1), batches()
    clean, dirty = observed(obs, *x, where=MASK), np.where(MASK, x, np.float32(np.nan))
    dirty[0, 8, 2], dirty[1, 9, 2] = np.inf, -np.inf
    state = observed(obs, *dirty)
    message = r"34 NaN and 2 infinities were observed in 4 of 4 channels"
    with pytest.raises(ValueError, match=message):
        obs.bounds(state, FORMAT)
    assert np.isnan(bounds_inside(obs)(state)).all()
    assert_same(
        obs.bounds(state, FORMAT, on_nonfinite="ignore"), obs.bounds(clean, FORMAT)
    )
    with pytest.raises(ValueError, match=r"bounds_of: 11 NaN and 1 infinities"):
        obs.bounds_of(dirty[0], FORMAT)
    with pytest.raises(ValueError, match=message):  # a merge keeps the counts
        obs.bounds(obs.merge(clean, state), FORMAT)


@over_observers
def test_errors(name):
    obs, x = FACTORIES[name](axis=-1), batches()
    state = observed(obs, *x)
    with pytest.raises(TypeError, match=r"x must be floating point, got int32\[3\]"):
        obs.init(np.zeros(3, np.int32))
    with pytest.raises(
        ValueError, match=r"has statistics of shape \[4\], and this batch needs \[10\]"
    ):
        obs.update(state, x[0].T)
    with pytest.raises(ValueError, match="must name axes of x"):
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
        with pytest.raises(ValueError, match="did not make this state.*settings"):
            use()
    # The percentage is not part of the state.
    assert observers.percentile(50.0, mantissa_bits=2).bounds(state)[1] == 1
