"""Distill a classifier of handwritten digits into a student with a tenth of its size.

    pip install "jaxq[plots]" scikit-learn
    python examples/06_digits_student.py                # writes digits_student.png

A teacher with wide layers learns the labels of scikit-learn's digits (1,797 images of
8x8 pixels). Then two narrow students with the same initial weights read the same images
in the same order. One learns the labels. The other learns the teacher's soft labels,
which are the probabilities that the teacher gives to all ten digits, and sees no label.
A fifth of the images is held out. The table has the accuracy on these images, for three
seeds. A seed chooses the initial weights and the order of the images.

The labels of this small data set are right and complete, so both students come close to
the teacher. Soft labels need no human work, because the teacher can label any image.
"""

# %% Options and data
import argparse
import functools
import sys
import time
from pathlib import Path

import jax
import matplotlib
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from jaxq.distillation import kd_loss, make_step

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--out", type=Path, default=Path("digits_student.png"), help="where the plot goes"
)
parser.add_argument(
    "--fast", action="store_true", help="less training: shows that it runs"
)
args = parser.parse_args()
TEACHER_EPOCHS = 3 if args.fast else 30
STUDENT_EPOCHS = 5 if args.fast else 60
SEEDS = (0,) if args.fast else (0, 1, 2)
BATCH = 64

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)  # [1797, 64]
labels = labels.astype(np.int32)
order = np.random.default_rng(0).permutation(len(images))
num_heldout = len(order) // 5
heldout, training = order[:num_heldout], order[num_heldout:]


def progress(text: str) -> None:
    """Shows one line. On a terminal, the next call overwrites it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


# %% Teacher and student: the same network, wide and narrow
class Network(nnx.Module):
    """Two hidden layers: float32[b, 64] -> float32[b, 10]."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.hidden1 = nnx.Linear(64, width, rngs=rngs)
        self.hidden2 = nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.hidden1(x))
        x = nnx.relu(self.hidden2(x))
        return self.head(x)


TEACHER_WIDTH, STUDENT_WIDTH = 256, 56


def num_parameters(model: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@nnx.jit
def predicted(model: nnx.Module, x: jax.Array) -> jax.Array:
    return model(x).argmax(-1)


def accuracy(model: nnx.Module) -> float:
    """The accuracy on the held-out images in percent."""
    is_right = np.asarray(predicted(model, images[heldout])) == labels[heldout]
    return 100 * float(is_right.mean())


# %% One loop for all three networks
def train(
    name: str,
    model: nnx.Module,
    teacher: nnx.Module | None,
    loss,
    num_epochs: int,
    seed: int,
) -> tuple[nnx.Module, list[float]]:
    """The trained network, and its held-out accuracy after each epoch."""
    num_batches = len(training) // BATCH
    num_steps = num_epochs * num_batches
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, num_steps))
    step = make_step(model, teacher, optimizer, loss)
    state, curve = step.init(), []
    for epoch in range(num_epochs):
        shuffled = np.random.default_rng((seed, epoch)).permutation(training)
        for rows in shuffled[: num_batches * BATCH].reshape(-1, BATCH):
            if teacher is None:
                batch = (images[rows], labels[rows])
            else:
                batch = images[rows]
            state, _ = step(state, batch)
        curve.append(accuracy(step.student(state)))
        progress(f"{name}, seed {seed}: epoch {epoch + 1}, {curve[-1]:.1f} %")
    return step.student(state), curve


def label_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# alpha=1.0: the student learns only the teacher's probabilities, no labels.
soft_label_loss = functools.partial(kd_loss, temperature=4.0, alpha=1.0)

begin = time.perf_counter()
curves: dict[str, list[list[float]]] = {"teacher": [], "labels": [], "distilled": []}
for seed in SEEDS:
    teacher, curve = train(
        "teacher",
        Network(TEACHER_WIDTH, nnx.Rngs(seed)),
        None,
        label_loss,
        TEACHER_EPOCHS,
        seed,
    )
    curves["teacher"].append(curve)
    student = Network(STUDENT_WIDTH, nnx.Rngs(100 + seed))
    _, curve = train("labels", student, None, label_loss, STUDENT_EPOCHS, seed)
    curves["labels"].append(curve)
    _, curve = train(
        "distilled", student, teacher, soft_label_loss, STUDENT_EPOCHS, seed
    )
    curves["distilled"].append(curve)
progress("")

# %% The table
sizes = {"teacher": num_parameters(teacher)}
sizes["labels"] = sizes["distilled"] = num_parameters(student)
titles = {
    "teacher": "teacher, labels",
    "labels": "student, labels",
    "distilled": "student, soft labels",
}
print(f"accuracy on {num_heldout} held-out images in %")
seed_titles = "".join(f"{f'seed {seed}':>9}" for seed in SEEDS)
print(f"{'':22}{'parameters':>10}{seed_titles}{'mean':>9}")
means = {}
for name, title in titles.items():
    last = [curve[-1] for curve in curves[name]]
    means[name] = np.mean(last)
    columns = "".join(f"{value:>9.2f}" for value in [*last, means[name]])
    print(f"{title:22}{sizes[name]:>10,}{columns}")
print(
    f"\nThe student has {sizes['distilled'] / sizes['teacher']:.1%} of the teacher's "
    f"parameters. Its accuracy with soft labels differs from the teacher's by "
    f"{means['distilled'] - means['teacher']:+.2f} points, and with labels by "
    f"{means['labels'] - means['teacher']:+.2f} points."
)

# %% The plot
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
colors = {"labels": "tab:gray", "distilled": "tab:blue"}
epochs = np.arange(1, STUDENT_EPOCHS + 1)
for name, color in colors.items():
    curve = np.array(curves[name])  # [seeds, epochs]
    axes.plot(epochs, curve.mean(0), color=color, label=titles[name])
    axes.fill_between(epochs, curve.min(0), curve.max(0), color=color, alpha=0.3)
axes.axhline(means["teacher"], color="black", linestyle=":", label=titles["teacher"])
axes.set(xlabel="epoch", ylabel="held-out accuracy in %", ylim=(85, 100))
axes.set_title(
    f"{sizes['distilled']:,} parameters learn from {sizes['teacher']:,}, "
    f"mean and range of seeds: {len(SEEDS)}"
)
axes.legend()
figure.savefig(args.out, dpi=120)
print(f"\nplot: {args.out} ({time.perf_counter() - begin:.0f} s)")
