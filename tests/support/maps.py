"""A picture and a map that must stay together."""

import numpy as np


def marked_pair(height, width, top, left, mark_height, mark_width, map_scale=1):
    """A black picture with a white rectangle, and the map that is one exactly there (at map_scale times its size)."""
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    picture[top : top + mark_height, left : left + mark_width] = 255
    level = picture[:, :, 0].astype(np.float32) / 255.0
    return picture, level.repeat(map_scale, axis=0).repeat(map_scale, axis=1)
