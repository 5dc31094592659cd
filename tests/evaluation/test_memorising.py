"""Learned by heart: copies are flagged and new pictures are not, by an embedding model, by the gap, and by SSCD's kind of file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from own_pictures import context_of, plain, run_on, shades, ten

from t2ilib.config import ConfigError
from t2ilib.evaluation.memorising import COPIED, MEMORISING, copies, lacks_detector, load_detector, memorising
from t2ilib.evaluation.metrics import flagged
from t2ilib.evaluation.references import Real
from t2ilib.runfile import build_run

__all__ = ["ten"]
RUN = build_run({"adapter": {}, "evaluation": {"embedding_models": ["owner/colours"]}})
TRAINING = Real(shades(20, 0), [(f"training {i}",) for i in range(20)])
HELD_OUT = Real(shades(10, 1), [(f"held out {i}",) for i in range(10)])


def measured(pictures, group, prompts, base=None, real=(TRAINING, HELD_OUT)):
    base = base or shades(len(pictures), 9, (60, 60, 200))
    found = memorising(pictures, prompts, context_of(group, real=real, base={tuple(prompts): base}))
    return {name: float(np.mean(value)) for name, value in found.items()}


def test_copies_are_flagged_and_new_pictures_of_the_same_kind_are_not() -> None:
    declared = MEMORISING.declared("contexts", RUN)
    copied = measured(list(TRAINING.pictures[:16]), "contexts", ["x"] * 16)
    assert copied["nearer_training/contexts/colours"] == 1
    names = [f"nearest_training/contexts/{judge}" for judge in ("thumbnails", "colours")]
    assert list(flagged(copied, declared)) == names
    shares = []
    for seed in range(2, 22):
        new = measured(shades(16, seed), "contexts", ["x"] * 16)
        assert copied["nearest_training/contexts/colours"] > new["nearest_training/contexts/colours"]
        assert copied["nearest_training/contexts/colours/base"] == new["nearest_training/contexts/colours/base"]
        shares.append((new["nearest_training/contexts/colours"], bool(flagged(new, declared))))
    assert sum(above for _, above in shares) <= 1


def test_one_typical_picture_many_times_is_no_copy() -> None:
    """Nearer to all real pictures than they are to each other, and to a training picture no more than chance has it."""
    found = measured([plain(200, 60, 60)] * 16, "trigger", ["x"] * 16)
    assert found["nearer_training/trigger/colours"] > 0.8
    assert not flagged(found, MEMORISING.declared("trigger", RUN))


def test_of_one_held_out_picture_nothing_is_flagged() -> None:
    one, other = (Real(real.pictures[:1], real.captions[:1]) for real in (TRAINING, HELD_OUT))
    found = measured(list(TRAINING.pictures[:1]) * 4, "trigger", ["x"] * 4, real=(one, other))
    assert found["nearest_training/trigger/colours"] == 1
    assert not flagged(found, MEMORISING.declared("trigger", RUN)), "that is what chance gives too often"


def test_the_gap_is_between_what_was_trained_on_and_what_was_held_out() -> None:
    prompts = [f"training {i}" for i in range(8)] + [f"held out {i}" for i in range(8)]
    base, declared = shades(16, 4), MEMORISING.declared("captions", RUN)
    by_heart = measured([*TRAINING.pictures[:8], *base[8:]], "captions", prompts, base)
    alike = measured([*TRAINING.pictures[:8], *HELD_OUT.pictures[:8]], "captions", prompts, base)
    nothing = measured(base, "captions", prompts, base)
    assert nothing["gap/colours"] == 0
    assert by_heart["gap/colours"] > alike["gap/colours"]
    assert list(flagged(by_heart, declared)) == ["gap/thumbnails", "gap/colours"]
    assert not flagged(alike, declared)
    assert "gap/colours" not in measured(base[:8], "captions", prompts[:8], base[:8]), (
        "no held-out caption was asked for"
    )


class Described(torch.nn.Module):
    """As SSCD: pixels of 288 x 288 to a vector; here the middle of each of 4 x 4 parts, in place of what was trained."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


def checked(places) -> list:
    """Pictures white in one of 16 squares, black elsewhere."""
    found = []
    for place in places:
        picture = plain(0, 0, 0)
        picture.paste((255, 255, 255), (4 * (place % 4), 4 * (place // 4), 4 * (place % 4) + 4, 4 * (place // 4) + 4))
        found.append(picture)
    return found


class Whitened(Described):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)
        return pooled - pooled.mean(1, keepdim=True)


def test_a_copy_detector_finds_copies(tmp_path: Path) -> None:
    file = tmp_path / "sscd.torchscript.pt"
    torch.jit.script(Whitened()).save(str(file))
    run = build_run({"adapter": {}, "evaluation": {"copy_detector": str(file)}})
    real = (Real(checked(range(4)), [("x",)] * 4), Real(checked((4, 5)), [("y",)] * 2))
    context = context_of("contexts", run, real=real, base={("a", "b"): checked((8, 9))})
    found = copies(checked((3, 10)), ("a", "b"), context)
    assert found["copies/contexts"] == [1, 0]
    assert (found["copies/contexts/base"], found["copies/contexts/real"]) == (0, 0)
    assert found["copy_similarity/contexts"][0] == pytest.approx(1)
    values = {name: float(np.mean(value)) for name, value in found.items()}
    assert list(flagged(values, COPIED.declared("contexts", run))) == ["copies/contexts"]


def test_what_is_no_copy_detector_is_told(ten, tmp_path: Path) -> None:
    assert lacks_detector(run_on(ten)) == "set evaluation.copy_detector, a TorchScript file of SSCD"
    for content, message in ((None, "there is no such file"), (b"nothing", "is no TorchScript of SSCD")):
        file = tmp_path / "it.pt"
        if content:
            file.write_bytes(content)
        run = run_on(ten, evaluation={"copy_detector": str(file)})
        assert lacks_detector(run) is None
        with pytest.raises(ConfigError, match=f"evaluation.copy_detector .*it.pt.* {message}"):
            load_detector(run, torch.device("cpu"))
    torch.jit.script(torch.nn.Identity()).save(str(file))
    with pytest.raises(ConfigError, match=r"gives \(1, 3, 288, 288\) for a picture, not a vector"):
        load_detector(run, torch.device("cpu"))
