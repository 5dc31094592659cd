"""Every kind of adapter in every format, read back in another process by the programs the format is for, weight by weight."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from adapting import build_parts, copy_parts, fit, output_of
from safetensors.torch import load_file, save_file

from t2ilib.adapters.attach import AdapterProof, attach_adapters
from t2ilib.adapters.export import (
    FORMATS,
    describe,
    export_adapter,
    save_adapter,
    write_merged,
)
from t2ilib.adapters.formats import kohya_names, write_kohya
from t2ilib.adapters.load import load_adapter, read_metadata
from t2ilib.adapters.weights import AdapterLayer, read_layers
from t2ilib.config import AdapterSpec, ConfigError, EvaluationConfig, ModelConfig
from t2ilib.models.files.layouts import build_layout
from t2ilib.models.load import load_base
from t2ilib.models.pipeline import build_pipeline, save_pipeline
from t2ilib.runfile import build_run

PROMPT = "a large upright red circle at the center on a white background"

KINDS = {
    "lora": {"rank": 4, "alpha": 6.0, "text_encoder_targets": "many"},
    "convolutions": {"rank": 2, "alpha": 3.0, "targets": "many"},
    "mixed": {
        "rank": 4, "alpha": 4.0, "targets": "many", "ranks": {"conv1": 2}, "alphas": {"to_q": 9.0},
        "text_encoder_targets": "attention", "text_encoder_rank": 2,
    },
    "rslora": {"rank": 4, "alpha": 6.0, "rank_stabilized": True, "text_encoder_targets": "attention"},
    "pissa": {"rank": 2, "alpha": 3.0, "init": "pissa"},
    "dora": {"kind": "dora", "rank": 4, "alpha": 6.0, "targets": "many"},
}  # fmt: skip

ALONE = """
import json, sys
import numpy as np, torch
import diffusers, peft
from safetensors.torch import load_file

diffusers.utils.logging.set_verbosity_error()
jobs = json.load(open(sys.argv[1]))
for job in jobs:
    folder = job["path"] if job["format"] == "merged" else job["base"]
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    parts = [name for name in ("unet", "text_encoder", "text_encoder_2") if getattr(pipe, name, None) is not None]
    if job["format"] in ("diffusers", "kohya"):
        pipe.load_lora_weights(job["path"])
    if job["format"] == "peft":
        import os
        for name in parts:
            if os.path.isdir(os.path.join(job["path"], name)):
                model = peft.PeftModel.from_pretrained(getattr(pipe, name), os.path.join(job["path"], name))
                setattr(pipe, name, model.merge_and_unload())
    picture = pipe(job["prompt"], generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images[0]
    np.save(job["out"] + ".npy", picture)
    if job["format"] in ("diffusers", "kohya"):
        pipe.fuse_lora(components=[n for n in parts if getattr(getattr(pipe, n), "peft_config", None)])
        pipe.unload_lora_weights()
    expected, worst = load_file(job["expected"]), {}
    for name in parts:
        for key, weight in getattr(pipe, name).state_dict().items():
            wanted = expected.get(f"{name}.{key}")
            if wanted is not None:
                worst[f"{name}.{key}"] = float((weight - wanted).abs().max())
    json.dump(worst, open(job["out"] + ".json", "w"))
"""


def merged_weights(components, layers):
    """Every weight of the UNet and the text encoders with the adapter in it, by the papers' formulas."""
    weights = {
        f"{c}.{key}": value.clone() for c, m in components.modules().items() for key, value in m.state_dict().items()
    }
    for layer in layers:
        key = f"{layer.component}.{layer.module}.weight"
        base = weights[key].flatten(1)
        moved = base + layer.alpha / layer.rank * layer.up.flatten(1) @ layer.down.flatten(1)
        if layer.magnitude is not None:  # arXiv 2402.09353, equation 5
            moved = layer.magnitude.reshape(-1, 1) * moved / moved.norm(dim=1, keepdim=True)
        weights[key] = moved.view_as(weights[key])
    return weights


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(family, kind, format) -> largest difference of every weight, and both pictures; all of them through one process."""
    root = tmp_path_factory.mktemp("exports")
    jobs, ours = {}, {}
    for family in ("sdxl", "sd15"):
        base = root / family
        fresh = build_parts(family)
        save_pipeline(fresh, base)
        for kind, fields in KINDS.items():
            spec = AdapterSpec(**fields)
            components = copy_parts(fresh)
            components.path = str(base)
            attach_adapters(components, spec, 0)
            proof = AdapterProof(components, spec)
            fit(components, proof, 3, trains_text=spec.text_encoder_targets is not None)
            start = proof.start if spec.init == "pissa" else None
            layers = read_layers(components, start)
            file = save_adapter(components, root / f"{family}-{kind}" / "adapter", start)
            expected = root / f"{family}-{kind}.safetensors"
            save_file({k: v.contiguous() for k, v in merged_weights(fresh, layers).items()}, expected)
            ours[family, kind] = components
            for format in FORMATS:
                if (family, kind, format) in WRONG_IN_DIFFUSERS:
                    continue
                target = root / f"{family}-{kind}-{format}"
                target = target.with_suffix(".safetensors") if format in ("diffusers", "kohya") else target
                export_adapter(file, target, format, ModelConfig(base=str(base)))
                jobs[family, kind, format] = {
                    "path": str(target), "base": str(base), "format": format, "expected": str(expected), "prompt": PROMPT,
                    "out": str(root / f"out-{family}-{kind}-{format}"),
                }  # fmt: skip
    (root / "jobs.json").write_text(json.dumps(list(jobs.values())))
    subprocess.run([sys.executable, "-c", ALONE, str(root / "jobs.json")], check=True)
    return jobs, ours


WRONG_IN_DIFFUSERS = {(family, kind, "kohya") for family in ("sdxl", "sd15") for kind in ("mixed", "dora")}
"""diffusers 0.42 takes one alpha for all layers of a kohya file with several, and a DoRA's scale for another shape."""

CASES = [(f, k, form) for f in ("sdxl", "sd15") for k in KINDS for form in FORMATS]
READ = [case for case in CASES if case not in WRONG_IN_DIFFUSERS]


@pytest.mark.parametrize(("family", "kind", "format"), READ, ids=["-".join(case) for case in READ])
def test_another_program_gets_the_same_weights(exported, family, kind, format):
    job = exported[0][family, kind, format]
    differences = json.loads(Path(job["out"] + ".json").read_text())
    parts = {name.split(".")[0] for name in differences}
    assert parts == {"unet", *exported[1][family, kind].text_encoders}
    wrong = {name: round(d, 5) for name, d in differences.items() if d > 1e-5}
    assert not wrong, f"{len(wrong)} of {len(differences)}: {dict(list(wrong.items())[:4])}"


@pytest.mark.parametrize(("family", "kind"), [(f, k) for f in ("sdxl", "sd15") for k in KINDS])
def test_a_kohya_file_comes_back_whole(exported, tmp_path, family, kind):
    """Mixed alphas, DoRA's scales and text encoders included, which diffusers' own converter loses: the output as it was trained."""
    trained, file = exported[1][family, kind], tmp_path / "kohya.safetensors"
    fresh = build_parts(family)
    fresh.tokenizers = trained.tokenizers
    write_kohya(layers_of(trained, kind), fresh, file, {})
    load_adapter(fresh, file)
    assert torch.allclose(output_of(fresh), output_of(trained), atol=1e-5)


def test_block_names_of_diffusers_are_read_in_kohya_files_too(tmp_path):
    """As some trainers write SDXL's UNet; without an alpha it is the rank."""
    components, module = build_parts("sdxl"), "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = components.unet.get_submodule(module).in_features
    name = "lora_unet_" + module.replace(".", "_")
    save_file(
        {f"{name}.lora_down.weight": torch.ones(2, width), f"{name}.lora_up.weight": torch.ones(width, 2)},
        tmp_path / "a.safetensors",
    )
    load_adapter(components, tmp_path / "a.safetensors")
    (layer,) = read_layers(components)
    assert (layer.component, layer.module, layer.alpha, layer.rank) == ("unet", module, 2.0, 2)


@pytest.fixture(scope="module")
def bare():
    return build_parts("sdxl")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"lora_unet_x.hada_w1_a": 1, "lora_unet_x.hada_w1_b": 1},
            r"holds a LoHa \(2 tensors\): t2ilib draws LoRA and DoRA",
        ),
        ({"lora_unet_x.lokr_w1": 1}, r"holds a LoKr \(1 tensors\)"),
        ({"lora_unet_x.diff": 1, "lora_unet_x.diff_b": 1}, r"full differences of weights \(.diff\) \(2 tensors\)"),
        ({"lora_unet_x.w_norm": 1}, r"weights of norms"),
        ({"bundle_emb.word.string_to_param.*": 1}, r"textual inversion embeddings"),
        (
            {"lora_unet_of_another_model.lora_down.weight": 1},
            r"1 tensors that have no place in this model, such as lora_unet_of",
        ),
        ({"something": 1}, r"no place in this model, such as something"),
    ],
)
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_what_cannot_be_attached_is_named_in_one_line(exported, bare, tmp_path, layout, extra, message):
    """Beside a LoRA that could be: nothing of a file is left out silently."""
    job = exported[0]["sdxl", "lora", layout]
    tensors = load_file(job["path"]) | {name: torch.ones(1) for name in extra}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=message) as error:
        load_adapter(bare, tmp_path / "x.safetensors")
    assert not getattr(bare.unet, "peft_config", None)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


def test_pickles_and_scales_along_the_input_are_refused(exported, tmp_path):
    (tmp_path / "old.pt").write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"old.pt is a pickle"):
        load_adapter(build_parts("sdxl"), tmp_path / "old.pt")
    module = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
    components = build_parts("sdxl")
    layer = components.unet.get_submodule(module)
    name = "lora_unet_" + module.replace(".", "_")
    tensors = {
        f"{name}.lora_down.weight": torch.ones(2, layer.in_features),
        f"{name}.lora_up.weight": torch.ones(layer.out_features, 2),
        f"{name}.dora_scale": torch.ones(1, layer.in_features),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="lies along the input axis"):
        load_adapter(components, tmp_path / "a.safetensors")


@pytest.mark.parametrize(("family", "kind"), [(f, k) for f in ("sdxl", "sd15") for k in KINDS])
def test_the_same_picture_everywhere(exported, family, kind):
    """Drawn here with the adapter as it was trained, and there from each format."""
    jobs, ours = exported
    settings = EvaluationConfig(num_inference_steps=2, guidance_scale=5.0 if family == "sdxl" else 7.5)
    pipeline = build_pipeline(ours[family, kind])
    options = {"num_inference_steps": 2, "guidance_scale": settings.guidance_scale, "output_type": "np"}
    expected = pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **options).images[0]
    plain = build_pipeline(build_parts(family))
    base = plain(PROMPT, generator=torch.Generator().manual_seed(0), **options).images[0]
    assert np.abs(expected - base).max() > 0.02
    for format in FORMATS:
        if (family, kind, format) in jobs:
            drawn = np.load(jobs[family, kind, format]["out"] + ".npy")
            assert np.abs(drawn - expected).max() < 2e-3, format


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
@pytest.mark.parametrize("kind", KINDS)
def test_kohya_by_its_own_rules(exported, tmp_path, family, kind):
    """The layout as sd-scripts and ComfyUI read it: down, up, alpha / rank of each layer, dora_scale one a row of the weight."""
    components = exported[1][family, kind]
    file, base = tmp_path / "adapter.safetensors", copy_parts(build_parts(family))
    expected = merged_weights(base, layers_of(components, kind))
    write_kohya(layers_of(components, kind), components, file, {})
    tensors, names = load_file(file), kohya_names(base)
    changed = {name.split(".")[0] for name in tensors}
    assert {name.split("_", 2)[1] for name in changed} <= (
        {"unet", "te1", "te2"} if family == "sdxl" else {"unet", "te"}
    )
    for (component, module), name in names.items():
        if name not in changed:
            continue
        down, up, alpha = (tensors.pop(f"{name}.{part}") for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        weight = base.modules()[component].get_submodule(module).weight
        moved = weight + (up.flatten(1) @ down.flatten(1)).view_as(weight) * (alpha.item() / len(down))
        scale = tensors.pop(f"{name}.dora_scale", None)
        if scale is not None:
            assert scale.shape == (len(weight), *[1] * (weight.ndim - 1))
            norm = moved.reshape(len(moved), -1).norm(dim=1).reshape(scale.shape)
            moved = moved * (scale / norm)
        torch.testing.assert_close(moved, expected[f"{component}.{module}.weight"], rtol=1e-5, atol=1e-6)
    assert not tensors  # nothing in the file without a layer


def layers_of(components, kind):
    if kind != "pissa":
        return read_layers(components)
    twin = copy_parts(build_parts(components.family.name))
    attach_adapters(twin, AdapterSpec(**KINDS[kind]), 0)
    return read_layers(components, AdapterProof(twin, AdapterSpec(**KINDS[kind])).start)


def test_kohya_names_of_sdxl():
    """Block names of the original code, as sd-scripts writes them for SDXL (its own layout has fewer levels than this one)."""
    unet = build_layout("sdxl")
    names = kohya_names(unet)
    assert names["unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"] == (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    )
    assert names["unet", "mid_block.attentions.0.proj_in"] == "lora_unet_middle_block_1_proj_in"
    assert names["unet", "up_blocks.0.upsamplers.0.conv"] == "lora_unet_output_blocks_2_2_conv"
    assert names["unet", "up_blocks.2.resnets.2.conv2"] == "lora_unet_output_blocks_8_0_out_layers_3"
    first = next(name for (part, _), name in names.items() if part == "text_encoder" and name.endswith("q_proj"))
    assert first == "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    second = next(name for (part, _), name in names.items() if part == "text_encoder_2" and name.endswith("fc1"))
    assert second == "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    sd15 = kohya_names(build_layout("sd15"))
    assert sd15["unet", "down_blocks.0.attentions.0.proj_in"] == "lora_unet_down_blocks_0_attentions_0_proj_in"
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in sd15.values()
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_magnitudes_of_text_encoders_come_back_with_our_loader(make, tmp_path, family):
    components = make(family)
    spec = AdapterSpec(kind="dora", rank=2, text_encoder_targets="attention")
    attach_adapters(components, spec, 0)
    fit(components, trains_text=True)
    save_adapter(components, tmp_path)
    other = make(family)
    load_adapter(other, tmp_path)
    for mine, theirs in zip(read_layers(components), read_layers(other), strict=True):
        assert (mine.component, mine.module, mine.alpha) == (theirs.component, theirs.module, theirs.alpha)
        assert torch.equal(mine.magnitude, theirs.magnitude)
    assert torch.allclose(output_of(other), output_of(components), atol=1e-5)


def test_files_say_what_they_are(make, tmp_path):
    components = make()
    values = {
        "name": "hearts",
        "adapter": {"rank": 4, "alpha": 6.0, "trigger_words": ["sks", "heart"]},
        "training": {"steps": 7},
    }
    run = build_run(values | {"model": {"quantization": "nf4"}})
    attach_adapters(components, run.adapter, 0)
    told = describe(run, components, "abc", read_layers(components))
    file = save_adapter(components, tmp_path / "run" / "adapter", None, told)
    metadata = read_metadata(file)
    expected = {
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "modelspec.title": "hearts", "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "v", "modelspec.trigger_phrase": "sks, heart", "ss_network_dim": "4", "ss_network_alpha": "6",
        "ss_steps": "7", "ss_base_model_version": "sdxl_base_v1-0", "t2ilib.data_digest": "abc", "t2ilib.quantization": "nf4",
    }  # fmt: skip
    assert expected.items() <= metadata.items()
    save_pipeline(make(), tmp_path / "base")
    base = ModelConfig(base=str(tmp_path / "base"))
    kohya = export_adapter(file, tmp_path / "kohya.safetensors", "kohya", base)
    told = read_metadata(kohya)
    assert expected.items() <= told.items()
    assert told["modelspec.implementation"].endswith("generative-models")  # whose block names the file has
    assert metadata["modelspec.implementation"] == "diffusers"
    merged = export_adapter(file, tmp_path / "merged", "merged", base, "bfloat16")
    readme = (merged / "README.md").read_text()
    assert "in torch.bfloat16" in readme
    assert "trained over that base in nf4" in readme
    assert (merged / "unet" / "diffusion_pytorch_model.safetensors").exists()


def test_what_cannot_be_exported(make, tmp_path):
    components = make()
    attach_adapters(components, AdapterSpec(rank=2), 0)
    file = save_adapter(components, tmp_path / "adapter")
    for arguments, told in (
        ((file, tmp_path / "x", "diffusers"), "diffusers is one file: name it .*x.safetensors"),
        (
            (file, tmp_path / "x", "lycoris"),
            "--format 'lycoris' does not exist; choose from diffusers, peft, kohya, merged",
        ),
        ((file, tmp_path / "x", "peft"), "nothing says which base it goes with: give --model"),
        ((file, file, "kohya"), "exists already"),
        ((tmp_path / "none", tmp_path / "x", "peft"), "no adapter at"),
    ):
        with pytest.raises(ConfigError, match=told):
            export_adapter(*arguments)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ConfigError, match="is not a whole safetensors file"):
        load_adapter(make(), broken)
    foreign = [AdapterLayer("unet", "a.layer.of.another", torch.zeros(2, 4), torch.zeros(4, 2), 1.0)]
    with pytest.raises(ConfigError, match=r"the kohya layout has no name for unet\.a\.layer\.of\.another"):
        write_kohya(foreign, make(), tmp_path / "x.safetensors", {})
    quantized = load_base(ModelConfig(quantization="nf4"))
    with pytest.raises(ConfigError, match="give the base in full precision"):
        write_merged([], quantized, tmp_path / "x", {})


WRITE = """
import sys
from pathlib import Path
import torch
from t2ilib.adapters.formats import write
metadata = {f"key{i}": str(i) for i in range(40)}
write(Path(sys.argv[1]), {"b": torch.ones(3), "a": torch.zeros(5, dtype=torch.float16)}, metadata)
"""


def test_equal_adapters_are_equal_files_that_others_may_read(tmp_path):
    """In two processes, whose hash tables order metadata differently; and what is written is what safetensors reads."""
    import os

    from safetensors import safe_open

    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for file in files:
        subprocess.run([sys.executable, "-c", WRITE, str(file)], check=True)
    assert files[0].read_bytes() == files[1].read_bytes()
    mask = os.umask(0o022)
    os.umask(mask)
    assert files[0].stat().st_mode & 0o777 == 0o666 & ~mask
    read = load_file(files[0])
    assert torch.equal(read["b"], torch.ones(3))
    assert read["a"].dtype == torch.float16
    with safe_open(files[0], "pt") as stored:
        assert stored.metadata() == {f"key{i}": str(i) for i in range(40)}
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["one.safetensors", "two.safetensors"]
