"""Which kernel computes attention over samples."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import current_flash_attention_impl
from transformers import AttentionInterface, AutoModelForCausalLM, Llama4TextConfig, PhimoeConfig

from finetune_operator.planner.paths import paths_of
from finetune_trainer.contract.vocabulary import FlashAttn
from finetune_trainer.errors import InternalError
from finetune_trainer.fast import attention
from finetune_trainer.fast import choice as choice_of_paths
from finetune_trainer.fast.attention import choice, trial, varlen
from finetune_trainer.fast.attention.flex import FLEX
from finetune_trainer.fast.attention.kernel import Kernel, Samples, Scores
from finetune_trainer.fast.attention.reference import ONE_BY_ONE, one_by_one
from finetune_trainer.fast.attention.samples import NAME, attention_by
from tests.tiny_models import tiny_model
from tests.trainer_jobs import trainer_config
from tests.unit.planner.models import spec

CPU = torch.device("cpu")
HEADS = trial.Heads(4, 2, 16, 16, None, 0, None, sinks=None)

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def wrong_window(q: Any, k: Any, v: Any, samples: Samples, scores: Scores) -> torch.Tensor:
    """One token more is seen."""
    return one_by_one(q, k, v, samples, scores._replace(window=scores.window + 1 if scores.window else 0))


def wrong_gradient(q: Any, k: Any, v: Any, samples: Samples, scores: Scores) -> torch.Tensor:
    """Keys get none."""
    right = one_by_one(q, k, v, samples, scores)
    return one_by_one(q, k * 1.0 + (k.detach() - k) * 0.5, v, samples, scores) if right.requires_grad else right


def no_cap(q: Any, k: Any, v: Any, samples: Samples, scores: Scores) -> torch.Tensor:
    """Scores as they are."""
    return one_by_one(q, k, v, samples, scores._replace(softcap=None))


def not_a_number(q: Any, k: Any, v: Any, samples: Samples, scores: Scores) -> torch.Tensor:
    """NaN throughout."""
    return one_by_one(q, k, v, samples, scores) * float("nan")


@pytest.mark.parametrize(
    ("attend", "heads", "said"),
    [
        (wrong_window, HEADS._replace(window=64), "output differs by"),
        (wrong_gradient, HEADS, "gradients of keys differ by"),
        (no_cap, HEADS._replace(softcap=1.0), "output differs by"),
        (not_a_number, HEADS, "output differs by nan"),
    ],
)
def test_a_kernel_that_computes_something_else_is_found_out(
    attend: Callable[..., torch.Tensor], heads: trial.Heads, said: str
) -> None:
    found = trial.difference(replace(ONE_BY_ONE, attend=attend), heads, CPU, torch.float32)
    assert found is not None
    assert found.startswith(said)


def failing(*_: Any) -> torch.Tensor:
    """As a package does that does not fit."""
    raise AttributeError("module has no such function\nand more")


def test_values_of_another_width_are_not_for_torchs_kernel() -> None:
    found = torch.zeros(4, 2, 8)
    with pytest.raises(attention.Unsupported, match="values of 4 numbers with queries of 8"):
        varlen.attend(found, found, found[..., :4], Samples(torch.tensor([0, 4]), 4), Scores())


def candidates(*found: Kernel) -> Callable[..., Any]:
    return lambda *_: iter(found)


def best(model: Any, longest: int = 32) -> Kernel:
    """For a model on a CPU."""

    def run(inputs: dict[str, Any]) -> torch.Tensor:
        found: torch.Tensor = model.base_model(**inputs).last_hidden_state
        return found

    with torch.no_grad():
        wanted = attention.Wanted(FlashAttn.VARLEN, longest, 0, waits=True)
        return attention.best_kernel(model.eval(), CPU, torch.float32, wanted, run)


def test_the_next_kernel_is_taken_where_one_fails_or_is_wrong(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = replace(ONE_BY_ONE, name="broken", attend=failing)
    wrong = replace(ONE_BY_ONE, name="wrong", attend=wrong_gradient)
    elsewhere = replace(ONE_BY_ONE, name="elsewhere", why_not=lambda *_: "not on this machine")
    model = tiny_model("mistral", sliding_window=20)
    monkeypatch.setattr(choice, "_candidates", candidates(broken, elsewhere, wrong, ONE_BY_ONE))
    with caplog.at_level(logging.INFO):
        assert best(model) is ONE_BY_ONE
    assert model.config._attn_implementation == "sdpa"
    assert [line.split(" by ")[0] for line in caplog.messages if line.startswith("attention: not with")] == [
        "attention: not with broken: module has no such function",
        "attention: not with elsewhere: not on this machine",
        "attention: not with wrong: gradients of keys differ",
    ]
    monkeypatch.setattr(choice, "_candidates", candidates(broken, elsewhere))
    with pytest.raises(attention.Unsupported, match=r"^broken: module has no .*; elsewhere: not on this machine$"):
        best(model)


def test_what_one_process_cannot_use_no_process_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(ONE_BY_ONE, name="other")
    monkeypatch.setattr(choice, "_candidates", candidates(other, ONE_BY_ONE))
    told: list[Any] = []

    def by_all(own: Any) -> list[Any]:
        told.append(own)
        return [own, "not on the second node" if len(told) == 2 else None]

    monkeypatch.setattr(choice, "told_by_all", by_all)
    assert best(tiny_model("llama")) is ONE_BY_ONE
    assert told == [None, None, None]
    monkeypatch.setattr(choice, "told_by_all", lambda own: [own, "another model there"])
    with pytest.raises(attention.Unsupported, match="another model there"):
        best(tiny_model("llama"))


def test_a_gpu_that_cannot_go_on_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking(*_: Any) -> torch.Tensor:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    broken = replace(ONE_BY_ONE, name="broken", attend=breaking, rows=False)
    monkeypatch.setattr(choice, "_candidates", candidates(broken, ONE_BY_ONE))
    with pytest.raises(InternalError, match="attention by broken broke the GPU's state: an illegal memory access"):
        best(tiny_model("llama"))


PHIMOE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_local_experts": 2, "max_position_embeddings": 256, "sliding_window": 16,
}  # fmt: skip


def test_memory_that_runs_out_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(choice, "_candidates", candidates(replace(ONE_BY_ONE, attend=full, rows=False), ONE_BY_ONE))
    with pytest.raises(torch.OutOfMemoryError):
        best(tiny_model("llama"))


def test_what_only_a_models_mask_says_is_no_reason_to_go_without_it() -> None:
    """A window that its layers do not ask for; chunks; blocks of another kind."""
    windowed = AutoModelForCausalLM.from_config(PhimoeConfig(**PHIMOE), dtype=torch.float32)
    with pytest.raises(
        attention.Unsupported, match="layers of PhimoeForCausalLM do not say that they see 16 tokens only"
    ):
        best(windowed)
    assert best(windowed, longest=16) is ONE_BY_ONE  # none is longer
    config = Llama4TextConfig(**{**PHIMOE, "attention_chunk_size": 16, "head_dim": 16})
    with torch.device("meta"):
        chunked = AutoModelForCausalLM.from_config(config)
    with pytest.raises(attention.Unsupported, match="Llama4ForCausalLM looks at chunks of 16 tokens"):
        best(chunked)
    model = tiny_model("llama")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(attention.Unsupported, match="has layers of other kinds: linear_attention"):
        best(model)


def test_a_model_that_does_not_come_to_the_kernel_does_not_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here: something else computes the same."""
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, attention_by(ONE_BY_ONE))
    monkeypatch.setattr(AttentionInterface, "register", lambda *_: None)
    with pytest.raises(attention.Unsupported, match="LlamaForCausalLM does not come to it"):
        best(tiny_model("llama"))


def test_a_model_that_wants_more_than_tokens_is_a_reason() -> None:
    model = tiny_model("llama")
    model.base_model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("where are the pictures?")))
    with pytest.raises(attention.Unsupported, match="cannot be run on a few tokens: where are the pictures"):
        best(model)


@pytest.mark.usefixtures("differentiable")
def test_a_model_with_soft_capped_scores_gets_the_kernel_that_caps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that a GPU has no other for; here on a CPU."""
    other = replace(varlen.TORCHS, why_not=lambda *_: None)
    capping = replace(FLEX, why_not=lambda *_: None)
    monkeypatch.setattr(choice, "_candidates", candidates(other, replace(capping, special_only=True)))
    assert best(tiny_model("gemma2", sliding_window=20)).name == FLEX.name
    # With `auto` it is for such models alone.
    monkeypatch.setattr(choice, "_candidates", candidates(replace(capping, special_only=True)))
    with pytest.raises(attention.Unsupported, match="it has to be asked for where scores are plain"):
        best(tiny_model("llama"))


def test_kernels_come_in_the_order_of_their_speed() -> None:
    gpu = torch.device("cuda")

    def names(
        how: FlashAttn, device: torch.device, micro_batches: int = 0, *, waits: bool = False, masked: bool = True
    ) -> list[str]:
        wanted = attention.Wanted(how, 2048, micro_batches, waits, masked)
        return [kernel.name.split(" of torch")[0] for kernel in choice._candidates(wanted, device)]

    ready = ["FlashAttention 3", "varlen_attn"]
    made = ["FlashAttention 4", *ready, "FlexAttention"]
    # Those whose code is made first are for trainings that are long enough for it, or that have no other.
    assert names(FlashAttn.AUTO, gpu) == ready
    assert names(FlashAttn.AUTO, gpu, waits=True) == [*ready, "FlashAttention 4", "FlexAttention"]
    assert names(FlashAttn.AUTO, gpu, choice.WORTH_FLASH4, waits=True) == made
    # Where a mask mixes samples, short ones wait, too.
    assert names(FlashAttn.AUTO, gpu, masked=False) == [*ready, "FlashAttention 4", "FlexAttention"]
    assert names(FlashAttn.VARLEN, gpu) == made
    assert names(FlashAttn.FLEX, gpu) == ["FlexAttention"]
    assert names(FlashAttn.VARLEN, CPU) == ["one by one, on a CPU"]


@pytest.mark.parametrize("knows_groups", [True, False])
@pytest.mark.parametrize("heads", [HEADS, HEADS._replace(window=64), HEADS._replace(keys=4, scaling=0.3)], ids=str)
def test_torchs_function_is_asked_for_what_the_reference_computes(
    heads: trial.Heads, knows_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs on GPUs: here the definition stands in for it, with the names of its arguments."""

    def defined(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        assert cu_seq_q is cu_seq_k
        assert max_q == max_k >= int(cu_seq_q.diff().max())
        assert enable_gqa == (knows_groups and query.shape[1] != key.shape[1])
        left, right = window_size
        assert right == 0
        return one_by_one(query, key, value, Samples(cu_seq_q, max_q), Scores(scale, 0 if left < 0 else left + 1))

    monkeypatch.setattr(varlen, "_function", lambda: (defined, knows_groups))
    assert trial.difference(varlen.TORCHS, heads, CPU, torch.float32) is None


def two_samples() -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Hidden states of each, and of both in a row."""
    each = (torch.randn(1, 9, 8), torch.randn(1, 14, 8))
    return each, torch.cat(each, dim=1)


@pytest.mark.parametrize("mixture", [True, False])
@pytest.mark.parametrize("wrong", [slice(9), slice(9, 23)], ids=["first", "second"])
def test_a_sample_that_is_wrong_is_seen(wrong: slice, mixture: bool) -> None:
    expected, found = two_samples()
    assert choice._away(found, expected, mixture=mixture) == 0.0
    found[:, wrong] += 1.0
    assert choice._away(found, expected, mixture=mixture) > 0.1
    found[:, wrong] = float("nan")
    assert not choice._away(found, expected, mixture=mixture) <= 1.0


def test_a_token_that_goes_to_another_expert_is_no_reason_against_a_kernel() -> None:
    """Rounding decides between experts that a router likes alike. Where there are none, no token may differ."""
    expected, found = two_samples()
    found[:, 12] = 0.0
    assert choice._away(found, expected, mixture=True) == 0.0
    assert choice._away(found, expected, mixture=False) > 0.1


@pytest.mark.parametrize(
    ("architecture", "mixture"), [("llama", False), ("gemma2", False), ("mixtral", True), ("qwen3-moe", True)]
)
def test_which_models_are_mixtures(architecture: str, mixture: bool) -> None:
    assert choice._is_mixture(tiny_model(architecture)) is mixture


@pytest.mark.parametrize(
    ("max_steps", "micro_batch", "accumulation", "gpus"),
    [(None, 1, 1, 1), (10, 2, 4, 1), (37, 2, 4, 2), (38, 8, 1, 2), (38, 1, 8, 1), (150, 2, 1, 4), (149, 2, 1, 4)],
)
def test_operator_and_trainer_agree_on_which_scores_are_kept(
    max_steps: int | None, micro_batch: int, accumulation: int, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the one has planned memory for is what the other waits for."""
    asked: list[attention.Wanted] = []
    monkeypatch.setattr(choice_of_paths.attention, "best_kernel", lambda *given: asked.append(given[3]))
    steps = {"max_steps": max_steps, "micro_batch_size": micro_batch, "gradient_accumulation": accumulation}
    config = trainer_config(Path("model"), Path("data"), training={**steps, "batch_size": 1})
    choice_of_paths._best_kernel(config, tiny_model("gemma2"), CPU, 77)
    (wanted,) = asked
    assert wanted.micro_batches == 77
    training = {"maxSteps": max_steps, "batchSize": micro_batch * accumulation * gpus}
    planned = paths_of(spec(method="lora", training=training, resources={"gpus": gpus}))
    assert planned.samples
    assert planned.capped is wanted.waits


FLASH3_PACKAGE = """
import torch

operators = torch.library.Library("flash_attn_3", "DEF")
operators.define("fwd(Tensor q) -> Tensor")
operators.define("bwd(Tensor q) -> Tensor")
"""


def test_an_installed_package_takes_the_place_of_torchs_kernel_for_as_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = varlen.FLASH3
    model = tiny_model("llama")
    # One that cannot be imported is no kernel, and leaves nothing behind.
    monkeypatch.setattr(choice, "_candidates", candidates(replace(kernel, why_not=lambda *_: None)))
    with pytest.raises(attention.Unsupported, match=r"^FlashAttention 3: No module named 'flash_attn_interface'$"):
        best(model)
    assert model.config._attn_implementation == "sdpa"
    (tmp_path / "flash_attn_interface.py").write_text(FLASH3_PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert kernel.why_not(CPU, torch.bfloat16) == "it runs on GPUs"
    assert "flash_attn_interface" not in sys.modules  # it is not imported in order to be found
    assert current_flash_attention_impl() is None
    with attention.installed(model, kernel):
        assert current_flash_attention_impl() == "FA3"
    assert current_flash_attention_impl() is None
