"""Trees of arrays and QTensors in one safetensors file.

`write_tree` writes dicts, lists and tuples of arrays, QTensors and Python numbers.
Other pytree nodes, such as the state of an optimizer, are written as dicts.
`read_tree` returns the same bits. This package does not know models. `jaxq.io` uses it
for `jaxq.save` and `jaxq.load`. `tree_to_numpy` returns the arrays of the file, for
`jaxq.io.to_numpy`.

Each array is one tensor of the file. Each leaf of a QTensor is one tensor too:
`<path>.data`, `<path>.scale` (`<path>.scale.data` if the scale is quantized),
`<path>.zero_point`, `<path>.offset`, `<path>.codebook`, `<path>.input_range`,
`<path>.input_scale`. The structure of the tree, and the spec, geometry and packing of
each QTensor, are JSON in the file's metadata. So `read_tree` needs no template.
"""

from jaxq.serialization._contents import Contents as Contents
from jaxq.serialization._contents import as_file as as_file
from jaxq.serialization._contents import read_contents as read_contents
from jaxq.serialization._contents import read_tree, write_tree
from jaxq.serialization._contents import write_contents as write_contents
from jaxq.serialization._description import describe_contents as describe_contents
from jaxq.serialization._description import shapes_of as shapes_of
from jaxq.serialization._numpy import tree_from_numpy as tree_from_numpy
from jaxq.serialization._numpy import tree_to_numpy as tree_to_numpy
from jaxq.serialization._open_dict import OpenDict as OpenDict
from jaxq.serialization._open_dict import open_dict as open_dict
from jaxq.serialization._read_shards import Index as Index
from jaxq.serialization._read_shards import read_shards as read_shards

__all__ = ["read_tree", "write_tree"]
