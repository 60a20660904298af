"""`quantize_checkpoint`: shards in, shards out, one parameter at a time."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.files import (
    CONFIG,
    INDEX,
    SINGLE,
    NewFile,
    TensorFile,
    TensorStream,
    is_file,
    naming_errors,
    remove_leftovers,
)
from jaxq.io.checkpoint._checkpoint import Checkpoint, read_checkpoint
from jaxq.io.checkpoint._compiled import CompiledConversions
from jaxq.io.checkpoint._export import (
    Convert,
    combined_config,
    index_text,
    json_text,
    shard_names,
    shards,
    tensors_of,
)
from jaxq.io.checkpoint._parts import is_table, parts_of
from jaxq.io.checkpoint._stream_job import RECORD, Job
from jaxq.io.checkpoint._stream_pieces import read_pieces
from jaxq.io.checkpoint._stream_plan import (
    KINDS,
    Step,
    plan_steps,
    quantized_weight,
)
from jaxq.io.checkpoint._stream_statistics import Statistics
from jaxq.io.checkpoint._targets import Target, WeightSettings, target
from jaxq.qtensor import QuantSpec
from jaxq.recipes import Recipe, as_recipe

_CALLER = "jaxq.io.quantize_checkpoint"
_SHARD_BYTES = 2 * 10**9
# No format stores a weight in more tensors than this.
_MOST_TENSORS = 12


def quantize_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: str | QuantSpec | Recipe,
    *,
    format: str = "compressed-tensors",
    statistics: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    shard_bytes: int = _SHARD_BYTES,
    progress: bool | None = None,
) -> dict[str, str]:
    """Quantizes a checkpoint that may be larger than the memory.

    Parameters are read, quantized and written one by one, and stacks of experts matrix
    by matrix. While one is quantized, threads read the next one and write the last one.
    Memory holds at most about four times the largest parameter or matrix, whatever the
    size of the model is.

    If the run is killed, call the function again with the same arguments. It checks the
    hashes of the whole shards, and goes on with the next shard. `config.json` is
    written last, so no reader takes a part for the whole.

    Args:
      source: a directory or a GGUF file, as in `read_checkpoint`. Quantized weights are
        dequantized first.
      out: a directory, which is made if it does not exist.
      recipe: as in `jaxq.quantize_model`, without observers, corrected biases, and
        methods that move scales between layers (AWQ, SmoothQuant). A path is that of
        the module: "model/layers/0/mlp/up_proj", or without "model/". The path of an
        expert may leave out its number.
      format: as in `export`, without "gguf" and "hf". The specs of the recipe must fit.
        "mxfp4" quantizes the stacks of experts of GPT-OSS, and leaves all other weights
        in floats.
      statistics: the statistics of the layers' inputs, for methods that need data, such
        as GPTQ. This is a file of `jaxq statistics`, the result of `jaxq.nn.calibrate`,
        or a file of `jaxq.save` with this result. Of a file, only the statistics of a
        few layers are in memory at a time.
      shard_bytes: each shard has the parameters of so many bytes of the source.
      progress: show a line of progress. None shows it on a terminal.

    Returns:
      For each parameter by name: the name of its format, or why it stays as it is.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the recipe is unknown, needs statistics that are missing, or has a
        rule that matches nothing; a weight has a number that is not finite, or does not
        fit the format; a file is damaged; or `out` has a checkpoint, or the record of
        another run.
      OSError: a file cannot be read or written. The error names it.

    Example:
      >>> import os, numpy as np, jaxq
      >>> from safetensors.numpy import save_file
      >>> os.makedirs("floats", exist_ok=True)
      >>> save_file({"up.weight": np.ones((64, 32), np.float32)},
      ...   "floats/model.safetensors")
      >>> with open("floats/config.json", "w") as file:
      ...   size = file.write("{}")
      >>> jaxq.io.quantize_checkpoint("floats", "quantized", "int8")
      {'up.weight': 'int8'}
      >>> with jaxq.io.read_checkpoint("quantized") as checkpoint:
      ...   checkpoint["up.weight"].spec.fmt.name
      'int8'
    """
    recipe = as_recipe(recipe, _CALLER)
    kind = target(format, _CALLER)
    out = Path(out)
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(
            read_checkpoint(source, dequantize=True, caller=_CALLER)
        )
        stats = None
        if statistics is not None:
            stats = Statistics(statistics, stack, _CALLER)
        steps = plan_steps(checkpoint, recipe, kind, stats, _CALLER)
        _try_each_shape(checkpoint, steps, kind, format)
        with naming_errors(out, _CALLER, "the directory cannot be written"):
            out.mkdir(parents=True, exist_ok=True)
        job = _job(checkpoint, out, recipe, format, stats, shard_bytes)
        groups = shards({step.name: step.num_bytes for step in steps}, shard_bytes)
        names = shard_names(len(groups))
        by_name = {step.name: step for step in steps}
        line = _ProgressLine(sum(step.num_bytes for step in steps), progress)
        convert = CompiledConversions()
        settings: dict[str, WeightSettings] = {}
        for name, group in zip(names, groups, strict=True):
            own_steps = [by_name[parameter] for parameter in group]
            finished = job.finished(name)
            if finished is None:
                written = _write_shard(
                    out / name, checkpoint, own_steps, stats, kind, convert, line
                )
                job.add(name, settings=_as_json(written))
            else:
                written = _from_json(finished["settings"])
                line.skip(sum(step.num_bytes for step in own_steps))
            settings |= written
        line.end()
        _finish(checkpoint, out, names, steps, settings, kind, format)
        job.end()
        return {step.name: _outcome(step) for step in steps}
    raise AssertionError  # an ExitStack does not hide errors


def _job(
    checkpoint: Checkpoint,
    out: Path,
    recipe: Recipe,
    format: str,
    stats: Statistics | None,
    shard_bytes: int,
) -> Job:
    """The record of this run.

    Raises:
      ValueError: the directory has a checkpoint, or the record of another run.
    """
    description = {
        "version": 1,
        "source": checkpoint.fingerprint(),
        "recipe": _described(recipe),
        "format": format.lower().replace("-", "_"),
        "shard_bytes": shard_bytes,
    }
    if stats is not None:
        description["statistics"] = stats.fingerprint()
    has_checkpoint = is_file(out / CONFIG, _CALLER)
    has_record = is_file(out / RECORD, _CALLER)
    if has_checkpoint and not has_record:
        raise ValueError(
            f"{_CALLER}: {out} has a checkpoint already. Use another directory."
        )
    return Job(out, description, _CALLER)


def _described(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON, with the kinds of layers that checkpoints have.

    A rule for all kinds lists those that are registered. Another process may have
    registered other kinds, and it must continue the same job.
    """
    described = recipe.to_dict()
    for rule in described["rules"]:
        if rule.get("kinds") is not None:
            rule["kinds"] = [kind for kind in rule["kinds"] if kind in KINDS]
    return described


def _try_each_shape(
    checkpoint: Checkpoint, steps: list[Step], kind: Target, format: str
) -> None:
    """Quantizes a weight of ones of each shape, so that errors come before the work.

    Raises:
      ValueError: weights do not fit their spec or the format. One error lists them.
    """
    problems, tried = [], set()
    for step in steps:
        if step.rule is None:
            continue
        shape = checkpoint.eval_shape(step.name)
        sizes = shape.shape[1:] if step.num_slices else shape.shape
        key = (sizes, str(shape.dtype), step.rule, is_table(step.name))
        if key in tried:
            continue
        tried.add(key)
        try:
            ones = jnp.ones(sizes, shape.dtype)
            tensors_of(step.name, quantized_weight(ones, step), kind)
        except ValueError as error:
            problems.append(f"{step.name}: {error}")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(
            f"{_CALLER}: format={format!r} cannot hold these weights:\n{lines}"
        )


def _write_shard(
    path: Path,
    checkpoint: Checkpoint,
    steps: list[Step],
    stats: Statistics | None,
    kind: Target,
    convert: Convert,
    line: _ProgressLine,
) -> dict[str, WeightSettings]:
    """Writes one shard. If a run is killed, the next run removes its temporary file.

    Returns:
      The settings of the quantized weights by the path of their module.
    """
    remove_leftovers(path.parent, path.name)
    settings: dict[str, WeightSettings] = {}
    names = [name for step in steps for name in _names_of_tensors(step)]
    most_bytes = 2 * sum(step.num_bytes for step in steps)
    with (
        NewFile(path, _CALLER) as file,
        _Writer() as writer,
        contextlib.closing(read_pieces(checkpoint, steps)) as values,
    ):
        stream = TensorStream(file, names, most_bytes)
        for piece, value in values:
            step = piece.step
            if step.rule is None:
                tensors = {step.name: np.asarray(value)}
            else:
                weight = jax.device_put(value, may_alias=True)
                del value
                qt = quantized_weight(weight, step, piece.statistics(stats))
                del weight
                tensors, own = tensors_of(step.name, qt, kind, convert)
                del qt
                assert own is not None
                settings[step.name.removesuffix(".weight")] = own
            count = step.num_slices
            writer.call(
                lambda tensors=tensors, count=count: _add_all(stream, tensors, count)
            )
            del tensors
            line.add(piece.num_bytes)
        writer.wait()
        stream.finish({"format": "pt"})
    return settings


def _names_of_tensors(step: Step) -> list[str]:
    """One name for each tensor that a step may write, to reserve space in the header.

    The names of the tensors of a quantized weight end in another way.
    """
    return [step.name] * (1 if step.rule is None else _MOST_TENSORS)


def _add_all(
    stream: TensorStream, tensors: Mapping[str, np.ndarray], num_slices: int
) -> None:
    """Appends the tensors of a parameter, or of one matrix of a stack."""
    for name, tensor in tensors.items():
        if num_slices:
            stream.add_rows(name, tensor[None], num_slices)
        else:
            stream.add(name, tensor)


class _Writer:
    """A thread that writes tensors while the next ones are computed.

    It makes one call at a time, in their order.
    """

    def __init__(self):
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._thread.is_alive():
            self._calls.put(None)
            self._thread.join()

    def call(self, function: Callable[[], None]) -> None:
        """Makes a call after the earlier ones. Raises the error of an earlier call."""
        if self._error is not None:
            raise self._error
        self._calls.put(function)

    def wait(self) -> None:
        """Waits for all calls, and raises the error of one of them."""
        self._calls.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            function = self._calls.get()
            if function is None:
                return
            try:
                if self._error is None:
                    function()
            except BaseException as error:
                self._error = error


def _finish(
    checkpoint: Checkpoint,
    out: Path,
    names: list[str],
    steps: list[Step],
    settings: Mapping[str, WeightSettings],
    kind: Target,
    format: str,
) -> None:
    """Writes the index, the files of the tokenizer, and at last the config."""
    parts = parts_of(checkpoint, _CALLER)
    floats = [
        step.name.removesuffix(".weight")
        for step in steps
        if step.rule is None
        and step.name.endswith(".weight")
        and len(checkpoint.eval_shape(step.name).shape) == 2
    ]
    config = dict(parts.config)
    config["quantization_config"] = combined_config(settings, floats, kind, format)
    texts: dict[str, str | bytes] = dict(parts.files)
    # A file of an earlier checkpoint would be read instead of the new shards.
    (out / (INDEX if names == [SINGLE] else SINGLE)).unlink(missing_ok=True)
    if names != [SINGLE]:
        sizes = {}
        for name in names:
            with TensorFile(out / name, _CALLER) as file:
                sizes[name] = {
                    tensor: header.stop - header.start
                    for tensor, header in file.headers.items()
                }
        texts[INDEX] = index_text(sizes)
    texts[CONFIG] = json_text(config)  # the last one
    for name, text in texts.items():
        remove_leftovers(out, name)
        with NewFile(out / name, _CALLER) as file:
            file.write(text if isinstance(text, bytes) else text.encode())


def _outcome(step: Step) -> str:
    if step.rule is None:
        return step.reason
    assert isinstance(step.rule.weight, QuantSpec)
    return step.rule.weight.fmt.name


def _as_json(settings: Mapping[str, WeightSettings]) -> dict[str, Any]:
    return {
        module: {"layout": own.layout, "inputs": own.inputs}
        for module, own in settings.items()
    }


def _from_json(entries: Mapping[str, Any]) -> dict[str, WeightSettings]:
    return {module: WeightSettings(**own) for module, own in entries.items()}


class _ProgressLine:
    """A line on stderr: bytes of the source, GB/s and the time left."""

    def __init__(self, total: int, progress: bool | None):
        self._is_shown = sys.stderr.isatty() if progress is None else progress
        self._total, self._done, self._skipped = total, 0, 0
        self._start = time.monotonic()

    def add(self, num_bytes: int) -> None:
        """Adds bytes that were quantized, and shows the new line."""
        self._done += num_bytes
        if not self._is_shown:
            return
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = (self._done - self._skipped) / seconds
        left = (self._total - self._done) / max(rate, 1)
        text = (
            f"\rquantizing: {self._done / 1e9:.2f}/{self._total / 1e9:.2f} GB, "
            f"{rate / 1e9:.2f} GB/s, {left:.0f} s left    "
        )
        print(text, end="", file=sys.stderr, flush=True)

    def skip(self, num_bytes: int) -> None:
        """Counts bytes that an earlier run quantized."""
        self._done += num_bytes
        self._skipped += num_bytes

    def end(self) -> None:
        """Ends the line."""
        if self._is_shown:
            print(file=sys.stderr, flush=True)
