"""The operator's core, bound to a local cluster."""

from __future__ import annotations

from finetune_operator.clock import WallClock
from finetune_operator.local.cluster import LocalCluster
from finetune_operator.local.loop import Reconcile
from finetune_operator.planner import plan_job
from finetune_operator.planning import ModelConfigReader, Preparer
from finetune_operator.reconcile import Reconciler
from finetune_operator.settings import Settings


def reconciler(cluster: LocalCluster, settings: Settings, read_config: ModelConfigReader) -> Reconcile:
    """The same reconcile that runs in a cluster."""
    return Reconciler(cluster, Preparer(settings, read_config, plan_job), settings, WallClock()).reconcile
