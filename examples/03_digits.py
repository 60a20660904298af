"""Train a small convolutional network on handwritten digits, quantize it to int8 by calibration, and count its errors.

    pip install scikit-learn
    python examples/03_digits.py

The data are the 1,797 8x8 images that come with scikit-learn (Alpaydin and Kaynak, Optical Recognition of Handwritten
Digits, 1998). A fifth is held out; calibration sees training images only. Int8 static is what a phone or an accelerator
runs: every product is of int8 numbers with int32 sums, and the range of every layer's input is known beforehand.
"""

# %% Data
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import jaxq

FAST = "--fast" in sys.argv  # less training and fewer recipes: shows that it runs
EPOCHS = 8 if FAST else 30
RECIPES = (
    ("int8", "w8a8_static")
    if FAST
    else ("int8", "w8a8", "w8a8_static", "fp8_static", "int4")
)
images, labels = load_digits(return_X_y=True)
images = (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
order = np.random.default_rng(0).permutation(len(images))
held, rest = order[: len(order) // 5], order[len(order) // 5 :]


# %% A network of ordinary nnx layers
class Network(nnx.Module):
    """Three convolutions, a mean over places, and a linear layer: float32[b, 8, 8, 1] -> float32[b, 10]."""

    def __init__(self, rngs: nnx.Rngs):
        self.convs = nnx.List(
            [
                nnx.Conv(a, b, (3, 3), rngs=rngs)
                for a, b in ((1, 16), (16, 32), (32, 32))
            ]
        )
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for i, conv in enumerate(self.convs):
            x = nnx.relu(conv(x))
            if i < 2:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        return self.out(x.mean((1, 2)))


# %% Training
model = Network(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, x, y):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


begin = time.perf_counter()
for epoch in range(EPOCHS):
    shuffled = np.random.default_rng(epoch).permutation(rest)
    for batch in shuffled[: len(shuffled) // 64 * 64].reshape(-1, 64):
        value = step(model, optimizer, images[batch], labels[batch])
    if sys.stderr.isatty():
        print(
            f"\r\033[Kepoch {epoch + 1}/{EPOCHS}: loss {value:.3f}",
            end="",
            file=sys.stderr,
            flush=True,
        )
print(
    f"\rtrained for {EPOCHS} epochs in {time.perf_counter() - begin:.0f} s",
    file=sys.stderr,
)


# %% Quantization
@nnx.jit
def predicted(model: nnx.Module, x: jax.Array) -> jax.Array:
    return model(x).argmax(-1)


def errors(model: nnx.Module) -> tuple[int, int]:
    """Held-out images the model gets wrong, and those it sees otherwise than the float model."""
    guess = predicted(model, images[held])
    return int((guess != labels[held]).sum()), int((guess != expected).sum())


expected = predicted(model, images[held])
calibration = [images[batch] for batch in np.array_split(rest[:512], 8)]
print(
    f"{len(held)} held-out images          accuracy  wrong  other than float       kB"
)
nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
print(
    f"{'float32':<28} {1 - errors(model)[0] / len(held):>10.2%} {errors(model)[0]:>6} {0:>17} {nbytes / 1e3:>8.1f}"
)
for recipe in RECIPES:
    qmodel, report = jaxq.quantize_model(
        model, recipe, calibration=calibration if "static" in recipe else None
    )
    wrong, other = errors(qmodel)
    accuracy = 1 - wrong / len(held)
    print(
        f"{recipe:<28} {accuracy:>10.2%} {wrong:>6} {other:>17} {report.bytes_after / 1e3:>8.1f}"
    )
    if recipe == "w8a8_static":
        static, layers = qmodel, report

# %% What became of each layer, and that its products are of int8
print(f"\n{layers}")
program = str(jax.make_jaxpr(lambda x: static(x))(jnp.asarray(images[:2])))
print(
    f"\nconvolutions of int8 with int32 sums: {program.count('preferred_element_type=int32')} of 3"
)
print(f"the linear layer: {jaxq.explain(jnp.ones((2, 32)), static.out.kernel[...])}")
