"""Where codes, scales and results lie on a mesh of devices."""

from jaxq.sharding._explicit_axes import lay_out, over_explicit_axes, spec_of
from jaxq.sharding._placement import on_auto_axes, placed_like

__all__ = ["lay_out", "on_auto_axes", "over_explicit_axes", "placed_like", "spec_of"]
