"""experiments/benchmarks/gpu.py where no GPU is: every row is taken at a small size, and a row that fails or no longer fits is told.

What it says about a GPU only a GPU can tell; what is read from one is put in its place here.
"""

import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gpu
import gpu_correctness
import gpu_scratch
import gpu_speed
import pytest
import torch
from accelerate.utils import AutocastKwargs
from gpu_background import Background, in_fresh_process
from gpu_compare import bytes_on, compare
from gpu_correctness import CASES, Case, Correctness, train_run
from gpu_record import Figures, NotHere, Record, Row, limited, take_rows
from gpu_scratch import Scratch
from gpu_speed import REAL, Measured, Sizes, Speed
from gpu_study import COMMON as STUDY
from gpu_study import VARIANTS, Study

from t2ilib.memory import GIB, MIB
from t2ilib.models.files import layouts
from t2ilib.models.load import load_base
from t2ilib.models.quantize import weight_bytes
from t2ilib.runfile import build_run, merge
from t2ilib.training import compute, loop

CPU = torch.device("cpu")
BENCHMARKS = Path(gpu.__file__).parent
ABSENT = ("mlflow", "papermill", "matplotlib", "typer", "tenacity", "jupyterlab", "nbformat", "IPython")
QUICK = {
    "training": {"steps": 3},
    "evaluation": {"num_inference_steps": 1, "validation_timesteps": 1, "validation_pictures": 2},
}
SMALL_SDXL = {
    "unet": {
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (64, 64),
        "transformer_layers_per_block": 1,
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 128,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 256,
    },
    "vae": layouts.VAE | {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1, "sample_size": 64},
    **{
        name: {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"projection_dim": 64}
        for name in ("text_encoder", "text_encoder_2")
    },
    "scheduler": layouts.LAYOUTS["sdxl"]["scheduler"],
    "prediction_type": "epsilon",
}


def taken(rows: list[Row], tmp_path: Path, seconds: float = math.inf) -> dict[str, dict]:
    """Row -> what stands of it in the file."""
    record = Record(tmp_path / "rows.json", {"card": "none"})
    take_rows(rows, record, seconds)
    assert not record.path.with_suffix(".part").exists()
    return {row["row"]: row for row in json.loads(record.path.read_text())["rows"]}


def all_ok(found: dict[str, dict]) -> None:
    assert {name: row.get("why") for name, row in found.items() if row["status"] != "ok"} == {}


class Sparing(Background):
    """Where a run in float32 would only be trained here once more, its folder is copied. int8's is not: its twin has no autocast."""

    def submit(self, function, *arguments):
        if function is not train_run or "int8" in arguments[0]["output"]:
            return super().submit(function, *arguments)
        there = arguments[0]["output"]
        return lambda: shutil.copytree(there.removesuffix("cpu") + "here", there)


def test_every_row_from_scratch(monkeypatch, tmp_path: Path) -> None:
    """With few of the levers, and a compiler that takes no time."""
    kept = {name: gpu_scratch.LEVERS[name] for name in ("", "checkpointing", "channels last")}
    monkeypatch.setattr(gpu_scratch, "LEVERS", kept | {"attention xformers": {"compute": {"attention": "xformers"}}})
    monkeypatch.setattr(gpu_scratch, "BATCH", 1)
    monkeypatch.setattr(gpu_scratch, "BATCHES", (2,))
    monkeypatch.setattr(compute, "COMPILER", "eager")
    monkeypatch.setattr(compute, "BLOCKS", ("BasicTransformerBlock",))
    sizes = Sizes({"tiny-sd15": (64, (1.0, 1.0, 1.0))}, steps=1)
    found = taken(Scratch(Background(0), sizes).rows(), tmp_path)
    xformers = found.pop("from scratch 64 batch 1, attention xformers")
    assert (xformers["status"], xformers["figures"].get("steps_per_second")) == ("left out", None)
    assert "pip install xformers" in xformers["why"][0]
    all_ok(found)
    assert list(found) == [
        "from scratch: build",
        "from scratch 64 batch 1",
        "from scratch 64 batch 1, checkpointing",
        "from scratch 64 batch 1, channels last",
        "from scratch 64 batch 2, checkpointing",
        "from scratch 32 batch 4",
        "from scratch 32 batch 4, compile",
    ]
    plain, compiled = (found[f"from scratch 32 batch 4{name}"]["figures"] for name in ("", ", compile"))
    assert plain["trained_parameters"] == found["from scratch: build"]["figures"]["unet_parameters"]
    assert compiled["steps_per_second"] > 0


@pytest.fixture
def scaled(monkeypatch):
    """fp16 is a GPU's: here its loss scale is torch's own for the CPU, over float32."""
    original = loop.build_accelerator

    def build(run):
        if run.training.mixed_precision != "fp16":
            return original(run)
        accelerator = original(
            run.model_copy(update={"training": run.training.model_copy(update={"mixed_precision": "no"})})
        )
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.autocast_handler = AutocastKwargs(enabled=False)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator

    monkeypatch.setattr(loop, "build_accelerator", build)
    name = "fp16 with a loss scale"
    monkeypatch.setitem(CASES, name, Case(1e-6, 1e-6, merge(CASES[name].run, {"model": {"dtype": "float32"}})))


def test_every_row_about_correctness(scaled, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_correctness, "RESUMED", ("adamw8bit", "fp16 with a loss scale"))
    correctness = Correctness(tmp_path, Sparing(0), merge(gpu_correctness.COMMON, QUICK))
    found = taken(correctness.rows(), tmp_path)
    all_ok(found)
    assert found.keys() > CASES.keys()
    assert found["adamw8bit"]["figures"]["moments"] == ["torch.float32", "torch.uint8"]
    assert found["fp16 with a loss scale"]["figures"]["loss_scale"] == 2**16
    assert found["exported"]["figures"]["dora kohya comfyui float32: dtypes"] == ["torch.float32"]
    assert not torch.are_deterministic_algorithms_enabled()

    figures = Figures()  # another seed is another run, and must not pass for the same
    train_run(correctness.settings("lora", "other", {"seed": 1}))
    case = CASES["lora"]
    compare(figures, correctness.output("lora", "other"), correctness.output("lora", "cpu"), case.losses, case.weights)
    assert {reason.split(" is ")[0] for reason in figures.exceeded} == {"loss_off", "grad_norm_off", "held_out_after_off", "weights_off"}  # fmt: skip


def test_every_row_about_speed(monkeypatch, tmp_path: Path) -> None:
    """On a layout with random weights, and on a model that is loaded."""
    monkeypatch.setitem(layouts.LAYOUTS, "sdxl", SMALL_SDXL)
    expected = (1.0, 1.0, 1.0)
    nf4 = Sizes({"sdxl": (64, expected)}, ("nf4",), batches=(2,), checkpointing=(True,), steps=1)
    plain = Sizes({"tiny-sd15": (64, expected)}, ("none",), ("lora",), (2,), (False,), (), steps=1)
    background = Background(0)
    found = taken([*Speed(background, nf4).rows(), *Speed(background, plain).rows()], tmp_path)
    all_ok(found)
    assert list(found) == [
        "sdxl 64 nf4: encode",
        "sdxl 64 qlora batch 2, checkpointing",
        "sdxl 64 qlora batch 2, checkpointing, dpo",
        "sdxl 64 qlora batch 2, checkpointing, mapo",
        "sdxl 64 qlora batch 2, checkpointing, consistency",
        "sdxl 64 qlora: draw",
        "sdxl 64 qdora batch 2, checkpointing",
        "sdxl 64 qdora: draw",
        "tiny-sd15 64: encode",
        "tiny-sd15 64 lora batch 2",
        "tiny-sd15 64 lora: draw",
    ]
    figures = {name: row["figures"] for name, row in found.items()}
    for name in ("sdxl 64 qlora batch 2, checkpointing", "sdxl 64 qdora batch 2, checkpointing"):
        assert figures[name]["pictures_per_second"] == pytest.approx(2 * figures[name]["steps_per_second"], rel=1e-4)
    assert 0 < figures["sdxl 64 qlora batch 2, checkpointing, dpo"]["loss"] < math.log(2), (
        "one pair, seen again and again"
    )
    lora, dora = (figures[f"sdxl 64 {kind} batch 2, checkpointing"] for kind in ("qlora", "qdora"))
    assert dora["trained_parameters"] > lora["trained_parameters"]  # by the magnitudes
    assert dora["training_planned_by_category_mib"]["adapters"] > lora["training_planned_by_category_mib"]["adapters"]
    assert found["sdxl 64 qdora: draw"]["settings"]["model"]["quantization"] == "nf4"


def test_every_row_of_the_study(tmp_path: Path) -> None:
    small = {"shapes": {"num_pictures": 8, "checked_prompts": 1}, "training": {"batch_size": 4}}
    found = taken(Study(tmp_path, merge(STUDY, QUICK, small), (0,)).rows(), tmp_path)
    all_ok(found)
    one, other = (found[f"{name}, seed 0"]["figures"] for name in VARIANTS)
    compared = found["comparison: dora against lora"]["figures"]
    assert compared["held_out_loss: difference"] == pytest.approx(
        other["held_out_loss"] - one["held_out_loss"], abs=1e-6
    )
    assert {"concept/all", "base_kept/all", "clip_score/concept", "steps_per_second"} <= compared.keys()


def test_a_row_that_fails_does_not_stop_the_next(monkeypatch, tmp_path: Path) -> None:
    def breaks(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_speed, "build_base", breaks)
    sizes = Sizes({"tiny-sd15": (64, (1.0, 1.0, 1.0))}, ("nf4",), ("lora",), (1,), (False,), ())
    rows = [*Speed(Background(0), sizes).rows(), Row("test", "after", 0, lambda figures: figures.update(a=1.0))]
    found = taken(rows, tmp_path)
    assert [row["status"] for row in found.values()] == ["failed", "left out", "left out", "ok"]
    why = found["tiny-sd15 64 nf4: encode"]["why"]
    assert why[-1] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert any("in breaks" in line for line in why)
    assert found["tiny-sd15 64 qlora batch 1"]["why"] == ["the base could not be built: see the row that failed first"]
    assert gpu.summary(list(found.values()), 1.0) == 1
    assert gpu.summary([found["after"]], 1.0) == 0


def test_what_a_row_found_before_it_failed_is_kept(tmp_path: Path) -> None:
    def fails(figures: Figures) -> None:
        print("step 1/2")
        figures.within("loss_off", 0.5, 0.1)
        figures.within("norm_off", math.nan, 0.1)
        figures.within("fine", 0.1, 0.1)
        raise ValueError("afterwards")

    def not_here(figures: Figures) -> None:
        figures["known"] = 1.0
        raise NotHere("there is none")

    found = taken([Row("test", "fails", 0, fails), Row("test", "not here", 0, not_here)], tmp_path)
    assert found["fails"]["figures"]["loss_off"] == 0.5
    assert found["fails"]["figures"]["norm_off"] == "nan"
    assert found["fails"]["why"][:2] == ["loss_off is 0.5, and 0.1 is allowed", "norm_off is nan, and 0.1 is allowed"]
    assert found["fails"]["why"][-1] == "ValueError: afterwards"
    assert (found["not here"]["status"], found["not here"]["why"]) == ("left out", ["there is none"])
    assert found["not here"]["figures"] == {"known": 1.0}


def test_what_no_longer_fits_is_left_out_by_name(tmp_path: Path) -> None:
    rows = [Row("test", name, expected, lambda figures: time.sleep(0.05)) for name, expected in
            (("first", 0.5), ("long", 30.0), ("short", 0.2), ("last", 0.98))]  # fmt: skip
    found = taken(rows, tmp_path, 1.0)
    assert {name: row["status"] for name, row in found.items()} == {
        "first": "ok",
        "long": "left out",
        "short": "ok",
        "last": "left out",
    }
    assert found["long"]["why"] == ["time: it takes some 30 s, and 1 s are left"]


def test_a_plan_that_fails_costs_no_measurement(monkeypatch, tmp_path: Path) -> None:
    def breaks(*arguments):
        raise NotImplementedError("an operator that fake tensors do not know")

    monkeypatch.setattr(gpu_speed, "plan_memory", breaks)
    sizes = Sizes({"tiny-sd15": (64, (1.0, 1.0, 1.0))}, ("none",), ("lora",), (1,), (False,), (), steps=1)
    row = taken(Speed(Background(0), sizes).rows()[1:2], tmp_path)["tiny-sd15 64 lora batch 1"]
    assert (row["status"], row["why"]) == (
        "failed",
        ["no plan: NotImplementedError: an operator that fake tensors do not know"],
    )
    assert row["figures"]["steps_per_second"] > 0


def test_a_fresh_process_is_another_one() -> None:
    assert in_fresh_process(os.getpid) != os.getpid()
    assert not multiprocessing.active_children()


def test_a_row_that_hangs_is_interrupted() -> None:
    with pytest.raises(TimeoutError, match="interrupted after 0 s"), limited(0.05):
        time.sleep(20)
    with limited(0.05):
        pass
    time.sleep(0.1)  # no alarm is left behind


def test_rows_know_the_real_layouts_and_have_names_of_their_own() -> None:
    rows = Speed(Background(0), REAL).rows()
    assert len({row.name for row in rows}) == len(rows) == 2 * (2 * (1 + 2 * (2 * 2 + 1)) + 3)
    assert {row.settings["data"]["resolution"] for row in rows if row.name.startswith("sdxl")} == {1024}
    rows = Scratch(Background(0), gpu_scratch.REAL).rows()
    assert len({row.name for row in rows}) == len(rows) == 1 + len(gpu_scratch.LEVERS) + 2 + 1 + 1
    assert {row.settings["training"]["trains"] for row in rows} == {"unet"}
    assert sum(row.expected for row in rows) < 180
    assert gpu.parse(["--rows", "speed,correctness"]).rows == ("correctness", "speed")
    with pytest.raises(SystemExit):
        gpu.parse(["--rows", "sped"])


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_what_a_part_holds_is_counted_whole(quantization: str) -> None:
    """int8's codes have two names, and are there once."""
    components = load_base(build_run({"adapter": {}, "model": {"quantization": quantization}}).model, CPU)
    for _ in range(2):
        for part in components.text_encoders.values():
            assert bytes_on(part, CPU) == weight_bytes(part) + left_uncounted(part)
            assert bytes_on(part, torch.device("cuda")) == 0
        components.encode_text(["a red heart"])


def left_uncounted(part: torch.nn.Module) -> int:
    """`weight_bytes` leaves out the offset of a 4-bit layer's scales, four bytes."""
    return 4 * sum(type(layer).__name__ == "Linear4bit" for layer in part.modules())


def test_a_gpu_is_described_and_measured(monkeypatch) -> None:
    """With what torch says of one put in its place."""
    card = SimpleNamespace(total_memory=80 * GIB, major=9, minor=0, multi_processor_count=132)
    for name, value in {
        "is_available": True,
        "get_device_properties": card,
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 3 * GIB,
        "max_memory_reserved": 4 * GIB,
        "memory_reserved": 4 * GIB,
        "mem_get_info": (75 * GIB, 80 * GIB),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    about = gpu.describe_machine()
    assert (about["card"], about["memory_gib"], about["capability"]) == ("NVIDIA H100 80GB HBM3", 80.0, "9.0")
    assert gpu.slug(about["card"]) == "nvidia-h100-80gb-hbm3"
    assert about["packages"]["torch"] == torch.__version__

    plan = SimpleNamespace(phases={"training": {"weights": 2 * GIB}}, bytes_of=lambda phase: 2 * GIB)
    plan.peak_bytes, plan.device_type = 2 * GIB, "cuda"
    figures = Figures()
    with Measured("training", plan, figures, torch.device("cuda")):
        pass
    assert figures["measured_to_planned"] == 1.5
    assert figures["training_mib"] == 3 * GIB / MIB
    assert figures["outside_the_allocator_mib"] == 1 * GIB / MIB
    assert figures["needed_planned_mib"] == pytest.approx((2 * 1.05 + 0.5) * GIB / MIB)


def test_the_command_needs_nothing_that_is_not_there(tmp_path: Path) -> None:
    """In a bare process, from another folder, with a worker; what it must do without is really refused."""
    script = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {ABSENT}:
            return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

if __name__ == "__main__":
    sys.meta_path = [Without(finder) for finder in sys.meta_path]
    sys.path.insert(0, {str(BENCHMARKS)!r})
    import gpu
    words = ["--out", {str(tmp_path / "rows.json")!r}, "--workers", "1"]
    code = gpu.main([*words, "--only", "prodigy"])
    sys.exit(code or " ".join(set(sys.modules) & set({ABSENT})) or 0)
"""
    (tmp_path / "bare.py").write_text(script)
    done = subprocess.run([sys.executable, "bare.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content["about"]["card"] == "cpu"
    assert content["about"]["command"].startswith("gpu.py --out ")
    assert [(row["row"], row["status"]) for row in content["rows"]] == [("prodigy", "ok")]
    assert done.stdout.splitlines()[-1].startswith("1 ok, 0 failed, 0 left out, in ")
