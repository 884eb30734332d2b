"""Checkpoint tools: edit, migrate, repair, exchange, merge. Each builds a Rewrite; `apply` writes it."""
