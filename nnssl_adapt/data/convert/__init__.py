"""Datasets of other shapes become raw datasets in nnU-Net's format; the sources are never touched."""
