"""Pictures of noise and folders of them."""

import numpy as np
import pytest
from PIL import Image


def noise(seed, size=(24, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def picture():
    """`picture(seed, size)` gives the same noise in every call."""
    return noise


@pytest.fixture
def pictures(tmp_path):
    """Three pictures without captions."""
    for index, name in enumerate(("b.png", "a.jpg", "c.webp")):
        noise(index).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def captioned():
    """`captioned(path, count)` makes an image folder of pictures with distinct captions, and gives its path."""

    def make(path, count):
        path.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            noise(index).save(path / f"{index:03d}.png")
            (path / f"{index:03d}.txt").write_text(f"caption {index}\n")
        return path

    return make
