"""What several nodes use. It imports nothing from jobs/."""
