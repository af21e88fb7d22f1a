"""Writers for experiment trackers; each needs the package of its name and is imported on first use."""
