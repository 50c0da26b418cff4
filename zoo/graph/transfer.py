"""A ticket of one graph made ready for another."""

from __future__ import annotations

import copy
import math

import torch
from torch_geometric.data import Data

from zoo.graph.edges import fingerprint
from zoo.graph.method import reinitialised
from zoo.graph.models import GAT, GraphModel
from zoo.graph.teddy import ticket_mask
from zoo.graph.ticket import EdgeTicket
from zoo.shared.masks import MaskSet, masks_of, set_masks
from zoo.shared.masks.patterns import Unstructured


def transferred(model: GraphModel, data: Data, seed: int) -> tuple[GraphModel, list[str]]:
    """A float32 copy of `model` that fits this graph, and a line for each thing that had to change.

    Tensors whose shape fits keep their values and masks. Those that meet other features or classes are drawn
    anew with `seed` and, in a sparse model, masked at its weight sparsity by magnitude at initialisation:
    ceil(P s) of their P weights are zero. A ticket of another graph is drawn anew by TEDDY's degree score at
    the same edge sparsity.

    Args:
        model: a dense or sparse model, with its masks and ticket.
        data: the graph to train on.
        seed: of the new tensors; sets torch's seed.
    """
    inputs, classes = int(data.x.shape[1]), int(data.y.max()) + 1
    masks = masks_of(model)
    start = copy.deepcopy(model).float()
    changes = []
    if (start.in_channels, start.out_channels) != (inputs, classes):
        fresh = reinitialised(start.resized(inputs, classes), seed)
        new = _take_over(start, fresh, masks)
        changes.append(
            f"the graph has {inputs} features and {classes} classes, the model {start.in_channels} and "
            f"{start.out_channels}: {', '.join(new)} are new; weights and masks are kept of the rest"
        )
        start = fresh
    elif masks is not None:
        set_masks(start, masks)
    ticket = model.ticket
    if ticket is not None and ticket.graph != fingerprint(data.edge_index, int(data.num_nodes)):
        start.ticket = _redrawn(start, ticket, data)
        changes.append(
            f"the edge ticket is of another graph: a new one is drawn by degree, "
            f"{int(start.ticket.keep.sum())} of {len(start.ticket.keep)} entries"
        )
    else:
        start.ticket = copy.deepcopy(ticket)
    return start, changes


def _take_over(old: GraphModel, fresh: GraphModel, masks: MaskSet | None) -> list[str]:
    """Copy what fits into `fresh` and mask it all; returns the names of what is new."""
    known = dict(old.named_parameters())
    kept, new = {}, []
    for name, parameter in fresh.named_parameters():
        fits = known[name].shape == parameter.shape
        if fits:
            parameter.data.copy_(known[name].data)
        else:
            new.append(name)
        if masks is not None:
            kept[name] = masks[name].keep if fits else _by_magnitude(parameter.data, masks.sparsity())
    if masks is not None:
        found = MaskSet(kept)
        found.apply_(fresh)
        set_masks(fresh, found)
    return new


def _by_magnitude(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    return Unstructured().keep(weight.abs(), weight.numel() - math.ceil(weight.numel() * sparsity))


def _redrawn(model: GraphModel, ticket: EdgeTicket, data: Data) -> EdgeTicket:
    """TEDDY's mask on another graph, at the share of dropped entries of `ticket` (GAT's self-loops not
    counted).
    """
    nodes = int(data.num_nodes)
    sparsity = 1 - int(ticket.keep.sum()) / len(ticket.keep)
    entries = data.edge_index.shape[1]
    loops = isinstance(model, GAT)
    of_all = sparsity * entries / (entries + nodes) if loops else sparsity
    keep = ticket_mask(data.edge_index, nodes, of_all, add_self_loops=loops)
    return EdgeTicket.draw(data.edge_index, nodes, keep)
