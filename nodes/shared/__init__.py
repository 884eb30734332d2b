"""What several nodes use: handles, folders, progress, texts."""
