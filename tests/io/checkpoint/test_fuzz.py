"""Damaged directories: each is read, or refused by a ValueError that names it."""

import copy
import json
import random

import numpy as np
import pytest

import jaxq
from jaxq.io import layouts, read_checkpoint
from tests.io import fuzz
from tests.io.checkpoint import directories
from tests.io.checkpoint.directories import CASES, tensors_of

ROWS = [
    "gptq 4",
    "awq",
    "nf4 nested",
    "compressed-tensors pack 4 asymmetric",
    "fp8 block",
    "modelopt nvfp4",
    "llm_int8",
]
DTYPES = ("int8", "uint8", "int32", "float16", "float32", "int64")


def mutated_tensors(tensors, rng):
    """One array is missing, renamed, cut, or of another dtype or shape."""
    name = rng.choice(list(tensors))
    array = tensors[name]
    change = rng.randrange(6)
    if change == 0:
        del tensors[name]
    elif change == 1:
        tensors[rng.choice(["x", f"{name}.x", name[1:]])] = tensors.pop(name)
    elif change == 2:
        tensors[name] = array[: len(array) // 2] if array.ndim else array
    elif change == 3:
        with np.errstate(all="ignore"):
            tensors[name] = array.astype(rng.choice(DTYPES))
    elif change == 4:
        tensors[name] = array.reshape(-1)
    else:
        tensors[name] = np.zeros((0, 3), array.dtype)


def mutated_config(config, rng):
    """One node of the settings has another value, or is missing."""
    parent, key = rng.choice(list(fuzz._nodes(config)))
    if rng.random() < 0.2:
        del parent[key]
    else:
        parent[key] = copy.deepcopy(rng.choice(fuzz.VALUES))


@pytest.mark.parametrize("row", ROWS)
def test_every_mutant_is_read_or_refused_by_name(tmp_path, row):
    layout = layouts.get(CASES[row].layout)
    shape = (256, 32) if row != "fp8 block" else (130, 16)
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    qt = jaxq.quantize(w, layout.spec(CASES[row].config))
    good, settings = tensors_of(row, "m.up", qt)
    rng, refused, strange = random.Random(row), 0, []
    for number in range(60):
        tensors, config = dict(good), copy.deepcopy(settings)
        if number % 3:
            mutated_tensors(tensors, rng)
        else:
            mutated_config({"quantization_config": config}, rng)
        directories.write(tmp_path, tensors, config)
        if number % 5 == 0:
            path = tmp_path / "model.safetensors"
            data = bytearray(path.read_bytes())
            position = rng.randrange(min(200, len(data)))
            data[position] = rng.randrange(256)
            path.write_bytes(data)
        try:
            with read_checkpoint(tmp_path) as checkpoint:
                for name in checkpoint:
                    checkpoint.eval_shape(name)
        except ValueError as error:
            refused += 1
            if str(tmp_path) not in str(error):
                strange.append(str(error))
        except Exception as error:
            text = json.dumps(config, default=repr)
            strange.append(f"{number}: {error!r:.200} {text:.200}")
    assert not strange, "\n".join(strange)
    assert refused > 15
