"""The options of the older tool convert_to_quant: parsed, mapped to ours, explained."""
