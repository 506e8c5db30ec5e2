"""Throughput benchmarks, and the demo. All of it runs in namespaces that it makes and removes."""
