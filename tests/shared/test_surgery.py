"""Surgery: the cut network equals the masked one, and training goes on with the optimiser's moments
carried.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.shared.errors import GroupError, OptimizerStateError
from zoo.shared.learned.gates import HardGate
from zoo.shared.masks import MaskSet, masks_of, set_masks
from zoo.shared.structure.groups import GroupMap, trace_groups
from zoo.shared.structure.surgery import cut, drop_layers


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class BasicBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride), nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-20 in layout: three stages, downsampling shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        widths = [(8, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 24, 2), (24, 24, 1)]
        self.layers = nn.Sequential(*(BasicBlock(*w) for w in widths))
        self.fc = nn.Linear(24, 10)

    def forward(self, x):
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def mobilenet() -> nn.Sequential:
    def separable(a: int, b: int, stride: int) -> list[nn.Module]:
        depthwise = nn.Conv2d(a, a, 3, stride, 1, groups=a, bias=False)
        return [
            depthwise,
            nn.BatchNorm2d(a),
            nn.ReLU6(),
            nn.Conv2d(a, b, 1),
            nn.BatchNorm2d(b),
            nn.Hardswish(),
        ]

    layers = [
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        *separable(8, 12, 1),
        *separable(12, 16, 2),
    ]
    return nn.Sequential(
        *layers, nn.Conv2d(16, 16, 1, groups=4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5)
    )


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.transition = nn.Conv2d(18, 8, 1)
        self.fc = nn.Linear(8 * 4, 4)

    def forward(self, x):
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return self.fc(torch.flatten(F.max_pool2d(self.transition(x), 4), 1))


class SqueezeExcite(nn.Module):
    """Sigmoid of zero is one half, not zero: only the readers' zero columns make a masked unit harmless."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, bias=True), nn.Conv2d(8, 4, 1)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        x = F.softplus(self.a(x))
        scale = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.b(x * scale)


class GroupedQueryAttention(nn.Module):
    def __init__(self, width: int, num_heads: int, num_kv_heads: int, style: str) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = width // num_heads
        self.style = style
        self.q = nn.Linear(width, num_heads * self.head_dim, bias=False)
        self.k = nn.Linear(width, num_kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(width, num_kv_heads * self.head_dim)
        self.o = nn.Linear(num_heads * self.head_dim, width, bias=False)

    def forward(self, x):
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, t, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(b, t, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if self.style == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            rep = self.num_heads // self.num_kv_heads
            k = (
                k[:, :, None]
                .expand(b, self.num_kv_heads, rep, t, self.head_dim)
                .reshape(b, -1, t, self.head_dim)
            )
            v = v.repeat_interleave(rep, dim=1)
            y = torch.softmax(q @ k.transpose(-2, -1) / self.head_dim**0.5, dim=-1) @ v
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class GatedBlock(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        self.attn = GroupedQueryAttention(16, 4, 2, style)
        self.norm1, self.norm2 = nn.RMSNorm(16), nn.LayerNorm(16)
        self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((16, 24), (16, 24), (24, 16)))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def encoder() -> nn.Sequential:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=True)
    return nn.Sequential(
        nn.Linear(6, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3)
    )


class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, batch_first=False)

    def forward(self, x):
        return self.attn(x, x, x)[0]


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 10), nn.BatchNorm1d(10), nn.PReLU(10), nn.Linear(10, 8), nn.GELU(), nn.Linear(8, 3)
    )


class FusedQKV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.width = 4, 3
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.width).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


MODELS = {
    "resnet": (ResNet, (4, 3, 16, 16), 9),
    "mobilenet": (mobilenet, (4, 3, 16, 16), 3),
    "densenet": (DenseNet, (4, 3, 8, 8), 5),
    "squeeze-excite": (SqueezeExcite, (4, 3, 6, 6), 2),
    "mlp": (mlp, (8, 6), 2),
    "gqa-sdpa": (lambda: GatedBlock("sdpa"), (2, 5, 16), 2),
    "gqa-matmul": (lambda: GatedBlock("matmul"), (2, 5, 16), 2),
    "encoder": (encoder, (2, 5, 6), 4),
    "torch-attention": (TorchAttention, (5, 2, 12), 1),
    "fused-qkv": (FusedQKV, (2, 5, 12), 1),
}


def _warm(model: nn.Module, x: torch.Tensor) -> None:
    """Norms with statistics, scales and shifts that are not at their neutral start."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    with torch.no_grad():
        model.train()(x)


def _random_keep(groups: GroupMap) -> dict[str, torch.Tensor]:
    keep = {}
    for name, family in groups.items():
        units = torch.rand(family.units) > 0.4
        units[torch.randint(family.units, ())] = True
        units[(int(units.nonzero()[0]) + 1) % family.units] = False
        keep[name] = units
    return {name: units for name, units in keep.items() if units.any() and groups[name].exact}


@pytest.mark.parametrize("name", MODELS)
class TestCutEqualsMasked:
    def test_outputs_sizes_and_training(self, name):
        build, shape, families = MODELS[name]
        model, x = build(), torch.randn(shape)
        _warm(model, x)
        groups = trace_groups(model, (x,))
        keep = _random_keep(groups)
        assert len(keep) == families, groups
        masked = copy.deepcopy(model)
        groups.masks(masked, keep).apply_(masked)
        report = cut(model, groups, keep, check=(x,))
        masked.eval(), model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(x), masked(x), atol=1e-6, rtol=1e-5)
        masked.train(), model.train()
        torch.testing.assert_close(model(x), masked(x), atol=1e-5, rtol=1e-4)
        assert report.parameters[1] == sum(p.numel() for p in model.parameters()) < report.parameters[0]
        for family in report.groups.values():
            assert family.units == int(keep.get(family.name, torch.ones(family.units)).sum())
        # A network of the cut sizes has the same repr: every attribute followed.
        for module in model.modules():
            if isinstance(module, nn.Linear):
                assert tuple(module.weight.shape) == (module.out_features, module.in_features)
            if isinstance(module, nn.Conv2d):
                width = module.in_channels // module.groups
                assert tuple(module.weight.shape[:2]) == (module.out_channels, width)
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                assert module.num_features == len(module.running_mean)

    def test_a_second_cut_with_the_returned_groups(self, name):
        build, shape, _ = MODELS[name]
        model, x = build(), torch.randn(shape)
        groups = trace_groups(model, (x,))
        for _ in range(2):
            keep = {}
            for family in groups.values():
                if family.exact and family.units > 1:
                    keep[family.name] = torch.arange(family.units) != family.units // 2
            masked = copy.deepcopy(model).eval()
            groups.masks(masked, keep).apply_(masked)
            groups = cut(model, groups, keep).groups
            with torch.no_grad():
                torch.testing.assert_close(model.eval()(x), masked(x), atol=1e-6, rtol=1e-5)


class TestOptimizer:
    @pytest.mark.parametrize("kind", ["adamw", "sgd", "amsgrad", "rmsprop"])
    def test_moments_are_slices_and_training_goes_on_like_the_masked_network(self, kind):
        make = {
            "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
            "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
            "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
            "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
        }[kind]
        # float64, as Adam blows up rounding noise where the true gradient is 0 (a bias before a norm)
        model, x, y = mlp().double(), torch.randn(32, 6).double(), torch.randint(3, (32,))
        named = list(model.named_parameters())
        optimizer = make(
            [{"params": [p for _, p in named[:3]], "lr": 5e-3}, {"params": [p for _, p in named[3:]]}]
        )

        def step(net, opt, handle=None):
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()

        for _ in range(3):
            step(model, optimizer)
        groups = trace_groups(model, (x,))
        keep = {"0.weight": torch.arange(10) % 3 != 1, "3.weight": torch.arange(8) != 5}
        masked = copy.deepcopy(model)
        twin = make(
            [{"params": list(masked.parameters())[:3], "lr": 5e-3}, {"params": list(masked.parameters())[3:]}]
        )
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # or uncut moments would be shared
        handle = groups.masks(masked, keep).attach(masked, twin)
        report = cut(model, groups, keep, optimizer)
        assert all(name in report.replaced for name in ("0.weight", "1.weight", "3.weight", "5.weight"))
        in_groups = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert in_groups == {id(p) for p in model.parameters()}
        assert set(map(id, optimizer.state)) <= in_groups
        for name, p in model.named_parameters():
            for key, value in optimizer.state[p].items():
                whole = twin.state[dict(masked.named_parameters())[name]][key]
                if isinstance(value, torch.Tensor) and value.shape == p.shape:
                    expected = whole
                    if name in ("3.weight",):
                        expected = whole[keep["3.weight"]][:, keep["0.weight"]]
                    elif name in ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight"):
                        expected = whole[keep["0.weight"]]
                    elif name == "3.bias":
                        expected = whole[keep["3.weight"]]
                    elif name == "5.weight":
                        expected = whole[:, keep["3.weight"]]
                    assert torch.equal(value, expected), (name, key)
        for _ in range(5):
            step(model, optimizer)
            step(masked, twin)
        torch.testing.assert_close(model.eval()(x), masked.eval()(x), atol=1e-5, rtol=1e-4)
        handle.detach()

    def test_unknown_state_is_refused_and_nothing_changes(self):
        model, x = mlp(), torch.randn(8, 6)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

        def closure():
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        groups = trace_groups(model, (x,))
        before = [id(p) for p in model.parameters()]
        with pytest.raises(OptimizerStateError, match="LBFGS keeps"):
            cut(model, groups, {"0.weight": torch.arange(10) > 1}, optimizer)
        assert [id(p) for p in model.parameters()] == before and model[0].out_features == 10


class TestCarriedAlong:
    def test_masks_of_the_model_are_sliced(self):
        model, x = mlp(), torch.randn(4, 6)
        fine = torch.rand(8, 10) > 0.5
        set_masks(model, MaskSet({"3.weight": fine, "0.bias": torch.arange(10) != 2}))
        masks_of(model).apply_(model)
        keep = {"0.weight": torch.arange(10) != 2, "3.weight": torch.arange(8) != 0}
        cut(model, trace_groups(model, (x,)), keep)
        carried = masks_of(model)
        assert set(carried) == {"3.weight"}, "the bias mask dropped only what is gone"
        assert torch.equal(carried["3.weight"].keep, fine[1:][:, keep["0.weight"]])
        carried.check(model)
        assert carried.lost_zeros(model) == []

    def test_gradients_frozen_flags_and_tied_parameters(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 2)
                self.b.weight = self.a.weight

            def forward(self, x):
                return self.head(F.relu(self.a(x)) + self.b(x))

        model, x = Tied(), torch.randn(3, 5)
        model.a.bias.requires_grad_(False)
        model(x).sum().backward()
        grad = model.a.weight.grad.clone()
        keep = torch.arange(6) % 2 == 0
        cut(model, trace_groups(model, (x,)), {"a.weight": keep}, check=(x,))
        assert model.b.weight is model.a.weight and not model.a.bias.requires_grad
        assert torch.equal(model.a.weight.grad, grad[keep])


class TestDeclaredSurgery:
    def test_heads_of_attention_with_declared_attributes(self):
        model, x = GatedBlock("sdpa"), torch.randn(2, 5, 16)
        groups = GroupMap.declare(
            model,
            {
                "heads": [
                    ("attn.q.weight", 0, "out"),
                    ("attn.k.weight", 0, "out"),
                    ("attn.v.weight", 0, "out"),
                    ("attn.v.bias", 0, "out"),
                    ("attn.o.weight", 1, "in"),
                ]
            },
            units={"heads": 2},
            attributes={"heads": {"attn.num_heads": 2, "attn.num_kv_heads": 1}},
        )
        cut(model, groups, {"heads": torch.tensor([False, True])}, check=(x,))
        assert (model.attn.num_heads, model.attn.num_kv_heads) == (2, 1)

    def test_missing_attributes_are_found_by_the_check_and_nothing_changes(self):
        model, x = GatedBlock("matmul"), torch.randn(2, 5, 16)
        members = [(f"attn.{n}.weight", 0, "out") for n in "qkv"]
        groups = GroupMap.declare(
            model,
            {"heads": [*members, ("attn.v.bias", 0, "out"), ("attn.o.weight", 1, "in")]},
            units={"heads": 2},
        )
        with pytest.raises(GroupError, match="does not run"):
            cut(model, groups, {"heads": torch.tensor([True, False])}, check=(x,))
        assert model.attn.q.out_features == 16

    def test_an_incomplete_declaration_is_found_by_the_check(self):
        """A hidden axis whose reader is forgotten cannot run; one whose norm shift is forgotten differs."""
        model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4)
        groups = GroupMap.declare(model, {"h": [("0.weight", 0, "out"), ("0.bias", 0, "out")]})
        with pytest.raises(GroupError, match="does not run"):
            cut(model, groups, {"h": torch.arange(6) > 0}, check=(x,))

    def test_inexact_families_need_consent(self):
        class Stream(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.norm, self.b = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)

            def forward(self, x):
                return self.b(self.norm(self.a(x)))

        model, x = Stream(), torch.randn(3, 4)
        groups, keep = trace_groups(model, (x,)), {"a.weight": torch.arange(6) > 1}
        with pytest.raises(GroupError, match="allow_inexact"):
            cut(model, groups, keep)
        cut(model, groups, keep, allow_inexact=True, check=(x,))
        assert model.norm.normalized_shape == (4,) and model(x).shape == (3, 2)


class TestRefusals:
    def setup_method(self):
        torch.manual_seed(3)
        self.model, self.x = mlp(), torch.randn(4, 6)
        self.groups = trace_groups(self.model, (self.x,))
        self.keep = {"0.weight": torch.arange(10) > 2}

    def test_unknown_families(self):
        with pytest.raises(GroupError, match="no family '0.wight'.*0.weight"):
            cut(self.model, self.groups, {"0.wight": torch.ones(10, dtype=torch.bool)})
        with pytest.raises(GroupError, match="reaches the model's output"):
            cut(self.model, self.groups, {"5.weight": torch.ones(3, dtype=torch.bool)})

    def test_nothing_left(self):
        with pytest.raises(GroupError, match="all units would be cut"):
            cut(self.model, self.groups, {"0.weight": torch.zeros(10, dtype=torch.bool)})

    def test_gates_and_attached_masks_come_first(self):
        handle = MaskSet({"0.weight": torch.rand(10, 6) > 0.5}).attach(self.model)
        with pytest.raises(GroupError, match="detach masks"):
            cut(self.model, self.groups, self.keep)
        handle.detach()
        self.groups.gate(self.model, "0.weight", HardGate)
        with pytest.raises(GroupError, match="harden"):
            cut(self.model, self.groups, self.keep)

    def test_a_stale_group_map(self):
        cut(self.model, self.groups, self.keep)
        with pytest.raises(GroupError, match="cut before"):
            cut(self.model, self.groups, self.keep)

    def test_attention_masks_with_their_own_heads(self):
        model, x = TorchAttention(), torch.randn(5, 2, 12)
        groups = trace_groups(model, (x,))
        cut(model, groups, {"attn.in_proj_weight": torch.tensor([True, False, True])})
        with pytest.raises(GroupError, match="attn_mask"):
            model.attn(x, x, x, attn_mask=torch.zeros(6, 5, 5))


class TestHeadPrunedAttention:
    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("need_weights", [True, False])
    def test_masks_layouts_and_weights_agree_with_torch(self, batch_first, need_weights):
        attn = nn.MultiheadAttention(12, 3, batch_first=batch_first).eval()
        wrapper = nn.ModuleDict({"attn": attn})
        members = [("attn.in_proj_weight", 0, "out"), ("attn.out_proj.weight", 1, "in")]
        masked = copy.deepcopy(attn)
        with torch.no_grad():
            masked.in_proj_weight[0:4] = masked.in_proj_weight[12:16] = masked.in_proj_weight[24:28] = 0
            masked.out_proj.weight[:, 0:4] = 0
        from zoo.shared.structure.groups.families import Family, Member

        rows = torch.arange(36).view(3, 3, 4).transpose(0, 1).reshape(3, 12)
        family = Family(
            "heads",
            3,
            (
                Member(members[0][0], 0, rows, "out"),
                Member("attn.in_proj_bias", 0, rows, "out"),
                Member(members[1][0], 1, torch.arange(12).view(3, 4), "in"),
            ),
        )
        cut(wrapper, GroupMap([family]), {"heads": torch.tensor([False, True, True])})
        q, kv = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
        padding = torch.zeros(2, 7, dtype=torch.bool)
        padding[1, 4:] = True
        if not batch_first:
            q, kv = q.transpose(0, 1), kv.transpose(0, 1)
        for mask in (None, torch.rand(5, 7) > 0.7, torch.randn(5, 7)):
            pad = padding if mask is None or mask.dtype == torch.bool else padding.float() * -1e9
            if mask is not None and mask.dtype == torch.bool:
                mask[:, 0] = False
            arguments = {"key_padding_mask": pad, "attn_mask": mask, "need_weights": need_weights}
            expected, _ = masked(q, kv, kv, **arguments)
            found, weights = wrapper["attn"](q, kv, kv, **arguments)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
            assert (weights is not None) == need_weights
            if weights is not None:
                torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5))
        if batch_first:
            one, _ = masked(q[0], kv[0], kv[0])
            torch.testing.assert_close(wrapper["attn"](q[0], kv[0], kv[0])[0], one, atol=1e-6, rtol=1e-5)


class TestDropLayers:
    def test_masked_branches_vanish(self):
        class Stack(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList(GatedBlock("sdpa") for _ in range(4))
                self.head = nn.Linear(16, 2)

            def forward(self, x):
                for block in self.blocks:
                    x = block(x)
                return self.head(x)

        model, x = Stack(), torch.randn(2, 5, 16)
        optimizer = torch.optim.Adam(model.parameters())
        model(x).sum().backward()
        optimizer.step()
        for index in (0, 2):
            with torch.no_grad():
                model.blocks[index].attn.o.weight.zero_()
                model.blocks[index].down.weight.zero_()
        set_masks(model, MaskSet({f"blocks.{i}.up.weight": torch.rand(24, 16) > 0.5 for i in range(4)}))
        masks_of(model).apply_(model)
        kept_mask = masks_of(model)["blocks.3.up.weight"]
        last = model.blocks[3].up.weight
        expected = model(x)
        renamed = drop_layers(model, ["blocks.0", "blocks.2"], optimizer)
        torch.testing.assert_close(model(x), expected)
        assert len(model.blocks) == 2 and renamed["blocks.3.up.weight"] == "blocks.1.up.weight"
        assert "blocks.2.up.weight" not in renamed
        assert model.blocks[1].up.weight is last
        assert masks_of(model)["blocks.1.up.weight"].equal(kept_mask)
        in_groups = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert in_groups == {id(p) for p in model.parameters()} == set(map(id, optimizer.state))

    def test_elsewhere_identity_takes_over(self):
        model = SqueezeExcite()
        drop_layers(model, ["down"])
        assert isinstance(model.down, nn.Identity)

    def test_refusals(self):
        with pytest.raises(GroupError, match="no module 'blokcs'"):
            drop_layers(mlp(), ["blokcs"])
        model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
        with pytest.raises(GroupError, match="inside another"):
            drop_layers(model, ["0", "0.0"])
