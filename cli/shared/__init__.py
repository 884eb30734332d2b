"""What several commands use: the console, progress, options, wording."""
