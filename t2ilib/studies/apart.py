"""What a study is tuned on, kept apart from what its final runs are judged by: seeds, pictures, prompts. Checked before a trial begins.

    drawn world       other scenes for training pictures, held-out pictures and checked prompts (`data.part`)
    one's own         what final runs hold out takes no part; of the training pictures a share is held out in its place, and
                      what is drawn are captions of these, or `tuning.prompts`

Leaves out pictures of the class (`prior`), which the base draws or the user gives: they are trained on and judge nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from t2ilib.config import ConfigError, RunConfig
from t2ilib.data.dataset import Dataset, load_datasets, some_captions
from t2ilib.runfile import build_run, merge
from t2ilib.shapes.checker import checked_scenes
from t2ilib.studies.file import Study
from t2ilib.text import shown


def tuning_settings(study: Study, preset: str, variants: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Variant -> the sections and fields of its trials but for what is searched. Raises ConfigError where what they are judged by is not
    apart from what the preset's runs are judged by, and as data does."""
    found, seen = {}, Seen()
    for name in variants:
        final = study.settings(preset, name)
        tuning = merge(final, study.tuning.run, {"data": {"part": "tuning"}})
        config, while_tuning = (build_run(values, f"variant {name}, preset {preset}") for values in (final, tuning))
        if config.data.source != "shapes":
            prompts = choose_prompts(study, name, config, while_tuning, seen)
            tuning = merge(tuning, {"evaluation": {"prompts": prompts}})
        found[name] = tuning
        of_tuning = used(while_tuning, seen, tuning=True)
        require_apart(name, used(config, seen), of_tuning)
    return found


class Seen:
    """Data sets that were read, each once."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[Dataset, Dataset]] = {}

    def of(self, config: RunConfig) -> tuple[Dataset, Dataset]:
        whole = config.data.model_copy(update={"sample": None})  # whatever a seed would draw of it
        config = config.model_copy(update={"data": whole})
        key = config.model_dump_json(include={"data", "shapes"})
        if key not in self.known:
            self.known[key] = load_datasets(config)
        return self.known[key]


def used(config: RunConfig, seen: Seen, tuning: bool = False) -> dict[str, set[Any]]:
    """What -> which pictures or scenes: of final runs those that nothing of tuning may touch, of tuning all."""
    training, held_out = ([picture_of(record) for record in part.own.records] for part in seen.of(config))
    found = {"held-out pictures": set(held_out)}
    if tuning or config.data.source == "shapes":
        found["training pictures"] = set(training)
    if config.data.source == "shapes":
        groups = checked_scenes(config).values()
        found["checked prompts"] = {tuple(scene.describe().items()) for group in groups for scene in group}
    return found


def picture_of(record) -> Any:
    """A scene, or where a picture lies."""
    return tuple((key, value) for key, value in record.scene.items() if value) if record.scene else record.path


def require_apart(name: str, final: Mapping[str, set], tuning: Mapping[str, set]) -> None:
    for what, of_final in final.items():
        for part, of_tuning in tuning.items():
            if both := of_final & of_tuning:
                raise ConfigError(
                    f"{name}: {len(both)} of the final runs' {what} are also among the {part} of tuning ({first(both)}): what it is tuned"
                    " on must not judge it"
                )


def first(found: Iterable[Any]) -> str:
    return shown(str(min(map(str, found))))


def choose_prompts(study: Study, name: str, final: RunConfig, tuning: RunConfig, seen: Seen) -> list[str]:
    """What trials on one's own pictures draw; raises ConfigError for prompts that final runs draw too."""
    training, held_out = seen.of(final)
    asked = {*(final.evaluation.prompts or some_captions(held_out.captions(), training.own.captions()))}
    given = study.tuning.prompts or study.tuning.run.get("evaluation", {}).get("prompts") or []
    if both := [prompt for prompt in given if prompt in asked]:
        raise ConfigError(f"tuning.prompts: {both[0]!r} is a prompt of the final runs of {name} too: take others")
    if given:
        return list(given)
    captions = [caption for caption in seen.of(tuning)[1].captions() if caption not in asked]
    if not captions:
        raise ConfigError(
            f"{name}: no picture that is held out while tuning has a caption that its final runs do not draw: give tuning.prompts,"
            " what is to be drawn while tuning"
        )
    return list(some_captions(captions, ()))
