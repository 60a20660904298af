"""`jaxq formats` and `jaxq recipes`, against the registries."""

import jaxq


def test_formats(run):
    rows = {row["name"]: row for row in run("formats", "--json").json["formats"]}
    assert list(rows) == jaxq.formats.names()
    assert rows["float8_e4m3fn"]["max"] == 448
    assert rows["int4"]["min"] == -8
    table = run("formats").out
    assert len(table.splitlines()) == 1 + len(rows)
    assert "float8_e4m3fn" in table


def test_recipes(run):
    rows = {row["name"]: row for row in run("recipes", "--json").json["recipes"]}
    assert list(rows) == jaxq.recipes.names()
    assert rows["int4_gptq"]["needs_data"]
    assert rows["w8a8_static"]["needs_data"]
    assert not rows["w4a8"]["needs_data"]
    assert rows["w4a4_rotated"]["rotated"]
    assert rows["w8a8_static"]["inputs"] == "int8 static"
    assert rows["nf4"]["bits_per_weight"] == 4.5
    table = run("recipes").out
    assert len(table.splitlines()) == 1 + len(rows)
    assert "int8 dynamic" in table
