"""Reading a config costs next to nothing: a typing error is answered before anything large is loaded."""

import json
import subprocess
import sys

HEAVY = {"torch", "ase", "numpy", "scipy", "e3nn", "mace", "h5py", "phonopy", "mlip_refine.losses"}


def test_importing_the_config_loads_no_large_library_and_is_quick():
    code = (
        "import json, sys, time; start = time.process_time(); import mlip_refine.config;"
        "print(json.dumps([time.process_time() - start, sorted(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, modules = json.loads(done.stdout)
    assert HEAVY.isdisjoint(modules)
    assert seconds < 0.4
