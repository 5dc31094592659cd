"""A run's samples in motion: frames in order, however many; sizes, times and colours as they should be; and what a notebook shows of them."""

import base64
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2ilib.config import ConfigError
from t2ilib.evaluation.animation import HELD, MOST_FRAMES, animate, thinned
from t2ilib.evaluation.sampling import save_pictures, shown_side
from t2ilib.evaluation.showing import show_progress

PROMPTS = ["a red circle", "a blue square on a background that is white"]


def drawn(folder: Path, count: int, side: int = 8) -> dict[int, Path]:
    """Of `count` steps: the first prompt's picture becomes redder, the second is blue."""
    for k in range(count):
        red = 255 * k // max(1, count - 1)
        save_pictures([Image.new("RGB", (side, side), color) for color in ((red, 0, 0), (0, 0, 255))], folder / str(k))
    return {10 * k: folder / str(k) for k in range(count)}


def frames_of(path: Path) -> list[tuple[np.ndarray, float]]:
    with Image.open(path) as found:
        frames = []
        for k in range(found.n_frames):
            found.seek(k)
            found.load()
            frames.append((np.asarray(found.convert("RGB"), int), found.info["duration"] / 1000))
        return frames


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_every_prompt_and_the_grid_move_through_the_steps(tmp_path, kind):
    steps = drawn(tmp_path / "samples", 5)
    written = animate({step: steps[step] for step in reversed(steps)}, PROMPTS, tmp_path / "progress", kind)
    assert [path.name for path in written] == [f"grid.{kind}", f"00.{kind}", f"01.{kind}"]
    frames = frames_of(written[1])
    assert len(frames) == 5
    assert len({frame.shape for frame, _ in frames}) == 1
    reds = [frame[-20, frame.shape[1] // 2] for frame, _ in frames]
    assert np.abs(np.array(reds) - [(255 * k // 4, 0, 0) for k in range(5)]).max() < 12
    assert frames[-1][1] == HELD > frames[0][1]
    bars = [int((np.abs(frame[29] - (51, 102, 204)).max(-1) < 30).sum()) for frame, _ in frames]
    assert bars[0] == 0
    assert np.allclose(bars, [frames[0][0].shape[1] * k / 4 for k in range(5)], atol=4), "how far each step is"
    texts = [(frame[:25] < 128).all(-1).tobytes() for frame, _ in frames]
    assert len(set(texts)) == 5, "each has its step written on it"


def test_pictures_are_enlarged_without_smoothing(tmp_path):
    checks = np.indices((8, 8)).sum(0) % 2 * 255
    for k in range(3):
        save_pictures([Image.fromarray(np.repeat(checks[..., None], 3, 2).astype("uint8"))], tmp_path / str(k))
    (_, single) = animate({k: tmp_path / str(k) for k in range(3)}, ["checks"], tmp_path / "progress", "gif")
    frame = frames_of(single)[0][0]
    picture = frame[-6 - 256 : -6, 12 : 12 + 256]
    assert set(np.unique(picture // 8)) == {0, 31}
    assert np.array_equal(picture[16::32, 16::32, 0] > 128, checks > 128)
    assert [shown_side(side, 128, 256) for side in (8, 64, 96, 128, 200, 512)] == [128, 128, 192, 128, 200, 256]


def test_colours_that_stand_still_are_the_same_in_all_frames(tmp_path):
    rng = np.random.default_rng(0)
    still = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for k in range(4):
        moving = np.full((32, 32, 3), 60 * k, np.uint8)
        save_pictures([Image.fromarray(still), Image.fromarray(moving)], tmp_path / str(k))
    written = animate({k: tmp_path / str(k) for k in range(4)}, PROMPTS, tmp_path / "progress", "gif")
    first, *others = (frame[-6 - 128 : -6, 12 : 12 + 128] for frame, _ in frames_of(written[0]))
    assert all(np.array_equal(first, other) for other in others)


def test_of_many_steps_some_are_left_out_evenly_and_it_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    steps = thinned(range(0, 1000, 5))
    assert (len(steps), steps[0], steps[-1]) == (MOST_FRAMES, 0, 995)
    assert set(np.diff(steps)) == {15, 20}
    assert thinned([3, 5]) == [3, 5]
    written = animate(drawn(tmp_path / "samples", 65, side=4), PROMPTS[:1], tmp_path / "progress", "gif")
    assert len(frames_of(written[0])) == MOST_FRAMES
    assert "60 of 65 sampled steps" in caplog.text


def test_what_a_notebook_shows(tmp_path):
    with pytest.raises(ConfigError, match="has no animation and no strips"):
        show_progress(tmp_path)
    animate(drawn(tmp_path / "samples", 3), PROMPTS, tmp_path / "progress", "gif")
    (tmp_path / "denoising").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "denoising" / "grid.png")
    found = re.findall(r'src="data:(.*?);base64,(.*?)"', show_progress(tmp_path).data)
    assert [kind for kind, _ in found] == ["image/gif", "image/png"]
    assert base64.b64decode(found[0][1]) == (tmp_path / "progress" / "grid.gif").read_bytes()
