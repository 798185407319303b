"""What runs inside MMEngine: runners, the train loop, the optimizer, hooks, the process."""
