"""A second way to encode: distances to a list of all numbers, in numpy float64."""

import numpy as np

ROUNDINGS = ("nearest_even", "nearest_away", "toward_zero")


def magnitudes(
    exponent_bits: int, mantissa_bits: int, bias: int, flavour: str
) -> np.ndarray:
    """The numbers of all codes without sign, ascending from 0 to the largest.

    One more number follows. It would be the next one if the format had a code for it.
    """
    num_codes = {
        # The top exponent is infinity and NaN.
        "ieee": (2**exponent_bits - 1) << mantissa_bits,
        # The code with all bits set is NaN.
        "fn": (2**exponent_bits << mantissa_bits) - 1,
        "fnuz": 2**exponent_bits << mantissa_bits,
        "finite": 2**exponent_bits << mantissa_bits,
    }[flavour]
    code = np.arange(num_codes + 1)
    exponent = code >> mantissa_bits
    fraction = (code & (2**mantissa_bits - 1)) / 2.0**mantissa_bits
    return np.where(
        exponent == 0,
        2.0 ** (1 - bias) * fraction,
        2.0 ** (exponent - float(bias)) * (1 + fraction),
    )


def encode_float(
    x, exponent_bits, mantissa_bits, bias, flavour, modes
) -> dict[tuple[str, bool], np.ndarray]:
    """Codes of float32 numbers in each mode (rounding, saturate), uint32.

    Each number is compared with the exact distances to its two neighbours.
    """
    numbers = magnitudes(exponent_bits, mantissa_bits, bias, flavour)
    sign_bit, top = 1 << (exponent_bits + mantissa_bits), len(numbers) - 2
    nan, minus = np.isnan(x), np.signbit(x)
    magnitude = np.abs(np.where(nan, np.float32(0), x).astype(np.float64))
    low = np.minimum(np.searchsorted(numbers, magnitude, side="right") - 1, top)
    # The differences are exact: x has 24 bits. It is between two numbers of at most 16
    # bits, or far above the second one.
    below, above = magnitude - numbers[low], numbers[low + 1] - magnitude
    # Without mantissa bits every number except 0 is odd. A tie then goes to the larger
    # magnitude (IEEE 754-2019, section 4.3.1).
    odd = low % 2 == 1 if mantissa_bits else low > 0
    up = {
        "nearest_even": (below > above) | ((below == above) & odd),
        "nearest_away": below >= above,
        "toward_zero": np.isinf(magnitude),  # no finite number overflows toward zero
    }
    overflow = {"ieee": top + 1, "finite": top}.get(flavour, -1)
    nan_code = {
        "ieee": top + 1 + (1 << mantissa_bits >> 1),
        "fn": top + 1,
        "fnuz": sign_bit,
    }.get(flavour)
    if nan_code is None:
        nan_code = np.where(minus, 0, sign_bit)
    codes = {}
    for rounding, saturate in modes:
        code = low + up[rounding]
        code = np.where(code > top, top if saturate else overflow, code)
        negative = minus & ~((flavour == "fnuz") & (code == 0))
        codes[rounding, saturate] = np.where(
            nan | (code < 0), nan_code, code + negative * sign_bit
        ).astype(np.uint32)
    return codes


def neighbours(x, numbers) -> tuple[np.ndarray, np.ndarray]:
    """The neighbours of each x among the ascending `numbers`.

    They are the largest number <= x and the smallest number >= x. Outside of the
    numbers both are the outermost number.
    """
    x, numbers = np.asarray(x, np.float64), np.asarray(numbers, np.float64)
    last = len(numbers) - 1
    below = np.clip(np.searchsorted(numbers, x, side="right") - 1, 0, last)
    above = np.clip(np.searchsorted(numbers, x, side="left"), 0, last)
    return numbers[below], numbers[above]


def hard_numbers(numbers: np.ndarray) -> np.ndarray:
    """The numbers of a format, their midpoints, and the float32 neighbours of both."""
    numbers = np.sort(np.asarray(numbers, np.float64))
    beyond = [
        1.5 * numbers[0] - 0.5 * numbers[1],
        1.5 * numbers[-1] - 0.5 * numbers[-2],
    ]
    points = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2, beyond])
    points = points[np.abs(points) < float(np.finfo(np.float32).max)].astype(np.float32)
    return np.concatenate(
        [
            points,
            np.nextafter(points, np.float32(np.inf)),
            np.nextafter(points, np.float32(-np.inf)),
        ]
    )


def random_patterns(count: int, seed: int) -> np.ndarray:
    """Uniform float32 bit patterns: every exponent, subnormals, infinities and NaN."""
    random = np.random.default_rng(seed)
    return random.integers(0, 2**32, count, dtype=np.uint32).view(np.float32)
