"""A folder with a teacher's most probable classes, in one file for each batch of data.

    manifest.json            k, vocabulary size, temperature, number of batches, digest
    00000000.safetensors     indices, log_probs and log_tail of the first batch
    00000001.safetensors     ...

Each file is first written under another name and then renamed. So a file with its final
name is always complete. The metadata of a file has the SHA-256 digest of the inputs
that the teacher read. After the last batch, the number of batches and the digest of all
inputs are added to the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jaxq.distillation._model import PlainFunction, as_model, split_batch
from jaxq.distillation._progress import with_progress
from jaxq.distillation._rows import described
from jaxq.distillation._top_k import TopK, check_top_k

FORMAT = "jaxq.distillation.logits"
VERSION = 1
_MANIFEST = "manifest.json"
# If the probabilities of the first batch differ by more than this on average, another
# teacher wrote the cache. Another device or dtype changes them by less.
_LARGEST_DIFFERENCE = 0.1


class LogitsCache:
    """A teacher's k most probable classes for each batch of a data set, on disk.

    `LogitsCache.write` makes the folder, and `LogitsCache(folder)` opens it. `cache[i]`
    is the `TopK` of batch i. `len(cache)` is the number of batches.

    Args:
      folder: a folder with a cache that `LogitsCache.write` has finished.

    Attributes:
      folder: the folder of the cache.
      k: the number of classes that are stored for each row.
      vocab_size: the number of classes of the teacher.
      temperature: the temperature of the softmax. The loss must use the same.

    Raises:
      FileNotFoundError: the folder has no cache.
      ValueError: the cache is not finished, or was written in another format.

    Example:
      >>> import tempfile, jax.numpy as jnp, jaxq
      >>> teacher = lambda tokens: jnp.eye(8)[tokens]
      >>> batches = [jnp.array([[1, 2, 3]]), jnp.array([[4, 5, 6]])]
      >>> folder = tempfile.mkdtemp()
      >>> cache = jaxq.distillation.LogitsCache.write(folder, teacher, batches, k=2)
      >>> len(cache), cache[1].indices[0, :, 0].tolist()
      (2, [4, 5, 6])
      >>> cache = jaxq.distillation.LogitsCache(folder)
      >>> for tokens, top in cache.batches(batches):
      ...     loss = jaxq.distillation.kd_loss(teacher(tokens), top)
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder, "LogitsCache")
        if manifest is None:
            raise FileNotFoundError(
                f"LogitsCache: {self.folder} has no {_MANIFEST}. LogitsCache.write "
                "makes a cache."
            )
        if manifest["num_batches"] is None:
            raise ValueError(
                f"LogitsCache: the cache in {self.folder} is not finished. Call "
                "LogitsCache.write with the same arguments again. It continues the run."
            )
        self._num_batches: int = manifest["num_batches"]
        self.k: int = manifest["k"]
        self.vocab_size: int = manifest["vocab_size"]
        self.temperature: float = manifest["temperature"]

    @classmethod
    def write(
        cls,
        folder: str | os.PathLike[str],
        teacher: Any,
        batches: Iterable[Any],
        *,
        k: int,
        temperature: float = 2.0,
        dtype: str = "float32",
        progress: bool | None = None,
    ) -> LogitsCache:
        """Runs a teacher over a data set, and stores its most probable classes.

        If a run was stopped, the same call continues it. Batches that are on disk are
        not computed again. The exception is the first batch, which shows whether the
        teacher is the same. A row takes `2 k + 4 (k + 1)` bytes if the vocabulary has
        at most 65,536 classes.

        Args:
          folder: the folder of the cache. It is created if it does not exist. Its
            parent must exist.
          teacher: maps inputs to logits [*rows, vocab_size]. It is an nnx module, a
            pair `(apply, params)` or a function of the inputs. Modules and pairs are
            compiled, and modules run in eval mode. A function is not compiled.
          batches: each is the inputs, or a tuple or list `(inputs, *rest)`. The order
            must be the same in every run.
          k: from 1 to the size of the vocabulary.
          temperature: the temperature of the loss that will read the cache.
          dtype: "float32", or "float16" for 2 bytes less per stored class. Float16
            rounds log-probabilities to about three digits.
          progress: show a progress line. None shows the line if stderr is a terminal.

        Returns:
          The finished cache.

        Raises:
          FileNotFoundError: the parent of the folder does not exist.
          TypeError: `batches` is a single batch.
          ValueError: the folder holds a cache for other data, of another teacher, or
            with another k, temperature or dtype; the folder holds other files; there is
            no batch; the logits have a NaN; or k or the temperature is out of range.
        """
        caller = "LogitsCache.write"
        check_top_k(k, temperature, caller)
        if dtype not in ("float32", "float16"):
            raise ValueError(
                f"{caller}: dtype is {dtype!r}; expected 'float32' or 'float16'."
            )
        if isinstance(batches, jax.Array | np.ndarray | str | dict):
            raise TypeError(
                f"{caller}: batches must be an iterable of batches, got a single "
                f"{type(batches).__name__}. Pass a list: [batch]."
            )
        folder = Path(folder)
        wanted = {"k": k, "temperature": float(temperature), "dtype": dtype}
        _prepare_folder(folder, wanted, caller)
        top_k_of = _top_k_function(teacher, k, temperature, caller)
        digests = []
        for number, batch in enumerate(with_progress(batches, "teacher", progress)):
            inputs, _ = split_batch(batch)
            digest = digest_of(inputs)
            path = _shard(folder, number)
            is_stored = path.exists()
            if is_stored:
                _check_digest(path, digest, number, caller)
            if not is_stored or number == 0:
                top = _checked_top(top_k_of(inputs), number, caller)
                if is_stored:
                    _check_teacher(_read_shard(path), top, folder, caller)
                else:
                    if number == 0:
                        manifest = {**wanted, "vocab_size": top.vocab_size}
                        _write_manifest(folder, manifest, None, None)
                    _write_shard(path, top, digest, dtype)
            digests.append(digest)
        if not digests:
            raise ValueError(
                f"{caller}: there is no batch. An iterator that was read before is "
                "empty. Pass a list."
            )
        if _shard(folder, len(digests)).exists():
            raise ValueError(
                f"{caller}: the cache in {folder} was written for other data: it has "
                f"more than the {len(digests)} batches given. Choose another folder, "
                "or delete this one."
            )
        manifest = _read_manifest(folder, caller)
        assert manifest is not None
        whole = hashlib.sha256("".join(digests).encode()).hexdigest()
        _write_manifest(folder, manifest, len(digests), whole)
        return cls(folder)

    def __len__(self) -> int:
        return self._num_batches

    def __getitem__(self, number: int) -> TopK:
        top, _ = self._read(range(len(self))[number])
        return top

    def batches(self, batches: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
        """Yields the batches with the teacher's classes: `(inputs, top, *rest)`.

        Args:
          batches: the data of `LogitsCache.write`, in the same order. It may end
            earlier.

        Raises:
          ValueError: a batch has other inputs than the cache was written for.
        """
        for number, batch in enumerate(batches):
            inputs, rest = split_batch(batch)
            if number >= len(self):
                raise ValueError(
                    f"LogitsCache.batches: the cache in {self.folder} has {len(self)} "
                    "batches, and the data has more. To add the others, call "
                    "LogitsCache.write with all batches."
                )
            top, digest = self._read(number)
            if digest != digest_of(inputs):
                raise ValueError(
                    _other_data(self.folder, number, "LogitsCache.batches")
                )
            yield (inputs, top, *rest)

    def _read(self, number: int) -> tuple[TopK, str]:
        """The classes of a batch, and the digest of its inputs."""
        indices, log_probs, log_tail, digest = _read_shard(_shard(self.folder, number))
        top = TopK(
            jnp.asarray(indices.astype(np.int32)),
            jnp.asarray(log_probs),
            jnp.asarray(log_tail),
            self.vocab_size,
            self.temperature,
        )
        return top, digest


def digest_of(inputs: Any) -> str:
    """SHA-256 of the numbers of a tree of arrays.

    Equal values have equal digests, whether they are int32 or int64, and whether the
    arrays are of numpy or of jax.
    """
    digest = hashlib.sha256()
    leaves, structure = jax.tree.flatten(inputs)
    digest.update(str(structure).encode())
    for leaf in leaves:
        array = np.asarray(leaf)
        wide = np.int64 if array.dtype.kind in "iub" else np.float64
        array = np.ascontiguousarray(array.astype(wide))
        digest.update(f"{wide.__name__}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


# Files.


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.safetensors"


def _replace(path: Path, data: bytes) -> None:
    """Writes a file. If the process is killed, the old file or no file remains."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _write_shard(path: Path, top: TopK, digest: str, dtype: str) -> None:
    index_dtype = np.uint16 if top.vocab_size <= 1 << 16 else np.int32
    # A log-probability below the lowest float16 number becomes -inf. Both mean 0.
    with np.errstate(over="ignore"):
        tensors = {
            "indices": np.asarray(top.indices).astype(index_dtype),
            "log_probs": np.asarray(top.log_probs).astype(dtype),
            "log_tail": np.asarray(top.log_tail).astype(dtype),
        }
    _replace(path, save(tensors, metadata={"inputs_sha256": digest}))


def _read_shard(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Indices, log_probs, log_tail and the digest of the inputs."""
    try:
        with safe_open(path, framework="numpy") as file:
            digest = (file.metadata() or {})["inputs_sha256"]
            names = ("indices", "log_probs", "log_tail")
            indices, log_probs, log_tail = (file.get_tensor(name) for name in names)
    except (SafetensorError, KeyError, OSError) as error:
        raise ValueError(
            f"LogitsCache: {path} is damaged or missing: {error}. Delete the file, and "
            "call LogitsCache.write again. It writes this file again."
        ) from error
    return indices, log_probs, log_tail, digest


def _write_manifest(
    folder: Path, manifest: dict[str, Any], num_batches: int | None, digest: str | None
) -> None:
    names = ("k", "vocab_size", "temperature", "dtype")
    contents = {
        "format": FORMAT,
        "version": VERSION,
        **{name: manifest[name] for name in names},
        "num_batches": num_batches,
        "inputs_sha256": digest,
    }
    text = json.dumps(contents, indent=2) + "\n"
    _replace(folder / _MANIFEST, text.encode())


def _read_manifest(folder: Path, caller: str) -> dict[str, Any] | None:
    """The manifest, or None if there is none."""
    path = folder / _MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        is_known = manifest["format"] == FORMAT and manifest["version"] == VERSION
    except (ValueError, KeyError, TypeError):
        is_known = False
    if not is_known:
        raise ValueError(
            f"{caller}: {path} is not the manifest of a cache of format version "
            f"{VERSION}. Choose another folder."
        )
    return manifest


def _prepare_folder(folder: Path, wanted: dict[str, Any], caller: str) -> None:
    """Makes the folder, or checks that a cache in it has the wanted options."""
    if not folder.exists():
        if not folder.parent.is_dir():
            raise FileNotFoundError(
                f"{caller}: the folder {folder.parent} does not exist. Create it first."
            )
        folder.mkdir()
        return
    manifest = _read_manifest(folder, caller)
    if manifest is None:
        others = [path.name for path in folder.iterdir() if path.suffix != ".partial"]
        if others:
            raise ValueError(
                f"{caller}: {folder} has no {_MANIFEST}, but other files, such as "
                f"{others[0]}. Choose an empty folder."
            )
        return
    different = [
        f"{name}={manifest[name]!r} (now {value!r})"
        for name, value in wanted.items()
        if manifest[name] != value
    ]
    if different:
        raise ValueError(
            f"{caller}: the cache in {folder} was written with "
            f"{', '.join(different)}. Choose another folder, or delete this one."
        )


# The teacher.


def _top_k_function(teacher: Any, k: int, temperature: float, caller: str) -> Any:
    """A function from inputs to `TopK`."""
    function, arrays = as_model(teacher, caller, "teacher")

    def top_k(logits: Any) -> TopK:
        return TopK.from_logits(logits, k, temperature=temperature)

    if isinstance(function, PlainFunction):
        # jax may not be able to trace a plain function, so only the rest is compiled.
        compiled_top_k = jax.jit(top_k)
        return lambda inputs: compiled_top_k(jnp.asarray(teacher(inputs)))
    compiled = jax.jit(lambda arrays, inputs: top_k(function(arrays, inputs)))
    return lambda inputs: compiled(arrays, inputs)


def _checked_top(top: TopK, number: int, caller: str) -> TopK:
    """The classes, after a check for NaN. One NaN logit makes its whole row NaN."""
    is_nan = np.isnan(np.asarray(top.log_probs)).any(axis=-1)
    if is_nan.any():
        row = [int(index) for index in np.argwhere(is_nan)[0]]
        raise ValueError(
            f"{caller}: the teacher's logits of batch {number}, row {row}, have a NaN "
            "or no finite number. Check the teacher's parameters and its inputs."
        )
    return top


def _check_teacher(
    stored: tuple[np.ndarray, np.ndarray, np.ndarray, str],
    top: TopK,
    folder: Path,
    caller: str,
) -> None:
    """Raises ValueError if the teacher is not the one that wrote the first batch."""
    indices, log_probs, _, _ = stored
    new = np.asarray(top.log_probs, np.float64)
    old = np.asarray(log_probs, np.float64)
    remedy = "Choose another folder, or delete this one."
    problem = f"{caller}: the cache in {folder} was written by another teacher"
    if old.shape != new.shape:
        raise ValueError(
            f"{problem}: its first batch has log_probs {described(log_probs)}, now "
            f"{described(top.log_probs)}. {remedy}"
        )
    # Compare the probabilities of the stored classes. Classes with nearly equal
    # probabilities may change places on another device.
    is_kept = (indices[..., :, None] == np.asarray(top.indices)[..., None, :]).any(-1)
    difference = np.abs(np.exp(old) - np.exp(new)).sum(axis=-1).mean()
    share = 1 - is_kept[..., 0].mean()
    if max(difference, share) > _LARGEST_DIFFERENCE:
        raise ValueError(
            f"{problem}: on the first batch the probabilities differ by "
            f"{difference:.2g}, and {share:.0%} of the most probable classes are no "
            f"longer among the first {top.k}. {remedy}"
        )


def _check_digest(path: Path, digest: str, number: int, caller: str) -> None:
    *_, stored = _read_shard(path)
    if stored != digest:
        raise ValueError(_other_data(path.parent, number, caller))


def _other_data(folder: Path, number: int, caller: str) -> str:
    return (
        f"{caller}: the cache in {folder} was written for other data: the inputs of "
        f"batch {number} have another digest. Pass the batches in the order in which "
        "they were written, or write the new cache to another folder."
    )
