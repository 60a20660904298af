"""How good a language model is on a text, how far it is from a reference, how fast.

A model is any callable that maps tokens int32[b, t] to logits [b, t, vocab]. An nnx
module is compiled here, once per shape. Any other callable is called as it is, so jit
it yourself. `perplexity` and `compare` measure on windows of a text. `time_calls` times
functions in turns, and `peak_memory` says how much memory was used.
"""

from jaxq.evaluation._language import (
    Comparison,
    Estimate,
    compare,
    estimate_perplexity,
    perplexity,
)
from jaxq.evaluation._timing import PeakMemory, Timing, peak_memory, time_calls

__all__ = [
    "Comparison",
    "Estimate",
    "PeakMemory",
    "Timing",
    "compare",
    "estimate_perplexity",
    "peak_memory",
    "perplexity",
    "time_calls",
]
