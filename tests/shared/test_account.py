"""Costs counted by hand, against a public counter, and with zeros."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.shared.errors import MaskError
from zoo.shared.masks import Mask, MaskSet, set_masks
from zoo.shared.masks.patterns import NM, Block, Group, Pattern, Unstructured
from zoo.shared.measure import account
from zoo.shared.measure.account import Counting, Macs, count, register_counter
from zoo.shared.store.formats import save_packed


def random_masks(model: nn.Module, density: float, pattern: Pattern | None = None) -> MaskSet:
    masks, pattern = {}, pattern or Unstructured()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            score = torch.rand(parameter.shape, generator=generator)
            masks[name] = Mask(
                pattern.keep(score, pattern.feasible(score.shape, round(density * score.numel()))), pattern
            )
    return MaskSet(masks)


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Linear(7, 5), (3, 7), 3 * 7 * 5),
        (nn.Linear(7, 5, bias=False), (2, 4, 7), 8 * 35),
        (nn.Linear(7, 5), (7,), 35),
        (nn.Conv1d(4, 6, 3), (2, 4, 10), 2 * 8 * 6 * 4 * 3),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 8), 2 * 5 * 4 * 6 * 4 * 9),
        (nn.Conv2d(4, 8, 3, groups=4), (1, 4, 5, 5), 9 * 8 * 1 * 9),
        (nn.Conv2d(6, 6, (3, 1), groups=6, dilation=2), (1, 6, 8, 5), 4 * 5 * 6 * 3),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), 27 * 3 * 2 * 8),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5), 2 * 25 * 4 * 6 * 9),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), (1, 4, 5), 5 * 4 * 3 * 3),
        (nn.LayerNorm(7), (3, 7), 0),
    ],
)
def test_layers_counted_by_hand(layer, shape, macs) -> None:
    total = count(layer, (torch.randn(shape),)).total
    assert (total.macs, total.macs_kept, total.flops) == (macs, macs, 2 * macs)
    assert total.params == total.params_kept == sum(p.numel() for p in layer.parameters())
    assert total.bytes_dense == total.bytes_sparse == 4 * total.params


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(16, 12), (3, 16)),
        (nn.Conv2d(8, 6, 3), (1, 8, 7, 7)),
        (nn.Conv2d(8, 16, 3, groups=4), (2, 8, 7, 7)),
        (nn.ConvTranspose2d(8, 6, 3, stride=2), (1, 8, 5, 5)),
        (nn.Conv1d(4, 6, 3).to(torch.bfloat16), (1, 4, 9)),
    ],
)
def test_masked_weights_save_their_products(layer, shape) -> None:
    masks = random_masks(layer, 0.3)
    kept, numel = masks["weight"].kept, masks["weight"].numel
    total = count(layer, (torch.randn(shape).to(layer.weight.dtype),), masks).total
    assert total.macs_kept * numel == total.macs * kept and 0 < total.macs_kept < total.macs
    assert total.params - total.params_kept == numel - kept


def test_embedding_costs_bytes_only() -> None:
    layer = nn.Embedding(10, 4)
    result = count(layer, (torch.tensor([1, 2]),))
    assert result.total.params == 40 and result.total.macs == 0 and result.uncounted == ()


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(need_weights) -> None:
    """Projections of q, k, v and out; L x S products with keys and with values."""
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(3, 5, 8)
    result = count(layer, (x, x, x), kwargs={"need_weights": need_weights})
    attention, projections = 2 * 3 * 5 * 5 * 8, 3 * 5 * 8 * 8 * 4
    assert result.total.macs == attention + projections and result.uncounted == ()
    cross = count(
        layer, (x, torch.randn(3, 7, 8), torch.randn(3, 7, 8)), kwargs={"need_weights": need_weights}
    )
    assert cross.total.macs == 2 * 3 * 5 * 7 * 8 + 3 * 64 * (5 + 7 + 7 + 5)


def test_masks_of_parts_of_a_packed_projection() -> None:
    """q, k and v are parts of one parameter and see different rows: each part has its own share."""
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    keep = torch.ones(24, 8, dtype=torch.bool)
    keep[:8] = False  # q
    keep[8, :3] = False  # k
    masks = MaskSet({"in_proj_weight": Mask(keep)})
    dense = count(layer, (torch.randn(1, 5, 8), *[torch.randn(1, 7, 8)] * 2), masks)
    assert dense.total.macs - dense.total.macs_kept == 5 * 64 + 7 * 3


@pytest.mark.parametrize("causal", [False, True])
def test_scaled_dot_product_attention(causal) -> None:
    class Attend(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    assert count(Attend(), (q, k, v)).total.macs == 2 * 3 * 5 * 5 * 16


def test_products_outside_of_layers() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 5))
            self.never = nn.Parameter(torch.randn(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("nij,jk->nik", x @ self.a, self.b) + x[..., :1] @ self.b[:1]

    model = Odd()
    masks = MaskSet({"b": Mask(torch.arange(30).reshape(6, 5) % 2 == 0)})
    result = count(model, (torch.randn(2, 3, 4),), masks)
    assert result.total.macs == 6 * 24 + 6 * 30 + 6 * 5
    assert result.total.macs_kept == 6 * 24 + 6 * 15 + 6 * 3
    assert result.uncounted == ("never",)


# -- the public counter


class Cnn(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8, stride=2),
            nn.Conv2d(8, 16, 1),
            nn.ConvTranspose2d(16, 4, 2, stride=2),
            nn.Flatten(),
            nn.Linear(4 * 14 * 14, 10),
        )


def transformer(kind: str) -> tuple[nn.Module, tuple, dict]:
    transformers = pytest.importorskip("transformers", reason="an extra; counts a whole transformer")
    configs = {
        "llama": transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        "gpt2": transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        "bert": transformers.BertConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        ),
    }
    # The eager attention, since the public counter does not see the fused one of the CPU.
    builder = transformers.AutoModel if kind == "bert" else transformers.AutoModelForCausalLM
    model = builder.from_config(configs[kind], attn_implementation="eager")
    return model, (), {"input_ids": torch.randint(0, 50, (2, 9))}


DENSE = {
    "mlp": lambda: (nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 2)), (torch.randn(5, 7),), {}),
    "cnn": lambda: (Cnn(), (torch.randn(2, 3, 16, 16),), {}),
    "torch": lambda: (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (torch.randn(2, 6, 16),), {}),
    "llama": lambda: transformer("llama"),
    "gpt2": lambda: transformer("gpt2"),
    "bert": lambda: transformer("bert"),
}


@pytest.mark.parametrize("name", DENSE)
def test_agrees_with_the_public_counter(name) -> None:
    model, inputs, kwargs = DENSE[name]()
    result = count(model, inputs, kwargs=kwargs)
    model.eval()
    mode = FlopCounterMode(display=False)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), mode:
        model(*inputs, **kwargs)
    torch.backends.mha.set_fastpath_enabled(fast)
    assert result.total.flops == mode.get_total_flops() > 0
    assert result.total.params == sum(p.numel() for p in model.parameters())


def test_fused_and_eager_attention_cost_the_same() -> None:
    model, inputs, kwargs = transformer("llama")
    eager = count(model, inputs, kwargs=kwargs).total
    model.set_attn_implementation("sdpa")
    assert count(model, inputs, kwargs=kwargs).total == eager


# -- bytes


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(4, 2), Group(0)])
@pytest.mark.parametrize("density", [0.02, 0.5])
def test_sparse_bytes_are_the_bytes_on_disk(tmp_path, pattern, density) -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 16)).to(torch.bfloat16)
    masks = random_masks(model, density, pattern)
    masks.apply_(model)
    total = count(model, (torch.randn(2, 64, dtype=torch.bfloat16),), masks).total
    report = save_packed(tmp_path / "f", model.state_dict(), masks)
    assert total.bytes_sparse == report.bytes - report.header_bytes
    assert total.bytes_dense == report.dense_bytes


def test_tied_parameters_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    masks = MaskSet({"embed.weight": Mask(torch.arange(160).reshape(20, 8) % 4 == 0)})
    result = count(Tied(), (torch.tensor([1, 2, 3]),), masks)
    assert (result.total.params, result.total.params_kept) == (160, 40)
    assert (result.total.macs, result.total.macs_kept) == (3 * 160, 3 * 40)
    assert [layer.name for layer in result.layers] == ["embed", "head"]


# -- registered counters


class Messages(nn.Module):
    """A graph convolution as libraries write it: a Linear, then messages along edges and self-loops."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 4)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = self.lin(x)
        return h.index_add(0, edge_index[1], h[edge_index[0]])


@pytest.fixture
def message_counter(monkeypatch):
    monkeypatch.setattr(account, "_COUNTERS", dict(account._COUNTERS))

    def counter(module, args, kwargs, output, counting: Counting) -> Macs:
        x, edge_index = args
        return counting.product(module.lin.weight, len(x)).plus(
            counting.messages(edge_index.shape[1], module.lin.out_features, loops=len(x))
        )

    register_counter(Messages, counter)


def test_graph_layers_count_edges(message_counter) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = Messages(), nn.Linear(4, 2)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.out(self.conv(x, edge_index))

    edges = torch.tensor([[0, 1, 2, 3, 0], [1, 0, 3, 2, 2]])
    keep = torch.tensor([True, True, False, False, True])
    model = Net()
    masks = MaskSet({"conv.lin.weight": Mask(torch.arange(24).reshape(4, 6) < 10)})
    result = count(model, (torch.randn(5, 6), edges), masks, edges=keep)
    cost = {layer.name: layer for layer in result.layers}
    assert cost["conv"].macs == 5 * 24 + (5 + 5) * 4
    assert cost["conv"].macs_kept == 5 * 10 + (3 + 5) * 4
    assert cost["conv.lin"].macs == 0 and cost["conv.lin"].params_kept == 10 + 4
    assert cost["out"].macs == 5 * 8 and result.uncounted == ()
    with pytest.raises(MaskError, match="edge mask has 4 entries, the layer got 5 edges"):
        count(model, (torch.randn(5, 6), edges), masks, edges=keep[:4])


def test_subclasses_inherit_a_counter(message_counter) -> None:
    class Sub(Messages):
        pass

    assert (
        count(Sub(), (torch.randn(5, 6), torch.zeros(2, 7, dtype=torch.long))).total.macs == 5 * 24 + 12 * 4
    )


def test_sparse_convolutions_count_pairs() -> None:
    weight = nn.Parameter(torch.randn(3, 2, 4))
    keep = torch.ones(3, 2, 4, dtype=torch.bool)
    keep[1, 0] = False
    masks = {account._storage(weight): (weight, keep)}
    assert Counting(masks, None).pairs(weight, [5, 7, 0]) == Macs((5 + 7) * 8, 5 * 8 + 7 * 4)
    with pytest.raises(MaskError, match="2 numbers of pairs for the 3 offsets"):
        Counting(masks, None).pairs(weight, [5, 7])


def test_sparse_matrices_count_their_entries() -> None:
    class Spread(nn.Module):
        def forward(self, adjacency: Tensor, x: Tensor) -> Tensor:
            return adjacency @ x

    adjacency = torch.eye(6).to_sparse_csr()
    assert count(Spread(), (adjacency, torch.randn(6, 5))).total.macs == 6 * 5
    assert count(Spread(), (torch.eye(6).to_sparse(), torch.randn(6, 5))).total.macs == 6 * 5


def test_unknown_layers_are_listed() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.idle = nn.Parameter(torch.ones(2, 3)), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gate

    result = count(Gate(), (torch.randn(2, 3),))
    assert result.uncounted == ("gate", "idle.weight")
    assert str(result).startswith("not counted, so that FLOPs are too low: gate, idle.weight\n")


class Bilinear(nn.Bilinear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x[..., :3], x[..., 3:])


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.LSTM(5, 4, num_layers=2), (6, 2, 5), 6 * 2 * 4 * (4 * 5 + 4 * 4 + 4 * 4 + 4 * 4)),
        (nn.GRU(5, 4, bidirectional=True), (6, 2, 5), 6 * 2 * 2 * 3 * (4 * 5 + 4 * 4)),
        (nn.RNN(5, 4, batch_first=True), (2, 6, 5), 12 * (20 + 16)),
        (Bilinear(3, 2, 7), (5, 5), 5 * 3 * 2 * 7),
    ],
)
def test_recurrent_and_bilinear_layers_by_hand(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    result = count(layer, (torch.randn(shape),))
    assert result.total.macs == macs and result.uncounted == ()
    masks = random_masks(layer, 0.5)
    assert abs(count(layer, (torch.randn(shape),), masks).total.macs_kept - macs / 2) < macs / 10


# -- the run leaves no trace


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Dropout())
    model[2].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    count(model, (torch.randn(4, 3),))
    assert model.training and model[1].training and not model[2].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(RuntimeError):
        count(model, (torch.randn(4, 5),))
    assert model.training and not model[1]._forward_hooks and not model[1]._forward_pre_hooks


def test_carried_masks_are_used_and_checked() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    set_masks(model, MaskSet({"0.weight": Mask(torch.eye(4).bool())}))
    assert count(model, (torch.randn(1, 4),)).total.macs_kept == 4
    with pytest.raises(MaskError):
        count(model, (torch.randn(1, 4),), MaskSet({"1.weight": Mask(torch.eye(4).bool())}))


def test_large_models_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(50_000, 50_000, bias=False), nn.Linear(50_000, 10))
        x = torch.empty(8, 50_000)
    total = count(model, (x,)).total
    assert total.macs == 8 * 50_000 * 50_010 and total.bytes_dense == 4 * (50_000 * 50_010 + 10)


def test_table_and_dictionary() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    result = count(model, (torch.randn(1, 4),))
    assert result.to_dict()["total"]["macs"] == 24 and len(result.to_dict()["layers"]) == 2
    assert str(result).splitlines()[-1].split() == ["total", "30", "30", "48", "48", "120", "120"]
