"""The planner's estimates against what torch allocates."""
