"""Files on disk: whole writes, safetensors, GGUF, and model directories.

`NewFile` writes a file beside its target and then puts it in the target's place. A
crash leaves the old file, or no file. `write_tensors` writes a safetensors file to an
open file. `open_weights` and `write_directory` read and write Hugging Face model
directories. This package knows bytes and arrays only.
"""

from jaxq.files._gguf import GgufFile as GgufFile
from jaxq.files._gguf import NewTensor as NewTensor
from jaxq.files._gguf import write_gguf as write_gguf
from jaxq.files._model_directory import CONFIG as CONFIG
from jaxq.files._model_directory import INDEX as INDEX
from jaxq.files._model_directory import SINGLE as SINGLE
from jaxq.files._model_directory import listed as listed
from jaxq.files._model_directory import open_weights as open_weights
from jaxq.files._model_directory import parse_json as parse_json
from jaxq.files._model_directory import read_text as read_text
from jaxq.files._model_directory import require_file as require_file
from jaxq.files._new_file import NewFile as NewFile
from jaxq.files._new_file import leftovers as leftovers
from jaxq.files._new_file import locked_folder as locked_folder
from jaxq.files._new_file import remove_leftovers as remove_leftovers
from jaxq.files._new_file import sync_folder as sync_folder
from jaxq.files._paths import check_folder as check_folder
from jaxq.files._paths import is_file as is_file
from jaxq.files._paths import naming_errors as naming_errors
from jaxq.files._read_tensors import RefusedFile as RefusedFile
from jaxq.files._read_tensors import TensorFile as TensorFile
from jaxq.files._read_tensors import TensorHeader as TensorHeader
from jaxq.files._tensor_stream import TensorStream as TensorStream
from jaxq.files._write_directory import Weights as Weights
from jaxq.files._write_directory import write_directory as write_directory
from jaxq.files._write_tensors import DTYPES as DTYPES
from jaxq.files._write_tensors import write_tensors as write_tensors

__all__: list[str] = []
