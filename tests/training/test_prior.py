"""Prior preservation: pictures of the class are the base's own, drawn once, and have their share and their weight."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from PIL import Image

from t2ilib.config import ConfigError, ModelConfig
from t2ilib.data.prior import expand
from t2ilib.evaluation.sampling import draw
from t2ilib.models.load import load_base
from t2ilib.runfile import build_run
from t2ilib.studies.runs import is_measured_again
from t2ilib.tracking.tracker import open_tracker
from t2ilib.training import loop, prior
from t2ilib.training.checkpoint import CheckpointError
from t2ilib.training.loop import train

PATTERNS = ("a {red|green} circle", "a blue square")


def run_of(output: Path, **sections):
    values = {
        "output": str(output),
        "adapter": {"rank": 2},
        "data": {"source": "shapes"},
        "shapes": {"scenes": ["heart"], "num_pictures": 6, "checked_prompts": 0},
        "prior": {"prompts": PATTERNS, "num_pictures": 5, "share": 0.25, "weight": 2.0},
        "training": {"steps": 2, "batch_size": 4},
        "evaluation": {"validate_every": 0, "validation_timesteps": 1, "sample_every": 0, "num_inference_steps": 2},
    }
    for name, value in sections.items():
        values[name] = values.get(name, {}) | value if isinstance(value, dict) else value
    return build_run(values)


@pytest.fixture(autouse=True)
def few_at_once(tmp_path, monkeypatch):
    """A cache of its own, in which the base draws two pictures at a time."""
    monkeypatch.setenv("T2ILIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prior, "AT_ONCE", 2)


@pytest.fixture(scope="module")
def base():
    return load_base(ModelConfig())


def pictures_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def class_folder(tmp_path: Path) -> Path:
    return next(path for path in (tmp_path / "cache" / "class").iterdir())


class TestDrawing:
    def test_they_are_the_bases_own_drawings_whoever_asks(self, tmp_path, base, caplog):
        caplog.set_level("INFO")
        run = run_of(tmp_path / "run")
        drawn = prior.drawn_pictures(run, base)
        texts = expand(PATTERNS, 6)
        expected = draw(base, texts, run.evaluation, prior.CLASS_SEED, batch_size=2, resolution=64)
        assert drawn.captions() == texts[:5]
        for record, picture in zip(drawn.records, expected, strict=False):
            with Image.open(record.path) as found:
                assert (np.asarray(found) == np.asarray(picture)).all()
        rows = [json.loads(line) for line in (class_folder(tmp_path) / "metadata.jsonl").read_text().splitlines()]
        assert [row["text"] for row in rows] == texts
        assert "the base draws 6 pictures" in caplog.text

        before = pictures_in(class_folder(tmp_path))
        caplog.clear()
        others = {"seed": 3, "training": {"steps": 7}, "adapter": {"rank": 4}, "prior": {"share": 0.5}}
        assert prior.drawn_pictures(run_of(tmp_path / "other", **others), base).digest == drawn.digest
        assert "the base draws" not in caplog.text
        more = prior.drawn_pictures(run_of(tmp_path / "more", prior={"num_pictures": 8}), base)
        assert "the base draws 2 pictures" in caplog.text
        assert more.records[:5] == drawn.records
        assert more.digest != drawn.digest
        assert pictures_in(class_folder(tmp_path)).items() >= before.items()

    @pytest.mark.parametrize(
        "changes",
        [
            {"prior": {"prompts": ["a red circle"]}},
            {"data": {"resolution": 32}},
            {"evaluation": {"guidance_scale": 2.0}},
            {"evaluation": {"num_inference_steps": 3}},
            {"evaluation": {"negative_prompt": "blurred"}},
        ],
    )
    def test_what_decides_them_is_kept_apart(self, tmp_path, base, changes):
        assert prior.drawn_by(run_of(tmp_path), base) != prior.drawn_by(run_of(tmp_path, **changes), base)

    def test_another_base_or_precision_is_kept_apart_and_the_same_one_is_not(self, tmp_path, base):
        run = run_of(tmp_path)
        found = {
            prior.drawn_by(run, load_base(ModelConfig(**model)))
            for model in ({"quantization": "nf4"}, {"dtype": "bfloat16"}, {"base": "tiny-sd15"})
        }
        assert len(found) == 3
        assert prior.drawn_by(run, base) not in found
        assert prior.drawn_by(run, base) == prior.drawn_by(run, load_base(ModelConfig()))

    def test_drawing_that_was_interrupted_gives_the_same_pictures(self, tmp_path, base, monkeypatch):
        run, calls = run_of(tmp_path / "run"), []

        def stops(*args, **options):
            calls.append(args[1])
            if len(calls) == 2:
                raise KeyboardInterrupt
            return draw(*args, **options)

        prior.drawn_pictures(run, base)
        folder = class_folder(tmp_path)
        whole = pictures_in(folder)
        for path in folder.iterdir():
            path.unlink()
        monkeypatch.setattr(prior, "draw", stops)
        with pytest.raises(KeyboardInterrupt):
            prior.drawn_pictures(run, base)
        assert pictures_in(folder) == {name: whole[name] for name in ("00000.png", "00001.png")}
        prior.drawn_pictures(run, base)
        assert pictures_in(folder) == whole
        assert len(calls) == 4  # one batch, one that was cut off, and the two that were left

    def test_of_two_processes_one_draws_and_when_it_is_killed_the_other_goes_on(self, tmp_path, base, caplog):
        """The first is stopped while it draws, so that the second must wait, and then killed with kill -9."""
        caplog.set_level("INFO")
        run = run_of(tmp_path / "run", prior={"num_pictures": 40})
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
        code = (
            "import sys; from pathlib import Path; from t2ilib.runfile import load_run; from t2ilib.models.load import load_base\n"
            "from t2ilib.training import prior; prior.AT_ONCE = 2; run = load_run(Path(sys.argv[1]))\n"
            "prior.drawn_pictures(run, load_base(run.model))"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "run.yaml")]
        other = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
        while not list((tmp_path / "cache").glob("class/*/00003.png")):
            assert other.poll() is None, other.stderr.read()
            time.sleep(0.005)
        other.send_signal(signal.SIGSTOP)
        before = pictures_in(class_folder(tmp_path))
        assert 4 <= len(before) < 40
        drawn = []
        waits = threading.Thread(target=lambda: drawn.append(prior.drawn_pictures(run, base)))
        waits.start()
        while f"waiting for process {other.pid}" not in caplog.text:
            assert waits.is_alive()
            time.sleep(0.005)
        assert pictures_in(class_folder(tmp_path)) == before
        other.kill()
        other.communicate()
        waits.join()
        assert f"the base draws {40 - len(before) // 2 * 2} pictures" in caplog.text
        assert len(drawn[0]) == 40
        assert pictures_in(class_folder(tmp_path)).items() >= before.items()


class TestRun:
    def test_a_run_trains_on_both_and_shows_both(self, tmp_path, base, monkeypatch):
        """In its metrics, manifest and MLflow; held-out loss and sample grids are of one's own pictures, as without."""
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        found = {}
        for name in ("with", "without"):
            changes = {"prior": None} if name == "without" else {}
            run = run_of(tmp_path / name, tracking={"experiment": "prior"}, model={"quantization": "nf4"}, **changes)
            with open_tracker(run) as tracker:
                result = train(run, tracker)
                stored = MlflowClient(tracker.uri).get_run(tracker.run_id)
            rows = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
            found[name] = (result, stored, rows)
        result, stored, rows = found["with"]
        steps = [row for row in rows if "loss/own" in row]
        assert len(steps) == 2
        assert all(row["loss"] == pytest.approx(row["loss/own"] + row["loss/class"]) for row in steps)
        assert not any("loss/own" in row for row in found["without"][2])
        assert rows[0]["held_out_loss"] == found["without"][2][0]["held_out_loss"]
        assert result.prompts == found["without"][0].prompts

        with (tmp_path / "with" / "manifest.csv").open() as lines:
            parts = [row["part"] for row in csv.DictReader(lines)]
        assert (parts.count("training"), parts.count("class")) == (6, 5)
        inputs, plain = (
            {each.tags[0].value: each.dataset for each in kept.inputs.dataset_inputs}
            for kept in (stored, found["without"][1])
        )
        assert inputs.keys() == {"training", "prior", "validation"}
        assert inputs["training"].digest == plain["training"].digest
        assert json.loads(inputs["prior"].profile)["num_pictures"] == 5
        told = {name: value for name, value in stored.data.params.items() if name.startswith("prior.")}
        assert told == {
            "prior.prompts": str(list(PATTERNS)),
            "prior.num_pictures": "5",
            "prior.share": "0.25",
            "prior.weight": "2.0",
        }
        assert not any(name.startswith("prior.") for name in found["without"][1].data.params)
        assert {"loss/own", "loss/class"} <= stored.data.metrics.keys()

    @pytest.mark.parametrize(
        "changes",
        [
            {"model": {"quantization": "nf4"}, "adapter": {"init": "loftq"}},
            {"adapter": None, "training": {"trains": "unet", "ema_horizon": 10}, "optimizer": {"learning_rate": 0.1}},
        ],
    )
    def test_the_base_draws_before_anything_is_attached_or_averaged(self, tmp_path, monkeypatch, changes):
        run = run_of(tmp_path / "run", **changes)
        train(run)
        drawn = pictures_in(class_folder(tmp_path))
        monkeypatch.setenv("T2ILIB_CACHE", str(tmp_path / "other"))
        prior.drawn_pictures(run, load_base(run.model))
        assert pictures_in(tmp_path / "other" / "class" / class_folder(tmp_path).name) == drawn
        monkeypatch.setenv("T2ILIB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(prior, "draw", lambda *_, **__: pytest.fail("drawn again"))
        assert train(run).resumed_from == 2

    def test_a_batch_of_one_sees_the_class_in_its_share_of_the_steps(self, tmp_path):
        run = run_of(tmp_path / "run", training={"steps": 4, "batch_size": 1}, prior={"share": 0.5, "weight": 1.0})
        train(run)
        rows = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
        terms = [row.keys() & {"loss/own", "loss/class"} for row in rows if "grad_norm" in row]
        assert terms == [{"loss/own"}, {"loss/class"}] * 2

    def test_a_class_that_cannot_fill_its_share_is_told_before_the_base_is_loaded(self, tmp_path, monkeypatch):
        monkeypatch.setattr(loop, "load_base", lambda *_: pytest.fail("the base was loaded"))
        run = run_of(tmp_path / "run", training={"batch_size": 8}, prior={"share": 0.5, "num_pictures": 3})
        with pytest.raises(
            ConfigError, match=r"prior.share makes 4 of 8 .*, and there are 3: lower the share, or have"
        ):
            train(run)

    def test_pictures_that_were_drawn_otherwise_are_another_run(self, tmp_path, monkeypatch):
        """What else only judges a run decides its pictures here: it is refused with the field, and no study measures it again."""
        train(run_of(tmp_path / "run"))
        monkeypatch.setattr(loop, "load_base", lambda *_: pytest.fail("the base was loaded"))
        with pytest.raises(
            CheckpointError, match=r"other settings \(evaluation.guidance_scale 3.0 -> 2.0\): choose another"
        ):
            train(run_of(tmp_path / "run", evaluation={"guidance_scale": 2.0}))
        drawn, given = {"prior": {"prompts": ["x"]}}, {"prior": {"path": "x"}}
        assert not is_measured_again("evaluation.guidance_scale", drawn)
        assert is_measured_again("evaluation.guidance_scale", given)
        assert is_measured_again("evaluation.guidance_scale", {})
        assert is_measured_again("evaluation.prompts", drawn)
        assert not is_measured_again("evaluation.negative_prompt", drawn)
        assert is_measured_again("evaluation.negative_prompt", {})
