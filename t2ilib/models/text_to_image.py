"""`TextToImagePipeline`: text to pictures by a UNet that works on pixels, with no VAE.

Needs torch, diffusers and transformers alone: `save_pretrained` writes this file beside the weights as `pipeline.py`, so that a folder draws
where t2ilib is not installed. Arguments are those of `StableDiffusionPipeline`, and so is what a step does. Any of diffusers' schedulers
for noise of the DDPM kind can be put in place of the one that it was saved with, and LoRA files are loaded as there.

Leaves out: prompt embeddings as arguments, eta, guidance rescaling, safety checking.
"""

import inspect
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

OWN_CODE, CARD = "pipeline.py", "README.md"
DRAWING = """```python
from diffusers import DiffusionPipeline

folder = "."  # this folder, or the id of its repository
pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
pipeline({prompt}, num_inference_steps={steps}, guidance_scale={guidance}).images[0].save("picture.png")
```"""
"""How to draw with a folder, where t2ilib is not installed: the code that is run is `pipeline.py` in it."""


class TextToImagePipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    """`tokenizer` and `text_encoder`: of CLIP, whose last hidden state (B, T, D) conditions the `unet`; it sees pixels (B, 3, H, W), from -1 to
    1, at the noise of `scheduler`."""

    model_cpu_offload_seq = "text_encoder->unet"
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
    ):
        super().__init__()
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder, unet=unet, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._guidance_scale, self._interrupt = 1.0, False

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to leave out the steps that are left."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Draws `num_images_per_prompt` pictures of each prompt.

        `height`, `width`: in pixels, without them those that the UNet was trained at. `generator`: one, or one a picture. `latents`: the noise to
        start from (B, 3, H, W), of unit variance. `clip_skip`: how many of the text encoder's last layers are left out.
        `output_type`: "pil", "np" (B, H, W, 3) and "pt" (B, 3, H, W) from 0 to 1, or "latent", (B, 3, H, W) as the last step left it.
        `callback_on_step_end(pipeline, number, timestep, tensors)` is called after every step with those of "latents", "prompt_embeds" and
        "negative_prompt_embeds" that are named, and may give others in their place. Raises ValueError for what cannot be drawn.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        side = self.unet.config.sample_size
        height, width = height or side, width or side
        self.check_inputs(prompts, height, width, generator, num_images_per_prompt, callback_on_step_end_tensor_inputs)
        self._guidance_scale, self._interrupt = guidance_scale, False
        device, number = self._execution_device, len(prompts) * num_images_per_prompt

        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompts, device, num_images_per_prompt, self.do_classifier_free_guidance, negative_prompt, clip_skip
        )
        shape = (number, self.unet.config.in_channels, height, width)
        latents = self.prepare_latents(shape, self.unet.dtype, device, generator, latents)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        options = {"return_dict": False}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            options["generator"] = generator

        with self.progress_bar(total=len(self.scheduler.timesteps)) as progress:
            for i, t in enumerate(self.scheduler.timesteps):
                if self.interrupt:
                    break
                prediction = self.predict(latents, t, prompt_embeds, negative_prompt_embeds)
                latents = self.scheduler.step(prediction, t, latents, **options)[0]
                if callback_on_step_end is not None:
                    here = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    shown = {name: here[name] for name in callback_on_step_end_tensor_inputs}
                    here |= callback_on_step_end(self, i, t, shown) or {}
                    latents, prompt_embeds, negative_prompt_embeds = (here[n] for n in self._callback_tensor_inputs)
                progress.update()

        pictures = latents
        if output_type != "latent":
            pictures = self.image_processor.postprocess(latents.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def predict(
        self, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor, negative_prompt_embeds: Tensor | None
    ) -> Tensor:
        """What the UNet predicts (B, 3, H, W), with classifier-free guidance (arXiv 2207.12598, equation 6, where guidance_scale is w + 1)
        as far from the prediction for the negative prompt as that for the prompt, and `guidance_scale` times."""
        guided = self.do_classifier_free_guidance
        text = torch.cat([negative_prompt_embeds, prompt_embeds]) if guided else prompt_embeds
        given = self.scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep)
        prediction = self.unet(given, timestep, encoder_hidden_states=text, return_dict=False)[0]
        if not guided:
            return prediction
        without, toward = prediction.chunk(2)
        return without + self.guidance_scale * (toward - without)

    def encode_prompt(
        self,
        prompts: Sequence[str],
        device: torch.device,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: str | Sequence[str] | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states (B, T, D) of the prompts and, with guidance, of the negative ones, or of ""."""

        def encode(texts: Sequence[str]) -> Tensor:
            ids = self.tokenizer(
                list(texts),
                padding="max_length",
                max_length=self.tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids.to(device)
            if not clip_skip:
                hidden = self.text_encoder(ids).last_hidden_state
            else:
                hidden = self.text_encoder(ids, output_hidden_states=True).hidden_states[-(clip_skip + 1)]
                norm = getattr(self.text_encoder, "text_model", self.text_encoder).final_layer_norm
                hidden = norm(hidden)
            return hidden.to(self.unet.dtype).repeat_interleave(num_images_per_prompt, dim=0)

        if not do_classifier_free_guidance:
            return encode(prompts), None
        negative = negative_prompt or ""
        negative = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if len(negative) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(negative)} negative prompts: give one, or one for each")
        return encode(prompts), encode(negative)

    def prepare_latents(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """What the first step sees."""
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents are {tuple(latents.shape)}, and what is asked for is {shape}")
        return latents.to(device, dtype) * self.scheduler.init_noise_sigma

    def check_inputs(
        self,
        prompts: Sequence[str],
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None,
        num_images_per_prompt: int,
        callback_inputs: Sequence[str],
    ) -> None:
        multiple = 2 ** (len(self.unet.config.block_out_channels) - 1)
        if height % multiple or width % multiple:
            raise ValueError(f"height {height} and width {width} must be multiples of {multiple} for this UNet")
        if not prompts:
            raise ValueError("there is no prompt")
        if isinstance(generator, list) and len(generator) != len(prompts) * num_images_per_prompt:
            raise ValueError(
                f"{len(generator)} generators for {len(prompts) * num_images_per_prompt} pictures: give one, or one for each"
            )
        unknown = set(callback_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs {', '.join(sorted(unknown))}: choose of {', '.join(self._callback_tensor_inputs)}"
            )

    def save_pretrained(self, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
        """As every pipeline is saved; with this file, and the model card that it was loaded with, or one that says how to draw."""
        super().save_pretrained(save_directory, *arguments, **options)
        folder = Path(save_directory)
        if Path(__file__).resolve() != (folder / OWN_CODE).resolve():
            shutil.copyfile(__file__, folder / OWN_CODE)
        origin = Path(str(self.config.get("_name_or_path") or "")) / CARD
        if (folder / CARD).exists():
            return
        if self.config.get("_name_or_path") and origin.is_file():
            shutil.copyfile(origin, folder / CARD)
        else:
            (folder / CARD).write_text(own_card(self), encoding="utf-8")


def own_card(pipeline: TextToImagePipeline) -> str:
    """A model card that says what the parts say of themselves."""
    count = sum(parameter.numel() for parameter in pipeline.unet.parameters())
    side = pipeline.unet.config.sample_size
    drawing = DRAWING.format(prompt='"a photo"', steps=50, guidance=3.0)
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
---

# Text to pictures of {side}x{side} pixels

A UNet of {count:,} parameters that works on pixels, conditioned on a CLIP text encoder.

{drawing}
"""
