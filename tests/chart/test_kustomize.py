"""The kustomize base is what the chart gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from chart import kustomize
from finetune_operator.api import crd
from tests.chart.helm import CHART, NAMESPACE, ROOT, Helm, Rendered

BASE = ROOT / "charts" / "kustomize" / "base"
KUBECTL = str(Path(sys.executable).with_name("kubectl"))


def test_it_is_fresh(helm: Helm) -> None:
    assert (BASE / "install.yaml").read_text() == kustomize.base(helm.program, CHART), "run `make kustomize`"


def test_it_builds_and_is_whole(helm: Helm) -> None:
    done = subprocess.run([KUBECTL, "kustomize", str(BASE)], capture_output=True, text=True, timeout=60, check=True)
    built = Rendered(list(yaml.load_all(done.stdout, yaml.CSafeLoader)))
    chart = helm.template()
    assert built.kinds() == chart.kinds() - {"Pod"} | {"Namespace"}
    assert built.one("Deployment")["spec"] == chart.one("Deployment")["spec"]
    meta = built.one("CustomResourceDefinition")["metadata"]
    assert meta["name"] == crd.manifest()["metadata"]["name"]
    # Argo CD takes bases of kustomize, too; what is Helm's alone is not in it.
    assert meta["annotations"] == {"argocd.argoproj.io/sync-options": "ServerSideApply=true,Prune=false"}
    assert {one["metadata"].get("namespace", NAMESPACE) for one in built.objects} == {NAMESPACE}
    assert "helm" not in done.stdout.lower()
