"""What flows into every linear layer: captured, merged, saved, and handed to the algorithms as evidence."""
