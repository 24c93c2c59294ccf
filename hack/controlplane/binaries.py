"""Finds the control plane's programs, or has them built."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .build import Progress, build, cache_folder, crd_file, helm_folder, kubernetes_version
from .components import APISERVER, CONTROLLER_MANAGER, ETCD, HELM, TRAINING_OPERATOR
from .errors import BinariesMissing

_ASSETS = "KUBEBUILDER_ASSETS"
_SETUP = "setup-envtest"
_SETUP_SECONDS = 300.0


@dataclass(frozen=True)
class Binaries:
    """Where the programs are, and where they come from."""

    programs: Mapping[str, Path]
    source: str
    """For people: which place the API server comes from."""
    pytorchjob_crd: Path | None = None
    """There when the training operator is."""


def needed(*, controller_manager: bool, training_operator: bool) -> frozenset[str]:
    """The names of the programs that a control plane consists of."""
    names = {ETCD, APISERVER}
    if controller_manager:
        names.add(CONTROLLER_MANAGER)
    if training_operator:
        names.add(TRAINING_OPERATOR)
    return frozenset(names)


def find_binaries(
    programs: frozenset[str],
    *,
    environment: Mapping[str, str] | None = None,
    may_build: bool = True,
    progress: Progress = lambda line: None,
) -> Binaries:
    """Find the programs: KUBEBUILDER_ASSETS, then setup-envtest, the cache, a build.

    Kubernetes' programs come from one place, so that their versions fit together; the
    training operator is only ever built. A build takes minutes the first time.

    Raises:
        BinariesMissing: with what was tried and what to do.
        BuildFailed: the build was tried and failed.
    """
    environment = os.environ if environment is None else environment
    search = _Search(programs - {TRAINING_OPERATOR}, environment, progress)
    cache = cache_folder(environment)
    folder = search.assets() or search.setup_envtest() or search.cache(cache)
    from_cache = programs & {TRAINING_OPERATOR}
    if folder is None:
        from_cache = programs
        source = f"Go modules, built into {cache / 'bin'}"
    else:
        source = str(folder)
    if _lacking(cache / "bin", from_cache) or (TRAINING_OPERATOR in programs and not crd_file(cache).exists()):
        search.check_can_build(may_build)
        build(from_cache, cache, environment, progress)
    paths = {name: (cache / "bin" if folder is None or name in from_cache else folder) / name for name in programs}
    crd = crd_file(cache) if TRAINING_OPERATOR in programs else None
    return Binaries(paths, source, crd)


def find_helm(
    *,
    environment: Mapping[str, str] | None = None,
    may_build: bool = True,
    progress: Progress = lambda line: None,
) -> Path:
    """Find Helm: the cache, then PATH, then a build (3 minutes the first time).

    Raises:
        BinariesMissing: with what was tried and what to do.
        BuildFailed: the build was tried and failed.
    """
    environment = os.environ if environment is None else environment
    cache = helm_folder(environment)
    if not _lacking(cache / "bin", frozenset({HELM})):
        return cache / "bin" / HELM
    installed = shutil.which(HELM, path=environment.get("PATH"))
    if installed is not None:
        return Path(installed)
    if not may_build or shutil.which("go", path=environment.get("PATH")) is None:
        raise BinariesMissing(
            f"helm is not on PATH and not in the cache ({cache / 'bin'}): install it, or install Go 1.26 or newer and "
            "run `PYTHONPATH=hack python -m controlplane build`"
        )
    build(frozenset({HELM}), cache, environment, progress)
    return cache / "bin" / HELM


def _lacking(folder: Path, programs: frozenset[str]) -> list[str]:
    return sorted(name for name in programs if not os.access(folder / name, os.X_OK))


@dataclass
class _Search:
    """Looks in one place after the other and remembers why it was not there."""

    programs: frozenset[str]
    environment: Mapping[str, str]
    progress: Progress
    reasons: list[str] = field(default_factory=list)

    def assets(self) -> Path | None:
        """The folder that the environment names."""
        value = self.environment.get(_ASSETS)
        if not value:
            self.reasons.append(f"{_ASSETS} is not set")
            return None
        folder = Path(value)
        lacking = _lacking(folder, self.programs & {ETCD, APISERVER})
        if lacking:  # set on purpose: falling through would hide the mistake
            raise BinariesMissing(
                f"{_ASSETS} is {folder}, where there is no executable {' and no '.join(lacking)}: "
                "correct the variable, or unset it to use another place"
            )
        return self._complete(folder, f"{_ASSETS} ({folder})")

    def setup_envtest(self) -> Path | None:
        """What setup-envtest has, or downloads."""
        program = shutil.which(_SETUP, path=self.environment.get("PATH"))
        if program is None:
            self.reasons.append(f"{_SETUP} is not on PATH")
            return None
        if CONTROLLER_MANAGER in self.programs:
            self.reasons.append(f"{_SETUP} has no {CONTROLLER_MANAGER}")
            return None
        minor = ".".join(kubernetes_version().removeprefix("v").split(".")[:2])
        try:
            done = subprocess.run(
                [program, "use", "-p", "path", f"{minor}.x"],
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_SETUP_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            self.reasons.append(f"{_SETUP} failed: {error}")
            return None
        if done.returncode != 0:
            self.reasons.append(f"{_SETUP} failed: {done.stderr.strip()[-500:]}")
            return None
        return self._complete(Path(done.stdout.strip()), _SETUP)

    def cache(self, cache: Path) -> Path | None:
        """What was built before."""
        return self._complete(cache / "bin", f"the cache ({cache / 'bin'})")

    def _complete(self, folder: Path, place: str) -> Path | None:
        lacking = _lacking(folder, self.programs)
        if lacking:
            self.reasons.append(f"{place} has no {', no '.join(lacking)}")
            self.progress(self.reasons[-1])
            return None
        return folder

    def check_can_build(self, may_build: bool) -> None:
        """Raise where the programs cannot be built, with all that was tried."""
        if may_build and shutil.which("go", path=self.environment.get("PATH")):
            return
        self.reasons.append("go is not on PATH" if may_build else "building was not allowed")
        raise BinariesMissing(
            f"the control plane's programs are not here: {'; '.join(self.reasons)}. Install Go "
            "1.26 or newer and run `PYTHONPATH=hack python -m controlplane build`, or, for the API "
            f"server alone, point {_ASSETS} at a folder with {ETCD} and {APISERVER}"
        )
