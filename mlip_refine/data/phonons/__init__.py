"""Phonon references: phonopy and phono3py files, force constants, collections and their splits."""
