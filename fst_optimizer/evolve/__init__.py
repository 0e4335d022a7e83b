"""The fast side: one light GEPA round per cycle, over the texts of a program."""
