"""Records of layer kinds: which fields are refused, and which kinds can be removed."""

import dataclasses

import pytest
from flax import nnx

from jaxq import nn
from jaxq.nn.layers import _kind


class Gate(nnx.Module):
    pass


def roles(layer):
    return nn.Roles(contracting=(-2,), shape=(4, 2))


GATE = nn.LayerKind("Gate", Gate, "matrix", roles, attach=lambda layer: None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": 3}, "LayerKind 3: name must be a non-empty string, got 3"),
        ({"name": ""}, "name must be a non-empty string, got ''"),
        ({"cls": "Gate"}, "LayerKind 'Gate': cls must be a class .*got 'Gate'"),
        ({"weight": None}, "weight must be a non-empty string, got None"),
        ({"roles": (-2,)}, r"roles must be a function, got \(-2,\)"),
        ({"attach": None}, "attach must be a function, got None"),
        ({"problem": "no"}, "problem must be a function, got 'no'"),
        ({"read_input": 0}, "read_input must be a function, got 0"),
        ({"read_rows": 0}, "read_rows must be a function, got 0"),
        ({"plain_product": 1}, "plain_product must be a function or None, got 1"),
        ({"num_channels": 3}, "num_channels must be a function or None, got 3"),
        ({"hook": max}, "hook must be the name of an attribute or None"),
        ({"corrects_bias": "no"}, "corrects_bias must be True or False, got 'no'"),
    ],
)
def test_a_record_with_an_invalid_field_is_refused(fields, message):
    with pytest.raises(TypeError, match=message):
        dataclasses.replace(GATE, **fields)


@pytest.mark.parametrize("kind", ["x", Gate, None])
def test_only_a_layer_kind_can_be_registered(kind):
    before = _kind.layer_kinds()
    with pytest.raises(TypeError, match="kind must be a jaxq.nn.LayerKind, got"):
        nn.register_layer(kind)
    assert _kind.layer_kinds() == before


@pytest.mark.parametrize("name", _kind._OWN_NAMES)
def test_the_kinds_of_jaxq_cannot_be_removed(name):
    before = _kind.layer_kinds()
    with pytest.raises(ValueError, match=f"{name!r} is one of jaxq's own layer kinds"):
        nn.unregister_layer(name)
    assert _kind.layer_kinds() == before


def test_every_flax_layer_belongs_to_a_kind_of_jaxq():
    kinds = _kind.layer_kinds()
    names = {kind.name for kind in kinds if kind.cls.__module__.startswith("flax.")}
    assert names == set(_kind._OWN_NAMES)
