"""Calibration: observers find the range of numbers to quantize from batches.

An observer is a frozen description. `init(x)` gives a state of arrays of static shape,
`update(state, x)` adds a batch, `merge(a, b)` joins two states, and
`bounds(state, format)` gives the range. `bounds_of(x, format)` gives the range of one
array. `merge_across` merges the states of all devices. `to_dict` and `from_dict` turn
an observer into JSON and back.

- `minmax`, `absmax` and `moving_average` keep the extremes.
- `percentile`, `mse` and `entropy` clip outliers.
- `histogram` gives counts to plot.

`LayerStats` are the statistics of a layer's inputs that quantization methods use.
"""

from jaxq.observers._as_stats import as_stats as as_stats
from jaxq.observers._entropy import Entropy as Entropy
from jaxq.observers._entropy import entropy
from jaxq.observers._histogram import Histogram as Histogram
from jaxq.observers._histogram import HistogramState as HistogramState
from jaxq.observers._histogram import histogram
from jaxq.observers._layer_stats import NUM_HELD_OUT as NUM_HELD_OUT
from jaxq.observers._layer_stats import NUM_SAMPLES as NUM_SAMPLES
from jaxq.observers._layer_stats import LayerStats
from jaxq.observers._layer_stats import empty_stats as empty_stats
from jaxq.observers._layer_stats import merge_stats as merge_stats
from jaxq.observers._layer_stats import scaled_stats as scaled_stats
from jaxq.observers._layer_stats import update_stats as update_stats
from jaxq.observers._mse import MeanSquaredError as MeanSquaredError
from jaxq.observers._mse import mse
from jaxq.observers._numbers import Count as Count
from jaxq.observers._observer import Observer
from jaxq.observers._observer import Totals as Totals
from jaxq.observers._percentile import Percentile as Percentile
from jaxq.observers._percentile import PercentileState as PercentileState
from jaxq.observers._percentile import percentile
from jaxq.observers._range import AbsMax as AbsMax
from jaxq.observers._range import MinMax as MinMax
from jaxq.observers._range import MovingAverage as MovingAverage
from jaxq.observers._range import MovingAverageState as MovingAverageState
from jaxq.observers._range import RangeState as RangeState
from jaxq.observers._range import absmax, minmax, moving_average
from jaxq.observers._registry import from_dict, names

__all__ = [
    "LayerStats",
    "Observer",
    "absmax",
    "entropy",
    "from_dict",
    "histogram",
    "minmax",
    "moving_average",
    "mse",
    "names",
    "percentile",
]
