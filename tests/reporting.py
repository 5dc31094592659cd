"""What the tests of the report share: a results folder that they write themselves, so every number in it is known."""

import json
import math
from dataclasses import asdict

import numpy as np
from PIL import Image

from t2ilib.evaluation import clip
from t2ilib.evaluation.metrics import Metric
from t2ilib.training.history import COSTS
from t2ilib.training.validation import HELD_OUT

DRAWN = {
    "concept/learned": Metric(
        "concept learned", "share", "higher", False, "Learned and kept", "learned", "Learned most"
    ),
    "base_kept/all": Metric("base kept", "share", "higher", False, "Learned and kept", "kept", "Forgot least"),
}
MEASURES = {name: asdict(metric) for name, metric in {**DRAWN, **HELD_OUT, **COSTS}.items()}
PROMPTS = [
    "a small red striped circle at the top left on a white background",
    "a large blue heart",
    "a blueprint of a cross",
]
# learned, kept, held-out loss, trainable parameters: far enough apart that eight seeds tell them from noise of 0.01
TRUTH = {
    "base": (0.10, 0.90, None, None),
    "lora": (0.60, 0.80, 0.200, 40_000),
    "dora": (0.70, 0.70, 0.190, 42_000),
    "qlora": (0.60, 0.80, 0.200, 40_000),
}


def write_run(folder, variant, seed, truth, jobs=1):
    """Seed noise is shared by all variants, with alternating +-0.004 on top that leaves qlora equal to lora on
    average."""
    learned, kept, loss, parameters_trained = truth
    shared, own = 0.01 * math.sin(seed), 0.004 * (-1) ** seed * (variant == "qlora")
    metrics = {
        "concept/learned": learned + shared + own,
        "base_kept/all": kept + shared + own,
        "peak_process_mib": 900.0 + seed,
    }
    path = folder / variant / f"seed{seed}"
    (path / "pictures").mkdir(parents=True)
    if loss is not None:
        metrics |= {"held_out_loss": loss + (shared + own) / 10, "trainable_parameters": parameters_trained}
        metrics["steps_per_second"] = 2.0 + shared + own
        lines = [{"step": 0, "held_out_loss": 0.5}]
        lines += [{"step": step, "loss": 0.3 - 0.001 * step, "grad_norm": 1.0} for step in range(1, 101)]
        lines += [{"step": step, "held_out_loss": loss + (100 - step) / 1000 + shared / 10} for step in (50, 100)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "pictures" / "prompts.json").write_text(json.dumps(PROMPTS))
    for index in range(len(PROMPTS)):
        Image.fromarray(np.full((16, 16, 3), 40 * index + seed, np.uint8)).save(path / "pictures" / f"{index:02d}.png")
    result = {
        "variant": variant,
        "seed": seed,
        "status": "finished",
        "seconds": 60.0,
        "mlflow_run_id": None,
        "jobs": jobs,
    }
    (path / "result.json").write_text(json.dumps(result | {"run": {}, "metrics": metrics, "measures": MEASURES}))


def write_study(folder, seeds, truth=TRUTH, claims={}, jobs=1, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    variants = {
        name: {
            "title": name.upper(),
            "overview": f"What {name} is.",
            "hypothesis": f"{name} learns more.",
            "how_it_helps": f"How {name} helps.",
            "origin": f"Paper of {name}.",
        }
        for name in truth
    }
    for name, told in claims.items():
        variants[name]["claims"] = told
    study = {
        "name": "adapters",
        "question": "Which adapter?",
        "preset": "quick",
        "reference": "lora",
        "base": "base",
        "seeds": list(seeds),
    }
    (folder / "study.json").write_text(json.dumps(study | {"variants": variants} | changes))
    for name, numbers in truth.items():
        for seed in seeds:
            write_run(folder, name, seed, numbers, jobs)
    return folder


def write_own_study(folder, seeds, scores=True):
    """As `write_study`, of pictures of one's own: nobody counts what was learned, there is held-out loss and perhaps
    a CLIP score."""
    write_study(folder, seeds)
    for path in folder.glob("*/seed*/result.json"):
        result = json.loads(path.read_text())
        name, seed = path.parts[-3], int(path.parent.name.removeprefix("seed"))
        kept = {
            key: value for key, value in result["metrics"].items() if key not in ("concept/learned", "base_kept/all")
        }
        kept |= {"held_out_loss": 0.5} if name == "base" else {}
        score = {"clip_score/prompts": {"base": 20.0, "lora": 25.0, "dora": 30.0, "qlora": 24.0}[name] + seed / 10}
        measures = {key: asdict(metric) for key, metric in {**HELD_OUT, **COSTS, **clip.METRICS}.items()}
        path.write_text(json.dumps(result | {"metrics": kept | (score if scores else {}), "measures": measures}))
    return folder


def cells(rows, variant):
    return next(row for row in rows if row["variant"].startswith(variant))
