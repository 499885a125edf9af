"""Weights that differ between modules: by layer, by kind of module, by name, by block of an image
model.
"""
