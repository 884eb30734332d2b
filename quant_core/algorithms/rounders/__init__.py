"""How codes are chosen: one file per rounder. A new one is that file and its place in ALL."""

from .base import Rounder
from .gptq import Gptq
from .learned import Learned
from .nearest import Nearest
from .stochastic import Stochastic

ALL: tuple[type[Rounder], ...] = (Nearest, Stochastic, Gptq, Learned)
ROUNDERS = {kind.name: kind for kind in ALL}
