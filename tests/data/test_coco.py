"""COCO's captions in the form of the published files, as they are and broken in all ways."""

import json
import logging
import stat
import zipfile

import pytest

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.manifest import examine, load_listings
from t2ilib.data.pictures import open_picture
from t2ilib.data.sources import coco

TEXTS = ("A bee on a flower.", "The bee sits\non a  flower ", "Bee.", "There is a bee here", "A striped insect, flying")


def document(names, captions=TEXTS, part="val2017"):
    """The published file's fields. `names`: of pictures; `captions`: of each, or by picture number."""
    images = [
        {
            "license": 4,
            "file_name": name,
            "coco_url": f"http://images.cocodataset.org/{part}/{name}",
            "height": 480,
            "width": 640,
            "date_captured": "2013-11-14 17:02:52",
            "flickr_url": f"http://farm7.staticflickr.com/{name}",
            "id": 139 + number,
        }
        for number, name in enumerate(names)
    ]
    annotations = [
        {"image_id": 139 + number, "id": 1000 * number + index, "caption": text}
        for index in range(5)
        for number in reversed(range(len(names)))
        for text in captions[index : index + 1]
    ]
    licenses = [{"url": "http://creativecommons.org/licenses/by-nc-sa/2.0/", "id": 1, "name": "a licence"}]
    return {"info": {"year": 2017}, "licenses": licenses, "images": images, "annotations": annotations}


def names_of(count):
    return [f"{number:012d}.jpg" for number in range(9, 9 + 5 * count, 5)]


@pytest.fixture
def folder(tmp_path, picture):
    """Three pictures in val2017, and annotations/captions_val2017.json."""
    (tmp_path / "val2017").mkdir()
    for index, name in enumerate(names_of(3)):
        picture(index).save(tmp_path / "val2017" / name)
    write(tmp_path, document(names_of(3)))
    return tmp_path


def write(folder, found, name="annotations/captions_val2017.json"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(found if isinstance(found, str) else json.dumps(found))


def config_of(folder, **fields):
    return DataConfig(source="coco", path=folder, **{"split": "val"} | fields)


def load(folder, **fields):
    return coco.load(config_of(folder, **fields))


def told(listing):
    return {(path.name if hasattr(path, "name") else str(path)): reason for path, reason in listing.rejected}


def zipped(folder, part="val2017", place=""):
    """The folder of pictures as the zip that it is downloaded as."""
    with zipfile.ZipFile(folder / place / f"{part}.zip", "w") as file:
        file.writestr(f"{part}/", b"")
        for path in sorted((folder / part).iterdir()):
            file.write(path, f"{part}/{path.name}")
            path.unlink()
    (folder / part).rmdir()


def test_five_captions_a_picture_in_the_order_of_names(folder, caplog):
    with caplog.at_level(logging.INFO, "t2ilib"):
        listing = load(folder)
    assert [record.path for record in listing] == [folder / "val2017" / name for name in names_of(3)]
    one_line = tuple(" ".join(text.split()) for text in TEXTS)
    assert {record.captions for record in listing} == {one_line}
    assert listing.texts == (folder / "annotations/captions_val2017.json",)
    assert listing.rejected == ()
    assert "3 pictures with 15 captions, from captions_val2017.json and val2017" in caplog.text
    assert load(folder).records == listing.records


@pytest.mark.parametrize("layout", ["images", "zip", "images zip", "all zips", "beside"])
def test_everywhere_that_it_may_lie(folder, layout):
    expected = [open_picture(record.path).tobytes() for record in load(folder)]
    if layout == "beside":
        (folder / "annotations/captions_val2017.json").rename(folder / "captions_val2017.json")
    if layout.startswith("images"):
        (folder / "images").mkdir()
    if layout == "images":
        (folder / "val2017").rename(folder / "images/val2017")
    if "zip" in layout:
        zipped(folder, place="images" if "images" in layout else "")
    if layout == "all zips":
        with zipfile.ZipFile(folder / "annotations_trainval2017.zip", "w", zipfile.ZIP_DEFLATED) as file:
            file.write(folder / "annotations/captions_val2017.json", "annotations/captions_val2017.json")
            file.writestr("annotations/captions_train2017.json", json.dumps(document([])))
            file.writestr("annotations/instances_val2017.json", "{}")
        (folder / "annotations/captions_val2017.json").unlink()
    listing = load(folder)
    assert [record.path.name for record in listing] == names_of(3)
    assert [open_picture(record.path).tobytes() for record in listing] == expected
    assert {len(record.captions) for record in listing} == {5}
    assert (listing.rejected, listing.aside) == ((), ())
    assert len(examine(listing, config_of(folder)).pictures) == 3


def test_captions_and_pictures_are_compared_both_ways(folder, picture):
    names = names_of(5)
    picture(8).save(folder / "val2017/uncaptioned.jpg")
    found = document([*names, "bare.jpg", "Upper.jpg"])
    found["annotations"] = [row for row in found["annotations"] if row["image_id"] != 139 + 5]
    found["annotations"] += [{"image_id": 7, "id": 1, "caption": "of no picture"}] * 2
    picture(9).save(folder / "val2017/bare.jpg")
    picture(9).save(folder / "val2017/upper.jpg")
    (folder / "val2017/notes.md").touch()
    (folder / "val2017/.DS_Store").touch()
    write(folder, found)
    listing = load(folder)
    assert [record.path.name for record in listing] == names[:3]
    assert told(listing) == {
        names[3]: "missing, and its 5 captions with it (captions_val2017.json names it)",
        names[4]: "missing, and its 5 captions with it (captions_val2017.json names it)",
        "Upper.jpg": "missing; there is upper.jpg: write its name as it is, and its 5 captions with it (captions_val2017.json names it)",
        "bare.jpg": "has no caption in captions_val2017.json",
        "uncaptioned.jpg": "has no caption in captions_val2017.json",
        "upper.jpg": "has no caption in captions_val2017.json",
        "captions_val2017.json": "2 captions of image_id 7, which is no id of its images",
    }
    assert len(listing) + len(listing.rejected) == 10
    assert [path.name for path in listing.hidden] == [".DS_Store"]
    assert listing.aside == ((folder / "val2017/notes.md", "neither a picture nor a caption"),)


@pytest.mark.parametrize("place", ["folder", "zip"])
@pytest.mark.parametrize(
    "name", ["../outside.jpg", "/etc/hostname", "a/../../outside.jpg", "..\\outside.jpg", "C:\\x.jpg"]
)
def test_names_that_lead_out(folder, picture, name, place):
    picture(0).save(folder / "outside.jpg")
    write(folder, document([*names_of(3), name]))
    if place == "zip":
        zipped(folder)
    listing = load(folder)
    assert len(listing) == 3
    assert [reason for _, reason in listing.rejected] == [
        "lies outside: pictures must lie in the folder itself, and its 5 captions with it (captions_val2017.json names it)"
    ]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_hostile_zip(folder):
    names = names_of(6)
    zipped(folder)
    link = zipfile.ZipInfo(f"val2017/{names[3]}")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(folder / "val2017.zip", "a") as file:
        file.writestr(link, "/etc/passwd")
        file.writestr(f"val2017/{names[4]}", b"1")
        file.writestr(f"val2017/{names[4]}", b"2")
        file.writestr("/etc/passwd.jpg", b"3")
        file.writestr("val2017/../../up.jpg", b"4")
    write(folder, document(names[:5]))
    listing = load(folder)
    assert [record.path.name for record in listing] == names[:3]
    assert told(listing) == {
        names[3]: "is a link, which is not followed",
        names[4]: "is in its archive 2 times: keep one",
        "passwd.jpg": "has a name that leads out of its archive",
        "up.jpg": "has a name that leads out of its archive",
    }
    assert str(listing.rejected[0][0]) == f"val2017.zip/val2017/{names[3]}"


def test_links_of_a_folder(folder, tmp_path_factory, picture):
    names = names_of(5)
    outside = tmp_path_factory.mktemp("outside") / "x.jpg"
    picture(0).save(outside)
    (folder / "val2017" / names[3]).symlink_to(outside)
    (folder / "val2017" / names[4]).symlink_to(folder / "val2017" / names[0])
    write(folder, document(names))
    listing = load(folder)
    assert [record.path.name for record in listing] == [*names[:3], names[4]]
    assert told(listing) == {names[3]: "links to outside: pictures must lie in the folder itself"}


def test_entries_that_cannot_be_meant_are_told_by_number(folder):
    found = document(names_of(3))
    whole = len(found["annotations"])
    found["images"] += [
        {"id": 139, "file_name": "again.jpg"},
        {"id": 500, "file_name": names_of(1)[0]},
        {"id": 501, "file_name": 7},
        {"id": None, "file_name": "x.jpg"},
        "x.jpg",
    ]
    found["annotations"] += [
        {"image_id": 139, "caption": 3},
        {"caption": "of what?"},
        None,
        {"image_id": [1], "caption": "x"},
    ]
    write(folder, found)
    listing = load(folder)
    assert [reason for _, reason in listing.rejected] == [
        "entry 4 of images has the id 139, which another has: again.jpg",
        f"entry 5 of images names {names_of(1)[0]} again",
        "entry 6 of images has no file_name that is text, or no id",
        "entry 7 of images has no file_name that is text, or no id",
        "entry 8 of images has no file_name that is text, or no id",
        *(f"entry {whole + n} of annotations has no caption that is text, or no image_id" for n in (1, 2, 3, 4)),
    ]
    assert {len(record.captions) for record in listing} == {5}


def test_captions_that_are_empty_or_broken(folder):
    found = document(names_of(3))
    found["annotations"][0]["caption"] = " \n "
    found["annotations"][1]["caption"] = "half a \ud83d"
    write(folder, found)
    listing = load(folder)
    assert [reason for _, reason in listing.rejected] == [
        "entry 1 of annotations (image_id 141): has an empty caption: write one",
        "entry 2 of annotations (image_id 140): its caption has half a character (\\ud83d) at position 7: write the whole one, or leave it out",
    ]
    assert [len(record.captions) for record in listing] == [5, 4, 4]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lambda text: text[: len(text) // 2], r"captions_val2017.json is not whole JSON, perhaps cut off: .*: download it again"),
        (lambda text: "", r"is not whole JSON"),
        (lambda text: "[]", r"holds no COCO captions: it has no list 'images'"),
        (lambda text: '{"images": []}', r"it has no list 'annotations'"),
        (lambda text: '{"images": {}, "annotations": []}', r"it has no list 'images'"),
        (lambda text: "[" * 100_000, r"nested too deep"),
        (lambda text: b"\xff" + text.encode(), r"captions_val2017.json: byte 0 \(0xff, line 1\) is not UTF-8"),
        (lambda text: text.replace("flower.", "caf\xe9").encode("cp1252"), r"is not UTF-8.*save it as UTF-8"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["file", "zip"])
def test_a_table_that_is_not_whole(folder, content, told, place):
    path = folder / "annotations/captions_val2017.json"
    broken = content(json.dumps(document(names_of(3)), ensure_ascii=False))
    path.write_bytes(broken.encode() if isinstance(broken, str) else broken)
    if place == "zip":
        with zipfile.ZipFile(folder / "annotations_trainval2017.zip", "w") as file:
            file.write(path, "annotations/captions_val2017.json")
        path.unlink()
    with pytest.raises(ConfigError, match=told):
        load(folder)


def test_half_a_download_beside_what_was_extracted(folder):
    (folder / "annotations_trainval2017.zip").write_bytes(b"PK half of it")
    assert len(load(folder)) == 3
    (folder / "annotations/captions_val2017.json").unlink()
    with pytest.raises(ConfigError, match=r"annotations_trainval2017.zip is not a whole zip .*: download it again"):
        load(folder)


def test_damage_in_the_zip_of_the_annotations(folder):
    path = folder / "annotations/captions_val2017.json"
    with zipfile.ZipFile(folder / "annotations_trainval2017.zip", "w") as file:
        file.write(path, "annotations/captions_val2017.json")
    path.unlink()
    archive = folder / "annotations_trainval2017.zip"
    archive.write_bytes(archive.read_bytes().replace(b"insect", b"inseCt"))
    with pytest.raises(
        ConfigError, match=r"captions_val2017.json cannot be read: it is damaged in annotations_trainval"
    ):
        load(folder)


def test_which_part(folder):
    for part in ("train2014", "train2017"):
        write(folder, document([], part=part), f"annotations/captions_{part}.json")
    with pytest.raises(ConfigError, match=r"has captions of train2014 and train2017: set data.split to one of them"):
        load(folder, split=None)
    with pytest.raises(
        ConfigError, match=r"no pictures of train2014: put them in train2014 or images/train2014, or train"
    ):
        load(folder, split="train2014")
    with pytest.raises(
        ConfigError, match=r"no captions_test\*.json.*\(there are train2014, train2017, val2017: set data.s"
    ):
        load(folder, split="test")
    assert len(load(folder, split="val2017")) == 3
    with pytest.raises(ConfigError, match=r"is not a folder: give the one with COCO's annotations"):
        load(folder / "absent")
    with pytest.raises(ConfigError, match=r"data.path is missing"):
        coco.load(DataConfig(source="coco"))
    (folder / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no captions_train\*.json.*`t2ilib data download coco` fetches them"):
        load(folder / "empty", split=None)


def test_held_out_is_the_other_part(folder, picture):
    (folder / "train2017").mkdir()
    for index in range(4):
        picture(index).save(folder / "train2017" / f"t{index}.jpg")
    write(folder, document([f"t{index}.jpg" for index in range(4)]), "annotations/captions_train2017.json")
    training, held_out = load_listings(config_of(folder, split="train", validation_split="val"))
    assert [len(training), len(held_out)] == [4, 3]


def test_fields_without_effect_are_refused(folder):
    for field, value in {"caption_column": "x", "mask_column": "x", "prompt": "x", "repeat_column": "x"}.items():
        with pytest.raises(ConfigError, match=rf"data.{field} has no effect with data.source coco"):
            load(folder, **{field: value})
    assert {record.weight for record in load(folder, weights={"*.jpg": 2})} == {2.0}
