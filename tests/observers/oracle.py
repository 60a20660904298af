"""Independent references of the observers in numpy, in float64."""

import math

import numpy as np


def entropy_divergence(h, i, levels):
    """D_i of TensorRT's steps, for counts h of magnitudes and a number of levels.

    The mean divergence of a sample is subtracted. A threshold is invalid if it leaves
    out more than 1/32 of a level's counts.
    """
    h = np.asarray(h, np.float64)
    p, kept = h[:i].copy(), h[:i]
    left_out = h[i:].sum()
    if left_out * levels > h.sum() / 32:
        return math.inf
    p[-1] += left_out
    group = np.arange(i) * levels // i
    mass, holding = np.zeros(levels), np.zeros(levels)
    np.add.at(mass, group, kept)
    np.add.at(holding, group, kept > 0)
    q = np.where(kept > 0, mass[group] / np.maximum(holding[group], 1), 0)
    if (q[p > 0] == 0).any():
        return math.inf
    noise = (holding.sum() - (holding > 0).sum()) / (2 * kept.sum())
    p, q = p[p > 0] / p.sum(), q[p > 0] / q.sum()
    return float((p * np.log(p / q)).sum()) - noise


def entropy_levels(fmt, symmetric, positive, negative):
    """How many levels magnitudes have.

    `positive` and `negative` are the numbers of bins in use on each side.
    """
    values = fmt.values()
    if symmetric:
        return int((values >= 0).sum())
    longer, both = max(positive, negative), positive + negative
    return (len(values) - 1) * longer // both + 1


def counted(x, bins):
    """Width and counts of |x| in the narrowest bins that hold it.

    The width is a power of two.
    """
    magnitude = np.abs(np.asarray(x, np.float64)).ravel()
    width = 2.0**-149
    while math.floor(magnitude.max() / width) >= bins:
        width *= 2
    return width, np.bincount(np.floor(magnitude / width).astype(int), minlength=bins)


def entropy_threshold(x, bins, fmt, symmetric=True):
    """The threshold on |x| of least divergence; of equals the last, at most max |x|.

    The first bin does not count.
    """
    x = np.asarray(x)
    width, h = counted(x, bins)
    h[0] = 0
    if not h.any():
        return float(np.abs(x).max())
    used = int(np.flatnonzero(h)[-1]) + 1
    reach = [
        int(np.floor(side.max() / width)) + 1 if side.size else 0
        for side in (x[x >= width], -x[x <= -width])
    ]
    least, best = math.inf, used
    for i in range(1, used + 1):
        levels = entropy_levels(fmt, symmetric, *(min(i, n) for n in reach))
        divergence = entropy_divergence(h, i, levels) if i >= levels else math.inf
        if divergence < math.inf and divergence <= least:
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
        numbers = (
            values - np.clip(fmt.min - np.rint(low / step), fmt.min, fmt.max)
        ) * step
    distance = np.abs(np.asarray(x, np.float64).ravel()[:, None] - numbers).min(axis=1)
    return (distance**power).mean()
