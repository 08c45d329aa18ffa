"""Faults, requests to stop, and restarts."""
