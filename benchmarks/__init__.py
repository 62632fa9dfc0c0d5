"""Scripts that measure: one a claim, each prints a ratio measured in one run."""
