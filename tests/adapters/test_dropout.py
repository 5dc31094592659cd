import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from t2ilib.adapters.attach import attach_adapters
from t2ilib.adapters.dropout import DROPOUTS, channels_mask
from t2ilib.config import AdapterSpec

SHARE = 0.3


def adapted_layer(kind, base):
    torch.manual_seed(0)
    net = nn.Sequential(base).requires_grad_(False)
    config = {"r": 4, "lora_alpha": 6.0, "target_modules": ["0"], "init_lora_weights": False}
    inject_adapter_in_model(LoraConfig(**config, lora_dropout=SHARE if kind == "input" else 0.0), net)
    if kind != "input":
        DROPOUTS[kind](net, "default", SHARE)
    return net


def update(net):
    """s B A, from the weights alone."""
    layer = net[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return (layer.scaling["default"] * b.flatten(1) @ a.flatten(1)).detach()


def draws(net, x, count):
    """What training adds to the base's output, in `count` draws."""
    net.train()
    torch.manual_seed(1)
    with torch.no_grad():
        base = net[0].base_layer(x)
        return torch.stack([net(x) - base for _ in range(count)])


@pytest.mark.parametrize("kind", ["input", "rank", "rows_columns"])
def test_mean_and_variance_are_the_closed_forms(kind):
    """With U = s B A, q = 1 - p and Var of a mask p / q. input: sum_j (U_ij x_j)^2 p/q; rank: sum_k (s B_ik (A x)_k)^2 p/q;
    rows_columns: E[n^2] E[(sum_j U_ij m_j x_j)^2] - (U x)_i^2, with E[n^2] = 1/q."""
    net, p = adapted_layer(kind, nn.Linear(6, 5)), SHARE
    x = torch.randn(6, generator=torch.Generator().manual_seed(2))
    sample = draws(net, x[None], 40_000)[:, 0]
    u, layer = update(net), net[0]
    by_rank = layer.scaling["default"] * layer.lora_B["default"].weight * (layer.lora_A["default"].weight @ x)
    mean = u @ x
    columns = (u * x).square().sum(1) * p / (1 - p)
    variance = {
        "input": columns,
        "rank": by_rank.square().sum(1) * p / (1 - p),
        "rows_columns": (columns + mean.square()) / (1 - p) - mean.square(),
    }[kind].detach()
    assert torch.allclose(sample.mean(0), mean, atol=5 * float((variance.max() / len(sample)).sqrt()))
    assert torch.allclose(sample.var(0), variance, rtol=0.06)


@pytest.mark.parametrize("kind", ["input", "rank", "rows_columns"])
@pytest.mark.parametrize("base", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3)], ids=["linear", "convolution"])
def test_eval_mode_has_none_of_it(kind, base):
    net = adapted_layer(kind, base).eval()
    x = torch.randn(2, 6, 4, 4) if isinstance(base, nn.Conv2d) else torch.randn(2, 6)
    with torch.no_grad():
        added = net(x) - net[0].base_layer(x)
        weight = update(net).view(net[0].base_layer.weight.shape)
        expected = nn.functional.conv2d(x, weight) if x.ndim == 4 else x @ weight.T
    assert torch.allclose(added, expected, atol=1e-5)


def test_rows_and_columns_are_the_same_for_the_whole_batch():
    """The masked update is one matrix: a column of A dropped is an input feature that no sample and no pixel sees."""
    net = adapted_layer("rows_columns", nn.Conv2d(6, 5, 1))
    x = torch.ones(2, 6, 3, 3)
    added = draws(net, x, 1)[0]
    assert torch.allclose(added, added[:1, :, :1, :1].expand_as(added), atol=1e-6)
    zero = [bool((draw == 0).all((0, 2, 3)).any()) for draw in draws(net, x, 50)]
    assert any(zero)  # rows of B that are gone in every pixel of every sample


def test_rank_dropout_is_by_element():
    net = adapted_layer("rank", nn.Linear(6, 5))
    added = draws(net, torch.ones(64, 6), 1)[0]
    assert len({tuple(row) for row in added.round(decimals=5).tolist()}) > 4


def test_masks_have_mean_one():
    torch.manual_seed(0)
    mask = torch.stack([channels_mask(torch.ones(1, 8, 2, 2), 8, 0.25) for _ in range(4000)])
    assert mask.shape == (4000, 1, 8, 1, 1)
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float(mask.mean()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("kind", ["rank", "rows_columns"])
def test_it_is_attached_where_asked(make, kind):
    components = make()
    attach_adapters(components, AdapterSpec(rank=2, dropout=0.5, dropout_kind=kind), 0)
    layers = [m for m in components.unet.modules() if hasattr(m, "lora_A")]
    for layer in layers:
        nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(1, 4, layers[0].in_features)
    layers[0].train()
    with torch.no_grad():
        assert not torch.equal(layers[0](x), layers[0](x))
        layers[0].eval()
        assert torch.equal(layers[0](x), layers[0](x))


def test_dora_takes_input_dropout_only():
    with pytest.raises(ValueError, match="would also act on the weight norm"):
        AdapterSpec(kind="dora", dropout=0.1, dropout_kind="rank")
    AdapterSpec(kind="dora", dropout=0.1)
