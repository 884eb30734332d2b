"""Learned rounding: one loop; objectives, relaxations, optimizers, schedules and stop rules are data for it."""
