"""A cluster on this machine: hack/controlplane's servers, the operator, S3, and a node that runs pods as processes.

For `make demo-cluster` and tests/e2e. It stands beside the product: the control plane knows nothing of it, and of the
operator it uses the node agent of `finetune run`, and the program itself.
"""

from .cluster import DemoCluster, DemoError, Options

__all__ = ["DemoCluster", "DemoError", "Options"]
