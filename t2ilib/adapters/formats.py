"""The layouts of adapter files, written from plain layers and read back: diffusers' and peft's names, and kohya's.

diffusers' own converter of kohya files takes one alpha for all layers, drops DoRA's scale and misreads SD1.5's text encoder, so such
files are read here, by the names that this model's modules have in them: every tensor finds its place, or the file is refused.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from t2ilib.adapters.dora import AS, FOR, PROGRAMS, SAID, with_magnitudes
from t2ilib.adapters.weights import AdapterLayer, WeightDifference
from t2ilib.config import ConfigError
from t2ilib.models.components import Components
from t2ilib.models.files.original import original_unet_names
from t2ilib.models.files.single_file import IMPLEMENTATION


def write_diffusers(
    layers: Sequence[AdapterLayer], components: Components, file: Path, metadata: Mapping[str, str]
) -> None:
    """One file with the peft config of every component in its metadata, without which alpha is lost."""
    configs = {
        f"{component}.{key}": value
        for component, own in by_component(layers).items()
        for key, value in peft_fields(own).items()
    }
    tensors = {f"{layer.component}.{name}": tensor for layer in layers for name, tensor in peft_tensors(layer).items()}
    write(file, tensors, {**metadata, "format": "pt", "lora_adapter_metadata": json.dumps(configs, sort_keys=True)})


def write_peft(
    layers: Sequence[AdapterLayer], components: Components, folder: Path, metadata: Mapping[str, str]
) -> None:
    """A folder for each component, which `PeftModel.from_pretrained(component, folder)` reads."""
    from peft import LoraConfig

    for component, own in by_component(layers).items():
        config = LoraConfig(**peft_fields(own), base_model_name_or_path=components.path)
        config.inference_mode = True
        (folder / component).mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder / component)
        tensors = {
            f"base_model.model.{name.removeprefix('text_model.') if not in_text_model(components, component) else name}": tensor
            for layer in own
            for name, tensor in peft_tensors(layer).items()
        }
        write(folder / component / "adapter_model.safetensors", tensors, {**metadata, "format": "pt"})


def write_kohya(
    layers: Sequence[AdapterLayer | WeightDifference], components: Components, file: Path, metadata: Mapping[str, str]
) -> None:
    """One file in the layout of kohya's sd-scripts, as A1111 and ComfyUI read it.

    `lora_unet_`, `lora_te_` (SD1.x) or `lora_te1_`, `lora_te2_` (SDXL); `.alpha` is the real alpha of each layer. SDXL's UNet goes
    by its original block names. DoRA's magnitude is `.dora_scale`, (out, 1) or (out, 1, 1, 1), one a row: as LyCORIS takes it, or
    what `dora.for_program` made of it. Raises ConfigError naming the modules that have no name there.
    """
    tensors, late = {}, {}
    names = kohya_names(components)
    lacking = [f"{layer.component}.{layer.module}" for layer in layers if (layer.component, layer.module) not in names]
    if lacking:
        raise ConfigError(
            f"the kohya layout has no name for {', '.join(lacking[:6])}: exclude these layers, or export as diffusers"
        )
    for layer in layers:
        name = names[layer.component, layer.module]
        if isinstance(layer, WeightDifference):
            tensors[f"{name}.diff"] = torch.empty(layer.shape, dtype=layer.dtype, device="meta")
            late[f"{name}.diff"] = layer.compute
            continue
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = layer.down, layer.up
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha)
        if layer.magnitude is not None:
            tensors[f"{name}.dora_scale"] = layer.magnitude.reshape(-1, *[1] * (layer.down.ndim - 1))
    implementation = {"modelspec.implementation": IMPLEMENTATION} if components.family.original_names else {}
    write(file, tensors, {**metadata, **implementation}, late)


def kohya_names(components: Components) -> dict[tuple[str, str], str]:
    """(component, module) -> the name of its tensors in kohya's layout, for every linear and convolution layer."""
    family = components.family
    names = {name: name for name, _ in components.unet.named_modules()}
    unet = original_unet_names(components.unet) if family.original_names else names
    modules = {"unet": unet}
    for component, encoder in components.text_encoders.items():
        modules[component] = {name: with_text_model(name) for name, _ in encoder.named_modules()}
    return {
        (component, module): f"{family.kohya_prefixes[component]}_{name.replace('.', '_')}"
        for component, own in modules.items()
        for module, name in own.items()
    }


KOHYA = re.compile(r"(lora_(?:unet|te\d?)_\w+)\.(.+)")
LEAVES = ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")
OTHERS = {
    r"hada_w": "a LoHa",
    r"lokr_w": "a LoKr",
    r"lora_mid\.": "a LoCon in Tucker form (lora_mid)",
    r"oft_|boft_": "an OFT or BOFT",
    r"\.diff(_b)?$": "full differences of weights (.diff)",
    r"\.(w|b)_norm$": "weights of norms",
    r"\.(a1|a2|b1|b2)\.weight$": "a GLoRA",
    r"\.on_input$": "an (IA)3",
    r"^bundle_emb|^emb_params|string_to_param": "textual inversion embeddings",
}
"""Pattern of a tensor's name -> what it is of; none of them can be attached here."""


def refuse_others(names: Iterable[str], file: Path) -> None:
    """Raises ConfigError, in one line, for tensors that no adapter of t2ilib has: their kinds, how many, and one by name."""
    left = list(names)
    if not left:
        return
    kinds = {
        what: count for pattern, what in OTHERS.items() if (count := sum(bool(re.search(pattern, n)) for n in left))
    }
    told = ", ".join(f"{what} ({count} tensors)" for what, count in kinds.items())
    known = sum(kinds.values())
    rest = (
        f"{len(left) - known} tensors that have no place in this model, such as {next(n for n in left if not any(re.search(p, n) for p in OTHERS))}"
        if known < len(left)
        else ""
    )
    raise ConfigError(
        f"{file} holds {' and '.join(filter(None, [told, rest]))}: t2ilib draws LoRA and DoRA, and leaves nothing out"
    )


def is_kohya(names: Iterable[str]) -> bool:
    return any(KOHYA.fullmatch(name) for name in names)


def read_kohya(
    components: Components, tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]
) -> list[AdapterLayer]:
    """The layers of a kohya file, each with its own alpha (its rank where there is none, as sd-scripts has it) and scale.

    An SDXL's UNet may go by its original block names or by diffusers'. The scale of a DoRA that says for which program it was written
    is made a magnitude again; one that says nothing is LyCORIS's. Raises ConfigError for what is no LoRA or DoRA, what belongs to
    another model, and for a scale along the input axis, as LyCORIS once wrote it.
    """
    if metadata.get(AS) == "diff":
        raise ConfigError(
            f"{file} holds {metadata.get(SAID)}. It is for A1111, ComfyUI and LyCORIS, and t2ilib draws LoRA and DoRA: load the"
            " adapter it was exported from"
        )
    program = metadata.get(FOR, "") if metadata.get(AS) == "dora" else "lycoris"
    if program not in PROGRAMS or not PROGRAMS[program].exact:
        raise ConfigError(
            f"{file} is a DoRA written for {program!r}, which is unknown here: load the adapter it was exported from"
        )
    places = {name: place for place, name in kohya_names(components).items()}
    prefix = components.family.kohya_prefixes["unet"]
    places |= {
        f"{prefix}_{name.replace('.', '_')}": ("unet", name) for name, _ in components.unet.named_modules() if name
    }
    found: dict[str, dict[str, Tensor]] = {}
    left = []
    for name, tensor in tensors.items():
        match = KOHYA.fullmatch(name)
        if match and match[1] in places and match[2] in LEAVES:
            found.setdefault(match[1], {})[match[2]] = tensor
        else:
            left.append(name)
    refuse_others(left, file)
    layers = []
    for name, own in found.items():
        if "lora_down.weight" not in own or "lora_up.weight" not in own:
            raise ConfigError(
                f"{file}: {name} has {', '.join(sorted(own))} and not both lora_down and lora_up: it is not whole"
            )
        down, up = own["lora_down.weight"].float(), own["lora_up.weight"].float()
        alpha = float(own["alpha"]) if "alpha" in own else float(len(down))
        component, module = places[name]
        scale = own.get("dora_scale")
        if scale is not None:
            if scale.shape[0] != len(up):
                raise ConfigError(
                    f"{file}: the DoRA scale of {name} lies along the input axis ({tuple(scale.shape)}), as LyCORIS once wrote it;"
                    " DoRA has one a row of the weight: convert it where it was trained"
                )
            scale = scale.float().reshape(1, -1, 1, 1) if down.ndim == 4 else scale.float().reshape(-1)
        layers.append(AdapterLayer(component, module, down, up, alpha, scale))
    return with_magnitudes(layers, components, program)


def by_component(layers: Sequence[AdapterLayer]) -> dict[str, list[AdapterLayer]]:
    """Component -> its layers, in order."""
    return {
        name: [layer for layer in layers if layer.component == name]
        for name in dict.fromkeys(a.component for a in layers)
    }


def peft_fields(layers: Sequence[AdapterLayer]) -> dict:
    """What a LoraConfig must say about the layers of one component. Names go without `text_model.`, which some versions of
    transformers have and others have not: peft matches by the end of a name."""
    (rank, alpha), _ = Counter((layer.rank, layer.alpha) for layer in layers).most_common(1)[0]
    name = {layer.module: layer.module.removeprefix("text_model.") for layer in layers}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(name.values()),
        "rank_pattern": {name[layer.module]: layer.rank for layer in layers if layer.rank != rank},
        "alpha_pattern": {name[layer.module]: layer.alpha for layer in layers if layer.alpha != alpha},
        "use_dora": layers[0].magnitude is not None,
    }


def peft_tensors(layer: AdapterLayer) -> dict[str, Tensor]:
    """Names as peft and diffusers have them; those of text encoders with `text_model.`, which their loaders take off if need be."""
    name = layer.module if layer.component == "unet" else with_text_model(layer.module)
    tensors = {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
    if layer.magnitude is not None:
        tensors[f"{name}.lora_magnitude_vector"] = layer.magnitude
    return tensors


def with_text_model(name: str) -> str:
    """transformers 5 flattened one of the two CLIP text models; files keep the older name, which every loader knows."""
    return name if name.startswith("text_model.") or not name.startswith("encoder.") else f"text_model.{name}"


def in_text_model(components: Components, component: str) -> bool:
    return component == "unet" or hasattr(components.modules()[component], "text_model")


def read_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says about itself. Raises ConfigError for a file that is none."""
    try:
        with safe_open(file, "pt") as stored:
            return stored.metadata() or {}
    except SafetensorError as error:
        raise ConfigError(f"{file} is not a whole safetensors file: {error}") from None


DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""As safetensors calls them."""


def write(
    file: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    late: Mapping[str, Callable[[], Tensor]] | None = None,
) -> None:
    """A safetensors file whose bytes follow from its content alone, readable as other new files are, and written tensor by tensor.

    `late`: what computes those that `tensors` has on the meta device. The library writes metadata in an order that differs from
    process to process, files that only their owner may read, and from copies of all tensors at once. The format: 8 bytes with the
    length of a JSON header, padded to 8 bytes, then the numbers.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # wide ones first: all lie aligned
    ends = [0, *accumulate(tensors[name].nbytes for name in names)]
    header: dict[str, dict] = {"__metadata__": dict(sorted(metadata.items()))}
    for name, start, end in zip(names, ends, ends[1:], strict=False):
        dtype, shape = DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    draft = file.with_name(f".{file.name}.part")
    try:
        with draft.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                tensor = late[name]() if late and name in late else tensors[name]
                stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy())
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
