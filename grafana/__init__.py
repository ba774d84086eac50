"""Dashboards as code: `python -m grafana` writes dashboards/*.json from METRICS and the panel lists of this folder.

live.py, generations.py and fleet.py say what is asked and why; panels.py turns that into Grafana's JSON with the
Grafana Foundation SDK. The JSON is committed, and `python -m grafana --check` (part of `make check`) fails when it is
stale. Nothing here is needed to run a load test.
"""
