"""Another text than that of the bundled model: the source code of NumPy.

The bundled model has read Python's standard library and no package. NumPy is installed
wherever jaxq is. `numpy.linalg` is held out, and the other packages are training text.
"""

from pathlib import Path

import numpy as np

NUMPY = Path(np.__file__).parent
HELDOUT = "linalg"


def training_tokens(tokenizer, num_tokens: int | None = None) -> np.ndarray:
    """Tokens of files outside numpy.linalg in random order, int32 [num_tokens].

    Without `num_tokens`, these are the tokens of all files.
    """
    files = [path for path in numpy_files() if _package(path) != HELDOUT]
    tokens: list[int] = []
    for i in np.random.default_rng(0).permutation(len(files)):
        if num_tokens is not None and len(tokens) >= num_tokens:
            break
        tokens += tokenizer.encode(files[i].read_text(encoding="utf-8")).ids
    return np.asarray(tokens[:num_tokens], np.int32)


def heldout_tokens(tokenizer, num_tokens: int) -> np.ndarray:
    """The first tokens of numpy.linalg, int32 [num_tokens]."""
    files = [path for path in numpy_files() if _package(path) == HELDOUT]
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    return np.asarray(tokenizer.encode(text).ids[:num_tokens], np.int32)


def numpy_files() -> list[Path]:
    """The source files of NumPy, without tests and generators of other languages."""
    # Not every version of NumPy has distutils.
    excluded = {"tests", "distutils", "f2py"}
    return [
        path
        for path in sorted(NUMPY.rglob("*.py"))
        if not excluded & set(path.relative_to(NUMPY).parts)
    ]


def _package(path: Path) -> str:
    return path.relative_to(NUMPY).parts[0]
