"""Defaults that depend on what is learnt."""

from __future__ import annotations

from finetune_operator.api.v1alpha1 import FineTuneJobSpec, Head, Preference
from finetune_trainer.contract import config as t
from finetune_trainer.contract.selection import SELECTORS
from finetune_trainer.contract.vocabulary import Method, Objective

ADAPTER_LEARNING_RATE = 2e-4
"""Hu et al. 2021 (arXiv:2106.09685, appendix D) and Dettmers et al. 2023 (arXiv:2305.14314, appendix B)."""
FULL_LEARNING_RATE = 1e-5
PREFERENCE_ADAPTER_LEARNING_RATE = 1e-5
PREFERENCE_FULL_LEARNING_RATE = 1e-6
"""Rafailov et al. 2023 (arXiv:2305.18290, appendix B); adapters take ten times as much, as TRL has it."""
HEAD_LEARNING_RATE = 1e-3
HEAD_AND_BLOCKS_LEARNING_RATE = 5e-5
"""Devlin et al. 2018 (arXiv:1810.04805, appendix A.3)."""
BETA = {Objective.DPO: 0.1, Objective.KTO: 0.1, Objective.ORPO: 0.1, Objective.SIMPO: 2.0}
"""Rafailov et al. 2023 (appendix B), Ethayarajh et al. 2024 (arXiv:2402.01306, section 4.3), Hong et al. 2024
(arXiv:2403.07691, section 6.1), Meng et al. 2024 (arXiv:2405.14734, appendix B)."""


def preference_of(spec: FineTuneJobSpec) -> t.PreferenceConfig | None:
    """What a preference objective is weighed by; None for any other."""
    objective = spec.training.objective
    if not objective.is_preference:
        return None
    preference = spec.training.preference or Preference()
    return t.PreferenceConfig.model_validate({**preference.model_dump(), "beta": preference.beta or BETA[objective]})


def head_of(spec: FineTuneJobSpec) -> t.HeadConfig | None:
    """What a head predicts; None for any other method."""
    if spec.method is not Method.HEAD:
        return None
    head = spec.head or Head()
    return t.HeadConfig.model_validate({**head.model_dump(), "labels": head.labels or ()})


def learning_rate_of(spec: FineTuneJobSpec) -> float:
    """The learning rate that the job asks for, or the one that is usual for what it does."""
    if spec.training.learning_rate is not None:
        return spec.training.learning_rate
    if spec.method is Method.HEAD:
        layers = spec.layers
        alone = layers is None or not (layers.also or any(getattr(layers, name) for name in SELECTORS))
        return HEAD_LEARNING_RATE if alone else HEAD_AND_BLOCKS_LEARNING_RATE
    changes_weights = spec.method.trains_base_weights
    if spec.training.objective.is_preference:
        return PREFERENCE_FULL_LEARNING_RATE if changes_weights else PREFERENCE_ADAPTER_LEARNING_RATE
    return FULL_LEARNING_RATE if changes_weights else ADAPTER_LEARNING_RATE
