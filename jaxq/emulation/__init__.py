"""Other arithmetics, emulated: round values to any format, run any JAX function as narrower hardware would.

`cast` rounds an array. `Policy` says how operands, accumulators and results are rounded, `emulate` runs a function so.
"""

from jaxq.emulation._cast import cast
from jaxq.emulation._emulate import emulate
from jaxq.emulation._precision import Policy, Precision

__all__ = ["Policy", "Precision", "cast", "emulate"]
