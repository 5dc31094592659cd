import ast
import importlib.util
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2ilib.config import ConfigError
from t2ilib.data.pictures import PictureError, examine_mask, load_picture, load_view
from t2ilib.data.views import View, assign, bucket_sizes, default_multiple, magnification, share_cut, view_of

LANCZOS = Image.Resampling.LANCZOS


def diffusers_table(name):
    """A table of diffusers' PixArt pipeline, without importing it: its sizes (height, width)."""
    package = Path(importlib.util.find_spec("diffusers").origin).parent
    tree = ast.parse((package / "pipelines" / "pixart_alpha" / "pipeline_pixart_alpha.py").read_text())
    table = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == name)
    return {(int(h), int(w)) for h, w in ast.literal_eval(table).values()}


@pytest.mark.parametrize(
    ("resolution", "multiple", "table"), [(1024, 64, "ASPECT_RATIO_1024_BIN"), (512, 32, "ASPECT_RATIO_512_BIN")]
)
def test_buckets_are_sdxls(resolution, multiple, table):
    ours, theirs = bucket_sizes(resolution, multiple), diffusers_table(table)
    assert set(ours) <= theirs
    # and of each height from 1:2 to 2:1 they are the widest
    between = {(h, w) for h, w in theirs if 0.5 <= h / w <= 2 and h <= resolution}
    widest = {h: max(w for height, w in between if height == h) for h, _ in between}
    assert {(h, w) for h, w in ours if h <= resolution} == set(widest.items())


@pytest.mark.parametrize("resolution", [8, 16, 24, 64, 96, 256, 512, 640, 768, 1000, 1024])
def test_buckets_of_any_resolution(resolution):
    sizes = bucket_sizes(resolution)
    assert (resolution, resolution) in sizes
    assert set(sizes) == {(w, h) for h, w in sizes}
    multiple = default_multiple(resolution)
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert 0.9 * resolution**2 <= height * width <= resolution**2
        assert 0.5 <= height / width <= 2


def test_multiples():
    sides = {1024: 64, 768: 64, 640: 64, 512: 64, 256: 32, 128: 16, 64: 8, 32: 8, 8: 8, 1000: 8}
    assert {resolution: default_multiple(resolution) for resolution in sides} == sides
    with pytest.raises(
        ConfigError, match=r"data\.resolution: .* multiple of 64, and 544 is none: set it to 512 or 576"
    ):
        bucket_sizes(544, 64)
    with pytest.raises(ConfigError, match=r"set it to 64$"):
        bucket_sizes(24, 64)


def by_hand(sizes, resolution, batch_size, multiple=None):
    """`assign` a picture at a time."""
    ladder = bucket_sizes(resolution, multiple)

    def nearest(size, among):
        return min(among, key=lambda bucket: abs(np.log(bucket[0] / bucket[1]) - np.log(size[0] / size[1])))

    first = [nearest(size, ladder) for size in sizes]
    kept = [bucket for bucket in ladder if first.count(bucket) >= batch_size]
    return [nearest(size, kept) for size in sizes], first


@pytest.mark.parametrize("batch_size", [1, 5, 40])
def test_pictures_go_to_the_nearest_size_that_fills_a_batch(batch_size):
    rng = np.random.default_rng(0)
    ratios = np.exp(np.concatenate([rng.normal(0, 0.05, 60), rng.normal(0.4, 0.1, 60), rng.normal(-0.6, 0.2, 60)]))
    sizes = np.stack([np.rint(900 * ratios), np.full(180, 900)], axis=1).astype(int)
    assigned = assign(sizes, 1024, batch_size, True)
    targets, first = by_hand(sizes.tolist(), 1024, batch_size)
    assert list(map(tuple, assigned.targets)) == targets
    assert assigned.moved.tolist() == [a != b for a, b in zip(targets, first, strict=True)]
    assert assigned.moved.any() == (batch_size > 1)
    assert np.unique(assigned.targets, axis=0, return_counts=True)[1].min() >= batch_size


def test_where_no_size_fills_a_batch_all_go_to_that_of_most():
    sizes = [(100, 200), (100, 190), (100, 100), (200, 100), (205, 100), (195, 100)]
    assigned = assign(sizes, 64, 8, True)
    assert assigned.targets.tolist() == [[80, 48]] * 6
    assert assigned.moved.tolist() == [True, True, True, False, False, False]
    # of equally many, the one nearest to the square
    assert assign([(100, 200), (100, 100)], 64, 8, True).targets.tolist() == [[64, 64]] * 2


def test_repeats_fill_a_batch():
    sizes = [(100, 100)] * 4 + [(200, 100)]
    assert assign(sizes, 64, 4, True).targets.tolist() == [[64, 64]] * 5
    assert assign(sizes, 64, 4, True, repeats=[1, 1, 1, 1, 4]).targets.tolist() == [[64, 64]] * 4 + [[80, 48]]


def test_without_buckets_all_are_square():
    assigned = assign([(100, 200), (300, 100)], 64, 1, False)
    assert assigned.targets.tolist() == [[64, 64]] * 2
    assert not assigned.moved.any()
    assert assign([], 64, 4, True).targets.shape == (0, 2)


def test_a_hundred_thousand_pictures_are_assigned_at_once():
    sizes = np.random.default_rng(0).integers(200, 6000, (118_000, 2))
    begun = time.perf_counter()
    assert len(assign(sizes, 512, 16, True).targets) == 118_000
    assert time.perf_counter() - begun < 1  # 6 ms on an idle core


def test_magnification_and_what_is_cut_off():
    sizes, targets = np.array([(100, 200), (32, 64), (128, 64)]), np.array([(64, 64), (64, 64), (80, 48)])
    assert magnification(sizes, targets).tolist() == [0.64, 2.0, 0.75]
    assert share_cut(sizes, targets).tolist() == pytest.approx([1 / 2, 1 / 2, 1 - 80 / (128 * 0.75)])


@pytest.mark.parametrize("original", [(16, 24), (24, 16), (7, 8), (333, 1000), (64, 64), (427, 640), (3000, 4000)])
def test_a_centred_view_is_the_centre_square(original):
    """By the arithmetic that load_picture always had."""
    height, width = original
    scale = 64 / min(original)
    scaled = (max(64, round(height * scale)), max(64, round(width * scale)))
    view = view_of(original, (64, 64))
    assert view == View(scaled, (scaled[0] - 64) // 2, (scaled[1] - 64) // 2, (64, 64), False)
    assert view.crop == (view.top, view.left)


def test_random_crops_reach_every_place_and_stay_inside():
    views = [view_of((40, 64), (16, 16), "random", 0.25, np.random.default_rng(seed)) for seed in range(2000)]
    assert {view.scaled for view in views} == {(16, 26)}
    assert {view.top for view in views} == {0}
    counts = np.bincount([view.left for view in views])
    assert len(counts) == 11
    assert counts.min() > 120  # of 182 on average
    assert np.mean([view.flipped for view in views]) == pytest.approx(0.25, abs=0.03)
    # three independent numbers, whatever is asked for: the crop does not depend on whether there are flips
    again = [view_of((40, 64), (16, 16), "random", 0.0, np.random.default_rng(seed)) for seed in range(50)]
    assert [view.left for view in again] == [view.left for view in views[:50]]
    flipped = [view.flipped for view in views if view.left < 5]
    assert np.mean(flipped) == pytest.approx(0.25, abs=0.05)


def test_chance_needs_a_generator():
    for arguments in ({"crop": "random"}, {"flip": 0.5}):
        with pytest.raises(ValueError, match="need a generator"):
            view_of((8, 8), (8, 8), **arguments)
    assert view_of((8, 8), (8, 8), flip=1.0).flipped


def test_the_crop_of_a_mirrored_view_is_where_it_lies_in_the_mirrored_picture(tmp_path):
    """SDXL's crop conditioning by value: what is at that place of the mirrored picture is what the network is shown."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    for flipped in (False, True):
        view = View((20, 50), 3, 7, (16, 24), flipped)
        picture = load_view(tmp_path / "x.png", lambda original, view=view: view)
        top, left = picture.crop
        whole = pixels[:, ::-1] if flipped else pixels
        assert (top, left) == ((3, 50 - 7 - 24) if flipped else (3, 7))
        assert np.array_equal(picture.pixels, whole[top : top + 16, left : left + 24])
        assert picture.original == (20, 50)


@pytest.mark.parametrize("target", [(16, 16), (24, 16), (16, 24), (64, 64)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_view_is_the_picture_scaled_and_cut(tmp_path, picture, target, crop):
    source = picture(3, (57, 43))
    source.save(tmp_path / "x.png")
    for seed in range(6):
        view = view_of((43, 57), target, crop, 0.5, np.random.default_rng(seed))
        whole = np.asarray(source.resize(view.scaled[::-1], LANCZOS))
        rows, columns = target
        expected = whole[view.top : view.top + rows, view.left : view.left + columns]
        got = load_view(tmp_path / "x.png", view).pixels
        assert got.shape == (*target, 3)
        assert got.dtype == np.uint8
        assert np.abs(got.astype(int) - (expected[:, ::-1] if view.flipped else expected)).max() <= 1


def test_load_picture_is_the_centred_view(tmp_path, picture):
    picture(0, (57, 43)).save(tmp_path / "x.png")
    loaded = load_picture(tmp_path / "x.png", 16)
    assert np.array_equal(loaded.pixels, load_view(tmp_path / "x.png", view_of((43, 57), (16, 16))).pixels)
    assert (loaded.original, loaded.crop, loaded.mask) == ((43, 57), (0, 2), None)


def test_a_file_that_has_become_another_picture_is_refused(tmp_path, picture):
    picture(0, (24, 16)).save(tmp_path / "x.png")
    with pytest.raises(PictureError, match=r"x\.png: is 24 x 16 pixels, which it was not before"):
        load_view(tmp_path / "x.png", view_of((24, 16), (16, 16)))


def two_halves(size=(32, 16)):
    """White at the left, black at the right."""
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("size", [(32, 16), (128, 64), (8, 4)])
@pytest.mark.parametrize("kind", ["L", "RGB", "RGBA", "1", "P"])
def test_a_mask_is_cut_as_its_picture_is(tmp_path, picture, size, kind, flipped):
    picture(0, (32, 16)).save(tmp_path / "x.png")
    mask = two_halves(size)
    if kind == "RGBA":  # transparent where it does not count
        mask = Image.merge("RGBA", (*[Image.new("L", size, 255)] * 3, mask))
    mask.convert(kind).save(tmp_path / "mask.png")
    view = View((16, 32), 0, 12, (16, 16), flipped)  # columns 12 to 27, of which those below 16 count
    counts = load_view(tmp_path / "x.png", view, mask=tmp_path / "mask.png").mask
    expected = np.repeat(np.where(np.arange(12, 28) < 16, 255, 0)[None], 16, axis=0)
    assert (counts.shape, counts.dtype) == ((16, 16), np.uint8)
    assert np.array_equal(counts, expected[:, ::-1] if flipped else expected)


def test_a_mask_is_the_mean_over_what_a_pixel_covers(tmp_path, picture):
    picture(0, (32, 32)).save(tmp_path / "x.png")
    grey = np.random.default_rng(1).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "mask.png")
    counts = load_view(tmp_path / "x.png", view_of((32, 32), (8, 8)), mask=tmp_path / "mask.png").mask
    assert np.abs(counts - grey.reshape(8, 4, 8, 4).mean(axis=(1, 3))).max() <= 1


def test_alpha_as_mask(tmp_path, picture):
    shown = picture(0, (32, 16)).convert("RGBA")
    shown.putalpha(two_halves())
    shown.save(tmp_path / "x.png")
    view = view_of((16, 32), (16, 16))
    plain = load_view(tmp_path / "x.png", view, "red")
    masked = load_view(tmp_path / "x.png", view, "red", "mask")
    assert plain.mask is None
    assert np.array_equal(plain.pixels, masked.pixels)
    assert np.array_equal(masked.mask, np.repeat(np.where(np.arange(16) < 8, 255, 0)[None], 16, axis=0))
    # with a mask file too, both must let it count
    two_halves().rotate(180).point(lambda value: value // 2 if value else 200).save(tmp_path / "mask.png")
    both = load_view(tmp_path / "x.png", view, "red", "mask", tmp_path / "mask.png").mask
    assert np.array_equal(both, np.repeat(np.where(np.arange(16) < 8, 200, 0)[None], 16, axis=0))
    picture(0, (32, 16)).convert("RGBA").save(tmp_path / "opaque.png")
    assert load_view(tmp_path / "opaque.png", view, alpha="mask").mask is None
    picture(0, (32, 16)).save(tmp_path / "none.png")
    assert load_view(tmp_path / "none.png", view, alpha="mask").mask is None


def test_masks_that_cannot_be_those_of_their_picture(tmp_path, picture):
    picture(0, (200, 100)).save(tmp_path / "x.png")
    for name, size in (("fits", (400, 200)), ("nearly", (201, 100)), ("other", (100, 100)), ("turned", (100, 200))):
        two_halves(size).save(tmp_path / f"{name}.png")
    view = view_of((100, 200), (16, 16))
    for name in ("fits", "nearly"):
        load_view(tmp_path / "x.png", view, mask=tmp_path / f"{name}.png")
        examined = examine_mask(tmp_path / f"{name}.png", tmp_path / "x.png", (100, 200))
        assert (examined.height, examined.width) == Image.open(tmp_path / f"{name}.png").size[::-1]
    for name, told in (("other", "100 x 100"), ("turned", "100 x 200")):
        told = rf"{name}\.png: is {told} pixels, and .*x\.png, whose mask it is, 200 x 100: they must have one shape"
        with pytest.raises(PictureError, match=told):
            load_view(tmp_path / "x.png", view, mask=tmp_path / f"{name}.png")
        with pytest.raises(PictureError, match=told):
            examine_mask(tmp_path / f"{name}.png", tmp_path / "x.png", (100, 200))
    Image.new("L", (200, 100)).save(tmp_path / "black.png")
    with pytest.raises(PictureError, match=r"black\.png: is black everywhere, so nothing of .*x\.png would be learned"):
        examine_mask(tmp_path / "black.png", tmp_path / "x.png", (100, 200))
    with pytest.raises(PictureError, match=r"gone\.png: missing"):
        load_view(tmp_path / "x.png", view, mask=tmp_path / "gone.png")
