"""Frames between server and client, their encoding, and what carries them."""
