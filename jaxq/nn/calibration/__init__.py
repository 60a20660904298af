"""Calibration: statistics of the inputs of a model's layers, from batches of real data.

`_nnx.py` and `_linen.py` watch the layers of a model. `_traced.py` finds the products
of parameters in a trace of any function, for trees of arrays. All of them use
`_held_out_rows.py` (which rows count), `_batches.py` (the loop over batches) and
`_stats.py` (checks of statistics). `jaxq.observers` computes the statistics, such as
the Hessian.
"""

from jaxq.nn.calibration._batches import Batch, as_batches, copied_batches
from jaxq.nn.calibration._linen import (
    LinenFunction,
    collect_linen_stats,
    linen_call_order,
    run_linen,
)
from jaxq.nn.calibration._linen import calibrate as linen_calibrate
from jaxq.nn.calibration._modes import eval_copy, train_mode_note
from jaxq.nn.calibration._nnx import (
    NnxFunction,
    calibrate,
    call_order,
    collect_stats,
    run_model,
)
from jaxq.nn.calibration._programs import cached_program
from jaxq.nn.calibration._stats import StatsRequest
from jaxq.nn.calibration._traced import (
    ParameterFunction,
    Use,
    Watched,
    collect_traced_stats,
    find_uses,
)

__all__ = ["calibrate", "linen_calibrate"]
