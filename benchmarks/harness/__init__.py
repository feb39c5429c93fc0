"""What `benchmarks/update.py` is made of: contenders, timing, what is measured, and the report."""
