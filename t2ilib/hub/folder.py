"""A folder ready for the Hub, made of a run's: what was trained, its card, sample pictures, and the run's config without what is private.

It is made anew every time, beside the run's files, and complete when it has its name. Weights are not copied where the disk can share them.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from t2ilib.adapters.load import UNPROVEN, adapter_file, read_metadata
from t2ilib.config import ConfigError, RunConfig
from t2ilib.hub.card import adapter_card, body_of, matter, results, with_matter
from t2ilib.hub.private import public_json, public_metadata, public_run, require_public
from t2ilib.models.pipeline import INDEX
from t2ilib.runfile import load_run
from t2ilib.training.card import CARD
from t2ilib.training.resume import link_or_copy

FOLDER, PICTURES = "hub", "pictures"
TEXTS = (".json", ".yaml", ".md", ".txt", ".py")


def prepare(output: Path, repository: str, license: str | None = None) -> Path:
    """Makes `output/hub` of the run in `output`; returns it. Raises ConfigError where there is nothing whole to publish, or something
    private would be published."""
    run = finished_run(output)
    target, draft = output / FOLDER, output / f".{FOLDER}.part"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        pictures = copy_pictures(output, draft)
        grid = newest_grid(output)
        if run.trains == "adapter":
            file = adapter_file(output)
            for weights in file.parent.glob("*.safetensors"):
                copy_weights(weights, draft / weights.name)
            body = adapter_card(run, repository, file, [*pictures.values()], public_metadata(read_metadata(file)))
        else:
            copy_pipeline(output / "model", draft)
            body = body_of((output / "model" / CARD).read_text(encoding="utf-8"))
        if grid is not None:
            shutil.copyfile(grid, draft / PICTURES / "grid.png")
            body += (
                f"\n## Pictures\n\nAbove the base, below what was trained.\n\n![sample pictures]({PICTURES}/grid.png)\n"
            )
        card = with_matter(matter(run, pictures, license), f"{body}\n{results(output)}")
        (draft / CARD).write_text(card, encoding="utf-8")
        (draft / "run.yaml").write_text(yaml.safe_dump(public_run(run), sort_keys=False, allow_unicode=True))
        require_public(texts_of(draft))
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    return target


def finished_run(output: Path) -> RunConfig:
    """The config of a run that has saved what it trained."""
    if not (output / "run.yaml").exists():
        raise ConfigError(f"{output} is no run's folder: it has no run.yaml")
    run = load_run(output / "run.yaml")
    if run.trains not in ("adapter", "unet"):
        raise ConfigError(f"{output} trains {run.trains}: an adapter or a UNet can be pushed")
    if run.trains == "unet" and not (output / "model" / INDEX).exists():
        raise ConfigError(f"{output} has no whole model: run `t2ilib train` to its end first")
    if run.trains == "adapter" and (note := adapter_file(output).parent / UNPROVEN).exists():
        raise ConfigError(f"the adapter in {output} is marked as unproven: {note.read_text().strip()}")
    return run


def copy_weights(source: Path, target: Path) -> None:
    """A safetensors file, with metadata as they may be seen."""
    metadata = read_metadata(source)
    if (cleaned := public_metadata(metadata)) == metadata:
        link_or_copy(str(source), str(target))
    else:
        save_file(load_file(source), target, cleaned)
    target.chmod(0o644)  # safetensors gives its files to their owner alone


def copy_pipeline(model: Path, target: Path) -> None:
    """A diffusers folder as it is, its configs without the paths that the libraries write into them."""
    for source in sorted(path for path in model.rglob("*") if path.is_file() and path.name != CARD):
        place = target / source.relative_to(model)
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".safetensors":
            copy_weights(source, place)
        elif re.fullmatch(r"(.*_)?config\.json|model_index\.json", source.name):
            place.write_text(public_json(source), encoding="utf-8")
        else:
            shutil.copyfile(source, place)


def copy_pictures(output: Path, target: Path) -> dict[str, str]:
    """The last sample pictures; returns file in `target` -> prompt."""
    samples = output / "samples"
    (target / PICTURES).mkdir()
    steps = sorted(samples.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    told = [place / "prompts.json" for place in (*steps[-1:], samples) if (place / "prompts.json").exists()]
    if not steps or not told:
        return {}
    prompts = json.loads(told[0].read_text())
    sources = sorted(steps[-1].glob("*.png"), key=lambda path: int(path.stem))
    for source in sources:
        shutil.copyfile(source, target / PICTURES / source.name)
    return {f"{PICTURES}/{source.name}": prompt for source, prompt in zip(sources, prompts, strict=False)}


def newest_grid(output: Path) -> Path | None:
    return max((output / "samples").glob("grid-*.png"), key=lambda path: int(path.stem[5:]), default=None)


def texts_of(folder: Path) -> Mapping[str, str]:
    """File -> its text, and of weights what they say of themselves."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as stored:
                found[name] = json.dumps(stored.metadata() or {}, indent=0)
        elif path.suffix in TEXTS and path.name not in ("vocab.json", "tokenizer.json", "merges.txt"):
            found[name] = path.read_text(encoding="utf-8")
    return found
