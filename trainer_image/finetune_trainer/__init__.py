"""The trainer: one configuration in, one verified artefact in object storage out. It never imports the operator."""
