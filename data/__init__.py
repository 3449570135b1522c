"""Data sets: what an image file is (`imagefiles`), and the commands that make data sets."""
