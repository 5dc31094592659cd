"""A study's folder as data: what was asked, which runs finished, what they measured, and which runs are missing.

What a run did not measure stays absent: nothing here fills in zeros. Leaves out everything that MLflow knows beyond the files,
so a report can be made on another machine from a copied folder, or from its `rows.parquet` alone.
"""

import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from t2ilib.config import ConfigError
from t2ilib.environment import told_differences
from t2ilib.evaluation.metrics import Metric
from t2ilib.evaluation.rows import read_rows
from t2ilib.report.contents import FinishedRun, StudyReport, read_variant
from t2ilib.report.parquet import ROWS, read_parquet
from t2ilib.runfile import merge
from t2ilib.studies.runs import VOTES, changes, is_measured_again
from t2ilib.studies.tuned import TRIALS

PICTURE_PIXELS = 256
BESIDE = (TRIALS, f"{VOTES}/*.json")


def load_report(folder: Path | str) -> StudyReport:
    """Reads `folder/study.json` and every finished run; a file that is `rows.parquet`, or a folder that has it and no runs, by that alone.
    Raises ConfigError for a folder or file that is not what it should be, and for
    runs that were made with different versions or on different devices, which share no table."""
    folder = Path(folder)
    if folder.is_file() or ((folder / ROWS).is_file() and not any(folder.glob("*/seed*"))):
        return read_parquet(folder if folder.is_file() else folder / ROWS)
    if not (folder / "study.json").exists():
        raise ConfigError(f"{folder} holds no study.json: give the folder that a study wrote, results/<study>-<preset>")
    study = read_json(folder / "study.json")
    lacking = [key for key in ("name", "reference", "seeds", "variants") if key not in study]
    if lacking:
        raise ConfigError(f"{folder / 'study.json'} lacks {', '.join(lacking)}")
    for role in ("reference", "base"):
        if study.get(role) is not None and study[role] not in study["variants"]:
            raise ConfigError(
                f"{folder / 'study.json'}: {role} {study[role]!r} is not among {', '.join(study['variants'])}"
            )
    runs, missing, not_run, not_finite = {}, [], [], []
    begun = {
        int(place.name.removeprefix("seed")) for name in study["variants"] for place in (folder / name).glob("seed*")
    }
    extra = sorted(begun - {*study["seeds"]})
    for name in study["variants"]:
        for seed in (*study["seeds"], *extra):
            path = folder / name / f"seed{seed}"
            if not path.exists():
                not_run += [(name, seed)] if seed in study["seeds"] else []
                continue
            result = read_json(path / "result.json") if (path / "result.json").exists() else {}
            if result.get("status") != "finished":
                missing.append((name, seed))
                continue
            runs[name, seed], dropped = read_run(path, name, seed, result)
            not_finite += dropped
    runs = with_pictures(runs.values())
    require_one_environment(study, runs.values())
    return StudyReport(
        folder,
        study["name"],
        study.get("question", ""),
        study.get("preset", ""),
        study["reference"],
        study.get("base"),
        tuple(seed for seed in (*study["seeds"], *extra) if seed in begun) or tuple(study["seeds"]),
        {name: read_variant(name, told) for name, told in study["variants"].items()},
        runs,
        tuple(missing),
        tuple(not_run),
        tuple(not_finite),
        declarations(runs.values()),
        next(filter(None, (held_out_names(run.folder) for run in runs.values())), ()),
        tuple(place for place, run in runs.items() if is_outdated(study, run)),
        study.get("margins") or {},
        study.get("score"),
        {
            path.relative_to(folder).as_posix(): path.read_text()
            for pattern in BESIDE
            for path in sorted(folder.glob(pattern))
        },
    )


def require_one_environment(study: Mapping[str, Any], runs: Iterable[FinishedRun]) -> None:
    """Raises ConfigError, naming them, where runs were made with different versions or on different devices; those of which nobody knows
    are left to the report to tell."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        if run.environment:
            groups.setdefault(json.dumps(run.environment, sort_keys=True), []).append(run)
    if len(groups) < 2:
        return
    told = told_differences(own[0].environment for own in groups.values())
    lines = [
        f"{text or 'one of them alone'}: {labels([(run.variant, run.seed) for run in own])}"
        for text, own in zip(told, groups.values(), strict=True)
    ]
    fewest = min(groups.values(), key=len)
    only = " ".join(f"--only {name}" for name in dict.fromkeys([study["reference"], *(run.variant for run in fewest)]))
    raise ConfigError(
        f"runs of {study['name']}-{study.get('preset', '')} were made with different versions or devices, and share no table:\n  "
        + "\n  ".join(lines)
        + "\nTo compare the newcomers, run the reference beside them: t2ilib study run <study file>"
        f" --preset {study.get('preset', '')} {only} --results <another folder>"
    )


def labels(places: Sequence[tuple[str, int]]) -> str:
    """ "lora (seeds 0, 1), dora (seed 0)"."""
    seeds: dict[str, list[str]] = {}
    for name, seed in places:
        seeds.setdefault(name, []).append(str(seed))
    return ", ".join(f"{name} (seed{'s' * (len(own) > 1)} {', '.join(own)})" for name, own in seeds.items())


def declarations(runs: Iterable[FinishedRun]) -> dict[str, Metric]:
    """What all runs declared; first what the one that declared most does, in its order: the untouched base measures fewer things."""
    found: dict[str, Metric] = {}
    for run in sorted(runs, key=lambda run: -len(run.declared)):
        found |= {name: metric for name, metric in run.declared.items() if name not in found}
    return found


def is_outdated(study: Mapping[str, Any], run: FinishedRun) -> bool:
    """Whether the study now says that a run is to be measured otherwise than it was."""
    if not run.settings or "run" not in study:  # reports of before runs were recorded
        return False
    now = merge(study["run"], study["variants"][run.variant].get("run") or {})
    return any(is_measured_again(address, now) for address in changes(run.settings, now))


def held_out_names(folder: Path) -> tuple[str, ...]:
    """Names of the pictures that a run measured its held-out loss on; () where its folder does not have them."""
    listing = next(iter(sorted(folder.glob("held_out/step-*.json"))), None)
    return tuple(row["picture"] for row in json.loads(listing.read_text())) if listing else ()


def read_run(path: Path, name: str, seed: int, result: Mapping[str, Any]) -> tuple[FinishedRun, list[str]]:
    """The run and, as text, the metrics that are not finite numbers: those count as not measured, and the report says so."""
    told = {key: value for key, value in (result.get("metrics") or {}).items() if value is not None}
    metrics = {key: float(value) for key, value in told.items() if math.isfinite(value)}
    dropped = [f"{name}, seed {seed}: {key} is {told[key]}" for key in told if key not in metrics]
    history = read_history(path / "metrics.jsonl")
    settings = result.get("run") or {}
    declared = {key: Metric(**about) for key, about in (result.get("measures") or {}).items()}
    run = FinishedRun(
        name, seed, path, result.get("seconds"), settings, metrics, declared, history, result.get("mlflow_run_id"), result.get("jobs"),
        result.get("environment") or (), tuple(read_rows(path)),
    )  # fmt: skip
    return run, dropped


def with_pictures(runs: Iterable[FinishedRun]) -> dict[tuple[str, int], FinishedRun]:
    """The runs by place; of each variant the first that kept pictures has them, for the report shows no others."""
    found, shown = {}, set()
    for run in runs:
        if run.variant not in shown and (pictures := read_pictures(run.folder)):
            run = replace(run, pictures=pictures)
            shown.add(run.variant)
        found[run.variant, run.seed] = run
    return found


def read_pictures(folder: Path) -> dict[str, bytes]:
    """prompt -> PNG of the pictures that a run kept for the report, as large as it shows them."""
    listing = folder / "pictures" / "prompts.json"
    prompts = json.loads(listing.read_text()) if listing.exists() else []
    paths = {prompt: listing.parent / f"{index:02d}.png" for index, prompt in enumerate(prompts)}
    return {prompt: small_png(path) for prompt, path in paths.items() if path.exists()}


def small_png(path: Path) -> bytes:
    """A picture as PNG, its longer side PICTURE_PIXELS at most."""
    with Image.open(path) as picture:
        if max(picture.size) <= PICTURE_PIXELS and picture.format == "PNG":
            return path.read_bytes()
        picture.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
        written = io.BytesIO()
        picture.save(written, "PNG")
        return written.getvalue()


def read_history(path: Path) -> dict[str, dict[int, float]]:
    """metric -> {step: value}; a step logged twice keeps the later value, and a run without the file has no history."""
    history: dict[str, dict[int, float]] = defaultdict(dict)
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number} is not JSON: {error}") from None
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float) and math.isfinite(value):
                history[key][row["step"]] = float(value)
    return dict(history)


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
