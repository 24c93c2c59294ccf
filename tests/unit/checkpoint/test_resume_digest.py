"""What a checkpoint was made with: the same in every version of the image, or an upgrade throws checkpoints away."""

from __future__ import annotations

from finetune_trainer.contract.config import OutputConfig
from tests.unit.trainer_platform.builders import trainer_config

OF_0_1 = "8bdf963619882069e5a64aebe6c8ced017dde2da2514130f057b7afc33f356f1"
"""Changes only with what a running job's checkpoints cannot be continued with: a field that is new has to be left out
of the digest where it has its default."""


def test_it_is_the_one_of_earlier_versions() -> None:
    assert trainer_config().resume_digest() == OF_0_1


def test_where_results_go_counts_and_whether_an_earlier_one_would_do_does_not() -> None:
    output = trainer_config().output
    assert trainer_config(output=output.model_copy(update={"reuse": False})).resume_digest() == OF_0_1
    assert trainer_config(output=OutputConfig(uri="s3://models/other")).resume_digest() != OF_0_1
