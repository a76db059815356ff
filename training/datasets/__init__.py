"""Loaders of public data sets. They import numpy and pooch, and nothing else that is not Python's own.

Each module names its data's licence, canonical address and checksums; `store` says where files come from.
"""
