"""Invertible changes of basis that a format records and the runtime repeats on its inputs."""
