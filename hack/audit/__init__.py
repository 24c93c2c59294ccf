"""Checks that a security team asks for: the code (bandit), the locks, and secrets among the tracked files."""
