"""The two other parts of a latent diffusion model, as setups of the same loop: the autoencoder and a contrastive CLIP.

The autoencoder can learn on random crops: at a quarter of the pixels a step costs a quarter, and edges are what it has to
learn, so of a few candidate crops the busiest is taken and pixels near edges weigh more. A few steps on whole pictures
must follow, because the statistics that its group norms see on crops are not those of whole pictures. Leaves out: perceptual and
adversarial losses, which need networks that know the pictures already.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from t2ilib.config import ConfigError, RunConfig
from t2ilib.data.dataset import Dataset
from t2ilib.data.loader import Order
from t2ilib.data.pictures import load_picture
from t2ilib.models.components import Components
from t2ilib.models.families import tokenize
from t2ilib.models.pipeline import clip_folder, quiet_libraries, save_pipeline
from t2ilib.seeds import generator_for, numpy_generator_for, seed_for
from t2ilib.shapes import checker, world
from t2ilib.shapes.models import save_clip
from t2ilib.training.setups import Setup

EDGE_WEIGHT = 4.0
KL_WEIGHT = 1e-6
NEAR_MISSES = 3


def load_pixels(dataset: Dataset, resolution: int) -> Tensor:
    """All pictures as (N, 3, H, W) uint8, held in memory."""
    pixels = [load_picture(record.path, resolution, dataset.ground).pixels for record in dataset.records]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


class Reconstruction(nn.Module):
    """Pixels (B, 3, H, W) in [-1, 1] and latent noise (B, C, h, w) -> reconstruction and KL to the unit Gaussian (B,)."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pixels).latent_dist
        return self.vae.decode(posterior.mean + posterior.std * noise).sample.float(), posterior.kl().float()


def edge_weights(pixels: Tensor) -> Tensor:
    """1 on flat areas, 1 + EDGE_WEIGHT within two pixels of a strong edge: (B, 1, H, W)."""
    contrast = F.max_pool2d(pixels, 5, 1, 2) + F.max_pool2d(-pixels, 5, 1, 2)
    return 1 + EDGE_WEIGHT * contrast.amax(1, keepdim=True).clamp(max=1)


def busiest_crop(pixels: Tensor, size: int, seed: int, step: int, sample: int) -> Tensor:
    """Of four random windows (3, size, size) of one picture (3, H, W), the one with the largest variance."""
    limit = pixels.shape[-1] - size + 1
    if limit == 1:
        return pixels.float()
    generator = generator_for(seed, "crop", step, sample)
    crops = [
        pixels[:, y : y + size, x : x + size].float()
        for y, x in torch.randint(limit, (4, 2), generator=generator).tolist()
    ]
    return max(crops, key=lambda crop: float(crop.var()))


def reconstruction_loss(model: nn.Module, batch: dict[str, Tensor], noise: Tensor, timesteps: Tensor) -> Tensor:
    """L1 and squared error weighted towards edges, plus a small KL term: (B,). Nothing is noised but what the posterior draws."""
    reconstruction, kl = model(batch["pixels"], batch["latent_noise"])
    error = reconstruction - batch["pixels"]
    return ((error.abs() + 2 * error.square()) * edge_weights(batch["pixels"])).mean((1, 2, 3)) + KL_WEIGHT * kl


def setup_vae(
    run: RunConfig, components: Components, training: Dataset, held_out: Dataset, accelerator: Accelerator
) -> Setup:
    """The autoencoder, on crops or whole pictures."""
    vae, device = components.vae.requires_grad_(True), accelerator.device
    pixels, held_out_pixels = load_pixels(training, run.data.resolution), load_pixels(held_out, run.data.resolution)
    size = run.shapes.crop or run.data.resolution

    def batch(ids: list[int], step: int) -> dict[str, Tensor]:
        crops = torch.stack([busiest_crop(pixels[i], size, run.seed, step, i) for i in ids]).to(device) / 127.5 - 1
        shape = (vae.config.latent_channels, size // 8, size // 8)
        noise = torch.stack(
            [torch.randn(shape, generator=generator_for(run.seed, "latent noise", step, i)) for i in ids]
        )
        return {"pixels": crops, "latent_noise": noise.to(device)}

    def validate(step: int) -> dict[str, float]:
        pictures, error = reconstruct(vae, held_out_pixels.to(device))
        metrics = {"reconstruction_mse": error}
        scenes = [world.scene_from(record.scene) for record in held_out.records if record.scene]
        if len(scenes) == len(pictures):
            metrics["checker/all"] = checker.check(scenes, pictures).all_attributes
        return metrics

    def save(folder: Path) -> None:
        with torch.no_grad():
            sample = pixels[:: max(1, len(pixels) // 512)].to(device) / 127.5 - 1
            latents = torch.cat([vae.encode(part).latent_dist.mode() for part in sample.split(64)])
        vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
        save_pipeline(components, folder / "model")

    order = Order(run.seed, run.training.batch_size, len(pixels))
    return Setup(components, Reconstruction(vae), {"vae": vae}, order, batch, reconstruction_loss, validate, save)


@torch.no_grad()
def reconstruct(vae: nn.Module, pixels: Tensor) -> tuple[list[Image.Image], float]:
    """Encodes and decodes (N, 3, H, W) uint8; returns pictures and the mean squared error on the [-1, 1] scale."""
    pictures, errors = [], []
    for part in pixels.split(64):
        scaled = part.float() / 127.5 - 1
        decoded = vae.decode(vae.encode(scaled).latent_dist.mode()).sample.float()
        errors.append((decoded - scaled).square().mean((1, 2, 3)))
        rounded = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        pictures += [Image.fromarray(np.ascontiguousarray(picture)) for picture in rounded]
    return pictures, float(torch.cat(errors).mean())


class TwoTextTowers(nn.Module):
    """One image tower against both text encoders: pixels (B, 3, H, W) and token ids (N, T) -> unit embeddings (B, D), (N, D),
    (N, D), and the scale.

    The first text encoder has no projection of its own in SDXL; the one used here is dropped after training.
    """

    def __init__(self, clip: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.clip, self.text_encoder = clip, text_encoder
        self.projection = nn.Linear(text_encoder.config.hidden_size, clip.config.projection_dim, bias=False)

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ends = (ids == self.text_encoder.config.eos_token_id).int().argmax(1)
        ids = ids[:, : int(ends.max()) + 1]  # attention is causal: what follows the end changes nothing
        image = self.clip.visual_projection(self.clip.vision_model(pixels).pooler_output)
        second = self.clip.text_projection(self.clip.text_model(ids).pooler_output)
        first = self.projection(self.text_encoder(ids).pooler_output)
        return *(F.normalize(x.float(), dim=-1) for x in (image, first, second)), self.clip.logit_scale.exp().clamp(
            max=100
        )


def contrast(image: Tensor, text: Tensor, near: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Unit embeddings (B, D), (B, D) and near misses of each picture (B, K, D) -> loss (B,), logits of picture to text (B, B + K).

    The symmetric cross-entropy of CLIP (arXiv 2103.00020), where a picture's own near misses stand among its wrong captions
    (hard negatives, arXiv 2210.01936): captions of other pictures differ in so much that nothing subtle need be read.
    """
    target = torch.arange(len(image), device=image.device)
    across = scale * image @ text.T
    to_text = torch.cat([across, scale * torch.einsum("bd,bkd->bk", image, near)], dim=1)
    losses = F.cross_entropy(to_text, target, reduction="none") + F.cross_entropy(across.T, target, reduction="none")
    return losses / 2, to_text


def compare(model: nn.Module, batch: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """For each text tower the losses (B,) and the logits (B, B + K) of picture to text; K is 0 unless every scene is known."""
    image, *towers, scale = model(batch["pixels"], batch["tokens"])
    compared = []
    for tower in towers:
        text, *rest = tower.split(batch["parts"])
        near = rest[1].view(len(image), -1, rest[1].shape[-1]) if rest else text[:, None, :][:, :0]
        loss, to_text = contrast(image, text, near, scale)
        compared.append((loss + contrast(rest[0], text, near, scale)[0] if rest else loss, to_text))
    return compared


def contrastive_loss(model: nn.Module, batch: dict[str, Any], noise: Tensor, timesteps: Tensor) -> Tensor:
    """The mean of both text towers' losses (B,); nothing is noised."""
    return torch.stack([loss for loss, _ in compare(model, batch)]).mean(0)


def setup_clip(
    run: RunConfig, components: Components, training: Dataset, held_out: Dataset, accelerator: Accelerator
) -> Setup:
    """A contrastive model whose text towers become the pipeline's text encoders.

    Where the scene is known (the shapes world) each caption also meets, in every step others, NEAR_MISSES captions that are
    wrong in one attribute, and a paraphrase: the same contrast between two texts as between picture and text (supervised
    SimCSE, arXiv 2104.08821), so that text towers tell apart what the picture tower cannot see yet.
    """
    from transformers import CLIPModel

    device = accelerator.device
    folder_of_clip = clip_folder(components.path)
    if folder_of_clip is None:
        raise ConfigError(f"model.base {components.path} has no `clip` folder beside its parts to train")
    with quiet_libraries():
        clip = CLIPModel.from_pretrained(folder_of_clip, dtype=torch.float32).to(device)
    first = components.text_encoders["text_encoder"].requires_grad_(True)
    torch.manual_seed(seed_for(run.seed, "clip projection"))
    model = TwoTextTowers(clip, first).to(device)
    tokenizer = components.tokenizers["tokenizer"]
    pixels, held_out_pixels = load_pixels(training, run.data.resolution), load_pixels(held_out, run.data.resolution)

    def batch_of(data: Dataset, pixels: Tensor, ids: list[int], num_near: int, key: tuple) -> dict[str, Any]:
        """`pixels`, `tokens` of all texts, and how many of them are captions, paraphrases and near misses; captions alone unless
        every scene is known."""
        records = [data.records[i] for i in ids]
        texts = [[record.caption for record in records]]
        if all(record.scene for record in records):
            near, other = [], []
            for i, record in zip(ids, records, strict=True):
                scene = world.scene_from(record.scene)
                rng = numpy_generator_for(run.seed, "near misses", *key, i)
                near += world.near_misses(scene, record.caption, num_near, rng)
                other.append(world.paraphrase(scene, record.caption, rng))
            texts += [other, near]
        tokens = tokenize(tokenizer, [text for part in texts for text in part]).to(device)
        return {
            "pixels": pixels[ids].to(device) / 127.5 - 1,
            "tokens": tokens,
            "parts": [len(part) for part in texts],
        }

    def batch(ids: list[int], step: int) -> dict[str, Any]:
        return batch_of(training, pixels, ids, NEAR_MISSES, (step,))

    @torch.no_grad()
    def validate(step: int) -> dict[str, float]:
        ids = list(range(len(held_out)))
        target = torch.tensor(ids, device=device)
        metrics = {}
        for name, (loss, logits) in zip(
            ("first", "second"), compare(model, batch_of(held_out, held_out_pixels, ids, 6, ("held out",))), strict=True
        ):
            metrics[f"contrastive_loss/{name}"] = float(loss.mean())
            metrics[f"retrieval/{name}"] = float((logits[:, : len(ids)].argmax(1) == target).float().mean())
            own, near = logits[target, target], logits[:, len(ids) :]
            if near.shape[1]:
                metrics[f"near_misses/{name}"] = float((own[:, None] > near).float().mean())
        return metrics

    def save(folder: Path) -> None:
        second = components.text_encoders["text_encoder_2"]
        second.text_model.load_state_dict(clip.text_model.state_dict())
        second.text_projection.load_state_dict(clip.text_projection.state_dict())
        save_pipeline(components, folder / "model")
        with quiet_libraries():
            save_clip(clip, tokenizer, folder / "model" / "clip")

    order = Order(run.seed, run.training.batch_size, len(pixels))
    return Setup(components, model, {"clip": model}, order, batch, contrastive_loss, validate, save)
