"""Lattice dynamics of a crystal: Hessians, bands, thermodynamics, anharmonicity and heat conduction."""
