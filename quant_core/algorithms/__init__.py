"""How a layer is rounded: what is known and minimised; choosers of scales, rounders, and the learned fit."""
