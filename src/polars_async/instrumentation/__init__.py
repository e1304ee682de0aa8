"""Spans and metrics of queries, for OpenTelemetry and Prometheus; the rest never imports these."""
