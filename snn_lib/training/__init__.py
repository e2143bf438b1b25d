"""Running an experiment: the loop, what a user types, and the files that a run leaves."""
