"""Tests that boot real kernels: what a recording shows, against independent witnesses."""
