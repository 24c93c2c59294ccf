"""What of the chart is generated: the schema of its values, and the kustomize base."""
