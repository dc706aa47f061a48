"""What a first reader may skip: files, checkpoints, benchmarks, runs, reports."""
