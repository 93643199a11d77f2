"""Properties of a crystal under a potential at rest: symmetry, relaxation, elastic constants, phonons."""
