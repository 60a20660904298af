"""Calibration data of other libraries: loaders, iterators and their arrays."""

import itertools
import warnings

import numpy as np
import pytest
from flax import nnx

import jaxq
from jaxq.progress import with_progress

ROWS = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)
BATCHES = [ROWS[start : start + 8] for start in range(0, 32, 8)]


def static_range(batches) -> list[float]:
    """The static range of a layer's inputs that `quantize_model` finds."""
    model = nnx.Linear(16, 4, rngs=nnx.Rngs(0))
    qmodel, _ = jaxq.quantize_model(model, "w8a8_static", calibration=batches)
    return np.asarray(qmodel.kernel[...].input_range).tolist()


@pytest.fixture(scope="module")
def expected():
    return static_range(BATCHES)


def test_iterators_that_can_be_read_once(expected):
    # The recipe reads the batches several times.
    assert static_range(iter(BATCHES)) == expected
    assert static_range(batch for batch in BATCHES) == expected
    assert static_range(itertools.islice(itertools.cycle(BATCHES), 4)) == expected


def test_grain(expected):
    grain = pytest.importorskip("grain", reason="reads data sets: pip install grain")
    batches = grain.MapDataset.source(list(ROWS)).batch(8)
    loader = grain.DataLoader(
        data_source=ROWS,
        sampler=grain.samplers.SequentialSampler(
            32, shard_options=grain.sharding.NoSharding()
        ),
        operations=[grain.transforms.Batch(8)],
    )
    for data in (
        batches,
        batches.to_iter_dataset(),
        iter(batches.to_iter_dataset()),
        itertools.islice(batches.repeat(), 4),
        loader,
        iter(loader),
    ):
        assert static_range(data) == expected
    with pytest.raises(ValueError, match=r"MapDataset that repeats .* itertools.islic"):
        static_range(batches.repeat())


def test_torch(expected):
    torch = pytest.importorskip("torch", reason="reads a DataLoader: pip install torch")
    rows = torch.tensor(ROWS)
    data = torch.utils.data
    assert static_range(data.DataLoader(rows, batch_size=8)) == expected
    # A batch of a TensorDataset is a list: the arguments of the model.
    loader = data.DataLoader(data.TensorDataset(rows), batch_size=8)
    assert static_range(loader) == expected
    with pytest.raises(TypeError, match=r"a torch.Tensor of dtype torch.bfloat16, whi"):
        static_range([rows.bfloat16()])

    class Stream(data.IterableDataset):
        def __iter__(self):
            return iter(rows)

    # The length of such a loader raises TypeError.
    loader = data.DataLoader(Stream(), batch_size=8)
    assert len(list(with_progress(loader, "calibrating", True))) == 4
    assert static_range(loader) == expected


class Endless:
    """Says that it has no end, as data sets of grain do."""

    def __len__(self):
        return 2**63 - 1

    def __iter__(self):
        return itertools.repeat(ROWS)


def test_endless_data_are_refused():
    model = nnx.Linear(16, 4, rngs=nnx.Rngs(0))
    message = "batches is a Endless that repeats without end"
    with pytest.raises(ValueError, match=f"^quantize_model: {message}"):
        jaxq.quantize_model(model, "w8a8_static", calibration=Endless())
    with pytest.raises(ValueError, match=message):
        jaxq.nn.calibrate(model, Endless())


def test_very_many_batches_of_unknown_length_warn(monkeypatch):
    monkeypatch.setattr("jaxq.nn.calibration._batches._MANY_BATCHES", 3)
    with pytest.warns(UserWarning, match=r"^quantize_model: .* have 3 batches and mor"):
        static_range(batch for batch in BATCHES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        static_range(BATCHES)
