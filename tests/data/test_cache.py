"""Encoding once, on toy encoders whose results are known by hand: a latent is the mean of 8 x 8 pixels, a caption its length."""

import gc
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from encoding import given
from PIL import Image

from t2ilib.config import DataConfig
from t2ilib.data import cache
from t2ilib.data.cache import EncodedDataset, Fresh, FreshText, keep_latents, keep_text, text_encoder_of, weights_of
from t2ilib.data.dataset import Dataset, load_datasets
from t2ilib.data.pictures import PictureError, examine_mask, examine_picture, load_picture
from t2ilib.data.records import Record
from t2ilib.data.samples import Samples
from t2ilib.data.store import StoreError
from t2ilib.data.store.tensorfile import ShardError
from t2ilib.models.components import Components
from t2ilib.models.families import FAMILIES, time_ids
from t2ilib.runfile import build_run

CPU = torch.device("cpu")
SCALING = 0.5


class ToyModule(torch.nn.Module):
    device, dtype = CPU, torch.float32

    def __init__(self, number=0.0, **config):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([number]))
        self.config = FrozenDict({"block_out_channels": [8, 8], **config})


class ToyVae(ToyModule):
    """The means of 8 x 8 pixels. Counts what it encodes."""

    def __init__(self, number=0.0):
        super().__init__(number, scaling_factor=SCALING)
        self.encoded = 0

    def encode(self, pixels):
        self.encoded += len(pixels)
        mode = torch.nn.functional.avg_pool2d(pixels, 8) + self.weight
        return type("Output", (), {"latent_dist": type("Dist", (), {"mode": lambda _: mode})()})


class ToyTokenizer:
    model_max_length, pad_token = 77, "!"

    def get_vocab(self):
        return {"a": 0}


class ToyComponents(Components):
    """`asked`: the batches of captions that were encoded. `placed`: what was moved, and whether to work."""

    def __init__(self, number=0.0):
        self.asked, self.placed = [], []

        def encode_text(text_encoders, tokenizers, captions):
            self.asked.append(list(captions))
            return {"encoder_hidden_states": torch.tensor([[[float(len(caption))]] for caption in captions])}

        super().__init__(
            family=replace(FAMILIES["sd15"], encode_text=encode_text),
            path="toy",
            unet=ToyModule(),
            vae=ToyVae(number),
            text_encoders={"text_encoder": ToyModule(number)},
            tokenizers={"tokenizer": ToyTokenizer()},
            scheduler=None,
        )

    def place(self, module, at_work):
        self.placed.append((module, at_work))


def dataset_of(*records, ground="white"):
    seen = []
    for record in records:
        found = examine_picture(record.path)
        mask = record.mask and examine_mask(record.mask, record.path, (found.height, found.width)).sha256
        rejected = record.rejected and examine_picture(record.rejected)
        seen.append(replace(found, mask=mask or b"", rejected=rejected))
    return Dataset("x", records, "digest", ground=ground, seen=tuple(seen))


def samples_of(*records, held_out=False, **data):
    return Samples(dataset_of(*records), DataConfig(resolution=16, **data), seed=0, held_out=held_out)


def means(pixels):
    """(h, w, 3) -> what the toy gives of it."""
    height, width = pixels.shape[:2]
    scaled = pixels.astype(float) / 127.5 - 1
    blocks = scaled.reshape(height // 8, 8, width // 8, 8, 3).mean((1, 3))
    return torch.tensor(blocks.transpose(2, 0, 1) * SCALING, dtype=torch.float32)


@pytest.fixture
def records(pictures):
    captions = {"a.jpg": "a bee", "b.png": "an antelope", "c.webp": "a bee"}
    return [Record(pictures / name, caption) for name, caption in captions.items()]


TEXT = {
    caption: {"encoder_hidden_states": torch.full((1, 1), 10.0 * n), "pooled": torch.full((1,), float(n))}
    for n, caption in enumerate(("", "a bee", "an ant"))
}


def test_a_batch_of_encoded_captions_drops_to_the_empty_one():
    encoded = given(["a bee", "an ant", "a bee"], torch.arange(3.0).view(3, 1, 1, 1).expand(3, 4, 2, 2), TEXT)
    batch = encoded.batch([2, 1, 0], 0, [False, False, True], CPU)
    assert batch["latents"][:, 0, 0, 0].tolist() == [2, 1, 0]
    assert batch["encoder_hidden_states"].flatten().tolist() == [10, 20, 0]
    assert batch["pooled"].flatten().tolist() == [1, 2, 0]
    assert set(batch) == {"latents", "time_ids", "encoder_hidden_states", "pooled"}


def test_a_batch_for_trained_text_encoders_keeps_captions():
    batch = given(["a bee", "an ant", "a bee"], torch.zeros(3, 4, 2, 2)).batch([2, 1, 0], 0, [False, True, False], CPU)
    assert batch["captions"] == ["a bee", "", "a bee"]
    assert set(batch) == {"latents", "time_ids", "captions"}


def test_what_is_kept_is_what_is_encoded_and_nothing_is_encoded_twice(records, tmp_path):
    components, folder = ToyComponents(), tmp_path / "kept"
    parts = [samples_of(*records), samples_of(records[1], held_out=True)]
    kept = keep_latents(components, parts, folder)
    assert components.vae.encoded == 3  # the held-out picture is one of the others, seen in the same way
    expected = torch.stack([means(load_picture(record.path, 16).pixels) for record in records])
    assert torch.allclose(kept[0]([(2, 0), (0, 0)])["latents"], expected[[2, 0]], atol=1e-6)
    assert torch.allclose(kept[1]([(0, 0)])["latents"], expected[[1]], atol=1e-6)
    assert torch.equal(Fresh(components, parts[0])([(0, 0), (2, 0)])["latents"], kept[0]([(0, 0), (2, 0)])["latents"])

    again = ToyComponents()
    keep_latents(again, [samples_of(*records[::-1])], folder)  # another run, in another order
    assert again.vae.encoded == 0
    assert not again.placed  # then the VAE is not even moved
    keep_latents(again, [samples_of(*records, crop="random", views=3)], folder)
    assert 0 < again.vae.encoded <= 9


def test_another_encoder_has_a_cache_of_its_own(records, tmp_path):
    parts = [samples_of(*records)]
    first = keep_latents(ToyComponents(), parts, tmp_path / "kept")
    other = ToyComponents(number=1.0)
    second = keep_latents(other, parts, tmp_path / "kept")
    assert other.vae.encoded == 3
    views = [(0, 0), (1, 0), (2, 0)]
    assert torch.allclose(second[0](views)["latents"], first[0](views)["latents"] + SCALING)
    keep_text(ToyComponents(), ["a bee"], tmp_path / "kept")
    keep_text(other, ["a bee"], tmp_path / "kept")
    assert len(other.asked) == 1
    assert len(list((tmp_path / "kept").iterdir())) == 4


def test_what_encodes_is_known_by_weights_settings_precision_and_vocabulary():
    def known(change=lambda parts: None):
        components = ToyComponents()
        change(components)
        return weights_of({"vae": components.vae}), text_encoder_of(components)

    vae, text = known()
    assert known() == (vae, text)

    def other_activation(parts):
        parts.text_encoders["text_encoder"].config = FrozenDict({"hidden_act": "quick_gelu"})

    def came_from_elsewhere(parts):
        parts.vae.config = FrozenDict({**parts.vae.config, "_name_or_path": "elsewhere", "_diffusers_version": "9"})

    assert known(other_activation)[1] != text
    assert known(came_from_elsewhere) == (vae, text)
    assert known(lambda parts: setattr(parts.vae, "config", FrozenDict({"scaling_factor": 0.25})))[0] != vae
    assert known(lambda parts: parts.vae.half())[0] != vae
    assert known(lambda parts: parts.text_encoders["text_encoder"].weight.data.add_(1))[1] != text
    assert known(lambda parts: setattr(parts.tokenizers["tokenizer"], "pad_token", "</s>"))[1] != text
    assert known(lambda parts: setattr(parts, "zero_empty", True))[1] != text


def test_a_mask_beside_pictures_without_one_may_come_later(records, tmp_path):
    """Kept without masks first: entries with and without one cannot be read as one batch."""
    views = [(0, 0), (1, 0), (2, 0)]
    assert set(keep_latents(ToyComponents(), [samples_of(*records)], tmp_path / "kept")[0](views)) == {"latents"}
    black = np.zeros((16, 24), np.uint8)
    black[:, :12], black[:4, 12:16] = 255, 255
    Image.fromarray(black).save(tmp_path / "mask.png")
    masked = [replace(records[0], mask=tmp_path / "mask.png"), *records[1:]]
    (kept,) = keep_latents(ToyComponents(), [samples_of(*masked)], tmp_path / "kept")
    batch = kept(views)
    # the middle 16 of 24 columns: 4 to 20, of which 8 are white, and then 4 x 4 pixels of the next latent
    assert batch["mask"][0, 0].tolist() == [[1.0, 16 / 64], [1.0, 0.0]]
    assert batch["mask"][1:].unique().tolist() == [1.0]
    fresh = Fresh(ToyComponents(), samples_of(*masked))(views)
    assert all(torch.equal(fresh[name], batch[name]) for name in ("latents", "mask"))


def test_what_is_transparent_is_encoded_over_the_ground_and_may_not_count(tmp_path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, 8:] = 255, 0, 0, 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    record = Record(tmp_path / "x.png", "half of it")
    for alpha in ("ground", "mask"):
        part = samples_of(record, ground="#204060", alpha=alpha)
        found = keep_latents(ToyComponents(), [part], tmp_path / "kept")[0]([(0, 0)])
        assert torch.allclose(found["latents"][0, :, 0, 0], (torch.tensor([32.0, 64.0, 96.0]) / 127.5 - 1) * SCALING)
        assert torch.allclose(found["latents"][0, :, 1, 1], torch.tensor([1.0, -1.0, -1.0]) * SCALING)
        assert alpha == "ground" or found["mask"][0, 0].tolist() == [[0.0, 1.0], [0.0, 1.0]]


def test_sdxls_conditioning_of_mirrored_random_crops_by_value(tmp_path, picture):
    """A picture whose pixels say where they are: the crop's edges are read from the latents, not from the code that chose them."""
    height, width = 40, 60
    rows, columns = np.mgrid[:height, :width]
    Image.fromarray(np.stack([columns, rows, 0 * rows], 2).astype(np.uint8)).save(tmp_path / "x.png")
    config = DataConfig(resolution=40, crop="random", flip=0.5, views=12)
    part = Samples(dataset_of(Record(tmp_path / "x.png", "x")), config, seed=0)
    (latents,) = keep_latents(ToyComponents(), [part], tmp_path / "kept")
    found = EncodedDataset(part, latents, None)
    seen = set()
    for step in range(40):
        batch = found.batch([0], step, [False], CPU)
        original, (top, left), size = batch["time_ids"].view(3, 2).long().tolist()
        columns = (batch["latents"][0, 0] / SCALING + 1) * 127.5
        flipped = bool(columns[0, 0] > columns[0, -1])
        # 8 columns of the picture, 20 more than the crop has: their mean is 3.5 after the first of them
        first = columns[0].max().item() - 3.5 - 32
        assert (original, size, top) == ([40, 60], [40, 40], 0)
        assert left == pytest.approx(20 - first if flipped else first, abs=1e-3)
        seen.add((left, flipped))
    assert {flipped for _, flipped in seen} == {True, False}
    assert len({left for left, _ in seen}) > 4


def test_captions_are_encoded_once_each_in_batches_of_one_size(tmp_path):
    components = ToyComponents()
    captions = ["", *(f"caption{'!' * n}" for n in range(20)), "", "caption!"]
    text = keep_text(components, captions, tmp_path)
    assert [len(batch) for batch in components.asked] == [16, 16]
    assert components.asked[0] + components.asked[1][:5] == captions[:21]
    assert text(["caption!!", "", "caption!!"])["encoder_hidden_states"].flatten().tolist() == [9, 0, 9]
    again = ToyComponents()
    assert keep_text(again, ["caption", ""], tmp_path)(["caption"])["encoder_hidden_states"].item() == 7
    assert not again.asked
    with pytest.raises(KeyError, match="never seen"):
        text(["", "never seen"])


def test_trailing_zeros_of_a_key_are_part_of_it(tmp_path, monkeypatch):
    """numpy drops them from what it gives one by one."""
    keys = {"": b"\1" * 14 + b"\0\0", "a": b"\1" * 13 + b"\0" * 3}
    monkeypatch.setattr(cache, "content_key", lambda kind, caption: keys[caption])
    text = keep_text(ToyComponents(), ["", "a"], tmp_path)
    assert text(["a", ""])["encoder_hidden_states"].flatten().tolist() == [1, 0]
    assert keep_text(ToyComponents(), ["a"], tmp_path)(["a"])["encoder_hidden_states"].item() == 1


def test_a_file_that_is_not_what_it_was_is_refused(records, tmp_path, picture):
    part = samples_of(*records)
    picture(9).save(records[1].path)
    with pytest.raises(PictureError, match=r"b\.png: is not what it was when this run looked at it"):
        keep_latents(ToyComponents(), [part], tmp_path / "kept")
    with pytest.raises(PictureError, match=r"b\.png: is not what it was"):
        Fresh(ToyComponents(), part)([(1, 0)])
    again = ToyComponents()  # what was encoded before it is kept, and the right picture under its own key
    (kept,) = keep_latents(again, [samples_of(*records)], tmp_path / "kept")
    assert again.vae.encoded == 2
    assert torch.allclose(kept([(1, 0)])["latents"][0], means(load_picture(records[1].path, 16).pixels), atol=1e-6)


def test_parts_are_back_in_their_places_whatever_is_raised(records, tmp_path):
    components = ToyComponents()
    components.park(())
    components.placed.clear()

    def no_room(pixels):
        raise torch.OutOfMemoryError("no room")

    components.vae.encode = no_room
    with pytest.raises(torch.OutOfMemoryError):
        keep_latents(components, [samples_of(*records)], tmp_path / "kept")
    where = dict(components.placed)
    assert (where[components.unet], where[components.vae]) == (True, False)
    assert components.placed[:2] == [(components.unet, False), (components.vae, True)]
    assert components.home is None
    components.vae = ToyVae()
    keep_latents(components, [samples_of(*records)], tmp_path / "kept")


def test_a_damaged_shard_is_told_by_name_with_what_to_do(records, tmp_path):
    (kept,) = keep_latents(ToyComponents(), [samples_of(*records)], tmp_path)
    (shard,) = tmp_path.glob("latents-*/*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    remedy = "delete this file, and what it held is encoded again"
    with pytest.raises(ShardError, match=f"{shard.name} is damaged .*: {remedy}"):
        kept([(0, 0), (1, 0), (2, 0)])
    shard.write_bytes(whole[:-5])
    with pytest.raises(ShardError, match=rf"{shard.name} is cut off .*: {remedy}"):
        keep_latents(ToyComponents(), [samples_of(*records)], tmp_path)
    shard.unlink()
    with pytest.raises(StoreError, match="has been deleted since it was opened: start again"):
        kept([(0, 0)])
    again = ToyComponents()
    keep_latents(again, [samples_of(*records)], tmp_path)
    assert again.vae.encoded == 3


def test_a_view_that_is_asked_for_several_times_is_encoded_once(records):
    components = ToyComponents()
    found = Fresh(components, samples_of(*records))([(1, 0), (0, 0), (1, 0), (1, 0)])["latents"]
    assert components.vae.encoded == 2
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_encoders_keep_their_precision_where_the_unet_has_another(records, tmp_path):
    """Validation runs under autocast, and bfloat16 latents would not be those that are kept."""

    class Multiplies(ToyVae):
        def encode(self, pixels):
            assert (pixels.flatten(1) @ pixels.flatten(1).T).dtype == torch.float32
            return super().encode(pixels)

    components = ToyComponents()
    components.vae = Multiplies()

    def encode_text(text_encoders, tokenizers, captions):
        return {"product": torch.ones(len(captions), 2) @ torch.ones(2, 2)}

    components.family = replace(components.family, encode_text=encode_text)
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        Fresh(components, samples_of(*records))([(0, 0)])
        assert FreshText(components)(["a"])["product"].dtype == torch.float32
        assert keep_text(components, ["a"], tmp_path)(["a"])["product"].dtype == torch.float32


def test_time_ids_are_in_sdxls_order():
    assert time_ids((480, 640), (1, 2), (64, 128)).tolist() == [480, 640, 1, 2, 64, 128]


def test_what_a_run_holds_a_picture_is_no_more_than_its_names_and_captions(tmp_path, captioned):
    """20 and 200 pictures: 2 KB of Python's and numpy's for each more, and no tensors."""

    def held(count):
        folder = captioned(tmp_path / str(count), count)
        kept = tempfile.mkdtemp(dir=tmp_path)
        run = build_run({"adapter": {}, "data": {"path": folder, "resolution": 16, "views": 2, "flip": 0.5}})
        components = ToyComponents()
        gc.collect()
        tracemalloc.start()
        training, held_out = load_datasets(run)
        parts = [Samples(part, run.data, 0, held_out=part is held_out) for part in (training, held_out)]
        captions = ["", *parts[0].all_captions(), *parts[1].all_captions()]
        latents = keep_latents(components, parts, Path(kept))
        text = keep_text(components, captions, Path(kept))
        encoded = EncodedDataset(parts[0], latents[0], text)
        del captions
        components.asked.clear()
        components.placed.clear()
        gc.collect()
        traced = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
        return traced, tensors, encoded

    held(10)  # what is imported late
    growth = []
    for _ in range(3):  # what other threads of the tests take meanwhile is not the same twice
        (few, tensors, _few), (many, more_tensors, encoded) = held(20), held(200)
        assert more_tensors <= tensors
        assert len(encoded) > 150
        growth.append((many - few) / 180)
        if growth[-1] < 2000:
            break
    assert min(growth) < 2000, growth


@pytest.fixture
def pairs(tmp_path, picture):
    """Two pairs, whose rejected pictures have other sizes than the chosen ones."""
    sizes = {"a": (24, 16), "b": (16, 40), "c": (30, 30), "d": (50, 20)}
    for number, (name, size) in enumerate(sizes.items()):
        picture(number, size).save(tmp_path / f"{name}.png")
    path = {name: tmp_path / f"{name}.png" for name in sizes}
    return [Record(path["a"], "a bee", rejected=path["b"]), Record(path["c"], "an ant", rejected=path["d"])]


def test_both_pictures_of_a_pair_are_encoded_whatever_is_kept(pairs, tmp_path):
    """The middle of each, under keys that pictures have by themselves: what is known of one is known of it in any pair."""
    components, part = ToyComponents(), samples_of(*pairs)
    (alone,) = keep_latents(components, [samples_of(Record(pairs[1].rejected, "d"))], tmp_path / "kept")
    kept = keep_latents(components, [part, samples_of(*pairs[1:], held_out=True)], tmp_path / "kept")
    assert components.vae.encoded == 4
    expected = [means(load_picture(path, 16).pixels) for record in pairs for path in (record.path, record.rejected)]
    found = kept[0]([(1, 0), (0, 0)])
    assert torch.allclose(found["latents"], torch.stack([expected[2], expected[0]]), atol=1e-6)
    assert torch.allclose(found["rejected"], torch.stack([expected[3], expected[1]]), atol=1e-6)
    assert torch.equal(kept[1]([(0, 0)])["rejected"], alone([(0, 0)])["latents"])
    fresh = Fresh(ToyComponents(), part)
    fresh.announce([(1, 0), (0, 0)])
    assert fresh.pictures.begun.keys() == {(1, 0, False), (0, 0, False), (1, 0, True), (0, 0, True)}
    for name, tensor in fresh([(1, 0), (0, 0)]).items():
        assert torch.equal(tensor, found[name]), name

    batch = EncodedDataset(part, kept[0], None).batch([0], 0, [False], CPU)
    assert set(batch) == {"latents", "rejected", "time_ids", "rejected_time_ids", "captions"}
    assert batch["time_ids"].flatten().tolist() == [16, 24, 0, 4, 16, 16]
    assert batch["rejected_time_ids"].flatten().tolist() == [40, 16, 12, 0, 16, 16]


def test_views_of_a_pair_have_one_target_one_flip_and_each_its_own_scale(pairs):
    part = samples_of(*pairs, crop="random", flip=0.5, views=20)
    views = [(part.view(0, number), part.view(0, number, rejected=True)) for number in range(20)]
    assert all(one.flipped == other.flipped for one, other in views)
    assert {one.flipped for one, _ in views} == {True, False}
    assert {(one.scaled, other.scaled) for one, other in views} == {((16, 24), (40, 16))}
    assert all(one.size == other.size == (16, 16) for one, other in views)
    assert len({other.top for _, other in views}) > 5
    assert len(part.keys()) == 2 * 2 * 20
    assert (
        part.keys()[: 2 * 20].tolist()
        == samples_of(*(replace(record, rejected=None) for record in pairs), crop="random", flip=0.5, views=20)
        .keys()
        .tolist()
    ), "what was kept of pictures before they were in pairs"
