"""Captions as people write them, whatever the script and however long, through a whole run."""

import json
from pathlib import Path

import pytest
from PIL import Image

from t2ilib.evaluation.measures import measure
from t2ilib.runfile import build_run
from t2ilib.training.loop import train

CAPTIONS = {
    "🐈.png": "🐈 on a 🟥 mat 👩‍👩‍👧",
    "猫.png": "一只红色的圆形，赤い円、빨간 원",
    "long.png": " ".join(f"word{number}" for number in range(480)),
    "rtl.png": "دائرة حمراء, עיגול אדום",
    "plain.png": "a red circle",
    "quotes.png": """a "red" circle; {it's} 100% \\ <round>""",
}


@pytest.mark.parametrize("trains_text", [False, True])
def test_captions_of_any_script_and_length_train_and_are_drawn(tmp_path: Path, monkeypatch, trains_text: bool) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for blue, folder in enumerate(("pictures", "held-out")):
        (tmp_path / folder).mkdir()
        rows = []
        for number, (name, caption) in enumerate(CAPTIONS.items()):
            Image.new("RGB", (64, 64), (40 * number, 0, 200 * blue)).save(tmp_path / folder / name)
            rows.append(json.dumps({"file_name": name, "text": caption}, ensure_ascii=False))
        (tmp_path / folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    values = {
        "output": str(tmp_path / "run"),
        "model": {"base": "tiny-sd15"},
        "adapter": {"rank": 2, "text_encoder_targets": "attention" if trains_text else None},
        "data": {"path": str(tmp_path / "pictures"), "validation_path": str(tmp_path / "held-out")},
        "training": {"steps": 2, "batch_size": 3},
        "evaluation": {"validation_timesteps": 1, "num_inference_steps": 1, "prompts": list(CAPTIONS.values())},
    }
    run = build_run(values)
    result = train(run)
    measure(run, result.components, None, result.metrics)
    told = json.loads((run.output / "held_out" / "step-000002.json").read_text())
    assert {row["picture"]: row["caption"] for row in told} == CAPTIONS
    assert json.loads((run.output / "pictures" / "prompts.json").read_text())[0] == CAPTIONS["🐈.png"]
    with Image.open(run.output / "samples" / "grid-000002.png") as grid:
        assert grid.width > 4 * 128
