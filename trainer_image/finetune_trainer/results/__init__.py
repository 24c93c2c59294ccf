"""What a run leaves behind: the artefact, what is made of it, and the manifest that vouches for it."""
