"""DoRA for other programs: the file of each, under a plain re-statement of its own arithmetic, gives the weights that peft merges.

The re-statements are functions of a weight W, (out, in) or (out, in, kh, kw), and of the tensors that a file has for its layer, by
the end of their names. Whether the names are found is test_export's matter. All in float32: a program that computes in 16 bits
has their precision.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapting import build_parts, copy_parts, output_of
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from t2ilib import memory
from t2ilib.adapters.attach import attach_adapters
from t2ilib.adapters.dora import PROGRAMS, for_program, with_scales
from t2ilib.adapters.export import export_adapter, save_adapter
from t2ilib.adapters.formats import kohya_names, write_kohya
from t2ilib.adapters.load import load_adapter, read_metadata
from t2ilib.adapters.weights import AdapterLayer, base_weight, read_layers
from t2ilib.cli import app
from t2ilib.config import AdapterSpec, ConfigError, ModelConfig
from t2ilib.models.load import load_base
from t2ilib.models.pipeline import save_pipeline

EPS = 2.0**-23
EVERYTHING = {
    "rank": 4, "alpha": 6.0, "targets": "many", "ranks": {"conv1": 2}, "alphas": {"to_q": 9.0}, "text_encoder_targets": "many",
}  # fmt: skip
SPECS = {"sdxl": EVERYTHING, "sd15": EVERYTHING, "small": {"rank": 4, "alpha": 6.0, "rank_stabilized": True}}
"""Adapters by name: convolutions and linear layers of UNet and text encoders, mixed ranks and alphas; SD1.5's attention alone."""


def product(own):
    return (own["lora_up.weight"].flatten(1) @ own["lora_down.weight"].flatten(1)).view(-1)


def comfyui(weight, own, strength=1.0):
    """comfy/lora.py, comfy/weight_adapter/lora.py and base.py (weight_decompose), read at a125cd8 of 2025-10-12; the pull request
    that would change the norm was open in 2026-08. Forge does the same: backend/patcher/lora.py, read at dfdcbab of 2025-06-26."""
    if "diff" in own:
        return weight + strength * own["diff"].to(weight.dtype)
    update = own["alpha"].item() / len(own["lora_down.weight"]) * product(own).view_as(weight)
    if "dora_scale" not in own:
        return weight + strength * update
    scale, moved = own["dora_scale"], weight + update
    if scale.shape[0] == weight.shape[0]:
        norm = weight.reshape(len(weight), -1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    else:
        norm = column_norms(moved)
    moved = moved * (scale / (norm + EPS))
    return weight + strength * (moved - weight)


def comfyui_15458(weight, own, strength=1.0):
    """The same where the pull request of 2026-08-10 is in: rows are divided by the norms of the merged weight."""
    moved = weight + own["alpha"].item() / len(own["lora_down.weight"]) * product(own).view_as(weight)
    norm = moved.reshape(len(weight), -1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    return weight + strength * (moved * (own["dora_scale"] / (norm + EPS)) - weight)


def lycoris(weight, own, multiplier=1.0):
    """lycoris/modules/locon.py (get_merged_weight, apply_weight_decompose, wd_on_out) and full.py, read at f49d30d of 2025-10-04."""
    if "diff" in own:
        return weight + multiplier * own["diff"].to(weight.dtype)
    moved = weight + own["alpha"].item() / len(own["lora_down.weight"]) * product(own).view_as(weight)
    if "dora_scale" not in own:
        return weight + multiplier * (moved - weight)
    norm = moved.reshape(len(weight), -1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1)) + EPS
    return moved * (multiplier * (own["dora_scale"] / norm - 1) + 1)


def a1111(weight, own, multiplier=1.0):
    """extensions-builtin/Lora of 1.10 (2024-07, with its pull request 16151): network.py (finalize_updown, apply_weight_decompose),
    network_lora.py, network_full.py; read 2026-11 in the copy that Forge at dfdcbab has of network.py."""
    if "diff" in own:  # neither an alpha nor a rank: its scale is 1
        return weight + multiplier * own["diff"].view_as(weight).to(weight.dtype)
    update = product(own).view_as(weight) * (own["alpha"].item() / len(own["lora_down.weight"]))
    if "dora_scale" in own:
        moved = update + weight
        update = moved * (own["dora_scale"] / column_norms(moved)) - weight
    return weight + multiplier * update


def column_norms(weight):
    """(1, in) or (1, in, 1, 1): of each input, over outputs and kernel."""
    norms = weight.transpose(0, 1).reshape(weight.shape[1], -1).norm(dim=1)
    return norms.reshape(1, -1, *[1] * (weight.ndim - 2))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Name -> a random DoRA as trained ones are (B is not 0, magnitudes are not |W|), its file, and what peft merges."""
    root, made = tmp_path_factory.mktemp("dora"), {}
    for name, fields in SPECS.items():
        bare = build_parts("sdxl" if name == "sdxl" else "sd15")
        if name != "small":
            save_pipeline(bare, root / bare.family.name)
        components = copy_parts(bare)
        attach_adapters(components, AdapterSpec(kind="dora", **fields), 0)
        disturb(components)
        file = save_adapter(components, root / f"{name}-adapter", None, {"modelspec.architecture": "some-model/dora"})
        output, layers = output_of(components), read_layers(components)
        made[name] = SimpleNamespace(
            file=file, base=ModelConfig(base=str(root / bare.family.name)), bare=bare, layers=layers, output=output,
            merged={(a.component, a.module): merge(components, a) for a in layers},
        )  # fmt: skip
    return made


def disturb(components):
    generator = torch.Generator().manual_seed(3)
    for module in components.modules().values():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_B" in name:
                parameter.data = 0.1 * noise
            if "magnitude" in name:
                parameter.data *= 1 + 0.2 * noise


def merge(components, layer):
    wrapped = components.modules()[layer.component].get_submodule(layer.module)
    wrapped.merge(safe_merge=True)
    return wrapped.base_layer.weight.detach().clone()


def by_layer(file, components):
    """(component, module) -> its tensors in a kohya file, by the end of their names."""
    tensors, places = load_file(file), {name: place for place, name in kohya_names(components).items()}
    found = {}
    for name, tensor in tensors.items():
        layer, _, part = name.partition(".")
        found.setdefault(places[layer], {})[part] = tensor
    return found


def errors(adapter, file, arithmetic):
    """The largest difference of each layer's weights, as a program computes them from a file, to those that peft merges."""
    found = by_layer(file, adapter.bare)
    assert set(found) == set(adapter.merged)
    weights = {place: base_weight(adapter.bare, *place) for place in found}
    return [float((arithmetic(weights[p], own) - adapter.merged[p]).abs().max()) for p, own in found.items()]


def exported(adapter, folder, **options):
    name = "-".join(str(value) for value in options.values())
    return export_adapter(adapter.file, folder / f"{name}.safetensors", "kohya", adapter.base, **options)


CASES = {
    "comfyui": ({"program": "comfyui"}, comfyui),
    "lycoris": ({"program": "lycoris"}, lycoris),
    "comfyui with 15458": ({"program": "lycoris"}, comfyui_15458),
    "a1111 diff": ({"program": "a1111", "form": "diff"}, a1111),
    "comfyui diff": ({"program": "comfyui", "form": "diff"}, comfyui),
    "lycoris diff": ({"form": "diff"}, lycoris),
}


@pytest.mark.parametrize("name", SPECS)
def test_every_program_computes_our_weights(adapters, tmp_path, name):
    adapter = adapters[name]
    files = {}
    for case, (options, arithmetic) in CASES.items():
        key = tuple(options.values())
        files[key] = files.get(key) or exported(adapter, tmp_path, **options)
        assert max(errors(adapter, files[key], arithmetic)) < 1e-5, case


def test_a_file_for_one_program_is_wrong_in_another(adapters, tmp_path):
    """In every layer: which is why it must be said for whom a file is, and why A1111 gets no scale at all."""
    adapter = adapters["sdxl"]
    for_comfyui, for_lycoris = (exported(adapter, tmp_path, program=name) for name in ("comfyui", "lycoris"))
    for file, arithmetic in (
        (for_lycoris, comfyui), (for_comfyui, lycoris), (for_comfyui, comfyui_15458), (for_comfyui, a1111), (for_lycoris, a1111),
    ):  # fmt: skip
        assert min(errors(adapter, file, arithmetic)) > 2e-3


def test_at_less_than_full_strength_comfyui_goes_part_of_the_way(adapters, tmp_path):
    adapter = adapters["sdxl"]
    for place, own in by_layer(exported(adapter, tmp_path, program="comfyui"), adapter.bare).items():
        weight, whole = base_weight(adapter.bare, *place), adapter.merged[place]
        torch.testing.assert_close(comfyui(weight, own, 0.4), weight + 0.4 * (whole - weight), rtol=0, atol=1e-5)


def test_rows_of_zeros(tmp_path):
    """In the base they are given a direction by B A; in W + B A they have none, and no DoRA."""
    bare = build_parts("sdxl")
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = bare.unet.get_submodule(module).weight
    weight.data[0] = 0
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, weight.shape[1]), (len(weight), 2)))
    layer = AdapterLayer("unet", module, down, up, 2.0, torch.full((len(weight),), 0.7))
    (own,) = with_scales([layer], bare, "comfyui")
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    moved = weight + up @ down
    wanted = 0.7 * moved / moved.norm(dim=1, keepdim=True)
    got = comfyui(weight, tensors | {"dora_scale": own.magnitude.view(-1, 1)})
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    up[0] = 0
    with pytest.raises(ConfigError, match=rf"unet\.{module} has a row of zeros"):
        with_scales([layer], bare, "comfyui")
    written, _ = for_program([layer], bare, tmp_path / "x.safetensors", "a1111", "diff")
    with pytest.raises(ConfigError, match="has a row of zeros"):
        write_kohya(written, bare, tmp_path / "x.safetensors", {})
    assert not list(tmp_path.iterdir())


def test_a1111_needs_another_form_and_is_told_what_each_costs(adapters, tmp_path):
    adapter = adapters["sdxl"]
    with pytest.raises(ConfigError, match="no scale of rows or columns gives") as error:
        exported(adapter, tmp_path, program="a1111")
    assert not list(tmp_path.iterdir())
    sizes = re.search(
        r"--as diff \(exact, ([\d.]+) MiB\) or --as lora .* ([\d.]+) MiB at the DoRA's own rank 4", str(error.value)
    )
    files = [exported(adapter, tmp_path, form="diff"), exported(adapter, tmp_path, form="lora", rank=4)]
    for said, file in zip(sizes.groups(), files, strict=True):
        numbers = sum(t.nbytes for name, t in load_file(file).items() if not name.endswith("alpha"))
        assert said == f"{numbers / 2**20:.1f}"


@pytest.mark.parametrize("arithmetic", [comfyui, lycoris, a1111])
def test_the_nearest_lora_and_how_near_it_is(adapters, tmp_path, arithmetic):
    """As far from W' - W as the singular values after the rank-th are large, in every program, as the file's metadata says."""
    adapter = adapters["sdxl"]
    file = exported(adapter, tmp_path, form="lora", rank=5)
    told = read_metadata(file)
    said, missed, wanted = json.loads(told["t2ilib.dora_errors"]), 0.0, 0.0
    assert list(said.values()) == sorted(said.values(), reverse=True)
    for place, own in by_layer(file, adapter.bare).items():
        weight, whole = base_weight(adapter.bare, *place), adapter.merged[place]
        assert len(own["lora_down.weight"]) == 5
        lost = float((arithmetic(weight, own) - whole).norm())
        tail = torch.linalg.svdvals((whole - weight).flatten(1).double())[5:].norm()
        assert lost == pytest.approx(float(tail), rel=1e-3)
        assert said[".".join(place)] == pytest.approx(lost / float((whole - weight).norm()), abs=2e-4)
        missed, wanted = missed + lost**2, wanted + float((whole - weight).square().sum())
    assert 0.1 < float(told["t2ilib.dora_error"]) == pytest.approx((missed / wanted) ** 0.5, abs=2e-4)
    assert told["modelspec.architecture"] == "some-model/lora"
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("5", "5")


def test_a_lora_of_full_rank_is_exact(adapters, tmp_path):
    adapter = adapters["small"]
    file = exported(adapter, tmp_path, form="lora", rank=10_000)
    assert max(errors(adapter, file, a1111)) < 1e-4
    assert read_metadata(file)["t2ilib.dora_error"] == "0.0000"


@pytest.mark.parametrize(("program", "name"), [("comfyui", "sdxl"), ("lycoris", "small")])
def test_a_file_for_a_program_comes_back(adapters, tmp_path, program, name):
    """With the magnitudes it was made from; and what is written again says nothing of the program."""
    adapter = adapters[name]
    file = exported(adapter, tmp_path, program=program)
    assert read_metadata(file)["t2ilib.dora_for"] == program
    assert read_metadata(file)["t2ilib.dora"] == PROGRAMS[program].told
    components = copy_parts(adapter.bare)
    load_adapter(components, file)
    for mine, theirs in zip(adapter.layers, read_layers(components), strict=True):
        assert (mine.component, mine.module) == (theirs.component, theirs.module)
        torch.testing.assert_close(theirs.magnitude, mine.magnitude, rtol=1e-5, atol=1e-6)
    assert torch.allclose(output_of(components), adapter.output, atol=1e-4)
    again = export_adapter(file, tmp_path / "again.safetensors", "diffusers", adapter.base)
    assert not any("dora" in key for key in read_metadata(again) if key != "lora_adapter_metadata")
    for name, tensor in load_file(adapter.file).items():
        torch.testing.assert_close(load_file(again)[name], tensor, rtol=1e-5, atol=1e-6)


def test_over_a_quantized_base_the_magnitudes_are_the_same(adapters, tmp_path):
    """They are undone over the full base: over what NF4 leaves of it the scale would mean another length."""
    adapter = adapters["small"]
    components = load_base(ModelConfig(base=adapter.base.base, quantization="nf4"))
    load_adapter(components, exported(adapter, tmp_path, program="comfyui"))
    for mine, theirs in zip(adapter.layers, read_layers(components), strict=True):
        torch.testing.assert_close(theirs.magnitude, mine.magnitude, rtol=1e-5, atol=1e-6)


def test_what_stands_in_a_doras_place(adapters, tmp_path):
    adapter = adapters["small"]
    diff = exported(adapter, tmp_path, program="a1111", form="diff")
    told = read_metadata(diff)
    assert (told["t2ilib.dora_for"], told["t2ilib.dora_as"]) == ("a1111", "diff")
    assert told["modelspec.architecture"] == "some-model/lora"
    assert not any(key.startswith("ss_network") for key in told)
    with pytest.raises(ConfigError, match=r"\.diff.* It is for A1111, ComfyUI and LyCORIS.* load the adapter it was"):
        load_adapter(copy_parts(adapter.bare), diff)
    near = copy_parts(adapter.bare)
    load_adapter(near, exported(adapter, tmp_path, form="lora", rank=64))
    assert all(layer.magnitude is None for layer in read_layers(near))
    layers = adapter.layers
    write_kohya(layers, adapter.bare, tmp_path / "x.safetensors", {"t2ilib.dora_for": "next", "t2ilib.dora_as": "dora"})
    with pytest.raises(ConfigError, match="a DoRA written for 'next', which is unknown here"):
        load_adapter(copy_parts(adapter.bare), tmp_path / "x.safetensors")


def test_over_a_base_in_16_bits(adapters, tmp_path):
    """Differences take half the room, and are still near enough."""
    adapter = adapters["small"]
    file = export_adapter(adapter.file, tmp_path / "x.safetensors", "kohya", adapter.base, "float16", form="diff")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    assert max(errors(adapter, file, a1111)) < 1e-3 * max(float(whole.abs().max()) for whole in adapter.merged.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"is a DoRA, which .* say which by --for comfyui \(ComfyUI and Forge, exact\), --for lycoris"),
        ({"program": "forge"}, "--for 'forge' does not exist; choose from comfyui, lycoris, a1111"),
        ({"form": "loha"}, "--as 'loha' does not exist; choose from diff, lora"),
        ({"form": "lora"}, "--as lora needs --rank"),
        ({"rank": 4}, "--rank 4 is of a LoRA that approximates a DoRA: give --as lora too"),
        ({"form": "lora", "rank": 0}, "--rank 0: give 1 or more"),
        ({"format": "diffusers", "program": "comfyui"}, "--for is about --format kohya, and the format is diffusers"),
        ({"format": "merged", "form": "lora", "rank": 4}, "--as, --rank is about --format kohya"),
    ],
)
def test_options_that_do_not_go_together(adapters, tmp_path, options, message):
    adapter = adapters["small"]
    options = {"format": "kohya"} | options
    with pytest.raises(ConfigError, match=message):
        export_adapter(adapter.file, tmp_path / "x.safetensors", model=adapter.base, **options)
    assert not list(tmp_path.iterdir())


def test_differences_that_the_disk_cannot_hold(adapters, tmp_path, monkeypatch):
    adapter = adapters["small"]
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(
        ConfigError, match=r"the differences of diff\.safetensors need .* MiB under .* write to another"
    ):
        exported(adapter, tmp_path, form="diff")
    assert not list(tmp_path.iterdir())


def test_a_lora_is_the_same_for_all(adapters, tmp_path):
    base = adapters["small"].base
    components = copy_parts(adapters["small"].bare)
    attach_adapters(components, AdapterSpec(rank=2, targets="many"), 0)
    disturb(components)
    file = save_adapter(components, tmp_path / "lora")
    files = [
        export_adapter(file, tmp_path / f"{name}.safetensors", "kohya", base, program=name)
        for name in (None, *PROGRAMS)
    ]
    assert len({file.read_bytes() for file in files}) == 1
    with pytest.raises(ConfigError, match="is no DoRA, and every program reads a LoRA as it is: leave --as out"):
        export_adapter(file, tmp_path / "x.safetensors", "kohya", base, form="diff")


def test_layers_without_a_magnitude_stay_as_they_are(adapters, tmp_path):
    """A DoRA on the UNet beside a LoRA on the text encoder, as diffusers' layout can hold them."""
    adapter = adapters["sd15"]
    tensors = {k: v for k, v in load_file(adapter.file).items() if k.startswith("unet.") or "magnitude" not in k}
    metadata = read_metadata(adapter.file)
    metadata["lora_adapter_metadata"] = metadata["lora_adapter_metadata"].replace('"text_encoder.use_dora": true', '"text_encoder.use_dora": false')  # fmt: skip
    save_file(tensors, tmp_path / "mixed.safetensors", metadata)
    for form in ({"program": "comfyui"}, {"form": "diff"}, {"form": "lora", "rank": 2}):
        name = tmp_path / f"{next(iter(form.values()))}.safetensors"
        export_adapter(tmp_path / "mixed.safetensors", name, "kohya", adapter.base, **form)
        for (component, module), own in by_layer(name, adapter.bare).items():
            layer = next(a for a in adapter.layers if (a.component, a.module) == (component, module))
            if component == "text_encoder":
                assert set(own) == {"lora_up.weight", "lora_down.weight", "alpha"}
                assert torch.equal(own["lora_up.weight"], layer.up)


def test_the_command_says_what_it_wrote(adapters, tmp_path):
    adapter = adapters["small"]
    words = ["export", str(adapter.file), "x.safetensors", "--format", "kohya", "--model", adapter.base.base]

    def run(*more):
        words[2] = str(tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors")
        return CliRunner().invoke(app, [*words, *more])

    bare = run()
    assert bare.exit_code == 2
    assert "say which by --for comfyui" in bare.output
    comfy = run("--for", "comfyui")
    assert comfy.exit_code == 0, comfy.output
    assert "Forge and ComfyUI without its pull request 15458" in comfy.output
    diff = run("--for", "a1111", "--as", "diff")
    assert f"{Path(words[2]).stat().st_size / 2**20:,.1f} MiB" in diff.output
    near = run("--as", "lora", "--rank", "3")
    rows = re.findall(r"(unet\.\S+)  (0\.\d{4})\n", near.output)
    assert len(rows) == len(adapter.layers)
    assert [e for _, e in rows] == sorted((e for _, e in rows), reverse=True)
    assert re.search(r"relative error of all layers together: 0\.\d{4}\n", near.output)
