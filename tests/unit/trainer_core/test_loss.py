"""The chunked loss against the plain one of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from finetune_trainer import loss as loss_module
from finetune_trainer.layers import apply_selection
from finetune_trainer.loss import NextTokenLoss, Targets
from tests.compiling import compile_by
from tests.tiny_models import ARCHITECTURES, VOCABULARY, tiny_model


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three positions per chunk, so that every loss here is taken in several."""
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 3 * VOCABULARY)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of nine tokens, with eight trained ones that do not stand at the same places."""
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 5:7] = -100
    return ids, labels


def reference(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(
        logits[:, :-1].reshape(-1, VOCABULARY).float(), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_loss_and_gradients_are_those_of_the_whole_logits(architecture: str, tied: bool) -> None:
    model = tiny_model(architecture, tie_word_embeddings=tied).eval()
    ids, labels = batch()
    expected = reference(model(input_ids=ids).logits, labels)
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    found = NextTokenLoss(model)(model, {"input_ids": ids}, Targets.of(labels))
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(gradients)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)


def test_scores_without_gradients() -> None:
    model = tiny_model().eval()
    ids, labels = batch()
    logits = model(input_ids=ids).logits
    total, correct = NextTokenLoss(model).evaluate(model, {"input_ids": ids}, Targets.of(labels))
    assert total.item() == pytest.approx(reference(logits, labels).item(), rel=1e-6)
    hits = (logits[:, :-1].argmax(-1) == labels[:, 1:]) & (labels[:, 1:] != -100)
    assert correct.item() == hits.sum().item()


def test_a_head_alone_gets_its_gradient() -> None:
    model = tiny_model(tie_word_embeddings=False)
    apply_selection(model, {"lm_head.weight"})
    ids, labels = batch()
    NextTokenLoss(model)(model, {"input_ids": ids}, Targets.of(labels)).backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
    assert model.model.norm.weight.grad is None


def test_a_row_without_targets_is_worth_nothing_but_has_a_graph() -> None:
    model = tiny_model()
    ids, labels = batch()
    loss = NextTokenLoss(model)(model, {"input_ids": ids}, Targets.of(torch.full_like(labels, -100)))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in model.parameters())


def test_a_model_that_passes_on_only_what_it_is_asked_for() -> None:
    """Gemma 4 takes a number of logits for the positions that its last blocks are to see."""
    model = tiny_model("gemma4").eval()
    ids, labels = batch()
    expected = reference(model(input_ids=ids).logits, labels)
    found = NextTokenLoss(model)(model, {"input_ids": ids}, Targets.of(labels))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_targets_stand_before_their_tokens() -> None:
    labels = torch.tensor([[5, -100, 7, 8], [-100, -100, -100, 9]])
    targets = Targets.of(labels)
    assert targets.positions.tolist() == [1, 2, 6]
    assert targets.tokens.tolist() == [7, 8, 9]


def test_the_first_token_of_a_packed_sample_is_no_target() -> None:
    labels = torch.tensor([[5, 6, 7, 8]])
    assert Targets.of(labels, torch.tensor([[0, 1, 0, 1]])).tokens.tolist() == [6, 8]


def test_logits_are_never_held_for_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, _a, output: sizes.append(output.shape[-2]))
    ids, labels = batch()
    NextTokenLoss(model)(model, {"input_ids": ids}, Targets.of(labels)).backward()
    # The model's own forward pass asks its head for none.
    assert sizes == [0, 3, 3, 2]


def test_a_wrapper_of_forward_on_the_instance_is_not_taken_for_the_head() -> None:
    model = tiny_model().eval()
    ids, labels = batch()
    expected = NextTokenLoss(model).evaluate(model, {"input_ids": ids}, Targets.of(labels))
    whole = model.forward
    # What accelerate does to a model that is trained in mixed precision.
    model.forward = lambda *args, **kwargs: whole(*args, **kwargs)
    found = NextTokenLoss(model).evaluate(model, {"input_ids": ids}, Targets.of(labels))
    assert [value.item() for value in found] == [value.item() for value in expected]


def balanced_mixture(**changes: Any) -> PreTrainedModel:
    return tiny_model("mixtral", **{"output_router_logits": True, "router_aux_loss_coef": 0.5, **changes})


def test_a_mixture_is_trained_with_the_balancing_loss_that_it_asks_for() -> None:
    model = balanced_mixture().train()
    ids, labels = batch()
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    targets = Targets.of(labels)
    (model(**inputs, labels=labels).loss * len(targets.tokens)).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    NextTokenLoss(model)(model, inputs, targets).backward()

    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{"output_router_logits": False}, {"router_aux_loss_coef": 0.0}])
def test_a_mixture_that_asks_for_no_balancing_has_none(changes: dict[str, object]) -> None:
    ids, labels = batch()
    found = [
        NextTokenLoss(model)(model, {"input_ids": ids}, Targets.of(labels)).item()
        for model in (balanced_mixture(**changes), balanced_mixture())
    ]
    assert found[0] == pytest.approx(reference(balanced_mixture()(input_ids=ids).logits, labels).item(), rel=1e-6)
    assert found[1] > found[0] + 1


def test_balancing_is_no_part_of_a_score() -> None:
    model = balanced_mixture().eval()
    ids, labels = batch()
    with torch.no_grad():
        loss = NextTokenLoss(model)(model, {"input_ids": ids}, Targets.of(labels))
    assert loss.item() == pytest.approx(reference(model(input_ids=ids).logits, labels).item(), rel=1e-6)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_factor_of_the_loss_is_not_rounded_to_16_bits(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    monkeypatch.setattr(loss_module, "_SCALED_AT_ONCE", 100)
    compile_by(monkeypatch)
    model: Any = tiny_model().eval().requires_grad_(False)
    model.to(torch.bfloat16)
    loss = NextTokenLoss(model, compiled=compiled)
    _, labels = batch()
    targets = Targets.of(labels)
    found = []
    for factor in (1.0, 1 / 3001):
        hidden = torch.randn(len(targets.tokens), model.config.hidden_size, generator=torch.Generator().manual_seed(1))
        hidden = hidden.to(torch.bfloat16).requires_grad_()
        (loss._cross_entropy(hidden, targets.tokens) * factor).backward()
        assert hidden.grad is not None
        found.append(hidden.grad)
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(found[1], (found[0].double() / 3001).to(torch.bfloat16), rtol=0, atol=0)
