"""Trains, evaluates and exports the models that Tenuto serves. Start at `cli.py`."""
