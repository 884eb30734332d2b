"""Which layer gets which recipe."""
