"What `import relax` promises."
import subprocess
import sys

import torch

import relax


def test_function_and_room_share_a_name():
    from relax import dsd
    from relax.dsd import dsd as function
    hidden, dictionary = torch.randn(2, 20, 6), relax.KoopmanDictionary(6, 3)
    assert torch.equal(dsd(hidden, dictionary), function(hidden, dictionary)) and dsd.koopman_spectrum is relax.koopman_spectrum
    import relax.dsd as room
    assert room is dsd


def test_import_is_light():
    heavy = "transformers trl peft datasets nbdev IPython matplotlib pandas bitsandbytes".split()
    code = f"import relax, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
