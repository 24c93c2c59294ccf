"""What can go wrong in this package."""

from __future__ import annotations


class ImageError(Exception):
    """A step failed, or an image is not what it should be; the message says which and, where it can, what to do."""
