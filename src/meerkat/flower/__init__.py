"""Flower carries a run: server app, client app, and the simulation from our own command line."""
