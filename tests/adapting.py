"""What the tests of adapters share: small models with random weights, a few steps of training, and their output."""

from copy import deepcopy

import torch

from t2ilib.models.components import Components
from t2ilib.models.denoiser import Denoiser
from t2ilib.models.families import FAMILIES
from t2ilib.shapes import models

CAPTIONS = ["a red circle", "a small blue square on a white background"]


def build_parts(family="sdxl"):
    """A model of the tiny layout with random weights."""
    torch.manual_seed(0)
    tokenizer = models.build_tokenizer()
    names = FAMILIES[family].text_encoders
    return Components(
        family=FAMILIES[family],
        path="test",
        unet=models.build_unet(f"tiny-{family}").requires_grad_(False).eval(),
        vae=models.build_vae().requires_grad_(False).eval(),
        text_encoders={name: models.build_text_encoder(name, tokenizer).requires_grad_(False).eval() for name in names},
        tokenizers={name.replace("text_encoder", "tokenizer"): tokenizer for name in names},
        scheduler=models.build_scheduler(),
    )


def copy_parts(components):
    """The same weights, without what a test may have attached to the other."""
    text = {name: copy_of(encoder) for name, encoder in components.text_encoders.items()}
    parts = (components.family, components.path, copy_of(components.unet), components.vae, text)
    return Components(*parts, components.tokenizers, components.scheduler)


def copy_of(model):
    """`copy.deepcopy` without what other tests may have attached: the same class, config and weights."""
    twin = (
        type(model).from_config(model.config)
        if hasattr(type(model), "from_config")
        else type(model)(deepcopy(model.config))
    )
    twin.load_state_dict(model.state_dict())
    return twin.requires_grad_(False).eval()


def batch_of(components):
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    with torch.no_grad():
        return {"captions": CAPTIONS, "time_ids": ids, **components.encode_text(CAPTIONS)}


@torch.no_grad()
def output_of(components):
    """What the UNet says to fixed latents and captions, text encoders included."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return Denoiser(components, trains_text=True).eval()(latents, torch.tensor([10, 500]), batch_of(components))


def fit(components, proof=None, num_steps=8, trains_text=False, rate=1e-2, before_step=lambda step: None):
    """A toy training: fixed latents, fixed target, AdamW."""
    denoiser = Denoiser(components, trains_text).train()
    parameters = [p for module in components.modules().values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    generator = torch.Generator().manual_seed(2)
    latents, target = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    batch, losses = batch_of(components), []
    if trains_text:
        batch = {name: batch[name] for name in ("captions", "time_ids")}
    for step in range(1, num_steps + 1):
        loss = (denoiser(latents, torch.tensor([10, 500]), batch) - target).square().mean()
        loss.backward()
        before_step(step)
        if proof is not None:
            proof.observe(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    denoiser.eval()
    return losses


def trainable(components):
    """Names of the parameters that require a gradient."""
    return {
        f"{c}.{n}"
        for c, module in components.modules().items()
        for n, p in module.named_parameters()
        if p.requires_grad
    }
