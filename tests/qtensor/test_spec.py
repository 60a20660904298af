"""QuantSpec: JSON, pickle, equality, and errors about contradictions."""

import dataclasses
import json
import pickle

import pytest

import jaxq
from jaxq import (
    PerBlock,
    PerChannel,
    PerFlat,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
    observers,
)
from jaxq.formats import CodebookFormat, FloatFormat, IntegerFormat, Packing
from jaxq.qtensor import as_static

SPECS = {
    **jaxq.presets(),
    "own table": QuantSpec(
        CodebookFormat("thirds", (-1.0, -1 / 3, 1 / 3, 1.0)), PerFlat(32)
    ),
    "own boundaries": QuantSpec(
        CodebookFormat("log2", (-1.0, 0.0, 0.5, 1.0), (-0.4, 0.2, 0.7))
    ),
    "own float": QuantSpec(
        FloatFormat("float5_e3m1_low", 3, 1, 9, "fn"), PerTensor(), scale="float16"
    ),
    "own integer": QuantSpec(IntegerFormat("int5_mine", 5, narrow=True), PerToken()),
    "any ExMy": QuantSpec("float7_e3m3fn", PerGroup(32, axis=-2)),
    "tiles": QuantSpec("int8", PerBlock((128, 64), pad=True)),
    "three levels": QuantSpec(
        "int4",
        PerGroup(16),
        scale=QuantSpec(
            "uint8", PerGroup(8), scale=QuantSpec("float8_e4m3fn", PerTensor())
        ),
    ),
    "own nested": QuantSpec(
        "nf4",
        PerGroup(64),
        scale=QuantSpec(CodebookFormat("steps", (0.25, 0.5, 1.0)), offset=None),
    ),
    "mean": QuantSpec(
        "nf4", PerGroup(64), scale=QuantSpec("dynamic8", PerFlat(256), offset="mean")
    ),
    "minimum": QuantSpec("uint2", PerGroup(32), offset="min", scale="bfloat16"),
    "order": QuantSpec("int4", rounding="stochastic", packing=Packing.HIGH_FIRST),
    "headroom": QuantSpec("int4", headroom=17 / 16),
    "unbiased": QuantSpec("int4", rounding="stochastic", headroom="unbiased"),
    "rule in float32": QuantSpec("int4", scale_rule="signed_extreme"),
    "rule": QuantSpec(
        "int4", scale_rule="signed_extreme", scale="float16", packing="bitstream"
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_json_and_pickle_round_trips(name):
    spec = SPECS[name]
    for back in (
        QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))),
        pickle.loads(pickle.dumps(spec)),
    ):
        assert back == spec
        assert hash(back) == hash(spec)
        assert back.fmt == spec.fmt
    assert {f.name for f in dataclasses.fields(spec)} == set(spec.to_dict())


def test_every_field_makes_a_difference():
    base = QuantSpec("uint4", PerGroup(32))
    changes = [
        {"format": "int4"},
        {"granularity": PerGroup(16)},
        {"granularity": PerGroup(32, pad=True)},
        {"symmetric": False},
        {"scale": "bfloat16"},
        {"scale": QuantSpec("uint8")},
        {"scale_rule": "absmean"},
        {"rounding": "toward_zero"},
        {"offset": "mean"},
        {"packing": "low_first"},
        {"codes_from": "ideal"},
        {"headroom": 1.5},
    ]
    changed = [base.replace(**c) for c in changes]
    assert len({base, *changed}) == len(changes) + 1
    for spec in changed:
        assert QuantSpec.from_dict(spec.to_dict()) == spec != base
    # clipping is not among the changes: its values are tested in test_bounds.py.
    changed_fields = {field for change in changes for field in change}
    assert {"clipping"} | changed_fields == set(base.to_dict())


def test_a_name_equals_its_format():
    assert QuantSpec("int4") == QuantSpec("INT4") == QuantSpec(jaxq.formats.get("int4"))
    assert QuantSpec("int4", packing="low_first") == QuantSpec(
        "int4", packing=Packing.LOW_FIRST
    )
    assert QuantSpec("int4").order is Packing.HALVES
    assert QuantSpec("int4").replace(format="int3").order is Packing.BITSTREAM
    assert QuantSpec("int4").replace(symmetric=True) == QuantSpec("int4")


MISTAKES = [
    ({"format": "int44"}, ValueError, r"unknown format 'int44'\. Did you mean 'int4'"),
    ({"format": 4}, TypeError, "takes a name or a Format, got int"),
    ({"format": "bfloat16"}, ValueError, "codes have at most 8 bits; bfloat16 has 16"),
    (
        {"granularity": "per_group"},
        TypeError,
        r"granularity must be one of jaxq's Per\.\.\. objects, got 'per_group'",
    ),
    (
        {"granularity": PerChannel},
        TypeError,
        r"granularity must be one of jaxq's Per\.\.\. objects",
    ),
    (
        {"scale": "bfloat"},
        ValueError,
        r"scale must be one of float32, bf.*; got 'bfloat'\. Did you mean 'bfloat16'",
    ),
    (
        {"scale_rule": "absmx"},
        ValueError,
        r"scale_rule must be one of absmax, .*; got 'absmx'\. Did you mean 'absmax'",
    ),
    ({"clipping": "mse"}, ValueError, r"clipping must be one of absmax.*; got 'mse'"),
    (
        {"rounding": "nearest"},
        ValueError,
        r"rounding must be one of .*; got 'nearest'\. Did you mean 'nearest_even'",
    ),
    (
        {"offset": "minimum"},
        ValueError,
        r"offset must be one of mean, min.*; got 'minimum'\. Did you mean 'min'",
    ),
    (
        {"format": "ternary", "scale_rule": "ttq", "rounding": "toward_zero"},
        ValueError,
        "computes codes by a threshold and does not round",
    ),
    (
        {"scale": QuantSpec("ternary", scale_rule="ttq")},
        ValueError,
        "a quantized scale cannot have the ternary rule scale_rule='ttq'",
    ),
    (
        {"packing": "lowfirst"},
        ValueError,
        r"packing must be one of .*; got 'lowfirst'\. Did you mean 'low_first'",
    ),
    (
        {"format": "int3", "packing": "halves"},
        ValueError,
        "packing 'halves' takes codes of 1, 2 or 4 bits, not 3",
    ),
    (
        {"format": "nf4", "symmetric": False},
        ValueError,
        r"needs an integer format and offset=None, got format=nf4",
    ),
    (
        {"symmetric": False, "offset": "min"},
        ValueError,
        "needs an integer format and offset=None, got format=int4 and offset='min'",
    ),
    (
        {"offset": "min"},
        ValueError,
        "needs an unsigned integer format, got format=int4",
    ),
    (
        {"symmetric": False, "scale_rule": "absmean"},
        ValueError,
        "scale_rule='absmean' is for symmetric specs",
    ),
    (
        {"format": "uint4", "scale_rule": "signed_extreme"},
        ValueError,
        "needs negative numbers; uint4 has none",
    ),
    (
        {"scale": "float8_e8m0fnu", "scale_rule": "signed_extreme"},
        ValueError,
        "negative numbers; float8_e8m0fnu has",
    ),
    (
        {"scale": QuantSpec("uint8"), "scale_rule": "signed_extreme"},
        ValueError,
        "negative numbers; uint8 has none",
    ),
    (
        {
            "scale": QuantSpec("int8", offset="mean"),
            "scale_rule": "signed_extreme",
        },
        ValueError,
        "has negative scales, and offset='mean' in scale= is for positive",
    ),
    (
        {"symmetric": False, "scale_rule": "signed_extreme"},
        ValueError,
        "scale_rule='signed_extreme' is for symmetric specs",
    ),
    (
        {"clipping": observers.mse(), "scale_rule": "signed_extreme"},
        ValueError,
        "scale_rule='signed_extreme' does not use a range",
    ),
    ({"headroom": 0.5}, ValueError, "headroom must be a number of at least 1"),
    ({"headroom": True}, ValueError, "headroom must be a number of at least 1"),
    ({"headroom": "most"}, ValueError, "or 'unbiased', got 'most'"),
    ({"headroom": float("nan")}, ValueError, "headroom must be a number"),
    (
        {"headroom": 2.0, "symmetric": False},
        ValueError,
        "headroom=2.0 needs symmetric=True",
    ),
    (
        {"headroom": 2.0, "scale_rule": "absmean"},
        ValueError,
        "headroom=2.0 needs a scale rule that reads the extremes",
    ),
    (
        {"headroom": "unbiased", "codes_from": "ideal"},
        ValueError,
        "needs codes_from='stored'",
    ),
    (
        {"scale": QuantSpec("uint8", symmetric=False)},
        ValueError,
        "a quantized scale must have symmetric=True",
    ),
    (
        {"scale": QuantSpec("uint8", offset="min")},
        ValueError,
        "must not have offset='min'",
    ),
]


@pytest.mark.parametrize(("fields", "error", "message"), MISTAKES)
def test_mistakes_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        QuantSpec(**{"format": "int4"} | fields)


@pytest.mark.parametrize(
    "changes",
    [
        {"symmetric": False},
        {"format": "uint4", "offset": "min"},
        {"format": "uint4"},
        {"clipping": observers.mse()},
        {"scale": "float8_e8m0fnu"},
        {"scale": QuantSpec("uint8")},
        {"scale": QuantSpec("int8", PerFlat(256), offset="mean")},
    ],
)
def test_the_scale_rule_gives_way_to_an_edit(changes):
    spec = jaxq.presets()["int4"]
    assert spec.scale_rule == "signed_extreme"
    edited = spec.replace(**changes)
    assert edited == spec.replace(scale_rule="absmax").replace(**changes)
    assert edited == jaxq.presets()["int4_absmax"].replace(**changes)
    # A rule that the edit names does not give way.
    with pytest.raises(ValueError, match="scale_rule='signed_extreme'"):
        spec.replace(scale_rule="signed_extreme", **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"granularity": PerGroup(32)},
        {"scale": "float32"},
        {"scale": QuantSpec("float8_e4m3fn", PerTensor())},
        {"format": "int8"},
        {"rounding": "stochastic"},
        {"packing": "none"},
    ],
)
def test_the_scale_rule_stays_where_it_fits(changes):
    assert jaxq.presets()["int4"].replace(**changes).scale_rule == "signed_extreme"


def test_other_rules_give_way_too():
    presets = jaxq.presets()
    clipped = presets["ternary"].replace(clipping=observers.mse())
    assert clipped.scale_rule == "absmax"
    assert presets["ttq"].replace(format="int4").scale_rule == "absmax"
    assert presets["mxint8"].replace(symmetric=False).scale_rule == "absmax"


def test_a_static_range_has_no_sign():
    spec = jaxq.presets()["int4"].replace(granularity=PerTensor())
    assert as_static(spec, "test").scale_rule == "absmax"


def test_descriptions_with_unknown_names():
    good = QuantSpec("int4").to_dict()
    with pytest.raises(
        ValueError,
        match=r"from_dict: unknown field 'scalerule'. Did you mean 'scale_rule'",
    ):
        QuantSpec.from_dict(good | {"scalerule": "absmax"})
    with pytest.raises(ValueError, match="unknown granularity .*'PerRow'"):
        QuantSpec.from_dict(good | {"granularity": {"type": "PerRow"}})
    with pytest.raises(ValueError, match=r"unknown format 'int44'"):
        QuantSpec.from_dict(good | {"format": "int44"})
