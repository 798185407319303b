"""Cut a large image into tiles of the encoder's own size: dynamic resolution.

The choice is that of InternVL 1.5 (``dynamic_preprocess`` in its published code; arXiv 2404.16821,
section 3.2). Of all grids of c columns and r rows with c * r <= ``max_tiles``, the one is taken
whose shape is nearest to that of an image of w x h pixels,

    minimise |w / h - c / r|.

Where several are equally near (as 1 x 1 and 2 x 2 always are), one of more tiles is taken if the
image has more than half its pixels: w * h > tile_size ** 2 * c * r / 2. The image is stretched to
c x r tiles, which are cut row by row. Where there is more than one, a thumbnail of the whole image
follows as the last. So an image takes 1, or 3 to ``max_tiles`` + 1, times the tokens of a tile.

| image       | grid of at most 12 tiles of 336 pixels | pictures with the thumbnail |
|-------------|----------------------------------------|-----------------------------|
| 300 x 300   | 1 x 1                                  | 1                           |
| 600 x 600   | 2 x 2                                  | 5                           |
| 1000 x 250  | 4 x 1                                  | 5                           |
| 1080 x 1920 | 2 x 4                                  | 9                           |
| 448 x 336   | 4 x 3                                  | 13                          |

As the last row shows, the shape decides alone where no other grid is as near, and a small image may
be blown up; a smaller ``max_tiles`` bounds the cost.
"""

import functools
from dataclasses import dataclass

from PIL import Image

from dpa_xtuner.pictures import padded


@dataclass(frozen=True)
class Tiling:
    """How images are cut.

    Args:
        max_tiles: tiles that a grid may have, the thumbnail not counted.
        tile_size: side of a tile in pixels, that of the visual encoder's images.
    """

    max_tiles: int
    tile_size: int

    @functools.cached_property
    def _grids(self) -> list[tuple[int, int]]:
        """All grids, (columns, rows), by their number of tiles."""
        sides = range(1, self.max_tiles + 1)
        grids = [(c, r) for c in sides for r in sides if c * r <= self.max_tiles]
        return sorted(grids, key=lambda grid: grid[0] * grid[1])

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Choose the grid, (columns, rows), of an image of so many pixels."""
        best, nearest = (1, 1), float("inf")
        for c, r in self._grids:
            distance = abs(width / height - c / r)
            large = width * height > 0.5 * self.tile_size**2 * c * r
            if distance < nearest or (distance == nearest and large):
                best, nearest = (c, r), distance
        return best

    def count(self, size: tuple[int, int]) -> int:
        """Count the pictures that an image of (width, height) pixels becomes.

        Returns:
            The tiles of its grid, and one for the thumbnail where there are several.
        """
        columns, rows = self.grid(*size)
        return columns * rows + (columns * rows > 1)

    def cut(
        self, image: Image.Image, background: tuple[int, ...] | None = None
    ) -> list[Image.Image]:
        """Cut an image into its tiles.

        Args:
            image: the whole image.
            background: colour in which the thumbnail, or an image of a single tile, is padded to a
                square; None stretches it, as InternVL does.

        Returns:
            :meth:`count` images of ``tile_size`` x ``tile_size`` pixels: the tiles row by row, from
            left to right, and the thumbnail last.
        """
        side = self.tile_size
        columns, rows = self.grid(*image.size)
        tiles = []
        if columns * rows > 1:
            stretched = image.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
            tiles = [
                stretched.crop((x, y, x + side, y + side))
                for y in range(0, rows * side, side)
                for x in range(0, columns * side, side)
            ]
        if background is not None:
            image = padded(image, background)
        return [*tiles, image.resize((side, side), Image.Resampling.BICUBIC)]
