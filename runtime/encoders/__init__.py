"""Frozen encoders of text, picture and sound, through `transformers`, and the audio windows at video rate."""
