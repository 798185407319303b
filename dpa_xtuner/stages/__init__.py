"""The three stages: what each one is, and which one comes next."""
