"""Where codes and scales lie on a mesh of devices, and how they travel.

`specs` turns the PartitionSpec of a float weight into those of the codes and scales of
its QTensor. `place` puts a model or a tree on a mesh. `fit_to_shards` stores the same
values in smaller groups if a shard would cut a group. `read_rules` reads the
PartitionSpecs of a float model.

A user writes the mesh axes of the weights, as for a float model:

    mesh = jax.make_mesh((2, 4), ("data", "tensor"))
    rules = {
        "**/up/kernel": P(None, "tensor"),
        "**/down/kernel": P("tensor", None),
        "**": P(),
    }
    qmodel = jaxq.sharding.place(qmodel, mesh, rules)

`all_gather`, `reduce_scatter` and `all_reduce` are collectives for `jax.shard_map` that
send codes instead of floats. `mean_gradients` and `init_error` use them in a
data-parallel training step.

`jaxq.qtensor` has the rule for one QTensor, because `quantize` shards codes and scales
as the float array was sharded. `jaxq.meshes` has what is known about a mesh without
QTensors.
"""

from jaxq.sharding._all_gather import all_gather
from jaxq.sharding._entries import WEIGHT_SHARDING as WEIGHT_SHARDING
from jaxq.sharding._entries import WEIGHT_SHARDING_RULES as WEIGHT_SHARDING_RULES
from jaxq.sharding._entries import is_box as is_box
from jaxq.sharding._entries import named_sharding as named_sharding
from jaxq.sharding._entries import present_spec as present_spec
from jaxq.sharding._entries import value_in_box as value_in_box
from jaxq.sharding._fit_to_shards import fit_to_shards
from jaxq.sharding._gradients import init_error, mean_gradients
from jaxq.sharding._place import place
from jaxq.sharding._read_rules import read_rules
from jaxq.sharding._reduce import all_reduce, reduce_scatter
from jaxq.sharding._shardings import Rules as Rules
from jaxq.sharding._shardings import check_mesh as check_mesh
from jaxq.sharding._shardings import shardings_of as shardings_of
from jaxq.sharding._specs import specs

# An import with `as` and the same name is for other rooms of jaxq, not for users.
__all__ = [
    "all_gather",
    "all_reduce",
    "fit_to_shards",
    "init_error",
    "mean_gradients",
    "place",
    "read_rules",
    "reduce_scatter",
    "specs",
]
