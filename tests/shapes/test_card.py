"""Model cards: every number is one that the code measured, in its place; the cards that ship are what the code writes."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from t2ilib.config import ConfigError
from t2ilib.models.files.locate import SHIPPED
from t2ilib.runfile import load_yaml
from t2ilib.shapes import card
from t2ilib.shapes.card import ABOUT, GUIDANCE, NUM_CHOOSING, NUM_TEST, STAGES, pack_with_card, stage_row, write_card
from t2ilib.shapes.checker import ATTRIBUTES, CheckResult

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
both = pytest.mark.parametrize("name", SHIPPED)


def write_stage(folder: Path, steps: int, batch: int, rows: list[dict]) -> None:
    """What a stage's training leaves behind, as far as the card reads it."""
    for step in (steps // 2, steps):
        (folder / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    (folder / "run.yaml").write_text(yaml.safe_dump({"training": {"batch_size": batch, "steps": 10 * steps}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_stage_is_told_as_it_ended(tmp_path: Path) -> None:
    """Values of its last checkpoint, not of steps that were lost after it; seconds from steps and speed; four measures by name."""
    rows = [
        {"step": 100, "held_out_loss": 0.5, "checker/all": 0.25, "steps_per_second": 3.0},
        {"step": 200, "held_out_loss": 0.12345, "steps_per_second": 4.0, "loss": 9.0, "held_out_loss/t0062": 8.0},
        {"step": 240, "held_out_loss": 0.99},
    ]
    write_stage(tmp_path / "unet", 200, 64, rows)
    assert stage_row(tmp_path / "unet") == "| unet | 200 | 64 | 50 | checker/all 0.250, held_out_loss 0.123 |"
    write_stage(tmp_path / "clip", 10, 8, [{"step": 10, "retrieval/second": 1.0, "near_misses/second": 0.8996}])
    row = "| clip | 10 | 8 | not recorded | retrieval/second 1.000, near_misses/second 0.900 |"
    assert stage_row(tmp_path / "clip") == row


def test_every_number_stands_in_its_place(tmp_path: Path) -> None:
    for number, stage in enumerate(STAGES["tiny-sdxl"], 1):
        write_stage(tmp_path / stage, 1000 * number, number, [{"step": 1000 * number, "steps_per_second": number / 7}])
    drawn = CheckResult(256, {"shape": 0.912, "tilt": 0.345}, 0.6789, {"shape": 0.123, "tilt": 0.0456})
    text = write_card(tmp_path, "tiny-sdxl", 12_345_678, 2.5, drawn, {"base world": 0.9876, "others": 0.5})
    lines = text.splitlines()
    assert lines[0] == "# tiny-sdxl"
    assert ABOUT["tiny-sdxl"] in text
    assert "12.3 MB in half precision" in text
    table = [line for line in lines if line.startswith("| ") and line.split()[1] in STAGES["tiny-sdxl"]]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table] == list(STAGES["tiny-sdxl"])
    assert table[2] == "| clip | 3000 | 3 | 7000 |  |"
    assert "- base world: 98.8% of 256 pictures\n- others: 50.0% of 256 pictures" in text
    assert "guidance 2.5 (chosen on other prompts): all attributes right in\n**67.9%**" in text
    assert "| shape | 91.2% | 12.3% |\n| tilt | 34.5% | 4.6% |" in text


def test_packing_measures_what_it_packed_and_chooses_guidance_on_other_prompts(tmp_path: Path, monkeypatch) -> None:
    asked = []
    components = SimpleNamespace(packed=True)

    def accuracy(model, split: str, count: int, guidance: float) -> CheckResult:
        assert model is components
        asked.append((split, count, guidance))
        # on test prompts another guidance would look best
        share = {1.5: 0.3, 2.0: 0.4, 3.0: 0.9, 5.0: 0.5, 7.5: 0.2}[guidance] if split == "validation" else guidance / 10
        return CheckResult(count, {"shape": share}, share, {"shape": 0.1})

    def pack(source: Path, target: Path, text: str) -> int:
        assert source == tmp_path / "work" / "unet" / "model"
        target.mkdir()
        return 5_000_000

    def load(config) -> SimpleNamespace:
        assert config.base == str(tmp_path / "packed")
        assert Path(config.base).is_dir()  # what is measured is what was packed
        return components

    monkeypatch.setattr(card, "accuracy", accuracy)
    monkeypatch.setattr(card, "pack", pack)
    monkeypatch.setattr(card, "load_base", load)
    monkeypatch.setattr(card, "reconstruction_accuracy", lambda model, kinds: {1: 0.75, 3: 0.625}[len(kinds)])
    write_stage(tmp_path / "work" / "unet", 100, 4, [{"step": 100, "held_out_loss": 0.5, "steps_per_second": 2.0}])
    text = pack_with_card(tmp_path / "work", tmp_path / "packed", "tiny-sd15")
    assert asked == [*(("validation", NUM_CHOOSING, guidance) for guidance in GUIDANCE), ("test", NUM_TEST, 3.0)]
    assert (tmp_path / "packed" / "README.md").read_text() == text
    for words in ("5.0 MB", "guidance 3 (chosen", "**30.0%**", "| unet | 100 | 4 | 50 | held_out_loss 0.500 |"):
        assert words in text
    assert "- base world: 75.0% of" in text
    assert "- concepts (heart, striped, blueprint): 62.5% of" in text
    with pytest.raises(ConfigError, match="tiny model 'tiny-sd2' does not exist"):
        pack_with_card(tmp_path / "work", tmp_path / "packed", "tiny-sd2")


def test_the_autoencoder_is_judged_by_what_it_gives_back(monkeypatch) -> None:
    """One that gives back pictures of a single colour for half of the scenes keeps those of the other half."""

    def reconstruct(vae, pixels: torch.Tensor):
        assert pixels.shape == (NUM_TEST, 3, 64, 64)
        from PIL import Image

        whole = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pixels]
        return [*whole[: NUM_TEST // 2], *(Image.new("RGB", (64, 64), "white") for _ in whole[NUM_TEST // 2 :])], None

    monkeypatch.setattr(card, "reconstruct", reconstruct)
    components = SimpleNamespace(vae=None, device=torch.device("cpu"))
    assert card.reconstruction_accuracy(components, ("base",)) == pytest.approx(0.5, abs=0.02)


@both
def test_the_cards_that_ship_are_what_the_code_writes(tmp_path: Path, name: str) -> None:
    """A card read back into numbers and written again is the same card: nothing of it was written by hand."""
    text = (SHIPPED[name] / "README.md").read_text()
    for stage, steps, batch, seconds, result in re.findall(
        r"^\| (\S+) \| (\d+) \| (\d+) \| (\d+) \| (.+) \|$", text, re.M
    ):
        told = dict(part.rsplit(" ", 1) for part in result.split(", "))
        row = {"step": int(steps), "steps_per_second": int(steps) / int(seconds)}
        write_stage(
            tmp_path / stage, int(steps), int(batch), [row | {key: float(value) for key, value in told.items()}]
        )
    shares = {
        key: (float(a) / 100, float(b) / 100)
        for key, a, b in re.findall(r"^\| (\w+) \| ([\d.]+)% \| ([\d.]+)% \|$", text, re.M)
    }
    every = float(re.search(r"\*\*([\d.]+)%\*\*", text)[1]) / 100
    drawn = CheckResult(
        NUM_TEST, {k: right for k, (right, _) in shares.items()}, every, {k: c for k, (_, c) in shares.items()}
    )
    coded = {kind: float(share) / 100 for kind, share in re.findall(r"^- (.+): ([\d.]+)% of \d+ pictures$", text, re.M)}
    size = float(re.search(r"([\d.]+) MB in half precision", text)[1])
    guidance = float(re.search(r"guidance ([\d.]+) ", text)[1])
    assert list(shares) == list(ATTRIBUTES)
    assert len(coded) == 2
    assert guidance in GUIDANCE
    assert write_card(tmp_path, name, round(size * 1e6), guidance, drawn, coded) == text


@both
def test_the_cards_that_ship_tell_of_the_recipes_and_the_weights_beside_them(name: str) -> None:
    text = (SHIPPED[name] / "README.md").read_text()
    for stage in STAGES[name]:
        recipe = load_yaml(EXPERIMENTS / name / f"{stage}.yaml")["training"]
        assert f"| {stage} | {recipe['steps']} | {recipe['batch_size']} | " in text
    files = [path for path in SHIPPED[name].rglob("*") if path.is_file() and path.name != "README.md"]
    assert f"{sum(path.stat().st_size for path in files) / 1e6:.1f} MB in half precision" in text
