"""Tritonmark load generator: MLPerf scenarios over a network server, open loop, every request a row."""
