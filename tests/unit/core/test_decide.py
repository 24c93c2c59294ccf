"""Properties of decisions, whatever is observed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_operator import status as statuses
from finetune_operator.api.v1alpha1 import AttemptsStatus, FineTuneJobStatus
from finetune_operator.constants import ANNOTATION_RETRY, Phase, Reason
from finetune_operator.decide import CreateAttempt, Decision, DeleteAttempt, Need, View, decide
from finetune_operator.decide.retries import BACKOFF_LIMIT_SECONDS, _backoff, _smaller_micro_batch
from finetune_operator.observed import Observed, ObservedAttempt, ObservedPod, ProgressReport
from finetune_operator.state import Fact, JobState, Preparation
from finetune_operator.times import rfc3339
from tests.builders import NOW, attempt, condition, container, observed, observed_job, plan, pod, said, status

PREPARED = Preparation(Fact("True", "Accepted"), Fact("True", "Fits"), plan())

PHASES = st.sampled_from(
    ["", Phase.PENDING, Phase.QUEUED, Phase.STARTING, Phase.RUNNING, Phase.RESTARTING, Phase.SUSPENDED]
)
TERMINAL = st.sampled_from(sorted(Phase.TERMINAL))
TIMES = st.none() | st.floats(NOW - 2000, NOW + 2000)


@st.composite
def children(draw: st.DrawFn) -> tuple[ObservedAttempt | ObservedPod, ...]:
    found: list[ObservedAttempt | ObservedPod] = []
    for number in draw(st.sets(st.integers(1, 4), max_size=4)):
        held = draw(st.sets(st.sampled_from(["Created", "Running", "Succeeded", "Failed"])))
        found.append(
            attempt(
                number,
                *held,
                deleting=draw(st.booleans()),
                suspended=draw(st.booleans()),
                owner_uid=draw(st.sampled_from([attempt().owner_uid, "somebody else"])),
            )
        )
        indices: list[int | str] = ["master", 0]
        for index in draw(st.sets(st.sampled_from(indices), max_size=2)):
            code = draw(st.sampled_from([None, 0, 65, 69, 71, 75, 137]))
            waiting = draw(st.sampled_from(["", "ErrImagePull", "InvalidImageName"]))
            one = container("waiting", reason=waiting) if waiting else container(code=code)
            gone_by = draw(st.sampled_from([None, NOW - 100, NOW + 5]))
            message = said(code) if code else ""
            one = replace(one, message=message or one.message)
            found.append(pod(index, one, number=number, deleting=gone_by is not None, gone_by=gone_by))
    return tuple(found)


@st.composite
def views(draw: st.DrawFn, phases: st.SearchStrategy[str] = PHASES) -> View:
    when = draw(TIMES)
    known = FineTuneJobStatus(
        observed_generation=draw(st.integers(0, 2)),
        phase=draw(phases),
        plan=draw(st.none() | st.just(plan())),
        attempts=AttemptsStatus(
            current=draw(st.integers(0, 4)),
            retries=draw(st.integers(0, 3)),
            next_attempt_at=None if when is None else rfc3339(when),
        ),
        start_time=draw(st.none() | st.just(rfc3339(NOW - 500))),
        completion_time=draw(st.none() | st.just(rfc3339(NOW - 100))),
    )
    policy = {
        "suspend": draw(st.booleans()),
        "retries": draw(st.integers(0, 3)),
        "activeDeadlineSeconds": draw(st.none() | st.integers(1, 1000)),
        "ttlSecondsAfterFinished": draw(st.none() | st.integers(0, 200)),
    }
    job = observed_job(
        generation=draw(st.integers(1, 2)), status=known, deleting=draw(st.integers(0, 9)) == 0, runPolicy=policy
    )
    report = draw(st.none() | st.builds(ProgressReport, st.floats(NOW - 3000, NOW), st.integers(1, 4)))
    return View(
        observed=observed(job, *draw(children()), report=report),
        status=known,
        now=NOW,
        reliable_since=NOW - draw(st.floats(0, 5000)),
        preparation=draw(st.none() | st.just(PREPARED)),
        confirmed=draw(st.booleans()),
    )


def conclude(view: View) -> Decision:
    """A decision with everything that it asked for."""
    decision = decide(view)
    for _ in range(3):
        if decision.need is None:
            return decision
        if decision.need is Need.PREPARATION:
            assert view.preparation is None, "it is asked for once"
            view = replace(view, preparation=PREPARED)
        else:
            assert not view.confirmed, "it is asked for once"
            view = replace(view, confirmed=True)
        decision = decide(view)
    raise AssertionError("it never has enough")


@given(views())
@settings(max_examples=400, deadline=None)
def test_every_decision_can_be_carried_out(view: View) -> None:
    decision = conclude(view)
    creations = [one for one in decision.actions if isinstance(one, CreateAttempt)]
    deletions = [one for one in decision.actions if isinstance(one, DeleteAttempt)]
    mine = {one.number for one in view.owned}
    assert len(creations) <= 1
    assert {one.attempt.number for one in deletions} <= mine, "nobody else's children"
    if creations:
        assert creations[0].number == view.current + 1
        assert decision.state is not None
        assert decision.state.attempts.current == view.current + 1
        assert not view.policy.suspend
        assert not view.observed.job.deleting
        assert view.deadline_in is None or view.deadline_in > 0
        live = view.attempt is not None and not view.attempt.is_true("Failed") and not view.attempt.deleting
        assert not live, "the attempt before is over"
    if view.observed.job.deleting:
        assert decision == Decision()
    if decision.state is not None:
        assert decision.state.attempts.current >= view.current
        statuses.build(view.status, decision.state, generation=1, now=NOW)
        if decision.state.phase not in Phase.TERMINAL and view.deadline_in is not None:
            assert decision.requeue_after is not None
            assert decision.requeue_after <= max(0.0, view.deadline_in)

    assert_no_hot_loop(view, decision)


def assert_no_hot_loop(view: View, decision: Decision) -> None:
    """Looking again at once is for what the decision itself changed; a status that is written changes once."""
    for _ in range(6):
        if decision.requeue_after != 0.0 or decision.actions:
            return
        assert decision.state is not None
        job = view.observed.job
        told = statuses.build(view.status, decision.state, generation=job.generation, now=NOW)
        changed = statuses.difference(job.status, told)
        assert changed, decision
        view = replace(view, observed=replace(view.observed, job=replace(job, status=told.to_wire())), status=told)
        decision = conclude(view)
    raise AssertionError(f"it never rests: {decision}")


@given(views(TERMINAL))
@settings(max_examples=200, deadline=None)
def test_what_is_over_stays_over(view: View) -> None:
    decision = conclude(view)
    assert not [one for one in decision.actions if isinstance(one, CreateAttempt)]
    if decision.state is not None:
        assert decision.state.phase == view.status.phase
        assert decision.state.completion_time == view.status.completion_time


@given(views())
@settings(max_examples=200, deadline=None)
def test_a_status_that_was_written_is_the_whole_memory(view: View) -> None:
    """Deciding twice from the same status, or once more after it went over the wire, is the same."""
    again = replace(view, status=statuses.read(view.observed.job.status))
    assert decide(view) == decide(again)


def view_of(known: FineTuneJobStatus, seen: Observed, **changes: object) -> View:
    made = View(observed=seen, status=known, now=NOW, reliable_since=NOW - 5000, preparation=PREPARED, confirmed=True)
    return replace(made, **changes)  # type: ignore[arg-type]


def state_of(decision: Decision) -> JobState:
    assert decision.state is not None
    return decision.state


def test_what_the_scheduler_says_is_told() -> None:
    known = status(Phase.PENDING)
    unschedulable = {"PodScheduled": condition("False", "Unschedulable", "0/9 nodes: insufficient nvidia.com/gpu")}
    waiting = pod("master", container("waiting"), conditions=unschedulable)
    seen = observed(observed_job(status=known), attempt(1, "Created"), waiting)
    state = state_of(decide(view_of(known, seen)))
    assert (state.phase, state.reason) == (Phase.PENDING, Reason.WAITING_FOR_PODS)
    assert "insufficient nvidia.com/gpu" in state.message


def test_what_keeps_a_container_waiting_is_told_before_it_fails() -> None:
    known = status(Phase.PENDING)
    waiting = pod("master", container("waiting", reason="ImagePullBackOff", message="manifest unknown"))
    seen = observed(observed_job(status=known), attempt(1, "Created"), waiting)
    decision = decide(view_of(known, seen))
    assert state_of(decision).phase == Phase.STARTING
    assert "0 of 1 pods run" in state_of(decision).message
    assert "ImagePullBackOff: manifest unknown" in state_of(decision).message
    assert decision.requeue_after is not None
    assert decision.requeue_after <= 60


@pytest.mark.parametrize(("nodes", "running"), [(1, True), (2, False)])
def test_a_job_runs_when_all_its_pods_do(nodes: int, running: bool) -> None:
    known = status(Phase.STARTING, planned=plan(nodes=nodes))
    seen = observed(observed_job(status=known), attempt(1, "Created"), pod("master"))
    assert (state_of(decide(view_of(known, seen))).phase == Phase.RUNNING) is running


@pytest.mark.parametrize(
    ("pods", "reported_at", "phase"),
    [
        ((), NOW - 50, Phase.PENDING),
        ((pod("master", container("waiting")),), NOW - 90, Phase.RUNNING),
        ((pod("master", container("waiting"), created_at=NOW - 40),), NOW - 50, Phase.STARTING),
        ((pod("master"), pod(0, container("waiting"), created_at=NOW - 40)), NOW - 50, Phase.STARTING),
    ],
    ids=["gone", "of its pod", "made again", "one made again"],
)
def test_a_report_tells_of_the_pods_that_made_it(pods: tuple[ObservedPod, ...], reported_at: float, phase: str) -> None:
    known = status(Phase.RUNNING, planned=plan(nodes=max(1, len(pods))))
    report = ProgressReport(reported_at, 1, metrics={"step": 3})
    seen = observed(observed_job(status=known), attempt(1, "Created"), *pods, report=report)
    assert state_of(decide(view_of(known, seen))).phase == phase


def test_the_pods_of_the_attempt_before_are_waited_for_but_not_for_ever() -> None:
    for waited, creates in ((0, False), (599, False), (600, True)):
        known = status(Phase.RESTARTING, next_attempt_at=rfc3339(NOW - waited))
        lost = pod("master", container(), deleting=True)
        seen = observed(observed_job(status=known), attempt(1, "Failed"), lost)
        decision = decide(view_of(known, seen))
        assert bool(decision.actions) is creates, waited
        if not creates:
            assert "waiting for the pods of attempt 1" in state_of(decision).message


@pytest.mark.parametrize("suspend", [True, False])
@pytest.mark.parametrize("phase", [Phase.RESTARTING, Phase.RUNNING])
def test_an_attempt_out_of_sight_is_looked_for_before_another_one_is_made(phase: str, suspend: bool) -> None:
    """A watch loses sight of what is relabelled, and two attempts would write to the same place."""
    known = status(phase, next_attempt_at=rfc3339(NOW - 60))
    job = observed_job(status=known, runPolicy={"suspend": suspend})
    unseen = replace(view_of(known, observed(job)), confirmed=False)
    assert decide(unseen).need is Need.CONFIRMATION
    found = conclude(replace(unseen, observed=observed(job, attempt(1, "Running")), confirmed=True))
    assert not any(isinstance(action, CreateAttempt) for action in found.actions)
    gone = conclude(replace(unseen, confirmed=True))
    assert any(isinstance(action, CreateAttempt) for action in gone.actions) is (
        phase == Phase.RESTARTING and not suspend
    )


def test_a_lost_node_is_named_while_its_pods_are_waited_for() -> None:
    known = status(Phase.RESTARTING, next_attempt_at=rfc3339(NOW))
    lost = pod("master", container(), deleting=True, gone_by=NOW - 60)
    seen = observed(observed_job(status=known), attempt(1, "Failed"), lost)
    message = state_of(decide(view_of(known, seen))).message
    assert "node-1 answers no more" in message
    assert "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute" in message


def test_a_deletion_is_looked_at_again_when_it_should_be_confirmed() -> None:
    known = status(Phase.RUNNING)
    leaving = pod("master", container(), deleting=True, gone_by=NOW + 10)
    seen = observed(observed_job(status=known), attempt(1, "Running"), leaving)
    assert decide(view_of(known, seen)).requeue_after == 40.0
    gone = decide(replace(view_of(known, seen), now=NOW + 40))
    assert state_of(gone).reason == Reason.NODE_LOST


def test_pods_of_another_job_of_this_name_are_not_ours() -> None:
    known = status(Phase.PENDING, current=0)
    left = pod("master", container(code=65), job_uid="an-older-job")
    decision = decide(view_of(known, observed(observed_job(status=known), left)))
    assert state_of(decision).reason == Reason.NAME_TAKEN
    running = status(Phase.STARTING)
    seen = observed(observed_job(status=running), attempt(1, "Created"), left)
    assert state_of(decide(view_of(running, seen))).phase == Phase.PENDING, "its failure is not ours"


def test_a_retry_starts_with_fresh_counters_and_no_plan() -> None:
    known = status(Phase.FAILED, current=3, retries=3, micro_batch_size=2, memory_retries=2, preemptions=1)
    job = observed_job(status=known, annotations={ANNOTATION_RETRY: "x"})
    state = state_of(decide(view_of(known, observed(job))))
    assert state.phase == Phase.RESTARTING
    attempts = state.attempts
    assert (attempts.current, attempts.retries, attempts.memory_retries, attempts.micro_batch_size) == (3, 0, 0, None)
    assert attempts.retry_token == "x"
    assert (state.plan, state.start_time, state.completion_time) == (None, None, None)


def test_a_retry_that_has_to_wait_does_not_count_from_the_attempt_before() -> None:
    known = status(Phase.RESTARTING, next_attempt_at=rfc3339(NOW)).model_copy(update={"start_time": None})
    seen = observed(observed_job(status=known), attempt(1, "Running"), pod("master"))
    assert state_of(decide(view_of(known, seen))).start_time is None


def test_an_attempt_that_was_not_recorded_tells_when_the_job_started() -> None:
    known = status(Phase.PENDING, current=0).model_copy(update={"start_time": None})
    seen = observed(observed_job(status=known), attempt(1, "Running"), pod("master"))
    assert state_of(decide(view_of(known, seen))).start_time == rfc3339(NOW - 100)


def test_what_a_failed_job_left_is_not_stopped_without_a_pause() -> None:
    known = status(Phase.FAILED)
    seen = observed(observed_job(status=known), attempt(1, "Running"), pod("master"))
    decision = decide(view_of(known, seen))
    assert decision.actions == (DeleteAttempt(seen.attempts[0]),)
    assert decision.requeue_after is not None and decision.requeue_after >= 1.0


@given(st.integers(0, 200))
@settings(deadline=None)
def test_backoff_doubles_up_to_its_limit(failures: int) -> None:
    assert _backoff(failures) == min(10.0 * 2**failures, BACKOFF_LIMIT_SECONDS)


@given(st.integers(1, 64), st.integers(1, 64))
@settings(deadline=None)
def test_a_smaller_micro_batch_still_divides_the_batch(micro: int, accumulation: int) -> None:
    smaller = _smaller_micro_batch(plan(micro_batch_size=micro, gradient_accumulation=accumulation))
    if micro == 1:
        assert smaller is None
        return
    assert smaller is not None
    assert 1 <= smaller <= micro // 2
    assert (micro * accumulation) % smaller == 0
    better = range(smaller + 1, micro // 2 + 1)
    assert not [n for n in better if (micro * accumulation) % n == 0]
