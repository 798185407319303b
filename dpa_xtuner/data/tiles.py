"""Cuts a large image into tiles of the encoder's own size: dynamic resolution.

The choice is that of InternVL 1.5 (`dynamic_preprocess` in its published code; arXiv 2404.16821,
section 3.2). Of all grids of c columns and r rows with c * r <= `max_tiles`, the one is taken whose
shape is nearest to that of an image of w x h pixels,

    minimise |w / h - c / r|.

Where several are equally near (as 1 x 1 and 2 x 2 always are), one of more tiles is taken if the
image has more than half its pixels: w * h > tile_size ** 2 * c * r / 2. The image is stretched to
c x r tiles, which are cut row by row. Where there is more than one, a thumbnail of the whole image
follows as the last. So an image takes 1, or 3 to `max_tiles` + 1, times the tokens of a tile.

| image       | grid of at most 12 tiles of 336 pixels | pictures with the thumbnail |
|-------------|----------------------------------------|-----------------------------|
| 300 x 300   | 1 x 1                                  | 1                           |
| 600 x 600   | 2 x 2                                  | 5                           |
| 1000 x 250  | 4 x 1                                  | 5                           |
| 1080 x 1920 | 2 x 4                                  | 9                           |
| 448 x 336   | 4 x 3                                  | 13                          |

As the last row shows, the shape decides alone where no other grid is as near, and a small image may
be blown up; a smaller `max_tiles` bounds the cost.
"""

from __future__ import annotations

import functools

from PIL import Image
from xtuner.dataset.utils import expand2square


@functools.lru_cache(maxsize=1 << 16)
def grid(width: int, height: int, max_tiles: int, tile_size: int) -> tuple[int, int]:
    """Chooses the grid of an image.

    Args:
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        max_tiles: Tiles that the grid may have, the thumbnail not counted.
        tile_size: Side of a tile in pixels.

    Returns:
        (columns, rows).
    """
    sides = range(1, max_tiles + 1)
    grids = [(c, r) for c in sides for r in sides if c * r <= max_tiles]
    best, nearest = (1, 1), float("inf")
    for c, r in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - c / r)
        if distance < nearest:
            best, nearest = (c, r), distance
        elif distance == nearest and width * height > 0.5 * tile_size**2 * c * r:
            best = (c, r)
    return best


def count_tiles(size: tuple[int, int], max_tiles: int, tile_size: int) -> int:
    """Counts the pictures that an image becomes.

    Args:
        size: (width, height) in pixels.
        max_tiles: As in `grid`.
        tile_size: As in `grid`.

    Returns:
        The tiles of its grid, and one for the thumbnail where there are several.
    """
    columns, rows = grid(*size, max_tiles, tile_size)
    return columns * rows + (columns * rows > 1)


def cut(
    image: Image.Image,
    max_tiles: int,
    tile_size: int,
    background: tuple[int, int, int] | None = None,
) -> list[Image.Image]:
    """Cuts an image into its tiles.

    Args:
        image: The whole image.
        max_tiles: As in `grid`.
        tile_size: As in `grid`.
        background: Colour in which the thumbnail, or an image of a single tile, is padded to a
            square; None stretches it, as InternVL does.

    Returns:
        `count_tiles` images of `tile_size` x `tile_size` pixels: the tiles row by row, from left to
        right, and the thumbnail last.
    """
    columns, rows = grid(*image.size, max_tiles, tile_size)
    tiles = []
    if columns * rows > 1:
        stretched = image.resize((columns * tile_size, rows * tile_size), Image.Resampling.BICUBIC)
        tiles = [
            stretched.crop((x, y, x + tile_size, y + tile_size))
            for y in range(0, rows * tile_size, tile_size)
            for x in range(0, columns * tile_size, tile_size)
        ]
    if background is not None:
        image = expand2square(image, background)
    return [*tiles, image.resize((tile_size, tile_size), Image.Resampling.BICUBIC)]
