"""Runs over Flower: server app, client app, both transports, and simulation."""
