"""What each shard of a run holds: ``--shard i/n``."""

Shard = tuple[int, int]
"""``(i, n)``: the i-th of n shares, counted from 1."""


def share_of(rows: int, shard: Shard) -> range:
    """Return the rows of a shard: from floor((i-1) rows / n) up to floor(i rows / n), whatever the size of a part.

    All shards together hold every row once; where there are more shards than rows, some hold none.
    """
    i, n = shard
    return range((i - 1) * rows // n, i * rows // n)
