"""Comparisons: verdicts, refusals, margins."""

from __future__ import annotations

import pytest

from zoo.errors import ConfigError, TaskError
from zoo.harness.compare import compare, compare_records, comparison_table
from zoo.harness.records import MetricValue, Samples
from zoo.harness.runner import evaluate
from zoo.harness.tasks import TaskResult


def with_samples(record, values, **changes):
    mean = sum(values) / len(values)
    fields = {
        "samples": {"accuracy": Samples.encode(values)},
        "metrics": {"accuracy": MetricValue(value=mean)},
        "n": len(values),
    }
    return record.model_copy(update=fields | changes)


@pytest.fixture
def base(toy_zoo):
    return evaluate("toy/dense-mlp")[0]


def test_two_models_and_the_twin_alone_agree(toy_zoo):
    [two] = compare(["toy/dense-mlp", "toy/tenth-mlp"])
    [alone] = compare("toy/tenth-mlp")
    assert two == alone
    assert (two.model, two.reference, two.task) == ("toy/tenth-mlp", "toy/dense-mlp", "toy/accuracy")
    assert two.difference.value == pytest.approx(two.value - two.reference_value)
    assert two.difference.n == 400
    assert two.verdict == "worse"  # nine of ten weights gone, without training
    assert two.within_margin is None


@pytest.mark.parametrize(
    ("gained", "lost", "direction", "verdict"),
    [
        (40, 5, 1, "better"),
        (5, 40, 1, "worse"),
        (5, 40, -1, "better"),
        (12, 10, 1, "no difference seen"),
        (0, 0, 1, "no difference seen"),
    ],
)
def test_verdicts(base, gained, lost, direction, verdict):
    reference = [0.0] * gained + [1.0] * lost + [1.0] * (200 - gained - lost)
    other = [1.0] * gained + [0.0] * lost + [1.0] * (200 - gained - lost)
    records = [with_samples(base, reference), with_samples(base, other, model="toy/other")]
    [got] = compare_records(records, "accuracy", direction)
    assert got.verdict == verdict
    assert got.difference.value == pytest.approx((gained - lost) / 200)
    assert got.difference.detectable >= 6 / 200


def test_margin_needs_the_whole_interval(base):
    reference, other = [1.0] * 200, [1.0] * 190 + [0.0] * 10
    records = [with_samples(base, reference), with_samples(base, other)]
    interval = compare_records(records, "accuracy", 1)[0].difference
    assert compare_records(records, "accuracy", 1, margin=-interval.low + 1e-9)[0].within_margin is True
    assert compare_records(records, "accuracy", 1, margin=-interval.low - 1e-9)[0].within_margin is False
    # where lower is better, the same difference is a gain
    assert compare_records(records, "accuracy", -1, margin=0.0)[0].within_margin is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_set": "others"}, "sample set: 'others' and 'toy-400'"),
        ({"task_version": "2"}, "version of the task"),
        ({"task": "toy/loss"}, "different samples"),
        ({"n": 3}, "number of samples"),
        ({"samples": {}}, "no per-sample 'accuracy'"),
    ],
)
def test_other_samples_are_refused(base, changes, message):
    with pytest.raises(TaskError, match=message):
        compare_records([base, base.model_copy(update=changes)], "accuracy", 1)


def test_refused_requests(toy_zoo, toy):
    with pytest.raises(ConfigError, match="no dense twin"):
        compare("toy/dense-mlp")
    with pytest.raises(ConfigError, match="margin"):
        compare("toy/half-mlp", margin=-0.1)
    with pytest.raises(ConfigError, match="margin"):
        compare("toy/half-mlp", margin=float("nan"))
    with pytest.raises(ConfigError, match="confidence"):
        compare("toy/half-mlp", confidence=95.0)
    with pytest.raises(TaskError, match="'nll'"):
        compare("toy/half-mlp", metric="nll")
    with pytest.raises(TaskError, match="name the task"):
        compare([toy.MLP(), toy.MLP()])


def test_metrics_that_are_no_mean_over_samples_are_refused(toy_zoo, toy):
    class Aggregate(toy.Accuracy):
        name = "toy/aggregate"

        def evaluate(self, model, *, progress=None):
            return TaskResult(super().evaluate(model).metrics, {}, 400)

    with pytest.raises(TaskError, match="metrics with samples: none"):
        compare(["toy/dense-mlp", "toy/half-mlp"], Aggregate())


def test_lower_is_better_through_the_task(toy_zoo):
    [got] = compare(["toy/tenth-mlp", "toy/dense-mlp"], "toy/loss")
    assert got.direction == -1
    assert got.difference.value < 0
    assert got.verdict == "better"


def test_the_table_names_what_could_have_been_seen(toy_zoo):
    table = comparison_table(compare("toy/half-mlp", margin=0.5))
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["within margin"] == "ok"
    assert float(row["detectable"]) > 0
    assert "95% interval" in row
