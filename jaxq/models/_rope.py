"""Rotary position embeddings: frequencies, their scaling, and the rotation.

References:
    Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.
    Chen et al., Extending Context Window of Large Language Models via Positional
    Interpolation, 2023 (linear).
    Peng et al., YaRN: Efficient Context Window Extension of Large Language Models,
    2023 (yarn, and dynamic in section 3).
    Llama team, The Llama 3 Herd of Models, 2024 (llama3).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The fields of a RopeScaling that each kind reads.
FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "truncate",
    ),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the training context.

    Args:
        kind: "default" changes nothing. "linear" divides every frequency by `factor`.
            "dynamic" raises the base of the wavelengths when a text is longer than the
            training context. "llama3" and "yarn" divide low frequencies by `factor`,
            keep high frequencies, and blend between the two.
        factor: the stretch, at least 1.
        low_freq_factor: for "llama3". A wavelength above
            `original_max_position_embeddings / low_freq_factor` tokens counts as a low
            frequency.
        high_freq_factor: for "llama3". A wavelength below
            `original_max_position_embeddings / high_freq_factor` tokens counts as a
            high frequency.
        original_max_position_embeddings: the training context in tokens, for "llama3",
            "yarn" and "dynamic".
        attention_factor: for "yarn": queries and keys are multiplied by it. None means
            `0.1 log(factor) + 1`.
        beta_fast: for "yarn". A frequency with more turns over the training context
            counts as high.
        beta_slow: for "yarn". A frequency with fewer turns counts as low.
        truncate: for "yarn": round the ends of the blend to whole frequencies.

    Raises:
        ValueError: `kind` is unknown.

    Example:
        >>> RopeScaling("linear", factor=2.0).factor
        2.0
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self):
        if self.kind not in FIELDS:
            raise ValueError(
                f"RopeScaling: kind is {self.kind!r}; expected one of "
                f"{', '.join(FIELDS)}."
            )


class Rotation(NamedTuple):
    """The cosines and sines that rotate queries and keys.

    Attributes:
        cos: float32 [1 or b, t, 1, h/2].
        sin: float32 [1 or b, t, 1, h/2].
    """

    cos: jax.Array
    sin: jax.Array


def rotation_at(
    positions: jax.Array,
    lengths: jax.Array,
    theta: float,
    head_dim: int,
    scaling: RopeScaling,
) -> Rotation:
    """The rotation of tokens at some positions.

    Args:
        positions: int32 [1 or b, t].
        lengths: int32 [1 or b], of the whole texts, for the kind "dynamic".
        theta: base of the wavelengths.
        head_dim: width h of a head.
        scaling: how frequencies are stretched.
    """
    if scaling.kind == "dynamic":
        frequencies = _dynamic_frequencies(lengths, theta, head_dim, scaling)
    else:
        frequencies = jnp.asarray(rope_frequencies(theta, head_dim, scaling))[None]
    angles = positions.astype(jnp.float32)[..., None] * frequencies[:, None]
    factor = _attention_factor(scaling)
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    return Rotation(cos[:, :, None], sin[:, :, None])


def rotate_heads(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates the pairs (i, i + h/2) of every head: `[b, t, heads, h]`."""
    first, second = jnp.split(x, 2, axis=-1)
    rotated = [
        first * rotation.cos - second * rotation.sin,
        second * rotation.cos + first * rotation.sin,
    ]
    return jnp.concatenate(rotated, axis=-1)


def rope_frequencies(theta: float, head_dim: int, scaling: RopeScaling) -> np.ndarray:
    """Radians per token, float32 [h/2], for a scaling other than "dynamic"."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = 1.0 / np.float32(theta) ** exponents
    frequencies = frequencies.astype(np.float32)
    if scaling.kind == "default":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor)
    if scaling.kind == "llama3":
        keep = _llama3_share(frequencies, scaling)
    else:
        keep = _yarn_share(theta, head_dim, scaling)
    scaled = (1 - keep) * frequencies / scaling.factor + keep * frequencies
    return scaled.astype(np.float32)


def _llama3_share(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """0 for frequencies to divide by the factor, 1 for those to keep: [h/2]."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # Turns of each frequency over the length that the model was trained on.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    return np.clip((turns - low) / (high - low), 0.0, 1.0)


def _yarn_share(theta: float, head_dim: int, scaling: RopeScaling) -> np.ndarray:
    """0 for frequencies to divide by the factor, 1 for those to keep: [h/2].

    The paper's equations 17 to 23. The blend is linear in the index of the frequency.
    """
    context = scaling.original_max_position_embeddings

    def index_of(num_turns: float) -> float:
        """Where the frequency is that makes so many turns over the context."""
        wavelength = context / (num_turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the blend is a step
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low)
    return 1 - np.clip(ramp, 0.0, 1.0)


def _attention_factor(scaling: RopeScaling) -> float:
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0


def _dynamic_frequencies(
    length: jax.Array, theta: float, head_dim: int, scaling: RopeScaling
) -> Any:
    """Radians per token for texts of some lengths: `[b] -> [b, h/2]`."""
    context = scaling.original_max_position_embeddings
    length = jnp.maximum(length, context).astype(jnp.float32)
    stretch = scaling.factor * length / context - (scaling.factor - 1)
    base = theta * stretch ** (head_dim / (head_dim - 2))  # [b]
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return 1.0 / base[:, None] ** exponents[None]
