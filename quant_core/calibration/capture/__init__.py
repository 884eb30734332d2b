"""Watching a running model within a budget of memory."""
