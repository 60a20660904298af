"""Long tables in two parts: what every run has, and the rest, marked `heavy` and run with `-m heavy`."""

import pytest

import jaxq

# A preset of each kind: whole bytes, halves, a stream of bits, a table, floats; scales of channels, groups, the tensor,
# scales that are quantized themselves; zero points; trained numbers.
REPRESENTATIVES = ("int8", "uint4", "int3", "nf4_dq", "fp8", "mxfp4", "nvfp4", "ttq")


def thinned(cases, default) -> list:
    """`cases` as parameters, heavy but for those in `default`."""
    cases, default = list(cases), list(default)
    assert all(case in cases for case in default), (
        "default names a case that is not in the table"
    )
    params = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        params.append(
            pytest.param(*values, marks=() if case in default else pytest.mark.heavy)
        )
    return params


over_presets = pytest.mark.parametrize(
    "preset", thinned(jaxq.presets(), REPRESENTATIVES)
)
