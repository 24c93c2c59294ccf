"""What an attempt's manifests are made of."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_operator.api.v1alpha1 import FineTuneJobSpec, PlanStatus
from finetune_operator.observed import JobRef
from finetune_operator.settings import GpuType, TrainerDefaults


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of one job."""

    job: JobRef
    uid: str
    """UID of the FineTuneJob."""
    number: int
    """1 for the first."""
    spec: FineTuneJobSpec
    plan: PlanStatus
    defaults: TrainerDefaults
    """What applies where the spec says nothing."""
    progress_ca: str | None = None
    """PEM of the progress server's authority."""

    @property
    def name(self) -> str:
        """Name of its ConfigMap and its PyTorchJob."""
        return f"{self.job.name}-{self.number}"

    @property
    def processes_per_node(self) -> int:
        """One for each GPU of a pod; one on CPUs."""
        return max(1, self.plan.gpus_per_node)

    @property
    def gpu_type(self) -> GpuType | None:
        """What the cluster's administrator says of the GPUs; None on CPUs."""
        return self.defaults.gpu_type(self.spec.resources.gpu_resource) if self.plan.gpus_per_node else None

    @property
    def hands_out_ca(self) -> bool:
        """Whether the progress server's authority is told in the attempt's own ConfigMap."""
        return bool(self.defaults.progress_url and self.progress_ca and not self.defaults.progress_ca_config_map)

    @property
    def s3_secret(self) -> str | None:
        """Name of the Secret with the object store's credentials."""
        reference = self.spec.output.s3.secret_ref
        return reference.name if reference else self.defaults.s3_secret
