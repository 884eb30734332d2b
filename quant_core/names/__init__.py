"""What things are called elsewhere: layers in files, in LoRAs and under diffusers' names."""
