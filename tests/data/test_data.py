import itertools
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from t2ilib.config import ConfigError, DataConfig, ShapesConfig
from t2ilib.data import loader
from t2ilib.data.cache import EncodedDataset, encode_dataset, load_pixels
from t2ilib.data.manifest import examine, load_datasets, load_picture, open_picture
from t2ilib.data.sources import folder
from t2ilib.models.families import time_ids
from t2ilib.runfile import build_run
from t2ilib.shapes import source as shapes_source
from t2ilib.shapes import world

CONFIG = DataConfig()


def run_of(data, **sections):
    return build_run({"adapter": {}, "data": data, **sections})


def drawn_run(config):
    return run_of({"source": "shapes"}, shapes=config)


def picture(seed, size=(24, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def pictures(tmp_path):
    """Three pictures without captions."""
    for index, name in enumerate(("b.png", "a.jpg", "c.webp")):
        picture(index).save(tmp_path / name)
    return tmp_path


def write_jsonl(path, rows):
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def captioned(path, count):
    """An image folder of `count` pictures with distinct captions."""
    path.mkdir(exist_ok=True)
    for index in range(count):
        picture(index).save(path / f"{index:03d}.png")
        (path / f"{index:03d}.txt").write_text(f"caption {index}\n")
    return path


def test_jsonl_csv_and_sidecars_read_alike(pictures):
    texts = {"b.png": "a bee, striped", "a.jpg": " an ant\n", "c.webp": "ä cat"}
    rows = [{"file_name": name, "text": text} for name, text in texts.items()]
    expected = [("a.jpg", "an ant"), ("b.png", "a bee, striped"), ("c.webp", "ä cat")]
    for row in rows:
        (pictures / row["file_name"]).with_suffix(".txt").write_text(row["text"])
    assert [(r.path.name, r.caption) for r in folder.read_folder(pictures, CONFIG)] == expected
    (pictures / "metadata.csv").write_text('file_name,text\nb.png,"a bee, striped"\na.jpg, an ant\nc.webp,ä cat\n')
    assert [(r.path.name, r.caption) for r in folder.read_folder(pictures, CONFIG)] == expected
    write_jsonl(pictures, rows)
    assert [(r.path.name, r.caption) for r in folder.read_folder(pictures, CONFIG)] == expected


def test_other_column_names(pictures):
    write_jsonl(pictures, [{"image": "b.png", "prompt": "a bee", "text": "not this"}])
    records = folder.read_folder(
        pictures, CONFIG.model_copy(update={"image_column": "image", "caption_column": "prompt"})
    )
    assert [(r.path.name, r.caption) for r in records] == [("b.png", "a bee")]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_missing_column_is_named_with_those_there_are(pictures, kind):
    if kind == "jsonl":
        write_jsonl(pictures, [{"file_name": "b.png", "text": "a bee"}, {"file_name": "a.jpg", "caption": "an ant"}])
    else:
        (pictures / "metadata.csv").write_text("file_name,caption\nb.png,a bee\n")
    with pytest.raises(
        ConfigError, match=r"row \d has no text in 'text' \(it has file_name, caption\): set data.image_column"
    ):
        folder.read_folder(pictures, CONFIG)


def test_broken_json_is_told_with_its_line(pictures):
    (pictures / "metadata.jsonl").write_text(
        '{"file_name": "b.png", "text": "a bee"}\n\n{"file_name": "a.jpg", "text": \n'
    )
    with pytest.raises(ConfigError, match=r"metadata.jsonl, line 3 is not JSON"):
        folder.read_folder(pictures, CONFIG)
    (pictures / "metadata.jsonl").write_text('["b.png", "a bee"]\n')
    with pytest.raises(ConfigError, match=r"row 1 has no text in 'file_name'.*list"):
        folder.read_folder(pictures, CONFIG)


def test_empty_captions_and_pictures_without_one(pictures):
    for name in ("a", "b"):
        (pictures / f"{name}.txt").write_text("words")
    with pytest.raises(ConfigError, match=r"1 of 3 pictures have no \.txt caption beside them, the first is c.webp"):
        folder.read_folder(pictures, CONFIG)
    (pictures / "c.txt").write_text(" \n")
    with pytest.raises(ConfigError, match=r"1 picture\(s\) have an empty caption, the first is c.webp"):
        folder.read_folder(pictures, CONFIG)


def test_folders_without_pictures(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        folder.read_folder(tmp_path / "absent", CONFIG)
    with pytest.raises(ConfigError, match="lists no picture"):
        folder.read_folder(tmp_path, CONFIG)
    with pytest.raises(ConfigError, match=r"data.path is missing"):
        folder.load(CONFIG)


@pytest.mark.parametrize("name", ["../outside.png", "/etc/hostname", "sub/../../outside.png", "link.png"])
def test_pictures_outside_the_folder_are_refused(tmp_path, name):
    picture(0).save(tmp_path / "outside.png")
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "link.png").symlink_to(tmp_path / "outside.png")
    write_jsonl(inner, [{"file_name": name, "text": "a bee"}])
    with pytest.raises(ConfigError, match="must lie in the folder itself"):
        folder.read_folder(inner, CONFIG)


def test_pictures_in_a_subfolder_are_fine(tmp_path):
    (tmp_path / "sub").mkdir()
    picture(0).save(tmp_path / "sub" / "x.png")
    write_jsonl(tmp_path, [{"file_name": "sub/x.png", "text": "a bee"}])
    assert len(examine("x", folder.read_folder(tmp_path, CONFIG), "stop")) == 1


def test_a_caption_with_a_bare_comma_in_csv_is_not_cut(pictures):
    (pictures / "metadata.csv").write_text("file_name,text\nb.png,a bee, striped\n")
    try:
        records = folder.read_folder(pictures, CONFIG)
    except ConfigError:
        return
    assert records[0].caption == "a bee, striped"


def test_a_line_separator_inside_a_json_caption(pictures):
    (pictures / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "a bee\u2028on two lines"}\n')
    assert folder.read_folder(pictures, CONFIG)[0].caption == "a bee\u2028on two lines"


def test_a_csv_as_excel_writes_it(pictures):
    (pictures / "metadata.csv").write_text("file_name,text\r\nb.png,a bee\r\n", encoding="utf-8-sig")
    assert folder.read_folder(pictures, CONFIG)[0].caption == "a bee"


def test_the_held_out_share(tmp_path):
    config = CONFIG.model_copy(update={"path": captioned(tmp_path / "p", 16)})
    training, held_out = folder.load(config)
    assert len(held_out) == 2
    assert len(training) == 14
    assert {r.path for r in training}.isdisjoint(r.path for r in held_out)
    assert folder.load(config) == (training, held_out)
    training, held_out = folder.load(config.model_copy(update={"validation_share": 0.0}))
    assert len(training) == 16
    assert held_out == []
    apart = config.model_copy(update={"validation_path": captioned(tmp_path / "v", 3)})
    assert [len(part) for part in folder.load(apart)] == [16, 3]
    with pytest.raises(ConfigError, match="leave none to train on"):
        folder.load(config.model_copy(update={"path": captioned(tmp_path / "one", 1)}))


def grown(tmp_path, monkeypatch):
    """The held-out names while a folder grows from 16 to 40 pictures, one at a time (no file is opened for this)."""
    names, held_out = [f"{i:03d}.png" for i in range(40)], []
    for count in range(16, 41):
        records = [folder.Record(tmp_path / name, "x") for name in names[:count]]
        monkeypatch.setattr(folder, "read_folder", lambda *_, records=records: records)
        held_out.append({r.path.name for r in folder.load(CONFIG.model_copy(update={"path": tmp_path}))[1]})
    return held_out


def test_a_new_picture_moves_no_other(tmp_path, monkeypatch):
    held_out = grown(tmp_path, monkeypatch)
    assert all(
        (before ^ after) <= {f"{16 + i:03d}.png"} for i, (before, after) in enumerate(itertools.pairwise(held_out))
    )


@pytest.fixture
def damaged(pictures):
    """Two whole pictures and four that cannot be used, as records."""
    picture(1, (96, 96)).save(pictures / "a.jpg")
    jpeg = (pictures / "a.jpg").read_bytes()
    (pictures / "half.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (pictures / "noise.png").write_bytes(np.random.default_rng(0).bytes(300))
    (pictures / "empty.png").write_bytes(b"")
    return [
        folder.Record(pictures / name, "x")
        for name in ("a.jpg", "gone.png", "b.png", "half.jpg", "noise.png", "empty.png")
    ]


def test_every_unusable_picture_is_named(damaged):
    with Image.open(damaged[3].path) as image:
        image.verify()  # passes half a JPEG, which is why it is not what the manifest uses
    with pytest.raises(ConfigError) as error:
        examine("x", damaged, "stop")
    text = str(error.value)
    assert text.startswith("4 of 6 pictures cannot be used")
    assert "gone.png: missing" in text
    assert all(f"{name}: cannot be decoded" in text for name in ("half.jpg", "noise.png", "empty.png"))
    assert "a.jpg" not in text
    assert "b.png" not in text
    assert "data.on_error" in text


def test_skip_counts_and_logs_what_it_rejects(damaged, caplog):
    with caplog.at_level(logging.WARNING, "t2ilib"):
        dataset = examine("x", damaged, "skip")
    assert [r.path.name for r in dataset.records] == ["a.jpg", "b.png"]
    assert len(dataset) == 2
    assert [path.name for path, _ in dataset.rejected] == ["gone.png", "half.jpg", "noise.png", "empty.png"]
    assert "4 of 6 pictures rejected" in caplog.text
    assert "half.jpg" in caplog.text
    with pytest.raises(ConfigError, match="1 of 1 pictures cannot be used"):
        examine("x", damaged[1:2], "skip")


def test_formats_that_are_not_pictures_people_train_on(tmp_path):
    picture(0).save(tmp_path / "x.png", format="TIFF")
    with pytest.raises(ConfigError, match=r"x.png: cannot be decoded"):
        examine("x", [folder.Record(tmp_path / "x.png", "x")], "stop")


def test_the_digest_covers_pixels_captions_and_order(pictures):
    records = [folder.Record(pictures / name, f"caption of {name}") for name in ("a.jpg", "b.png")]
    digest = examine("x", records, "stop").digest
    assert examine("other name", records, "stop").digest == digest
    assert examine("x", [folder.Record(records[0].path, "another"), records[1]], "stop").digest != digest
    assert examine("x", records[::-1], "stop").digest != digest
    pixels = np.asarray(open_picture(pictures / "b.png")).copy()
    pixels[3, 3, 1] ^= 1
    Image.fromarray(pixels).save(pictures / "b.png")
    assert examine("x", records, "stop").digest != digest


def test_pictures_are_turned_upright_by_their_exif_tag(tmp_path):
    upright = picture(0, (24, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate 90 degrees clockwise to see it upright
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert open_picture(tmp_path / "turned.png").size == (24, 16)
    assert np.array_equal(np.asarray(open_picture(tmp_path / "turned.png")), np.asarray(upright))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    picture(0).convert(mode).save(tmp_path / "x.png")
    assert load_picture(tmp_path / "x.png", 8).pixels.shape == (8, 8, 3)


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


def test_a_picture_of_the_right_size_is_untouched(tmp_path):
    picture(0, (16, 16)).save(tmp_path / "x.png")
    assert np.array_equal(load_picture(tmp_path / "x.png", 16).pixels, np.asarray(picture(0, (16, 16))))


def test_datasets_by_source(tmp_path):
    training, held_out = load_datasets(run_of({"path": captioned(tmp_path / "pets", 8)}))
    assert (training.name, len(training), held_out.name, len(held_out)) == ("pets", 7, "pets-held-out", 1)
    with pytest.raises(
        ConfigError, match=r"data.source: 'foldr' does not exist; choose 'folder'.*Did you mean 'folder'"
    ):
        run_of({"source": "foldr"})


@pytest.mark.parametrize(("num_samples", "batch_size"), [(12, 4), (13, 4), (5, 5), (7, 1)])
def test_every_epoch_is_a_permutation_without_its_remainder(num_samples, batch_size):
    per_epoch = num_samples // batch_size
    epochs = []
    for epoch in range(4):
        ids = [
            i
            for step in range(per_epoch)
            for i in loader.sample_ids(0, epoch * per_epoch + step, batch_size, num_samples)
        ]
        assert len(ids) == len(set(ids)) == per_epoch * batch_size
        assert set(ids) <= set(range(num_samples))
        epochs.append(tuple(ids))
    assert len(set(epochs)) > 1
    if num_samples % batch_size:  # what one epoch drops another uses
        used = set().union(*(loader.sample_ids(0, step, batch_size, num_samples) for step in range(40)))
        assert used == set(range(num_samples))


def test_a_step_addresses_its_samples_alone():
    forwards = [loader.sample_ids(3, step, 4, 13) for step in range(20)]
    loader.epoch_order.cache_clear()
    assert [loader.sample_ids(3, step, 4, 13) for step in reversed(range(20))] == forwards[::-1]
    assert [loader.sample_ids(4, step, 4, 13) for step in range(20)] != forwards
    assert all(isinstance(i, int) for i in forwards[0])


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ConfigError, match=r"training.batch_size 5 is more than the 4 training pictures"):
        loader.sample_ids(0, 0, 5, 4)


@pytest.fixture
def shapes_config(tmp_path, monkeypatch):
    monkeypatch.setenv("T2ILIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shapes_source, "NUM_VALIDATION", 3)
    return ShapesConfig(num_pictures=4, scenes=("base", "heart"))


def test_shapes_are_drawn_once(shapes_config, tmp_path, monkeypatch):
    training, held_out = load_datasets(drawn_run(shapes_config))
    assert (training.name, len(training), len(held_out)) == ("shapes-base-heart", 4, 3)
    assert all(tmp_path in record.path.parents for record in training.records)
    truths = [world.scene_from(record.scene) for record in training.records]
    assert [scene.concepts for scene in truths] == [(), (), ("heart",), ("heart",)]
    assert {world.split_of(scene) for scene in truths} == {"train"}
    assert {world.split_of(world.scene_from(record.scene)) for record in held_out.records} == {"validation"}
    calls = []
    monkeypatch.setattr(world, "render", lambda *_: calls.append(1))
    again, _ = load_datasets(drawn_run(shapes_config))
    assert again.digest == training.digest
    assert not calls


def test_data_seed_and_scenes_have_folders_of_their_own(shapes_config):
    first, other_seed, other_scenes = (
        shapes_source.load(shapes_config.model_copy(update=change))[0]
        for change in ({}, {"seed": 1}, {"scenes": ("base",)})
    )
    assert len({record.path.parent for records in (first, other_seed, other_scenes) for record in records}) == 3
    assert [r.scene for r in first] != [r.scene for r in other_seed]


def test_another_process_that_draws_at_the_same_time_does_no_harm(shapes_config, monkeypatch):
    """While this process is about to commit its folder, another one commits the same folder."""
    write_folder, others = world.write_folder, []

    def overtaken(draft, *args, **kwargs):
        written = write_folder(draft, *args, **kwargs)
        monkeypatch.setattr(world, "write_folder", write_folder)
        others.append(shapes_source.drawn(shapes_config, "train", 4))
        (others[0] / "mark").touch()
        return written

    monkeypatch.setattr(world, "write_folder", overtaken)
    mine = shapes_source.drawn(shapes_config, "train", 4)
    assert mine == others[0]
    assert (mine / "mark").exists()
    assert [path.name for path in mine.parent.iterdir()] == [mine.name]
    assert len(folder.read_folder(mine, CONFIG)) == 4


def test_an_interrupted_drawing_leaves_no_folder_that_looks_whole(shapes_config, monkeypatch):
    draw = world.render
    calls = iter(range(100))

    def interrupted(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(world, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shapes_source.drawn(shapes_config, "train", 4)
    assert not [p for p in (shapes_source.cache_folder() / "shapes").iterdir() if not p.name.startswith(".")]
    assert len(folder.read_folder(shapes_source.drawn(shapes_config, "train", 4), CONFIG)) == 4


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("T2ILIB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert shapes_source.cache_folder() == tmp_path / "t2ilib"
    monkeypatch.setenv("T2ILIB_CACHE", str(tmp_path / "mine"))
    assert shapes_source.cache_folder() == tmp_path / "mine"


def encoded(with_text):
    text = {
        "encoder_hidden_states": torch.tensor([0.0, 10.0, 20.0]).view(3, 1, 1),
        "pooled": torch.tensor([[0.0], [1.0], [2.0]]),
    }
    return EncodedDataset(
        captions=["a bee", "an ant", "a bee"],
        latents=torch.arange(3.0).view(3, 1, 1, 1).expand(3, 4, 2, 2),
        time_ids=torch.arange(18.0).view(3, 6),
        caption_index=[1, 2, 1],
        text=text if with_text else None,
    )


def test_a_batch_of_encoded_captions_drops_to_the_empty_one():
    batch = encoded(True).batch([2, 1, 0], [False, False, True], torch.device("cpu"))
    assert batch["latents"][:, 0, 0, 0].tolist() == [2, 1, 0]
    assert torch.equal(batch["time_ids"], torch.arange(18.0).view(3, 6)[[2, 1, 0]])
    assert batch["encoder_hidden_states"].flatten().tolist() == [10, 20, 0]
    assert batch["pooled"].flatten().tolist() == [1, 2, 0]
    assert "captions" not in batch


def test_a_batch_for_trained_text_encoders_keeps_captions():
    batch = encoded(False).batch([2, 1, 0], [False, True, False], torch.device("cpu"))
    assert batch["captions"] == ["a bee", "", "a bee"]
    assert set(batch) == {"latents", "time_ids", "captions"}


class ToyVae(torch.nn.Module):
    """Latents are the 8x8 block means: independent of how pictures were batched."""

    device, dtype = torch.device("cpu"), torch.float32
    config = type("Config", (), {"scaling_factor": 0.5})

    def encode(self, pixels):
        mode = torch.nn.functional.avg_pool2d(pixels, 8)
        return type("Output", (), {"latent_dist": type("Dist", (), {"mode": lambda _: mode})()})


class ToyComponents:
    vae = ToyVae()
    asked: list

    def encode_text(self, captions):
        self.asked += captions
        return {"encoder_hidden_states": torch.tensor([[[float(len(caption))]] for caption in captions])}


def test_encoding_a_dataset(pictures):
    captions = {"a.jpg": "a bee", "b.png": "an antelope", "c.webp": "a bee"}
    dataset = examine("x", [folder.Record(pictures / name, caption) for name, caption in captions.items()], "stop")
    components = ToyComponents()
    components.asked = []
    whole = encode_dataset(components, dataset, 16, with_text=True, batch_size=2)
    assert components.asked == ["", "a bee", "an antelope"]  # each distinct caption once, and the one for dropout
    pixels = np.stack([load_picture(record.path, 16).pixels for record in dataset.records]).astype(float)
    means = (pixels / 127.5 - 1).reshape(3, 2, 8, 2, 8, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    assert torch.allclose(whole.latents, torch.tensor(means, dtype=torch.float32) * 0.5, atol=1e-6)
    assert whole.time_ids.tolist() == [[16, 24, 0, 4, 16, 16]] * 3  # original (h, w), crop (top, left), target (h, w)
    batch = whole.batch([0, 1, 2], [False] * 3, torch.device("cpu"))
    assert batch["encoder_hidden_states"].flatten().tolist() == [5, 11, 5]
    without = encode_dataset(components, dataset, 16, with_text=False)
    assert without.text is None
    assert torch.equal(without.latents, whole.latents)
    assert np.array_equal(load_pixels(dataset, 16).permute(0, 2, 3, 1).numpy(), pixels)


def test_time_ids_are_in_sdxls_order():
    assert time_ids((480, 640), (1, 2), (64, 128)).tolist() == [480, 640, 1, 2, 64, 128]


def test_a_changed_world_is_drawn_anew(shapes_config, monkeypatch, tmp_path):
    before = shapes_source.drawn(shapes_config, "train", 4)
    changed = tmp_path / "shapes.py"
    shutil.copy(world.__file__, changed)
    changed.write_text(changed.read_text() + "\n")
    monkeypatch.setattr(world, "__file__", str(changed))
    assert shapes_source.drawn(shapes_config, "train", 4) != before
