"""mlip_refine: correct pretrained MACE potentials, and keep what they know."""
