"""Two processes of a pod that are asked to stop at every moment of their lives, and go on as if nothing had been.

One job is taken through all moments, one for each attempt: what an attempt leaves behind is what the next one finds.
The last one's adapter is, bit for bit, that of a job that nobody stopped.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune_operator.local.seaweed import SeaweedServer
from finetune_trainer.checkpoint import CheckpointStore
from finetune_trainer.contract import ExitCode, TerminationMessage, TrainerConfig
from finetune_trainer.storage import ObjectStore, S3Uri
from tests.fault_proxy import Fault, FaultProxy, Request
from tests.local.pod import Interruption, Pod
from tests.local.test_methods_train import download
from tests.trainer_jobs import QUESTIONS, save_tiny_model, trainer_config, write_dataset

STEPS = 16
ATTEMPT_SECONDS = 40
KILLED = -int(signal.SIGKILL)


@dataclass(frozen=True)
class Moment:
    """When an attempt is asked to stop, and what becomes of it."""

    name: str
    place: str | None = None
    """A function; SIGTERM is sent when a call of it begins."""
    call: int = 1
    upload_of: int | None = None
    """The step of a checkpoint; `then` is sent to the launcher while it is uploaded, slowly."""
    then: signal.Signals = signal.SIGTERM
    every: int = 1000
    """Steps between checkpoints."""
    code: int = ExitCode.PREEMPTED
    stops_at: int | None = None
    """The step that all agree on, which is saved; None where nothing is to be saved."""
    newest: int | None = None
    """The step of the newest complete checkpoint afterwards, where that is another one."""

    def interruption(self, *, everybody: bool) -> Interruption | None:
        """Where a rank sends the first SIGTERM."""
        return Interruption(0 if everybody else 1, self.place, self.call, everybody) if self.place is not None else None


STEP = "finetune_trainer.training:FinetuneTrainer"
EVALUATE = "finetune_trainer.loss:NextTokenLoss.evaluate"
"""Called once before the training, twice for the tuned model, then twice for the base, which that is without its
adapter."""
ANSWER = "finetune_trainer.evaluation.generation:_generate"
"""Called once before the training, once for the tuned model, then once for the base."""
NEXT_STEP = f"{STEP}.get_batch_samples"
TRAINING = (
    Moment("the data is prepared", "finetune_trainer.preflight:prepare"),
    Moment("the processes meet", "torch.distributed:init_process_group"),
    Moment("the model is loaded", "finetune_trainer.train:load_model"),
    Moment("the evaluation is tried", EVALUATE),
    # A step in which the signal comes is done, and so is the next one, which begins with what all ranks were asked.
    Moment("in the first step", f"{STEP}.training_step", stops_at=2),
    Moment("a resumed run is about to begin", "finetune_trainer.train:apply_method", newest=2),
    Moment("in a backward pass", "torch:Tensor.backward", stops_at=4),
    # Two micro-batches make a step.
    Moment("between micro-batches", f"{STEP}.training_step", 2, stops_at=6),
    Moment("gradients are clipped", "torch.nn.utils:clip_grad_norm_", stops_at=8),
)
UPLOADS = (
    Moment("SIGTERM again while the last checkpoint is uploaded", NEXT_STEP, 2, upload_of=10, stops_at=10),
    Moment("the grace period is over before", NEXT_STEP, 2, upload_of=12, then=signal.SIGKILL, code=KILLED, newest=10),
    Moment("an earlier checkpoint is uploaded", upload_of=11, every=1, stops_at=11),
)
EVALUATION = (
    Moment("the tuned model is evaluated", EVALUATE, 3, newest=STEPS),
    Moment("a finished training is evaluated again", EVALUATE, 2, newest=STEPS),
    Moment("the base is evaluated", EVALUATE, 5, newest=STEPS),
    Moment("answers are written", ANSWER, 3, newest=STEPS),
)
CHAINS: dict[str, tuple[Moment, ...]] = {
    # As the kubelet does it: the launcher is told.
    "everybody": (
        Moment("the inputs are fetched", "finetune_trainer.train:fetch_inputs"),
        *TRAINING,
        *UPLOADS,
        *EVALUATION,
        Moment("the result is exported", "finetune_trainer.results.save:export", newest=STEPS),
        Moment("the result is uploaded", "finetune_trainer.storage:ObjectStore.put_tree", code=0, newest=STEPS),
    ),
    # As where only the node of some is drained.
    "the last rank alone": (
        Moment("the job is checked", "finetune_trainer.train:check_job"),
        Moment("the processes meet", "torch.distributed:init_process_group"),
        Moment("the evaluation is tried", EVALUATE),
        Moment("in the first step", f"{STEP}.training_step", stops_at=2),
        Moment("in a backward pass", "torch:Tensor.backward", stops_at=4),
        Moment("gradients are clipped", "torch.nn.utils:clip_grad_norm_", stops_at=6),
        Moment("the tuned model is evaluated", EVALUATE, 3, newest=STEPS),
        Moment("the base is evaluated", EVALUATE, 5, newest=STEPS),
        Moment("answers are written", ANSWER, 3, newest=STEPS),
        Moment("rank 0 writes the result", "torch.distributed:broadcast_object_list", 3, code=0, newest=STEPS),
    ),
}


@dataclass(frozen=True)
class Place:
    """Where the attempts of a job find what they need."""

    folder: Path
    pod: Pod
    proxy: FaultProxy
    store: ObjectStore
    uri: S3Uri

    def job(self, uid: str, attempt: int, every: int) -> TrainerConfig:
        """Two processes with two micro-batches a step; dropout, so that random states count."""
        config = trainer_config(
            self.folder / "model",
            self.folder / "data.jsonl",
            lora={"dropout": 0.1},
            dataset={"validation": {"uri": f"file://{self.folder / 'heldout.jsonl'}"}},
            training={"max_steps": STEPS, "batch_size": 8, "micro_batch_size": 2, "gradient_accumulation": 2},
            evaluation={"generations": 3, "max_new_tokens": 4},
            parallelism={"strategy": "ddp"},
            checkpoints={"every": every},
            output={"uri": str(self.uri)},
            s3={"endpoint": self.proxy.endpoint},
        )
        return config.model_copy(update={"job": config.job.model_copy(update={"uid": uid, "attempt": attempt})})

    def newest(self, config: TrainerConfig, folder: Path) -> int | None:
        """The newest checkpoint that is complete, and whose files are what its manifest says."""
        checkpoints = CheckpointStore(self.store, config.run_uri, config, config.job.attempt)
        ref = checkpoints.newest_complete()
        if ref is None:
            return None
        assert checkpoints.download(ref, folder) == ref
        return ref.step

    def adapter(self, config: TrainerConfig) -> dict[str, torch.Tensor]:
        """The result's tensors."""
        folder = self.folder / f"got-{config.job.uid}"
        download(self.store, config.run_uri, folder)
        return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def place(
    pod: Pod, store: ObjectStore, seaweed: SeaweedServer, shared_bucket: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("moments")
    save_tiny_model(folder / "model")
    write_dataset(folder / "data.jsonl", repeat=3)
    write_dataset(folder / "heldout.jsonl", tuple((f"Tell me: {asked}", said) for asked, said in QUESTIONS[:5]))
    with FaultProxy(seaweed.endpoint) as proxy:
        yield Place(folder, pod, proxy, store, S3Uri(shared_bucket, f"{folder.name}/run"))


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> dict[str, torch.Tensor]:
    """The adapter of a job that nobody stopped."""
    config = place.job("undisturbed", 1, 1000)
    place.pod.start(config, place.folder / "undisturbed")
    assert place.pod.end() == 0, (place.folder / "undisturbed" / "log").read_text()
    return place.adapter(config)


def during_upload(pod: Pod, step: int, number: signal.Signals) -> Callable[[Request], Fault | None]:
    """Send a signal to the launcher when the files of a checkpoint come, which takes them some time."""
    sent: list[signal.Signals] = []

    def decide(request: Request) -> Fault | None:
        if request.method not in ("PUT", "POST") or f"/checkpoints/step-{step}/" not in request.path:
            return None
        if not sent:
            sent.append(number)
            os.kill(pod.launcher, number)
        return Fault.SLOW

    return decide


@pytest.mark.timeout(ATTEMPT_SECONDS * 18)
@pytest.mark.parametrize("chain", CHAINS)
def test_a_job_that_is_stopped_at_every_moment_ends_as_the_undisturbed(
    chain: str, place: Place, undisturbed: dict[str, torch.Tensor]
) -> None:
    uid = chain.replace(" ", "-")
    for attempt, moment in enumerate(CHAINS[chain], start=1):
        config = place.job(uid, attempt, moment.every)
        place.proxy.reset()
        if moment.upload_of is not None:
            place.proxy.decide = during_upload(place.pod, moment.upload_of, moment.then)
        folder = place.folder / f"{uid}-{attempt}"
        place.pod.start(config, folder, moment.interruption(everybody=chain == "everybody"))
        code = place.pod.end(ATTEMPT_SECONDS)
        log = f"{moment.name}:\n{(folder / 'log').read_text()[-6000:]}"
        assert code == moment.code, log
        told = folder / "termination"
        message = TerminationMessage.decode(told.read_text()) if told.exists() else None
        newest = place.newest(config, folder / "newest")
        if moment.every == 1:
            # The steps of a tiny model are quicker than any upload: how far it came is left open.
            assert message is not None and message.step is not None and moment.stops_at is not None
            assert moment.stops_at <= message.step == newest, log
        else:
            assert newest == (moment.stops_at or moment.newest), log
            assert (message.step if message is not None else None) == moment.stops_at, log
        if code == KILLED:
            assert message is None, log
        else:
            assert message is not None and message.exit_code == code, log
            assert message.reason == ("Preempted" if code else "Completed"), log
    tensors = place.adapter(config)
    assert tensors.keys() == undisturbed.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], undisturbed[name])] == []
