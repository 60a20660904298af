"""Calibration: which range of numbers to quantize, found from batches that come one after another.

An observer is a frozen description with `init(x)`, `update(state, x)`, `merge(a, b)` and `bounds(state, format)`, over
states of arrays of static shape. `minmax`, `absmax` and `moving_average` keep extremes; `percentile`, `mse` and
`entropy` cut outliers; `histogram` shows what there is. `bounds_of(x, format)` answers for one array. `merge_across`
merges the states of devices, and `from_dict` makes an observer of what `to_dict` gave.
"""

from jaxq.observers._entropy import Entropy, entropy
from jaxq.observers._histogram import Histogram, HistogramState, histogram
from jaxq.observers._layer_stats import (
    NUM_HELD_OUT,
    NUM_SAMPLES,
    LayerStats,
    empty_stats,
    update_stats,
)
from jaxq.observers._mse import MeanSquaredError, mse
from jaxq.observers._numbers import Count
from jaxq.observers._observer import Observer, Seen
from jaxq.observers._percentile import Percentile, PercentileState, percentile
from jaxq.observers._range import (
    AbsMax,
    AbsMaxState,
    MinMax,
    MovingAverage,
    MovingAverageState,
    RangeState,
    absmax,
    minmax,
    moving_average,
)
from jaxq.observers._registry import from_dict, names

__all__ = [
    "NUM_HELD_OUT",
    "NUM_SAMPLES",
    "AbsMax",
    "AbsMaxState",
    "Count",
    "Entropy",
    "Histogram",
    "HistogramState",
    "LayerStats",
    "MeanSquaredError",
    "MinMax",
    "MovingAverage",
    "MovingAverageState",
    "Observer",
    "Percentile",
    "PercentileState",
    "RangeState",
    "Seen",
    "absmax",
    "empty_stats",
    "entropy",
    "from_dict",
    "histogram",
    "minmax",
    "moving_average",
    "mse",
    "names",
    "percentile",
    "update_stats",
]
