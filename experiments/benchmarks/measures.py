"""What measures without a checker are worth: short runs of very different quality on the drawn world, where the checker knows the truth.

    python experiments/benchmarks/measures.py run
    python experiments/benchmarks/measures.py tables --ship

`run` trains 53 runs in one process, half a minute each, and leaves a file of numbers of each in results/measures; a run whose pictures are there
is not done again (`again` measures them again). `tables` says how each measure's order of the runs agrees with the checker's, and which runs it calls over-trained;
`--ship` writes that into the package, where the report reads it.

The measures are told nothing that a user's own pictures would not tell: pictures of one concept, captions, held-out pictures, and groups of
prompts. The measure `truth` in this file reads the same pictures by the checker.
"""

import argparse
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import rankdata

from t2ilib.config import RunConfig, ShapesConfig
from t2ilib.evaluation.context import Context, Measure
from t2ilib.evaluation.metrics import Metric
from t2ilib.evaluation.rows import split
from t2ilib.evaluation.strength import SHIPPED
from t2ilib.runfile import build_run, merge
from t2ilib.seeds import numpy_generator_for
from t2ilib.shapes import checker, source, world
from t2ilib.text import write_whole

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "results" / "measures"
CONCEPTS = ("heart", "striped")
CONFIRMING = "blueprint"
"""What was looked at after everything was settled: runs that are to be flagged, or not to be, of a concept by which nothing was chosen."""
PLAN: dict[str, dict[str, Any]] = {
    "base": {"adapter": None, "training": {"trains": "nothing", "steps": 0}},
    **{f"steps_{n}": {"training": {"steps": n}} for n in (10, 40, 80, 120, 240)},
    **{f"rate_{rate:g}": {"optimizer": {"learning_rate": rate}} for rate in (0.0005, 0.002, 0.008, 0.016)},
    **{f"rank_{n}": {"adapter": {"rank": n, "alpha": float(n)}} for n in (2, 4, 32)},
    "attention": {"adapter": {"targets": "attention"}},
    "dora": {"adapter": {"kind": "dora"}},
    "dropped": {"objective": {"caption_dropout": 0.6}},
    **{
        f"few_{pictures}_{steps}": {"shapes": {"num_pictures": pictures}, "training": {"steps": steps}}
        for pictures, steps in ((32, 120), (16, 200), (8, 60), (8, 120), (8, 300))
    },
}
"""Run -> what is different in it."""
OVER_TRAINED = ("few_16_200", "few_8_120", "few_8_300")
"""Trained far too long on far too few pictures, so they must be flagged."""
GOOD = ("steps_80", "steps_120", "steps_240", "rank_4", "rank_32", "dora", "rate_0.002")
"""Trained on 200 pictures, each seen five times at most, so none may be."""
TRUTHS = {"learned": "concept/all", "kept": "base_kept/all", "gap": "truth/gap", "copied": "truth/copied"}
"""What the checker says of a run. gap: how much oftener training captions are followed than held-out ones. copied: of pictures in new
contexts, how many show a training scene and not what was asked for; hardly any run does that, so nothing is held against it."""
CLAIMS = {
    "learned": {
        "learned/{model}": 1, "likeness/captions/{model}": 1, "likeness/contexts/{model}": 1,
        "likeness/trigger/{model}": 1, "centroid_distance/captions/{model}": -1, "centroid_distance/contexts/{model}": -1,
        "centroid_distance/trigger/{model}": -1, "diversity/captions/{model}": 1, "diversity/contexts/{model}": 1,
        "clip_score/captions": 1, "clip_score/contexts": 1, "held_out_loss": -1,
    },
    "kept": {
        "kept/{model}": 1, "drift/{model}": -1, "diversity/contexts/{model}": 1, "drift/pixels": -1, "clip_score/unrelated": 1,
        "held_out_loss": -1,
    },
    "gap": {
        "gap/thumbnails": 1, "gap/{model}": 1, "nearest_training/contexts/thumbnails": 1, "nearest_training/contexts/{model}": 1,
        "nearest_training/trigger/thumbnails": 1, "nearest_training/trigger/{model}": 1, "nearer_training/contexts/{model}": 1,
        "held_out_loss": 1,
    },
}  # fmt: skip
"""Truth -> metrics that might stand for it, with the sign that they should have; each by both MODELS."""
MODELS = ("clip-patches", "clip")
"""The tiny CLIP: all of its patches, and its one vector."""
OF_THEIR_OWN = ("likeness", "drift", "diversity", "memorising")
DRAWS = 2000
HEAD = """# How far measures without a checker can be trusted

Made by

{commands}
{counted} runs of very different quality on two concepts of the drawn world, judged by measures that know no truth, and by the checker, which does.
Rank correlations are means over the two concepts, with the sign that a measure should have; intervals are of a bootstrap over runs. The checker reads
24 pictures of either kind of each run, other ones than the measures see, so its own noise is in every number: a perfect measure would not reach 1.

On these runs was chosen that a tiny base is judged by all patches of its CLIP, that the gap counts shares of the way from the base's picture, and
that thumbnails tell it too. The {confirming} runs of the third concept, {concept}, were made after that, and are in the last table alone.
"""


def truth_of(pictures, prompts, context: Context) -> dict[str, Any]:
    """What the checker reads in pictures of groups of prompts whose scenes nobody told the measures."""
    kinds = {kind: scenes_of(context.run.shapes, kind) for kind in ("train", "validation", "test")}
    if context.group == "captions":
        shares = {}
        for kind in ("train", "validation"):
            asked = [
                (kinds[kind][p], picture) for p, picture in zip(prompts, pictures, strict=True) if p in kinds[kind]
            ]
            shares[kind] = checker.check(*zip(*asked, strict=True)).all_attributes
        return {f"truth/{kind}": share for kind, share in shares.items()} | {
            "truth/gap": shares["train"] - shares["validation"]
        }
    if context.group == "contexts":
        trained = [scene.describe() for scene in kinds["train"].values()]
        copied = []
        for prompt, picture in zip(prompts, pictures, strict=True):
            seen = {name: value for name, value in checker.read(picture).items() if value}
            copied.append(float(seen in trained and seen != kinds["test"][prompt].describe()))
        return {"truth/copied": copied}
    return {}


truth = Measure(truth_of, {f"truth/{name}": Metric(name, "share") for name in ("train", "validation", "gap", "copied")})


def scenes_of(shapes: ShapesConfig, kind: str) -> dict[str, world.Scene]:
    """Caption -> scene of the training, held-out or new pictures of a concept."""
    if kind == "test":
        return {world.caption(scene): scene for scene in world.sample_scenes(16, "test", 1, shapes.scenes[0])}
    count = shapes.num_pictures if kind == "train" else source.NUM_VALIDATION
    lines = (source.drawn(shapes, kind, count) / "metadata.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    return {row["text"]: world.scene_from(row["scene"]) for row in rows}


def planned(seed: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and settings of every run. Two embedding models judge: all patches of the tiny CLIP, as a tiny base's default is, and its one
    vector."""
    from t2ilib.models.pipeline import clip_folder

    clip = clip_folder("tiny-sdxl")
    plans = [(concept, name) for name in PLAN for concept in CONCEPTS]
    plans += [(CONFIRMING, name) for name in ("base", *OVER_TRAINED, *GOOD)]
    for concept, name in plans:
        change = PLAN[name]
        shapes = {"scenes": [concept], "num_pictures": 200, "checked_prompts": 24} | change.get("shapes", {})
        asked = {kind: list(scenes_of(ShapesConfig(**shapes), kind)) for kind in ("train", "validation", "test")}
        words = {"heart": "heart", "striped": "striped shape", "blueprint": "blueprint"}[concept]
        groups = {
            "captions": asked["train"][:10] + asked["validation"][:10],
            "trigger": [f"a {words}", f"one {words}", words, f"a picture of a {words}"] * 2,
            "contexts": asked["test"],
            "unrelated": [world.caption(scene) for scene in world.sample_scenes(50, "validation", 1)],
        }
        settings = {
            "seed": seed,
            "adapter": {"kind": "lora", "rank": 8, "alpha": 8.0, "targets": "many"},
            "data": {"source": "shapes"},
            "shapes": shapes,
            "objective": {"caption_dropout": 0.1, "snr_gamma": None},
            "optimizer": {"learning_rate": 0.004, "schedule": "cosine"},
            "training": {"steps": 120, "batch_size": 4, "checkpoint_every": 1000},
            "evaluation": {
                "guidance_scale": 3.0, "num_inference_steps": 6, "validation_pictures": 16, "validate_every": 0, "sample_every": 0,
                "animation": "none", "prompts": [f"a {words}"], "prompt_groups": groups,
                "embedding_models": [f"{clip}:patches", str(clip)],
            },
        }  # fmt: skip
        yield f"{concept}-{name}", merge(settings, change)


def run_all() -> None:
    """Trains and draws what is not there yet, then measures everything that is there and was not, or was measured otherwise."""
    logging.disable(logging.INFO)
    pending = [(name, told) for name, told in planned() if not (FOLDER / "drawn" / name / "trained.json").exists()]
    for number, (name, settings) in enumerate(pending, start=1):
        began = time.monotonic()
        train_and_draw(build_run(settings | {"output": tempfile.mkdtemp(prefix="measures-")}), FOLDER / "drawn" / name)
        write_whole(FOLDER / f"{name}.json", json.dumps(measured(name, settings), indent=1))
        print(f"{number}/{len(pending)} {told_in_short(name)}, {time.monotonic() - began:.0f} s", flush=True)


def measure_all() -> None:
    for name, settings in planned():
        if (FOLDER / "drawn" / name / "trained.json").exists():
            write_whole(FOLDER / f"{name}.json", json.dumps(measured(name, settings), indent=1))
            print(told_in_short(name), flush=True)


def told_in_short(name: str) -> str:
    metrics = json.loads((FOLDER / f"{name}.json").read_text())["metrics"]
    return f"{name}: " + ", ".join(f"{truth} {metrics[key]:.2f}" for truth, key in TRUTHS.items() if key in metrics)


def train_and_draw(run: RunConfig, folder: Path) -> None:
    """Leaves the checker's numbers and the held-out loss in `folder`, the pictures of the run's groups of prompts, and those of the base in the
    cache."""
    from t2ilib.evaluation.measures import measure
    from t2ilib.evaluation.references import base_pictures
    from t2ilib.evaluation.sampling import draw
    from t2ilib.training.loop import train

    trained = train(run, resume="never")
    checked = run.model_copy(
        update={"evaluation": run.evaluation.model_copy(update={"measures": ("checker",), "prompt_groups": None})}
    )
    metrics = measure(checked, trained.components, metrics=trained.metrics)
    drawn = {}
    for group, prompts in run.evaluation.prompt_groups.named().items():
        pictures = draw(trained.components, prompts, run.evaluation, resolution=run.data.resolution)
        drawn[group] = np.stack([np.asarray(picture) for picture in pictures])
        base_pictures(run, trained.components, prompts, {})
    shutil.rmtree(run.output)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "pictures.npz", **drawn)
    kept = {key: value for key, value in metrics.items() if not key.startswith(("memory/", "peak_", "data_"))}
    write_whole(folder / "trained.json", json.dumps(kept, indent=1))


def measured(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything that is known of a run whose pictures are there. No model that draws is needed: the base's pictures are there too."""
    from types import SimpleNamespace

    import torch

    from t2ilib.evaluation.measures import MEASURES

    run, folder = build_run(settings), FOLDER / "drawn" / name
    pictures, shared, metrics = np.load(folder / "pictures.npz"), {}, json.loads((folder / "trained.json").read_text())
    device = SimpleNamespace(device=torch.device("cpu"))
    ceilings: dict[str, str] = {}
    for group, prompts in run.evaluation.prompt_groups.named().items():
        drawn, told = [Image.fromarray(pixels) for pixels in pictures[group]], {}
        context = Context(group, run, device, None, shared)
        for measure in (MEASURES["clip"], *(MEASURES[one] for one in OF_THEIR_OWN), truth):
            values = measure.function(drawn, prompts, context)
            declared = measure.declared(group, run)
            ceilings |= {key: declared[key].ceiling for key in values if declared[key].ceiling}
            told |= values
        metrics |= split(told, 0, group, prompts)[0]
    return {"run": name, "metrics": metrics, "ceilings": ceilings}


Runs = Mapping[str, Mapping[str, float]]


def correlation(runs: Runs, truth: str, metric: str, sign: int) -> tuple[float, float, float, int] | None:
    """Spearman's rank correlation, the mean over concepts, its bootstrap interval (95 %, runs drawn within each concept), and the number
    of runs; None where a concept has fewer than ten, or all of its runs are alike in one of the two."""
    columns = []
    for concept in CONCEPTS:
        own = [values for name, values in runs.items() if name.startswith(concept) and {truth, metric} <= values.keys()]
        columns.append(np.array([(values[truth], sign * values[metric]) for values in own]).reshape(-1, 2))
    if min(map(len, columns)) < 10 or not all(np.ptp(column, axis=0).all() for column in columns):
        return None
    rng, draws = numpy_generator_for(0, "bootstrap", truth, metric), []
    while len(draws) < DRAWS:
        samples = [column[rng.integers(len(column), size=len(column))] for column in columns]
        if all(np.ptp(sample, axis=0).all() for sample in samples):
            draws.append(np.mean([by_rank(sample) for sample in samples]))
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(np.mean([by_rank(column) for column in columns])), float(low), float(high), sum(map(len, columns))


def by_rank(pairs: np.ndarray) -> float:
    """Spearman's rank correlation of pairs (N, 2): that of their ranks."""
    return float(np.corrcoef(rankdata(pairs, axis=0), rowvar=False)[0, 1])


def table(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_both(metrics: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Every metric by both MODELS, with its sign."""
    for template, sign in metrics.items():
        for model in MODELS if "{model}" in template else ("",):
            yield template.replace("{model}", model), sign


def flagged(values: Mapping[str, float], ceilings: Mapping[str, str]) -> list[str]:
    """Metrics of a run that lie above their ceilings."""
    return [key for key, ceiling in ceilings.items() if ceiling in values and values[key] > values[ceiling]]


def write_tables(ship: bool) -> None:
    told = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*-*.json"))]
    runs = {one["run"]: one["metrics"] for one in told}
    strengths: dict[str, dict[str, Any]] = {}
    parts = []
    for truth, metrics in CLAIMS.items():
        rows = []
        for metric, sign in by_both(metrics):
            found = correlation(runs, TRUTHS[truth], metric, sign)
            if found is None:
                rows.append((-2.0, f"`{metric}`", "too few, or all alike", "", ""))
                continue
            mean, low, high, count = found
            rows.append((mean, f"`{metric}`", f"{mean:+.2f}", f"{low:+.2f} to {high:+.2f}", str(count)))
            place = strengths.setdefault(metric, {})
            place[truth] = {
                "rank_correlation": round(mean, 3),
                "low": round(low, 3),
                "high": round(high, 3),
                "runs": count,
            }
        rows = [row[1:] for row in sorted(rows, reverse=True)]
        parts.append(
            f"## {truth}: `{TRUTHS[truth]}`\n\n" + table(rows, ("measure", "rank correlation", "95 % interval", "runs"))
        )
    rows = []
    for one in told:
        name = one["run"].split("-", 1)[1]
        expected = "over-trained" if name in OVER_TRAINED else "good" if name in GOOD else ""
        above = flagged(one["metrics"], one["ceilings"])
        truths = [f"{one['metrics'][key]:.2f}" if key in one["metrics"] else "–" for key in TRUTHS.values()]
        rows.append((one["run"], expected, *truths, ", ".join(f"`{key}`" for key in above) or "–"))
    parts.append("## What is flagged\n\n" + table(rows, ("run", "made to be", *TRUTHS, "flagged by")))
    commands = "".join(f"    {line.strip()}\n" for line in __doc__.splitlines() if line.startswith("    python"))
    counted = sum(name.startswith(CONCEPTS) for name in runs)
    head = HEAD.format(commands=commands, counted=counted, confirming=len(runs) - counted, concept=CONFIRMING)
    write_whole(FOLDER / "README.md", head + "\n" + "\n\n".join(parts) + "\n")
    write_whole(FOLDER / "strengths.json", json.dumps(strengths, indent=1))
    if ship:
        write_whole(SHIPPED, json.dumps(strengths, indent=1) + "\n")
    print((FOLDER / "README.md").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="train, draw and measure what is not there yet")
    commands.add_parser("again", help="measure all pictures that are there again")
    tables = commands.add_parser("tables", help="correlations and flags of what is there")
    tables.add_argument("--ship", action="store_true", help="write them into the package too")
    given = parser.parse_args()
    {"run": run_all, "again": measure_all, "tables": lambda: write_tables(given.ship)}[given.command]()


if __name__ == "__main__":
    main()
