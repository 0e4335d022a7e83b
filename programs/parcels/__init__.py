"""Parcels: sort and pack them by lists of conditions, and a small model that can follow such lists."""
