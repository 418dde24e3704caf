"""Throughput, latency, cost and capacity of the service."""
