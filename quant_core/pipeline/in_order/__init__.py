"""Quantizing in order of execution: recorded calls that wait for each layer."""
