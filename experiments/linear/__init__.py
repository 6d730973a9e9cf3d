"""The demo as a model that is linear in w: see `../linear_model.py`."""
