"""Which values exist: number formats, how a real number becomes a code, and how codes share bytes.

A format is a finite set of numbers with a code for each: integers, floating point of any width, tables. It knows
nothing of scales, axes or storage. `get` finds one by name; `names` lists them.
"""

from jaxq.formats._codebook import (
    CodebookFormat,
    decode_by_table,
    dynamic_map,
    normal_float,
    powers_of_two,
)
from jaxq.formats._float import DoubleFormat, ExponentFormat, FloatFormat
from jaxq.formats._format import Format
from jaxq.formats._integer import FixedPointFormat, IntegerFormat, SignMagnitudeFormat
from jaxq.formats._names import check_choice, unknown_name
from jaxq.formats._packing import (
    Packing,
    as_signed,
    codes_per_pack,
    default_packing,
    field,
    pack,
    unpack,
)
from jaxq.formats._registry import from_dict, get, names, register, to_dict
from jaxq.formats._rounding import MODES as ROUNDING_MODES
from jaxq.formats._rounding import (
    OVERFLOWS,
    check_rounding,
    round_to_float,
    round_to_integer,
)

__all__ = [
    "OVERFLOWS",
    "ROUNDING_MODES",
    "CodebookFormat",
    "DoubleFormat",
    "ExponentFormat",
    "FixedPointFormat",
    "FloatFormat",
    "Format",
    "IntegerFormat",
    "Packing",
    "SignMagnitudeFormat",
    "as_signed",
    "check_choice",
    "check_rounding",
    "codes_per_pack",
    "decode_by_table",
    "default_packing",
    "dynamic_map",
    "field",
    "from_dict",
    "get",
    "names",
    "normal_float",
    "pack",
    "powers_of_two",
    "register",
    "round_to_float",
    "round_to_integer",
    "to_dict",
    "unknown_name",
    "unpack",
]
