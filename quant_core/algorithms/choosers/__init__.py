"""How scales are chosen: one file per chooser. A new one is that file and its place in ALL."""

from .absmax import Absmax
from .base import Chooser
from .search import Search

ALL: tuple[type[Chooser], ...] = (Absmax, Search)
CHOOSERS = {kind.name: kind for kind in ALL}
