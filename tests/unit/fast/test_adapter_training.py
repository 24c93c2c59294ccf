"""Whole trainings with adapted layers computed together, against those in which each is computed by itself."""

from __future__ import annotations

import logging
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract.vocabulary import Switch
from finetune_trainer.errors import UsageError
from finetune_trainer.fast import choice
from finetune_trainer.layers import decoder_blocks
from tests.compiling import compile_by
from tests.trainer_jobs import trainer_config
from tests.unit.fast.test_training import assert_same, trained
from tests.unit.trainer_core.conftest import ModelFolder

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    # torch's compiler makes an object of every autograd function that it traces.
    pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.mark.parametrize(
    "training",
    [{}, {"gradient_checkpointing": True}, {"torch_compile": "always"}, {"flash_attn": "varlen"}],
    ids=["plain", "recomputed", "compiled", "varlen"],
)
def test_fused_adapters_train_the_same(
    model_folder: ModelFolder, tmp_path: Path, training: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_by(monkeypatch)
    slow = trained(model_folder(), tmp_path / "slow", training={"fuse_adapters": "never"})
    fast = trained(model_folder(), tmp_path / "fast", training={"fuse_adapters": "always", **training})
    assert_same(fast, slow)


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_a_quantized_mlp_is_one_function_where_blocks_are_compiled(
    model_folder: ModelFolder,
    tmp_path: Path,
    recomputed: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    compile_by(monkeypatch)
    base, checkpointing = model_folder(), {"gradient_checkpointing": recomputed}
    slow = trained(base, tmp_path / "slow", method="qlora", training={"fuse_adapters": "never", **checkpointing})
    caplog.set_level(logging.INFO)
    fast = trained(
        base,
        tmp_path / "fast",
        method="qlora",
        training={"fuse_adapters": "always", "torch_compile": "always", **checkpointing},
    )
    blocks = fast.tuned.model.config.num_hidden_layers
    assert f"{blocks} whole MLPs" in caplog.text
    assert "checkpoint around them" not in caplog.text
    assert_same(fast, slow)


@pytest.mark.parametrize("wanted", [Switch.ALWAYS, Switch.AUTO])
def test_a_model_that_wants_more_than_tokens_is_left_as_it_is(
    model_folder: ModelFolder,
    tmp_path: Path,
    wanted: Switch,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fitted = trained(model_folder(), tmp_path, training={"fuse_adapters": "never"})
    model = fitted.tuned.model

    def forward(*args: Any, **kwargs: Any) -> None:
        raise ValueError("pixels are missing")

    monkeypatch.setattr(choice.causal_of(model).base_model, "forward", forward)
    config = trainer_config(tmp_path, tmp_path, training={"fuse_adapters": wanted})
    caplog.set_level(logging.INFO)
    model.train()
    refusal: Any = pytest.raises(UsageError, match="pixels are missing") if wanted is Switch.ALWAYS else nullcontext()
    with ExitStack() as stack, refusal:
        choice._fuse(config, model, list(decoder_blocks(model, fitted.layout)), stack, mlps=True)
        assert "each layer by itself: LlamaForCausalLM cannot be run on a few tokens: pixels are missing" in caplog.text
    assert model.training
