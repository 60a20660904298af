"""Checkpoints of other libraries: their files, over the layouts of single weights.

`_schemes` knows how each library marks quantized weights. `_directory` reads a Hugging
Face directory, and `_gguf` a GGUF file. `Checkpoint` is the mapping from names to
QTensors and arrays. `export` writes, and `_targets` knows what each library expects.
`quantize_checkpoint` reads and writes one parameter at a time.
"""

from jaxq.io.checkpoint._checkpoint import Checkpoint as Checkpoint
from jaxq.io.checkpoint._checkpoint import is_quantized as is_quantized
from jaxq.io.checkpoint._checkpoint import read_checkpoint as read_checkpoint
from jaxq.io.checkpoint._export import export as export
from jaxq.io.checkpoint._parts import CheckpointParts as CheckpointParts
from jaxq.io.checkpoint._parts import companion_files as companion_files
from jaxq.io.checkpoint._parts import register_model as register_model
from jaxq.io.checkpoint._stream import quantize_checkpoint as quantize_checkpoint

__all__: list[str] = []
