"""`python -m mlip_refine` is `mlip-refine`."""

from mlip_refine.cli import main

if __name__ == "__main__":
    main()
