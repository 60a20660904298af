"""The report of `quantize_model`: one row for each parameter, totals, and rendering."""

from jaxq.nn.report._output_error import (
    Inputs,
    LayerErrors,
    can_measure_output,
    layer_errors,
    row_sqnr_of,
)
from jaxq.nn.report._product_notes import multiplies_input, product_note
from jaxq.nn.report._report import Report
from jaxq.nn.report._row import (
    Row,
    element_names,
    float_row,
    other_row,
    planned_row,
    quantized_row,
    skip_reason,
    why_not_weight,
)

__all__ = ["Report", "Row"]
