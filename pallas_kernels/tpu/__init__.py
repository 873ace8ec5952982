"""Gist attention on TPU, in Pallas Mosaic."""
