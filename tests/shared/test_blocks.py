"""Walks block by block: what blocks see, which matrices are found, and what their inputs measure."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zoo.shared.blocks import chain_matrices, find_chains, measure_inputs, walk_blocks
from zoo.shared.errors import ActivationError, StructureError
from zoo.shared.measure.products import observe_products, product_matrices


class Block(nn.Module):
    """x + W2 relu(W1 x), once more scaled by what the model hands to each block."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 6), nn.Linear(6, width, bias=False)

    def forward(self, hidden: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return hidden + scale * self.down(F.relu(self.up(hidden)))


class Tupled(Block):
    def forward(self, hidden, scale=1.0):
        return super().forward(hidden, scale), None


class Net(nn.Module):
    """Three blocks between an embedding and a head; `hand` is how it calls a block."""

    def __init__(self, kind=Block, hand=lambda block, x, i: block(x, scale=i + 1.0)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.layers, self.head = (
            nn.Linear(4, 4),
            nn.ModuleList(kind() for _ in range(3)),
            nn.Linear(4, 2),
        )
        self.hand, self.states = hand, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        self.states = [x]
        for i, block in enumerate(self.layers):
            x = self.hand(block, x, i)
            self.states.append(x)
        return self.head(x)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)]


BY_KEYWORD = {"hand": lambda block, x, i: block(hidden=x, scale=i + 1.0)}
IN_TUPLES = {"kind": Tupled, "hand": lambda block, x, i: block(x, i + 1.0)[0]}


@pytest.mark.parametrize("net", [{}, BY_KEYWORD, IN_TUPLES])
def test_blocks_see_what_a_plain_pass_gives_them(net):
    model, outputs = Net(**net).eval(), {}

    def visit(block):
        outputs[block.name] = [block.run(i) for i in range(2)]

    walk_blocks(model, batches(), visit)
    assert list(outputs) == ["layers.0", "layers.1", "layers.2"]
    with torch.no_grad():
        for number, batch in enumerate(batches()):
            model(batch)
            for index, found in enumerate(outputs.values()):
                torch.testing.assert_close(found[number], model.states[index + 1])
    assert all("forward" not in layer.__dict__ for layer in model.layers)


def test_later_blocks_see_what_changed_blocks_put_out():
    model, entered = Net(), []

    def visit(block):
        entered.append(block.inputs[0])
        block.module.down.weight.mul_(0.5)

    walk_blocks(model, batches(), visit)
    with torch.no_grad():
        model(batches()[0])
    for found, wanted in zip(entered, model.states, strict=False):
        torch.testing.assert_close(found, wanted)


def test_a_loss_serves_as_forward_and_what_follows_the_blocks_is_not_run():
    model, visited = Net(), []
    model.head = None
    walk_blocks(
        model,
        [(batches()[0], torch.zeros(5))],
        lambda block: visited.append(block.name),
        forward=lambda net, batch: F.mse_loss(net(batch[0]), batch[1]),
    )
    assert len(visited) == 3


def test_forward_comes_back_after_an_error():
    model = Net()

    def visit(block):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        walk_blocks(model, batches(), visit)
    assert all("forward" not in layer.__dict__ for layer in model.layers)


def test_chains_are_the_outermost_lists_of_one_class():
    nested = nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block()))
    assert list(find_chains(nested)) == [""] and len(find_chains(nested)[""]) == 2
    mixed = nn.Sequential(nn.Sequential(Block(), Block()), nn.Linear(4, 4))
    assert list(find_chains(mixed)) == ["0"]
    with pytest.raises(StructureError, match="no list of blocks"):
        find_chains(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))


def test_refusals_name_the_culprit():
    with pytest.raises(ActivationError, match="No calibration batches"):
        walk_blocks(Net(), [], lambda block: None)
    changed = Net(hand=lambda block, x, i: block(2 * x))
    with pytest.raises(StructureError, match="layers by handing one hidden state.*block 1 is given"):
        walk_blocks(changed, batches(), lambda block: None)
    with pytest.raises(StructureError, match="did not run the 3 blocks of layers"):
        walk_blocks(Net(), batches(), lambda block: None, forward=lambda net, batch: net.stem(batch))
    broken = Net()
    with torch.no_grad():
        broken.layers[1].up.weight.fill_(torch.nan)
    with pytest.raises(ActivationError, match="layers.1 puts out values that are not finite"):
        walk_blocks(broken, batches(), lambda block: None)


def test_norms_and_hessians_are_those_of_the_inputs():
    model, found = Net(), {}

    def visit(block):
        if block.index == 0:
            for kind in ("norms", "hessians"):
                found[kind] = {name: one.values[0] for name, one in measure_inputs(block, kind).items()}

    walk_blocks(model, batches(), visit)
    with torch.no_grad():
        x = model.stem(torch.cat([batch.flatten(0, -2) for batch in batches()]))
        h = F.relu(model.layers[0].up(x))
    assert list(found["norms"]) == ["up.weight", "down.weight"]
    for name, rows in (("up.weight", x), ("down.weight", h)):
        torch.testing.assert_close(found["norms"][name], rows.norm(dim=0))
        torch.testing.assert_close(found["hessians"][name], 2 / len(rows) * rows.T @ rows)


class Ways(nn.Module):
    """Ways to multiply by a parameter."""

    def __init__(self) -> None:
        super().__init__()
        make = lambda *shape: nn.Parameter(torch.randn(*shape))  # noqa: E731
        self.linear, self.transposed, self.left = make(3, 4), make(4, 3), make(3, 4)
        self.stack, self.sliced, self.unused = make(2, 4, 3), make(2, 3, 4), make(3, 4)
        self.grouped = make(2, 3, 4)

    def forward(self, x: torch.Tensor) -> None:
        F.linear(x, self.linear)
        torch.addmm(torch.zeros(3), x, self.transposed)
        self.left @ x.T
        torch.bmm(torch.stack([x, 2 * x]), self.stack)
        F.linear(x[:2], self.sliced[1])
        torch._grouped_mm(x, self.grouped.mT, offs=torch.tensor([2, 5], dtype=torch.int32))


def test_products_tell_the_axis_of_inputs_and_the_matrix_of_a_stack():
    model, x, seen = Ways(), torch.randn(5, 4), {}
    with (
        torch.no_grad(),
        observe_products(
            dict(model.named_parameters()), lambda one: seen.setdefault(one.name, []).append(one)
        ),
    ):
        model(x)
    assert {name: (each[0].axis, [one.index for one in each]) for name, each in seen.items()} == {
        "linear": (1, [None]),
        "transposed": (0, [None]),
        "left": (1, [None]),
        "stack": (1, [0, 1]),
        "sliced": (2, [1]),
        "grouped": (2, [0, 1]),
    }
    torch.testing.assert_close(torch.cat([one.rows for one in seen["grouped"]]), x)
    for name in ("linear", "transposed", "left"):
        torch.testing.assert_close(seen[name][0].rows, x)
    torch.testing.assert_close(seen["stack"][1].rows, 2 * x)
    torch.testing.assert_close(seen["sliced"][0].rows, x[:2])
    with torch.inference_mode():
        assert list(product_matrices(model, lambda: model(x))) == list(seen)


def test_views_are_outputs_by_inputs_and_join_again():
    model = Ways()
    found = product_matrices(model, lambda: model(torch.randn(5, 4)))
    for one in found.values():
        views = one.views()
        assert all(view.shape == (3, 4) for view in views)
        assert torch.equal(one.joined([view > 0 for view in views]), one.parameter > 0)
    found["transposed"].views()[0][2].zero_()
    assert (model.transposed[:, 2] == 0).all() and (model.transposed[:, :2] != 0).all()


def test_attention_is_seen_through_its_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    found = product_matrices(layer, lambda: layer(torch.randn(2, 3, 8)))
    assert set(found) == {
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    }


class Experts(nn.Module):
    """Three experts in a stack, of which a router sends every row to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts, self.spare = nn.Linear(4, 3), nn.Module(), nn.Linear(4, 4)
        self.experts.up = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.router(x)
        return x + F.linear(x, self.experts.up[0])


def test_routers_are_left_out_and_idle_experts_measure_zero():
    model, found = nn.Sequential(Experts(), Experts()), {}
    walk_blocks(model, [torch.randn(5, 4)], lambda block: found.update(measure_inputs(block, "norms")))
    assert set(found) == {"experts.up", "spare.weight"}
    used, *idle = found["experts.up"].values
    assert (
        bool((used > 0).all()) and not torch.stack(idle).any() and not found["spare.weight"].values[0].any()
    )
    assert set(chain_matrices(model, torch.randn(5, 4), lambda net, x: net(x))) == {
        f"{i}.{name}" for i in (0, 1) for name in ("experts.up", "spare.weight")
    }


def test_a_block_that_is_mostly_out_of_reach_is_refused():
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.scale = nn.Conv1d(4, 4, 3, padding=1), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x.T).T + self.scale(x[:, :2]).sum()

    model = nn.Sequential(Convolution(), Convolution())
    with pytest.raises(StructureError, match=r"only 8% of the weights of 0 .*conv.weight"):
        walk_blocks(model, [torch.randn(5, 4)], lambda block: measure_inputs(block, "norms"))
