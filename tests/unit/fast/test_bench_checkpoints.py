"""What the bench of checkpoints makes of the times that it sees."""

from __future__ import annotations

from itertools import accumulate

from bench.storage.checkpoints import costs


def times(every: int, checkpoints: int, *, held: float, slowed: float) -> list[float]:
    """Steps of one second; the first takes longer, the one after a checkpoint too, and so do the two after that."""
    steps = every * (checkpoints + 1)
    extra = dict.fromkeys(range(1, steps + 1), 0.0)
    extra[2] = 5.0
    for step in range(every, steps, every):
        extra[step + 1] += held
        extra[step + 2] += slowed
        extra[step + 3] += slowed
    return list(accumulate(1.0 + extra[step] for step in range(1, steps + 1)))


def test_a_checkpoint_costs_what_it_adds_to_the_steps_after_it() -> None:
    assert costs(times(20, 3, held=0.5, slowed=0.1), 20, held=0.4) == {
        "step_seconds": 1.0,
        "saved_seconds": 0.4,
        "beside_seconds": 0.3,
        "saved_of_100_steps": 0.004,
    }


def test_a_checkpoint_that_costs_nothing() -> None:
    assert costs(times(8, 1, held=0.0, slowed=0.0), 8, held=0.0)["beside_seconds"] == 0.0
