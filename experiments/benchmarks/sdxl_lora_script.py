"""What diffusers' `examples/text_to_image/train_text_to_image_lora_sdxl.py` does, stated again in plain words, for `adapters.py`.

    python experiments/benchmarks/sdxl_lora_script.py BASE PICTURES --steps 200 --batch 8 --rank 8

Read at diffusers' commit 23cf712 with its defaults, no mixed precision, no trained text encoders: parts from a pipeline's folder; peft's
adapter, `gaussian`, on to_q, to_k, to_v and to_out.0, alpha the rank; torch's AdamW; `datasets`' image folder, decoded, cropped and
tokenized as its batches are made; and in every step the VAE encodes the pictures, both text encoders the captions, the loss is
averaged over timesteps alike, gradients are clipped, three numbers are shown and one is logged. Differs in: the pictures' transforms are
Pillow's and NumPy's, for want of torchvision; there is no tracker to log to, and the pipeline is not loaded again at the end.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import load_dataset
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


def pixels_of(picture: Image.Image, side: int) -> tuple[Tensor, tuple[int, int]]:
    """The short side resized, a random square of it, from -1 to 1; and where that was cut out."""
    scale = side / min(picture.size)
    picture = picture.convert("RGB").resize([round(n * scale) for n in picture.size], Image.Resampling.BILINEAR)
    top, left = (random.randint(0, n - side) for n in (picture.height, picture.width))
    cut = np.asarray(picture.crop((left, top, left + side, top + side)), dtype=np.float32)
    return torch.from_numpy(cut).permute(2, 0, 1) / 127.5 - 1, (top, left)


class Script:
    def __init__(self, base: Path, pictures: Path, cache: Path, batch: int, rank: int, side: int, steps: int):
        self.side, self.accelerator = side, Accelerator(cpu=not torch.cuda.is_available())
        load = {"pretrained_model_name_or_path": base}
        self.tokenizers = [CLIPTokenizer.from_pretrained(base, subfolder=n) for n in ("tokenizer", "tokenizer_2")]
        self.schedule = DDPMScheduler.from_pretrained(**load, subfolder="scheduler")
        self.encoders = [
            CLIPTextModel.from_pretrained(**load, subfolder="text_encoder"),
            CLIPTextModelWithProjection.from_pretrained(**load, subfolder="text_encoder_2"),
        ]
        self.vae = AutoencoderKL.from_pretrained(**load, subfolder="vae")
        unet = UNet2DConditionModel.from_pretrained(**load, subfolder="unet")
        for part in (*self.encoders, self.vae, unet):
            part.requires_grad_(False).to(self.accelerator.device)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=TARGETS))
        self.parameters = [p for p in unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=1e-2)
        dataset = load_dataset("imagefolder", data_dir=str(pictures), cache_dir=str(cache))["train"]
        loader = torch.utils.data.DataLoader(
            dataset.with_transform(self.prepared), shuffle=True, collate_fn=self.collated, batch_size=batch
        )
        schedule = get_scheduler("constant", optimizer, num_warmup_steps=500, num_training_steps=steps)
        self.unet, self.optimizer, self.loader, self.rates = self.accelerator.prepare(unet, optimizer, loader, schedule)

    def prepared(self, rows: dict) -> dict:
        cut = [pixels_of(picture, self.side) for picture in rows["image"]]
        ids = [
            tokenizer(rows["text"], padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                      return_tensors="pt").input_ids
            for tokenizer in self.tokenizers
        ]  # fmt: skip
        sizes = [(picture.height, picture.width) for picture in rows["image"]]
        return {"pixels": [x for x, _ in cut], "crops": [at for _, at in cut], "sizes": sizes,
                "first": list(ids[0]), "second": list(ids[1])}  # fmt: skip

    def collated(self, rows: list[dict]) -> dict:
        tensors = {name: torch.stack([row[name] for row in rows]) for name in ("pixels", "first", "second")}
        times = [[*row["sizes"], *row["crops"], self.side, self.side] for row in rows]
        return tensors | {"time_ids": torch.tensor(times, dtype=torch.float32)}

    def encoded(self, ids: list[Tensor]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            found = [
                encoder(part.to(encoder.device), output_hidden_states=True)
                for encoder, part in zip(self.encoders, ids, strict=True)
            ]
        return torch.cat([each.hidden_states[-2] for each in found], dim=-1), found[-1].text_embeds

    def step(self, batch: dict) -> float:
        with self.accelerator.accumulate(self.unet):
            latents = self.vae.encode(batch["pixels"]).latent_dist.sample() * self.vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(
                0, self.schedule.config.num_train_timesteps, (len(latents),), device=latents.device
            )
            noisy = self.schedule.add_noise(latents, noise, timesteps)
            hidden, pooled = self.encoded([batch["first"], batch["second"]])
            added = {"time_ids": batch["time_ids"], "text_embeds": pooled}
            prediction = self.unet(noisy, timesteps, hidden, added_cond_kwargs=added, return_dict=False)[0]
            loss = F.mse_loss(prediction.float(), noise.float())
            shown = self.accelerator.gather(loss.repeat(len(latents))).mean().item()
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.rates.step()
            self.optimizer.zero_grad()
        self.accelerator.log({"train_loss": shown})
        return loss.detach().item()

    def train(self, steps: int) -> float:
        """Steps a second, without the first."""
        bar, began, done = tqdm(total=steps, desc="Steps"), 0.0, 0
        self.unet.train()
        while done < steps:
            for batch in self.loader:
                bar.set_postfix(step_loss=self.step(batch), lr=self.rates.get_last_lr()[0])
                bar.update()
                done += 1
                began = began or time.perf_counter()
                if done == steps:
                    break
        return (steps - 1) / (time.perf_counter() - began)

    def save(self, folder: Path) -> None:
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.accelerator.unwrap_model(self.unet)))
        StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("pictures", type=Path)
    for name, value in {"steps": 200, "batch": 8, "rank": 8, "side": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = (chosen.batch, chosen.rank, chosen.side, chosen.steps)
        script = Script(chosen.base, chosen.pictures, Path(folder) / "cache", *sizes)
        speed = script.train(chosen.steps)
        script.save(Path(folder) / "adapter")
    print(json.dumps({"steps_per_second": speed}))


if __name__ == "__main__":
    main()
