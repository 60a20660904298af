"""`jaxq evaluate`: a model on a text, alone or beside a reference model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxq import evaluation
from jaxq.cli import _options, _output, _texts

_EXAMPLE = """\b
Example:
  jaxq evaluate tiny_llama_int4 --reference examples/tiny_llama \\
      --text examples/heldout.txt
"""
# Speed is the median of so many calls.
_NUM_CALLS = 5


@click.command(epilog=_EXAMPLE)
@click.argument("model_path", metavar="MODEL", type=_options.MODEL)
@click.option(
    "--text",
    type=_options.FILE,
    multiple=True,
    required=True,
    help="A text file. May be given several times.",
)
@click.option(
    "--reference", type=_options.MODEL, help="The float model to compare with."
)
@_options.context_option
@click.option(
    "--tokens", type=_options.COUNT, help="Read only the first tokens of the text."
)
@click.option(
    "--batch-size",
    type=_options.COUNT,
    default=8,
    show_default=True,
    help="Windows that run at once.",
)
@_options.common
def evaluate(
    model_path: Path,
    text: tuple[Path, ...],
    reference: Path | None,
    context: int | None,
    tokens: int | None,
    batch_size: int,
    as_json: bool,
) -> None:
    """Measure a model on a text.

    MODEL is a directory that `jaxq quantize` wrote, or a Hugging Face directory.
    Standard errors are those over windows of the text.
    """
    model, tokenizer = _texts.load_model(model_path)
    _texts.check_decoder(model_path, model)
    window = _texts.default_context(model, context)
    ids = _texts.read_tokens(tokenizer, text)[:tokens]
    networks = {"model": model}
    if reference is not None:
        networks["reference"] = _texts.load_reference(reference, tokenizer)
    size = {"context": window, "batch_size": batch_size, "progress": None}
    result: dict[str, Any] = {"model": str(model_path), "text": [*map(str, text)]}
    result |= {"context": window}
    if reference is None:
        result |= _alone(evaluation.estimate_perplexity(model, ids, **size))
    else:
        result["reference"] = str(reference)
        compared = evaluation.compare(networks["reference"], model, ids, **size)
        result |= _compared(compared)
    num_windows = min(batch_size, len(ids) // window)
    batch = ids[: num_windows * window].reshape(num_windows, window)
    result["tokens_per_second"] = _speeds(networks, batch)
    result["parameter_bytes"] = {
        name: _texts.parameter_bytes(network) for name, network in networks.items()
    }
    result["peak_memory"] = evaluation.peak_memory()._asdict()
    if as_json:
        _output.print_json(result)
    else:
        _print(result)


def _alone(measured: evaluation.Estimate) -> dict[str, Any]:
    return {
        "windows": measured.num_windows,
        "predictions": measured.num_predictions,
        "perplexity": measured.value,
        "perplexity_error": measured.error,
    }


def _compared(measured: evaluation.Comparison) -> dict[str, Any]:
    result = measured._asdict()
    result["windows"] = result.pop("num_windows")
    result["predictions"] = result.pop("num_predictions")
    return result


def _speeds(networks: dict[str, Any], batch: np.ndarray) -> dict[str, float]:
    """Tokens per second of a forward pass of each model, timed in turns."""
    forward = nnx.jit(lambda network, tokens: network(tokens))
    tokens = jnp.asarray(batch)
    calls = {
        name: (lambda network=network: forward(network, tokens))
        for name, network in networks.items()
    }
    times = evaluation.time_calls(calls, num_calls=_NUM_CALLS, progress=None)
    return {name: batch.size / timing.median for name, timing in times.items()}


def _print(result: dict[str, Any]) -> None:
    click.echo(
        f"{result['predictions']} predictions in {result['windows']} windows of "
        f"{result['context']} tokens; ± is the standard error over windows"
    )
    rows = [("perplexity", _with_error(result, "perplexity"))]
    if "reference" in result:
        rows += [
            (
                "perplexity of the reference",
                _with_error(result, "reference_perplexity"),
            ),
            ("ratio of perplexities", _with_error(result, "perplexity_ratio", 5)),
            ("KL, mean (nats)", _with_error(result, "kl", 5)),
            ("KL, median", f"{result['kl_median']:.5f}"),
            ("KL, 99th percentile", f"{result['kl_p99']:.5f}"),
            ("KL, maximum", f"{result['kl_max']:.5f}"),
            ("same top token", f"{result['top1_agreement']:.2%}"),
            ("flips to right", f"{result['flips_to_right']:.2%}"),
            ("flips to wrong", f"{result['flips_to_wrong']:.2%}"),
        ]
    speeds, sizes = result["tokens_per_second"], result["parameter_bytes"]
    for name, speed in speeds.items():
        rows.append((f"tokens per second, {name}", f"{speed:,.0f}"))
    for name, num_bytes in sizes.items():
        rows.append((f"parameters, {name}", _output.size_text(num_bytes)))
    peak = result["peak_memory"]
    rows.append(
        (f"peak memory of the {peak['where']}", _output.size_text(peak["num_bytes"]))
    )
    _output.print_table(["", "value"], rows)


def _with_error(result: dict[str, Any], name: str, digits: int = 3) -> str:
    return f"{result[name]:.{digits}f} ± {result[f'{name}_error']:.{digits}f}"
