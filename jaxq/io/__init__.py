"""Saving and loading: safetensors with what is not a tensor in the file's metadata.

A file holds a tree (dicts, lists, tuples of arrays, numbers and QTensors) or a model (its arrays by path). Each leaf
of a QTensor is a tensor of its own: `<path>.data`, `<path>.scale` (`<path>.scale.data` if that is quantized),
`<path>.zero_point`, `<path>.offset`, `<path>.codebook`; spec, geometry and packing stand in the metadata, so a tree
needs no template. Writing goes to a temporary file beside the target, which then takes its place: a crash leaves the
old file whole.
"""

from jaxq.io._safetensors import load, save

__all__ = ["load", "save"]
