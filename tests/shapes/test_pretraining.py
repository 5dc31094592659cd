"""The contrastive stage: CLIP's loss, a picture's own near misses among its wrong captions, and nothing read past the end."""

import pytest
import torch
from torch.nn import functional as F

from t2ilib.models.files.locate import SHIPPED
from t2ilib.shapes import models
from t2ilib.shapes.pretraining import TwoTextTowers, contrast


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def test_contrast_without_near_misses_is_the_loss_of_transformers() -> None:
    from transformers import CLIPModel

    torch.manual_seed(0)
    clip = CLIPModel.from_pretrained(SHIPPED["tiny-sdxl"] / "clip").float().eval()
    ids = models.build_tokenizer()(["a red circle", "a blue cross", "a large cross"], return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = clip(input_ids=ids, pixel_values=torch.randn(3, 3, 64, 64), return_loss=True)
        losses, logits = contrast(
            theirs.image_embeds, theirs.text_embeds, torch.zeros(3, 0, models.PROJECTION), clip.logit_scale.exp()
        )
    assert losses.mean().item() == pytest.approx(theirs.loss.item(), abs=1e-5)
    assert torch.allclose(logits, theirs.logits_per_image, atol=1e-4)


def test_near_misses_stand_against_their_own_picture_alone() -> None:
    torch.manual_seed(0)
    image, text, near = unit(4, 8), unit(4, 8), unit(4, 2, 8)
    plain, _ = contrast(image, text, near[:, :0], torch.tensor(5.0))
    losses, logits = contrast(image, text, near, torch.tensor(5.0))
    assert logits.shape == (4, 6)
    assert torch.allclose(logits[1, 4:], 5 * near[1] @ image[1])
    assert (losses > plain).all()
    moved = near.clone()
    moved[2] = -image[2]
    other, _ = contrast(image, text, moved, torch.tensor(5.0))
    assert other[2] < losses[2]
    assert torch.equal(other[[0, 1, 3]], losses[[0, 1, 3]])


def test_what_follows_the_end_of_a_caption_changes_nothing() -> None:
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(SHIPPED["tiny-sdxl"] / "clip").float().eval()
    tokenizer = models.build_tokenizer()
    model = TwoTextTowers(clip, models.build_text_encoder("text_encoder", tokenizer)).eval()
    captions = ["a small red circle", "a very large upright blue cross at the top left on a white background"]
    padded = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        _, first, second, _ = model(torch.zeros(2, 3, 64, 64), padded)
        whole = F.normalize(clip.get_text_features(padded).pooler_output, dim=-1)
        alone = model(torch.zeros(1, 3, 64, 64), padded[:1])
    assert torch.allclose(second, whole, atol=1e-5)
    assert torch.allclose(alone[1], first[:1], atol=1e-5)
