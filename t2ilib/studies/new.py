"""A study file for one's own pictures, ready to run: the folder is read as a run would read it, the settings suit the base.

The file is written for its reader, who will change it: a comment where one is needed, no field that only repeats a default. It
names its pictures by their whole path, so that it can be run from any folder. Leaves out what two runs decide better than a
default: whether the steps are enough is what the quick preset shows.
"""

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from t2ilib.config import ConfigError, DataConfig, ModelConfig, check_choice
from t2ilib.data.dataset import FEW_HELD_OUT, NAMED
from t2ilib.data.manifest import examine
from t2ilib.data.records import Record
from t2ilib.data.sources import folder
from t2ilib.studies.comparisons import COMPARISONS, UNTOUCHED
from t2ilib.studies.file import Study, Variant, load_study
from t2ilib.studies.prompts import make_groups
from t2ilib.text import shown

HUB_CLIP, HUB_DINO = "openai/clip-vit-large-patch14", "facebook/dinov2-base"
SEEDS_OF_FULL = 6
SHARES = (0.125, 0.15, 0.2, 0.25, 0.3, 0.4)
"""Of the pictures to hold out: the least of these that holds out eight, or of few pictures a quarter."""
QUOTED = '"'


@dataclass(frozen=True)
class Settings:
    """What suits the models that draw at most `side` pixels. `steps`: by preset. `prompts`: how many, for drawing takes long on
    large models. `about`: a comment."""

    side: int
    about: str
    model: dict[str, Any]
    training: dict[str, Any]
    learning_rate: float
    guidance_scale: float
    steps: dict[str, int]
    prompts: int


SETTINGS = (
    Settings(128, "a tiny model: minutes on a CPU", {}, {"batch_size": 8}, 2e-3, 3.0, {"quick": 100, "full": 300}, 8),
    Settings(
        768, "fits a GPU with 8 GB; `t2ilib plan` tells what more would take", {}, {"batch_size": 2}, 1e-4, 7.0,
        {"quick": 200, "full": 1000}, 8,
    ),
    Settings(
        4096, "fits a GPU with 8 GB: frozen weights in 4 bits, activations computed twice; `t2ilib plan` tells what more would take",
        {"quantization": "nf4"}, {"batch_size": 1, "gradient_checkpointing": True}, 1e-4, 5.0, {"quick": 200, "full": 1000}, 4,
    ),
)  # fmt: skip
"""Smallest models first. Learning rates and steps are customary starting points, not the best of anything."""


class Base(NamedTuple):
    """A base model as it stands in the file, local ones by their whole path; the side in pixels of what it draws."""

    name: str
    resolution: int
    on_hub: bool


def new_study(
    pictures: Path,
    base: str,
    compare: Sequence[str],
    out: Path | None = None,
    trigger: str | None = None,
    class_word: str | None = None,
) -> tuple[Path, Study]:
    """Writes a study file about the captioned pictures of a folder; returns its path and what it says.

    `base`: as `model.base`. `compare`: names of COMPARISONS, the first the reference. `trigger`, `class_word`: of what prompts of new
    places and styles are made (`prompts.make_groups`). Raises ConfigError for pictures or captions that cannot be used, for a base or a
    name that does not exist, for things that would be the same run, and where there is a file already.
    """
    pictures = Path(os.path.abspath(pictures))  # not resolved: a link keeps the name that people know it by
    plain = unicodedata.normalize("NFKD", shown(pictures.name).casefold()).encode("ascii", "ignore").decode()
    name = re.sub(r"[^a-z0-9_-]+", "-", plain).strip("-") or "study"
    out = out or Path(f"{name}.yaml")
    if out.exists():
        raise ConfigError(f"{out} exists already: give another file by --out, or move it away")
    for chosen in compare:
        check_choice(chosen, COMPARISONS, "--compare:")
    if not compare or len(set(compare)) < len(compare):
        raise ConfigError(f"--compare: name something, and each thing once; there are {', '.join(COMPARISONS)}")
    found = look_at_base(base)
    settings = next(settings for settings in SETTINGS if found.resolution <= settings.side)
    refuse_equals(settings, compare)
    config = DataConfig(path=pictures)
    records = list(examine(folder.load(config), config).pictures)
    captions = captions_to_judge(records, choose_share(records)[1], settings.prompts)
    groups = make_groups(captions, trigger, class_word, settings is SETTINGS[0])
    text = study_text(name, pictures, records, found, settings, compare, out, groups)
    draft = out.with_name(f".{out.name}.part")
    draft.parent.mkdir(parents=True, exist_ok=True)
    draft.write_text(text, encoding="utf-8")
    try:
        study = load_study(draft)
        draft.rename(out)
    finally:
        draft.unlink(missing_ok=True)
    return out, study


def look_at_base(base: str) -> Base:
    """What can be known of a base before it is loaded; raises ConfigError where a name leads nowhere.

    Where the Hub cannot be asked, the side is guessed from the name: a file can be written on the train.
    """
    from t2ilib.models.files.locate import SHIPPED, locate
    from t2ilib.planning.unloaded import native_resolution

    place = locate(base, "--base")
    if base in SHIPPED:
        return Base(base, native_resolution(ModelConfig(base=base)), False)
    if Path(place).exists():
        return Base(os.path.abspath(place), native_resolution(ModelConfig(base=place)), False)
    try:
        return Base(base, native_resolution(ModelConfig(base=base)), True)
    except (ConfigError, OSError):
        return Base(base, 1024 if "xl" in base.lower() else 512, True)


def refuse_equals(settings: Settings, compare: Sequence[str]) -> None:
    """Raises ConfigError for two names that are the same run on this base, such as lora and nf4 where the base is in 4 bits anyway."""
    as_it_is = {"quantization": "none"} | settings.model
    seen: dict[str, str] = {}
    for name in compare:
        changes = {section: fields for section, fields in COMPARISONS[name].run.items() if fields != as_it_is}
        other = seen.setdefault(repr(changes), name)
        if other != name:
            raise ConfigError(f"--compare: {other} and {name} are the same run on this base: leave one of them out")


def choose_share(records: Sequence[Record]) -> tuple[float, list[Record]]:
    """The share of the pictures to hold out, and which these are."""
    if len(records) < 2:
        return 0.0, []
    wanted = min(FEW_HELD_OUT, max(1, len(records) // 4))
    tried = {share: folder.hold_out(records, share)[1] for share in SHARES}
    enough = {share: held_out for share, held_out in tried.items() if wanted <= len(held_out) <= len(records) // 2}
    return next(iter(enough.items()), (SHARES[0], tried[SHARES[0]]))


def captions_of(records: Sequence[Record]) -> list[str]:
    """The distinct captions, each on one line."""
    return list(dict.fromkeys(" ".join(record.caption.split()) for record in records))


def choose_prompts(records: Sequence[Record], most: int) -> list[str]:
    """Distinct captions, evenly from the first to the last picture."""
    captions = captions_of(records)
    count = min(most, len(captions))
    return [captions[index * len(captions) // count] for index in range(count)]


def captions_to_judge(records: Sequence[Record], held_out: Sequence[Record], most: int) -> list[str]:
    """`most` captions of held-out pictures, then as many of others, evenly from the first to the last. Where there are fewer, each is asked
    several times, from other noise: of one picture nothing can be told."""
    others = [record for record in records if record not in held_out]
    kinds = [choose_prompts(kind, most) for kind in (held_out, others) if kind]
    return [own[number % len(own)] for own in kinds for number in range(most)]


def scalar(value: object, style: str | None = None) -> str:
    """A value as YAML on one line, whatever is in it."""
    text = yaml.safe_dump(value, default_style=style, allow_unicode=True, width=float("inf"))
    return text.removesuffix("...\n").strip()


def study_text(
    name: str,
    pictures: Path,
    records: Sequence[Record],
    base: Base,
    settings: Settings,
    compare: Sequence[str],
    out: Path,
    groups: Mapping[str, Sequence[str]],
) -> str:
    """The whole file."""
    share, held_out = choose_share(records)
    names = ", ".join(shown(record.path.name) for record in held_out[:NAMED]) + ", ..." * (len(held_out) > NAMED)
    split = f"holds out {len(held_out)} of {len(records)} by their names: {names}" if held_out else "none is held out"
    own = {"batch_size": min(settings.training["batch_size"], len(records) - len(held_out)), "keep_adapters": "all"}
    training = settings.training | own
    *first, last = [COMPARISONS[chosen].title for chosen in compare]
    things = f"{', '.join(first)} or {last}: which suits" if first else f"What does {last} do with"
    question = f"{things} the {len(records)} pictures in {shown(pictures.name)}?"
    trained = set(captions_of([record for record in records if record not in held_out]))
    prompts = [
        f"      - {scalar(prompt, QUOTED)}{'' if prompt in trained else '  # of a held-out picture'}\n"
        for prompt in choose_prompts(records, settings.prompts)
    ]
    model = [f"    {field}: {scalar(value)}\n" for field, value in ({"base": base.name} | settings.model).items()]
    return f"""\
# {question}
# Written by `t2ilib study new`; all of it may be changed until its runs have begun, prompts and measures at any time.
#   t2ilib study run {out.name}                  one seed, few steps: does it run, does it learn?
#   t2ilib study run {out.name} --preset full    {SEEDS_OF_FULL} seeds: what is more than seed noise?
#   t2ilib study checkpoints {out.name}          which of the checkpoints that its runs kept is best?
# `run` holds sections and fields of a run config: the study's, over it the preset's, over both the variant's.
name: {name}
question: {scalar(question, QUOTED)}
reference: {compare[0]}  # what the others are compared with
base: base

run:
  # {settings.about}
  model:
{"".join(model)}\
  adapter: {{kind: lora, rank: 8, alpha: 8.0, targets: attention}}
  data:
    path: {scalar(str(pictures), QUOTED)}
    resolution: {base.resolution}  # the base's own
    validation_share: {share:g}  # {split}
  objective: {{caption_dropout: 0.1}}  # for guidance
  optimizer: {{name: adamw, learning_rate: {scalar(settings.learning_rate)}}}
  training: {{{", ".join(f"{field}: {scalar(value)}" for field, value in training.items())}}}
  evaluation:
    guidance_scale: {settings.guidance_scale}
{clip_text(base)}\
    prompts:  # captions of these pictures, for samples while it trains; put here what you really want to see drawn
{"".join(prompts)}\
    prompt_groups:  # what is drawn and judged at the end, {sum(map(len, groups.values()))} pictures a run
{groups_text(groups)}
presets:
  quick:
    seeds: [0]
{preset_text(settings.steps["quick"])}\
  full:
    seeds: {list(range(SEEDS_OF_FULL))}  # what differences so many can tell: t2ilib study power
{preset_text(settings.steps["full"])}
variants:
{variant_text("base", UNTOUCHED)}
{chr(10).join(variant_text(chosen, COMPARISONS[chosen]) for chosen in compare)}"""


ABOUT_GROUPS = {
    "captions": "as in the data; of held-out pictures they say what was learned",
    "trigger": "what was taught, and nothing else",
    "contexts": "in new places: can it still be asked for?",
    "styles": "in other styles",
    "unrelated": "nothing to do with these pictures: is it drawn as before?",
}


def groups_text(groups: Mapping[str, Sequence[str]]) -> str:
    """Each group of prompts with what it is for."""
    return "".join(
        f"      {name}:  # {ABOUT_GROUPS[name]}\n"
        + "".join(f"        - {scalar(prompt, QUOTED)}\n" for prompt in prompts)
        for name, prompts in groups.items()
    )


def clip_text(base: Base) -> str:
    """The lines about CLIP and DINOv2: a tiny model has its own CLIP, one from the Hub gets both from there, for a local one they are
    offered."""
    if base.resolution <= SETTINGS[0].side:
        return ""
    if base.on_hub:
        return (
            f"    clip_model: {HUB_CLIP}  # scores how well pictures follow prompts; 1.7 GB from the Hub, once\n"
            f"    embedding_models: [{HUB_DINO}]  # says how alike pictures are; 0.3 GB from the Hub, once\n"
        )
    return (
        f"    # clip_model: {HUB_CLIP}  # a folder or Hub id; would score how well pictures follow prompts\n"
        f"    # embedding_models: [{HUB_DINO}]  # folders or Hub ids; would say how alike pictures are\n"
    )


def preset_text(steps: int) -> str:
    return f"""\
    run:
      training: {{steps: {steps}, checkpoint_every: {steps // 4}}}
      evaluation: {{validate_every: {steps // 4}, sample_every: 0}}
"""


def variant_text(name: str, variant: Variant) -> str:
    form = {"sort_keys": False, "width": 110, "allow_unicode": True}
    words, run = (
        variant.model_dump(exclude_defaults=True, exclude={"run"}),
        {"run": variant.run} if variant.run else None,
    )
    text = yaml.safe_dump(words, **form) + (yaml.safe_dump(run, default_flow_style=None, **form) if run else "")
    return f"  {name}:\n" + "".join(f"    {line}\n" for line in text.splitlines())
