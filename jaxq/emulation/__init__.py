"""Emulation of other arithmetic: rounds arrays, and runs functions with rounding.

`cast` rounds an array to a format. A `Policy` says how operands, accumulators and
results are rounded, and `emulate` runs any JAX function under a policy.
"""

from jaxq.emulation._cast import cast
from jaxq.emulation._emulate import emulate
from jaxq.emulation._precision import Policy, Precision
from jaxq.emulation._primitives import NOT_CALLS

__all__ = ["Policy", "Precision", "cast", "emulate"]
