"""`mlip-refine md`: molecular dynamics of the phases with averages and their errors."""
