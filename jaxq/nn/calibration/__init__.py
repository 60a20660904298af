"""Calibration: statistics of the inputs of a model's layers, from batches of real data.

`_nnx.py` and `_linen.py` watch the layers of a model. They share which rows count
(`_rows.py`), the loop over batches (`_batches.py`), and checks (`_stats.py`). The sums
themselves, the Hessian among them, are in `jaxq.observers`.
"""

from jaxq.nn.calibration._batches import Batch, as_batches, with_progress
from jaxq.nn.calibration._linen import calibrate as linen_calibrate
from jaxq.nn.calibration._linen import collect_linen_stats, linen_call_order
from jaxq.nn.calibration._nnx import calibrate, call_order, collect_stats, run_model
from jaxq.nn.calibration._stats import StatsRequest, as_stats

__all__ = ["calibrate", "linen_calibrate"]
