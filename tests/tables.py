"""Long tables of cases in two parts.

Every run has the default cases. The rest is marked `heavy` and runs with `-m heavy`.
docs/testing.md lists the heavy tests with their reasons.
"""

import pytest

import jaxq

# One preset of each kind. Codes: whole bytes, half bytes, a stream of bits, a table,
# floats. Scales: per channel, per group, per tensor, quantized. With zero points, and
# with a trained codebook.
REPRESENTATIVES = ("int8", "uint4", "int3", "nf4_dq", "fp8", "mxfp4", "nvfp4", "ttq")


def thinned(cases, default) -> list:
    """`cases` as parameters; those that are not in `default` are heavy."""
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
