"""The pages of the site that are made from the code when the site is built, so that none of them can be stale."""
