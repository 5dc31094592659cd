"""Adapters from files and checkpoints back onto a base: one or several, each with its weight, or switched off."""

import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2ilib.adapters.formats import is_kohya, read_kohya, refuse_others, write_diffusers
from t2ilib.config import ConfigError
from t2ilib.memory import align
from t2ilib.models.components import Components
from t2ilib.models.files.locate import in_small_letters
from t2ilib.models.pipeline import build_pipeline, quiet_libraries

FILE_NAME = "pytorch_lora_weights.safetensors"
log = logging.getLogger(__name__)
UNPROVEN = "UNPROVEN.txt"
"""Beside an adapter whose training could not be proven: why."""
DIFFUSERS = re.compile(
    r"\.(lora_[AB]|lora\.(down|up)|lora_linear_layer\.(down|up)|processor\.\w+_lora\.(down|up))\.weight$|\.lora_magnitude_vector(\.weight)?$|\.alpha$"
)
"""The tensors of an adapter under diffusers' and peft's names."""
ALPHA = re.compile(r"(\.lora(_A|_B|_linear_layer)?)?\.alpha$")
UP = re.compile(r"(\.lora_B|\.lora\.up|\.lora_linear_layer\.up|(?<=_lora)\.up)\.weight$")
"""What stands behind a module's name in that of its alpha, and in that of the second of its two matrices."""
PARTS = ("unet.", "text_encoder.", "text_encoder_2.")
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction", "sample": "sample"}
"""`modelspec.prediction_type` of an adapter -> diffusers' name."""


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


def read_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says about itself. Raises ConfigError for a file that is none."""
    try:
        with safe_open(file, "pt") as stored:
            return stored.metadata() or {}
    except SafetensorError as error:
        raise ConfigError(f"{file} is not a whole safetensors file: {error}") from None


def holds_dora(file: Path) -> bool:
    """Whether an adapter's file, in any layout, has magnitudes."""
    with safe_open(file, "pt") as stored:
        return any(re.search(r"\.lora_magnitude_vector|\.dora_scale$", key) for key in list(stored.keys()))


def load_adapter(components: Components, path: Path, name: str = "default") -> None:
    """Attaches a saved adapter, frozen, to `components`. `path`: the file, or a run's or adapter's folder.

    Several may be attached under different names; `weigh_adapters` says how strongly each acts. Raises ConfigError where there
    is no adapter file, or its layers are not this model's.
    """
    file = adapter_file(path)
    metadata = read_metadata(file)
    if (note := file.parent / UNPROVEN).exists():
        log.warning("%s is marked as unproven: %s", file, note.read_text().strip())
    tensors = load_file(file)
    if is_kohya(tensors) and not any(key.startswith(PARTS) for key in tensors):
        with tempfile.TemporaryDirectory(prefix="t2ilib-") as folder:
            converted = Path(folder) / FILE_NAME
            write_diffusers(read_kohya(components, tensors, file, metadata), components, converted, metadata)
            attach_file(components, converted, name, file)
    else:
        refuse_others([key for key in tensors if not DIFFUSERS.search(key)], file)
        with tempfile.TemporaryDirectory(prefix="t2ilib-") as folder:
            attach_file(components, readable(file, tensors, metadata, Path(folder)), name, file)
    if told := PREDICTIONS.get(metadata.get("modelspec.prediction_type", "")):
        if told != components.scheduler.config.prediction_type:
            log.info("%s was trained for %s: pictures are drawn so", file, told)
        components.predict(told)
    for module in components.modules().values():
        align(module.requires_grad_(False))


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
        count = sum(bool(re.search(r"lora[._](A|down)\.weight$", key)) for key in list(stored.keys()))
    placed = sum(name in getattr(m, "lora_A", {}) for part in components.modules().values() for m in part.modules())
    if placed < count:
        raise ConfigError(
            f"{told} adapts {count} layers, and {components.path} has {placed} of them: it was trained on another base"
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
