"""How codes, scales and results are sharded over a mesh of devices.

`_weights.py` shards the codes and scales of a weight as the float weight was sharded.
`_explicit_axes.py` runs functions over mesh axes of explicit type. `_out_sharding.py`
shards a result as the caller's argument `out_sharding=` says.
"""

from jaxq.sharding._explicit_axes import call_on_auto_axes as call_on_auto_axes
from jaxq.sharding._explicit_axes import explicit_spec as explicit_spec
from jaxq.sharding._explicit_axes import on_auto_axes as on_auto_axes
from jaxq.sharding._out_sharding import apply_out_sharding as apply_out_sharding
from jaxq.sharding._weights import shard_like as shard_like

__all__: list[str] = []
