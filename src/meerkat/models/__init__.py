"""Language models: loading, fingerprint, packed attention, objectives."""
