"""Engines run the clients of a run: in this process, or elsewhere over a transport."""
