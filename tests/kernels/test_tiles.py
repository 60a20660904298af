"""The tile table: every entry is used and lowers. Else the kernel's rule holds."""

import pytest

from jaxq.kernels import Problem, _tiles
from jaxq.kernels._registry import KERNEL_NAMES, kernel_module
from tests.kernels.problems import CUSTOM_CALL, lowered, problem

ENTRIES = _tiles.table()


def problem_of(entry: dict) -> Problem:
    """The product that an entry is for. An entry for all sizes gets some sizes."""
    sizes = {name: entry.get(name) or 4096 for name in ("k", "n")}
    other = {
        "x_dtype": entry["x"],
        "scale_dtype": "bfloat16",
        "layout": entry["layout"],
    }
    return problem(entry["codes"], m=entry["m"], group=entry["group"], **sizes, **other)


def test_entries_are_complete_and_differ():
    facts = ("kernel", "device", "codes", "x", "group", "layout", "m", "k", "n")
    keys = [tuple(entry.get(name) for name in facts) for entry in ENTRIES]
    assert len(set(keys)) == len(keys), "two entries for the same product"
    for entry in ENTRIES:
        assert entry["kernel"] in KERNEL_NAMES
        assert entry["source"] in ("measured", "schedule")
        assert entry["m"] == _tiles.bucket(entry["m"])
        assert entry["source"] != "measured" or entry["us"] > 0


@pytest.mark.parametrize(
    "entry",
    ENTRIES,
    ids=lambda e: f"{e['device']}-{e['codes']}-{e['layout']}-{e['m']}".replace(" ", ""),
)
def test_every_entry_is_found_and_lowers(entry):
    product = problem_of(entry)
    module = kernel_module(entry["kernel"])
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


@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_without_an_entry_the_kernels_rule_holds(name):
    product = problem("int4", m=17, layout="rows")
    assert _tiles.source(name, "a device without entries", product) == "rule"
    assert _tiles.lookup(name, None, product) == kernel_module(name).default_tiles(
        product, None
    )


def test_all_kernels_are_in_this_test():
    assert set(CUSTOM_CALL) == set(KERNEL_NAMES)
