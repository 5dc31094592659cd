"""Where a model lies, and whether it is whole: names to folders and files, the Hub's refusals, and a look before loading.

Everything that can be known without reading a weight is checked here and told in one sentence: that a name leads nowhere,
that a folder lacks files, that the weights are pickles, that the Hub wants a licence accepted, that the disk is too small.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from t2ilib.config import ConfigError, ModelConfig, check_choice
from t2ilib.memory import require_disk
from t2ilib.models.families import FAMILIES, Family
from t2ilib.models.files.headers import bytes_in_memory, read_header

WEIGHTS = Path(__file__).parents[1] / "weights"
SHIPPED = {name: WEIGHTS / name for name in ("tiny-sdxl", "tiny-sd15")}

ENDING = ".safetensors"
"""Of a file of weights, in small letters or capitals."""
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
CONFIGS = ("*.json", "*/*.json", "*/*.txt")
"""What a pipeline on the Hub has besides weights: configs, vocabularies."""


def locate(name: str, field: str = "model.base") -> str:
    """The folder, safetensors file or Hub id behind a name; raises ConfigError that says what a name can be."""
    if name in SHIPPED:
        if not (SHIPPED[name] / "model_index.json").exists():
            raise ConfigError(f"the weights of {name} are missing from {SHIPPED[name]}: reinstall t2ilib")
        return str(SHIPPED[name])
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file() or path.suffix.lower() in (ENDING, *PICKLES):
        return str(check_file(path, field))
    if name.count("/") == 1 and not path.is_absolute() and not name.startswith("."):
        return name
    check_choice(name, SHIPPED, f"{field} (no such folder, and not a Hub id like owner/name):")
    raise AssertionError("unreachable")


def check_file(path: Path, field: str) -> Path:
    """`path` if it is a safetensors file; raises ConfigError otherwise, for a pickle with the way to convert it."""
    if not path.is_file():
        raise ConfigError(f"{field} {path}: there is no such file")
    if path.suffix.lower() in PICKLES:
        raise ConfigError(
            f"{field} {path} is a pickle, which can run any code when it is opened. Take the .safetensors of the same model, or"
            f" convert it once, which runs none of it: {conversion(path)}"
        )
    if path.suffix.lower() != ENDING:
        raise ConfigError(
            f"{field} {path}: a single file must be .safetensors, not {path.suffix or 'one without ending'}"
        )
    return path


def in_small_letters(path: Path, scratch: Path) -> Path:
    """A safetensors file under a name that diffusers takes for one: its own, or where that ends in capitals a link in `scratch`."""
    plain = path.with_suffix(ENDING)
    if plain.exists() and plain.samefile(path):  # also where the file system does not tell capitals from small letters
        return plain
    link = scratch / plain.name
    link.symlink_to(path.absolute())
    return link


def conversion(path: Path) -> str:
    """A shell command that writes a pickled checkpoint as safetensors, loading nothing but tensors and plain containers."""
    script = (
        "import torch; from safetensors.torch import save_file; "
        f"d = torch.load({str(path)!r}, map_location='cpu', weights_only=True); d = d.get('state_dict', d); "
        "save_file({k: v.clone().contiguous() for k, v in d.items() if isinstance(v, torch.Tensor)}, "
        f"{str(path.with_suffix(ENDING))!r})"
    )
    return f'python -c "{script}"'


def load_family(path: str, config: ModelConfig, field: str = "model.base") -> Family:
    """The family of a pipeline, from its model_index.json; raises ConfigError naming what the model is instead."""
    folder = Path(path)
    file = folder / "model_index.json"
    if not folder.is_dir():
        file = download(path, "model_index.json", config.revision)
    elif not file.exists():
        raise ConfigError(f"{field} {path}: this folder holds no model_index.json, so it is not a diffusers pipeline")
    try:
        name = json.loads(file.read_text())["_class_name"]
    except (ValueError, KeyError):
        raise ConfigError(f"{field} {path}: model_index.json names no pipeline class, it is damaged") from None
    for family in FAMILIES.values():
        if name == family.pipeline_class:
            return family
    known = ", ".join(family.pipeline_class for family in FAMILIES.values())
    raise ConfigError(f"{field} {path} is a {name}; t2ilib trains {known}")


@contextlib.contextmanager
def hub_refusals(
    repository: str, revision: str | None, field: str, absent: str, instead: str = "give a local folder or tiny-sdxl"
) -> Iterator[None]:
    """Turns what the Hub refuses into ConfigErrors of one sentence.

    `absent`: what a missing file means; `instead`: what can be done without the Hub.
    """
    import httpx
    from huggingface_hub import constants, errors

    try:
        yield
        return
    except errors.GatedRepoError:
        reason = f"is gated: accept its licence on https://huggingface.co/{repository}, then `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = f"has no revision {revision!r}"
    except errors.RepositoryNotFoundError:
        reason = "does not exist on the Hub, or is private (then `hf auth login`)"
    except errors.EntryNotFoundError as error:
        if not isinstance(error, errors.LocalEntryNotFoundError):
            reason = absent
        elif constants.HF_HUB_OFFLINE:
            reason = f"is not in the local cache, and HF_HUB_OFFLINE=1 forbids fetching it: unset that, or {instead}"
        else:
            reason = f"is not in the local cache and the Hub cannot be reached: connect, or {instead}"
    except (OSError, errors.HfHubHTTPError, httpx.HTTPError) as error:
        reason = f"could not be fetched ({type(error).__name__}: {error}): connect, or {instead}"
    raise ConfigError(f"{field} {repository} {reason}")


def download(repository: str, name: str, revision: str | None) -> Path:
    """A file of a Hub repository, from the cache or the network; raises ConfigError with one sentence about what is wrong."""
    import huggingface_hub

    with hub_refusals(repository, revision, "model.base", f"holds no {name}, so it is not a diffusers pipeline"):
        return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision))


def fetch_pipeline(repository: str, config: ModelConfig, family: Family) -> Path:
    """The local folder of a pipeline on the Hub, without the parts that its family leaves out; raises ConfigError, also for a full disk."""
    require_room(
        repository, config.revision, lambda names: pipeline_weights(names, family, config.variant), "model.base"
    )
    with hub_refusals(repository, config.revision, "model.base", "lacks files of its pipeline"):
        return Path(
            family.load_pipeline_class().download(
                repository,
                revision=config.revision,
                variant=config.variant,
                use_safetensors=True,
                **family.left_out,
            )
        )


def fetch_files(
    repository: str,
    patterns: tuple[str, ...],
    field: str,
    instead: str = "give a local folder",
    revision: str | None = None,
) -> Path:
    """A local folder with the files of a Hub repository that match `patterns`."""
    import huggingface_hub

    with hub_refusals(repository, revision, field, f"holds none of {', '.join(patterns)}", instead):
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))


def require_room(repository: str, revision: str | None, wanted: Callable[[list[str]], list[str]], field: str) -> None:
    """Raises ConfigError where the disk of the Hub's cache cannot hold the `wanted` files that are not in it yet."""
    import httpx
    from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        return
    try:
        files = HfApi().model_info(repository, revision=revision, files_metadata=True).siblings or ()
    except (OSError, errors.HfHubHTTPError, httpx.HTTPError):
        return  # the cache may hold all that is needed; fetching tells what is wrong otherwise
    sizes = {file.rfilename: file.size or 0 for file in files}
    cached = {n for n in sizes if isinstance(try_to_load_from_cache(repository, n, revision=revision), str)}
    needed = sum(sizes[name] for name in wanted(list(sizes)) if name not in cached)
    remedy = "free some, or set HF_HOME to a folder on another disk"
    require_disk(Path(constants.HF_HUB_CACHE), needed, f"{field} {repository}: its weights", remedy)


def pipeline_weights(names: list[str], family: Family, variant: str | None) -> list[str]:
    """Of a repository's files the weights that its pipeline is loaded from: the variant's, where a part has it."""
    chosen = []
    for part, stem in weight_stems(family).items():
        shard = r"(-\d{5}-of-\d{5})?"
        infix = rf"\.{re.escape(variant)}" if variant else ""
        plain = rf"{part}/{stem}{shard}\.safetensors"
        special = rf"{part}/{stem}({infix}{shard}|{shard}{infix})\.safetensors"
        found = [[name for name in names if re.fullmatch(pattern, name)] for pattern in (special, plain)]
        chosen += found[0] or found[1]
    return chosen


def weight_stems(family: Family) -> dict[str, str]:
    """Part of a pipeline folder -> what the names of its weight files begin with."""
    modules = dict.fromkeys(("unet", "vae") if family.has_vae else ("unet",), "diffusion_pytorch_model")
    stems = modules | dict.fromkeys(family.text_encoders, "model")
    return {part: stem for part, stem in stems.items() if part not in family.left_out}


def lacking_configs(folder: Path, family: Family) -> list[str]:
    """The configs and tokenizers that a pipeline folder should have and lacks."""
    lacking = [f"{part}/config.json" for part in weight_stems(family) if not (folder / part / "config.json").exists()]
    for name in family.text_encoders:
        tokenizer = name.replace("text_encoder", "tokenizer")
        if not (folder / tokenizer / "tokenizer.json").exists():
            files = ("vocab.json", "merges.txt")
            lacking += [f"{tokenizer}/{file}" for file in files if not (folder / tokenizer / file).exists()]
    if not (folder / "scheduler" / "scheduler_config.json").exists():
        lacking.append("scheduler/scheduler_config.json")
    return lacking


def check_folder(folder: Path, family: Family, config: ModelConfig) -> dict[str, list[Path]]:
    """Part -> its weight files, without the VAE's where `model.vae` replaces it.

    Raises ConfigError naming every file that the folder lacks; for pickled weights, how to convert them.
    """
    files, lacking, pickled, variants = {}, lacking_configs(folder, family), [], set()
    infixes = [f".{config.variant}", ""] if config.variant else [""]
    for part, stem in weight_stems(family).items():
        if part == "vae" and config.vae is not None:
            continue
        whole = [folder / part / f"{stem}{infix}.safetensors" for infix in infixes]
        indices = [folder / part / f"{stem}.safetensors.index{infix}.json" for infix in infixes]
        files[part] = [path for path in whole if path.exists()][:1]
        index = next(filter(Path.exists, indices), None)
        if files[part]:
            continue
        if index is not None:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            files[part] = [folder / part / name for name in names]
            lacking += [f"{part}/{path.name}" for path in files[part] if not path.exists()]
            continue
        lacking.append(f"{part}/{whole[-1].name}")
        pickled += [f"{part}/{path.name}" for path in sorted((folder / part).glob(f"{stem}*.bin"))]
        variants |= {path.name.split(".")[1] for path in (folder / part).glob(f"{stem}.*.safetensors")}
    if not lacking:
        if config.variant and not any(f".{config.variant}" in path.name for paths in files.values() for path in paths):
            raise ConfigError(f"model.base {folder} holds no weights of model.variant {config.variant}: leave that out")
        return files
    hint = ""
    if pickled:
        hint = (
            f". Its weights are pickles ({', '.join(pickled)}), which can run any code when they are opened. If you trust where they"
            " are from, convert them once: load the pipeline in diffusers with use_safetensors=False and call"
            " save_pretrained(folder, safe_serialization=True)"
        )
    elif variants:
        hint = f". It holds the variant {', '.join(sorted(variants))}: set model.variant"
    raise ConfigError(f"model.base {folder} is incomplete, it lacks {', '.join(lacking)}{hint}")


def folder_bytes(files: dict[str, list[Path]], dtype: torch.dtype) -> int:
    """What a folder's weights take in memory: the VAE in float32, the rest in `dtype`. Raises ConfigError for damaged files."""
    return sum(
        bytes_in_memory(
            read_header(path, f"model.base: {path}").values(), (torch.float32 if part == "vae" else dtype).itemsize
        )
        for part, paths in files.items()
        for path in paths
    )
