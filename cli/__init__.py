"""The command line: one file per command, on top of quant_core (and of demo, for `quantpress demo`)."""
