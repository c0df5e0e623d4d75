"""Families of published networks: one file each, registered in ``registry.py``; key maps and facts as data."""
