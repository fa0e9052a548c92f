"""Thin adapters between HTTP and the service, one protocol each."""
