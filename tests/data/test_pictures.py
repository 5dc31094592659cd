import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, features

from t2ilib.config import ConfigError
from t2ilib.data.pictures import PictureError, compose, load_picture, open_picture, scale_greys
from t2ilib.runfile import build_run

RAMP = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
SHOWN = np.rint(RAMP / 257).astype(np.uint8)


def pixels(path, ground="white"):
    opened = open_picture(path, ground)
    assert opened.mode == "RGB"
    return np.asarray(opened)


def grey(values):
    return np.repeat(values[..., None], 3, axis=2)


def cut_out(mode, size=(12, 8)):
    """The left half red and opaque, the right half blue under alpha 0, as `mode`."""
    image = Image.new("RGBA", size, (0, 0, 255, 0))
    image.paste((255, 0, 0, 255), (0, 0, size[0] // 2, size[1]))
    return image if mode == "RGBA" else image.convert(mode)


@pytest.mark.parametrize(("mode", "ending"), [("RGB", "png"), ("L", "png"), ("RGB", "jpg"), ("L", "jpg")])
def test_pixels_without_alpha_are_those_of_the_file(tmp_path, picture, mode, ending):
    picture(0).convert(mode).save(tmp_path / f"x.{ending}")
    with Image.open(tmp_path / f"x.{ending}") as plain:
        assert np.array_equal(pixels(tmp_path / f"x.{ending}", "red"), np.asarray(plain.convert("RGB")))


@pytest.mark.parametrize(("mode", "ending"), [("RGBA", "png"), ("LA", "png"), ("RGBA", "webp"), ("RGBA", "tiff"), ("LA", "tiff"), ("PA", "tiff")])  # fmt: skip
@pytest.mark.parametrize(("ground", "colour"), [("white", (255, 255, 255)), ("#102030", (16, 32, 48))])
def test_alpha_is_composed_onto_the_ground(tmp_path, mode, ending, ground, colour):
    cut_out(mode).save(tmp_path / f"x.{ending}", **{"lossless": True} if ending == "webp" else {})
    shown = pixels(tmp_path / f"x.{ending}", ground)
    red = (76, 76, 76) if mode == "LA" else (255, 0, 0)
    assert np.array_equal(np.unique(shown[:, :6].reshape(-1, 3), axis=0), [red])
    assert np.array_equal(np.unique(shown[:, 6:].reshape(-1, 3), axis=0), [colour])


@pytest.mark.parametrize("mode", ["La", "RGBa", "LA", "RGBA", "PA"])
def test_modes_with_alpha_in_memory(mode):
    source = cut_out("RGBA").convert("LA") if mode in ("La", "LA") else cut_out("RGBA")
    image = source if source.mode == mode else source.convert(mode)
    assert compose(image, (1, 2, 3)).getpixel((11, 0)) == (1, 2, 3)
    assert compose(image, (1, 2, 3)).getpixel((0, 0))[0] in (76, 255)


def test_half_transparent_pixels_are_mixed(tmp_path):
    Image.new("RGBA", (4, 4), (200, 100, 0, 51)).save(tmp_path / "x.png")
    assert np.abs(pixels(tmp_path / "x.png", "black")[0, 0].astype(int) - [40, 20, 0]).max() <= 1
    assert np.abs(pixels(tmp_path / "x.png", "white")[0, 0].astype(int) - [244, 224, 204]).max() <= 1


@pytest.mark.parametrize(
    ("mode", "key", "value"),
    [("L", 40, 40), ("RGB", (10, 20, 30), (10, 20, 30)), ("1", 0, 0), ("I;16", 5000, 5000), ("P", 1, 1), ("P", b"\xff\x00", 1)],
)  # fmt: skip
def test_a_transparent_colour(tmp_path, mode, key, value):
    other = {"L": 200, "RGB": (200, 0, 0), "1": 1, "I;16": 65535, "P": 0}[mode]
    image = Image.new(mode, (8, 8), other)
    if mode == "P":
        image.putpalette([200, 0, 0, 0, 0, 255])
    if mode == "I;16":  # into which Pillow pastes bytes
        image = Image.fromarray(np.repeat(np.array([[other, value]], np.uint16), 4, axis=1).repeat(8, axis=0))
    else:
        image.paste(value, (4, 0, 8, 8))
    image.save(tmp_path / "x.png", transparency=key)
    shown = pixels(tmp_path / "x.png", "#00ff00")
    assert (shown[:, 4:] == (0, 255, 0)).all()
    assert not (shown[:, :4] == (0, 255, 0)).all(2).any()


def write_png(path, bits, kind, key, rows):
    """A PNG by hand, 8 pixels wide: `kind` 0 for grey and 2 for RGB, `key` the transparent colour in the file's depth."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 8, len(rows), bits, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = (chunk(b"IHDR", header), chunk(b"tRNS", key), chunk(b"IDAT", data), chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize(("bits", "raw"), [(1, 0), (1, 1), (2, 2), (4, 11), (8, 77), (16, 0x1234)])
def test_a_transparent_grey_of_every_depth(tmp_path, bits, raw):
    """The first row is of the transparent grey, the second of another."""
    first, second = (
        struct.pack(">H", value) * 8 if bits == 16 else sum(value << (bits * i) for i in range(8)).to_bytes(bits, "big")
        for value in (raw, 2**bits - 1 - raw)
    )
    write_png(tmp_path / "x.png", bits, 0, struct.pack(">H", raw), [first, second])
    shown = pixels(tmp_path / "x.png", "#00ff00")
    assert (shown[0] == (0, 255, 0)).all()
    assert np.abs(shown[1].astype(int) - round(255 * (1 - raw / (2**bits - 1)))).max() <= 1


def test_a_transparent_colour_of_16_bits(tmp_path):
    key = struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC)
    write_png(tmp_path / "x.png", 16, 2, key, [key * 8, b"\xff" * 48])
    assert np.array_equal(pixels(tmp_path / "x.png", "#00ff00")[:, 0], [(0, 255, 0), (255, 255, 255)])


def test_a_tiff_of_12_bits(tmp_path):
    """Little-endian, 4 x 1 pixels, values packed by TIFF 6.0: 0, 1365, 2730 and 4095 of 4095."""
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 6)]
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    data = bytes.fromhex("000555aaafff") + bytes(2)
    (tmp_path / "x.tif").write_bytes(
        b"II*\0" + struct.pack("<I", 16) + data + struct.pack("<H", len(tags)) + entries + bytes(4)
    )
    assert pixels(tmp_path / "x.tif")[0, :, 0].tolist() == [0, 85, 170, 255]


@pytest.mark.parametrize("ending", ["png", "tiff", "jp2"])
def test_greys_of_16_bits_are_scaled_not_clipped(tmp_path, ending):
    Image.fromarray(RAMP).save(tmp_path / f"x.{ending}")
    assert np.array_equal(pixels(tmp_path / f"x.{ending}"), grey(SHOWN))


def test_greys_of_16_bits_in_either_order_of_bytes(tmp_path):
    Image.fromarray(RAMP.astype(">u2")).save(tmp_path / "x.tiff")
    with Image.open(tmp_path / "x.tiff") as image:
        assert image.mode == "I;16B"
    assert np.array_equal(pixels(tmp_path / "x.tiff"), grey(SHOWN))


def test_a_pgm_of_16_bits(tmp_path):
    (tmp_path / "x.pgm").write_bytes(b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes())
    with Image.open(tmp_path / "x.pgm") as image:
        assert image.mode == "I"
    assert np.array_equal(pixels(tmp_path / "x.pgm"), grey(SHOWN))


def test_a_tiff_in_which_zero_is_white(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "x.tiff", tiffinfo={262: 0})
    with Image.open(tmp_path / "x.tiff") as image:
        assert (image.mode, image.tag_v2[262]) == ("I;16", 0)
    assert np.array_equal(pixels(tmp_path / "x.tiff"), grey(np.rint(255 - RAMP / 257).astype(np.uint8)))


def test_floats_from_0_to_1(tmp_path):
    Image.fromarray(RAMP.astype(np.float32) / 65535).save(tmp_path / "x.tiff")
    assert np.array_equal(pixels(tmp_path / "x.tiff"), grey(SHOWN))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.full((4, 4), 40000, np.int32), "mode I"),
        (np.full((4, 4), 1.5, np.float32), "mode F"),
        (np.full((4, 4), -0.5, np.float32), "mode F"),
        (np.full((4, 4), np.nan, np.float32), "mode F"),
    ],
)
def test_values_without_a_white_are_refused_by_name(tmp_path, values, told):
    Image.fromarray(values).save(tmp_path / "x.tiff")
    with pytest.raises(PictureError, match=rf"x\.tiff: cannot be decoded: .*{told}.*save it with 8 or 16 bits"):
        open_picture(tmp_path / "x.tiff")


@pytest.mark.parametrize(
    ("mode", "ending", "exact"),
    [("1", "png", 0), ("P", "png", 0), ("P", "gif", 0), ("CMYK", "jpg", 3), ("CMYK", "tiff", 0), ("YCbCr", "jpg", 3),
     ("YCbCr", "tiff", 3), ("LAB", "tiff", 6)],
)  # fmt: skip
def test_other_modes_show_their_colours(tmp_path, mode, ending, exact):
    colour = (255, 255, 255) if mode == "1" else (230, 120, 20)
    image = Image.new("RGB", (16, 16), colour)
    if mode == "LAB":
        image = Image.new("LAB", (16, 16), (158, 165, 192))  # CIELab 62, 37, 64, which is that orange
    elif mode == "P":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE)
    else:
        image = image.convert(mode)
    image.save(tmp_path / f"x.{ending}", **{"quality": 100} if ending == "jpg" else {})
    assert np.abs(pixels(tmp_path / f"x.{ending}").astype(int) - colour).max() <= exact


@pytest.mark.parametrize("mode", ["HSV", "RGBX", "1", "L", "P", "YCbCr", "CMYK", "LAB"])
def test_plain_modes_in_memory(mode):
    assert compose(Image.new(mode, (4, 4)), (1, 2, 3)).mode == "RGB"


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_modes_of_16_bits_in_memory(mode):
    image = Image.new(mode, (4, 4), 0x8040)
    assert scale_greys(image, 0, 65535).getextrema() == (128, 128)


def test_a_mode_that_nobody_knows_is_refused_by_name(tmp_path, picture, monkeypatch):
    picture(0).save(tmp_path / "x.png")
    monkeypatch.setattr("t2ilib.data.pictures.PLAIN", frozenset())
    with pytest.raises(PictureError, match="Pillow's mode RGB is not read"):
        open_picture(tmp_path / "x.png")


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tiff", "avif"])
def test_the_first_frame_of_an_animation(tmp_path, ending):
    if ending == "avif" and not features.check("avif"):
        pytest.skip("a Pillow without AVIF")
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 10, 10), (10, 250, 10), (10, 10, 250))]
    frames[0].save(tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:])
    assert np.abs(pixels(tmp_path / f"x.{ending}").astype(int) - (250, 10, 10)).max() <= 12


@pytest.mark.parametrize("ending", ["png", "jpg", "jfif", "webp", "bmp", "gif", "tif", "avif", "jp2", "ppm", "mpo"])
def test_formats_that_are_read(tmp_path, ending):
    if ending == "avif" and not features.check("avif"):
        pytest.skip("a Pillow without AVIF")
    Image.new("RGB", (16, 16), (120, 120, 120)).save(tmp_path / f"x.{ending}")
    assert np.abs(pixels(tmp_path / f"x.{ending}").astype(int) - 120).max() <= 3


def test_a_jpeg_of_two_views(tmp_path):
    views = [Image.new("RGB", (16, 16), (value, value, value)) for value in (60, 200)]
    views[0].save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=views[1:])
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.format == "MPO"
    assert np.abs(pixels(tmp_path / "x.jpg").astype(int) - 60).max() <= 2


@pytest.mark.parametrize("format", ["ICO", "PCX", "TGA", "PDF"])
def test_other_formats_are_refused_by_name(tmp_path, picture, format):
    picture(0).save(tmp_path / "x.png", format=format)
    told = "it is not a picture" if format == "PDF" else f"its format is {format}"
    with pytest.raises(PictureError, match=rf"x\.png: cannot be decoded: {told}.* save it as PNG or JPEG"):
        open_picture(tmp_path / "x.png")


def test_a_format_that_this_pillow_does_not_know(tmp_path):
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    with pytest.raises(PictureError, match=r"x\.heic: cannot be decoded: HEIC is not read"):
        open_picture(tmp_path / "x.heic")


def test_pictures_above_pillows_limit_are_refused(tmp_path, picture, monkeypatch):
    picture(0).save(tmp_path / "x.png")
    for limit in (24 * 16 - 1, 10):  # Pillow warns of the first, and raises for the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(PictureError, match=rf"more than {limit} pixels"):
            open_picture(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_picture(tmp_path / "x.png")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif", "tiff", "bmp", "avif", "jp2", "qoi"])
def test_a_picture_cut_off_or_scrambled_anywhere_raises_one_kind(tmp_path, picture, ending):
    if ending == "avif" and not features.check("avif"):
        pytest.skip("a Pillow without AVIF")
    if ending == "qoi":
        whole = b"qoif" + struct.pack(">IIBB", 4, 4, 3, 0) + b"\xfe\x10\x20\x30" * 16 + bytes(7) + b"\1"
    else:
        picture(0).save(tmp_path / f"x.{ending}")
        whole = (tmp_path / f"x.{ending}").read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for trial in range(60):
        data = bytearray(whole[: rng.integers(len(whole))] if trial % 2 else whole)
        for place in rng.integers(0, min(len(data), 80), 3) if data else ():
            data[place] = rng.integers(256)
        (tmp_path / f"y.{ending}").write_bytes(data)
        try:
            open_picture(tmp_path / f"y.{ending}")
        except PictureError as error:  # and nothing else
            refused += error.reason.startswith("cannot be decoded: ") and f"y.{ending}" in str(error)
    assert refused > 10


def test_missing_and_not_files(tmp_path):
    with pytest.raises(PictureError, match=r"gone\.png: missing"):
        open_picture(tmp_path / "gone.png")
    with pytest.raises(PictureError, match=r"cannot be decoded: .*directory"):
        open_picture(tmp_path)


@pytest.mark.parametrize("ground", ["white", "#fff", "#10A0ff", "rgb(1,2,3)", "hsl(0,100%,50%)", "rebeccapurple"])
def test_grounds(ground):
    assert build_run({"adapter": {}, "data": {"ground": ground}}).data.ground == ground


@pytest.mark.parametrize("ground", ["whit", None, 0, 102030, "", "#12345", "#11223344", ["white"]])
def test_what_is_no_ground(ground):
    with pytest.raises(
        ConfigError, match=r"data\.ground: .* (is not a colour: name a colour|has alpha, and nothing lies below)"
    ):
        build_run({"adapter": {}, "data": {"ground": ground}})


def test_pictures_are_turned_upright_by_their_exif_tag(tmp_path, picture):
    upright = picture(0, (24, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate 90 degrees clockwise to see it upright
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert open_picture(tmp_path / "turned.png").size == (24, 16)
    assert np.array_equal(np.asarray(open_picture(tmp_path / "turned.png")), np.asarray(upright))


@pytest.mark.parametrize(
    ("size", "crop"), [((32, 16), (0, 4)), ((16, 32), (4, 0)), ((8, 8), (0, 0)), ((4, 8), (4, 0)), ((33, 17), None)]
)
def test_load_picture_cuts_the_centre_square(tmp_path, size, crop):
    width, height = size
    gradient = np.zeros((height, width, 3), np.uint8)
    gradient[..., 0], gradient[..., 1] = np.linspace(0, 255, width)[None, :], np.linspace(0, 255, height)[:, None]
    Image.fromarray(gradient).save(tmp_path / "x.png")
    loaded = load_picture(tmp_path / "x.png", 8)
    assert loaded.pixels.shape == (8, 8, 3)
    assert loaded.pixels.dtype == np.uint8
    assert loaded.original == (height, width)
    if crop is not None:
        assert loaded.crop == crop
    # what is left and right of the centre, and above and below it, was cut in equal parts
    assert loaded.pixels[..., 0].mean() == pytest.approx(127.5, abs=6 + 128 / size[0])
    assert loaded.pixels[..., 1].mean() == pytest.approx(127.5, abs=6 + 128 / size[1])
    spread = loaded.pixels[0, -1, 0].astype(int) - loaded.pixels[0, 0, 0]
    assert spread == pytest.approx(255 * min(size) / width * 7 / 8, abs=40)


def test_a_picture_of_the_right_size_is_untouched(tmp_path, picture):
    picture(0, (16, 16)).save(tmp_path / "x.png")
    assert np.array_equal(load_picture(tmp_path / "x.png", 16).pixels, np.asarray(picture(0, (16, 16))))
