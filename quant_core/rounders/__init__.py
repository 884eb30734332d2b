"""How codes are chosen. A rounder takes (format, work weight, QParams, evidence, options, generator).

It returns the codes [Np, Kp] and the QParams they belong to (a rounder may move the scales on).
"""
from . import nearest

ROUNDERS = {"nearest": nearest.round_codes}
