import hashlib
import struct
import warnings
import zlib

import numpy as np
import PIL
import pytest
from matplotlib import cbook
from packaging import version
from PIL import Image, ImageOps, features

from t2ilib.config import ConfigError
from t2ilib.data.pictures import (
    PictureError,
    compose,
    examine_picture,
    load_picture,
    load_view,
    open_picture,
    scale_greys,
)
from t2ilib.data.views import view_of
from t2ilib.runfile import build_run

RAMP = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
SHOWN = np.rint(RAMP / 257).astype(np.uint8)
NEEDS_PILLOW_13 = pytest.mark.skipif(
    version.parse(PIL.__version__) < version.parse("13"), reason="Pillow before 13 cannot read it back itself"
)


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
     pytest.param("YCbCr", "tiff", 3, marks=NEEDS_PILLOW_13), ("LAB", "tiff", 6)],
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


def verdict(function, path, *arguments):
    """Why a picture is refused; None where it is not, and nothing but a PictureError is caught."""
    try:
        function(path, *arguments)
    except PictureError as error:
        return str(error)
    return None


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
    rng, refused, path = np.random.default_rng(0), 0, tmp_path / f"y.{ending}"
    for trial in range(60):
        data = bytearray(whole[: rng.integers(len(whole))] if trial % 2 else whole)
        for place in rng.integers(0, min(len(data), 80), 3) if data else ():
            data[place] = rng.integers(256)
        path.write_bytes(data)
        verdicts = [verdict(open_picture, path), verdict(examine_picture, path), verdict(load_picture, path, 4)]
        assert len({told is None for told in verdicts}) == 1
        if verdicts[0] is not None:
            refused += 1
            assert all(told.startswith(f"{path}: cannot be decoded: ") for told in verdicts)
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


@pytest.fixture(scope="module")
def photograph():
    """512 x 600 pixels, which matplotlib ships."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        return Image.open(file).convert("RGB")


def saved_jpeg(image, path, orientation=1, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, format=options.pop("format", "JPEG"), quality=95, exif=exif, **options)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2))


def scaled_in_full(path, target):
    """A centred view without any help: decode all, turn, scale all, cut."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    view = view_of((upright.height, upright.width), target)
    left, top = view.left, view.top
    whole = upright.resize(view.scaled[::-1], Image.Resampling.LANCZOS)
    return np.asarray(whole.crop((left, top, left + target[1], top + target[0])))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_decoded_at_a_scale_shows_the_same_however_it_lies(tmp_path, photograph, orientation):
    """427 x 509 pixels: at a quarter each side has a part of a pixel too much, which turns with the picture."""
    saved_jpeg(photograph.crop((40, 60, 467, 569)), tmp_path / "x.jpg", orientation)
    loaded = load_view(tmp_path / "x.jpg", lambda original: view_of(original, (56, 48)))
    assert loaded.original == ((509, 427) if orientation < 5 else (427, 509))
    # 46 to 53 dB; 25 to 34 where the part of a pixel is thought at the side where it is stored
    assert psnr(loaded.pixels, scaled_in_full(tmp_path / "x.jpg", (56, 48))) > 44


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("YCbCr", "JPEG"), ("RGB", "MPO")]
)
@pytest.mark.parametrize("progressive", [False, True])
def test_every_kind_of_jpeg_is_decoded_at_the_scale_it_is_needed(tmp_path, photograph, mode, kind, progressive):
    more = {"save_all": True, "append_images": [photograph.resize((64, 64))]} if kind == "MPO" else {}
    saved_jpeg(photograph.convert(mode), tmp_path / "x.jpg", format=kind, progressive=progressive, **more)
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.format == kind
    sizes = {None: (512, 600), (301, 256): (512, 600), (300, 256): (256, 300), (151, 10): (256, 300), (150, 128): (128, 150),
             (1, 1): (64, 75), (900, 900): (512, 600)}  # fmt: skip
    for at_least, size in sizes.items():
        opened = open_picture(tmp_path / "x.jpg", "white", at_least)
        assert (opened.mode, opened.size) == ("RGB", size)
    loaded = load_picture(tmp_path / "x.jpg", 64)
    assert (loaded.original, loaded.crop) == ((600, 512), (5, 0))
    assert psnr(loaded.pixels, scaled_in_full(tmp_path / "x.jpg", (64, 64))) > 42
    assert psnr(load_picture(tmp_path / "x.jpg", 300).pixels, scaled_in_full(tmp_path / "x.jpg", (300, 300))) > 50


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_that_is_cut_off_is_refused_at_every_scale(tmp_path, photograph, mode, progressive):
    saved_jpeg(photograph.convert(mode), tmp_path / "x.jpg", progressive=progressive)
    whole = (tmp_path / "x.jpg").read_bytes()
    for end in (len(whole) // 2, len(whole) * 9 // 10, len(whole) - 100, len(whole) - 1):
        (tmp_path / "x.jpg").write_bytes(whole[:end])
        for at_least in (None, (300, 256), (150, 128), (1, 1)):
            with pytest.raises(PictureError, match="truncated"):
                open_picture(tmp_path / "x.jpg", "white", at_least)
        with pytest.raises(PictureError, match="truncated"):
            examine_picture(tmp_path / "x.jpg")


class Counted:
    """Bytes that count how often they are read."""

    def __init__(self, path):
        self.name, self.data, self.times = path.name, path.read_bytes(), 0

    def read_bytes(self):
        self.times += 1
        return self.data


@pytest.mark.parametrize(("ending", "orientation"), [("jpg", 1), ("jpg", 6), ("png", 1), ("png", 8)])
def test_examining_reads_a_file_once(tmp_path, picture, ending, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(0, (240, 160)).save(tmp_path / f"x.{ending}", exif=exif)
    source = Counted(tmp_path / f"x.{ending}")
    examined = examine_picture(source, thumbnail=30)
    assert source.times == 1
    assert examined.sha256 == hashlib.sha256(source.data).digest()
    assert (examined.height, examined.width) == ((160, 240) if orientation == 1 else (240, 160))
    assert (examined.thumbnail.mode, examined.thumbnail.size) == ("RGB", (30, 20) if orientation == 1 else (20, 30))
    assert (examined.notes, examine_picture(source).thumbnail) == ((), None)
    load_picture(source, 16)
    assert source.times == 3


@pytest.mark.parametrize(
    ("ending", "note"),
    [("gif", "the first of 3 frames"), ("webp", "the first of 3 frames"), ("png", "the first of 3 frames"),
     ("avif", "the first of 3 frames"), ("tiff", "the first of 3 pages"), ("mpo", None)],
)  # fmt: skip
def test_animations_are_noted(tmp_path, picture, ending, note):
    if ending == "avif" and not features.check("avif"):
        pytest.skip("a Pillow without AVIF")
    frames = [picture(seed) for seed in range(3)]
    frames[0].save(tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:])
    assert examine_picture(tmp_path / f"x.{ending}").notes == ((note,) if note else ())
    frames[0].save(tmp_path / f"y.{ending}")
    assert examine_picture(tmp_path / f"y.{ending}").notes == ()


def test_a_gif_that_is_broken_behind_its_first_frame_is_its_first_frame(tmp_path, picture):
    frames = [picture(seed, (64, 64)) for seed in range(3)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    whole = (tmp_path / "x.gif").read_bytes()
    (tmp_path / "x.gif").write_bytes(whole[: len(whole) // 2])
    assert open_picture(tmp_path / "x.gif").size == (64, 64)
    examine_picture(tmp_path / "x.gif")


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize(
    ("size", "told"), [((100_000, 100_000), "more than .* pixels"), ((9500, 9500), "more than .* pixels")]
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_png_whose_header_lies(tmp_path, size, told):
    """It says that it is large and holds one row."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(bytes(1 + 3 * 3000)))
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + png_chunk(b"IEND", b""))
    for function in (open_picture, examine_picture):
        with pytest.raises(PictureError, match=rf"x\.png: cannot be decoded: .*{told}"):
            function(tmp_path / "x.png")


def test_a_png_whose_text_is_a_bomb(tmp_path, picture):
    picture(0).save(tmp_path / "x.png")
    whole = (tmp_path / "x.png").read_bytes()
    bomb = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(20_000_000)))
    (tmp_path / "x.png").write_bytes(whole[:33] + bomb + whole[33:])  # behind IHDR
    with pytest.raises(PictureError, match="too large"):
        examine_picture(tmp_path / "x.png")


def test_a_png_with_more_data_than_its_header_says(tmp_path):
    """Decoding ends with the picture: 40 MB of data behind 4 rows are not decompressed."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(bytes(40_000_000)))
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + png_chunk(b"IEND", b""))
    assert open_picture(tmp_path / "x.png").size == (4, 4)


def test_a_huge_picture_is_a_sample(tmp_path):
    """72 megapixels, of which no more is decoded than is needed."""
    grey = Image.linear_gradient("L").resize((9000, 8000), Image.Resampling.NEAREST)
    grey.save(tmp_path / "x.jpg", quality=60)
    loaded = load_picture(tmp_path / "x.jpg", 16)
    assert loaded.original == (8000, 9000)
    assert np.abs(loaded.pixels[:, 8, 0] - np.arange(7.5, 256, 16)).max() < 3
    Image.new("RGB", (20_000, 2), (10, 20, 30)).save(tmp_path / "x.png")
    assert (load_picture(tmp_path / "x.png", 64).pixels == (10, 20, 30)).all()


def test_a_tiny_picture_is_scaled_up(tmp_path):
    Image.fromarray(np.array([[0, 255]], np.uint8).repeat(3, axis=0)).save(tmp_path / "x.png")
    loaded = load_picture(tmp_path / "x.png", 16)
    assert (loaded.pixels.shape, loaded.original, loaded.crop) == ((16, 16, 3), (3, 2), (4, 0))
    assert loaded.pixels[:, 0].max() < 10
    assert loaded.pixels[:, -1].min() > 245


@pytest.mark.parametrize(
    ("data", "told"),
    [(b"", "the file is empty"), (b"<html>404</html>", "it is not a picture"), ("größe".encode("utf-16"), "it is not a picture")],
)  # fmt: skip
def test_files_that_are_no_pictures(tmp_path, data, told):
    (tmp_path / "x.jpg").write_bytes(data)
    for function in (open_picture, examine_picture):
        with pytest.raises(PictureError, match=rf"x\.jpg: cannot be decoded: {told}"):
            function(tmp_path / "x.jpg")


def test_nothing_global_is_changed_while_decoding(tmp_path, picture, monkeypatch):
    """Python's warning filters belong to all threads: one that sets them for itself sets them for others, who may restore them later."""
    picture(0).save(tmp_path / "x.jpg")
    monkeypatch.setattr(warnings, "catch_warnings", None)
    open_picture(tmp_path / "x.jpg")
    (tmp_path / "y.jpg").write_bytes(b"no picture")
    with pytest.raises(PictureError, match="it is not a picture"):
        open_picture(tmp_path / "y.jpg")


def test_what_is_enough_is_meant_upright(tmp_path, photograph):
    """600 x 512 (high x wide) as it is stored, 512 x 600 upright: the half is 256 x 300."""
    saved_jpeg(photograph, tmp_path / "x.jpg", 6)
    assert open_picture(tmp_path / "x.jpg", "white", (256, 300)).size == (300, 256)
    assert open_picture(tmp_path / "x.jpg", "white", (300, 256)).size == (600, 512)
    assert open_picture(tmp_path / "x.jpg", "white", (100, 150)).size == (150, 128)
