"""The loss behind a plain head, against the one of whole logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from finetune_trainer.fast import cross_entropy
from finetune_trainer.fast.cross_entropy import chunked, loss_and_gradient, plain_head
from finetune_trainer.loss import NextTokenLoss, Targets
from tests.compiling import compile_by
from tests.tiny_models import VOCABULARY, tiny_model

# torch 2.13 says so of itself, once it imports its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.mark.parametrize("targets", [1, 6, 7])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradient_are_those_of_whole_logits(monkeypatch: pytest.MonkeyPatch, targets: int, bias: bool) -> None:
    monkeypatch.setattr(cross_entropy, "LOGITS_PER_CHUNK", 3 * 50)
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=bias).requires_grad_(False)
    hidden = torch.randn(targets, 8, requires_grad=True)
    tokens = torch.randint(0, 50, (targets,))
    expected = functional.cross_entropy(head(hidden), tokens, reduction="sum")
    expected.backward()
    found, gradient = chunked(hidden.detach(), tokens, head, loss_and_gradient)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-5, atol=1e-6)


def test_16_bits_lose_no_more_than_the_twin_does() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 300) * 4
    tokens = torch.randint(0, 300, (5,))
    exact = logits.bfloat16().double().requires_grad_()
    functional.cross_entropy(exact, tokens, reduction="sum").backward()
    total, gradient = loss_and_gradient(logits.bfloat16(), tokens)
    assert total.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "plain"),
    [("llama", True), ("qwen2", True), ("phi", True), ("gemma2", False), ("gpt2", True), ("falcon", True)],
)
def test_only_a_head_that_is_no_more_than_a_product_is_plain(architecture: str, plain: bool) -> None:
    """Gemma 2 caps its logits."""
    model = tiny_model(architecture).requires_grad_(False)
    loss = NextTokenLoss(model, compiled=True)
    assert (loss._plain is not None) == plain


def test_a_trained_head_is_not_plain() -> None:
    model = tiny_model().requires_grad_(False)
    logits_of = model.get_output_embeddings()
    assert plain_head(model, logits_of) is logits_of
    model.get_output_embeddings().weight.requires_grad_(True)
    assert plain_head(model, logits_of) is None


def test_a_plain_head_gives_the_loss_and_gradients_of_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_by(monkeypatch)
    model = tiny_model().eval()
    model.get_output_embeddings().requires_grad_(False)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    found = []
    for compiled in (False, True):
        model.zero_grad()
        loss = NextTokenLoss(model, compiled=compiled)(model, {"input_ids": ids}, Targets.of(ids.clone())) / 3
        loss.backward()
        found.append((loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-6)
