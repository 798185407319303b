"""Around a training: plan its memory, check its data, rehearse it, sweep over settings."""
