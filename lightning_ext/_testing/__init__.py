"""The rooms behind :mod:`lightning_ext.testing`."""
