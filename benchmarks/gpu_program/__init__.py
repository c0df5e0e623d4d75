"""The parts of ``benchmarks/gpu.py``: one file a stage, and what they share."""
