# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of figures, whatever their compression."""

import numpy as np
from PIL import Image


def assert_drawn(path, width=800, height=300):
    """An image of at least that size, with at least ten colours, on 1 % of its pixels or more something but white."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[0] >= height and pixels.shape[1] >= width, (path, pixels.shape)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) >= 10, path
    assert float((pixels < 250).any(axis=-1).mean()) > 0.01, path
