"""What people do around a training: plan it, check its data, rehearse it, repeat it in a sweep."""
