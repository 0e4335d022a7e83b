"""Multi-hop claim verification over a corpus of invented facts, or over HoVer's own."""
