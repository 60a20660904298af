"""Independent numpy references, in float64 and one step at a time."""

import math

import numpy as np


def entropy_divergences(h, levels):
    """D_i of TensorRT's steps for i = 0 to len(h) of counts of magnitudes, infinite below `levels`."""
    found = [math.inf] * (len(h) + 1)
    for i in range(levels, len(h) + 1):
        p = [float(v) for v in h[:i]]
        for v in h[i:]:
            p[i - 1] += v
        q = [0.0] * i
        for g in range(levels):
            members = [j for j in range(i) if j * levels // i == g]
            mass, holding = sum(h[j] for j in members), [j for j in members if h[j] > 0]
            for j in holding:
                q[j] = mass / len(holding)
        divergence = 0.0
        for pj, qj in zip(p, q, strict=True):
            if pj > 0:
                divergence += math.inf if qj == 0 else pj / sum(p) * math.log((pj / sum(p)) / (qj / sum(q)))
        found[i] = divergence
    return found


def counted(x, bins):
    """(width, counts of |x|) in the narrowest bins of a power of two that hold all of it."""
    magnitude = np.abs(np.asarray(x, np.float64)).ravel()
    width = 2.0**-149
    while math.floor(magnitude.max() / width) >= bins:
        width *= 2
    return width, np.bincount(np.floor(magnitude / width).astype(int), minlength=bins)


def entropy_threshold(x, bins, levels):
    """The threshold on |x| of least divergence; the last of equals, and never beyond the largest."""
    width, h = counted(x, bins)
    used = int(np.flatnonzero(h)[-1]) + 1
    found = entropy_divergences(list(h[:used]), levels)
    least, best = math.inf, used
    for i, divergence in enumerate(found):
        if divergence <= least and i >= levels:
            least, best = divergence, i
    return float(np.abs(x).max()) if best == used else best * width


def nearest_rank(values, p):
    a = np.sort(np.asarray(values, np.float64).ravel())
    # p has at most six decimals: in millionths everything is whole.
    millionths = round(p * 10**6)
    return a[max(-(-millionths * a.size // 10**8) - 1, 0)]


def quantization_error(x, low, high, fmt, symmetric, power=2.0):
    """Mean |x - nearest number of the scaled format|^power."""
    values = fmt.values().astype(np.float64)
    if symmetric:
        if fmt.kind == "integer":
            values = values[values >= -fmt.max]
        numbers = values * (high / fmt.max)
    else:
        step = (high - low) / (fmt.max - fmt.min)
        numbers = (values - np.clip(fmt.min - np.rint(low / step), fmt.min, fmt.max)) * step
    distance = np.abs(np.asarray(x, np.float64).ravel()[:, None] - numbers).min(axis=1)
    return (distance**power).mean()
