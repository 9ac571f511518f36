"""The examples, which are programs, and their parts, of which the benchmarks import some."""
