"""Number formats: the values that exist, how to round to them, and how to pack codes.

A format is a finite set of numbers with one code for each number. There are integers,
fixed point, floating point of any width, and tables. A format knows nothing of scales,
axes or storage. `get` finds a format by name, and `names` lists all names. `register`
adds a format of your own, and `unregister` removes it. `inspect` shows the bits of one
number.
"""

from jaxq.formats._codebook import (
    CodebookFormat,
    dynamic_map,
    normal_float,
    powers_of_two,
)
from jaxq.formats._codebook import decode_by_table as decode_by_table
from jaxq.formats._float import DoubleFormat, ExponentFormat, FloatFormat
from jaxq.formats._format import Format
from jaxq.formats._inspect import Inspection, inspect
from jaxq.formats._integer import FixedPointFormat, IntegerFormat, SignMagnitudeFormat
from jaxq.formats._names import RecipeName as RecipeName
from jaxq.formats._names import check_choice as check_choice
from jaxq.formats._names import recipe_name as recipe_name
from jaxq.formats._names import register_preset_name as register_preset_name
from jaxq.formats._names import register_recipe_name as register_recipe_name
from jaxq.formats._names import unknown_name as unknown_name
from jaxq.formats._packing import Packing, as_signed, pack, unpack
from jaxq.formats._packing import codes_per_pack as codes_per_pack
from jaxq.formats._packing import default_packing as default_packing
from jaxq.formats._packing import field as field
from jaxq.formats._registry import (
    from_dict,
    get,
    names,
    register,
    to_dict,
    unregister,
)
from jaxq.formats._rounding import MODES as ROUNDING_MODES
from jaxq.formats._rounding import OVERFLOWS as OVERFLOWS
from jaxq.formats._rounding import check_rounding as check_rounding
from jaxq.formats._rounding import round_to_float as round_to_float
from jaxq.formats._rounding import round_to_integer as round_to_integer

# An import with `as` and the same name is for other rooms of jaxq, not for users.
__all__ = [
    "CodebookFormat",
    "DoubleFormat",
    "ExponentFormat",
    "FixedPointFormat",
    "FloatFormat",
    "Format",
    "Inspection",
    "IntegerFormat",
    "Packing",
    "SignMagnitudeFormat",
    "as_signed",
    "dynamic_map",
    "from_dict",
    "get",
    "inspect",
    "names",
    "normal_float",
    "pack",
    "powers_of_two",
    "register",
    "to_dict",
    "unpack",
    "unregister",
]
