"""The balancing loss of a mixture of experts: it grows where a router sends most tokens to few experts (Fedus et al.
2021, arXiv:2101.03961, equations 4 to 6). transformers' models compute it; their configuration says whether it counts.
"""

from __future__ import annotations

from transformers import PreTrainedModel


def balancing_weight(causal: PreTrainedModel) -> float:
    """What a mixture of experts weighs its balancing loss with (`router_aux_loss_coef`); 0.0 where it has none, or its
    configuration does not ask for it."""
    config = causal.config.get_text_config(decoder=True)
    asked = any(getattr(one, "output_router_logits", False) for one in (causal.config, config))
    return float(getattr(config, "router_aux_loss_coef", None) or 0.0) if asked else 0.0
