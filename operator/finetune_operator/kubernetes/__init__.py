"""The only package that talks to an API server: `cluster.Cluster` over lightkube, the Lease, TokenReview."""
