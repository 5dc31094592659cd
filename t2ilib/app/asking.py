"""What the page holds as settings of a picture, and back: each value under the name of its field in the panel.

A page shows not all that settings have. What it does not, of the base and of adapters' files, is the visitor's (`visitors`), and holds for as
long as the field that it belongs to still says the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from t2ilib.app.choices import read_adapter, written_adapter
from t2ilib.app.visitors import Visitor
from t2ilib.config import ConfigError
from t2ilib.drawing.desk import Picture
from t2ilib.drawing.finding import change_base
from t2ilib.drawing.pngtext import Restored
from t2ilib.drawing.settings import AdapterChoice, DrawSettings, build_settings
from t2ilib.seeds import fresh_seed

SLOTS = 4
"""Adapters that the page has room for."""
FULL, FOUR_BITS, EIGHT_BITS = "as they are", "4 bits (nf4)", "8 bits (int8)"
WEIGHTS = {FULL: "none", FOUR_BITS: "nf4", EIGHT_BITS: "int8"}
"""What the page calls a quantization -> `model.quantization`."""
SAME = (
    "prompt",
    "negative_prompt",
    "num_pictures",
    "num_inference_steps",
    "guidance_scale",
    "sampler",
    "vae_tiling",
    "first",
)
"""Fields of the page that are fields of DrawSettings."""
ADAPTERS = tuple(f"adapter{slot}" for slot in range(SLOTS))
STRENGTHS = tuple(f"strength{slot}" for slot in range(SLOTS))
SIDES = ("width", "height")
RARE = ("base", "weights", "clip_skip", "partial", "embeddings")
NAMES = (*SAME, *SIDES, "seed", "random", *RARE, *ADAPTERS, *STRENGTHS)
"""All fields of the page, in the order that they are handed over."""
Form = Mapping[str, Any]


def settings_of(form: Form, visitor: Visitor) -> DrawSettings:
    """The settings that the page asks for; "random" takes any seed. Raises ConfigError listing every mistake."""
    values = {name: form[name] for name in SAME} | {
        "seed": fresh_seed() if form["random"] else whole_number(form["seed"]),
        **{name: whole_number(form[name]) if (form[name] or "").strip() else None for name in SIDES},
        "sampler": form["sampler"] or "",
        "model": model_of(form, visitor).model_dump(),
        "adapters": [adapter | known_file(adapter, visitor) for adapter in adapters_of(form)],
        "embeddings": [line.strip() for line in form["embeddings"].splitlines() if line.strip()],
    }
    return build_settings(values, "the settings")


def whole_number(text: str | None) -> int | str:
    """A number as it was typed: seeds have more digits than a browser's numbers; what is none is for the settings to refuse."""
    text = (text or "").strip()
    return int(text) if text.isdecimal() and len(text) < 30 else text


def model_of(form: Form, visitor: Visitor):
    """The base that the page asks for."""
    if not (base := (form["base"] or "").strip()):
        raise ConfigError("Base model is empty: choose one, such as tiny-sdxl, which ships with t2ilib")
    return change_base(
        visitor.model, base=base, quantization=WEIGHTS[form["weights"]], clip_skip=int(form["clip_skip"] or 0)
    )


def adapters_of(form: Form) -> list[dict[str, Any]]:
    """The adapters of the slots that are not empty. Whether layers that the base lacks are left out holds for all of them."""
    slots = zip((form[name] for name in ADAPTERS), (form[name] for name in STRENGTHS), strict=True)
    partial = {"partial": bool(form["partial"])}
    return [read_adapter(text, strength) | partial for text, strength in slots if (text or "").strip()]


def known_file(adapter: Mapping[str, Any], visitor: Visitor) -> dict[str, str | None]:
    """What the picture that was dropped says of an adapter's file, if it is the same adapter."""
    same = [c for c in visitor.restored if (c.path, c.step) == (adapter["path"], adapter["step"])]
    return {"digest": same[0].digest} if same else {}


def changed_files(asked: Sequence[AdapterChoice], picture: Picture) -> list[str]:
    """A sentence for every adapter whose file is another than the settings say."""
    return [
        f"{now.path} is another file now than when the picture was drawn whose settings these are: it may look otherwise."
        for before, now in zip(asked, picture.settings.adapters, strict=True)
        if before.digest and now.digest and before.digest != now.digest
    ]


def form_of(settings: DrawSettings) -> dict[str, Any]:
    """What the page has to hold to ask for these settings. Raises ConfigError where it has no room for them."""
    if len(settings.adapters) > SLOTS:
        raise ConfigError(
            f"the picture was drawn with {len(settings.adapters)} adapters, and the page has room for {SLOTS}: draw it again by"
            " t2ilib generate --like"
        )
    empty = [("", 1.0)] * (SLOTS - len(settings.adapters))
    slots = [*((written_adapter(choice), choice.strength) for choice in settings.adapters), *empty]
    named = {quantization: name for name, quantization in WEIGHTS.items()}
    return {
        **{name: getattr(settings, name) for name in SAME},
        "seed": str(settings.seed),
        **{name: "" if getattr(settings, name) is None else str(getattr(settings, name)) for name in SIDES},
        "random": False,
        "base": settings.model.base,
        "weights": named[settings.model.quantization],
        "clip_skip": settings.model.clip_skip,
        "partial": any(choice.partial for choice in settings.adapters),
        "embeddings": "\n".join(settings.embeddings),
        **dict(zip(ADAPTERS, (text for text, _ in slots), strict=True)),
        **dict(zip(STRENGTHS, (strength for _, strength in slots), strict=True)),
    }


def take_settings(restored: Restored, visitor: Visitor) -> tuple[dict[str, Any], list[str]]:
    """What the page has to hold to draw a picture again, and what is to be told of it. A text that names no base leaves the page's."""
    settings, notes = restored.settings, list(restored.notes)
    if restored.source != "t2ilib" and "base" not in settings.model.model_fields_set:
        model = change_base(visitor.model, clip_skip=settings.model.clip_skip)
        settings = settings.model_copy(update={"model": model})
    form = form_of(settings)
    visitor.model, visitor.restored = settings.model, settings.adapters
    if restored.unknown:
        notes.append(f"nothing here has {', '.join(restored.unknown)}")
    return form, notes


def prompts_of(text: str | None, settings: DrawSettings) -> list[DrawSettings]:
    """The settings with each prompt of a text, one a line; as they are where it is empty. Noise is numbered over all of them."""
    prompts = [line.strip() for line in (text or "").splitlines() if line.strip()] or [settings.prompt]
    count = settings.num_pictures
    return [settings.changed(prompt=prompt, first=settings.first + i * count) for i, prompt in enumerate(prompts)]
