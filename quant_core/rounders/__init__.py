"""How codes are chosen. A rounder takes a Task and QParams, and returns Rounded (it may move the scales on)."""
from . import gptq, nearest, stochastic

ROUNDERS = {"nearest": nearest.round_codes, "stochastic": stochastic.round_codes, "gptq": gptq.round_codes}
ROUNDER_OPTIONS = (gptq.GptqOptions,)
# Rounders that serve another aim than the smallest error: the comparison with round-to-nearest is not for them.
UNBIASED = frozenset({"stochastic"})
