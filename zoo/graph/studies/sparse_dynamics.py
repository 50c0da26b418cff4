"""`zoo reproduce sparse-dynamics`: models of a pusher with few ReLUs, and control by a program or by
samples."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from zoo.graph.methods.planning import Goal, Step, plan, sampled
from zoo.graph.methods.sparse_dynamics import FoldedReLU, SparseDynamics
from zoo.shared.structure.relatives import seeded
from zoo.shared.train import Job, Recipe
from zoo.studies.cells import CellCache
from zoo.studies.digests import code_digest
from zoo.studies.figures import Columns, Curves
from zoo.studies.options import StudyOptions
from zoo.studies.study import BAR, Arm, Claim, Study, above
from zoo.studies.view import Row, Value

FULL, LEARNED, MAGNITUDE, RANDOM = "all 64 ReLUs", "learned", "by magnitude", "by chance"
CEM, MPPI, SHOOTING = "CEM, 64 ReLUs", "MPPI, 64 ReLUs", "random shooting, 64 ReLUs"
SPARSE, TRUE = "CEM, 4 ReLUs", "CEM, true dynamics"
REACH = 0.2  # between the middles of pusher and blocks that touch
BOUND = 0.15  # of a move


def mip(relus: int) -> str:
    """Name of the arm that plans by a program."""
    return f"program, {relus} ReLU{'s' * (relus > 1)}"


@dataclass(frozen=True)
class DynamicsOptions(StudyOptions):
    """Options of the experiment.

    Args:
        seeds: how many, from 0.
        relus: that are left.
        planned: ReLUs of the models with which programs are solved.
        epochs: of each of three stages.
        starts: of closed loops.
        steps: of a closed loop.
        horizon: of a plan.
    """

    seeds: int = 5
    relus: tuple[int, ...] = (1, 4, 8)
    planned: tuple[int, ...] = (1, 4)
    epochs: int = 4
    starts: int = 3
    steps: int = 7
    horizon: int = 5


def moved(state: Float[Tensor, "*batch 5"], u: Float[Tensor, "*batch 1"]) -> Float[Tensor, "*batch 5"]:
    """A pusher on a line moves by u and pushes a block, which pushes another; blocks slide on, each step half
    as far. State: places of pusher and blocks, and how far the blocks slide."""
    p, a, b, slide_a, slide_b = state.unbind(-1)
    pusher = p + u[..., 0]
    first = torch.maximum(a + slide_a, pusher + REACH)
    second = torch.maximum(b + slide_b, first + REACH)
    return torch.stack([pusher, first, second, 0.5 * (first - a), 0.5 * (second - b)], -1)


def drawn_states(count: int, generator: torch.Generator) -> Float[Tensor, "count 5"]:
    """Pusher, block, block, in this order, and slow blocks."""
    r = torch.rand(count, 5, generator=generator)
    a = r[:, 0] + REACH + 0.3 * r[:, 1]
    return torch.stack([r[:, 0], a, a + REACH + 0.3 * r[:, 2], 0.1 * r[:, 3], 0.1 * r[:, 4]], 1)


@functools.cache
def transitions() -> TensorDataset:
    """Ten thousand moves, most of them forward: states and moves [n, 6], and changes [n, 5]."""
    generator = torch.Generator().manual_seed(0)
    state, seen, changes = drawn_states(1000, generator), [], []
    for _ in range(10):
        u = (torch.rand(1000, 1, generator=generator) * 2 - 0.7).clamp(-1, 1) * BOUND
        after = moved(state, u)
        seen.append(torch.cat([state, u], 1))
        changes.append(after - state)
        state = after
    return TensorDataset(torch.cat(seen), torch.cat(changes))


def squared(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Squared error of changes, scaled to be about one at the start."""
    return 100 * (model(batch[0]) - batch[1]).square().mean()


def trained(order: str, relus: int, options: DynamicsOptions, seed: int, cells: CellCache) -> FoldedReLU:
    """A model, trained once; with all ReLUs for as many epochs as the others in three stages."""
    key = {
        "study": "sparse-dynamics",
        "cell": order,
        "relus": relus,
        "epochs": options.epochs,
        "seed": seed,
        "code": code_digest(trained),
    }

    def compute() -> tuple[list[int], dict[str, Tensor]]:
        with seeded(seed):
            net = nn.Sequential(*perceptron_layers())
        recipe = Recipe(epochs=options.epochs, lr=3e-3, optimizer="adam", weight_decay=0.0)
        job = Job(DataLoader(transitions(), 256, shuffle=True), squared, recipe=recipe, seed=seed)
        penalty = 0.0 if relus == 64 else 0.01
        made = SparseDynamics(relus=relus, order=order, penalty=penalty).sparsify(net, job)
        return made.hyperparameters["relus_by_layer"], dict(made.model.state_dict())

    by_layer, state = cells.tensors(key, compute)
    model = FoldedReLU(6, 5, by_layer)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def perceptron_layers() -> list[nn.Module]:
    """Of the changes of a state, from it and a move: two hidden layers of 32."""
    return [nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5)]


def predicts(model: nn.Module) -> Step:
    """The dynamics of a model of changes."""
    return lambda state, u: state + model(torch.cat([state, u], -1))


def errors(model: FoldedReLU, seed: int) -> Row:
    """Root of the mean squared error after one and after ten moves."""
    generator = torch.Generator().manual_seed(1000 + seed)
    true = found = drawn_states(500, generator)
    controls = (torch.rand(500, 10, 1, generator=generator) * 2 - 0.7).clamp(-1, 1) * BOUND
    spread = []
    for t in range(10):
        true, found = moved(true, controls[:, t]), predicts(model)(found, controls[:, t])
        spread.append(float((true - found).square().mean().sqrt()))
    return {"one": spread[0], "ten": spread[-1], "relus": model.relus}


def goal_of(state: Tensor, options: DynamicsOptions, generator: torch.Generator) -> Goal:
    """Both blocks further on, apart or together; a block that is pushed too far never comes back."""
    far = torch.rand(2, generator=generator)
    first = state[1] + 0.1 + 0.3 * far[0]
    second = torch.maximum(state[2] + 0.1, first + REACH) + 0.3 * far[1]
    target = torch.stack([state[0], first, second, state[3], state[4]])
    return Goal(target, torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0]), 0.01, BOUND, options.horizon)


def closed_loop(arm: Any, options: DynamicsOptions, seed: int, seconds: float) -> Row:
    """Mean cost on the true dynamics, and seconds of a plan. `arm` plans: (state, goal, last plan, generator,
    seconds) -> moves."""
    generator = torch.Generator().manual_seed(2000 + seed)
    noise = torch.Generator().manual_seed(seed)
    costs, spent, plans = [], 0.0, 0
    for _ in range(options.starts):
        state = drawn_states(1, generator)[0]
        goal = goal_of(state, options, generator)
        last = torch.zeros(options.horizon, 1)
        states, controls = [], []
        for _ in range(options.steps):
            start = time.process_time()
            last = arm(state, goal, torch.cat([last[1:], last[-1:]]), noise, seconds)
            spent, plans = spent + time.process_time() - start, plans + 1
            state = moved(state, last[0])
            states.append(state)
            controls.append(last[0])
        costs.append(float(goal.cost(torch.stack(states), torch.stack(controls))))
    return {"cost": costs, "seconds": spent / plans}


def by_program(model: FoldedReLU) -> Any:
    """Plans by a program; the last plan goes on where the time ends before there is one."""

    def run(state: Tensor, goal: Goal, last: Tensor, noise: torch.Generator, seconds: float) -> Tensor:
        found = plan(model, state, goal, seconds=5.0, gap=1e-2)
        return last if found is None else found.controls

    return run


def by_samples(step: Step, rule: str) -> Any:
    """Plans by samples."""
    return lambda state, goal, last, noise, seconds: sampled(
        step, state, goal, last, noise, seconds=seconds, rule=rule
    )


def controls(options: DynamicsOptions, seed: int, cells: CellCache) -> list[Row]:
    """Closed loops of all arms, those by samples with the time that the largest program took."""
    found: list[Row] = []
    seconds = 0.0
    for relus in options.planned:
        made = closed_loop(by_program(trained("learned", relus, options, seed, cells)), options, seed, 0.0)
        found.append({"arm": mip(relus), **made})
        seconds = made["seconds"]
    full, sparse = trained("learned", 64, options, seed, cells), trained("learned", 4, options, seed, cells)
    for name, step, rule in (
        (CEM, predicts(full), "cem"),
        (MPPI, predicts(full), "mppi"),
        (SHOOTING, predicts(full), "random"),
        (SPARSE, predicts(sparse), "cem"),
        (TRUE, moved, "cem"),
    ):
        found.append({"arm": name, **closed_loop(by_samples(step, rule), options, seed, seconds)})
    return found


def measure(make: Any, options: DynamicsOptions, case: Row, cells: CellCache) -> Row | list[Row]:
    """Errors of a model; or costs of all ways to control."""
    if case["part"] == "control":
        return controls(options, case["seed"], cells)
    return errors(trained(make, case["level"], options, case["seed"], cells), case["seed"])


def cases(options: DynamicsOptions) -> Iterator[Row]:
    """All models of a seed, then its closed loops."""
    for seed in range(options.seeds):
        yield {"part": "model", "arm": FULL, "level": 64, "seed": seed}
        for arm in (LEARNED, MAGNITUDE, RANDOM):
            for relus in options.relus:
                if arm == LEARNED or relus == 4:
                    yield {"part": "model", "arm": arm, "level": relus, "seed": seed}
        yield {"part": "control", "arm": mip(4), "level": "closed loop", "seed": seed}


ARMS = {
    FULL: Arm("learned", flat=True),
    LEARNED: Arm("learned"),
    MAGNITUDE: Arm("magnitude"),
    RANDOM: Arm("random"),
    **{mip(relus): Arm() for relus in (1, 4)},
    **{name: Arm(control=SHOOTING) for name in (CEM, MPPI)},
    **{name: Arm() for name in (SHOOTING, SPARSE, TRUE)},
}
TEN, ONE = Value("ten", 1.0, 3, "", 2, lower=True, log=True), Value("one", 1.0, 4, lower=True)
COST = Value("cost", 1.0, 3, "", 3, lower=True)
MODEL, CONTROL = {"part": "model"}, {"part": "control"}
ERRORS = {"error of one move": ONE, "of ten": TEN}
STUDY = Study(
    "sparse-dynamics",
    "Control with dynamics of few ReLUs",
    "Ziang Liu, Genggeng Zhou, Jeff He, Tobia Marcucci, Li Fei-Fei, Jiajun Wu, Yunzhu Li: Model-Based "
    "Control with Sparse Neural Dynamics, NeurIPS 2023",
    DynamicsOptions,
    ARMS,
    cases,
    measure,
    papers=(42,),
    claims=[
        Claim(
            "8 of 64 ReLUs: the error of ten moves is at most 1.5 times that of all (logarithms)",
            BAR,
            LEARNED,
            FULL,
            -math.log(1.5),
            at=(8,),
            only=MODEL,
        ),
        Claim(
            "learned choices are better than 4 ReLUs of large weights (logarithms)",
            BAR,
            LEARNED,
            MAGNITUDE,
            at=(4,),
            only=MODEL,
        ),
        Claim(
            "learned choices are better than 4 ReLUs by chance (logarithms)",
            BAR,
            LEARNED,
            RANDOM,
            at=(4,),
            only=MODEL,
        ),
        *(
            above(mip(4), other, published="better closed loops than sampling", value=COST, only=CONTROL)
            for other in (CEM, MPPI, SHOOTING)
        ),
        above(mip(4), SPARSE, value=COST, only=CONTROL),
        above(mip(4), mip(1), published="more ReLUs, lower cost", value=COST, only=CONTROL),
    ],
    value=TEN,
    varies=("seeds", "device"),
    by=("part",),
    titles={"model": "models", "control": "closed loops"},
    tables=[
        Columns(
            "Models of the pusher", ERRORS, levels=(), heading="ReLUs", arms=(LEARNED, MAGNITUDE, RANDOM)
        ),
        Columns("Models of the pusher, nothing left out", ERRORS, arms=(FULL,)),
        Columns(
            "Closed loops",
            {"cost": COST, "seconds a plan": Value("seconds", 1.0, 2)},
            arms=(mip(1), mip(4), CEM, MPPI, SHOOTING, SPARSE, TRUE),
        ),
    ],
    plots=[
        Curves(
            "errors-{slug}",
            "Error of ten moves by ReLUs",
            "ReLUs (logarithm, base 2)",
            "error, logarithm (base 10)",
            (LEARNED, MAGNITUDE, RANDOM),
            x=lambda level: math.log2(level),
            references=(FULL,),
            log10=True,
        ),
    ],
    notes=lambda options: [
        "A pusher moves two sliding blocks on a line; the cost is the distance of the blocks from their "
        f"places, summed over {options.steps} moves, mean of {options.starts} starts. A block cannot be "
        "pulled back.",
        "Sampling has as many seconds of processor time for a plan as the program with 4 ReLUs took on "
        f"average; plans of {options.horizon} moves, HiGHS to a gap of 1 %.",
        "All models are trained for the same number of steps. Penalty, stages and rates were not tuned.",
        "After a first look the units that magnitude or chance give up are left linear instead of zero, "
        "which had killed the network, and seeds and counts of ReLUs were changed.",
    ],
)
