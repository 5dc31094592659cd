"""Adapters from files and checkpoints back onto a base: one or several, each with its weight, or switched off."""

import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2ilib.adapters.formats import is_kohya, read_kohya, read_metadata, refuse_others, write_diffusers
from t2ilib.adapters.placing import DIFFUSERS, few, missing_layers, place_diffusers, place_kohya
from t2ilib.adapters.tokens import add_words, read_words
from t2ilib.config import ConfigError, DrawnBy, FinishedAdapter, check_choice
from t2ilib.memory import align
from t2ilib.models.components import Components
from t2ilib.models.files.locate import in_small_letters
from t2ilib.models.noise import BETAS
from t2ilib.models.pipeline import build_pipeline, quiet_libraries
from t2ilib.text import shown

FILE_NAME = "pytorch_lora_weights.safetensors"
log = logging.getLogger(__name__)
UNPROVEN = "UNPROVEN.txt"
"""Beside an adapter whose training could not be proven: why."""
ALPHA = re.compile(r"(\.lora(_A|_B|_linear_layer)?)?\.alpha$")
UP = re.compile(r"(\.lora_B|\.lora\.up|\.lora_linear_layer\.up|(?<=_lora)\.up)\.weight$")
"""What stands behind a module's name in that of its alpha, and in that of the second of its two matrices."""
KOHYA_LAYER = re.compile(r"(lora_te\d?)_text_model_encoder_layers_(\d+)_")
PARTS = ("unet.", "text_encoder.", "text_encoder_2.")
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction", "sample": "sample"}
"""`modelspec.prediction_type` of an adapter -> diffusers' name."""
ZERO_TERMINAL_SNR, BETA_SCHEDULE = "ss_zero_terminal_snr", "t2ilib.beta_schedule"
"""What an adapter's file says of the noise that it was trained by: "True", as kohya's scripts write it; and the betas, where they
are not its base's."""
DRAWN_BY = "t2ilib.drawn_by"
"""Likewise how it is drawn, where its base is drawn otherwise: `DrawnBy` as JSON."""


def adapter_file(path: Path) -> Path:
    """The adapter behind a path: the file itself, or that of a run's or adapter's folder. Raises ConfigError if there is none."""
    path = Path(path)
    candidates = [path, path / FILE_NAME, path / "adapter" / FILE_NAME]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is not None and file.suffix.lower() in (".pt", ".pth", ".ckpt", ".bin"):
        raise ConfigError(
            f"{file} is a pickle, which can run any code when it is opened: take the .safetensors of the same adapter"
        )
    if file is None:
        raise ConfigError(
            f"no adapter at {path}: give a .safetensors file, or a folder that holds {FILE_NAME} or adapter/{FILE_NAME}"
        )
    return file


def recorded_run(path: Path) -> Path | None:
    """The run.yaml of the run that an adapter (its file or folder, or the folder of a step) comes from; None where there is none."""
    path = Path(path)
    return next((file for place in (path, *path.parents[:4]) if (file := place / "run.yaml").is_file()), None)


def holds_dora(file: Path) -> bool:
    """Whether an adapter's file, in any layout, has magnitudes."""
    with safe_open(file, "pt") as stored:
        return any(re.search(r"\.lora_magnitude_vector|\.dora_scale$", key) for key in list(stored.keys()))


def load_adapter(components: Components, path: Path, name: str = "default", partial: bool = False) -> None:
    """Attaches a saved adapter, frozen, to `components`, with the words that were learned beside it. `path`: the file, or a run's or
    adapter's folder.

    Several may be attached under different names; `weigh_adapters` says how strongly each acts. On a student an adapter of its teacher goes to
    the layers that came from those it adapts (`placing`). `partial`: layers that this model does not have are left out, which is said.
    Raises ConfigError where there is no adapter file, or its layers are not this model's.
    """
    file = adapter_file(path)
    if (note := file.parent / UNPROVEN).exists():
        log.warning("%s is marked as unproven: %s", file, note.read_text().strip())
    attach_layers(components, file, name, partial)
    add_words(components, read_words(components, file))
    metadata = read_metadata(file)
    take_up_noise(components, metadata, file)
    take_up_drawing(components, metadata, file)
    tell_clip_skip(components, metadata, file)
    for module in components.modules().values():
        align(module.requires_grad_(False))


def attach_layers(components: Components, file: Path, name: str, partial: bool = False) -> None:
    """Attaches the layers of a file, in whatever layout, as the adapter `name`; nothing else of `components` changes. `partial`: as in
    `load_adapter`."""
    metadata, tensors = read_metadata(file), load_file(file)
    with tempfile.TemporaryDirectory(prefix="t2ilib-") as folder:
        if is_kohya(tensors) and not any(key.startswith(PARTS) for key in tensors):
            converted = Path(folder) / FILE_NAME
            there = place_kohya(components, without_skipped_layers(components, tensors), metadata, file, partial)
            write_diffusers(read_kohya(components, there, file, metadata), components, converted, metadata)
        else:
            refuse_others([key for key in tensors if not DIFFUSERS.search(key)], file)
            placed, told = place_diffusers(components, tensors, metadata, file, partial)
            source = file
            if placed is not tensors:
                source = Path(folder) / "placed.safetensors"
                save_file(dict(placed), source, dict(told))
            converted = readable(source, placed, told, Path(folder))
        attach_file(components, converted, name, file)


def attach_finished(components: Components, adapters: Sequence[FinishedAdapter]) -> None:
    """Puts adapters that are there already on a base, each as strong as it is to be. Raises ConfigError as `load_adapter` does."""
    names = [f"adapter{number}" for number in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        load_adapter(components, Path(adapter.path), name, adapter.partial)
    if adapters:
        weigh_adapters(components, {name: adapter.strength for name, adapter in zip(names, adapters, strict=True)})


def without_skipped_layers(components: Components, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A kohya file without the layers that `model.clip_skip` leaves out: sd-scripts adapt those too, and they have no effect."""
    if not (components.config and components.config.clip_skip):
        return dict(tensors)
    first = {
        components.family.kohya_prefixes[name]: encoder.config.num_hidden_layers
        for name, encoder in components.text_encoders.items()
    }
    found = {name: KOHYA_LAYER.match(name) for name in tensors}
    return {name: x for name, x in tensors.items() if not ((place := found[name]) and int(place[2]) >= first[place[1]])}


def take_up_noise(components: Components, metadata: Mapping[str, str], file: Path) -> None:
    """Has the model draw by what an adapter says that it was trained for; what it does not say stays as it is."""
    prediction = PREDICTIONS.get(metadata.get("modelspec.prediction_type", ""), "auto")
    betas, zero = metadata.get(BETA_SCHEDULE, "auto"), True if metadata.get(ZERO_TERMINAL_SNR) == "True" else None
    rescaled = bool(components.scheduler.config.get("rescale_betas_zero_snr"))
    if prediction == "epsilon" and (zero or rescaled):
        log.warning(
            "%s says that it predicts noise, by which nothing can be drawn at zero terminal SNR: pictures are drawn %s",
            file,
            "as its base draws them" if rescaled else "without that",
        )
        prediction, zero = "auto" if rescaled else prediction, None
    before = components.scheduler
    components.noise_as(prediction, check_choice(betas, ("auto", *BETAS), f"{BETA_SCHEDULE} of {file}"), zero)
    if components.scheduler is not before:
        now = components.scheduler.config
        told = f"{now.prediction_type}, betas {now.beta_schedule}{', zero terminal SNR' if zero else ''}"
        log.info("%s was trained for another noise than its base: pictures are drawn so (%s)", file, told)


def take_up_drawing(components: Components, metadata: Mapping[str, str], file: Path) -> None:
    """Has the model be drawn as an adapter says that it was trained to be; of several that say so as the last does."""
    if DRAWN_BY not in metadata:
        return
    drawn = read_drawn(metadata[DRAWN_BY], file)
    components.draw_as(drawn)
    log.info(
        "%s is drawn by %s: in %d steps, with guidance %g, where nothing else is asked for",
        file,
        drawn.scheduler,
        drawn.num_inference_steps,
        drawn.guidance_scale,
    )


def read_drawn(text: str, file: Path) -> DrawnBy:
    try:
        return DrawnBy.model_validate_json(text)
    except ValidationError:
        raise ConfigError(
            f"{file} says that it is drawn by {shown(text)}, which is not known here: take a t2ilib as new as the one that wrote it"
        ) from None


def tell_clip_skip(components: Components, metadata: Mapping[str, str], file: Path) -> None:
    """Warns where an adapter was trained on another layer of the text encoder than the one that is read here."""
    told = metadata.get("ss_clip_skip", "")
    if not components.family.clip_skip or not told.isdecimal():
        return
    trained, here = max(0, int(told) - 1), components.config.clip_skip if components.config else 0
    if trained != here:
        log.warning(
            "%s was trained with model.clip_skip %d, and the base has %d: set it to %d to draw as it learned",
            file,
            trained,
            here,
            trained,
        )


def readable(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], scratch: Path) -> Path:
    """A file in diffusers' layout as diffusers reads the whole of it: itself, under a name that ends in small letters, or, where it has
    tensors of alphas, which diffusers refuses or passes over, a copy in `scratch` with alpha / rank in its weights."""
    alphas = {ALPHA.sub("", key): float(x) for key, x in tensors.items() if key.endswith(".alpha")}
    if not alphas:
        return in_small_letters(file, scratch)
    if "lora_adapter_metadata" in metadata:
        raise ConfigError(f"{file} says its alphas twice, in tensors and in its metadata: take out one of them")
    folded = {key: x for key, x in tensors.items() if not key.endswith(".alpha")}
    for key, x in folded.items():
        if UP.search(key) and (alpha := alphas.pop(UP.sub("", key), None)) is not None:
            folded[key] = x * (alpha / x.shape[1])
    if alphas:
        raise ConfigError(f"{file} has an alpha for {next(iter(alphas))}, and no weights")
    save_file(folded, scratch / FILE_NAME, dict(metadata))
    return scratch / FILE_NAME


def attach_file(components: Components, file: Path, name: str, told: Path) -> None:
    """Attaches a file in diffusers' layout, every tensor of it; `told` is what errors call it."""
    try:
        with quiet_libraries():
            build_pipeline(components).load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{told} does not fit {components.path}: {reason[:300]}{' ...' * (len(reason) > 300)}"
        ) from error
    require_all_placed(components, file, name, told)
    if "lora_adapter_metadata" in read_metadata(file):
        put_weights(components, file, name)


def require_all_placed(components: Components, file: Path, name: str, told: Path) -> None:
    """Raises ConfigError where the file has adapted layers that `components` has not: diffusers leaves those out."""
    with safe_open(file, "pt") as stored:
        keys = list(stored.keys())
    count = sum(bool(re.search(r"lora[._](A|down)\.weight$", key)) for key in keys)
    placed = sum(name in getattr(m, "lora_A", {}) for part in components.modules().values() for m in part.modules())
    if placed < count:
        missing = missing_layers(components, keys)
        raise ConfigError(
            f"{told} adapts {count} layers, and {components.path} has {placed} of them: it was trained on another base"
            + (
                f". Not there are {few(missing)}; load it with partial (--partial) to leave these out"
                if missing
                else ""
            )
        )


def put_weights(components: Components, file: Path, name: str) -> None:
    """Sets every weight of the file once more, through peft: transformers' loader loses the DoRA magnitudes of text encoders.

    Raises ConfigError for weights in the file that found no place.
    """
    from peft import set_peft_model_state_dict

    weights = load_file(file)
    for component, module in components.modules().items():
        own = {k.removeprefix(f"{component}."): v for k, v in weights.items() if k.startswith(f"{component}.")}
        if not hasattr(module, "text_model"):
            own = {k.removeprefix("text_model."): v for k, v in own.items()}
        if own:
            for key, parameter in module.named_parameters():  # over a base in 16 bits they would be rounded to it
                if f".{name}." in key and ".lora_" in key:
                    parameter.data = parameter.data.float()
            left = set_peft_model_state_dict(module, own, adapter_name=name)
            if left is not None and left.unexpected_keys:
                raise ConfigError(
                    f"{file} has weights that {components.path} has no place for: {', '.join(left.unexpected_keys[:4])}"
                )


def weigh_adapters(components: Components, weights: Mapping[str, float]) -> None:
    """Sets how strongly each attached adapter acts: 1 as trained, 0 switched off; one that is not named is switched off.

    Several add up: W + sum_i w_i s_i B_i A_i (a DoRA of weight 0 would still rescale its rows, so it is taken out). Raises
    ConfigError for a name that no layer has.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [
        layer
        for module in components.modules().values()
        for layer in module.modules()
        if isinstance(layer, BaseTunerLayer)
    ]
    attached = {name for layer in layers for name in layer.lora_A}
    if set(weights) - attached:
        unknown, known = sorted(set(weights) - attached), ", ".join(sorted(attached)) or "none"
        raise ConfigError(f"no adapter is called {', '.join(unknown)}; attached are {known}")
    for layer in layers:
        active = [name for name, weight in weights.items() if weight and name in layer.lora_A]
        layer.enable_adapters(bool(active))
        if active:
            layer.set_adapter(active)
        for name in active:
            layer.set_scale(name, weights[name])
        layer.requires_grad_(False)
