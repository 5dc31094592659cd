import numpy as np
import torch
from PIL import Image

from t2ilib.data.cache import EncodedDataset, encode_dataset, load_pixels
from t2ilib.data.manifest import Dataset
from t2ilib.data.pictures import load_picture
from t2ilib.data.sources.folder import Record
from t2ilib.models.components import Components
from t2ilib.models.families import time_ids


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
    encode_pictures = Components.encode_pictures

    def encode_text(self, captions):
        self.asked += captions
        return {"encoder_hidden_states": torch.tensor([[[float(len(caption))]] for caption in captions])}


def test_encoding_a_dataset(pictures):
    captions = {"a.jpg": "a bee", "b.png": "an antelope", "c.webp": "a bee"}
    dataset = Dataset("x", tuple(Record(pictures / name, caption) for name, caption in captions.items()), "digest")
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


def test_what_is_transparent_is_encoded_over_the_ground(tmp_path):
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "x.png")
    dataset = Dataset("x", (Record(tmp_path / "x.png", "nothing"),), "digest", ground="#204060")
    assert load_pixels(dataset, 16).unique(dim=2).flatten().tolist() == [0x20] * 16 + [0x40] * 16 + [0x60] * 16
    components = ToyComponents()
    components.asked = []
    latents = encode_dataset(components, dataset, 16, with_text=False).latents
    assert torch.allclose(latents[0, :, 0, 0], (torch.tensor([32.0, 64.0, 96.0]) / 127.5 - 1) * 0.5)
