"""A ticket of one graph made ready for another."""

from __future__ import annotations

import copy

from torch_geometric.data import Data

from zoo.graph.edges import fingerprint
from zoo.graph.method import reinitialised
from zoo.graph.models import GAT, GraphModel
from zoo.graph.ticket import EdgeTicket
from zoo.shared.masks import masks_of, set_masks
from zoo.training.transfer import take_over


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
        set_masks(start, masks)
        new = take_over(start, fresh, masks.sparsity() if masks is not None else None)
        changes.append(
            f"the graph has {inputs} features and {classes} classes, the model {start.in_channels} and "
            f"{start.out_channels}: {', '.join(new)} are new; weights and masks are kept of the rest"
        )
        start = fresh
    elif masks is not None:
        set_masks(start, masks)
    ticket = model.ticket
    if ticket is not None and ticket.graph != fingerprint(data.edge_index, int(data.num_nodes)):
        nodes = int(data.num_nodes)
        keep = ticket.rescored(data.edge_index, nodes, self_loops=isinstance(start, GAT))
        start.ticket = EdgeTicket.draw(data.edge_index, nodes, keep)
        changes.append(
            f"the edge ticket is of another graph: a new one is drawn by degree, "
            f"{int(start.ticket.keep.sum())} of {len(start.ticket.keep)} entries"
        )
    else:
        start.ticket = copy.deepcopy(ticket)
    return start, changes
