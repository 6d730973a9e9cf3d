"""Hypothesis strategies that several tests draw from."""

from __future__ import annotations

from hypothesis import strategies as st

from meerkat.zo.noise import SHARED, NoiseKey

__all__ = ["noise_keys"]

noise_keys = st.builds(
    NoiseKey,
    seed=st.integers(0, 2**63 - 1),
    round=st.integers(0, 2**31 - 1),
    step=st.integers(0, 2**16 - 1),
    perturbation=st.integers(0, 2**8 - 1),
    client=st.integers(0, SHARED),
)
