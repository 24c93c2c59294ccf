"""Before any test imports torch: threads that wait must not spin, since tests share two cores with servers."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Neither of them looks at the code: both measure wall time, which on a busy machine is the neighbours'. The first draw
# of a fresh clone, which builds Unicode tables, took three seconds.
settings.register_profile("busy-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy-machine")
