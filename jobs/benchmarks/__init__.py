"""What `jobs/bench.py` measures, one module a benchmark; each has `run(arguments) -> result`."""
