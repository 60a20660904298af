"""A killed training run continues from its files with the same numbers to the bit."""

import itertools
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import jaxq
from jaxq.distillation import kd_loss, make_step
from tests import tables
from tests.arrays import assert_same, normal

pytestmark = pytest.mark.usefixtures("standard_promotion")
NUM_STEPS = 6


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(128, 8, rngs=rngs)

    def __call__(self, x):
        return self.down(self.dropout(nnx.relu(self.up(x))))


def batch(index):
    return (normal(16, 64, seed=index),)


def loss(logits, teacher_logits):
    return kd_loss(logits, teacher_logits, alpha=1.0)


def learned_steps():
    tx = optax.multi_transform(
        {"weight": jaxq.optim.adamw8bit(1e-2), "step": optax.adam(1e-3)},
        jaxq.training.labels,
    )
    teacher = Net(nnx.Rngs(0))
    qat = jaxq.training.prepare(teacher, "int3", ranges=jaxq.training.lsq())
    return make_step(qat, teacher, tx, loss)


def moving_averages():
    teacher = Net(nnx.Rngs(0))
    qat = jaxq.training.prepare(teacher, "w8a8", ranges=jaxq.training.ema(0.9))
    return make_step(qat, teacher, optax.adam(1e-2), loss)


def raw_tree():
    net = {"up": normal(64, 128) / 8, "down": normal(128, 8) / 11}
    schedule = jaxq.training.Schedule(start=3)
    qat = jaxq.training.prepare(net, "int2", schedule=schedule)

    def forward(params, x):
        return jnp.tanh(x @ params["up"]) @ params["down"]

    def scheduled(params, x):
        return forward(schedule.apply(params["net"], params["count"]), x)

    student = {"net": qat, "count": jnp.zeros((), jnp.int32)}
    return make_step((scheduled, student), (forward, net), optax.adam(1e-2), loss)


RUNS = {
    "learned steps": learned_steps,
    "moving averages": moving_averages,
    "raw tree": raw_tree,
}


def train(step, state, first, stop):
    losses = []
    for index in range(first, stop):
        state, value = step(state, batch(index))
        losses.append(value)
    return state, losses


def values(state):
    """The arrays of a state without nnx Variables around them."""
    return [
        jax.random.key_data(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
        for leaf in jax.tree.leaves(state)
    ]


def with_jaxq(folder, state, template):
    jaxq.save(folder / "state.safetensors", state)
    return jaxq.load(folder / "state.safetensors", into=template)


def with_orbax(folder, state, template):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", template)


WAYS = list(itertools.product(RUNS, (with_jaxq, with_orbax)))


@pytest.mark.parametrize(
    ("run", "through_files"),
    # orbax writes one kind of state by default.
    tables.thinned(WAYS, [way for way in WAYS if way[1] is with_jaxq] + WAYS[1:2]),
)
def test_a_saved_run_continues_with_the_same_numbers(run, through_files, tmp_path):
    step = RUNS[run]()
    state, losses = train(step, step.init(), 0, NUM_STEPS)
    # A new process makes everything again and reads only the file.
    half, first_losses = train(step, step.init(), 0, NUM_STEPS // 2)
    again = RUNS[run]()
    resumed = through_files(tmp_path, half, again.init())
    last, last_losses = train(again, resumed, NUM_STEPS // 2, NUM_STEPS)
    assert_same(first_losses + last_losses, losses)
    assert_same(values(last), values(state))


KILLED = """
import os, signal, sys
import jaxq
from tests.training.test_resume import NUM_STEPS, batch, learned_steps
path, kill_after = sys.argv[1], int(sys.argv[2])
step = learned_steps()
state = step.init()
done = 0
if os.path.exists(path):
    saved = jaxq.load(path, into={"state": state, "done": 0})
    state, done = saved["state"], saved["done"]
for index in range(done, NUM_STEPS):
    state, _ = step(state, batch(index))
    jaxq.save(path, {"state": state, "done": index + 1})
    if index + 1 == kill_after:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_continues_with_the_same_numbers(tmp_path):
    def process(path, kill_after):
        arguments = [sys.executable, "-c", KILLED, str(path), str(kill_after)]
        return subprocess.run(arguments, check=False).returncode

    killed, whole = tmp_path / "killed.safetensors", tmp_path / "whole.safetensors"
    assert process(killed, 4) == -signal.SIGKILL
    assert process(killed, 0) == 0
    assert process(whole, 0) == 0
    states = [values(jaxq.load(path)["state"]) for path in (killed, whole)]
    assert_same(states[0], states[1])
