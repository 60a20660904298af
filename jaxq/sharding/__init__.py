"""How results are sharded over a mesh of devices.

`_out_sharding.py` shards a result as the caller's argument `out_sharding=` says.
`jaxq.meshes` has what is known about a mesh without QTensors. `jaxq.qtensor` shards
codes and scales as the float array was sharded.
"""

from jaxq.sharding._out_sharding import apply_out_sharding as apply_out_sharding

__all__: list[str] = []
