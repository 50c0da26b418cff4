"""Molecules of $ZOO_DATA (`molecules/`) as graphs, read from SMILES, in padded batches."""

from __future__ import annotations

import csv
import re
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zoo.errors import DataError
from zoo.tables import table_file

ATOMS = ("C", "N", "O", "S", "F", "Cl", "Br", "P", "I", "other")
STEPS = 8  # of the random walk whose returns tell where a node is
_TOKEN = re.compile(r"\[([^\]]+)\]|(Br|Cl|[BCNOPSFI]|[bcnops])|(%\d\d|\d)|([-=#:/\\$~])|([().])")
_BRACKET = re.compile(r"\d*(\*|[A-Z][a-z]?|[a-z][a-z]?)@*[A-Z0-9]*(H\d*)?([+-]+\d*)?")
_ORDERS = {"-": 1, "=": 2, "#": 3, ":": 1.5, "$": 4}


class Molecule(NamedTuple):
    """Elements [n] by their place in `ATOMS`, whether aromatic [n], charge [n], bonds [b, 2], orders [b]."""

    elements: list[int]
    aromatic: list[bool]
    charge: list[int]
    bonds: list[tuple[int, int]]
    orders: list[float]


def read_smiles(text: str) -> Molecule:
    """Atoms and bonds of a SMILES string; hydrogens, stereo marks and isotopes are left out.

    Raises:
        DataError: what is no SMILES: unknown signs, an open ring or branch.
    """
    found = Molecule([], [], [], [], [])
    rings: dict[str, tuple[int, float]] = {}
    branches: list[int] = []
    last, order, place = -1, 0.0, 0

    def bond(first: int, second: int, given: float) -> None:
        both = found.aromatic[first] and found.aromatic[second]
        found.bonds.append((first, second))
        found.orders.append(given or (1.5 if both else 1.0))

    while place < len(text):
        token = _TOKEN.match(text, place)
        if token is None:
            raise DataError(f"{text!r} is no SMILES: {text[place]!r} at position {place}")
        place = token.end()
        bracket, atom, ring, sign, mark = token.groups()
        if bracket or atom:
            parts = _BRACKET.match(bracket or atom)
            symbol = parts[1] if parts else "*"
            charge = (parts[3] or "") if parts and bracket else ""
            if bracket and symbol == "H":
                continue
            name = symbol.capitalize()
            found.elements.append(ATOMS.index(name) if name in ATOMS else len(ATOMS) - 1)
            found.aromatic.append(symbol[0].islower())
            found.charge.append(1 if "+" in charge else -1 if "-" in charge else 0)
            if last >= 0:
                bond(last, len(found.elements) - 1, order)
            last, order = len(found.elements) - 1, 0.0
        elif ring:
            if ring in rings:
                other, given = rings.pop(ring)
                bond(other, last, order or given)
            else:
                rings[ring] = (last, order)
            order = 0.0
        elif sign:
            order = float(_ORDERS.get(sign, 0.0))
        elif mark == "(":
            branches.append(last)
        elif mark == ")":
            if not branches:
                raise DataError(f"{text!r} is no SMILES: a branch is closed that was never open")
            last = branches.pop()
        else:
            last = -1
    if rings or branches:
        raise DataError(f"{text!r} is no SMILES: a ring or branch is left open")
    return found


class Graphs(NamedTuple):
    """Padded graphs: features [g, n, f], weights of edges [g, n, n], which nodes there are [g, n], labels
    [g]."""

    features: Float[Tensor, "g n f"]
    edges: Float[Tensor, "g n n"]
    there: Bool[Tensor, "g n"]
    labels: Int[Tensor, " g"]

    def part(self, chosen: Tensor) -> Graphs:
        """Some graphs, no wider than the largest of them."""
        widest = int(self.there[chosen].sum(1).max())
        features, edges, there = self.features[chosen], self.edges[chosen], self.there[chosen]
        return Graphs(
            features[:, :widest], edges[:, :widest, :widest], there[:, :widest], self.labels[chosen]
        )


def features_of(molecule: Molecule) -> tuple[Tensor, Tensor]:
    """Features [n, len(ATOMS) + 3 + STEPS] and bond orders [n, n]: element, aromatic, charge, degree, and the
    chance that a random walk of 1, 2 ... steps returns."""
    n = len(molecule.elements)
    edges = torch.zeros(n, n)
    for (a, b), order in zip(molecule.bonds, molecule.orders, strict=True):
        edges[a, b] = edges[b, a] = order
    element = torch.nn.functional.one_hot(torch.tensor(molecule.elements), len(ATOMS)).float()
    own = torch.tensor([molecule.aromatic, molecule.charge]).float().T
    degree = (edges > 0).float().sum(1, keepdim=True)
    step = (edges > 0).float() / degree.clamp(min=1)
    walk, returns = torch.eye(n), []
    for _ in range(STEPS):
        walk = walk @ step
        returns.append(walk.diagonal())
    return torch.cat([element, own, degree / 4, torch.stack(returns, 1)], 1), edges


@cache
def bbbp(largest: int = 48) -> Graphs:
    """BBBP of MoleculeNet: 2,050 drugs, whether they pass the blood-brain barrier; those of at most so many
    atoms other than hydrogen.

    Raises:
        DataError: the file is not at hand.
    """
    with table_file("molecules/BBBP.csv").open(newline="") as file:
        rows = [(read_smiles(row["smiles"]), int(row["p_np"])) for row in csv.DictReader(file)]
    kept = [(molecule, label) for molecule, label in rows if 2 <= len(molecule.elements) <= largest]
    features = torch.zeros(len(kept), largest, len(ATOMS) + 3 + STEPS)
    edges, there = torch.zeros(len(kept), largest, largest), torch.zeros(len(kept), largest, dtype=torch.bool)
    for number, (molecule, _) in enumerate(kept):
        found, between = features_of(molecule)
        n = len(found)
        features[number, :n], edges[number, :n, :n], there[number, :n] = found, between, True
    return Graphs(features, edges, there, torch.tensor([label for _, label in kept]))
