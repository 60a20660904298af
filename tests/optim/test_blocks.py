"""Blocks of states: equal parts of the last axis that stay inside a shard."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxq.optim._blocks import tile_of

CASES = {
    "divisible": ((64, 512), (64, 512), 256, (256,)),
    "equal parts of a long axis": ((64, 300), (64, 300), 256, (150,)),
    "a prime axis is padded": ((8, 1009), (8, 1009), 256, (253,)),
    "several rows of a short axis": ((768, 64), (768, 64), 256, (4, 64)),
    "a classifier": ((768, 10), (768, 10), 256, (25, 10)),
    "a convolution": ((64, 32, 3, 3), (64, 32, 3, 3), 256, (16, 3, 3)),
    "part of a shard": ((64, 768), (64, 192), 256, (1, 192)),
    "more than one part of a shard": ((64, 1536), (64, 384), 256, (192,)),
    "a prime shard": ((64, 2 * 521), (64, 521), 256, (521,)),
    "rows of one shard": ((96, 64), (6, 64), 256, (3, 64)),
    "a vector": ((5000,), (5000,), 256, (250,)),
}


@pytest.mark.parametrize("case", CASES)
def test_tile(case):
    shape, shard, size, tile = CASES[case]
    actual = tile_of(shape, shard, size, multiple=1)
    # Leading ones say the same.
    assert math.prod(actual) == math.prod(tile)
    assert actual[-len(tile) :] == tile or actual == tile[-len(actual) :]


@given(
    shards=st.lists(st.integers(1, 600), min_size=1, max_size=3),
    num_shards=st.lists(st.sampled_from([1, 1, 2, 4]), min_size=3, max_size=3),
    size=st.sampled_from([32, 128, 256]),
    multiple=st.sampled_from([1, 2]),
)
def test_blocks_stay_inside_shards_and_are_large(shards, num_shards, size, multiple):
    num_shards = num_shards[: len(shards)]
    shape = tuple(n * s for n, s in zip(shards, num_shards, strict=True))
    if num_shards[-1] > 1 and shards[-1] % multiple:
        multiple = 1  # codes are not packed
    tile = tile_of(shape, tuple(shards), size, multiple=multiple)
    assert len(tile) <= len(shape)
    padded = 1.0
    for part, shard, number in zip(
        tile[::-1], shards[::-1], num_shards[::-1], strict=False
    ):
        if number > 1:
            assert shard % part == 0, "a block crosses the border of a shard"
        padded *= -(-shard // part) * part / shard
    if max(num_shards) == 1 and math.prod(shape) >= 4096:
        # At most one scale for a quarter of `size` elements, and little padding.
        assert size // 4 <= math.prod(tile) <= size
        assert padded < 1.5
