"""The options of the older tool convert_to_quant: parsed, mapped to ours, explained."""

from .command import add_parser

__all__ = ["add_parser"]
