"""One machine in place of a cluster: the `Cluster` protocol in memory, its pods as processes, and an S3 server.

Nothing here needs Kubernetes, a GPU or root. Every process started here ends with the process that started it.
"""
