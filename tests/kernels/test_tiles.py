"""The tile table: every entry is found, fits its kernel and lowers; elsewhere the kernel's rule holds."""

import pytest

from jaxq.kernels import KERNELS, Problem, _tiles
from tests.kernels.problems import CUSTOM_CALL, lowered, problem

ENTRIES = _tiles.table()
LAYOUT = {"tpu": "columns", "mosaic_gpu": "rows", "triton": "rows"}


def problem_of(entry: dict) -> Problem:
    """The product an entry is for; sizes of its own where it is for all."""
    sizes = {name: entry.get(name) or 4096 for name in ("k", "n")}
    other = {
        "x_dtype": entry["x"],
        "scale_dtype": "bfloat16",
        "layout": LAYOUT[entry["kernel"]],
    }
    return problem(entry["codes"], m=entry["m"], group=entry["group"], **sizes, **other)


def test_entries_say_what_they_are_for():
    names = {name for found in KERNELS.values() for name in found}
    keys = [
        tuple(
            e.get(k) for k in ("kernel", "device", "codes", "x", "group", "m", "k", "n")
        )
        for e in ENTRIES
    ]
    assert len(set(keys)) == len(keys), "two entries for one thing"
    for entry in ENTRIES:
        assert entry["kernel"] in names
        assert entry["source"] in ("measured", "schedule")
        assert entry["m"] == _tiles.bucket(entry["m"])
        assert entry["source"] != "measured" or entry["us"] > 0


@pytest.mark.parametrize(
    "entry",
    ENTRIES,
    ids=lambda e: f"{e['device']}-{e['codes']}-{e['x']}-{e['m']}".replace(" ", ""),
)
def test_every_entry_is_found_and_lowers(entry):
    product = problem_of(entry)
    module = _tiles.kernel(entry["kernel"])
    assert module.why_not(product, entry["device"]) is None
    assert _tiles.lookup(entry["kernel"], entry["device"], product) == entry["tiles"]
    assert _tiles.source(entry["kernel"], entry["device"], product) == entry["source"]
    assert CUSTOM_CALL[entry["kernel"]] in lowered(
        module, product, entry["tiles"], entry["device"]
    )


def test_buckets():
    assert [_tiles.bucket(m) for m in (0, 1, 16, 17, 64, 65, 2048, 100_000)] == [
        16,
        16,
        16,
        32,
        64,
        128,
        2048,
        2048,
    ]


@pytest.mark.parametrize("name", LAYOUT)
def test_where_the_table_is_silent_the_kernels_rule_holds(name):
    product = problem("int4", m=17, layout=LAYOUT[name])
    assert _tiles.source(name, "a device of no table", product) == "rule"
    assert _tiles.lookup(name, None, product) == _tiles.kernel(name).default_tiles(
        product, None
    )


def test_all_kernels_are_in_this_test():
    assert (
        {name for names in KERNELS.values() for name in names}
        == set(LAYOUT)
        == set(CUSTOM_CALL)
    )
