"""What the first layer of a network has learned, as a picture."""

import numpy as np
import numpy.typing as npt

from raycnn.drawing.canvas import MARGIN, QUIET, WIDTH, Canvas, Raster, diverging, limit_of

MOST_FILTERS = 64
GAP = 20


def filters(kernels: npt.NDArray[np.float32]) -> bytes:
    """The kernels of a convolution as a PNG, all on one scale: in colour where they look at colours.

    Blue is negative, white is zero, red is positive; of colours mid-gray is zero.

    Args:
        kernels: float32 (filters, channels, height, width).
    """
    count, channels, height, width = kernels.shape
    limit = limit_of(kernels)
    if channels == 3:
        tiles = [_around_gray(k.transpose(1, 2, 0) / limit) for k in kernels[:MOST_FILTERS]]
    else:
        tiles = [diverging(k.mean(axis=0) / limit) for k in kernels[:MOST_FILTERS]]
    title = f"The first layer: {count} learned filters of {height} x {width} px"
    note = "Each slides over the image and answers where the image looks like it."
    canvas = Canvas(title, note if count <= MOST_FILTERS else f"{note} {MOST_FILTERS} of them are shown.")
    if channels == 3:
        canvas.text(WIDTH - MARGIN, MARGIN + 12, "mid-gray is zero", 24, QUIET, anchor="rt")
    else:
        canvas.legend(limit)
    columns = 8 if len(tiles) <= 24 else 16
    canvas.tiles(MARGIN, tiles, columns, (WIDTH - 2 * MARGIN + GAP) // columns - GAP, GAP)
    return canvas.png()


def _around_gray(values: npt.NDArray[np.floating]) -> Raster:
    """Values in [-1, 1] (H, W, 3) as colours with zero in the middle of each channel."""
    return np.round(127.5 + 127.5 * np.clip(values, -1, 1)).astype(np.uint8)
