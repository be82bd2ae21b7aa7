"""The open reference implementation of ReLaX: Koopman operators meet GRPO. Here is the handful that everyone needs; each room has more."""
__version__ = "0.1.0"

from types import ModuleType as _ModuleType

from . import dsd
from .dictionary import KoopmanDictionary
from .dsd import koopman_spectrum
from .grpo import GRPO, clipped_loss, group_advantages
from .hidden import capture_hidden, hidden_states
from .objective import ReLaX, adaptive_kl, exploration_loss, over_dispersed


class _CallableModule(_ModuleType):
    "Room and function share the name `dsd`: calling the room calls the function, so `from relax import dsd` works whichever one means."

    def __call__(self, *args, **kwargs): return self.dsd(*args, **kwargs)


dsd.__class__ = _CallableModule

__all__ = ["KoopmanDictionary", "dsd", "koopman_spectrum", "capture_hidden", "hidden_states", "GRPO", "ReLaX", "group_advantages", "clipped_loss",
           "exploration_loss", "over_dispersed", "adaptive_kl"]
