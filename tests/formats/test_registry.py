"""The registry: names, spelling, suggestions, name patterns, JSON."""

import json

import pytest

from jaxq.formats import (
    CodebookFormat,
    ExponentFormat,
    FloatFormat,
    IntegerFormat,
    from_dict,
    get,
    names,
    register,
    to_dict,
    unregister,
)
from jaxq.formats import _registry as registry_module


@pytest.fixture
def registry(monkeypatch):
    """Restores the registry after the test."""
    monkeypatch.setattr(registry_module, "_registry", dict(registry_module._registry))


def test_get_returns_the_format_of_every_name():
    assert names() == sorted(set(names()))
    for name in names():
        assert get(name).name == name
        assert get(name) is get(name)
        assert get(get(name)) is get(name)


def test_hyphens_capitals_and_spaces_are_accepted():
    assert get("int4-narrow") is get("int4_narrow") is get(" INT4_narrow ")
    assert get("float8-E4M3fn") is get("float8_e4m3fn")


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("nf44", "'nf4'"),
        ("float8_e4m3f", "'float8_e4m3fn'"),
        ("bfloat61", "'bfloat16'"),
        ("int44", "'int4'"),
    ],
)
def test_an_unknown_name_suggests_close_ones(name, suggestion):
    message = f"unknown format '{name}'. Did you mean .*{suggestion}.*names"
    with pytest.raises(ValueError, match=message):
        get(name)


def test_an_unknown_name_without_similar_ones_points_to_the_list():
    message = r"unknown format 'zzzz'. jaxq.formats.names\(\) lists them all"
    with pytest.raises(ValueError, match=message):
        get("zzzz")


def test_get_takes_names_and_formats_only():
    with pytest.raises(TypeError, match="takes a name or a Format, got int"):
        get(8)


def test_register(registry):
    mine = CodebookFormat("Mine-1", (-1.0, 2.0))
    assert register(mine) is mine
    assert "mine_1" in names()
    assert get("mine-1") is mine
    register(CodebookFormat("Mine-1", (-1.0, 2.0)))  # an equal format is accepted
    with pytest.raises(ValueError, match="'mine_1' is taken by CodebookFormat"):
        register(CodebookFormat("mine_1", (-1.0, 3.0)))
    with pytest.raises(ValueError, match="'int4' is taken"):
        register(IntegerFormat("int4", 4, narrow=True))


def test_unregister(registry):
    register(CodebookFormat("Mine-1", (-1.0, 2.0)))
    unregister("MINE-1")
    assert "mine_1" not in names()
    register(CodebookFormat("mine_1", (-1.0, 3.0)))  # the name is free
    with pytest.raises(ValueError, match="formats.unregister: 'int4' is one of jaxq's"):
        unregister("int4")
    with pytest.raises(ValueError, match="unregister: unknown format 'mine_2'. Did"):
        unregister("mine_2")
    # Names of a pattern need no registration, so they cannot be removed.
    with pytest.raises(ValueError, match="unregister: unknown format 'q3.4'"):
        unregister("q3.4")
    with pytest.raises(TypeError, match="name must be a string, got int"):
        unregister(8)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("float5_e2m2fn", (2, 2, 1, "finite")),
        ("float7_e3m3fnuz", (3, 3, 4, "fnuz")),
        ("float10_e5m4", (5, 4, 15, "ieee")),
        ("float9_e4m4fn", (4, 4, 7, "fn")),
        ("float16_e6m9", (6, 9, 31, "ieee")),
    ],
)
def test_any_exmy_name_is_a_format(name, expected):
    fmt = get(name)
    assert fmt == FloatFormat(name, *expected)
    assert fmt.bits == int(name[5:].split("_")[0])


def test_parsed_names_agree_with_registered_ones():
    parsed = {name: registry_module._parse_float(name) for name in names()}
    parsed = {name: fmt for name, fmt in parsed.items() if fmt is not None}
    assert len(parsed) >= 11
    assert all(fmt == get(name) for name, fmt in parsed.items())


def test_invalid_exmy_names_raise():
    with pytest.raises(ValueError, match="e4m3 with its sign has 8 bits, not 9"):
        get("float9_e4m3")
    with pytest.raises(ValueError, match="mantissa_bits 0 to 23"):
        get("float33_e8m24")
    with pytest.raises(ValueError, match="unknown format 'float8_e4m3fm'"):
        get("float8_e4m3fm")


def test_json_round_trip():
    users = [
        CodebookFormat("mine", (0.0, 0.1, 3.0), (0.01, 1.0)),
        ExponentFormat("scale"),
        FloatFormat("odd", 4, 3, 11, "fnuz"),
        IntegerFormat("int4", 4, narrow=True),  # the name of another format
    ]
    for fmt in [*map(get, names()), get("float5_e2m2fn"), *users]:
        assert from_dict(json.loads(json.dumps(to_dict(fmt)))) == fmt
    assert to_dict(get("nf4")) == "nf4"
    with pytest.raises(
        ValueError, match="unknown kind of format 'Nonsense'. Known kinds"
    ):
        from_dict({"type": "Nonsense"})
