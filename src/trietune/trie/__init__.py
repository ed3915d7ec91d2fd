"""Token sequences become tries, batches and micro-batches. Pure NumPy: nothing here knows torch or files."""
