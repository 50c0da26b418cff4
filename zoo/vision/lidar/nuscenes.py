"""nuScenes' official detection score: AP by the distance of centres, five errors of true positives, NDS.

As the development kit computes it (Caesar et al., CVPR 2020; configuration `detection_cvpr_2019`), whose
package pins numpy below 2 and is not needed here. Boxes are matched on the ground, best score first, at 0.5,
1, 2 and 4 metres; errors are means over the recalls from 10 % on of the matches at 2 metres. Boxes beyond a
class's range and truths without a point count for nothing. Truths in bicycle racks, which the kit leaves out,
are the caller's to leave out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from zoo.errors import DataError

RANGES = {
    **dict.fromkeys(("car", "truck", "bus", "trailer", "construction_vehicle"), 50.0),
    **dict.fromkeys(("pedestrian", "motorcycle", "bicycle"), 40.0),
    **dict.fromkeys(("traffic_cone", "barrier"), 30.0),
}
DISTANCES = (0.5, 1.0, 2.0, 4.0)
MATCH = 2.0  # metres, for the errors
LEAST = 0.1  # recall and precision from which on AP counts
RECALLS = np.linspace(0, 1, 101)
ERRORS = ("trans_err", "scale_err", "orient_err", "vel_err", "attr_err")
# Of what has no front, or does not move.
UNDEFINED = {"traffic_cone": ("attr_err", "vel_err", "orient_err"), "barrier": ("attr_err", "vel_err")}


@dataclass(frozen=True, eq=False)
class Boxes:
    """Labelled or found boxes of one frame, around the vehicle.

    Attributes:
        boxes: [n, 7]: x, y, z in metres, length, width, height, yaw in radians.
        names: class of each, see `RANGES`.
        scores: of found boxes.
        points: points in each of the labelled boxes; without them all count.
        velocity: [n, 2] in metres a second; NaN where it is unknown.
        attributes: `vehicle.moving` and its like; "" where there is none.
    """

    boxes: np.ndarray
    names: Sequence[str]
    scores: np.ndarray | None = None
    points: np.ndarray | None = None
    velocity: np.ndarray | None = None
    attributes: Sequence[str] = field(default_factory=tuple)

    def of(self, name: str) -> list[tuple[np.ndarray, np.ndarray, str, float]]:
        """Box, velocity, attribute and score of those of a class that count."""
        count = len(self.boxes)
        reach = np.hypot(*np.asarray(self.boxes)[:, :2].T) < RANGES[name] if count else np.zeros(0, bool)
        seen = reach if self.points is None else reach & (np.asarray(self.points) > 0)
        velocity = np.full((count, 2), np.nan) if self.velocity is None else self.velocity
        attributes = self.attributes or [""] * count
        scores = np.full(count, np.nan) if self.scores is None else self.scores
        chosen = [n for n in range(count) if seen[n] and self.names[n] == name]
        return [(self.boxes[n], velocity[n], attributes[n], float(scores[n])) for n in chosen]


def nuscenes_scores(
    found: Sequence[Boxes], truths: Sequence[Boxes], classes: Sequence[str] = tuple(RANGES)
) -> dict[str, float]:
    """`NDS`, `mAP`, the mean errors `mATE`, `mASE`, `mAOE`, `mAVE`, `mAAE`, `ap/CLASS` and `ERROR/CLASS`, in
    fractions, metres and radians.

    Args:
        found: of each frame, with scores.
        truths: of each frame.
        classes: over which means are taken; officially all ten.

    Raises:
        DataError: another number of frames, an unknown class, or found boxes without scores.
    """
    if len(found) != len(truths):
        raise DataError(f"{len(found)} frames of found boxes for {len(truths)} of labelled ones")
    if unknown := [name for name in classes if name not in RANGES]:
        raise DataError(f"nuScenes detects {', '.join(RANGES)}; received {unknown[0]!r}")
    if any(one.scores is None for one in found):
        raise DataError("found boxes need scores")
    result: dict[str, float] = {}
    for name in classes:
        curves = {least: _curves(found, truths, name, least) for least in DISTANCES}
        result[f"ap/{name}"] = float(np.mean([_ap(precision) for precision, _, _ in curves.values()]))
        _, confidence, errors = curves[MATCH]
        for error in ERRORS:
            undefined = error in UNDEFINED.get(name, ())
            result[f"{error}/{name}"] = math.nan if undefined else _mean_error(confidence, errors[error])
    means = {error: _nanmean([result[f"{error}/{name}"] for name in classes]) for error in ERRORS}
    result |= dict(zip(("mATE", "mASE", "mAOE", "mAVE", "mAAE"), means.values(), strict=True))
    result["mAP"] = float(np.mean([result[f"ap/{name}"] for name in classes]))
    rights = sum(max(0.0, 1 - value) for value in means.values())
    return result | {"NDS": (len(ERRORS) * result["mAP"] + rights) / (2 * len(ERRORS))}


def _curves(
    found: Sequence[Boxes], truths: Sequence[Boxes], name: str, least: float
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Precision, confidence and errors at each of `RECALLS`; zeros and ones where nothing was matched."""
    frames = [truth.of(name) for truth in truths]
    total = sum(map(len, frames))
    guesses = [(one[3], place, one) for place, frame in enumerate(found) for one in frame.of(name)]
    order = sorted(range(len(guesses)), key=lambda n: (guesses[n][0], n), reverse=True)  # as officially
    taken: set[tuple[int, int]] = set()
    right, measured = np.zeros(len(order)), []
    for rank, n in enumerate(order):
        score, place, guess = guesses[n]
        gaps = [
            math.inf if (place, t) in taken else float(np.hypot(*(guess[0][:2] - truth[0][:2])))
            for t, truth in enumerate(frames[place])
        ]
        if gaps and min(gaps) < least:
            best = int(np.argmin(gaps))
            taken.add((place, best))
            right[rank] = 1
            measured.append((score, _errors(guess, frames[place][best], name)))
    if not measured:
        return np.zeros(101), np.zeros(101), {error: np.ones(101) for error in ERRORS}
    recall = np.cumsum(right) / total
    precision = np.interp(RECALLS, recall, np.cumsum(right) / np.arange(1, len(right) + 1), right=0)
    confidence = np.interp(RECALLS, recall, [guesses[n][0] for n in order], right=0)
    scores = [score for score, _ in measured]
    errors = {}
    for error in ERRORS:
        mean = _running_mean(np.array([values[error] for _, values in measured]))
        errors[error] = np.interp(confidence[::-1], scores[::-1], mean[::-1])[::-1]
    return precision, confidence, errors


def _errors(
    guess: tuple[np.ndarray, np.ndarray, str, float],
    truth: tuple[np.ndarray, np.ndarray, str, float],
    name: str,
) -> dict[str, float]:
    size, true_size = guess[0][3:6], truth[0][3:6]
    shared = float(np.minimum(size, true_size).prod())
    period = math.pi if name == "barrier" else 2 * math.pi
    turn = (float(truth[0][6] - guess[0][6]) + period / 2) % period - period / 2
    return {
        "trans_err": float(np.hypot(*(guess[0][:2] - truth[0][:2]))),
        "scale_err": 1 - shared / float(size.prod() + true_size.prod() - shared),
        "orient_err": abs(turn),
        "vel_err": float(np.hypot(*(guess[1] - truth[1]))),
        "attr_err": math.nan if not truth[2] else float(guess[2] != truth[2]),
    }


def _running_mean(values: np.ndarray) -> np.ndarray:
    """The mean of the known values so far; 0 before the first, 1 throughout if none is known."""
    known = ~np.isnan(values)
    if not known.any():
        return np.ones(len(values))
    counts = np.cumsum(known)
    return np.where(counts > 0, np.nancumsum(values) / np.maximum(counts, 1), 0.0)


def _ap(precision: np.ndarray) -> float:
    rest = precision[round(100 * LEAST) + 1 :] - LEAST
    return float(np.maximum(rest, 0).mean() / (1 - LEAST))


def _mean_error(confidence: np.ndarray, error: np.ndarray) -> float:
    first, reached = round(100 * LEAST) + 1, np.flatnonzero(confidence)
    last = int(reached[-1]) if len(reached) else 0
    return 1.0 if last < first else float(error[first : last + 1].mean())


def _nanmean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
