"""Model folders, and settings that make tiny models quick."""

from tests.quick_torch import quick_torch
from tests.unit.trainer_core.conftest import model_folder

__all__ = ["model_folder", "quick_torch"]
