from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.observed import ProgressReport
from finetune_operator.progress_protocol import MAX_BODY_BYTES, InvalidReport, parse_report


def parse(status: object) -> ProgressReport:
    return parse_report(json.dumps({"trainerStatus": status}).encode(), received_at=5.0, attempt=2)


def test_what_transformers_sends_is_read() -> None:
    report = parse(
        {
            "lastUpdatedTime": "2026-01-01T00:00:00+00:00",
            "progressPercentage": 12,
            "estimatedRemainingSeconds": 340,
            "metrics": [
                {"name": "loss", "value": "1.25"},
                {"name": "epoch", "value": "0.123"},
                {"name": "current_step", "value": "3"},
                {"name": "total_steps", "value": "30"},
                {"name": "current_epoch", "value": "0.12"},
            ],
        }
    )
    assert report == ProgressReport(5.0, 2, 12, 340, {"loss": 1.25, "epoch": 0.12, "step": 3.0, "total_steps": 30.0})


def test_everything_is_optional() -> None:
    assert parse({}) == ProgressReport(5.0, 2)


@pytest.mark.parametrize(
    ("value", "percent"),
    [(50, 50), (50.9, 50), ("50", 50), (-1, 0), (1e300, 100), ("nan", None), ("inf", None), (None, None), (True, None),
     ([], None), ("x", None), (10**400, None), ("9" * 65, None)],
)  # fmt: skip
def test_percent_is_bounded_or_left_out(value: object, percent: int | None) -> None:
    assert parse({"progressPercentage": value}).percent == percent


@pytest.mark.parametrize(("value", "seconds"), [(-5, 0), (1.7, 1), (1e300, 10 * 365 * 86_400), ("nan", None)])
def test_remaining_seconds_are_bounded_or_left_out(value: object, seconds: int | None) -> None:
    assert parse({"estimatedRemainingSeconds": value}).remaining_seconds == seconds


@pytest.mark.parametrize("name", ["step", "current_step", "total_steps"])
@pytest.mark.parametrize("value", [-1, 2**53 + 2, 1e30, str(10**20)])
def test_a_step_that_no_job_takes_is_left_out(name: str, value: object) -> None:
    metrics = [{"name": name, "value": value}, {"name": "loss", "value": 1e30}]
    assert parse({"metrics": metrics}).metrics == {"loss": 1e30}


def test_a_metric_that_is_no_number_costs_only_itself() -> None:
    metrics = [
        {"name": "nan", "value": "nan"},
        {"name": "inf", "value": "Infinity"},
        {"name": "text", "value": "fast"},
        {"name": "x" * 64, "value": 1},
        {"name": "", "value": 1},
        {"name": 5, "value": 1},
        {"name": "flag", "value": True},
        {"value": 1},
        {"name": "unknown_metric", "value": 2},
    ]
    assert parse({"metrics": metrics}).metrics == {"unknown_metric": 2.0}


def test_the_number_of_metrics_is_bounded() -> None:
    assert len(parse({"metrics": [{"name": f"m{i}", "value": i} for i in range(500)]}).metrics) == 64


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe", b"[]", b"5", b'"x"', b"{}", b'{"trainerStatus": 5}', b'{"trainerStatus": null}',
     b'{"trainerStatus": {"metrics": {}}}', b'{"trainerStatus": {"metrics": [5]}}', b"[" * 60_000,
     b" " * (MAX_BODY_BYTES + 1)],
)  # fmt: skip
def test_another_shape_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidReport):
        parse_report(body, received_at=0.0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["name", "value", "x"]), inner),
    max_leaves=12,
)


@given(
    st.fixed_dictionaries({}, optional={"progressPercentage": JSON, "estimatedRemainingSeconds": JSON, "metrics": JSON})
)
def test_whatever_arrives_is_refused_or_finite(status: dict[str, object]) -> None:
    try:
        report = parse(status)
    except InvalidReport:
        return
    assert report.percent is None or 0 <= report.percent <= 100
    assert report.remaining_seconds is None or report.remaining_seconds >= 0
    assert all(math.isfinite(value) for value in report.metrics.values())
