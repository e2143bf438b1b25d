"""Sequences are cut into tiles, and threads share the tiles.

A tile is a few batch rows by some channels. A kernel runs all time steps of one tile before it
turns to the next: what the recurrence carries on stays in the cache, and every sequence is read or
written once. The cut depends on the shape alone, so results do not depend on the number of threads.
"""

from typing import NamedTuple

import torch

TILE = 512  # elements of a tile at one time step, whose state stays in the innermost cache
TILE_CHANNELS = 1024
GROUPS = 16  # a batch with this many rows is cut into at least as many groups of rows
SMALL = 16384  # a sequence of at most so many elements is computed by the calling thread alone


class Tiles(NamedTuple):
    """The tiles of sequences of one shape.

    Attributes:
        rows, columns: the batch rows and the channels of a tile.
        groups: the number of groups of batch rows.
        items: the number of tiles.
        threads: the number of threads that share them.
    """

    rows: int
    columns: int
    groups: int
    items: int
    threads: int


def tiles_of(shape: torch.Size) -> Tiles:
    """The tiles of sequences ``(T, B, N)``."""
    _, batch, channels = shape
    columns = max(1, min(channels, TILE_CHANNELS))
    rows = max(1, min(batch // GROUPS, TILE // columns))
    groups = -(-batch // rows)
    items = groups * -(-channels // columns)
    return Tiles(rows, columns, groups, items, threads_for(items, shape.numel()))


def threads_for(items: int, elements: int) -> int:
    """How many threads share the items, of which so many elements are made."""
    return 1 if elements <= SMALL else min(torch.get_num_threads(), items)
