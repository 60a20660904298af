"""Train a small network on handwritten digits, quantize it, and count its errors.

    pip install scikit-learn
    python examples/03_digits.py

The data are the 1,797 images of 8x8 pixels that come with scikit-learn (Alpaydin and
Kaynak, Optical Recognition of Handwritten Digits, 1998). A fifth of them is held out.
Calibration reads training images only.

Phones and accelerators run static int8: every product multiplies int8 numbers and
accumulates in int32, and calibration has fixed the range of every layer's input.
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

# Less training and fewer recipes: this shows that the example runs.
FAST = "--fast" in sys.argv
EPOCHS = 8 if FAST else 30
if FAST:
    RECIPES = ("int8", "w8a8_static")
else:
    RECIPES = ("int8", "w8a8", "w8a8_static", "fp8_static", "int4")
images, labels = load_digits(return_X_y=True)
images = (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
order = np.random.default_rng(0).permutation(len(images))
num_heldout = len(order) // 5
heldout, training = order[:num_heldout], order[num_heldout:]


# %% A network of ordinary nnx layers
class Network(nnx.Module):
    """Three convolutions, a mean over pixels, and a linear layer.

    float32[b, 8, 8, 1] -> float32[b, 10]
    """

    def __init__(self, rngs: nnx.Rngs):
        channels = ((1, 16), (16, 32), (32, 32))
        self.convs = nnx.List(
            [nnx.Conv(before, after, (3, 3), rngs=rngs) for before, after in channels]
        )
        # Recipes leave an output head in floats. A layer named "out" would be one.
        self.linear = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for i, conv in enumerate(self.convs):
            x = nnx.relu(conv(x))
            if i < 2:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        return self.linear(x.mean((1, 2)))


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
    shuffled = np.random.default_rng(epoch).permutation(training)
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
    """How many held-out images are wrong, and how many differ from the float model."""
    digits = predicted(model, images[heldout])
    num_wrong = int((digits != labels[heldout]).sum())
    num_different = int((digits != float_digits).sum())
    return num_wrong, num_different


def print_row(name: str, model: nnx.Module, num_bytes: int) -> None:
    num_wrong, num_different = errors(model)
    accuracy = 1 - num_wrong / num_heldout
    print(
        f"{name:<28} {accuracy:>10.2%} {num_wrong:>6} {num_different:>17} "
        f"{num_bytes / 1e3:>8.1f}",
        flush=True,
    )


float_digits = predicted(model, images[heldout])
calibration = [images[batch] for batch in np.array_split(training[:512], 8)]
print(
    f"{num_heldout} held-out images          accuracy  wrong  other than float       kB"
)
parameters = jax.tree.leaves(nnx.state(model, nnx.Param))
print_row("float32", model, sum(parameter.nbytes for parameter in parameters))
for recipe in RECIPES:
    needs_data = "static" in recipe
    qmodel, report = jaxq.quantize_model(
        model, recipe, calibration=calibration if needs_data else None
    )
    print_row(recipe, qmodel, report.bytes_after)
    if recipe == "w8a8_static":
        static_model, static_report = qmodel, report

# %% The layers of the static model, and that its products multiply int8 numbers
print(f"\n{static_report}")
program = str(jax.make_jaxpr(lambda x: static_model(x))(jnp.asarray(images[:2])))
num_int8 = program.count("preferred_element_type=int32")
print(f"\nconvolutions of int8 with int32 sums: {num_int8} of 3")
kernel = static_model.linear.kernel[...]
print(f"the linear layer: {jaxq.explain(jnp.ones((2, 32)), kernel)}")
