"""The commands, one file each: arguments, the call of the engine, and what is printed."""
