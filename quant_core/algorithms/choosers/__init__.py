"""How scales are chosen. A chooser takes a Task and returns QParams."""

from . import absmax, search

CHOOSERS = {"absmax": absmax.choose, "search": search.choose}
CHOOSER_OPTIONS = (search.SearchOptions,)
