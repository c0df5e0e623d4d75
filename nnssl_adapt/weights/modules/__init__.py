"""Networks of our own, each in one file that needs torch (and MONAI where it says so) and nothing of this package.

The text of such a file is written beside trained models (``trainer_class.py``), so that nnU-Net can build the network where
this package is not installed. What a network is, as plain data, stands in ``weights/network``.
"""
