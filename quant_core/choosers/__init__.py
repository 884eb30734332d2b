"""How scales are chosen. A chooser takes (format, work weight, evidence, options) and returns QParams."""
from . import absmax

CHOOSERS = {"absmax": absmax.choose}
