"""Learning curves of a policy that is told which of two goals to reach, and of one that is not."""
