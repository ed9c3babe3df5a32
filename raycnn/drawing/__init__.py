"""How pictures are drawn: a canvas, colours, axes, and letters that the machine's fonts have.

canvas: PNGs on white.   plots: curves.   tiles: rows of thumbnails.   axes: where ticks and names stand, for SVG too.
Nothing is imported here, so that who needs only a tick does not wait for Pillow.
"""
